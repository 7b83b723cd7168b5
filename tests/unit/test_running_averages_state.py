"""What is averaged of a state, and averages as tensors: tied, frozen, integer, in bfloat16; swapped in and out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ckpt
from ckpt.averages import weights_of

WAIT = 60.0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 8, dtype=torch.bfloat16)
        self.head = nn.Linear(8, 13, bias=False, dtype=torch.bfloat16)
        self.head.weight = self.embed.weight
        self.base = nn.Linear(8, 8).requires_grad_(False)
        self.lora = nn.Parameter(torch.zeros(2, 8))
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("passing", torch.zeros(4), persistent=False)


AVERAGED = {
    "model.embed.weight", "model.lora", "model.norm.weight", "model.norm.bias", "model.norm.running_mean",
    "model.norm.running_var",
}  # fmt: skip


def job() -> dict[str, Any]:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return {"model": model, "optimizer": optimizer, "aside": torch.zeros(3)}


def train(state: dict[str, Any]) -> None:
    for p in state["model"].parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    state["optimizer"].step()


def seal(cp: ckpt.Checkpointer, state: dict[str, Any], first: int, count: int, **metrics: float) -> list[int]:
    """Trains until so many steps are whole; which."""
    out: list[int] = []
    for step in range(first, first + 10_000):
        train(state)
        handle = cp.step(step, metrics)
        if handle is not None and handle.committed(WAIT):
            out.append(step)
        if len(out) == count:
            return out
    raise AssertionError("no snapshots")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CKPT_GRACE", "0")
    return str(tmp_path / "run")


def test_what_is_averaged() -> None:
    state = job()
    weights = weights_of(state)
    assert {w.leaf for w in weights if w.averaged} == AVERAGED
    assert [w.leaf for w in weights if w.name in ("embed.weight", "head.weight")] == ["model.embed.weight"] * 2
    assert "model.norm.num_batches_tracked" not in {w.leaf for w in weights if w.averaged}
    assert not any("passing" in w.leaf for w in weights)


def test_averages_as_tensors_and_swapped_in(run: str) -> None:
    state = job()
    model = state["model"]
    cp = ckpt.Checkpointer(run, state, memory=ckpt.Every(1), averages={"ema": ckpt.EMA(half_life=2)})
    cp.restore()
    with pytest.raises(ckpt.NotFoundError, match="there is none"):
        cp.average("ema")
    steps = seal(cp, state, 0, 3)
    view = cp.averages["ema"]
    assert (view.folds, view.refused, view.step) == (3, 0, steps[-1]) and 0 < view.drift < 1
    found = cp.average("ema")
    assert found.keys() == model.state_dict().keys() and found["head.weight"] is found["embed.weight"]
    assert found["embed.weight"].dtype == torch.float32
    assert torch.equal(found["base.weight"], model.base.weight) and found["base.weight"] is not model.base.weight
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        model.lora[0, 0] = torch.nan  # whatever it holds comes back
    raw = {k: v.clone().view(torch.uint8) for k, v in model.state_dict().items() if v.dim()}

    class Stop(Exception):
        pass

    for error in (None, Stop):
        try:
            with cp.swapped(model, "ema"):
                assert torch.equal(model.head.weight, found["embed.weight"].bfloat16())
                assert model.head.weight.data_ptr() == model.embed.weight.data_ptr()
                assert torch.equal(model.lora, found["lora"]) and not torch.equal(model.lora, before["lora"])
                for refused in (
                    lambda: cp.step(steps[-1] + 1),
                    cp.save_now,
                    cp.restore,
                    cp.close,
                    lambda: cp.average("ema"),
                ):
                    with pytest.raises(ckpt.UsageError, match="within swapped"):
                        refused()
                if error:
                    raise error
        except Stop:
            pass
        assert all(torch.equal(v.view(torch.uint8), raw[k]) for k, v in model.state_dict().items() if v.dim())
    with pytest.raises(ckpt.UsageError, match="no averaged parameter"), cp.swapped(nn.Linear(2, 2), "ema"):
        pass
    with torch.no_grad():
        model.lora.zero_()
    cp.close()


class Mixed(torch.optim.Optimizer):
    """Steps float32 masters, of which bfloat16 parameters are what they are rounded to."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-3})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["master_param"] = p.detach().float()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                master = self.state[p]["master_param"]
                master.sub_(p.grad, alpha=group["lr"])
                p.copy_(master)


def test_masters_are_what_is_averaged(run: str) -> None:
    def mixed() -> dict[str, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 300, dtype=torch.bfloat16), nn.BatchNorm1d(300))
        return {"model": model, "optimizer": Mixed(model[0].parameters())}

    state, rules = mixed(), {"ema": ckpt.EMA(half_life=2), "swa": ckpt.Power(q=1)}
    masters = {n: state["optimizer"].state[p]["master_param"] for n, p in state["model"][0].named_parameters()}
    sources = {w.leaf: w.source for w in weights_of(state) if w.averaged}
    assert sources["model.0.weight"] == "optimizer.state.0.weight.master_param"
    assert sources["model.1.running_mean"] == "model.1.running_mean"
    expected: dict[str, torch.Tensor] = {}

    def go_on(cp: ckpt.Checkpointer, first: int) -> int:
        for _ in range(3):
            first = seal(cp, state, first, 1)[0] + 1
            for name, master in masters.items():
                if name not in expected:
                    expected[name] = master.clone()
                else:
                    rate = -math.expm1(
                        -math.log(2) * (first - folded[0]) / 2
                    )  # 1 after many steps that were passed over
                    a, x = expected[name].numpy(), master.numpy()
                    expected[name] = torch.from_numpy(x.copy() if rate == 1 else a + np.float32(rate) * (x - a))
            folded[:] = [first]
        return first

    folded: list[int] = []
    with ckpt.Checkpointer(run, state, memory=ckpt.Every(1), averages=rules) as cp:
        cp.restore()
        first = go_on(cp, 0)
        found = cp.average("ema")
        for name, value in expected.items():
            assert found[f"0.{name}"].dtype == torch.float32 and torch.equal(found[f"0.{name}"], value)
            assert not torch.equal(value, value.bfloat16().float())
        with cp.swapped(state["model"], "ema"):
            assert torch.equal(state["model"][0].weight, expected["weight"].bfloat16())
    state = mixed()
    masters = {n: state["optimizer"].state[p]["master_param"] for n, p in state["model"][0].named_parameters()}
    with ckpt.Checkpointer(run, state, memory=ckpt.Every(1), averages=rules) as cp:
        assert cp.restore() == first
        go_on(cp, first)
        found = cp.average("ema")
        assert all(torch.equal(found[f"0.{name}"], value) for name, value in expected.items())


def test_loaded_without_the_job(run: str) -> None:
    state = job()
    with ckpt.Checkpointer(run, state, memory=ckpt.Every(1), averages={"ema": ckpt.EMA(half_life=2)}) as cp:
        cp.restore()
        seal(cp, state, 0, 3)
        expected = cp.average("ema")
    other = Net()
    ckpt.load({"model": other}, run)
    ckpt.load(
        {"model": other}, run, rename={"averages.ema.model": "model"}, cast=True, allow_missing=["model.*"]
    )  # fmt: skip
    for name, value in other.state_dict().items():
        assert torch.equal(value, expected[name].to(value.dtype)), name
    with ckpt.open(run) as c:
        assert c.tensors["averages.ema.model.lora"].dtype == "float32"
    lora = {"averages": {"ema": {"model.lora": torch.zeros(2, 8)}}}
    ckpt.load(lora, run, only=["averages.ema.*"])
    assert torch.equal(lora["averages"]["ema"]["model.lora"], expected["lora"])
    restored = job()
    with ckpt.Checkpointer(run, restored, storage=ckpt.Every(5)) as plain:  # without averages: nothing to complain of
        assert plain.restore() > 0


def test_another_run_begins_new_averages(run: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = job()
    rules = {"ema": ckpt.EMA(half_life=2)}
    with ckpt.Checkpointer(run, state, memory=ckpt.Every(1), averages=rules) as cp:
        seal(cp, state, 0, 2)
    with ckpt.Checkpointer(tmp_path / "other", state, memory=ckpt.Every(1), averages=rules) as cp:
        assert cp.restore(run) == 0
        assert seal(cp, state, 0, 1) and cp.averages["ema"].folds == 1


def test_a_metric_that_is_not_there(run: str, caplog: pytest.LogCaptureFixture) -> None:
    state = job()
    with ckpt.Checkpointer(run, state, memory=ckpt.Every(1), averages={"mwa": ckpt.MWA("loss", 4.0)}) as cp:
        last = seal(cp, state, 0, 2, loss=2.0)[-1]
        last = seal(cp, state, last + 1, 1)[-1]
        assert (cp.averages["mwa"].folds, cp.averages["mwa"].refused) == (2, 1)
        assert "has no metric 'loss'" in caplog.text
        assert "which came with record() after" not in caplog.text
        for _ in range(2):
            cp.record(last, {"accuracy": 0.5})
            cp.record(last, {"loss": 1.5})
        assert caplog.text.count(f"'loss', which came with record() after step {last}") == 1
        assert "--weights mwa:loss,PENALTY" in caplog.text
        seal(cp, state, last + 1, 1, loss=1.0)
        assert (cp.averages["mwa"].folds, cp.averages["mwa"].refused) == (3, 1)


def test_calls_that_make_no_sense(run: str) -> None:
    state = job()
    with pytest.raises(ckpt.UsageError, match="give memory="):
        ckpt.Checkpointer(run, state, storage=ckpt.Every(1), averages={"ema": ckpt.EMA(half_life=2)})
    for averages, match in (({"a.b": ckpt.EMA(half_life=2)}, "letters"), ({"a": 0.99}, "no rule")):
        with pytest.raises(ckpt.UsageError, match=match):
            ckpt.Checkpointer(run, state, memory=ckpt.Every(1), averages=averages)
    for bad in ({"x": torch.zeros(3)}, {"model": nn.Linear(2, 2), "averages": {"ema": torch.zeros(3)}}):
        cp = ckpt.Checkpointer(run, bad, memory=ckpt.Every(1), averages={"ema": ckpt.EMA(half_life=2)})
        with pytest.raises(ckpt.UsageError, match="averages"):
            cp.step(0)
        cp._saves.close()


def test_averages_of_steps_leave_running_averages_out(run: str, tmp_path: Path) -> None:
    state = job()
    with ckpt.Checkpointer(run, state, memory=ckpt.Every(1), averages={"ema": ckpt.EMA(half_life=2)}) as cp:
        seal(cp, state, 0, 1)
        cp.save_now()
        seal(cp, state, 10_000, 1)
    done = ckpt.materialise(ckpt.average(run, last=2, moments="latest"), tmp_path / "mean")
    with ckpt.open(done.ref) as c:
        assert not [n for n in (*c.tensors, *c.objects) if "averages" in n] and c.verify().ok
