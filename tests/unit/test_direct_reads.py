"""What is not in the page cache is read past it: the same bytes, and not by ranks that need the same ones."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ckpt
from ckpt.backends import LocalBackend, MemoryBackend
from ckpt.backends.direct import DirectReads, past_cache
from ckpt.errors import IntegrityError

SIZE = (9 << 20) + 777


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
    if past_cache(LocalBackend(str(tmp_path)), ["file"]) is None:
        pytest.skip("this kernel does not tell what is cached, or the file stays in the cache")
    return path


def test_any_range_into_any_views(file: Path) -> None:
    backend, data = DirectReads(str(file.parent)), file.read_bytes()

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, SIZE), st.lists(st.integers(0, 5 << 20), max_size=4))
    def look(offset: int, sizes: list[int]) -> None:
        views = [np.zeros(n, dtype=np.uint8) for n in sizes]
        if offset + sum(sizes) > SIZE:
            with pytest.raises(IntegrityError, match="cut short"):
                backend.read("file", offset, [memoryview(v) for v in views])
            return
        backend.read("file", offset, [memoryview(v) for v in views])
        assert b"".join(v.tobytes() for v in views) == data[offset : offset + sum(sizes)]

    look()
    backend.close()


def test_what_is_cached_is_read_from_the_cache(file: Path) -> None:
    backend = LocalBackend(str(file.parent))
    assert isinstance(past_cache(backend, ["file"]), DirectReads)
    DirectReads(str(file.parent)).read("file", 0, [memoryview(bytearray(SIZE))])
    assert past_cache(backend, ["file"]) is not None, "direct reads went by way of the cache"
    file.read_bytes()
    assert past_cache(backend, ["file"]) is None
    drop(file)
    assert past_cache(LocalBackend(str(file.parent), direct=False), ["file"]) is None
    assert past_cache(backend, ["nothing"]) is None and past_cache(MemoryBackend("x"), ["file"]) is None


def test_a_filesystem_without_direct_reads(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(22, "Invalid argument")

    data, out = file.read_bytes(), bytearray(1 << 20)
    monkeypatch.setattr(DirectReads, "_read", refuse)
    DirectReads(str(file.parent)).read("file", 5, [memoryview(out)])
    assert bytes(out) == data[5 : 5 + len(out)]


def test_a_cold_checkpoint_is_loaded_past_the_cache(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"w": torch.randn(700, 1000), "bits": torch.randint(0, 2, (5_000_003,), dtype=torch.uint8), "n": 5}
    ckpt.save(state, tmp_path / "run")
    read: list[int] = []
    before = DirectReads.read

    def counted(self: DirectReads, path: str, offset: int, into: list[memoryview]) -> None:
        read.append(sum(len(v) for v in into))
        before(self, path, offset, into)

    monkeypatch.setattr(DirectReads, "read", counted)
    for pack in (tmp_path / "run").rglob("rank-*.safetensors"):
        drop(pack)
    for direct, past in (("1", True), ("0", False)):
        read.clear()
        monkeypatch.setenv("CKPT_DIRECT", direct)
        fresh = {"w": torch.zeros(700, 1000), "bits": torch.zeros(5_000_003, dtype=torch.uint8), "n": 0}
        ckpt.load(fresh, tmp_path / "run")
        assert torch.equal(fresh["w"], state["w"]) and torch.equal(fresh["bits"], state["bits"])  # type: ignore[arg-type]
        assert (sum(read) >= 7_800_003) == past
