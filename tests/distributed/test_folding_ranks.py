"""Running averages on many ranks: the same bits whatever the layout, the world, or how often either changes."""

from __future__ import annotations

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
LOSS = [3.0, 2.0, 2.5, 1.0, 1.5]
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
    handle = cp.step(step, {"loss": LOSS[step]})
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


def _oracle(steps: int, rule: str) -> dict[str, np.ndarray[Any, Any]]:
    """The averages of `content` over the first steps, by numpy alone; what is frozen or an integer is the last step's."""
    out = {}
    if rule == "ema":
        rates = [1.0] + [-np.expm1(-np.log(2) / 3)] * (steps - 1)
    else:
        logs = -2.0 * np.log(LOSS[:steps])
        totals = np.logaddexp.accumulate(logs)
        rates = list(np.exp(logs - totals))
    model = Net()
    for name, p in model.state_dict().items():
        stored = name.replace("head.", "embed.")
        a = np.zeros(p.shape, dtype=np.float32)
        for step in range(steps):
            x = content(stored, p.shape, step).numpy()
            a = x if not step or name == "blocks.0.norm.bias" else a + np.float32(rates[step]) * (x - a)
        out[name] = a
    return out


def _same(found: dict[str, Any], steps: int, rule: str) -> None:
    for name, value in _oracle(steps, rule).items():
        assert np.array_equal(found[name], value), (rule, name)


@pytest.mark.parametrize(("layout", "world"), LAYOUTS)
def test_every_layout_gives_the_same_bits(pool: Pool, tmp_path: Path, layout: str, world: int) -> None:
    run = str(tmp_path / "run")
    for found in pool.run(_life, run, layout, 3, True, world=world, env=ENV):
        _same(found["ema"], 3, "ema")
        _same(found["late"], 3, "late")
    with ckpt.open(run) as c:
        assert c.verify().ok
        for rule in RULES:
            stored = {n.removeprefix(f"averages.{rule}.model.") for n in c.tensors if n.startswith(f"averages.{rule}.")}
            assert stored == set(Net().state_dict()) - {"blocks.0.norm.bias", "head.weight"} | {"head.weight"} & stored
            expected = _oracle(3, rule)
            for name in stored:
                assert np.array_equal(c.tensors[f"averages.{rule}.model.{name}"][...], expected[name])
    model = Net()  # on another layout, without the job
    ckpt.load({"model": model}, run, rename={"averages.ema.model": "model"}, allow_missing=["model.*"])
    mine = {k: v.numpy() for k, v in model.state_dict().items() if k != "blocks.0.norm.bias"}
    assert all(np.array_equal(v, _oracle(3, "ema")[k]) for k, v in mine.items())


@pytest.mark.parametrize("stored", [False, True])
def test_they_go_on_in_other_worlds(pool: Pool, tmp_path: Path, stored: bool) -> None:
    """Four ranks, then two, then one; out of memory or out of storage."""
    run = str(tmp_path / "run")
    pool.run(_life, run, "hsdp", 2, stored, world=4, env=ENV)
    for found in pool.run(_life, run, "fsdp", 2, stored, world=2, env=ENV):
        _same(found["was"], 2, "ema")
        _same(found["ema"], 4, "ema")
    (found,) = pool.run(_life, run, "single", 1, True, world=1, env=ENV)
    for rule in RULES:
        _same(found[rule], 5, rule)
