"""Saves in the background on several ranks: one outcome for all, over a channel of their own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import ckpt
from ckpt import background
from ckpt.backends.local import LocalBackend
from ckpt.catalog import list_run
from ckpt.snapshot import arena
from tests.distributed.pool import Pool

WAIT = 60.0


def _job() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 47), nn.Linear(47, 5))
    fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(4, 33)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _local(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [v for p in model.parameters() for _, v in sorted(optimizer.state[p].items())]
    values = [*model.parameters(), *moments]
    return [copy.deepcopy(getattr(v, "_local_tensor", v).detach()) for v in values]


def _every_step(rank: int, world: int, run: str) -> list[bool]:
    """Saves every step, trains on at once, and reads each back."""
    model, optimizer = _job()
    state = {"model": model, "optimizer": optimizer}
    _train(model, optimizer)
    expected, handles = [], []
    for step in range(4):
        expected.append(_local(model, optimizer))
        handles.append(ckpt.async_save(state, run, step=step))
        _train(model, optimizer)
    assert all(h.committed(WAIT) for h in handles)
    other, its = _job()
    out = []
    for step in range(4):
        ckpt.load({"model": other, "optimizer": its}, f"{run}@{step}")
        out.append(all(map(torch.equal, _local(other, its), expected[step])))
    return out


def test_each_step_is_what_it_was(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(_every_step, str(tmp_path / "run"), world=4) == [[True] * 4] * 4


def _no_room_on_one(rank: int, world: int, run: str, victim: int) -> list[str]:
    model, optimizer = _job()
    state = {"model": model, "optimizer": optimizer}
    room, background._process().slot = arena.available_memory, None
    if rank == victim:
        arena.available_memory = lambda: 0
    out = []
    try:
        handle = ckpt.async_save(state, run)
        try:
            handle.result(WAIT)
        except ckpt.CkptError as e:
            out.append(f"{e.kind}: {e}")
    finally:
        arena.available_memory = room
    out.append(str(ckpt.async_save(state, run).committed(WAIT)))
    return out


@pytest.mark.parametrize("victim", [0, 1])
def test_what_fails_on_one_rank_fails_on_all(pool: Pool, tmp_path: Path, victim: int) -> None:
    answers = pool.run(_no_room_on_one, str(tmp_path / "run"), victim, world=2)
    assert answers[0] == answers[1]
    assert answers[0][0].startswith(f"capacity: rank {victim}: a snapshot needs 2 MiB") and answers[0][1] == "True"


def _skips(rank: int, world: int, run: str) -> tuple[list[bool], Any]:
    """Nobody waits: what the leader cannot begin, nobody begins."""
    model, optimizer = _job()
    cp = ckpt.Checkpointer(run, {"model": model, "optimizer": optimizer}, storage=ckpt.Every(1))
    cp.restore()
    begun = []
    for step in range(40):
        _train(model, optimizer)
        if rank == 1 and step % 7 == 0:
            cp.wait(WAIT)
        begun.append(cp.step(step) is not None)
    report = cp.close()
    dist.barrier()
    return begun, (report.committed, report.skipped, report.failed)


def test_all_ranks_skip_the_same_steps(pool: Pool, tmp_path: Path) -> None:
    answers = pool.run(_skips, str(tmp_path / "run"), world=2)
    assert answers[0] == answers[1]
    begun, (committed, skipped, failed) = answers[0]
    steps = [s for s, b in enumerate(begun) if b]
    assert skipped == 40 - len(steps) and failed == 0
    assert committed == len(set(steps) | {39})
    assert [s.step for s in list_run(LocalBackend(str(tmp_path / "run"))).committed] == sorted({*steps, 39})
