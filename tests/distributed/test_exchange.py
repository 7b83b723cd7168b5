"""Loads in which each byte is read once a job and passed on: bit for bit what a load without it gives."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pool import Pool

import ckpt
from ckpt import exchange, loading
from ckpt.backends import LocalBackend
from ckpt.backends.base import Buffer
from ckpt.exchange import RANGE, Units, divide

ROWS, WIDE = 24, 70_000


class Counting(LocalBackend):
    """What was asked for: (path, from, to)."""

    asked: list[tuple[str, int, int]]

    def read(self, path: str, offset: int, into: Sequence[Buffer]) -> None:
        n = sum(len(b) for b in into)
        with _lock:
            self.asked.append((path, offset, offset + n))
        super().read(path, offset, into)


_lock = threading.Lock()


def _tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "rows": torch.randn(ROWS, WIDE),  # cut by rows
        "columns": torch.randn(ROWS, WIDE),  # cut by columns, which one rank needs of every row
        "everywhere": torch.randn(900_000),
        "half": torch.randn(300_001).to(torch.bfloat16),
        "small": torch.arange(7),
    }


def _parts(full: dict[str, torch.Tensor], rank: int, world: int) -> dict[str, Any]:
    """This rank's part of everything, in fresh memory."""
    rows = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    columns = slice(rank * WIDE // world, (rank + 1) * WIDE // world)
    return {
        "rows": ckpt.Shard(full["rows"][rows].clone(), (ROWS, WIDE), (rows.start, 0)),
        "columns": ckpt.Shard(full["columns"][:, columns].clone(), (ROWS, WIDE), (0, columns.start)),
        **{name: full[name].clone() for name in ("everywhere", "half", "small")},
    }


def _save(rank: int, world: int, run: str, codec: dict[str, Any] | None) -> None:
    ckpt.save(_parts(_tensors(), rank, world), run, codec=codec)


def _flat(part: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {k: getattr(v, "tensor", v) for k, v in part.items()}


def _load(rank: int, world: int, run: str, turn: int, cast: bool) -> tuple[list[tuple[str, int, int]], int]:
    """What this rank asked the store for, and what its report says of that. Every value is right."""
    full = _tensors()
    state = _parts({k: torch.zeros_like(v) for k, v in full.items()}, rank, world)
    wanted = _flat(_parts(full, rank, world))
    if cast:
        state["half"] = torch.zeros(300_001)
        wanted["half"] = wanted["half"].float()
    Counting.asked = []
    before = loading.backend_for, Units.of
    loading.backend_for = lambda url: Counting(url)  # type: ignore[attr-defined]
    Units.of = staticmethod(lambda manifest: before[1](manifest, turn))  # type: ignore[method-assign, assignment]
    try:
        report = ckpt.load(state, run, exchange=True, cast=cast)
    finally:
        loading.backend_for, Units.of = before  # type: ignore[attr-defined, method-assign]
    found = _flat(state)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    return Counting.asked, report.bytes_read


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize(("turn", "cast"), [(exchange.TURN, False), (1 << 20, True)])
def test_each_byte_is_read_once(pool: Pool, tmp_path: Path, world: int, turn: int, cast: bool) -> None:
    run = tmp_path / "run"
    pool.run(_save, str(run), None, world=4)
    told = pool.run(_load, str(run), turn, cast, world=world)
    total = sum(p.stat().st_size for p in run.rglob("rank-*"))
    asked = [a for found, _ in told for a in found]
    if world > 1:
        assert sum(hi - lo for _, lo, hi in asked) <= 1.02 * total
        assert sum(n for _, n in told) <= 1.02 * total
        data = [a for a in asked if a[2] - a[1] > 64 << 10]  # but for headers and tables
        seen: dict[str, list[tuple[int, int]]] = {}
        for path, lo, hi in sorted(data):
            assert not seen.get(path) or seen[path][-1][1] <= lo, "a byte that was asked for twice"
            seen.setdefault(path, []).append((lo, hi))
        assert all(hi - lo <= RANGE for _, lo, hi in data)
        reads = [sum(hi - lo for _, lo, hi in found) for found, _ in told]
        assert max(reads) <= 1.5 * total / world + RANGE


def test_coded_fragments_are_exchanged_as_they_are(pool: Pool, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pool.run(_save, str(run), {"everywhere": "zstd", "columns": "zstd"}, world=4)
    told = pool.run(_load, str(run), 4 << 20, True, world=2)
    total = sum(p.stat().st_size for p in run.rglob("rank-*"))
    assert sum(n for _, n in told) <= 1.02 * total


def _damaged(rank: int, world: int, run: str) -> str:
    full = _tensors()
    state = _parts({k: torch.zeros_like(v) for k, v in full.items()}, rank, world)
    try:
        ckpt.load(state, run, exchange=True)
    except ckpt.CkptError as e:
        return f"{e.kind}: {e}"
    return "loaded"


def test_damage_that_one_rank_reads_is_an_error_of_all(pool: Pool, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pool.run(_save, str(run), None, world=4)
    pack = sorted(run.rglob("rank-*"))[3]
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 1
    pack.write_bytes(data)
    told = pool.run(_damaged, str(run), world=4)
    assert len(set(told)) == 1 and told[0].startswith("integrity: ") and "rank-00003" in told[0]


def _breaking(rank: int, world: int, run: str) -> str:
    """One rank's store fails in the middle."""

    class Failing(LocalBackend):
        def read(self, path: str, offset: int, into: Sequence[Buffer]) -> None:
            if rank == 1 and sum(len(b) for b in into) > 1 << 20:
                raise ckpt.StorageError("the store is gone")
            super().read(path, offset, into)

    before = loading.backend_for
    loading.backend_for = lambda url: Failing(url)  # type: ignore[attr-defined]
    try:
        return _damaged(rank, world, run)
    finally:
        loading.backend_for = before  # type: ignore[attr-defined]


def test_a_rank_that_cannot_read_is_an_error_of_all(pool: Pool, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pool.run(_save, str(run), None, world=4)
    told = pool.run(_breaking, str(run), world=4)
    assert len(set(told)) == 1 and told[0].startswith("storage: ") and "the store is gone" in told[0]


needs = st.integers(1, 5).flatmap(
    lambda world: st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 9), st.integers(0, 3), st.integers(0, 2**world - 1)), max_size=40
    ).map(lambda rows: (world, rows))
)


@given(needs, st.integers(1 << 18, 1 << 21))
def test_who_reads_what(case: tuple[int, list[tuple[int, int, int, int]]], unit: int) -> None:
    """Units of a few packs with gaps between them, and who needs each: every one that is needed is in one range."""
    world, rows = case
    rows = sorted(rows, key=lambda r: r[0])
    pack = np.array([r[0] for r in rows], np.int64)
    n = np.array([r[1] * unit // 9 for r in rows], np.int64)
    gap = np.array([r[2] * 50_000 for r in rows], np.int64)
    lo = np.cumsum(n + gap) - n
    need = np.array([[bool(r[3] >> k & 1) for r in rows] for k in range(world)]).reshape(world, len(rows))
    units = Units(np.zeros(len(rows), np.int64), pack, lo, n, np.zeros(0, np.int64), ())
    used, begin, owner = divide(units, need)
    assert used.tolist() == [k for k in range(len(rows)) if need[:, k].any()]
    stop = [*begin[1:].tolist(), len(used)][: len(begin)]
    for a, b, who in zip(begin.tolist(), stop, owner.tolist(), strict=True):
        ids = used[a:b]
        assert len(ids) and len(set(pack[ids].tolist())) == 1
        assert lo[ids[-1]] + n[ids[-1]] - lo[ids[0]] <= RANGE + unit
        assert need[who, ids].any()
