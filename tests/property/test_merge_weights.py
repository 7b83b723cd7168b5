"""Weights of averages against closed forms, recurrences carried out step by step, and torch's own averages."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckpt.errors import UsageError
from ckpt.merge import weights as w
from ckpt.merge.weights import Floats

EXACT = {"rtol": 0, "atol": 1e-12}
steps_of = st.lists(st.integers(1, 5000), min_size=1, max_size=24).map(
    lambda gaps: np.cumsum(gaps).astype(float).tolist()
)
rates_of = st.floats(0, 0.9999)


def carried_out(rates: Floats) -> Floats:
    """The weights of A += r (theta - A), found by folding the unit vectors."""
    a = np.zeros(len(rates))
    for n, r in enumerate(rates):
        theta = np.eye(len(rates))[n]
        a = theta if n == 0 else a + r * (theta - a)
    return a


@given(steps_of, rates_of)
def test_ema_is_its_recurrence_at_uneven_steps(steps: list[float], rate: float) -> None:
    c = w.ema(steps, rate)
    np.testing.assert_allclose(c, carried_out(w.ema_rates(steps, rate)), **EXACT)
    first, last = steps[0], steps[-1]
    closed = [rate ** (last - t) * (1 - rate ** (t - s)) for s, t in itertools.pairwise(steps)]
    np.testing.assert_allclose(c, [rate ** (last - first), *closed], **EXACT)


@given(st.integers(2, 12), st.integers(1, 7), st.floats(0.5, 0.999))
def test_ema_of_repeated_checkpoints_is_ema_at_wider_steps(n: int, gap: int, rate: float) -> None:
    """Folding the same weights `gap` times, a step each, forgets as much as one fold over `gap` steps."""
    fine = w.ema(list(range((n - 1) * gap + 1)), rate)
    grouped = [fine[0], *fine[1:].reshape(n - 1, gap).sum(axis=1)]
    np.testing.assert_allclose(w.ema([gap * i for i in range(n)], rate), grouped, **EXACT)


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_torch_averages_alike(kind: str) -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

    function = get_ema_multi_avg_fn(0.9) if kind == "ema" else get_swa_multi_avg_fn()
    model = torch.nn.Linear(7, 5, dtype=torch.float64)
    averaged = AveragedModel(model, multi_avg_fn=function)
    seen = []
    for seed in range(9):
        torch.manual_seed(seed)
        model.reset_parameters()
        averaged.update_parameters(model)
        seen.append(model.weight.detach().clone())
    c = w.ema(range(9), 0.9) if kind == "ema" else w.uniform(9)
    mine = sum(v * x for v, x in zip(c.tolist(), seen, strict=True))
    torch.testing.assert_close(averaged.module.weight.detach(), mine, rtol=1e-6, atol=1e-9)  # it divides in float32


@given(steps_of, st.floats(0.2, 20), st.floats(0.5, 1e4))
def test_power_is_its_closed_form_and_its_recurrence(steps: list[float], q: float, before: float) -> None:
    start = steps[0] - before
    t = np.array(steps) - start
    whole = (t / t[-1]) ** q
    closed = whole - np.concatenate(([0], whole[:-1]))
    np.testing.assert_allclose(w.power(steps, q, start), closed, **EXACT)
    np.testing.assert_allclose(w.unroll(w.power_rates(steps, q, start)), closed, **EXACT)
    np.testing.assert_allclose(w.wsm(steps, lambda x: 1 - x**q, start), closed, **EXACT)


@given(steps_of, st.floats(0.5, 20))
def test_power_rates_at_every_moment_give_that_moments_weights(steps: list[float], q: float) -> None:
    """A running average does not know how long the run will be; the window begins where it was told."""
    start = steps[0] - 3.0
    rates = w.power_rates(steps, q, start)
    for n in range(1, len(steps) + 1):
        np.testing.assert_allclose(w.unroll(rates[:n]), w.power(steps[:n], q, start), **EXACT)


@given(st.integers(1, 40), st.integers(1, 1000), st.integers(0, 10**6))
def test_even_steps_give_the_published_coefficients(n: int, gap: int, first: int) -> None:
    steps = [first + gap * i for i in range(n)]
    j = np.arange(n)
    root = np.sqrt((j + 1) / n) - np.sqrt(j / n)
    np.testing.assert_allclose(w.wsm(steps, w.DECAYS["1-sqrt"]), root, rtol=0, atol=1e-9)
    np.testing.assert_allclose(w.power(steps, 0.5), root, rtol=0, atol=1e-9)
    np.testing.assert_allclose(w.wsm(steps, w.DECAYS["linear"]), np.full(n, 1 / n), rtol=0, atol=1e-9)
    np.testing.assert_allclose(w.power(steps, 1), w.uniform(n), rtol=0, atol=1e-9)


@given(steps_of, st.sampled_from(sorted(w.DECAYS)))
def test_wsm_is_a_decayed_walk(steps: list[float], curve: str) -> None:
    """sum c_j theta_j = theta_0 + sum of w_i (theta_i - theta_(i-1)): every move counts with the decay at its begin."""
    decay = w.DECAYS[curve]
    rng = np.random.default_rng(len(steps))
    theta = rng.standard_normal(len(steps))
    start = steps[0] - 2.0
    walked = theta[0]
    for i in range(1, len(steps)):
        walked += decay((steps[i - 1] - start) / (steps[-1] - start)) * (theta[i] - theta[i - 1])
    c = w.wsm(steps, decay, start)
    assert c @ theta == pytest.approx(walked, abs=1e-12)
    assert c.min() >= -1e-15
    assert c.sum() == pytest.approx(1, abs=1e-12)


@given(st.lists(st.floats(-800, 800), min_size=1, max_size=30), st.floats(-1e4, 1e4))
def test_log_rates_neither_overflow_nor_mind_a_constant(logs: list[float], shift: float) -> None:
    rates = w.log_rates(logs)
    assert rates[0] == 1
    assert (rates >= 0).all() and (rates <= 1).all()
    top = max(logs)
    direct = np.array([math.exp(v - top) for v in logs])
    np.testing.assert_allclose(w.unroll(rates), direct / direct.sum(), rtol=0, atol=1e-11)
    np.testing.assert_allclose(w.log_rates([v + shift for v in logs]), rates, rtol=0, atol=1e-9)


@given(st.floats(0.01, 0.28))
def test_gamma_has_the_relative_width(sigma: float) -> None:
    g = w.gamma_of(sigma)
    assert math.sqrt((g + 1) / ((g + 2) ** 2 * (g + 3))) == pytest.approx(sigma, rel=1e-9)


def test_gamma_of_the_published_widths() -> None:
    assert w.gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert w.gamma_of(0.10) == pytest.approx(6.94, abs=0.005)


def test_a_power_ema_has_its_relative_width() -> None:
    """The standard deviation of its profile over time, per its end: by numbers, from many folds."""
    t = np.arange(1, 20001, dtype=float)
    c = w.power_ema(t.tolist(), 0.1)
    mean = c @ t
    assert math.sqrt(c @ (t - mean) ** 2) / t[-1] == pytest.approx(0.1, rel=1e-3)


@given(
    st.lists(st.floats(0.01, 20), min_size=1, max_size=20), st.floats(-8, 8), st.sampled_from(["power", "exp", "range"])
)
def test_mwa_is_its_formula(metric: list[float], penalty: float, form: str) -> None:
    m = np.array(metric)
    spread = m.max() - m.min() or 1.0
    raw = {"power": m**-penalty, "exp": np.exp(-penalty * m), "range": np.exp(-penalty * (m - m.min()) / spread)}[form]
    np.testing.assert_allclose(w.mwa(metric, penalty, form), raw / raw.sum(), **EXACT)
    up = {"power": m**penalty, "exp": np.exp(penalty * m), "range": np.exp(penalty * (m - m.min()) / spread)}[form]
    np.testing.assert_allclose(w.mwa(metric, penalty, form, higher_is_better=True), up / up.sum(), **EXACT)


@given(st.lists(st.floats(0.5, 9), min_size=1, max_size=12), st.floats(0, 6))
def test_separable_mwa_is_a_running_average(metric: list[float], penalty: float) -> None:
    online = w.unroll(w.log_rates([-penalty * math.log(v) for v in metric]))
    np.testing.assert_allclose(w.mwa(metric, penalty), online, **EXACT)


def test_mwa_takes_any_function() -> None:
    got = w.mwa([1.0, 2.0, 3.0], 2.0, lambda m, p: p * np.sqrt(m))
    raw = np.exp(2 * np.sqrt([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(got, raw / raw.sum(), **EXACT)
    assert w.mwa([3.0, 1.0, 2.0], 0.0).tolist() == pytest.approx([1 / 3] * 3)


def test_means_over_runs_and_interpolation() -> None:
    assert w.over_runs([2, 1]).tolist() == [0.25, 0.25, 0.5]
    assert w.interpolate(0.3).tolist() == [0.7, 0.3]
    assert w.explicit([1.5, -0.5]).tolist() == [1.5, -0.5]


# Post-hoc EMA.

FOLDS = np.arange(1, 2001, dtype=float)
TAKEN = [(t, sigma) for t in np.linspace(250, 2000, 8) for sigma in (0.05, 0.10)]


def profile(t: float, sigma: float) -> Floats:
    """By the recurrence, fold after fold."""
    q = w.gamma_of(sigma) + 1
    out = np.zeros(len(FOLDS))
    for n in range(int(t)):
        beta = (1 - 1 / FOLDS[n]) ** q
        out *= beta
        out[n] += 1 - beta
    return out


@pytest.mark.parametrize(("sigma", "off"), [(0.075, 0.02), (0.12, 0.02), (0.15, 0.05)])
def test_posthoc_ema_comes_close_to_the_average_that_was_not_kept(sigma: float, off: float) -> None:
    x = w.posthoc_ema(FOLDS, TAKEN, sigma)
    made = sum(v * profile(t, s) for v, (t, s) in zip(x, TAKEN, strict=True))
    wanted = profile(2000, sigma)
    assert np.linalg.norm(made - wanted) < off * np.linalg.norm(wanted)
    assert x.sum() == pytest.approx(1, abs=1e-12)


def test_posthoc_ema_of_a_kept_width_is_the_kept_average() -> None:
    x = w.posthoc_ema(FOLDS, TAKEN, 0.05)
    np.testing.assert_allclose(x, [0.0] * 14 + [1.0, 0.0], atol=1e-8)
    earlier = w.posthoc_ema(FOLDS, TAKEN, 0.10, at=1000.0)
    np.testing.assert_allclose(earlier, [0.0] * 7 + [1.0] + [0.0] * 8, atol=1e-8)


def test_posthoc_ema_agrees_with_least_squares_on_the_profiles() -> None:
    a = np.stack([profile(t, s) for t, s in TAKEN], axis=1)
    x = np.linalg.lstsq(a, profile(2000, 0.08), rcond=None)[0]
    np.testing.assert_allclose(w.posthoc_ema(FOLDS, TAKEN, 0.08), x / x.sum(), rtol=0, atol=1e-6)


def test_posthoc_ema_of_averages_that_are_alike_is_refused() -> None:
    close = [(t, sigma) for t in (1999.0, 2000.0) for sigma in (0.0999, 0.10, 0.1001)]
    with pytest.raises(UsageError, match="too much alike"):
        w.posthoc_ema(FOLDS, close, 0.08)


@pytest.mark.parametrize(
    "call",
    [
        lambda: w.uniform(0),
        lambda: w.ema([1, 2], 1.0),
        lambda: w.ema([1, 2], math.nan),
        lambda: w.ema([2, 1], 0.9),
        lambda: w.ema([1, 1], 0.9),
        lambda: w.power([1, 2], 0),
        lambda: w.power([1, 2], 1, start=1.5),
        lambda: w.explicit([0.5, 0.4]),
        lambda: w.explicit([math.nan, 1.0]),
        lambda: w.explicit([]),
        lambda: w.wsm([1, 2], lambda x: 1 + x),
        lambda: w.wsm([1, 2], lambda x: 0.9 - x / 2),
        lambda: w.mwa([1.0, math.inf], 1),
        lambda: w.mwa([1.0, -1.0], 1),
        lambda: w.mwa([1.0, 2.0], 1, "no such form"),
        lambda: w.mwa([1.0, 2.0], 1, lambda m, p: m[:1]),
        lambda: w.gamma_of(0.3),
        lambda: w.gamma_of(0.0),
        lambda: w.unroll([0.5, 0.5]),
        lambda: w.log_rates([0.0, -math.inf]),
        lambda: w.over_runs([2, 0]),
        lambda: w.posthoc_ema(FOLDS, [], 0.1),
        lambda: w.posthoc_ema(FOLDS, [(0.5, 0.1)], 0.1),
        lambda: w.posthoc_ema(FOLDS, TAKEN, 0.1, at=10.0),
    ],
)
def test_what_makes_no_average_is_refused(call: object) -> None:
    with pytest.raises(UsageError):
        call()  # type: ignore[operator]
