"""The search for the combination of checkpoints that scores best: a cheap ladder, a greedy soup, then a strategy.

    ladder     each checkpoint alone, means of the last k, WSM's curves, EMAs
    greedy     checkpoints by their own score; each joins the mean if that gets better (model soups, arXiv 2203.05482)
    strategy   LCSC-style evolution or CMA-ES over affine combinations, begun with the best of the above

Everything follows from the seed and the scores, in order. So the journal holds the scores, each from the moment it is
known: a search that was cut short goes on from there, and comes to the same end bit by bit.
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ckpt.errors import FormatError, NotFoundError, UsageError
from ckpt.merge.evolve import STRATEGIES, ladder_rows, strategy
from ckpt.merge.pool import Candidate, Pool
from ckpt.merge.recipe import Recipe, Refs, choose, recipe_of
from ckpt.merge.weights import Floats

__all__ = ["METHODS", "Objective", "SearchReport", "Trial", "objective_of", "search"]

METHODS = ("ladder", *STRATEGIES)
MAX_CHECKPOINTS = 64
_IDLE = 10  # generations in which nothing new is proposed

Objective = Callable[[Candidate], float]


@dataclass(frozen=True)
class Trial:
    """A combination of note. `score`: by the objective that was searched with; `held_out`: by the other, None without one."""

    name: str
    score: float
    held_out: float | None
    weights: tuple[float, ...]


@dataclass(frozen=True)
class SearchReport:
    """What a search found. `best` is also the last of `trials`; `recipe` makes it. `evaluations`: of the objective, in this
    run of the search and those that its journal tells of; `passes`: over the checkpoints, `bytes_read`: both in this one."""

    recipe: Recipe
    best: Trial
    trials: tuple[Trial, ...]
    evaluations: int
    passes: int
    bytes_read: int


def search(
    refs: Refs,
    objective: Objective,
    *,
    method: str = "lcsc",
    budget: int = 200,
    held_out: Objective | None = None,
    last: int | None = None,
    steps: str | Sequence[int] | None = None,
    moments: str = "",
    only: Sequence[str] = (),
    latest: Sequence[str] = (),
    population: int = 16,
    clip: float = 4.0,
    seed: int = 0,
    journal: str | os.PathLike[str] | None = None,
    scratch: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> SearchReport:
    """Searches for the affine combination of checkpoints that an objective scores lowest.

    objective   gets a `Candidate`, a state dict that is made as it is looked into, and returns a number; lower is better,
                nan counts as worst. It should be deterministic
    method      "ladder" (only what is cheap), "lcsc", or "cma" (needs the package of that name)
    budget      evaluations of the objective, at most; what is scored once is not scored again
    held_out    a second objective, on other data: what the search has learnt by heart shows in the difference. It is asked
                about the trials of note only, and never chooses
    clip        no coefficient but the last step's goes beyond -clip and clip
    journal     a file of scores: made if it is not there, else gone on with
    scratch     a folder for as many combinations as the population has
    refs, last, steps, moments, only, latest: as for `ckpt.average`; at most 64 checkpoints

    Each checkpoint is read at most once a generation. Raises UsageError, NotFoundError, MismatchError (leaves that do not
    fit), FormatError (a journal of another search), IntegrityError, StorageError, and what the objective raises.
    """
    chosen, _ = choose(refs, last=last, steps=steps)
    n = len(chosen)
    if method not in METHODS or budget < 1 or population < 4 or not clip > 0:
        raise UsageError(f"search: method {', '.join(METHODS)}; budget above 0, population of 4 or more, clip above 0")
    if not 2 <= n <= MAX_CHECKPOINTS:
        raise UsageError(f"a search takes 2 to {MAX_CHECKPOINTS} checkpoints, not {n}; choose with last or steps")
    if moments == "averaged":
        raise UsageError("moments cannot be averaged with the negative weights that a search may find")
    whole = recipe_of(chosen, [1 / n] * n, "search", moments=moments, only=only, latest=latest)
    about = {
        "objective": f"{getattr(objective, '__module__', '')}.{getattr(objective, '__qualname__', '')}",
        "method": method,
        "seed": seed,
        "population": population,
        "clip": clip,
        "recipe": json.loads(whole.to_json()),
    }
    with Pool(whole, scratch) as pool:
        scores = _Scores(pool, objective, _Journal(journal, about), budget, progress)
        times = [float(c.commit.step) for c in chosen]
        if any(a >= b for a, b in itertools.pairwise(times)):
            times = [float(i) for i in range(n)]  # of several runs
        best = _searched(scores, method, times, population, clip, seed)
        trials = _trials(best, pool, held_out)
        counts = len(scores.known), pool.passes, pool.bytes_read
    won = trials[-1]
    said = {
        **{k: v for k, v in about.items() if k != "recipe"},
        "evaluations": counts[0],
        "trials": [[t.name, _told(t.score), _told(t.held_out)] for t in trials],
    }
    name = f"{method}:{won.name}"
    recipe = recipe_of(chosen, won.weights, name, moments=moments, only=only, latest=latest, said=said)
    return SearchReport(recipe, won, tuple(trials), *counts)


_Best = dict[str, tuple[float, Floats]]
"""The best combination of each kind, in order of the kinds' first appearance."""


def _keep(best: _Best, kind: str, score: float, row: Floats) -> None:
    if kind not in best or _order(score) < _order(best[kind][0]):
        best[kind] = score, row


def _told(score: float | None) -> float | None:
    """As JSON has it."""
    return score if score is not None and math.isfinite(score) else None


def _order(score: float) -> float:
    return math.inf if math.isnan(score) else score


class _Spent(Exception):
    """The budget is used up."""


def _searched(scores: _Scores, method: str, times: Sequence[float], population: int, clip: float, seed: int) -> _Best:
    """All of the search; ends when the budget does, or when nothing new is proposed any more."""
    n = len(times)
    best: _Best = {}
    with suppress(_Spent):
        rows = list(ladder_rows(n, times))
        singles: list[tuple[float, int]] = []
        for at in range(0, len(rows), population):
            some = rows[at : at + population]
            for (name, row), score in zip(some, scores([row for _, row in some]), strict=True):
                kind = name.partition(":")[0]
                _keep(best, kind if best else "last", score, row)  # the newest comes first
                _keep(best, kind, score, row)
                if kind == "single":
                    singles.append((score, int(np.argmax(row))))
        for row, score in _greedy(scores, sorted(singles, key=lambda s: _order(s[0])), n):
            _keep(best, "greedy", score, row)
        if method == "ladder":
            return best
        seeds = sorted(best.values(), key=lambda found: _order(found[0]))
        plan = strategy(method, n - 1, [row[:-1] for _, row in seeds], population=population, clip=clip, seed=seed)
        idle = 0
        while idle < _IDLE:
            before = len(scores.known)
            free = plan.ask()
            asked = [np.append(f, 1 - math.fsum(f.tolist())) for f in free]
            got = []
            for row, score in zip(asked, scores(asked), strict=True):
                _keep(best, method, score, row)
                got.append(score)
            plan.tell(free, got)
            idle = idle + 1 if len(scores.known) == before else 0
    return best


def _greedy(scores: _Scores, singles: Sequence[tuple[float, int]], n: int) -> Iterator[tuple[Floats, float]]:
    """Model soups' greedy recipe: (weights, score) each time the mean has become better."""
    in_it: list[int] = []
    top = math.inf
    for _, i in singles:
        row = np.zeros(n)
        row[[*in_it, i]] = 1 / (len(in_it) + 1)
        score = next(scores([row]))
        if _order(score) < top:
            in_it, top = [*in_it, i], score
            yield row, score


def _trials(best: _Best, pool: Pool, held_out: Objective | None) -> list[Trial]:
    """What is worth telling: the last step, the best of each kind, the winner at the end."""
    winner = min(best, key=lambda kind: _order(best[kind][0]))
    kinds = [*(kind for kind in best if kind != winner), winner]
    held: list[float | None] = [None] * len(kinds)
    if held_out is not None:
        held = [float(held_out(c)) for c in pool.combine([best[kind][1] for kind in kinds])]
    return [Trial(kind, best[kind][0], h, tuple(best[kind][1].tolist())) for kind, h in zip(kinds, held, strict=True)]


class _Scores:
    """Rows of weights -> scores: from the journal where they are known, else from the objective, within the budget."""

    def __init__(
        self, pool: Pool, objective: Objective, journal: _Journal, budget: int, progress: Callable[[int], None] | None
    ) -> None:
        self._pool, self._objective, self._journal, self._budget = pool, objective, journal, budget
        self._progress = progress
        self.known: dict[tuple[float, ...], float] = {}

    def __call__(self, rows: Sequence[Floats]) -> Iterator[float]:
        """The score of each, one pass over the checkpoints for all. Raises _Spent at the first one too many."""
        keys = [tuple(row.tolist()) for row in rows]
        new = [k for k in dict.fromkeys(keys) if k not in self.known][: self._budget - len(self.known)]
        unpaid = [k for k in new if k not in self._journal.scores]
        made = dict(zip(unpaid, self._pool.combine([np.array(k) for k in unpaid]) if unpaid else (), strict=True))
        for key in keys:
            if key not in self.known:
                if len(self.known) >= self._budget:
                    raise _Spent
                if key in made:
                    self._journal.add(key, float(self._objective(made[key])))
                self.known[key] = self._journal.scores[key]
                if self._progress is not None:
                    self._progress(1)
            yield self.known[key]


class _Journal:
    """Scores that were paid for, as JSON lines: a head that says of which search, then a line for each row of weights."""

    def __init__(self, path: str | os.PathLike[str] | None, about: Mapping[str, Any]) -> None:
        self.scores: dict[tuple[float, ...], float] = {}
        self._path = None if path is None else Path(path)
        if self._path is None:
            return
        head = json.dumps({"ckpt-search": 1, **about}, sort_keys=True)
        if not self._path.exists():
            self._append(head)
            return
        text = self._path.read_text()
        lines = text.splitlines()
        if not lines or lines[0] != head:
            raise FormatError(
                f"{self._path} is the journal of another search; name another file, or ask for the same search"
            )
        self._read(lines[1:])
        if not text.endswith("\n"):  # cut short within a line, which then does not count
            self._path.write_text("".join(f"{line}\n" for line in lines[:-1]))

    def _read(self, lines: Iterable[str]) -> None:
        for line in lines:
            try:
                row, score = json.loads(line)
                self.scores[tuple(float.fromhex(w) for w in row)] = float.fromhex(score)
            except (ValueError, TypeError):
                return  # the line that was being written; what follows cannot be

    def add(self, row: tuple[float, ...], score: float) -> None:
        self.scores[row] = score
        self._append(json.dumps([[w.hex() for w in row], score.hex()]))

    def _append(self, line: str) -> None:
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())


def objective_of(text: str) -> Objective:
    """The function that "package.module:function" names; modules of the current folder are found. Raises UsageError,
    NotFoundError."""
    module, _, name = text.partition(":")
    if not module or not name:
        raise UsageError(f"objective {text!r}: write it as package.module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as e:
        raise NotFoundError(f"objective {text!r}: {e}") from e
    if not callable(found):
        raise UsageError(f"objective {text!r} is a {type(found).__name__}, not a function")
    out: Objective = found
    return out
