"""Running averages: rates against closed forms, folds against exact arithmetic and torch's own averages."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from ckpt.errors import UsageError
from ckpt.merge import weights
from ckpt.merge.average import EMA, MWA, Power, PowerEMA, Progress, advance
from ckpt.merge.fold import Folds, NotFinite

STEPS = st.lists(st.integers(0, 5000), min_size=2, max_size=20, unique=True).map(sorted)


def rates(rule: Any, steps: list[int], metrics: list[dict[str, float]] | None = None) -> tuple[list[float], Progress]:
    """Rates of the folds that counted, through JSON each time as on the way into a manifest and back."""
    p, out = Progress(rule.spec), []
    for n, step in enumerate(steps):
        mark = rule.mark(step, metrics[n] if metrics else {})
        before = p.folds
        rate, p = advance(p, step, mark if isinstance(mark, tuple) else None)
        p = Progress.from_json(p.to_json())
        out += [rate] if p.folds > before else []
    return out, p


def close(a: Any, b: Any) -> bool:
    return bool(np.allclose(a, b, rtol=1e-12, atol=1e-12))


@given(STEPS, st.floats(0.1, 20), st.floats(0, 50))
@settings(max_examples=200, deadline=None)
def test_power_is_its_closed_form_at_uneven_steps(steps: list[int], q: float, back: float) -> None:
    t = [s + 1.0 for s in steps]
    for start in (None, t[0] - 1 - back):
        got, _ = rates(Power(q=q, start=start), steps)
        assert close(weights.unroll(got), weights.power(t, q, start))


@given(STEPS, st.floats(0.5, 1e6))
@settings(max_examples=200, deadline=None)
def test_ema_is_its_closed_form_at_uneven_steps(steps: list[int], half: float) -> None:
    got, _ = rates(EMA(half_life=half), steps)
    exact = [1.0] + [-math.expm1(-math.log(2) * (b - a) / half) for a, b in itertools.pairwise(steps)]
    assert close(got, exact) and np.allclose(got, weights.ema_rates(steps, 0.5 ** (1 / half)), rtol=1e-8)
    left = np.exp2(-(steps[-1] - steps[0]) / half)  # of the first one
    assert close(weights.unroll(got)[0], left)


def test_a_start_is_waited_for() -> None:
    steps = list(range(0, 100, 7))
    got, p = rates(Power(q=1, start=50), steps)
    counted = [s + 1.0 for s in steps if s + 1 > 50]
    assert p.folds == len(counted) and close(weights.unroll(got), weights.power(counted, 1, 50.0))


def test_power_ema_has_edm2s_profile() -> None:
    steps = sorted(np.random.default_rng(0).choice(2000, 50, replace=False).tolist())
    got, _ = rates(PowerEMA(0.1), steps)
    assert close(weights.unroll(got), weights.power_ema([s + 1 for s in steps], 0.1))


@given(st.lists(st.floats(0.01, 30), min_size=2, max_size=20), st.floats(-5, 5), st.sampled_from(["power", "exp"]))
@settings(max_examples=200, deadline=None)
def test_mwa_is_its_closed_form(losses: list[float], penalty: float, form: str) -> None:
    got, _ = rates(MWA("loss", penalty, form), list(range(len(losses))), [{"loss": x} for x in losses])
    assert close(weights.unroll(got), weights.mwa(losses, penalty, form))


def test_mwa_by_step_by_function_and_without_its_metric() -> None:
    got, _ = rates(MWA("step", 4.0), [2, 5, 9])
    assert close(weights.unroll(got), weights.mwa([3, 6, 10], 4.0, higher_is_better=True))
    got, _ = rates(MWA(lambda step, m: m["a"] + step, 2.0), [0, 1], [{"a": 1.0}, {"a": 3.0}])
    assert close(weights.unroll(got), weights.mwa([1, 4], 2.0))
    got, p = rates(MWA("loss", 2.0), [0, 1, 2], [{"loss": 2.0}, {}, {"loss": -1.0}])
    assert (got, p.folds, p.refused) == ([1.0], 1, 2)


def test_tokens_count_in_place_of_steps() -> None:
    tokens = [1e9, 3e9, 3e9, 4e9]  # one that does not rise is refused
    got, p = rates(Power(q=2, by="tokens", start=0.0), [0, 1, 2, 3], [{"tokens": t} for t in tokens])
    assert p.refused == 1 and close(weights.unroll(got), weights.power([1e9, 3e9, 4e9], 2, 0.0))


def test_a_step_is_folded_once() -> None:
    rule = EMA(decay=0.9)
    _, p = rates(rule, [0, 1, 2])
    for step in (2, 1, 0):
        assert advance(p, step, (step + 1.0, 0.0)) == (0.0, p)


@pytest.mark.parametrize(
    "bad",
    [
        lambda: EMA(), lambda: EMA(half_life=1, decay=0.5), lambda: EMA(decay=1.0), lambda: EMA(half_life=0),
        lambda: Power(q=0), lambda: PowerEMA(0.5), lambda: MWA(form="range"), lambda: MWA(penalty=math.nan),
    ],
)  # fmt: skip
def test_rules_that_make_no_average_are_refused(bad: Any) -> None:
    with pytest.raises(UsageError):
        bad()


# The fold.


def folded(theta: torch.Tensor, old: np.ndarray[Any, Any], rate: float, cut: int = 1 << 16) -> np.ndarray[Any, Any]:
    kind = str(theta.dtype).removeprefix("torch.")
    raw = theta.contiguous().view(torch.uint8).numpy()
    item, wide = theta.element_size(), old.itemsize
    new = np.empty_like(old)
    for at in range(0, theta.numel(), cut):
        end = min(at + cut, theta.numel())
        a, b = old.view(np.uint8)[at * wide : end * wide], new.view(np.uint8)[at * wide : end * wide]
        list(Folds([rate])(raw[at * item : end * item], kind, [a], [b]))
    return new


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_each_operation_is_rounded_by_itself_wherever_blocks_begin(kind: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    theta = torch.randn(5003, generator=g, dtype=torch.float64).to(kind)
    wide = {torch.float64: np.float64, torch.complex64: np.complex64}.get(kind, np.float32)
    x = theta.to(getattr(torch, np.dtype(wide).name)).numpy()
    old = np.random.default_rng(1).standard_normal(5003).astype(wide)
    rate = 0.0123456789
    r = np.float64(rate) if wide is np.float64 else np.float32(rate)
    expected = old + r * (x - old)
    for cut in (1 << 14, 64, 17):
        assert np.array_equal(folded(theta, old, rate, cut), expected)
    assert np.array_equal(folded(theta, old, 1.0), x) and np.array_equal(folded(theta, old, 0.0), old)


def test_several_averages_share_a_read() -> None:
    theta = torch.randn(1000, dtype=torch.bfloat16)
    olds = [np.random.default_rng(k).standard_normal(1000).astype(np.float32) for k in range(3)]
    news = [np.empty_like(o) for o in olds]
    raw = theta.view(torch.uint8).numpy()
    squares = Folds([0.5, 0.0, 0.25])(
        raw, "bfloat16", [o.view(np.uint8) for o in olds], [n.view(np.uint8) for n in news]
    )
    for old, new, rate, (square, made) in zip(olds, news, (0.5, 0.0, 0.25), squares, strict=True):
        assert np.array_equal(new, folded(theta, old, rate)) and np.array_equal(made, new.view(np.uint8))
        assert square == pytest.approx(float(((theta.float().numpy() - old) ** 2).sum()) if rate else 0.0, rel=1e-4)


def test_bf16_weights_move_an_ema_of_0_9999() -> None:
    """An average kept in bf16 stands still: 1 + 1e-4 * 0.05 is 1."""
    p, a = Progress(EMA(decay=0.9999).spec), np.ones(64, dtype=np.float32)
    theta, theirs = torch.full((64,), 1.046875, dtype=torch.bfloat16), torch.ones(64, dtype=torch.bfloat16)
    _, p = advance(p, 0, (1.0, 0.0))
    for step in range(1, 1001):
        rate, p = advance(p, step, (step + 1.0, 0.0))
        a = folded(theta, a, rate)
        theirs.lerp_(theta, 1e-4)
    assert (theirs == 1).all() and np.allclose(a, 1 + 0.046875 * (1 - 0.9999**1000), rtol=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    theta = torch.ones(100)
    theta[57] = value
    with pytest.raises(NotFinite):
        folded(theta, np.ones(100, dtype=np.float32), 0.5)
    if math.isnan(value):
        with pytest.raises(NotFinite):
            folded(theta, np.ones(100, dtype=np.float32), 1.0)
    else:  # a mask: as infinite in the average
        old = theta.numpy().copy()
        old[3] = 7.0
        new = folded(theta, old, 0.5)
        assert new[57] == value and new[3] == 4.0


def test_large_but_finite_numbers_are_folded() -> None:
    theta, old = torch.full((10,), 3e38), np.full(10, 1e38, dtype=np.float32)
    assert np.allclose(folded(theta, old, 0.5), 2e38)


@pytest.mark.parametrize("rule", ["ema", "swa"])
def test_as_torchs_averaged_model(rule: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(40, 30)
    ours: Any = EMA(decay=0.97) if rule == "ema" else Power(q=1)
    function = get_ema_multi_avg_fn(0.97) if rule == "ema" else get_swa_multi_avg_fn()
    theirs = AveragedModel(model, multi_avg_fn=function)
    p, mine = Progress(ours.spec), {}
    for step in range(50):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.1)
        theirs.update_parameters(model)
        rate, p = advance(p, step, (step + 1.0, 0.0))
        for name, weight in model.named_parameters():
            flat = weight.detach().reshape(-1)
            mine[name] = folded(flat, mine.get(name, np.zeros(len(flat), np.float32)), rate)
    for name, weight in theirs.module.named_parameters():
        assert np.abs(weight.detach().reshape(-1).numpy() - mine[name]).max() < 1e-6
