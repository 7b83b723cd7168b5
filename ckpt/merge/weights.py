"""How much each checkpoint of a trajectory counts: pure functions from steps, or from what was recorded at them, to weights.

A trajectory is n checkpoints, oldest first, at times `steps` (n,): numbers that rise, of training steps or of tokens.
Weights are float64 (n,), in that order, and add up to 1; negative ones, where a method gives them, extrapolate. A
running average A += r_n (theta_n - A) is given by its rates r (n,), of which the first is 1; `unroll` tells its weights.
All functions raise UsageError, before anything else, for numbers that make no average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ckpt.errors import UsageError

__all__ = [
    "DECAYS",
    "FORMS",
    "MAX_CONDITION",
    "delta",
    "ema",
    "ema_rates",
    "explicit",
    "gamma_of",
    "interpolate",
    "log_rates",
    "mwa",
    "over_runs",
    "posthoc_ema",
    "power",
    "power_ema",
    "power_rates",
    "uniform",
    "unroll",
    "wsm",
]

Floats = npt.NDArray[np.float64]
Decay = Callable[[float], float]
Form = Callable[[Floats, float], Floats]

MAX_CONDITION = 1e7
"""Of the scaled Gram matrix of `posthoc_ema`: above it the answer is more rounding than average."""

DECAYS: dict[str, Decay] = {
    "linear": lambda x: 1 - x,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
    "1-square": lambda x: 1 - x * x,
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
}
"""Curves that a learning rate falls along, from 1 at 0 to 0 at 1."""


def uniform(n: int) -> Floats:
    """1/n each: SWA (arXiv 1803.05407), LAWA for the last k of a run (arXiv 2209.14981), PMA's simple moving average
    (arXiv 2505.12082)."""
    if n < 1:
        raise UsageError("an average needs one checkpoint or more")
    return np.full(n, 1 / n)


def over_runs(counts: Sequence[int]) -> Floats:
    """The mean over runs of the mean over each run's checkpoints, `counts` of them: run averaging, as "Free Lunch"
    is described (its own text could not be read). Weights (sum of counts,), run after run."""
    if not counts or min(counts) < 1:
        raise UsageError("each run needs one checkpoint or more")
    return np.repeat(1 / (len(counts) * np.array(counts, dtype=np.float64)), counts)


def interpolate(amount: float) -> Floats:
    """(1 - amount, amount) for the starting point and the result of a fine-tuning (WiSE-FT, arXiv 2109.01903; JaColBERT,
    Dynamic Y-KD). Beyond 0 and 1 it extrapolates."""
    return explicit([1 - amount, amount])


def explicit(values: Sequence[float]) -> Floats:
    """The weights themselves. Refused unless they are finite and add up to 1 (to 1e-6; they are then divided by their
    sum)."""
    out = np.array(values, dtype=np.float64)
    total = math.fsum(out.tolist()) if np.isfinite(out).all() else math.nan
    if out.ndim != 1 or not len(out) or not abs(total - 1) <= 1e-6:
        raise UsageError(f"weights add up to {total:.6g}, but have to add up to 1; thirds are written as 1/3")
    return out / total


def delta(distances: npt.ArrayLike) -> Floats:
    """Delta-guided weights of one leaf: w_i = d_i / (d_1 + ... + d_n), where d_i = ||theta_i - theta_0|| (L2, over the whole leaf)
    is how far each of n checkpoints has moved it from theta_0, where fine-tuning began. 1/n each where none has moved it.

    In the style of CoDiEmb, which is said to weigh parameters by their deviation from where they began. Its own formula could not be read: this
    one is named for what it computes.
    """
    d = np.array(distances, dtype=np.float64)
    if d.ndim != 1 or not len(d) or not np.isfinite(d).all() or (d < 0).any():
        raise UsageError(
            "delta-guided weights need the distance of each checkpoint from the start: finite, and 0 or more"
        )
    total = math.fsum(d.tolist())
    return d / total if total else uniform(len(d))


def wsm(steps: Sequence[float], decay: Decay, start: float | None = None) -> Floats:
    """The weights that replace a learning rate decay over the window by an average (WSM, arXiv 2507.17634).

    With w_j = decay of the part of the window gone when checkpoint j - 1 was taken, c_j = w_j - w_(j+1), and the last
    one counts what is left. `decay(x)` falls from 1 at 0; linear gives the plain mean for even steps, "1-sqrt" counts
    the oldest most. `start`: where the window begins; one spacing before the first checkpoint by default.
    """
    x = _window(steps, start)
    w = [1.0, *(float(decay(v)) for v in x[:-1].tolist()), 0.0]
    first = float(decay(0.0))
    if not abs(first - 1) <= 1e-12 or not all(math.isfinite(v) for v in w) or not all(map(_falls, w, w[1:])):
        raise UsageError("a decay curve has to begin with 1, and to fall, without going below 0")
    return -np.diff(np.array(w))


def _falls(a: float, b: float) -> bool:
    return b <= a + 1e-12


def power(steps: Sequence[float], q: float, start: float | None = None) -> Floats:
    """c_j = (t_j / T)^q - (t_(j-1) / T)^q, with t since `start`: what `power_rates` has given at the last step.

    It is WSM's average for the decay 1 - x^q: q = 1/2 is 1-sqrt, q = 1 the mean, q = gamma + 1 with
    `start=0` EDM2's power EMA.
    """
    if not q > 0 or not math.isfinite(q):
        raise UsageError(f"power(q={q}): q has to be above 0")
    return np.diff(_window(steps, start) ** q, prepend=0.0)


def power_rates(steps: Sequence[float], q: float, start: float | None = None) -> Floats:
    """Rates r_n = 1 - (t_(n-1) / t_n)^q of the running average whose weights are `power` at every moment."""
    if not q > 0 or not math.isfinite(q):
        raise UsageError(f"power(q={q}): q has to be above 0")
    x = _window(steps, start)
    before = np.concatenate(([0.0], x[:-1]))
    return -np.expm1(q * np.log(before / x, where=before > 0, out=np.full(len(x), -np.inf)))


def ema_rates(steps: Sequence[float], rate: float) -> Floats:
    """Rates r_n = 1 - rate^(t_n - t_(n-1)) of an exponential moving average; `rate` is its decay per step, in [0, 1).

    Exact for uneven steps: twice the distance forgets twice. 0.5^(1/h) has a half-life of h steps.
    """
    if not 0 <= rate < 1:
        raise UsageError(f"ema: a decay of {rate} per step; it has to be from 0 to below 1, such as 0.999")
    gaps = np.diff(_rising(steps))
    return np.concatenate(([1.0], 1 - rate**gaps))


def ema(steps: Sequence[float], rate: float) -> Floats:
    """Weights of `ema_rates`: rate^(T - t_j) (1 - rate^(t_j - t_(j-1))); the first checkpoint is where it starts."""
    return unroll(ema_rates(steps, rate))


def unroll(rates: npt.ArrayLike) -> Floats:
    """Weights c_j = r_j prod_(i>j) (1 - r_i) that the running average A += r (theta - A) has given; r_0 is 1."""
    r = np.array(rates, dtype=np.float64)
    if r.ndim != 1 or not len(r) or r[0] != 1:
        raise UsageError("rates of a running average begin with 1: it starts as its first checkpoint")
    later = np.concatenate((np.cumprod((1 - r[1:])[::-1])[::-1], [1.0]))
    return r * later


def log_rates(log_weights: Sequence[float]) -> Floats:
    """Rates r_n = w_n / (w_0 + ... + w_n) of the running average with weights proportional to w = exp(log_weights).

    r_n = exp(l_n - L_n), L_n = logaddexp(L_(n-1), l_n): no overflow, and a constant added to all changes nothing.
    """
    l = np.array(log_weights, dtype=np.float64)  # noqa: E741
    if not len(l) or not np.isfinite(l).all():
        raise UsageError("weights of a running average have to be above 0 and finite")
    return np.exp(l - np.logaddexp.accumulate(l))


def gamma_of(sigma_rel: float) -> float:
    """The exponent gamma of EDM2's power EMA of relative width sigma_rel, 0 < sigma_rel < 0.2886 (arXiv 2312.02696, alg. 2).

    The largest root of g^3 + 7 g^2 + (16 - s^-2) g + 12 - s^-2. 0.05 gives 16.97, 0.10 gives 6.94.
    """
    if not 0 < sigma_rel < 12**-0.5:
        raise UsageError(f"a relative width of {sigma_rel}; it has to be above 0 and below 0.288, such as 0.05")
    s = sigma_rel**-2
    return float(max(r.real for r in np.roots([1, 7, 16 - s, 12 - s]) if abs(r.imag) < 1e-9 * max(1, abs(r))))


def power_ema(steps: Sequence[float], sigma_rel: float) -> Floats:
    """EDM2's power EMA (arXiv 2312.02696) over the checkpoints there are: `power` with q = gamma + 1 since training began.

    beta_t = (1 - 1/t)^(gamma + 1) telescopes over uneven steps. `steps` are above 0: the training steps done.
    """
    return power(steps, gamma_of(sigma_rel) + 1, start=0.0)


def posthoc_ema(
    folds: npt.ArrayLike, taken: Sequence[tuple[float, float]], sigma_rel: float, at: float | None = None
) -> Floats:
    """How to add up stored power EMAs so that another width comes out (post-hoc EMA, arXiv 2312.02696, section 3.2).

    folds      (m,) the times at which the averages were updated, rising, above 0
    taken      (time, sigma_rel) of each of the n stored averages; at least two widths make a good basis
    sigma_rel  what is wanted, at time `at`: of the last stored average by default; averages taken later are not used

    Least squares over profiles, weights over the folds. The Gram matrix is the discrete one: EDM2's integral has a pole
    and takes spacing for infinitely fine. Refused if its condition, after scaling to a diagonal of ones, is above 1e7:
    then averages are too close to one another, and the solution would amplify rounding. Weights (n,), in order of `taken`.
    """
    t = _rising(folds)
    if not taken or t[0] <= 0:
        raise UsageError("post-hoc EMA needs stored averages, and folds after time 0")
    end = max(time for time, _ in taken) if at is None else at
    used = [i for i, (time, _) in enumerate(taken) if time <= end]
    if not used:
        raise UsageError(f"no average was stored up to {end:g}")
    profiles = np.stack([_profile(t, *taken[i]) for i in used])
    target = _profile(t, end, sigma_rel)
    gram = profiles @ profiles.T
    scale = 1 / np.sqrt(np.diag(gram))
    scaled = gram * scale[:, None] * scale[None, :]
    condition = float(np.linalg.cond(scaled))
    if not condition <= MAX_CONDITION:
        raise UsageError(
            f"the stored averages are too much alike (condition {condition:.1e}, at most {MAX_CONDITION:.0e}); "
            "take fewer of them, further apart"
        )
    x = np.linalg.solve(scaled, scale * (profiles @ target)) * scale
    out = np.zeros(len(taken))
    out[used] = x / x.sum()
    return out


def _profile(folds: Floats, time: float, sigma_rel: float) -> Floats:
    """Weights over all folds of a power EMA as it was at `time`."""
    n = int(np.searchsorted(folds, time, side="right"))
    if n == 0:
        raise UsageError(f"an average of time {time:g} was stored before anything was folded into it")
    return np.concatenate((power_ema(folds[:n].tolist(), sigma_rel), np.zeros(len(folds) - n)))


def _loss_power(metric: Floats, penalty: float) -> Floats:
    if (metric <= 0).any():
        raise UsageError("this form of weights needs metrics above 0; take the form exp or range")
    out: Floats = -penalty * np.log(metric)
    return out


def _loss_exp(metric: Floats, penalty: float) -> Floats:
    return -penalty * metric


def _loss_range(metric: Floats, penalty: float) -> Floats:
    spread = float(np.ptp(metric))
    out: Floats = -penalty * (metric - metric.min()) / (spread if spread > 0 else 1.0)
    return out


FORMS: dict[str, Form] = {"power": _loss_power, "exp": _loss_exp, "range": _loss_range}
"""Logarithms of weights, up to a constant, from metrics (lower is better) and a penalty. `power` and `exp` are
separable: a running average can use them. `range` looks at all metrics: it needs the checkpoints."""


def mwa(
    metric: Sequence[float], penalty: float, form: str | Form = "power", *, higher_is_better: bool = False
) -> Floats:
    """Metric-weighted averaging (after MWA, arXiv 2504.18580): weights from one metric and one penalty.

    power   m^-penalty
    exp     exp(-penalty m)
    range   exp(-penalty (m - min) / (max - min)): metrics normalised over the set, as the paper is said to do
    else    any function of (metric (n,), penalty) that gives logarithms of weights (n,)

    Where higher is better, as with the step, penalty counts the other way: power is m^penalty. A penalty of 0 is the
    mean. The paper's own formula could not be read: these are named for what they compute.
    """
    m = np.array(metric, dtype=np.float64)
    if m.ndim != 1 or not len(m) or not np.isfinite(m).all() or not math.isfinite(penalty):
        raise UsageError("a metric-weighted average needs a finite metric of each checkpoint, and a finite penalty")
    log = _form(form)(m, -penalty if higher_is_better else penalty)
    if log.shape != m.shape or not np.isfinite(log).all():
        raise UsageError("the form of weights gave something else than a finite logarithm for each metric")
    w: Floats = np.exp(log - log.max())
    w /= w.sum()
    return w


def _form(form: str | Form) -> Form:
    if callable(form):
        return form
    if form not in FORMS:
        raise UsageError(f"no form of weights is called {form!r}; there are {', '.join(FORMS)}")
    return FORMS[form]


def _rising(steps: npt.ArrayLike) -> Floats:
    t = np.array(steps, dtype=np.float64)
    if t.ndim != 1 or not len(t) or not np.isfinite(t).all() or (np.diff(t) <= 0).any():
        raise UsageError("the checkpoints' steps have to rise; take them from one run, oldest first")
    return t


def _window(steps: Sequence[float], start: float | None) -> Floats:
    """What part of the window from `start` to the last step is gone at each: (0, 1], the last one 1."""
    t = _rising(steps)
    if start is None:
        start = float(2 * t[0] - t[1]) if len(t) > 1 else float(t[0] - 1)
    if start >= t[0] and not (start == t[0] and len(t) > 1):
        raise UsageError(f"the window begins at {start:g}, not before its first checkpoint at {t[0]:g}")
    out: Floats = (t - start) / (t[-1] - start)
    return out
