"""A recipe -> an ordinary checkpoint, by as many processes as there are: process k of K writes the packs of ranks k, k+K, ...

The bytes do not depend on K, nor on how the checkpoints that go into it were cut.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from ckpt.backends import Backend, backend_for
from ckpt.catalog import drop_attempt, generations_in_use, list_run, parse_ref
from ckpt.collective import Group, current_group, decode, encode
from ckpt.commit import claim_attempt, commit_step, step_folder
from ckpt.config import settings
from ckpt.errors import CkptError, DeadlineError, UsageError
from ckpt.format.codec import Codec
from ckpt.format.fragment import Box
from ckpt.format.manifest import ObjectEntry
from ckpt.format.pack import Piece, layout_pack
from ckpt.merge.recipe import Recipe
from ckpt.merge.rules import Sources
from ckpt.merge.stream import Blend, Feed, Sent
from ckpt.offline.recut import plan_ranks
from ckpt.plan import Plan
from ckpt.write import PackReport, Ring, Source, decode_report, encode_report, write_pack

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
    job = _Job(recipe, backend_for(run, direct=settings().direct), dict(metrics or {}))
    try:
        ready: bytes | Exception = b""
        try:
            job.prepare(ranks)
        except Exception as e:
            ready = e
        told, _ = decode(group.round("average", ready, lambda _: job.claim(step)))
        job.folder, job.attempt = told["folder"], told["attempt"]
        for turn in range(-(-job.ranks // group.world)):
            rank = turn * group.world + group.rank
            report: bytes | Exception
            try:
                report = encode_report(job.write(rank, progress) if rank < job.ranks else None)
            except Exception as e:
                report = e
            # A round for each turn: processes stay within one pack of one another, and a failure stops them all.
            group.round(f"packs {turn} of {job.folder}", report, job.collect)
        answer, _ = decode(group.round(f"commit {job.folder}", b"", lambda _: job.commit()))
    except BaseException as e:
        job.clean_up(group.rank, e)
        raise
    finally:
        job.close()
    return MergeReport(
        ref=f"{job.target.root}/{job.folder}",
        method=recipe.method,
        step=told["step"],
        generation=told["generation"],
        terms=len(recipe.terms),
        ranks=job.ranks,
        packs=answer["packs"],
        averaged=len(job.sources),
        copied=len(job.plan.tensors) - len(job.sources),
        bytes=answer["bytes"],
        bytes_read=job.blend.stats.read,
        seconds=time.monotonic() - began,
    )


def recipe_in(objects: Mapping[str, object]) -> Recipe | None:
    """The recipe of an opened checkpoint (`c.objects`) that was combined; None for any other."""
    said = objects.get(RECIPE)
    return None if said is None else Recipe.from_json(json.dumps(said))


class _Job:
    """One process's part of the work; on the leader, the decisions too."""

    blend: Blend
    sources: Sources
    plan: Plan
    codecs: list[Codec | None]

    def __init__(self, recipe: Recipe, target: Backend, metrics: dict[str, float]) -> None:
        self.recipe, self.target, self.metrics = recipe, target, metrics
        self.folder = self.attempt = self.writer = ""
        self.step = self.generation = self.ranks = 0
        self.publishing = False
        self.ring: Ring | None = None
        self.reports: list[PackReport | None] = []

    def prepare(self, ranks: int | None) -> None:
        """Opens the checkpoints and plans. Raises for arguments and for checkpoints that do not go together."""
        self.blend = Blend(self.recipe)
        self.sources = self.blend.match()
        m = self.blend.manifest
        self.ranks = m.world if ranks is None else ranks
        self.plan = plan_ranks(m, self.ranks)
        for t in range(len(m.tensors)):
            m.check_coverage(t)
        code = [0 if m.codec is None or a == b else int(m.codec[a]) for a, b in zip(m.start, m.start[1:], strict=False)]
        self.codecs = [m.codecs[c - 1] if c else None for c in code]

    def claim(self, step: int | None) -> bytes:
        """The leader's: names the step folder and claims an attempt."""
        self.step = self.blend.commit.step if step is None else step
        self.generation = max(generations_in_use(list_run(self.target, commits=False)), default=0)
        self.folder = step_folder(self.step, self.generation)
        self.attempt, self.writer = claim_attempt(self.target, self.folder, self.ranks)
        return encode({name: getattr(self, name) for name in ("step", "generation", "folder", "attempt")})

    def write(self, rank: int, progress: Progress | None) -> PackReport | None:
        """Writes one rank's pack; None if the rank holds nothing."""
        pieces, boxes = self._held(rank)
        if not pieces:
            return None
        layout = layout_pack(pieces)
        averaged: list[tuple[int, Box]] = []
        copied: list[tuple[int, Box]] = []
        sent: list[tuple[bool, int]] = []  # in file order, which is the order in which `write_pack` asks
        for i in layout.order.tolist():
            mine = averaged if boxes[i][0] in self.sources else copied
            sent.append((mine is averaged, len(mine)))
            mine.append(boxes[i])
        feeds = Feed(self.blend.copied(copied)), Feed(self.blend.averaged(averaged, self.sources))
        given: list[Source] = [None] * len(pieces)  # type: ignore[list-item]
        for i, (is_averaged, place) in zip(layout.order.tolist(), sent, strict=True):
            given[i] = Sent(feeds[is_averaged], place, pieces[i].nbytes, progress)
        path = f"{self.folder}/{self.attempt}/rank-{rank:05d}.safetensors"
        try:
            self.ring = self.ring or Ring(settings())
            return write_pack(self.target, path, pieces, given, self.ring, layout)
        finally:
            for feed in feeds:
                feed.close()

    def _held(self, rank: int) -> tuple[list[Piece], list[tuple[int, Box]]]:
        """What a rank is to hold: its pieces, and for each the tensor and the box."""
        rows = self.plan.rows(rank)
        pieces, boxes = [], []
        for t, row in zip(self.plan.tensor[rows].tolist(), self.plan.box[rows], strict=True):
            spec = self.plan.tensors[t]
            box = Box(tuple(row[0, : len(spec.shape)].tolist()), tuple(row[1, : len(spec.shape)].tolist()))
            pieces.append(Piece(spec, box, self.codecs[t]))
            boxes.append((t, box))
        return pieces, boxes

    def collect(self, letters: list[bytes]) -> bytes:
        """The leader's: what the ranks of one turn wrote."""
        self.reports += [decode_report(letter) for letter in letters]
        return b""

    def commit(self) -> bytes:
        """The leader's: the manifest, then the commit."""
        m = self.blend.manifest
        table = [c for c in m.codecs if c in self.codecs]
        code = np.array([1 + table.index(c) if c else 0 for c in self.codecs], dtype=np.uint8)

        def publishing() -> None:
            self.publishing = True

        done = commit_step(
            self.target,
            step=self.step,
            generation=self.generation,
            attempt=self.attempt,
            writer=self.writer,
            plan=self.plan,
            codecs=table,
            codec=code[self.plan.tensor] if table else None,
            objects=[*m.objects, ObjectEntry(RECIPE, "replicated", "json", self.recipe.to_json())],
            aliases=m.aliases,
            reports=self.reports[: self.ranks],
            metrics=self.metrics,
            publishing=publishing,
        )
        return encode({"bytes": done.bytes, "packs": sum(r is not None for r in self.reports)})

    def clean_up(self, rank: int, error: BaseException) -> None:
        """Removes what a failure left; only the leader, and only if it never tried to publish. The claim stays if a
        process may still be writing."""
        if rank == 0 and self.attempt and not self.publishing:
            whole = isinstance(error, CkptError) and not isinstance(error, DeadlineError)
            drop_attempt(self.target, self.folder, self.attempt, whole=whole)

    def close(self) -> None:
        if self.ring is not None:
            self.ring.threads.shutdown()
        with suppress(AttributeError):  # it was never opened
            self.blend.close()
        self.target.close()
