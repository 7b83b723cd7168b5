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
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ckpt.collective import Group, current_group
from ckpt.errors import NotFoundError, UsageError
from ckpt.merge.evolve import STRATEGIES, ladder_rows, strategy
from ckpt.merge.journal import Journal, Row
from ckpt.merge.pool import Candidate, Pool
from ckpt.merge.recipe import Recipe, Refs, choose, recipe_of
from ckpt.merge.weights import Floats

__all__ = ["METHODS", "Objective", "SearchReport", "Sought", "Trial", "conduct", "objective_of", "prepare", "search"]

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

    @property
    def metrics(self) -> dict[str, float]:
        """The scores, as metrics of a checkpoint."""
        told = {"search_score": self.score, "held_out_score": self.held_out}
        return {name: value for name, value in told.items() if value is not None and math.isfinite(value)}


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


@dataclass(frozen=True)
class Sought:
    """What is searched for, and how far: see `search`. Raises UsageError."""

    objective: Objective
    held_out: Objective | None = None
    method: str = "lcsc"
    budget: int = 200
    population: int = 16
    clip: float = 4.0
    seed: int = 0
    together: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS or self.budget < 1 or self.population < 4 or not self.clip > 0:
            raise UsageError(
                f"search: method {', '.join(METHODS)}; budget above 0, population of 4 or more, clip above 0"
            )

    def about(self) -> dict[str, Any]:
        """What makes scores and proposals what they are; as JSON has it."""
        name = f"{getattr(self.objective, '__module__', '')}.{getattr(self.objective, '__qualname__', '')}"
        settings = {"method": self.method, "seed": self.seed, "population": self.population, "clip": self.clip}
        return {"objective": name, **settings}


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
    together: bool = False,
    journal: str | os.PathLike[str] | None = None,
    scratch: str | None = None,
    group: Group | None = None,
    progress: Callable[[int], None] | None = None,
) -> SearchReport:
    """Searches for the affine combination of checkpoints that an objective scores lowest; collective over `group`.

    objective   gets a `Candidate`, a state dict that is made as it is looked into, and returns a number; lower is better,
                nan counts as worst. It should be deterministic
    method      "ladder" (only what is cheap), "lcsc", or "cma" (needs the package of that name)
    budget      evaluations of the objective, at most; what is scored once is not scored again
    held_out    a second objective, on other data: what the search has learnt by heart shows in the difference. It is asked
                about the trials of note only, and never chooses
    clip        no coefficient but the last step's goes beyond -clip and clip
    together    all ranks score every combination together, and the score of rank 0 counts: for objectives that are
                themselves distributed. Otherwise each rank scores its part of a generation
    journal     a file of scores, of rank 0: made if it is not there, else gone on with
    scratch     a folder for as many combinations as the population has; for each rank its part of them
    group       the process group that is up, MPI's world, or this process alone by default
    refs, last, steps, moments, only, latest: as for `ckpt.average`; at most 64 checkpoints

    Each rank reads each checkpoint at most once a generation. What is found does not depend on the number of ranks. Raises
    UsageError, NotFoundError, MismatchError (leaves that do not fit), FormatError (a journal of another search),
    IntegrityError, StorageError, and what the objective raises; of several ranks, on all of them.
    """
    group = current_group() if group is None else group
    sought = Sought(objective, held_out, method, budget, population, clip, seed, together)
    whole = prepare(refs, group, last=last, steps=steps, moments=moments, only=only, latest=latest)
    return conduct(whole, sought, group=group, journal=journal, scratch=scratch, progress=progress)


def prepare(
    refs: Refs,
    group: Group,
    *,
    last: int | None,
    steps: str | Sequence[int] | None = None,
    moments: str,
    only: Sequence[str],
    latest: Sequence[str],
) -> Recipe:
    """The mean of what is to be searched among, as rank 0 finds it; collective. The rest as for `ckpt.average`."""

    def made(_: object) -> bytes:
        chosen, _counts = choose(refs, last=last, steps=steps)
        n = len(chosen)
        return recipe_of(chosen, [1 / n] * n, "search", moments=moments, only=only, latest=latest).to_json().encode()

    return Recipe.from_json(group.round("search", b"", made).decode())


def conduct(
    whole: Recipe,
    sought: Sought,
    *,
    group: Group,
    begin: Sequence[Sequence[float]] = (),
    journal: str | os.PathLike[str] | None = None,
    scratch: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> SearchReport:
    """`search` over the terms of a recipe, all of which count something. `begin`: weights (terms,) to try after the ladder.
    The arguments are the same on all ranks."""
    n = len(whole.terms)
    if not 2 <= n <= MAX_CHECKPOINTS:
        raise UsageError(f"a search takes 2 to {MAX_CHECKPOINTS} checkpoints, not {n}; choose with last or steps")
    if whole.moments == "averaged":
        raise UsageError("moments cannot be averaged with the negative weights that a search may find")
    about = {**sought.about(), "recipe": json.loads(whole.to_json()), **({"begin": list(begin)} if begin else {})}
    kept = Journal(None, about)
    ready: bytes | Exception = b""
    pool: Pool | None = None

    def opened(_: object) -> bytes:
        nonlocal kept
        kept = Journal(journal, about)
        return kept.told()

    try:
        try:
            pool = Pool(whole, scratch)
        except Exception as e:
            ready = e
        kept.read(group.round("checkpoints of a search", ready, opened).decode().splitlines())
        assert pool is not None
        scores = _Scores(pool, sought, kept, group, progress)
        times = [float(t.step) for t in whole.terms]
        if any(a >= b for a, b in itertools.pairwise(times)):
            times = [float(i) for i in range(n)]  # of several runs
        best = _searched(scores, sought, times, begin)
        trials = _trials(best, scores)
        counts = len(scores.known), pool.passes, pool.bytes_read
    finally:
        if pool is not None:
            pool.close()
    won = trials[-1]
    said = {
        **sought.about(),
        "evaluations": counts[0],
        "trials": [[t.name, _told(t.score), _told(t.held_out)] for t in trials],
    }
    terms = [replace(t, weight=w) for t, w in zip(whole.terms, won.weights, strict=True)]
    used = tuple(t for t in terms[:-1] if t.weight)
    recipe = replace(whole, method=f"{sought.method}:{won.name}", terms=(*used, terms[-1]), said=said)
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


def _searched(scores: _Scores, sought: Sought, times: Sequence[float], begin: Sequence[Sequence[float]]) -> _Best:
    """All of the search; ends when the budget does, or when nothing new is proposed any more."""
    n, method, population = len(times), sought.method, sought.population
    best: _Best = {}
    with suppress(_Spent):
        ladder = list(ladder_rows(n, times))
        singles: list[tuple[float, int]] = []
        for at in range(0, len(ladder), population):
            some = ladder[at : at + population]
            for (name, row), score in zip(some, scores([row for _, row in some]), strict=True):
                kind = name.partition(":")[0]
                _keep(best, kind if best else "last", score, row)  # the newest comes first
                _keep(best, kind, score, row)
                if kind == "single":
                    singles.append((score, int(np.argmax(row))))
        for row, score in _greedy(scores, sorted(singles, key=lambda s: _order(s[0])), n):
            _keep(best, "greedy", score, row)
        given = [np.array(row, dtype=np.float64) for row in begin]
        for row, score in zip(given, scores(given), strict=True):
            _keep(best, "before", score, row)
        if method == "ladder":
            return best
        seeds = sorted(best.values(), key=lambda found: _order(found[0]))
        rows = [row[:-1] for _, row in seeds]
        plan = strategy(method, n - 1, rows, population=population, clip=sought.clip, seed=sought.seed)
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


def _trials(best: _Best, scores: _Scores) -> list[Trial]:
    """What is worth telling: the last step, the best of each kind, the winner at the end."""
    winner = min(best, key=lambda kind: _order(best[kind][0]))
    kinds = [*(kind for kind in best if kind != winner), winner]
    held = scores.held_out([best[kind][1] for kind in kinds])
    return [Trial(kind, best[kind][0], h, tuple(best[kind][1].tolist())) for kind, h in zip(kinds, held, strict=True)]


class _Scores:
    """Rows of weights -> scores: from the journal where they are known, else from the objective, within the budget.

    Of several ranks each scores its part of the rows; in turns, after each of which all ranks know its scores.
    """

    def __init__(
        self,
        pool: Pool,
        sought: Sought,
        journal: Journal,
        group: Group,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._pool, self._sought, self._journal, self._group = pool, sought, journal, group
        self._progress = progress
        self._turns = 0
        self.known: dict[Row, float] = {}

    def __call__(self, rows: Sequence[Floats]) -> Iterator[float]:
        """The score of each, one pass over the checkpoints for all. Raises _Spent at the first one too many."""
        budget = self._sought.budget
        keys = [tuple(row.tolist()) for row in rows]
        new = [k for k in dict.fromkeys(keys) if k not in self.known][: budget - len(self.known)]
        found = self._evaluated(self._sought.objective, [k for k in new if k not in self._journal.scores])
        for key in keys:
            if key not in self.known:
                if len(self.known) >= budget:
                    raise _Spent
                while key not in self._journal.scores:
                    self._journal.add(*next(found))
                self.known[key] = self._journal.scores[key]
                if self._progress is not None:
                    self._progress(1)
            yield self.known[key]

    def held_out(self, rows: Sequence[Floats]) -> list[float | None]:
        """What the other objective says about each, None without one."""
        if self._sought.held_out is None:
            return [None] * len(rows)
        return [score for _, score in self._evaluated(self._sought.held_out, [tuple(r.tolist()) for r in rows])]

    def _evaluated(self, objective: Objective, rows: Sequence[Row]) -> Iterator[tuple[Row, float]]:
        """(row, score) in order."""
        group = self._group
        rank, world = (0, 1) if self._sought.together else (group.rank, group.world)
        made: list[Candidate] | None = None
        for at in range(0, len(rows), world):
            letter: bytes | Exception = b""
            try:
                made = self._pool.combine([np.array(r) for r in rows[rank::world]]) if made is None else made
                if at + rank < len(rows):
                    letter = float(objective(made[at // world])).hex().encode()
            except Exception as e:
                letter = e
            self._turns += 1
            told = group.round(f"scores {self._turns} of a search", letter, lambda letters: b" ".join(letters))
            yield from zip(rows[at : at + world], map(float.fromhex, told.decode().split()), strict=False)


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
