"""A checkpoint written out of others, by as many processes as there are: what resharding and averaging have in common.

Process k of K writes the packs of ranks k, k+K, k+2K, ... Which rank is to hold what every process knows; the first one
names the step and commits it. The bytes do not depend on K.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ckpt.backends import Backend
from ckpt.catalog import drop_attempt, generations_in_use, list_run
from ckpt.collective import Group, decode, encode
from ckpt.commit import claim_attempt, commit_step, step_folder
from ckpt.config import settings
from ckpt.errors import CkptError, DeadlineError
from ckpt.format.codec import Codec
from ckpt.format.fragment import Box
from ckpt.format.manifest import Manifest, ObjectEntry
from ckpt.format.pack import Piece, layout_pack
from ckpt.offline.window import Part
from ckpt.plan import Plan
from ckpt.write import PackReport, Ring, Source, decode_report, encode_report, write_pack

__all__ = ["Content", "Feed", "Outline", "Sent", "Wanted", "Written", "rewrite"]

Bytes = npt.NDArray[np.uint8]
Progress = Callable[[int], None]
Wanted = Sequence[tuple[int, Piece]]
"""Fragments in the order in which a pack asks for them: the number of the tensor in the manifest, the piece."""


@dataclass(frozen=True)
class Outline:
    """What is to be written: tensors, aliases and codecs as `manifest` has them, cut as `plan` says."""

    manifest: Manifest
    plan: Plan
    ranks: int
    step: int
    objects: Sequence[ObjectEntry]
    metrics: Mapping[str, float]


class Content(Protocol):
    """Where it comes from."""

    def outline(self) -> Outline:
        """Raises for arguments and for checkpoints that do not go together."""
        ...

    def sources(self, wanted: Wanted, progress: Progress | None) -> AbstractContextManager[Sequence[Source]]:
        """The bytes of these fragments, each once and in this order."""
        ...


@dataclass(frozen=True)
class Written:
    """The step that was written; `bytes` of all its packs."""

    folder: str
    step: int
    generation: int
    packs: int
    bytes: int


def rewrite(
    content: Content, target: Backend, group: Group, *, name: str, step: int | None, progress: Progress | None
) -> Written:
    """Writes a step; collective over `group`. `name`: of the work, for errors; `step`: its number, if not the outline's.

    Raises, on every rank and with nothing published, what any of them has against it.
    """
    job = _Job(content, target)
    try:
        ready: bytes | Exception = b""
        try:
            job.prepare()
        except Exception as e:
            ready = e
        told, _ = decode(group.round(name, ready, lambda _: job.claim(step)))
        job.folder, job.attempt = told["folder"], told["attempt"]
        ranks = job.outline.ranks
        for turn in range(-(-ranks // group.world)):
            rank = turn * group.world + group.rank
            report: bytes | Exception
            try:
                report = encode_report(job.write(rank, progress) if rank < ranks else None)
            except Exception as e:
                report = e
            # A round for each turn: processes stay within one pack of one another, and a failure stops them all.
            group.round(f"packs {turn} of {job.folder}", report, job.collect)
        answer, _ = decode(group.round(f"commit {job.folder}", b"", lambda _: job.commit(told)))
    except BaseException as e:
        job.clean_up(group.rank, e)
        raise
    finally:
        job.close()
    return Written(job.folder, told["step"], told["generation"], answer["packs"], answer["bytes"])


class _Job:
    """One process's part of the work; on the leader, the decisions too."""

    outline: Outline
    codecs: list[Codec | None]

    def __init__(self, content: Content, target: Backend) -> None:
        self.content, self.target = content, target
        self.folder = self.attempt = self.writer = ""
        self.publishing = False
        self.ring: Ring | None = None
        self.reports: list[PackReport | None] = []

    def prepare(self) -> None:
        self.outline = self.content.outline()
        m = self.outline.manifest
        for t in range(len(m.tensors)):
            m.check_coverage(t)
        code = [0 if m.codec is None or a == b else int(m.codec[a]) for a, b in zip(m.start, m.start[1:], strict=False)]
        self.codecs = [m.codecs[c - 1] if c else None for c in code]

    def claim(self, step: int | None) -> bytes:
        """The leader's: names the step folder and claims an attempt."""
        number = self.outline.step if step is None else step
        generation = max(generations_in_use(list_run(self.target, commits=False)), default=0)
        folder = step_folder(number, generation)
        self.attempt, self.writer = claim_attempt(self.target, folder, self.outline.ranks)
        self.folder = folder
        return encode({"step": number, "generation": generation, "folder": folder, "attempt": self.attempt})

    def write(self, rank: int, progress: Progress | None) -> PackReport | None:
        """Writes one rank's pack; None if the rank holds nothing."""
        pieces, tensors = self._held(rank)
        if not pieces:
            return None
        layout = layout_pack(pieces)
        order = layout.order.tolist()
        path = f"{self.folder}/{self.attempt}/rank-{rank:05d}.safetensors"
        with self.content.sources([(tensors[i], pieces[i]) for i in order], progress) as given:
            sources = dict(zip(order, given, strict=True))
            self.ring = self.ring or Ring(settings())
            return write_pack(self.target, path, pieces, [sources[i] for i in range(len(pieces))], self.ring, layout)

    def _held(self, rank: int) -> tuple[list[Piece], list[int]]:
        """What a rank is to hold: its pieces, and the number of the tensor of each."""
        plan = self.outline.plan
        rows = plan.rows(rank)
        tensors, pieces = plan.tensor[rows].tolist(), []
        for t, row in zip(tensors, plan.box[rows], strict=True):
            spec = plan.tensors[t]
            box = Box(tuple(row[0, : len(spec.shape)].tolist()), tuple(row[1, : len(spec.shape)].tolist()))
            pieces.append(Piece(spec, box, self.codecs[t]))
        return pieces, tensors

    def collect(self, letters: list[bytes]) -> bytes:
        """The leader's: what the ranks of one turn wrote."""
        self.reports += [decode_report(letter) for letter in letters]
        return b""

    def commit(self, told: Mapping[str, Any]) -> bytes:
        """The leader's: the manifest, then the commit."""
        out = self.outline
        table = [c for c in out.manifest.codecs if c in self.codecs]
        code = np.array([1 + table.index(c) if c else 0 for c in self.codecs], dtype=np.uint8)

        def publishing() -> None:
            self.publishing = True

        done = commit_step(
            self.target,
            step=told["step"],
            generation=told["generation"],
            attempt=self.attempt,
            writer=self.writer,
            plan=out.plan,
            codecs=table,
            codec=code[out.plan.tensor] if table else None,
            objects=out.objects,
            aliases=out.manifest.aliases,
            reports=self.reports[: out.ranks],
            metrics=out.metrics,
            publishing=publishing,
        )
        return encode({"bytes": done.bytes, "packs": sum(r is not None for r in self.reports)})

    def clean_up(self, rank: int, error: BaseException) -> None:
        """Removes what a failure left; only the leader, and only if it never tried to publish. The claim of the attempt
        stays if a process may still be writing."""
        if rank == 0 and self.attempt and not self.publishing:
            whole = isinstance(error, CkptError) and not isinstance(error, DeadlineError)
            drop_attempt(self.target, self.folder, self.attempt, whole=whole)

    def close(self) -> None:
        if self.ring is not None:
            self.ring.threads.shutdown()


class Feed:
    """Parts that come in order, handed out as `write_pack` asks for them: in the same order, in pieces of its own."""

    def __init__(self, parts: Generator[Part, None, None]) -> None:
        self._parts = parts
        self._part: Part | None = None

    def copy(self, index: int, start: int, out: Bytes) -> None:
        """Copies bytes [start, start + len(out)) of fragment `index`."""
        done = 0
        while done < len(out):
            part = self._part
            at = start + done - part.start if part is not None and part.index == index else -1
            if part is None or not 0 <= at < len(part.data):
                self._part = next(self._parts)
                continue
            n = min(len(out) - done, len(part.data) - at)
            out[done : done + n] = part.data[at : at + n]
            done += n

    def close(self) -> None:
        """Stops reading ahead."""
        self._parts.close()


class Sent:
    """A fragment to write whose bytes come through a feed: a `ckpt.write.Source`."""

    def __init__(self, feed: Feed, index: int, nbytes: int, progress: Progress | None) -> None:
        self._feed, self._index, self._progress = feed, index, progress
        self.nbytes, self.flat = nbytes, None

    def into(self, start: int, out: Bytes) -> None:
        self._feed.copy(self._index, start, out)
        if self._progress is not None:
            self._progress(len(out))
