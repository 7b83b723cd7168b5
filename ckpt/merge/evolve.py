"""Where to look for coefficients: strategies that propose rows of free numbers and learn from their scores. No I/O.

A row holds what each checkpoint but the last counts; the last one counts what is missing to 1, so that any row is an
affine combination. Strategies are deterministic: the same seed and the same scores give the same rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from ckpt.errors import UsageError
from ckpt.merge import weights as maths
from ckpt.merge.weights import Floats

__all__ = ["STRATEGIES", "CmaEs", "Evolution", "Strategy", "ema_rows", "ladder_rows", "strategy"]

EMA_RATES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.99)
"""Decays from one checkpoint to the next."""

_ELITE = 0.3
_STEP = 0.3  # first standard deviation of the sum of all coefficients' changes


class Strategy(Protocol):
    """`ask` proposes rows (population, free); `tell` says what they scored, lower is better; nan counts as worst."""

    def ask(self) -> Floats: ...

    def tell(self, rows: Floats, scores: Sequence[float]) -> None: ...


def ladder_rows(n: int, steps: Sequence[float]) -> Iterator[tuple[str, Floats]]:
    """(name, weights) of what is cheap to try before any search, for n checkpoints: each alone, the newest first; the mean
    of the last 2, 4, 8, ... n; WSM's decay curves over as many; EMAs of several decays."""
    for i in reversed(range(n)):
        yield f"single:{steps[i]:g}", np.eye(n)[i]
    counts = sorted({*(2**k for k in range(1, n.bit_length()) if 2**k <= n), n} - {1})
    for k in counts:
        yield f"uniform:last-{k}", _newest(n, maths.uniform(k))
    for curve in ("1-sqrt", "cosine", "1-square"):
        for k in counts:
            yield f"wsm:{curve}:last-{k}", _newest(n, maths.wsm(steps[-k:], maths.DECAYS[curve]))
    if n > 1:
        for rate, row in zip(EMA_RATES, ema_rows(n), strict=True):
            yield f"ema:{rate:g}-a-checkpoint", row


def _newest(n: int, weights: Floats) -> Floats:
    return np.concatenate((np.zeros(n - len(weights)), weights))


def ema_rows(n: int) -> list[Floats]:
    """Weights of EMAs of `EMA_RATES` over n checkpoints."""
    return [maths.ema(range(n), rate) for rate in EMA_RATES]


class Evolution:
    """LCSC-style evolutionary search (after arXiv 2404.02241, whose operators' constants could not be read).

    The population begins with EMA vectors of several rates, the `seeds`, and mutations of both. Each generation, children
    of two parents from the best 30 %: uniform crossover, then Gaussian mutation of a scale of its own (log-normal), then
    a clip of each free coefficient to [-clip, clip]. The best of parents and children stay.
    """

    def __init__(self, free: int, seeds: Sequence[Floats], *, population: int, clip: float, seed: int) -> None:
        self._rng = np.random.Generator(np.random.Philox(seed))
        self._size, self._clip, self._sigma = population, clip, _STEP / np.sqrt(free)
        known = [*seeds, *(row[:-1] for row in ema_rows(free + 1))]
        more = [self._mutated(known[i % len(known)]) for i in range(max(0, population - len(known)))]
        self._first: Floats | None = np.clip(np.stack([*known, *more]), -clip, clip)
        self._rows = np.empty((0, free))
        self._scores = np.empty(0)

    def _mutated(self, row: Floats) -> Floats:
        scale = self._sigma * 2 ** self._rng.standard_normal()
        out: Floats = np.clip(row + scale * self._rng.standard_normal(len(row)), -self._clip, self._clip)
        return out

    def ask(self) -> Floats:
        if self._first is not None:
            return self._first
        elite = self._rows[: max(2, int(_ELITE * self._size))]
        children = []
        for _ in range(self._size):
            a, b = elite[self._rng.integers(0, len(elite), 2)]
            children.append(self._mutated(np.where(self._rng.random(len(a)) < 0.5, a, b)))
        return np.stack(children)

    def tell(self, rows: Floats, scores: Sequence[float]) -> None:
        self._first = None
        self._rows = np.concatenate((self._rows, rows))
        self._scores = np.concatenate((self._scores, np.nan_to_num(np.array(scores), nan=np.inf)))
        best = np.argsort(self._scores, kind="stable")[: self._size]
        self._rows, self._scores = self._rows[best], self._scores[best]


class CmaEs:
    """CMA-ES (Hansen, arXiv 1604.00772) through the package `cma`, from the best of the seeds, with bounds."""

    def __init__(self, free: int, seeds: Sequence[Floats], *, population: int, clip: float, seed: int) -> None:
        if free < 2:
            raise UsageError("cma needs three checkpoints or more; take the method lcsc")
        rng = np.random.Generator(np.random.Philox(seed))
        begin = seeds[0] if seeds else np.full(free, 1 / (free + 1))
        options = {
            "popsize": population,
            "bounds": [-clip, clip],
            "randn": lambda *shape: rng.standard_normal(shape),
            "seed": np.nan,  # the module's own generator is not used, and left alone
            "verbose": -9,
        }
        self._es: Any = _cma().CMAEvolutionStrategy(
            np.clip(begin, -0.99 * clip, 0.99 * clip), _STEP / np.sqrt(free), options
        )

    def ask(self) -> Floats:
        return np.array(self._es.ask(), dtype=np.float64)

    def tell(self, rows: Floats, scores: Sequence[float]) -> None:
        finite = [s for s in scores if np.isfinite(s)]
        worst = max(finite, default=0.0)
        self._es.tell(list(rows), [s if np.isfinite(s) else worst + 1 + abs(worst) for s in scores])


def _cma() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it regrets that it cannot plot
        try:
            import cma
        except ImportError:
            raise UsageError("the method cma needs a package: pip install 'ckpt-universal[search]'") from None
    return cma


STRATEGIES: dict[str, type[Evolution] | type[CmaEs]] = {"lcsc": Evolution, "cma": CmaEs}


def strategy(method: str, free: int, seeds: Sequence[Floats], *, population: int, clip: float, seed: int) -> Strategy:
    """The strategy that is called `method`. `seeds`: rows to begin with, the best first. Raises UsageError."""
    return STRATEGIES[method](free, seeds, population=population, clip=clip, seed=seed)
