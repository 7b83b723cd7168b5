"""Reads of what lies in several fragments: whatever box is wanted, wherever it is to go, and every block of it checked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ckpt
from ckpt import fill, loading
from ckpt.backends import Backend, LocalBackend
from ckpt.backends.direct import ReadOnce
from ckpt.collective import Solo
from ckpt.errors import IntegrityError
from ckpt.format.codec import BLOCK
from ckpt.format.fragment import Box
from ckpt.offline.reshard import reshard
from ckpt.options import LoadOptions
from ckpt.read import Target, plan_reads, read_targets
from ckpt.targets import Matching
from tests.unit.test_read_once import cached, drop

SHAPES = {"x": (700, 1000), "y": (6, 50, 70), "z": (300_000,), "coded": (500, 300), "n": ()}


def values() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return {name: torch.randint(-99, 99, shape, generator=g).to(torch.int32) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Pieces by rank -> a run of one step in which every tensor is cut into so many."""
    folder = tmp_path_factory.mktemp("runs")
    ckpt.save(values(), folder / "1", step=1, codec={"coded": "zstd"})
    for ranks in (3, 13):
        reshard(folder / "1", folder / str(ranks), ranks=ranks, group=Solo())
    return {ranks: folder / str(ranks) for ranks in (1, 3, 13)}


def backends(root: Path) -> Iterator[Backend]:
    yield LocalBackend(str(root))
    for pack in root.rglob("rank-*.safetensors"):
        drop(pack)
    yield ReadOnce(str(root))


@st.composite
def wishes(draw: st.DrawFn) -> list[tuple[str, Box, tuple[int, ...]]]:
    """Boxes of tensors, each with an order of its axes in memory."""
    out = []
    for name in draw(st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, max_size=4)):
        offset, extent = [], []
        for axis, n in enumerate(SHAPES[name]):
            whole = axis > 0 and draw(st.booleans())
            lo = 0 if whole else draw(st.integers(0, n))
            offset.append(lo)
            extent.append(n if whole else draw(st.integers(0, n - lo)))
        order = draw(st.permutations(range(len(extent))))
        out.append((name, Box(tuple(offset), tuple(extent)), tuple(order if draw(st.booleans()) else sorted(order))))
    return out


@pytest.mark.parametrize("ranks", [1, 3, 13])
@given(wanted=wishes())
@settings(max_examples=25, deadline=None)
def test_any_boxes_into_any_memory(runs: dict[int, Path], ranks: int, wanted: list[Any]) -> None:
    stored = {name: tensor.numpy() for name, tensor in values().items()}
    for backend in backends(runs[ranks]):
        with ckpt.open(runs[ranks]) as c:
            m, folder = c.manifest, c.commit.folder
            targets = []
            for name, box, order in wanted:
                memory = np.zeros([box.shape[d] for d in order], np.int32)
                targets.append(Target(m.index(name), box, memory.transpose(np.argsort(order)) if order else memory))
            stats = read_targets(backend, folder, m, targets, threads=2, streams=3, at_once=True)
        for (name, box, _), target in zip(wanted, targets, strict=True):
            assert np.array_equal(target.array, stored[name][box.slices])
        assert stats.needed == sum(t.array.nbytes for t in targets)
        backend.close()


def test_what_is_next_to_one_another_is_one_segment(runs: dict[int, Path]) -> None:
    with ckpt.open(runs[3]) as c:
        m, memory = c.manifest, np.zeros((600, 1000), np.int32)
        plan = plan_reads(m, [Target(m.index("x"), Box((50, 0), (600, 1000)), memory)])
    segments = [s for pack in sorted(plan) for s in plan[pack]]
    assert [len(s.direct or b"") for s in segments] == [184 * 4000, 234 * 4000, 182 * 4000]
    assert [s.skip for s in segments] == [50 * 4000, 0, 0] and [s.first for s in segments] == [0, 0, 0]
    assert sum(s.nbytes for s in segments) - memory.nbytes < 2 * BLOCK


@pytest.mark.parametrize("once", [False, True])
def test_every_byte_of_a_block_counts_wherever_it_goes(runs: dict[int, Path], tmp_path: Path, once: bool) -> None:
    """Of the blocks at the edges of a box some bytes are read that nobody asked for."""
    ckpt.save({"x": torch.arange(400_000, dtype=torch.int32)}, tmp_path / "run", step=1)
    pack = next((tmp_path / "run").rglob("rank-*.safetensors"))
    with ckpt.open(tmp_path / "run") as c:
        m, folder, start = c.manifest, c.commit.folder, int(c.manifest.offset[0])
    lo, n = 100_000, 200_000  # elements: from the middle of block 1 to the middle of block 4
    for at in (4 * lo - 1, 4 * lo, BLOCK, 2 * BLOCK + 5, 4 * (lo + n) - 1, 4 * (lo + n), 5 * BLOCK - 1):
        with pack.open("r+b") as f:
            f.seek(start + at)
            byte = f.read(1)[0]
            f.seek(start + at)
            f.write(bytes([byte ^ 16]))
        drop(pack)
        out = np.zeros(n, np.int32)
        backend = ReadOnce(str(tmp_path / "run")) if once else LocalBackend(str(tmp_path / "run"))
        with pytest.raises(IntegrityError, match=f"block {at // BLOCK} .*'x'"):
            read_targets(backend, folder, m, [Target(0, Box((lo,), (n,)), out)], at_once=True)
        backend.close()
        with pack.open("r+b") as f:
            f.seek(start + at)
            f.write(bytes([byte]))
    with ckpt.open(tmp_path / "run") as c:
        assert torch.equal(c.tensors["x"][lo : lo + n], torch.arange(lo, lo + n, dtype=torch.int32))


class Twin(LocalBackend):
    """Files of which there is a copy elsewhere."""

    def __init__(self, root: Path, copy: Path) -> None:
        super().__init__(str(root))
        self._copy = LocalBackend(str(copy))

    def otherwise(self, path: str, offset: int, into: memoryview) -> Iterator[str]:
        self._copy.read(path, offset, [into])
        yield "from the copy"


def test_a_block_that_lies_here_and_there_is_mended(tmp_path: Path) -> None:
    ckpt.save({"x": torch.arange(400_000, dtype=torch.int32)}, tmp_path / "run", step=1)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    pack = next((tmp_path / "run").rglob("rank-*.safetensors"))
    with ckpt.open(tmp_path / "run") as c:
        m, folder, start = c.manifest, c.commit.folder, int(c.manifest.offset[0])
    lo, n = 100_000, 200_000
    with pack.open("r+b") as f:
        for at in (BLOCK, 4 * lo + 8, 3 * BLOCK, 4 * (lo + n) - 8):
            f.seek(start + at)
            f.write(b"....")
    out = np.zeros(n, np.int32)
    read_targets(Twin(tmp_path / "run", tmp_path / "copy"), folder, m, [Target(0, Box((lo,), (n,)), out)])
    assert np.array_equal(out, np.arange(lo, lo + n))


def test_cold_files_are_loaded_past_the_cache_where_no_two_ranks_need_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fill, "_MUCH", 1 << 20)  # smaller loads are not worth while; this one should be
    saved = {"w": torch.randn(3000, 1001), "b": torch.randn(77), "h": torch.randn(50, 999).to(torch.bfloat16)}
    ckpt.save(saved, tmp_path / "run", step=1)
    pack = next((tmp_path / "run").rglob("rank-*.safetensors"))
    ReadOnce(str(tmp_path)).read(os.path.relpath(pack, tmp_path), 0, [memoryview(bytearray(100))])
    drop(pack)
    assert cached(pack) == 0
    for apart in (True, False):
        if not apart:  # as the leader finds where copies are wanted
            monkeypatch.setattr(loading, "_COPIED", -1)
        fresh = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
        ckpt.load(fresh, tmp_path / "run")
        assert all(torch.equal(fresh[name], saved[name]) for name in saved)
        if apart and cached(pack):
            pytest.skip("no direct reads here, or this kernel does not tell what is cached")
        assert (cached(pack) > 0) == (not apart)


def test_who_needs_copies_of_the_same_reads_them_through_the_cache(runs: dict[int, Path]) -> None:
    def letter(state: dict[str, Any]) -> bytes:
        mine = Matching(c.manifest, LoadOptions(), Solo())
        mine.visit(state)
        return mine.letter()

    with ckpt.open(runs[1]) as c:
        plan, whole = Matching(c.manifest, LoadOptions(), Solo()), values()
        upper, lower = (
            {"x": ckpt.Shard(whole["x"][rows], (700, 1000), (rows.start, 0))}
            for rows in (slice(0, 350), slice(350, 700))
        )
        most = letter(whole | upper)
        assert loading._compare([letter(whole)], plan, LoadOptions()) == b"apart"
        assert loading._compare([letter(upper), letter(lower)], plan, LoadOptions()) == b"apart"
        assert loading._compare([letter(whole), letter(whole)], plan, LoadOptions()) == b""
        assert loading._compare([letter(whole), letter(upper)], plan, LoadOptions()) == b""
        assert loading._compare([most, letter(lower)], plan, LoadOptions()) == b"apart"
