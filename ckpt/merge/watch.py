"""A search beside training: it follows what a run commits, and publishes the best combination as `RUN@lcsc`.

In rounds: the newest checkpoints, searched within the budget, begun with the best of the round before. What is found is
an ordinary checkpoint of a run of its own in the folder `lcsc` of RUN: neither `latest` nor retention know of it. All
that a watch has to remember is in the journal of the round and in what is published: one that was killed goes on.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ckpt.backends import Backend, backend_for
from ckpt.catalog import COMBINED, Step, delete_step, list_run, parse_ref
from ckpt.checkpoint import Checkpoint
from ckpt.collective import Group, current_group
from ckpt.commit import read_commit
from ckpt.errors import CkptError, FormatError, NotFoundError, UsageError
from ckpt.merge.journal import Journal
from ckpt.merge.recipe import Recipe, choose, recipe_of, url_of
from ckpt.merge.search import MAX_CHECKPOINTS, SearchReport, Sought, conduct
from ckpt.merge.write import materialise, recipe_in

__all__ = ["Round", "watch"]

KEPT = 2  # published combinations: the newest, and the one that somebody may be reading


@dataclass(frozen=True)
class Round:
    """One round of a watch. `steps`: what was combined; `published`: the step that was written, "" if what is published
    already scores as well."""

    steps: tuple[int, ...]
    report: SearchReport
    published: str


def watch(
    run: str | os.PathLike[str],
    sought: Sought,
    *,
    last: int = 16,
    moments: str = "",
    only: Sequence[str] = (),
    latest: Sequence[str] = (),
    journal: str | os.PathLike[str] | None = None,
    scratch: str | None = None,
    idle: float | None = None,
    every: float = 10.0,
    group: Group | None = None,
    progress: Callable[[int], None] | None = None,
    told: Callable[[Round], None] = lambda _: None,
) -> int:
    """Searches among the `last` newest checkpoints of a run, again whenever there is a newer one; collective over `group`.

    journal  a file of the scores of the present round, of rank 0; a watch that begins with one goes on with its round
    idle     seconds without a new checkpoint after which it ends; None: never
    every    seconds between looks at the run
    told     is called with each round on rank 0
    the rest as for `ckpt.search`

    Publishes if the best combination scores better than what is published by the same objective; what was made of steps
    that a rollback left behind is withdrawn. A checkpoint that retention removes while it is read ends the round; the next
    one begins with what is left. Returns how many rounds came to their end. Raises what `ckpt.search` does, for checkpoints
    that are still there.
    """
    url = os.fspath(run).rstrip("/")
    if parse_ref(url).run != url:
        raise UsageError(f"{url!r} names one step; a watch follows a run (a folder or URL)")
    if not 2 <= last <= MAX_CHECKPOINTS:
        raise UsageError(f"a watch combines the newest 2 to {MAX_CHECKPOINTS} checkpoints, not {last}")
    group = current_group() if group is None else group
    job = _Watch(url, sought, last, moments, tuple(only), tuple(latest), journal, idle)
    rounds = 0
    while True:
        order = json.loads(group.round("watch", b"", lambda _: job.next()))
        if order["do"] == "stop":
            return rounds
        if order["do"] == "wait":
            time.sleep(every)
            continue
        whole = Recipe.from_json(json.dumps(order["recipe"]))
        try:
            report = conduct(
                whole, sought, group=group, begin=order["begin"], journal=journal, scratch=scratch, progress=progress
            )
            published = _publish(job, report, group)
        except NotFoundError:
            if not json.loads(group.round("what is left", b"", lambda _, w=whole: job.lost(w))):  # type: ignore[misc]
                raise
            continue
        rounds += 1
        job.done(whole, report)
        if group.rank == 0:
            told(Round(tuple(t.step for t in whole.terms), report, published))


def _publish(job: _Watch, report: SearchReport, group: Group) -> str:
    if not json.loads(group.round("publish", b"", lambda _: job.worth(report))):
        return ""
    written = materialise(report.recipe, job.place, group=group, metrics=report.best.metrics)
    group.round("published", b"", lambda _: job.tidy())
    return written.ref


class _Watch:
    """What rank 0 knows and decides."""

    def __init__(
        self,
        run: str,
        sought: Sought,
        last: int,
        moments: str,
        only: tuple[str, ...],
        latest: tuple[str, ...],
        journal: str | os.PathLike[str] | None,
        idle: float | None,
    ) -> None:
        self.run, self.place = run, f"{run}/{COMBINED}"
        backend = backend_for(run)
        self._name = url_of(backend)
        backend.close()
        self._sought, self._last, self._idle = sought, last, idle
        self._leaves = moments, only, latest
        self._journal = None if journal is None else Path(journal)
        self._searched = ""  # the newest checkpoint of the last round
        self._best: Recipe | None = None
        self._since = time.monotonic()
        self._first = True

    def next(self) -> bytes:
        """What to do: search, wait, or stop."""
        going_on, self._first = self._going_on() if self._first else None, False
        if going_on is not None:
            return self._search(*going_on)
        fresh = self._newest()
        if fresh is not None and len(fresh.terms) >= 2 and fresh.base.ref != self._searched:
            if self._journal is not None:
                self._journal.unlink(missing_ok=True)
            return self._search(fresh, self._begin(fresh))
        if self._idle is not None and time.monotonic() - self._since >= self._idle:
            return json.dumps({"do": "stop"}).encode()
        return json.dumps({"do": "wait"}).encode()

    def _search(self, whole: Recipe, begin: Sequence[Sequence[float]]) -> bytes:
        return json.dumps({"do": "search", "recipe": json.loads(whole.to_json()), "begin": begin}).encode()

    def _newest(self) -> Recipe | None:
        with suppress(NotFoundError):  # nothing is committed yet
            chosen = choose(self.run)[0][-self._last :]
            moments, only, latest = self._leaves
            n = len(chosen)
            return recipe_of(chosen, [1 / n] * n, "search", moments=moments, only=only, latest=latest)
        return None

    def _going_on(self) -> tuple[Recipe, list[list[float]]] | None:
        """The round that the journal tells of, if its checkpoints are still there. FormatError if it is not one of ours."""
        head = Journal.head(self._journal) if self._journal is not None else None
        if head is None:
            return None
        begin, recipe = head.pop("begin", []), head.pop("recipe", None)
        whole = Recipe.from_json(json.dumps(recipe))
        moments, only, latest = self._leaves
        ours = (whole.moments, whole.only, whole.latest) == (moments, only, latest)
        if head != self._sought.about() or not ours or {parse_ref(t.ref).run for t in whole.terms} != {self._name}:
            raise FormatError(
                f"{self._journal} is the journal of another search; name another file, or ask for the same search"
            )
        return (whole, begin) if _there(whole) else None

    def _begin(self, fresh: Recipe) -> list[list[float]]:
        """The best of the round before among the new checkpoints: what is gone counts nothing, the newest what is missing."""
        if self._best is None:
            return []
        known = {t.ref: t.weight for t in self._best.terms}
        row = [known.get(t.ref, 0.0) for t in fresh.terms[:-1]]
        return [[*row, 1 - math.fsum(row)]] if any(row) else []

    def done(self, whole: Recipe, report: SearchReport) -> None:
        self._searched, self._best, self._since = whole.base.ref, report.recipe, time.monotonic()

    def lost(self, whole: Recipe) -> bytes:
        """Whether checkpoints of a round are gone; then it is forgotten."""
        gone = not _there(whole)
        if gone and self._journal is not None:
            self._journal.unlink(missing_ok=True)
        return json.dumps(gone).encode()

    def worth(self, report: SearchReport) -> bytes:
        """Whether to publish. Withdraws what stands in the way: what is worse and has the same number, and what was made of
        steps that a rollback left behind."""
        score, base = report.best.score, report.recipe.base
        backend, published = backend_for(self.place), []
        try:
            past = self._past()
            for step in list_run(backend).committed:
                recipe = self._recipe_of(backend, step)
                if recipe is not None and _is_past(recipe.base.ref, past):
                    published.append((step, recipe))
                else:
                    delete_step(backend, step.folder)
            if not math.isfinite(score) or (published and self._rivals(*published[-1], score)):
                return b"false"
            for step, _ in published:
                if step.step >= base.step:
                    delete_step(backend, step.folder)
            return b"true"
        finally:
            backend.close()

    def _recipe_of(self, backend: Backend, step: Step) -> Recipe | None:
        """What a published combination was made of; None if it is damaged. UsageError if no search made it."""
        assert step.commit is not None
        try:
            recipe = recipe_in(Checkpoint(backend, step.commit).objects)
        except CkptError:
            return None
        if recipe is None:
            raise UsageError(
                f"{self.place}/{step.folder} was not made by a search; combinations of {self.run} go there"
            )
        return recipe

    def _rivals(self, step: Step, recipe: Recipe, score: float) -> bool:
        """Whether what is published scores as well, by the same objective."""
        assert step.commit is not None
        known = step.commit.metrics.get("search_score", math.inf)
        return (recipe.said or {}).get("objective") == self._sought.about()["objective"] and known <= score

    def _past(self) -> dict[int, float]:
        """Generation -> the last of its steps that leads to the present."""
        backend = backend_for(self.run)
        try:
            listing = list_run(backend, commits=False)
        finally:
            backend.close()
        parents = {g.generation: g.parent for g in listing.generations}
        at, bound = max([*parents, *(s.generation for s in listing.steps)], default=0), math.inf
        out: dict[int, float] = {}
        while at not in out:
            out[at] = bound
            if at in parents:
                parent = parents[at] or ""
                if parse_ref(parent).which == parent:
                    bound, at = _numbers(parent)
            elif at > 0:  # its file is gone: all of the generation before counts as its past
                bound, at = math.inf, at - 1
        return out

    def tidy(self) -> bytes:
        """Removes what was published before the last ones, and what killed watches left."""
        backend = backend_for(self.place)
        try:
            listing = list_run(backend)
            keep = {s.folder for s in listing.committed[-KEPT:]}
            for step in listing.steps:
                if step.folder not in keep:
                    delete_step(backend, step.folder)
        finally:
            backend.close()
        return b""


def _numbers(ref: str) -> tuple[int, int]:
    """Step and generation of a ref of one step."""
    step, generation = parse_ref(ref).which.removeprefix("step-").split(".g")
    return int(step), int(generation)


def _is_past(ref: str, past: dict[int, float]) -> bool:
    step, generation = _numbers(ref)
    return step <= past.get(generation, -1)


def _there(whole: Recipe) -> bool:
    """Whether all checkpoints of a recipe are still what they were."""
    try:
        for term in whole.terms:
            parsed = parse_ref(term.ref)
            backend = backend_for(parsed.run)
            try:
                if f"{read_commit(backend, parsed.which).manifest_crc:08x}" != term.manifest:
                    return False
            finally:
                backend.close()
    except NotFoundError:
        return False
    return True
