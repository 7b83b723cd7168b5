"""A recipe -> an ordinary checkpoint, by as many processes as there are: process k of K writes the packs of ranks k, k+K, ...

The bytes do not depend on K, nor on how the checkpoints that go into it were cut.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from ckpt.backends import backend_for
from ckpt.catalog import parse_ref
from ckpt.collective import Group, current_group
from ckpt.config import settings
from ckpt.errors import UsageError
from ckpt.format.manifest import ObjectEntry
from ckpt.merge.recipe import Recipe
from ckpt.merge.rules import Sources
from ckpt.merge.stream import Blend
from ckpt.offline.recut import plan_ranks
from ckpt.offline.rewrite import Feed, Outline, Sent, Wanted, rewrite
from ckpt.write import Source

__all__ = ["RECIPE", "MergeReport", "materialise", "recipe_in"]

RECIPE = "__ckpt__.recipe"
"""The object that says what a checkpoint was combined from: `Recipe.to_json`."""

Progress = Callable[[int], None]


@dataclass(frozen=True)
class MergeReport:
    """What was written. `averaged`, `copied`: leaves; `bytes`: of all packs; `bytes_read`: from storage, by this process."""

    ref: str
    method: str
    step: int
    generation: int
    terms: int
    ranks: int
    packs: int
    averaged: int
    copied: int
    bytes: int
    bytes_read: int
    seconds: float


def materialise(
    recipe: Recipe,
    dst: str | os.PathLike[str],
    *,
    group: Group | None = None,
    step: int | None = None,
    ranks: int | None = None,
    metrics: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> MergeReport:
    """Writes what a recipe comes to as a step of the run `dst`; collective over `group`, of which rank 0 knows the recipe.

    group     the process group that is up, MPI's world, or this process alone by default
    step      its number; that of the base by default. It goes into the newest generation of `dst`, 0 if it has none
    ranks     for how many ranks: a pack for each; as many as the base was written for by default
    metrics   of the result; those of the base are of other weights, and are not taken over
    progress  is told the bytes of tensors that this process writes

    Sums are float32 (float64 where that is stored), rounded once to the stored type. Memory: 208 MiB of windows, 4 MiB
    for each term, the writer's ring, and a line for each fragment. `ckpt.merge.rules` tells what becomes of each leaf; the
    recipe is the object `RECIPE` of the result.

    Raises, on every rank and with nothing published: UsageError, NotFoundError, MismatchError (leaves that do not fit, a
    result that is not finite), ConflictError (the step exists), IntegrityError or FormatError (a damaged checkpoint),
    StorageError, DeadlineError, PeerError.
    """
    began = time.monotonic()
    run = parse_ref(dst).run
    if run != os.fspath(dst).rstrip("/"):
        raise UsageError(f"{os.fspath(dst)!r} names a step; the result goes into a run (a folder or URL)")
    group = current_group() if group is None else group
    recipe = Recipe.from_json(group.round("recipe", b"", lambda _: recipe.to_json().encode()).decode())
    target = backend_for(run, direct=settings().direct)
    content = _Combined(recipe, ranks, dict(metrics or {}))
    try:
        done = rewrite(content, target, group, name="average", step=step, progress=progress)
    finally:
        content.close()
        target.close()
    return MergeReport(
        ref=f"{target.root}/{done.folder}",
        method=recipe.method,
        step=done.step,
        generation=done.generation,
        terms=len(recipe.terms),
        ranks=content.ranks,
        packs=done.packs,
        averaged=len(content.found),
        copied=len(content.blend.manifest.tensors) - len(content.found),
        bytes=done.bytes,
        bytes_read=content.blend.stats.read,
        seconds=time.monotonic() - began,
    )


def recipe_in(objects: Mapping[str, object]) -> Recipe | None:
    """The recipe of an opened checkpoint (`c.objects`) that was combined; None for any other."""
    said = objects.get(RECIPE)
    return None if said is None else Recipe.from_json(json.dumps(said))


class _Combined:
    """What a recipe comes to, for as many ranks as are asked for, or as its base has."""

    blend: Blend
    found: Sources

    def __init__(self, recipe: Recipe, ranks: int | None, metrics: Mapping[str, float]) -> None:
        self._recipe, self._ranks, self._metrics = recipe, ranks, metrics
        self.ranks = 0

    def outline(self) -> Outline:
        self.blend = Blend(self._recipe, once=True)
        self.found = self.blend.match()
        m = self.blend.manifest
        self.ranks = m.world if self._ranks is None else self._ranks
        objects = [*m.objects, ObjectEntry(RECIPE, "replicated", "json", self._recipe.to_json())]
        plan = plan_ranks(m, self.ranks)
        return Outline(m, plan, self.ranks, self.blend.commit.step, objects, self._metrics)

    @contextmanager
    def sources(self, wanted: Wanted, progress: Progress | None) -> Iterator[Sequence[Source]]:
        averaged = [(t, p.box) for t, p in wanted if t in self.found]
        copied = [(t, p.box) for t, p in wanted if t not in self.found]
        feeds = Feed(self.blend.copied(copied)), Feed(self.blend.averaged(averaged, self.found))
        given: list[Source] = []
        at = [0, 0]
        for t, piece in wanted:
            which = int(t in self.found)
            given.append(Sent(feeds[which], at[which], piece.nbytes, progress))
            at[which] += 1
        try:
            yield given
        finally:
            for feed in feeds:
                feed.close()

    def close(self) -> None:
        with suppress(AttributeError):  # it was never opened
            self.blend.close()
