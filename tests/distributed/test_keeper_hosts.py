"""Keepers of several hosts: one step in the memory of all, read from wherever it lies.

The hosts are named by CKPT_HOST; each has a keeper of its own, and they talk over TCP on loopback.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import ckpt
from ckpt.keeper.link import keeper_name
from tests.distributed.pool import Pool

WAIT = 60.0


def _job(seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(33, 47), nn.Linear(47, 5))
    if dist.get_world_size() > 1:
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return {"model": model, "optimizer": optimizer, "same": torch.arange(7.0), "rank": ckpt.PerRank(dist.get_rank())}


def _train(state: dict[str, Any]) -> None:
    state["model"](torch.randn(4, 33)).square().mean().backward()
    state["optimizer"].step()
    state["optimizer"].zero_grad()


def _whole(state: dict[str, Any]) -> list[torch.Tensor]:
    """All parameters and moments, gathered."""
    moments = [v for p in state["model"].parameters() for _, v in sorted(state["optimizer"].state[p].items())]
    values = [*state["model"].parameters(), *moments, state["same"]]
    return [(v.full_tensor() if hasattr(v, "full_tensor") else v).detach().clone() for v in values]


def _checkpointer(run: str, state: dict[str, Any], **more: Any) -> ckpt.Checkpointer:
    return ckpt.Checkpointer(run, state, memory=ckpt.Every(1), **more)


def _granted(cp: ckpt.Checkpointer, step: int) -> None:
    """Steps as short as these would be over before a grant has reached all ranks."""
    keeping, until = cp._kept._keeping, time.monotonic() + WAIT
    if not cp._kept._began:
        cp._kept.begin(cp._state, step)
        assert step in keeping._grants, "the first step of a life was not granted"
    while step not in keeping._grants:
        assert time.monotonic() < until, f"step {step} was not granted"
        time.sleep(0.001)
    dist.barrier()


def _go_away(cp: ckpt.Checkpointer) -> None:
    """As a trainer that dies: its keeper sees the end of the connection, and no word before."""
    link = cp._kept._keeping.member.link
    link.close()
    dist.barrier()


def _life(rank: int, world: int, run: str, hosts: list[str], steps: int) -> tuple[int, list[torch.Tensor], str]:
    """Restores, trains some steps, goes away without a word: (where it began, what it restored, from where)."""
    os.environ["CKPT_HOST"] = hosts[rank]
    state = _job(seed=rank)
    cp = _checkpointer(run, state)
    start = cp.restore()
    found = _whole(state) if start else []
    handle = None
    for step in range(start, start + steps):
        _train(state)
        _granted(cp, step)
        handle = cp.step(step)
        assert handle is not None and handle.result(WAIT).step == step
        assert handle.staged(WAIT)
    last = _whole(state)
    _go_away(cp)
    return start, (found or last), cp.last_load.ref if cp.last_load else ""


def _end(rank: int, world: int, run: str, hosts: list[str]) -> tuple[int, list[torch.Tensor], Any]:
    os.environ["CKPT_HOST"] = hosts[rank]
    state = _job()
    cp = _checkpointer(run, state)
    start = cp.restore()
    found = _whole(state)
    _train(state)
    cp.step(start)
    report = cp.close()
    return start, found, (report.committed, report.failed)


def _alive(run: str, host: str) -> bool:
    return f"@{keeper_name(run, '', host)}" in Path("/proc/net/unix").read_text()


def test_each_rank_reads_what_its_host_does_not_hold(pool: Pool, tmp_path: Path) -> None:
    run, env = str(tmp_path / "run"), {"CKPT_GRACE": "60"}
    first = pool.run(_life, run, ["h0", "h1"], 4, world=2, env=env)
    assert [start for start, _, _ in first] == [0, 0]
    swapped = pool.run(_life, run, ["h1", "h0"], 3, world=2, env=env)
    for start, found, ref in swapped:
        assert start == 4 and ref.startswith("memory of ")
        assert all(map(torch.equal, found, first[0][1]))
    ended = pool.run(_end, run, ["h0", "h1"], world=2, env=env)
    assert [start for start, _, _ in ended] == [7, 7]
    assert [counts for _, _, counts in ended] == [(1, 0), (1, 0)]
    assert _gone(run)
    with ckpt.open(run) as c:
        assert c.step == 7 and c.verify().ok


def _gone(run: str) -> bool:
    """Whether both keepers end; they do so a moment after the last trainer hung up."""
    until = time.monotonic() + WAIT
    while _alive(run, "h0") or _alive(run, "h1"):
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def test_another_number_of_ranks_reads_the_same_step(pool: Pool, tmp_path: Path) -> None:
    """Two hosts before, one rank now: its keeper knows where the other half is."""
    run, env = str(tmp_path / "run"), {"CKPT_GRACE": "20"}
    first = pool.run(_life, run, ["h0", "h1"], 3, world=2, env=env)
    (answer,) = pool.run(_end, run, ["h0"], world=1, env=env)
    start, found, (committed, failed) = answer
    assert (start, failed) == (3, 0)
    assert committed in (1, 2)  # step 3; and step 2, if what the first life left was still being written
    assert all(map(torch.equal, found, first[0][1]))


def _differs(rank: int, world: int, run: str) -> tuple[list[bool], int, float]:
    """A tensor that is a copy of the other rank's until step 2, and its own from then on."""
    os.environ["CKPT_HOST"] = "h0"
    state = _job()
    cp = _checkpointer(run, state)
    cp.restore()
    sealed = []
    for step in range(8):
        _train(state)
        if step >= 3:
            state["same"].fill_(10.0 * rank + step)
        if step != 4:  # at which the ranks agree on another plan
            _granted(cp, step)
        handle = cp.step(step)
        sealed.append(handle is not None and handle.committed(WAIT))
    voided, last = cp.report.voided, max(s for s, ok in enumerate(sealed) if ok)
    _go_away(cp)
    state = _job()
    cp = _checkpointer(run, state)
    start = cp.restore()
    assert start == last + 1
    value = float(state["same"][0])
    cp.close()
    return sealed, voided, value


def test_copies_that_part_void_one_step_and_are_stored_per_rank(pool: Pool, tmp_path: Path) -> None:
    (sealed, voided, mine), (other, _, theirs) = pool.run(
        _differs, str(tmp_path / "run"), world=2, env={"CKPT_GRACE": "60"}
    )
    assert sealed == other and sealed == [True] * 3 + [False] * 2 + [True] * 3 and voided == 1
    assert (mine, theirs) == (7.0, 17.0)


def _protected(rank: int, world: int, run: str, hosts: list[str]) -> tuple[list[int], int, Any, list[tuple[int, int]]]:
    """Trains until steps are protected, then with a tensor more until steps with that are, too; then closes."""
    os.environ["CKPT_HOST"] = hosts[rank]
    state, rows = _job(), []
    cp = _checkpointer(run, state, redundancy=ckpt.Replicas(2), storage=ckpt.Every(100_000), on_event=rows.append)
    cp.restore()
    link = cp._kept._keeping.member.link
    seen, step = [], 0
    for grown in (False, True):
        if grown:  # more than fits into a slot: other slots, other areas
            state["more"] = torch.full((600_000 * (1 + rank),), 1.0)
        begun, until = step, time.monotonic() + WAIT
        while not _all(sum(e.kind == "protect" and e.step > begun + 20 * grown and e.lag >= 0 for e in rows) > 2):
            assert time.monotonic() < until, f"nothing is protected: {rows[-3:]}"
            _train(state)
            cp.step(step)
            step += 1
        told = link.ask("look", timeout=WAIT)
        seen.append((len(told["group"]), int(told["parity"])))
    report = vars(cp.close())
    steps = [e.step for e in rows if e.kind == "protect"]
    return steps, step, report, seen


def _all(yes: bool) -> bool:
    """Whether all ranks say so."""
    said = torch.tensor([int(yes)])
    dist.all_reduce(said, op=dist.ReduceOp.MIN)
    return bool(said.item())


def test_steps_are_protected_while_training_goes_on(pool: Pool, tmp_path: Path) -> None:
    """Three hosts, two copies; the leaves of the state change on the way, and with them what the areas take."""
    run = str(tmp_path / "run")
    found = pool.run(_protected, run, ["h0", "h1", "h2"], world=3, env={"CKPT_GRACE": "20"})
    for steps, _, report, seen in found:
        assert steps == sorted(set(steps)) and report["announced"] == len(steps)
        assert [n for n, _ in seen] == [3, 3] and 0 < seen[0][1] < seen[1][1]
        assert (report["failed"], report["committed"]) == (0, 1)
    with ckpt.open(run) as c:
        assert c.step == found[0][1] - 1 and c.verify().ok


def _alone(rank: int, world: int, run: str) -> tuple[list[str], int]:
    os.environ["CKPT_HOST"] = "h0"
    said: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    ear = Ear()
    logging.getLogger("ckpt").addHandler(ear)
    cp = _checkpointer(run, _job(), redundancy=ckpt.ErasureCode(data=6, parity=2))
    cp.restore()
    cp.step(0)
    slots = len(cp._kept._keeping.member.slots)
    cp.close()
    logging.getLogger("ckpt").removeHandler(ear)
    return [text for text in said if "protects nothing" in text], slots


def test_a_job_of_one_host_is_told_that_nothing_protects_it(pool: Pool, tmp_path: Path) -> None:
    """An elastic job may shrink to one host, and must go on."""
    (said, slots), (other, _) = pool.run(_alone, str(tmp_path / "run"), world=2, env={"CKPT_GRACE": "20"})
    assert len(said) == 1 and "one host" in said[0] and other == [] and slots == 2
