"""Files that are read once go past the page cache: the same bytes, in place where they lie alike, and what is cached from there."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ckpt
from ckpt.backends import LocalBackend, MemoryBackend
from ckpt.backends.direct import PAGE, ReadOnce, read_once
from ckpt.errors import IntegrityError, NotFoundError

SIZE = (5 << 20) + 777


def cached(file: Path) -> int:
    """Pages of a file that are in the page cache, as mincore(2) says."""
    with file.open("r+b") as f, mmap.mmap(f.fileno(), 0) as memory:
        seen = (ctypes.c_ubyte * (-(-len(memory) // mmap.PAGESIZE)))()
        pointer = ctypes.c_char.from_buffer(memory)
        try:
            assert (
                ctypes.CDLL(None).mincore(
                    ctypes.c_void_p(ctypes.addressof(pointer)), ctypes.c_size_t(len(memory)), seen
                )
                == 0
            )
        finally:
            del pointer
        return sum(v & 1 for v in seen)


def drop(file: Path) -> None:
    """Takes a file out of the page cache."""
    fd = os.open(file, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8).tobytes())
    drop(path)
    ReadOnce(str(tmp_path)).read("file", 0, [memoryview(bytearray(100))])
    if cached(path):
        pytest.skip("no direct reads here, or this kernel does not tell what is cached")
    return path


def test_any_range_into_memory_that_lies_anyhow(file: Path) -> None:
    backend, data = ReadOnce(str(file.parent)), file.read_bytes()
    drop(file)
    memory = mmap.mmap(-1, SIZE + 6 * PAGE)  # begins with a page

    @settings(max_examples=120, deadline=None)
    @given(
        st.integers(0, SIZE),
        st.lists(st.one_of(st.integers(0, 3 * PAGE), st.integers(0, 5 << 20)), max_size=3),
        st.booleans(),
        st.integers(0, PAGE),
    )
    def look(offset: int, sizes: list[int], alike: bool, at: int) -> None:
        whole = memoryview(memory)[offset % PAGE if alike else at :]
        views = []
        for n in sizes:
            views.append(whole[:n])
            whole = whole[n:]
        end = offset + sum(sizes)
        if end > SIZE:
            with pytest.raises(IntegrityError, match="cut short"):
                backend.read("file", offset, views)
            return
        memory[:] = bytes(len(memory))
        backend.read("file", offset, views)
        assert b"".join(map(bytes, views)) == data[offset:end]
        assert not any(memory[len(memory) - len(whole) :]), "bytes beyond the buffers were written"

    look()
    backend.close()


def test_bytes_go_straight_where_they_lie_alike(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bool:
        raise AssertionError("by way of scratch memory")

    monkeypatch.setattr(ReadOnce, "_by_way", refuse)
    memory = memoryview(mmap.mmap(-1, SIZE + PAGE))
    ReadOnce(str(file.parent)).read("file", 100, [memory[100:SIZE]])
    assert memory[100:SIZE] == file.read_bytes()[100:]


def test_what_is_cached_is_read_from_there(file: Path) -> None:
    data = file.read_bytes()
    assert cached(file)
    backend, out = ReadOnce(str(file.parent)), bytearray(SIZE)
    backend.read("file", 0, [memoryview(out)])
    assert bytes(out) == data
    assert not backend._files, "it was opened for direct reads"
    drop(file)
    ReadOnce(str(file.parent)).read("file", 0, [memoryview(out)])
    assert cached(file) == 0, "it was read by way of the cache"


def test_a_filesystem_that_refuses_them(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bool:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(ReadOnce, "_read", refuse)
    out = bytearray(1 << 20)
    ReadOnce(str(file.parent)).read("file", 5, [memoryview(out)])
    assert bytes(out) == file.read_bytes()[5 : 5 + len(out)]


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        ReadOnce(str(tmp_path)).read("nothing", 0, [memoryview(bytearray(5))])


def test_for_whom(tmp_path: Path) -> None:
    memory, plain = MemoryBackend("x"), LocalBackend(str(tmp_path), direct=False)
    assert read_once(memory) is memory and read_once(plain) is plain
    assert isinstance(read_once(LocalBackend(str(tmp_path))), ReadOnce)


@pytest.mark.parametrize("direct", ["1", "0"])
def test_an_average_of_cold_checkpoints_leaves_the_cache_alone(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: str
) -> None:
    state: dict[str, Any] = {"w": torch.randn(700, 1000), "v": torch.randn(301, 77), "n": torch.arange(70_000), "e": 5}
    for step in range(3):
        state["w"] += 1
        ckpt.save(state, tmp_path / "run", step=step)
    packs = sorted((tmp_path / "run").rglob("rank-*.safetensors"))
    for pack in packs:
        drop(pack)
    monkeypatch.setenv("CKPT_DIRECT", direct)
    copied: list[int] = []
    by_way = ReadOnce._by_way

    def counted(self: ReadOnce, fd: int, offset: int, into: Sequence[memoryview]) -> bool:
        copied.append(sum(map(len, into)))
        return by_way(self, fd, offset, into)

    monkeypatch.setattr(ReadOnce, "_by_way", counted)
    ckpt.materialise(ckpt.average(tmp_path / "run"), tmp_path / "dst")
    tensors = ckpt.open(tmp_path / "dst").tensors
    assert torch.allclose(tensors["w"].read(), state["w"] - 1, atol=1e-5)
    assert torch.allclose(tensors["v"].read(), state["v"]) and torch.equal(tensors["n"].read(), state["n"])
    assert all((cached(p) == 0) == (direct == "1") for p in packs)
    assert sum(copied) < 64 << 10  # headers and block tables: tensors go straight into the windows
