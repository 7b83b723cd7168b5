"""Local tiers of several hosts: each has its own packs on its own disk, and together they are a checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool

import ckpt
from ckpt.backends import LocalBackend
from ckpt.backends.faulty import Fault, FaultyBackend
from ckpt.catalog import list_run
from ckpt.offline.copy import copy_step

LENGTH = 40_000


def _values(rank: int, version: int) -> torch.Tensor:
    return torch.arange(LENGTH) + 10 * rank + version


def _state(rank: int, world: int, version: int) -> dict[str, Any]:
    """A part of `own` for each rank, and `copy`, which one of them stores."""
    own = ckpt.Shard(_values(rank, version), (LENGTH * world,), (LENGTH * rank,))
    return {"own": own, "copy": torch.full((1000,), float(version)), "n": ckpt.Replicated(version)}


def _job(rank: int, world: int, folder: str, disks: list[int], upto: int, away: bool) -> tuple[int, bool, int]:
    """A life: restore, then steps up to `upto`, and then it dies. `disks`: the disk of each rank's host.

    Returns where it began, whether every value was what it had been, and how many steps it brought to the remote.
    """
    state = _state(rank, world, -1)
    local = ckpt.Local(f"{folder}/disk{disks[rank]}", ckpt.Every(1), [ckpt.KeepLast(2)])
    cp = ckpt.Checkpointer(f"{folder}/run", state, storage=ckpt.Every(2), local=local)
    start = cp.restore()
    wanted = _state(rank, world, start - 1)
    good = not start or (
        torch.equal(state["own"].tensor, wanted["own"].tensor) and torch.equal(state["copy"], wanted["copy"])
    )
    assert cp._tiers is not None
    if away:
        cp._tiers.way.remote = FaultyBackend(cp._tiers.way.remote, [Fault("new", "error", nth=0)])
    for n in range(start, upto):
        fresh = _state(rank, world, n)
        state["own"].tensor.copy_(fresh["own"].tensor)
        state["copy"].copy_(fresh["copy"])
        handle = cp.step(n)
        assert handle is not None and handle.result(60)
    assert cp.wait(60)
    cp._saves.close()
    return start, good, cp.report.arrived


def _steps(run: Path) -> list[int]:
    return [s.step for s in list_run(LocalBackend(str(run))).committed]


def _packs(folder: Path) -> list[list[str]]:
    """Of the newest step, which packs are on which disk."""
    newest = max(p.name for p in folder.glob("disk*/step-*"))
    return [sorted(p.name[5:10] for p in folder.glob(f"disk{d}/{newest}/a0/rank-*s")) for d in (0, 1)]


HOSTS = [0, 0, 1, 1]


class _Meanwhile(FaultyBackend):
    """The first look for a receipt comes after another host has done the rest."""

    def size(self, path: str) -> int:
        other, self.other = (self.other, None) if path.endswith(".arrived") else (None, self.other)
        if other is not None:
            assert copy_step(other, self.inner, path.partition("/")[0], elsewhere=True)[1]
        return self.inner.size(path)


def test_no_receipt_is_left_where_another_host_commits_meanwhile(pool: Pool, tmp_path: Path) -> None:
    pool.run(_job, str(tmp_path), [0, 1], 2, False, world=2)
    disks = [LocalBackend(str(tmp_path / f"disk{n}")) for n in (0, 1)]
    folder = list_run(disks[0]).committed[0].folder
    target = LocalBackend(str(tmp_path / "copy"))
    assert copy_step(disks[1], target, folder, elsewhere=True)[1] is False
    meanwhile = _Meanwhile(target)
    meanwhile.other = disks[0]
    assert copy_step(disks[1], meanwhile, folder, elsewhere=True)[1] is True
    assert meanwhile.other is None and not list((tmp_path / "copy").rglob("*.arrived"))


def test_two_hosts_bring_their_packs(pool: Pool, tmp_path: Path) -> None:
    told = pool.run(_job, str(tmp_path), HOSTS, 4, False)
    assert [t[:2] for t in told] == [(0, True)] * 4 and _steps(tmp_path / "run") == [1, 3]
    assert [t[2] for t in told] == [2, 0, 2, 0]
    assert _packs(tmp_path) == [["00000", "00001"], ["00002", "00003"]]
    assert not list(tmp_path.rglob("*.arrived")) and not list(tmp_path.rglob("due.json"))
    for step in (1, 3):
        with ckpt.open(f"{tmp_path}/run@{step}") as c:
            assert c.verify().ok


@pytest.mark.parametrize(
    ("hosts", "start"), [(HOSTS, 3), ([1, 1, 0, 0], 3), ([0, 1], 3), ([0, 0, 0, 0], 0), ([0, 0, 2, 2], 0)]
)
def test_what_is_on_the_disks_of_two_hosts_only(pool: Pool, tmp_path: Path, hosts: list[int], start: int) -> None:
    """The remote was away. The same hosts go on from the newest step, in whatever order and number of ranks; without one
    of the two disks it is not whole, and nothing is made up."""
    pool.run(_job, str(tmp_path), HOSTS, 3, True)
    assert _steps(tmp_path / "run") == [] and _steps(tmp_path / "disk0") == [1, 2] == _steps(tmp_path / "disk1")
    if len(hosts) == 2:
        found = pool.run(_load_half, str(tmp_path), hosts, world=2)
        assert found == [3, 3]
    else:
        told = pool.run(_job, str(tmp_path), hosts, start, False)
        assert [t[:2] for t in told] == [(start, True)] * 4
    assert _steps(tmp_path / "run") == ([1, 2] if start else [])


def _load_half(rank: int, world: int, folder: str, disks: list[int]) -> int:
    """Two ranks go on where four were."""
    mine = torch.zeros(2 * LENGTH, dtype=torch.int64)
    state = {"own": ckpt.Shard(mine, (4 * LENGTH,), (2 * LENGTH * rank,)), "copy": torch.zeros(1000)}
    local = ckpt.Local(f"{folder}/disk{disks[rank]}", ckpt.Every(1))
    cp = ckpt.Checkpointer(f"{folder}/run", state, storage=ckpt.Every(2), local=local)
    start = cp.restore(allow_unexpected=["n"])
    assert torch.equal(mine, torch.cat([_values(2 * rank + k, start - 1) for k in (0, 1)]))
    assert state["copy"].eq(start - 1).all() and cp.wait(60)
    cp._saves.close()
    return start


def test_a_host_whose_disk_was_lost_takes_the_remote(pool: Pool, tmp_path: Path) -> None:
    pool.run(_job, str(tmp_path), HOSTS, 5, False)
    assert _steps(tmp_path / "run") == [1, 3]
    shutil.rmtree(tmp_path / "disk1")
    told = pool.run(_job, str(tmp_path), HOSTS, 4, False)
    assert [t[:2] for t in told] == [(4, True)] * 4
