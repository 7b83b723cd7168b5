"""Running averages on many ranks: the same bits whatever the layout, the world, or how often either changes."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import ckpt
from tests.distributed.models import Net, build, content, fill, train_once
from tests.distributed.pool import Pool

WAIT = 60.0
RULES = {"ema": ckpt.EMA(half_life=3), "late": ckpt.MWA("loss", 2.0)}
LOSS = [3.0, 2.0, 2.5, 1.0, 1.5]  # of rank 0, which counts; the others have losses of their own
LAYOUTS = [("single", 1), ("ddp", 2), ("fsdp", 2), ("tp", 2), ("hsdp", 4), ("fsdp_tp", 4)]
ENV = {"CKPT_GRACE": "20"}


def _state(layout: str, rank: int, world: int) -> dict[str, Any]:
    model = build(layout, rank, world)
    inner: Any = _inner({"model": model})
    inner.blocks[0].norm.bias.requires_grad_(False)  # frozen: not averaged
    return {"model": model, "optimizer": train_once(model)}


def _inner(state: dict[str, Any]) -> nn.Module:
    model = state["model"]
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _granted(cp: ckpt.Checkpointer, step: int) -> None:
    """Steps as short as these would be over before a grant has reached all ranks."""
    keeping, until = cp._kept._keeping, time.monotonic() + WAIT
    while step not in keeping._grants:
        assert time.monotonic() < until, f"step {step} was not granted"
        time.sleep(0.001)
    if dist.get_world_size() > 1:
        dist.barrier()


def _step(cp: ckpt.Checkpointer, state: dict[str, Any], step: int) -> None:
    cp.fence()
    fill(state["model"], state["optimizer"], step)
    _granted(cp, step)
    handle = cp.step(step, {"loss": LOSS[step] + dist.get_rank()})
    assert handle is not None and handle.result(WAIT).step == step


def _full(values: dict[str, torch.Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    return {k: (v.full_tensor() if isinstance(v, DTensor) else v).numpy().copy() for k, v in values.items()}


def _life(rank: int, world: int, run: str, layout: str, steps: int, close: bool) -> dict[str, dict[str, Any]]:
    """Restores, does some steps; {average: {name: whole tensor}} before the steps, under "was", and after them."""
    state = _state(layout, rank, world)
    cp = ckpt.Checkpointer(run, state, memory=ckpt.Every(1), averages=RULES)
    start = cp.restore()
    was = _full(cp.average("ema")) if start else {}
    if not start:
        cp._kept.begin(state, 0)
    for step in range(start, start + steps):
        _step(cp, state, step)
    placed = cp.average("ema")
    for name, p in _inner(state).state_dict().items():
        assert isinstance(p, DTensor) == isinstance(placed[name], DTensor)
    out = {"was": was, **{name: _full(cp.average(name)) for name in RULES}}
    with cp.swapped(state["model"], "late"):
        there = _full({k: v.detach() for k, v in _inner(state).state_dict().items()})
        assert all(np.array_equal(there[k], v) for k, v in out["late"].items())
    here = _full({k: v.detach() for k, v in _inner(state).state_dict().items()})
    for name, value in here.items():
        stored = name.replace("head.", "embed.")
        assert np.array_equal(value, content(stored, value.shape, start + steps - 1).numpy())
    if close:
        report = cp.close()
        assert report.committed and not report.failed, report
    else:
        cp._kept._keeping.member.link.close()
    return out


def _oracle(steps: list[int], rule: str) -> dict[str, np.ndarray[Any, Any]]:
    """The averages of `content` over steps, by numpy alone; what is frozen is the last step's."""
    out = {}
    if rule == "ema":
        rates = [1.0, *(-np.expm1(-np.log(2) * gap / 3) for gap in np.diff(steps))]
    else:
        logs = -2.0 * np.log([LOSS[s % len(LOSS)] for s in steps])
        totals = np.logaddexp.accumulate(logs)
        rates = list(np.exp(logs - totals))
    model = Net()
    for name, p in model.state_dict().items():
        stored = name.replace("head.", "embed.")
        a = np.zeros(p.shape, dtype=np.float32)
        for n, step in enumerate(steps):
            x = content(stored, p.shape, step).numpy()
            a = x if rates[n] == 1 or name == "blocks.0.norm.bias" else a + np.float32(rates[n]) * (x - a)
        out[name] = a
    return out


def _same(found: dict[str, Any], steps: list[int], rule: str) -> None:
    for name, value in _oracle(steps, rule).items():
        assert np.array_equal(found[name], value), (rule, name)


@pytest.mark.parametrize(("layout", "world"), LAYOUTS)
def test_every_layout_gives_the_same_bits(pool: Pool, tmp_path: Path, layout: str, world: int) -> None:
    run = str(tmp_path / "run")
    for found in pool.run(_life, run, layout, 3, True, world=world, env=ENV):
        _same(found["ema"], [0, 1, 2], "ema")
        _same(found["late"], [0, 1, 2], "late")
    with ckpt.open(run) as c:
        assert c.verify().ok
        for rule in RULES:
            stored = {n.removeprefix(f"averages.{rule}.model.") for n in c.tensors if n.startswith(f"averages.{rule}.")}
            assert stored == set(Net().state_dict()) - {"blocks.0.norm.bias", "head.weight"} | {"head.weight"} & stored
            expected = _oracle([0, 1, 2], rule)
            for name in stored:
                assert np.array_equal(c.tensors[f"averages.{rule}.model.{name}"][...], expected[name])
    model = Net()  # on another layout, without the job
    ckpt.load({"model": model}, run, rename={"averages.ema.model": "model"}, allow_missing=["model.*"])
    mine = {k: v.numpy() for k, v in model.state_dict().items() if k != "blocks.0.norm.bias"}
    assert all(np.array_equal(v, _oracle([0, 1, 2], "ema")[k]) for k, v in mine.items())


@pytest.mark.parametrize("stored", [False, True])
def test_they_go_on_in_other_worlds(pool: Pool, tmp_path: Path, stored: bool) -> None:
    """Four ranks, then two, then one; out of memory or out of storage."""
    run = str(tmp_path / "run")
    pool.run(_life, run, "hsdp", 2, stored, world=4, env=ENV)
    for found in pool.run(_life, run, "fsdp", 2, stored, world=2, env=ENV):
        _same(found["was"], [0, 1], "ema")
        _same(found["ema"], [0, 1, 2, 3], "ema")
    (found,) = pool.run(_life, run, "single", 1, True, world=1, env=ENV)
    for rule in RULES:
        _same(found[rule], [0, 1, 2, 3, 4], rule)


def _flat(rank: int, world: int, run: str, original: bool) -> None:
    """FSDP1: averages of this rank's ranges; swapped in they are what the model computes with, and then no more."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    torch.manual_seed(0)
    inner = nn.Sequential(
        nn.Linear(5, 9), FSDP(nn.Linear(9, 3), use_orig_params=original, device_id=torch.device("cpu"))
    )
    model = FSDP(inner, use_orig_params=original, device_id=torch.device("cpu"))
    optimizer, batch = torch.optim.SGD(model.parameters(), lr=0.1), torch.linspace(-1, 1, 20).reshape(4, 5)
    state, sealed = {"model": model, "optimizer": optimizer}, []
    cp = ckpt.Checkpointer(run, state, memory=ckpt.Every(1), averages={"swa": ckpt.Power(q=1)})
    assert cp.restore() == 0
    cp._kept.begin(state, 0)
    for step in range(3):
        model(batch).square().sum().backward()
        cp.fence()
        optimizer.step()
        optimizer.zero_grad()
        _granted(cp, step)
        handle = cp.step(step)
        assert handle is not None and handle.result(WAIT).step == step
        with FSDP.summon_full_params(model):
            sealed.append(
                {k.replace("_fsdp_wrapped_module.", ""): v.detach().clone() for k, v in model.named_parameters()}
            )
    parts = cp.average("swa")
    if not original:  # names of whole parameters then exist within summon_full_params alone, here as everywhere
        assert all("_flat_param" not in name for name in parts)
    plain = nn.Sequential(nn.Linear(5, 9), nn.Linear(9, 3))
    whole = {}
    for name, p in plain.named_parameters():
        lo, hi = parts[name].flat_range
        whole[name] = torch.zeros(p.numel())
        whole[name][lo:hi] = parts[name].tensor
        dist.all_reduce(whole[name])
        mean = torch.stack([s[name] for s in sealed]).mean(0) if original else None
        if mean is not None:
            torch.testing.assert_close(whole[name].view(p.shape), mean)
    plain.load_state_dict({k: v.view(p.shape) for (k, v), p in zip(whole.items(), plain.parameters(), strict=True)})
    with torch.no_grad():
        before = model(batch)  # leaves the root's parameters whole
        with cp.swapped(model, "swa"):
            within = model(batch)
        after = model(batch)
        torch.testing.assert_close(within, plain(batch))
    assert torch.equal(before, after) and not torch.equal(before, within)
    assert cp.close().committed


@pytest.mark.parametrize("original", [True, False])
def test_flat_parameters(pool: Pool, tmp_path: Path, original: bool) -> None:
    pool.run(_flat, str(tmp_path / "run"), original, world=2, env=ENV)


def _two_hosts(rank: int, world: int, run: str, what: str) -> tuple[list[int], dict[str, Any], list[str]]:
    """Two hosts; something happens to one of them after the second step. (Steps that should count, averages, what was said.)"""
    os.environ["CKPT_HOST"] = f"h{rank}"
    said: list[str] = []
    log, ear = logging.getLogger("ckpt"), Ear(said)
    log.addHandler(ear)
    try:
        state = _state("fsdp", rank, world)
        cp = ckpt.Checkpointer(run, state, memory=ckpt.Every(1), averages=RULES)
        cp.restore()
        cp._kept.begin(state, 0)
        keeping = cp._kept._keeping
        for step in (0, 1):
            _step(cp, state, step)
        if what.startswith("h") and rank == int(what[1]):
            os.kill(keeping.member.link.keeper_pid, signal.SIGKILL)
        dist.barrier()
        counted, step = [0, 1], 2
        until = time.monotonic() + WAIT
        while len(counted) < 4:
            assert time.monotonic() < until, counted
            cp.fence()
            fill(state["model"], state["optimizer"], step)
            if what == "nan" and step == 2:
                _granted(cp, step)
                if rank == 1:
                    with torch.no_grad():
                        state["model"].odd.to_local().fill_(torch.nan)
            if what == "leaf" and step == 2:  # the ranks agree on another plan
                state["more"] = torch.arange(5.0)
            handle = cp.step(step, {"loss": LOSS[step % len(LOSS)] + rank})
            assert handle is None or handle.done(WAIT)
            mine = torch.tensor([int(handle is not None and handle.committed())])
            dist.all_reduce(mine)  # and all wait for one another
            assert int(mine) in (0, world), f"step {step} is whole for some"
            counted += [step] * (int(mine) == world and not (what == "nan" and step == 2))
            step += 1
        out = {name: _full(cp.average(name)) for name in RULES}
        views = {name: (v.folds, v.refused) for name, v in cp.averages.items()}
        cp.close()
    finally:
        log.removeHandler(ear)
    return counted, {**out, "views": views}, said


class Ear(logging.Handler):
    def __init__(self, said: list[str]) -> None:
        super().__init__()
        self.said = said

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@pytest.mark.parametrize("what", ["nan", "leaf", "h0", "h1"])
def test_what_happens_on_one_host_is_the_same_for_all(pool: Pool, tmp_path: Path, what: str) -> None:
    """One rank's part is not finite: none folds. The plan changes, or a keeper dies: the averages go on."""
    for counted, found, said in pool.run(_two_hosts, str(tmp_path / "run"), what, world=2, env=ENV):
        for rule in RULES:
            _same(found[rule], counted, rule)
            assert found["views"][rule] == (len(counted), int(what == "nan"))
        assert not any("begin anew" in line for line in said)
