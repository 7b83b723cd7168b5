"""Recipes: a named linear combination of checkpoints as plain data. Making one reads commits and the ledger, no tensor (but
for delta-guided weights: see `ckpt.merge.delta`).

A recipe can be written as a checkpoint (`ckpt.materialise`), loaded as if it were one (`ckpt.load(state, recipe)`), kept
as JSON. It names each checkpoint by its own URL and the checksum of its manifest: it means the same for good.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from ckpt.backends import Backend, backend_for
from ckpt.catalog import Step, higher_is_better, lineage, list_run, parse_ref, resolve, with_ledger
from ckpt.commit import Commit, read_commit
from ckpt.errors import FormatError, NotFoundError, UsageError
from ckpt.merge import weights as maths
from ckpt.merge.weights import Floats

__all__ = ["MOMENTS", "Chosen", "Recipe", "Term", "average", "choose", "posthoc", "recipe_of", "url_of"]

VERSION = 1
MOMENTS = ("latest", "averaged", "reset")

Weights = str | Sequence[float] | Callable[[Sequence[Commit]], Sequence[float]]
Refs = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class Term:
    """One checkpoint of a recipe and what it counts.

    `manifest`: the CRC32C of its manifest, 8 hex digits. `instead`: (key in the result, key in this checkpoint) where
    they differ, as ("model", "ema5") for what the state held under "ema5".
    """

    ref: str
    step: int
    manifest: str
    weight: float
    instead: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Recipe:
    """sum of weight * checkpoint over the terms; the weights add up to 1. The last term is the base: names, types and
    whatever is not averaged come from it.

    method    how the weights came about, in words
    moments   state of optimizers: "latest" (the base's), "averaged", "reset" (left out), or "" (undecided: refused as soon
              as there is any)
    only      names or globs of the leaves to average; all by default
    latest    names or globs of leaves to take from the base all the same
    said      further provenance, as scores of a search: JSON-able
    weights_of  where leaves have weights of their own: {name of a leaf: a weight for each term}, of all leaves that are averaged.
              Then a term's weight is the mean of them, to be shown
    """

    method: str
    terms: tuple[Term, ...]
    moments: str = ""
    only: tuple[str, ...] = ()
    latest: tuple[str, ...] = ()
    said: Mapping[str, Any] | None = None
    weights_of: Mapping[str, tuple[float, ...]] | None = None

    def __post_init__(self) -> None:
        w = self.weights
        if not _affine(w.tolist(), len(self.terms)):
            raise UsageError(f"recipe {self.method!r}: its weights have to be finite and add up to 1")
        for name, some in (self.weights_of or {}).items():
            if not _affine(some, len(w)):
                raise UsageError(
                    f"recipe {self.method!r}: leaf {name!r} needs a finite weight for each term, and they have to add up to 1"
                )
        if self.moments not in ("", *MOMENTS):
            raise UsageError(f"moments={self.moments!r}; say one of {', '.join(MOMENTS)}")
        if self.moments == "averaged" and (w < 0).any():
            raise UsageError("moments cannot be averaged with negative weights: a variance could come out below 0")
        if self.moments == "averaged" and self.weights_of is not None:
            raise UsageError(
                f"recipe {self.method!r}: each leaf has weights of its own, the moments have none; say moments latest or reset"
            )

    @property
    def base(self) -> Term:
        return self.terms[-1]

    @property
    def weights(self) -> Floats:
        """float64 (terms,)."""
        return np.array([t.weight for t in self.terms], dtype=np.float64)

    def to_json(self) -> str:
        """One line of JSON; the same for the same recipe. Where no leaf has weights of its own, nothing is said of them."""
        said = {k: v for k, v in asdict(self).items() if k != "weights_of" or v is not None}
        return json.dumps({"version": VERSION, **said}, separators=(",", ":"), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Recipe:
        """What `to_json` wrote. Raises FormatError."""
        try:
            given = json.loads(text)
            if given.pop("version") != VERSION:
                raise ValueError("it is of another version")
            terms = [Term(**{**t, "instead": tuple((a, b) for a, b in t["instead"])}) for t in given.pop("terms")]
            only, latest = tuple(given.pop("only")), tuple(given.pop("latest"))
            own = given.pop("weights_of", None)
            own = None if own is None else {name: tuple(map(float, some)) for name, some in own.items()}
            return Recipe(terms=tuple(terms), only=only, latest=latest, weights_of=own, **given)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise FormatError(f"not a recipe: {type(e).__name__}: {str(e)[:300]}") from None


def _affine(weights: Sequence[float], n: int) -> bool:
    return len(weights) == n > 0 and all(map(math.isfinite, weights)) and abs(math.fsum(weights) - 1) <= 1e-6


@dataclass(frozen=True)
class Chosen:
    """A checkpoint that was named: the run it is in, and its commit with the metrics that came late."""

    run: str
    commit: Commit

    @property
    def ref(self) -> str:
        return f"{self.run}/{self.commit.folder}"


def average(
    refs: Refs,
    *,
    weights: Weights = "uniform",
    last: int | None = None,
    steps: str | Sequence[int] | None = None,
    moments: str = "",
    only: Sequence[str] = (),
    latest: Sequence[str] = (),
) -> Recipe:
    """A recipe for the average of checkpoints; nothing is read but what names them, unless the weights are "delta".

    refs      a run (all its steps that lead to the present), a ref of one step, or several of them, oldest first
    last      of each run, only the newest so many
    steps     of each run, only these: numbers, or a text as "100,200,300:500" (both ends included)
    weights   "uniform" (SWA, LAWA, PMA), "wsm:CURVE" (linear, 1-sqrt, 1-square, cosine), "ema:RATE" (decay per step),
              "power:Q", "edm:SIGMA", "mwa:METRIC,PENALTY[,FORM]" (a metric of the steps, or "step"; power, exp, range),
              "runs" (the mean of the means of several runs), "interpolate:AMOUNT" (from the first to the last),
              "delta:START" (each leaf by how far each checkpoint moved it from the ref START: reads all of them, on every
              rank that calls this), numbers as "0.2,0.3,1/2", or a function of the commits. See `ckpt.merge.weights`.
    moments   what becomes of optimizers' state; see `Recipe`, as for the other arguments

    Raises UsageError, NotFoundError (no such step; a metric that a step lacks); with "delta" what `ckpt.merge.delta.guided` does.
    """
    chosen, counts = choose(refs, last=last, steps=steps)
    if isinstance(weights, str) and weights.startswith("delta:"):
        from ckpt.merge.delta import guided  # which reads, with what is made of recipes

        return guided(chosen, weights.removeprefix("delta:"), moments=moments, only=only, latest=latest)
    w, method = _weigh(weights, [c.commit for c in chosen], counts)
    return recipe_of(chosen, w, method, moments=moments, only=only, latest=latest)


def posthoc(
    refs: Refs,
    sigma_rel: float,
    tracked: Mapping[str, float],
    *,
    key: str = "model",
    every: int = 1,
    last: int | None = None,
    steps: str | Sequence[int] | None = None,
    moments: str = "",
) -> Recipe:
    """A recipe for the power EMA of another width out of those that the checkpoints hold (post-hoc EMA).

    tracked   {key of the state: relative width} of the power EMAs that were saved beside `key`, as {"ema5": 0.05}
    every     they were updated every so many steps, the first time after `every` of them

    Step n is taken to come after n + 1 training steps. The result holds the average under `key`; the rest is the base's.
    Raises what `average` does; UsageError too where the averages are too much alike (`ckpt.merge.weights.posthoc_ema`).
    """
    if not tracked or every < 1:
        raise UsageError(
            "post-hoc EMA needs the keys and widths of the averages in the checkpoints, and every of 1 or more"
        )
    chosen, _ = choose(refs, last=last, steps=steps)
    taken = [(float(c.commit.step + 1), sigma) for c in chosen for sigma in tracked.values()]
    folds = np.arange(every, max(t for t, _ in taken) + 1, every)
    w = maths.posthoc_ema(folds, taken, sigma_rel)
    pairs = [(c, ((key, name),)) for c in chosen for name in tracked]
    terms = [_term(c, float(v), instead) for (c, instead), v in zip(pairs, w, strict=True) if v]
    widths = ",".join(f"{name}={sigma:g}" for name, sigma in tracked.items())
    return Recipe(f"posthoc-ema:{sigma_rel:g} from {widths}", (*terms, _term(chosen[-1], 0.0)), moments, (key,))


def recipe_of(
    chosen: Sequence[Chosen],
    weights: Sequence[float] | Floats,
    method: str,
    *,
    moments: str = "",
    only: Sequence[str] = (),
    latest: Sequence[str] = (),
    said: Mapping[str, Any] | None = None,
) -> Recipe:
    """A recipe of these checkpoints; those that count nothing are left out, but never the last."""
    pairs = list(zip(chosen, map(float, weights), strict=True))
    terms = [_term(c, v) for c, v in pairs[:-1] if v] + [_term(*pairs[-1])]
    return Recipe(method, tuple(terms), moments, tuple(only), tuple(latest), said)


def _term(c: Chosen, weight: float, instead: tuple[tuple[str, str], ...] = ()) -> Term:
    return Term(c.ref, c.commit.step, f"{c.commit.manifest_crc:08x}", weight, instead)


def choose(
    refs: Refs, *, last: int | None = None, steps: str | Sequence[int] | None = None
) -> tuple[list[Chosen], list[int]]:
    """The checkpoints that are named, in the order of `refs` and oldest first, and how many came of each ref."""
    out: list[Chosen] = []
    counts = []
    for ref in [refs] if isinstance(refs, (str, os.PathLike)) else refs:
        found = _chosen(os.fspath(ref), last, steps)
        counts.append(len(found))
        out += found
    if len({c.ref for c in out}) < len(out):
        raise UsageError("a checkpoint is named twice; name each once, and give it more weight")
    if not out:
        raise UsageError("no checkpoint is named")
    return out, counts


def _chosen(ref: str, last: int | None, steps: str | Sequence[int] | None) -> list[Chosen]:
    parsed = parse_ref(ref)
    if parsed.run != ref.rstrip("/"):
        backend, commit = resolve(ref)
        backend.close()
        return [Chosen(url_of(backend), commit)]
    backend = backend_for(parsed.run)
    try:
        url, found = url_of(backend), lineage(with_ledger(backend, list_run(backend)), damaged=True)[::-1]
        if not found:
            resolve(ref)  # says what there is instead
        if steps is not None:
            spans = _spans(steps)
            absent = [str(int(lo)) for lo, hi in spans if not any(lo <= s.step <= hi for s in found)]
            if absent:
                raise NotFoundError(f"{url}: no committed step {', '.join(absent)}; there are {_few(found)}")
            found = [s for s in found if any(lo <= s.step <= hi for lo, hi in spans)]
        if last is not None:
            if not 1 <= last <= len(found):
                raise NotFoundError(f"{url}: the last {last} steps are wanted, {len(found)} are there")
            found = found[-last:]
        # A damaged commit is never passed over: an average of fewer, or of others, is not what was asked for.
        return [Chosen(url, s.commit or read_commit(backend, s.folder)) for s in found]
    finally:
        backend.close()


def url_of(backend: Backend) -> str:
    """What names a run for good, wherever the process stands."""
    return f"memory://{backend.root}" if type(backend).__name__ == "MemoryBackend" else backend.root


def _few(steps: Sequence[Step]) -> str:
    shown = [str(s.step) for s in steps[-8:]]
    return ", ".join(shown) + (" (the last 8)" if len(steps) > 8 else "")


def _spans(steps: str | Sequence[int]) -> list[tuple[float, float]]:
    if not isinstance(steps, str):
        return [(n, n) for n in steps]
    out = []
    for part in steps.split(","):
        lo, colon, hi = part.strip().partition(":")
        if not all(x == "" or x.isdecimal() for x in (lo, hi)) or not (lo or hi):
            raise UsageError(f"steps {steps!r}: write them as 100,200,300:500, where 300:500 are all from 300 to 500")
        out.append((float(lo or 0), float(hi or math.inf) if colon else float(lo)))
    return out


def _weigh(given: Weights, commits: Sequence[Commit], counts: Sequence[int]) -> tuple[Floats, str]:
    """The weights, and how they are called."""
    n = len(commits)
    if callable(given):
        w = maths.explicit(given(commits))
        name = getattr(given, "__qualname__", type(given).__name__)
        return _as_many(w, n), f"{getattr(given, '__module__', '')}.{name}"
    if not isinstance(given, str):
        return _as_many(maths.explicit(given), n), "explicit"
    word, _, rest = given.strip().partition(":")
    steps = [float(c.step) for c in commits]
    if given == "uniform":
        return maths.uniform(n), given
    if given == "runs":
        return maths.over_runs(counts), given
    if word == "wsm":
        if rest not in maths.DECAYS:
            raise UsageError(f"no decay curve is called {rest!r}; there are {', '.join(maths.DECAYS)}")
        return maths.wsm(steps, maths.DECAYS[rest]), given
    if word == "ema":
        return maths.ema(steps, _number(given, rest)), given
    if word == "power":
        return maths.power(steps, _number(given, rest)), given
    if word == "edm":
        return maths.power_ema([s + 1 for s in steps], _number(given, rest)), given
    if word == "interpolate":
        if n < 2:
            raise UsageError("interpolation is between two checkpoints; name both")
        first, other = maths.interpolate(_number(given, rest)).tolist()
        return np.array([first, *[0.0] * (n - 2), other]), given
    if word == "mwa":
        return _mwa(given, rest, commits), given
    numbers = [_number(given, part) for part in given.split(",")]
    return _as_many(maths.explicit(numbers), n), "explicit"


def _mwa(text: str, rest: str, commits: Sequence[Commit]) -> Floats:
    metric, _, tail = rest.partition(",")
    penalty, _, form = tail.partition(",")
    if metric == "step":
        values = [float(c.step + 1) for c in commits]
    else:
        absent = [str(c.step) for c in commits if metric not in c.metrics]
        if absent:
            raise NotFoundError(f"metric {metric!r} was not recorded at step {', '.join(absent[:8])}; leave them out")
        values = [c.metrics[metric] for c in commits]
    return maths.mwa(
        values, _number(text, penalty), form or "power", higher_is_better=metric == "step" or higher_is_better(metric)
    )


def _number(text: str, part: str) -> float:
    try:
        return float(Fraction(part.strip()))
    except (ValueError, ZeroDivisionError):
        raise UsageError(
            f"weights {text!r}: {part!r} is no number; there are uniform, wsm:CURVE, ema:RATE, power:Q, edm:SIGMA, "
            "mwa:METRIC,PENALTY[,FORM], runs, interpolate:AMOUNT, delta:START, or numbers as 0.2,0.3,1/2"
        ) from None


def _as_many(w: Floats, n: int) -> Floats:
    if len(w) != n:
        raise UsageError(f"{len(w)} weights for {n} checkpoints")
    return w
