"""The part of a report about averages: what was recorded at steps, what running averages remember, and what combinations
were made of. Read from commits and manifests, and a sample of tensors; nothing needs an event, or torch."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckpt.backends import Backend, backend_for
from ckpt.catalog import COMBINED, Listing, Step, lineage, list_run
from ckpt.checkpoint import Checkpoint
from ckpt.errors import CkptError
from ckpt.format.dtypes import dtype
from ckpt.format.fragment import Box
from ckpt.merge.journal import Journal
from ckpt.merge.recipe import Recipe
from ckpt.merge.write import recipe_in
from ckpt.offline.values import numbers

__all__ = ["Combination", "Fold", "Ledger", "read_ledger"]

_LOOKED_INTO = 48  # steps whose manifests are read, spread evenly: the report is bounded, the run is not
_COMBINATIONS = 12
_LEAVES, _SAMPLE = 8, 1 << 16  # tensors that a drift is measured on, and elements of each
_NOTES, _KEY = "__ckpt__.averages", "averages"


@dataclass(frozen=True)
class Fold:
    """How a running average stood at a step. `drift`: |A - theta| / |theta| over a sample, None if it cannot be told."""

    step: int
    folds: int
    refused: int
    drift: float | None


@dataclass(frozen=True)
class Combination:
    """A checkpoint that was made of others. `scores`: (what, by the objective, held out) as a search told of them."""

    ref: str
    method: str
    weights: tuple[tuple[int, float], ...]
    metrics: Mapping[str, float]
    scores: tuple[tuple[str, float | None, float | None], ...]


@dataclass(frozen=True)
class Ledger:
    """Metric -> (step, value), oldest first, of the steps that lead to the present; average -> how it stood at steps, and
    its rule; the newest combinations in the run and those that a search beside it published; journal -> scores, in order."""

    run: str
    metrics: Mapping[str, Sequence[tuple[int, float]]]
    folds: Mapping[str, Sequence[Fold]]
    rules: Mapping[str, str]
    combinations: Sequence[Combination]
    searches: Mapping[str, Sequence[float]]

    def __bool__(self) -> bool:
        return bool(self.metrics or self.folds or self.combinations or self.searches)


def read_ledger(backend: Backend, run: str, listing: Listing, journals: Sequence[str] = ()) -> Ledger:
    """What a run and its combinations tell. `run`: its path or URL; `listing`: with the ledger's metrics; `journals`: files
    of searches. What cannot be read of the run is left out; NotFoundError or FormatError for a journal."""
    searches = {path: Journal.scores_in(path) for path in journals}
    steps = lineage(listing)[::-1]
    metrics: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
    for s in steps:
        for name, value in s.commit.metrics.items() if s.commit is not None else ():
            if math.isfinite(value):
                metrics[name].append((s.step, value))
    folds: defaultdict[str, list[Fold]] = defaultdict(list)
    rules: dict[str, str] = {}
    combinations: list[Combination] = []
    few = {round(i * (len(steps) - 1) / (_LOOKED_INTO - 1)) for i in range(_LOOKED_INTO)} if steps else set()
    for k in sorted(few):
        with suppress(CkptError):
            _look_into(backend, steps[k], folds, rules, combinations)
    with suppress(CkptError):
        beside = backend_for(f"{run.rstrip('/')}/{COMBINED}")
        try:
            for s in lineage(list_run(beside))[::-1][-_COMBINATIONS:]:
                with suppress(CkptError):
                    _look_into(beside, s, defaultdict(list), {}, combinations)
        finally:
            beside.close()
    return Ledger(listing.run, metrics, folds, rules, combinations[-_COMBINATIONS:], searches)


def _look_into(
    backend: Backend,
    step: Step,
    folds: defaultdict[str, list[Fold]],
    rules: dict[str, str],
    combinations: list[Combination],
) -> None:
    assert step.commit is not None
    c = Checkpoint(backend, step.commit)
    recipe = recipe_in(c.objects)
    if recipe is not None:
        combinations.append(_combination(f"{backend.root}/{step.folder}", recipe, step.commit.metrics))
    for name, known in _progress(c).items():
        folds[name].append(Fold(step.step, known[0], known[1], _drift(c, name)))
        rules[name] = known[2]


def _progress(c: Checkpoint) -> dict[str, tuple[int, int, str]]:
    """Average -> snapshots that count in it, that were refused, and its rule in words."""
    found = c.objects.get(_NOTES, {})
    with suppress(ValueError, TypeError, KeyError, AttributeError):
        told = json.loads(found) if isinstance(found, str) else found
        return {
            str(name): (int(p["folds"]), int(p["refused"]), _rule(p["spec"]))
            for name, p in told.items()
            if 0 <= int(p["folds"]) < 1 << 53 and 0 <= int(p["refused"]) < 1 << 53
        }
    return {}


def _rule(spec: Mapping[str, Any]) -> str:
    rest = ", ".join(f"{k} {v}" for k, v in sorted(spec.items()) if k != "kind" and v is not None)
    return f"{spec.get('kind', '')}: {rest}" if rest else str(spec.get("kind", ""))


def _drift(c: Checkpoint, name: str) -> float | None:
    """|A - theta| / |theta| over the beginnings of a few large leaves."""
    m = c.manifest
    prefix = f"{_KEY}.{name}."
    pairs = [(t.key, t.key[len(prefix) :]) for t in m.tensors if t.key.startswith(prefix)]
    pairs = [(a, b) for a, b in pairs if b in m.by_key]
    pairs.sort(key=lambda pair: (-m.tensors[m.by_key[pair[1]]].nbytes, pair[1]))
    above = below = 0.0
    for pair in pairs[:_LEAVES]:
        average, theta = (_beginning(c, key) for key in pair)
        above += float(np.square(average - theta).sum())
        below += float(np.square(theta).sum())
    return math.sqrt(above / below) if 0 < below < math.inf and above < math.inf else None


def _beginning(c: Checkpoint, key: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Up to `_SAMPLE` elements of a tensor, by rows."""
    shape = c.manifest.tensors[c.manifest.by_key[key]].shape
    extent = list(shape)
    for d in range(len(shape)):
        rest = math.prod(extent[d + 1 :])
        extent[d] = min(extent[d], max(1, _SAMPLE // max(1, rest)))
    raw = c.tensors[key].raw(Box((0,) * len(shape), tuple(extent)))
    kind = c.manifest.tensors[c.manifest.by_key[key]].dtype
    values = numbers(raw.reshape(-1).view(np.uint8).reshape(-1, dtype(kind).itemsize), kind)
    return np.abs(values).astype(np.float64) if np.iscomplexobj(values) else values.astype(np.float64)


def _combination(ref: str, recipe: Recipe, metrics: Mapping[str, float]) -> Combination:
    weights = tuple((t.step, t.weight) for t in recipe.terms)
    scores = []
    with suppress(ValueError, TypeError, AttributeError):
        for name, score, held in (recipe.said or {}).get("trials", []):
            scores.append((str(name), _finite(score), _finite(held)))
    return Combination(ref, recipe.method, weights, dict(metrics), tuple(scores[:32]))


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(float(value)) else None
