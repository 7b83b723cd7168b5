"""Running averages: the rules, what one remembers between folds, and the fold itself.

A running average is A += r (theta - A) with a rate r in (0, 1] of its own for each fold; the first fold sets A = theta.
A rule tells the rates from where training is: from the steps done, from tokens, or from a metric. How those of all folds
add up to weights is `ckpt.merge.weights`, whose formulas these are, one fold at a time.

Two places share a rule. The trainer of rank 0 makes a *mark* of each step, [t, l]: the time of the fold and the logarithm
of its weight, where the rule has one. The keepers of all ranks turn the same mark into the same rate (`advance`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ckpt.errors import UsageError
from ckpt.merge.native import address, kernels
from ckpt.merge.weights import FORMS, gamma_of, power_rates

__all__ = [
    "AVERAGES",
    "NOTES",
    "EMA",
    "MWA",
    "ACCUMULATORS",
    "Folds",
    "Mark",
    "NotFinite",
    "Power",
    "PowerEMA",
    "Progress",
    "Rule",
    "advance",
]

Bytes = npt.NDArray[np.uint8]
_Array = npt.NDArray[Any]
Mark = tuple[float, float]
"""When a fold is, in the rule's own unit, and the logarithm of its weight (0 where the rule has none)."""

ACCUMULATORS = {
    "float64": "float64",
    "float32": "float32",
    "float16": "float32",
    "bfloat16": "float32",
    "complex128": "complex128",
    "complex64": "complex64",
    "complex32": "complex64",
}
"""Element types that are averaged -> the type they are averaged in. Others, float8 among them, whose scales live
elsewhere, are not."""

AVERAGES = "averages"
"""Leaves of running averages are called averages.<name>.<leaf>,"""
NOTES = "__ckpt__.averages"
"""and this value of a checkpoint that has any says what they remember."""

BLOCK_NUMBERS = 1 << 16
"""Numbers to fold at a time: what is in use fits the core's second cache, and Python's part is small."""


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


class NotFinite(ArithmeticError):
    """A snapshot holds what cannot be averaged: no number, or an infinity that the average does not have."""


class Folds:
    """new = old + r (theta - old) for each of several averages, one or more, of the same elements, block by block; for
    one thread.

    rates    0 copies the average, 1 copies theta; any other is rounded to the accumulator's type first
    guarded  refuse what is not finite; False is for rates of 0 and 1 alone
    """

    def __init__(self, rates: Sequence[float], *, guarded: bool = True) -> None:
        self._rates, self._guarded = rates, guarded
        self._which = [k for k, r in enumerate(rates) if 0 < r < 1]
        n = len(self._which)
        self._rounded = {4: np.array([rates[k] for k in self._which], "<f4")}
        self._rounded[8] = np.array([rates[k] for k in self._which], "<f8")
        self._sums, self._where = np.empty(n), np.empty((3, n), dtype=np.uintp)
        self._room = np.empty((n, 0), dtype=np.uint8)
        there = address(self._where)
        self._there = there, there + 8 * n, there + 16 * n if n > 1 else 0
        self._rest = {wide: (address(r), address(self._sums), n) for wide, r in self._rounded.items()}

    def __call__(
        self,
        theta: Bytes,
        kind: str,
        old: Sequence[Bytes | None],
        new: Sequence[Bytes],
        at: tuple[int, Sequence[int], Sequence[int]] | None = None,
    ) -> Iterator[tuple[float, Bytes]]:
        """Folds one block.

        theta  stored elements of dtype `kind`, which is in `ACCUMULATORS`
        old    accumulators; None where there is no average yet: the rate is then 1
        new    where the results go; apart from `old`
        at     addresses of theta, of each of `old` (anything for None) and of `new`, where the caller knows them

        Each operation is rounded by itself, so a result does not depend on where a block begins, and what does not change
        stays as it is bit by bit (but -0, which becomes 0). Yields, for each average when it is made, the sum of
        (theta - old)^2, 0 where nothing was to be computed; and the result where it is in the cache, until the next call.

        Raises NotFinite, with `new` undefined.
        """
        done = self._compiled(theta, kind, old, new, at)
        x: _Array | None = None
        for k, (a, r, b) in enumerate(zip(old, self._rates, new, strict=True)):
            if k in done:
                yield done[k], self._room[self._which.index(k), : len(b)] if len(self._which) > 1 else b
                continue
            if x is None:
                x = _widened(theta, kind, np.empty_like(b))
            yield _fold(theta, kind, x, a, r, b, self._guarded), b

    def _compiled(
        self,
        theta: Bytes,
        kind: str,
        old: Sequence[Bytes | None],
        new: Sequence[Bytes],
        at: tuple[int, Sequence[int], Sequence[int]] | None,
    ) -> dict[int, float]:
        """Folds what the compiled kernel can: average -> its sum of squares, which is finite."""
        kernel, which = kernels().fold.get(kind), self._which
        if kernel is None or not which:
            return {}
        if at is None:
            at = address(theta), [0 if a is None else address(a) for a in old], [address(b) for b in new]
        nbytes, wide = len(new[0]), _wide(kind)
        if len(which) > 1 and nbytes > self._room.shape[1]:
            self._room = np.empty((len(which), nbytes), dtype=np.uint8)
            self._where[2] = [address(row) for row in self._room]
        self._where[0] = [at[1][k] for k in which]
        self._where[1] = [at[2][k] for k in which]
        kernel(at[0], *self._there, *self._rest[wide], nbytes // wide)
        return {k: square for k, square in zip(which, self._sums.tolist(), strict=True) if math.isfinite(square)}


def _fold(theta: Bytes, kind: str, x: _Array, a: Bytes | None, r: float, b: Bytes, guarded: bool) -> float:
    """One of them, by numpy; x: theta in the accumulator's type."""
    target: _Array = b.view(x.dtype)
    if a is None or r == 1:
        if guarded and not math.isfinite(float(np.dot(x, x))) and np.isnan(x).any():
            raise NotFinite
        np.copyto(target, x)
        return 0.0
    before = a.view(x.dtype)
    if r == 0:
        np.copyto(target, before)
        return 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        np.subtract(x, before, out=target)
        square = float(np.dot(target, target))
        if not math.isfinite(square):
            square = _carefully(_widened(theta, kind, np.empty_like(b)), before, target)
        np.multiply(target, target.dtype.type(r), out=target)
        np.add(before, target, out=target)
    return square


def _carefully(x: _Array, before: _Array, difference: _Array) -> float:
    """Where something is not finite, or its square is not: equal infinities are no difference."""
    difference[x == before] = 0
    if not np.isfinite(difference).all() or not np.isfinite(x[x != before]).all():
        raise NotFinite
    return float(np.dot(difference.astype(np.float64), difference.astype(np.float64)))


def norm(theta: Bytes, kind: str) -> float:
    """The sum of squares of stored elements."""
    wide = _wide(kind)
    x = _widened(theta, kind, np.empty(len(theta) // _NUMBER.get(kind, wide) * wide, dtype=np.uint8))
    return float(np.dot(x, x))


def _wide(kind: str) -> int:
    """Bytes of a number of an accumulator."""
    return 8 if kind in ("float64", "complex128") else 4


_NUMBER = {"bfloat16": 2, "float16": 2, "complex32": 2}
"""Bytes of a number, where it is not as wide as the accumulator's."""


def _widened(theta: Bytes, kind: str, room: Bytes) -> _Array:
    """Stored numbers in the accumulator's type: as they lie there, or in `room`."""
    if kind in ("float64", "complex128"):
        return theta.view("<f8")
    if kind not in _NUMBER:
        return theta.view("<f4")
    out = room.view("<f4")
    if kind == "bfloat16":
        bits = out.view(np.uint32)
        bits[...] = theta.view("<u2")
        np.left_shift(bits, np.uint32(16), out=bits)
    else:
        out[...] = theta.view("<f2")
    return out
