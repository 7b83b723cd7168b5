"""Running averages: the rules, and what one remembers between folds. The fold itself is `ckpt.merge.fold`.

A running average is A += r (theta - A) with a rate r in (0, 1] of its own for each fold; the first fold sets A = theta.
A rule tells the rates from where training is: from the steps done, from tokens, or from a metric. How those of all folds
add up to weights is `ckpt.merge.weights`, whose formulas these are, one fold at a time.

Two places share a rule. The trainer of rank 0 makes a *mark* of each step, [t, l]: the time of the fold and the logarithm
of its weight, where the rule has one. The keepers of all ranks turn the same mark into the same rate (`advance`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ckpt.errors import UsageError
from ckpt.merge.weights import FORMS, gamma_of, power_rates

__all__ = [
    "AVERAGES",
    "NOTES",
    "EMA",
    "MWA",
    "Mark",
    "Power",
    "PowerEMA",
    "Progress",
    "Rule",
    "advance",
]

Mark = tuple[float, float]
"""When a fold is, in the rule's own unit, and the logarithm of its weight (0 where the rule has none)."""

AVERAGES = "averages"
"""Leaves of running averages are called averages.<name>.<leaf>,"""
NOTES = "__ckpt__.averages"
"""and this value of a checkpoint that has any says what they remember."""


class Rule(Protocol):
    """How much each step counts. `spec` says so as plain JSON: averages of one spec are the same average."""

    @property
    def spec(self) -> dict[str, Any]: ...

    def mark(self, step: int, metrics: Mapping[str, float]) -> Mark | str:
        """Of the step that was just done, counted from 0; or what is missing for one."""
        ...


@dataclass(frozen=True)
class EMA:
    """Exponential moving average, exact for uneven spacing: r = 1 - 0.5^(gap / half_life).

    half_life  after as many steps a snapshot counts half as much
    decay      instead: what is left of it after one step, as 0.999
    by         "step", or the name of a metric that rises, as "tokens": half_life and decay are then in its unit
    """

    half_life: float | None = None
    decay: float | None = None
    by: str = "step"

    def __post_init__(self) -> None:
        if (self.half_life is None) == (self.decay is None):
            raise UsageError("EMA: give half_life or decay, as EMA(half_life=2000) or EMA(decay=0.999)")
        if self.half_life is not None and not 0 < self.half_life < math.inf:
            raise UsageError(f"EMA(half_life={self.half_life!r}): a positive number of steps")
        if self.decay is not None and not 0 < self.decay < 1:
            raise UsageError(f"EMA(decay={self.decay!r}): between 0 and 1, such as 0.999")

    @property
    def spec(self) -> dict[str, Any]:
        amount = {"half_life": self.half_life} if self.decay is None else {"decay": self.decay}
        return {"kind": "ema", "by": self.by, **amount}

    def mark(self, step: int, metrics: Mapping[str, float]) -> Mark | str:
        return _at(self.by, step, metrics)


@dataclass(frozen=True)
class Power:
    """r_n = 1 - (t_(n-1) / t_n)^q with t since `start`: at every moment the average over the window, `weights.power`.

    q = 1 is the mean over time (SWA), q = 1/2 what WSM puts in the place of a 1-sqrt decay of the learning rate, 2
    counts late steps more.

    start  where the window begins, in steps done; nothing is folded until then. By default one spacing before the first
           fold, so that evenly spaced steps count alike with q = 1
    by     "step", or the name of a metric that rises, as "tokens"
    """

    q: float = 1.0
    start: float | None = None
    by: str = "step"

    def __post_init__(self) -> None:
        if not 0 < self.q < math.inf:
            raise UsageError(f"Power(q={self.q!r}): a number above 0")
        if self.start is not None and not math.isfinite(self.start):
            raise UsageError(f"Power(start={self.start!r}): a number of steps")

    @property
    def spec(self) -> dict[str, Any]:
        return {"kind": "power", "by": self.by, "q": float(self.q), "start": self.start}

    def mark(self, step: int, metrics: Mapping[str, float]) -> Mark | str:
        return _at(self.by, step, metrics)


@dataclass(frozen=True)
class PowerEMA:
    """EDM2's power EMA (arXiv 2312.02696) of relative width `sigma_rel`, above 0 and below 0.288: `Power` with
    q = gamma + 1 since training began. Two of them (0.05, 0.10) are what post-hoc EMA is made from."""

    sigma_rel: float
    by: str = "step"

    def __post_init__(self) -> None:
        gamma_of(self.sigma_rel)

    @property
    def spec(self) -> dict[str, Any]:
        return {"kind": "power", "by": self.by, "q": gamma_of(self.sigma_rel) + 1, "start": 0.0}

    def mark(self, step: int, metrics: Mapping[str, float]) -> Mark | str:
        return _at(self.by, step, metrics)


@dataclass(frozen=True)
class MWA:
    """Metric-weighted average (after MWA, arXiv 2504.18580, whose own formula we could not read): weights from one metric
    and one penalty, as `ckpt.merge.weights.mwa` names them.

    metric            the name of a metric given to `cp.step`; "step": the steps done; or a function of (step, metrics)
                      that returns one
    penalty           0 is the mean
    form              "power", m^-penalty, or "exp", exp(-penalty m); or a function of (metric (1,), penalty) that returns
                      logarithms of weights (1,). "range", metrics normalised over the set, cannot be known while training
                      runs: it is a recipe over stored checkpoints, `ckpt.average(weights="mwa:...")`
    higher_is_better  the penalty counts the other way; of "step" it always does

    The metric is that of rank 0. A step without it is not folded.
    """

    metric: str | Callable[[int, Mapping[str, float]], float] = "loss"
    penalty: float = 4.0
    form: str | Callable[[npt.NDArray[np.float64], float], npt.NDArray[np.float64]] = "power"
    higher_is_better: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.penalty):
            raise UsageError(f"MWA(penalty={self.penalty!r}): a finite number")
        if isinstance(self.form, str) and self.form not in ("power", "exp"):
            raise UsageError(
                f"MWA(form={self.form!r}): power or exp, or a function; range needs all metrics, see ckpt.average"
            )

    @property
    def spec(self) -> dict[str, Any]:
        higher = self.higher_is_better or self.metric == "step"
        names = {"metric": _name_of(self.metric), "form": _name_of(self.form)}
        return {"kind": "weight", **names, "penalty": float(self.penalty), "higher": higher}

    def mark(self, step: int, metrics: Mapping[str, float]) -> Mark | str:
        if callable(self.metric):
            value = float(self.metric(step, metrics))
        elif self.metric == "step":
            value = step + 1.0
        elif self.metric in metrics:
            value = float(metrics[self.metric])
        else:
            return f"step {step} has no metric {self.metric!r}"
        penalty = -self.penalty if self.spec["higher"] else self.penalty
        form = FORMS[self.form] if isinstance(self.form, str) else self.form
        try:
            log = float(form(np.array([value]), penalty)[0])
        except UsageError as e:
            return str(e)
        return (step + 1.0, log) if math.isfinite(log) else f"metric {value} of step {step} gives no weight"


def _at(by: str, step: int, metrics: Mapping[str, float]) -> Mark | str:
    if by == "step":
        return step + 1.0, 0.0
    return (float(metrics[by]), 0.0) if by in metrics else f"step {step} has no metric {by!r}"


def _name_of(what: Any) -> str:
    return what if isinstance(what, str) else f"{what.__module__}.{what.__qualname__}"


@dataclass(frozen=True)
class Progress:
    """What an average remembers. All of it is JSON, and the same on all ranks.

    spec     of its rule
    folds    snapshots that count in it
    refused  snapshots that should and do not: not finite, or without what the rule needs
    step     the last one folded, -1 before that; it is never folded twice
    t        the time of the last fold, `start` of the window, `total`: logarithm of the sum of all weights
    """

    spec: Mapping[str, Any]
    folds: int = 0
    refused: int = 0
    step: int = -1
    t: float | None = None
    start: float | None = None
    total: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "spec": dict(self.spec)}

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> Progress:
        """Raises KeyError, TypeError or ValueError for what is none."""
        p = Progress(**content)
        numbers = (p.folds, p.refused, p.step, p.t or 0.0, p.start or 0.0, p.total or 0.0)
        if not isinstance(p.spec, dict) or not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
            raise ValueError("not the progress of an average")
        return p


def advance(p: Progress, step: int, mark: Mark | None) -> tuple[float, Progress]:
    """(rate, what is remembered then) of folding a step. A rate of 0 leaves the average as it is; it is 1 before the
    average begins, and for the first snapshot in it. No mark: the step cannot be folded."""
    empty = 1.0 if not p.folds else 0.0  # what stands for an average that has not begun is the last snapshot
    if step <= p.step:
        return 0.0, p
    if mark is None:
        return empty, replace(p, refused=p.refused + 1)
    t, log = float(mark[0]), float(mark[1])
    if p.t is not None and t <= p.t:  # a counter that does not rise
        return 0.0, replace(p, refused=p.refused + 1)
    kind, start, total, rate = p.spec["kind"], p.start, p.total, 1.0
    if kind == "power" and p.spec["start"] is not None:
        start = float(p.spec["start"])
        if t <= start:
            return 1.0, p
    if p.t is not None:
        if kind == "ema":
            gap = t - p.t
            decay = math.log(p.spec["decay"]) if "decay" in p.spec else -math.log(2) / p.spec["half_life"]
            rate = -math.expm1(gap * decay)
        elif kind == "power":
            start = 2 * p.t - t if start is None else start
            rate = float(power_rates([p.t, t], float(p.spec["q"]), start)[1])
    if kind == "weight":
        total = log if total is None else float(np.logaddexp(total, log))
        rate = math.exp(log - total)
    return rate, replace(p, folds=p.folds + 1, step=step, t=t, start=start, total=total)
