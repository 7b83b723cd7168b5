"""A checkpoint rewritten for another number of ranks, by as many processes as there are.

Which rank is to hold what is a pure function of the manifest and the wanted layout, so every process knows it:
process k of K writes the packs of ranks k, k+K, k+2K, ... The result does not depend on K. Loading reshards anyway;
this is for ranks that read their share in one piece again and again, and for tools that want a file per rank.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ckpt.backends import Backend, backend_for
from ckpt.catalog import delete_tree, generations_in_use, list_run, parse_ref, resolve
from ckpt.collective import Group, decode, encode
from ckpt.commit import Commit, claim_attempt, commit_step, read_commit, read_manifest, step_folder
from ckpt.config import settings
from ckpt.errors import CkptError, DeadlineError, UsageError
from ckpt.format.codec import Codec
from ckpt.format.fragment import Box
from ckpt.format.manifest import Manifest, ObjectEntry
from ckpt.format.pack import Piece, layout_pack
from ckpt.offline.recut import TpRule, plan_ranks
from ckpt.offline.window import Part, Stream
from ckpt.plan import Plan
from ckpt.write import PackReport, Ring, Source, write_pack

__all__ = ["ORIGIN", "ReshardReport", "TpRule", "reshard"]

ORIGIN = "__ckpt__.resharded_from"
"""The object that says what a checkpoint was rewritten from: step, generation, world, packs, manifest checksum."""

_Bytes = npt.NDArray[np.uint8]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class ReshardReport:
    """What a reshard did. `bytes`: of all packs; `bytes_read`: from storage, by this process."""

    ref: str
    source: str
    step: int
    generation: int
    ranks: int
    packs: int
    tensors: int
    bytes: int
    bytes_read: int
    seconds: float


def reshard(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    ranks: int,
    group: Group,
    tp: int = 1,
    step: int | None = None,
    rules: Sequence[TpRule] = (),
    progress: Progress | None = None,
) -> ReshardReport:
    """Rewrites the checkpoint `src` (a ref) into the run `dst`, one pack for each of `ranks`; collective over `group`.

    Rank d * tp + t holds data part d and tensor-parallel part t of each tensor: cut first along its tensor-parallel
    axis (as its recorded layout says; else by the first of `rules` that matches; else not at all), then along
    dimension 0, as torch.chunk cuts. A tensor without such an axis, and a scalar, is held once; a rank that holds
    nothing has no pack. Values, metrics, aliases, per-rank values, codecs and recorded layouts stay as they are;
    the object `ORIGIN` is added.

    step      number in `dst`; that of `src` by default. It goes into the newest generation of `dst`, 0 if it has none
    progress  is told the bytes of tensors that this process writes

    Holds 36 MiB, the writer's ring, and a line for each fragment. Raises, on every rank and with nothing published:
    UsageError, NotFoundError, ConflictError (the step exists), IntegrityError or FormatError (damaged source),
    StorageError, DeadlineError, PeerError.
    """
    began = time.monotonic()
    run = parse_ref(dst).run
    if run != os.fspath(dst).rstrip("/"):
        raise UsageError(f"{os.fspath(dst)!r} names a step; the result goes into a run (a folder or URL)")
    source, target = backend_for(parse_ref(src).run), backend_for(run, direct=settings().direct)
    job = _Job(source, target)
    try:
        folder = group.round("source", b"", lambda _: resolve(src)[1].folder.encode()).decode()
        ready: bytes | Exception = b""
        try:
            job.prepare(folder, ranks, tp, rules)
        except Exception as e:
            ready = e
        told, _ = decode(group.round("reshard", ready, lambda _: job.claim(ranks, step)))
        job.folder, job.attempt = told["folder"], told["attempt"]
        for turn in range(-(-ranks // group.world)):
            rank = turn * group.world + group.rank
            report: bytes | Exception
            try:
                report = _encode(job.write(rank, progress) if rank < ranks else None)
            except Exception as e:
                report = e
            # A round for each turn: processes stay within one pack of one another, and a failure stops them all.
            group.round(f"packs {turn} of {job.folder}", report, job.collect)
        answer, _ = decode(group.round(f"commit {job.folder}", b"", lambda _: job.commit(ranks)))
    except BaseException as e:
        job.clean_up(group.rank, e)
        raise
    finally:
        job.close()
    return ReshardReport(
        ref=f"{target.root}/{job.folder}",
        source=f"{source.root}/{folder}",
        step=told["step"],
        generation=told["generation"],
        ranks=ranks,
        packs=answer["packs"],
        tensors=len(job.plan.tensors),
        bytes=answer["bytes"],
        bytes_read=job.read,
        seconds=time.monotonic() - began,
    )


class _Job:
    """One process's part of a reshard; on the leader, the decisions too."""

    manifest: Manifest
    origin: Commit
    plan: Plan
    codecs: list[Codec | None]

    def __init__(self, source: Backend, target: Backend) -> None:
        self.source, self.target = source, target
        self.folder = self.attempt = self.writer = ""
        self.step = self.generation = self.read = 0
        self.publishing = False
        self.ring: Ring | None = None
        self.reports: list[PackReport | None] = []

    def prepare(self, folder: str, ranks: int, tp: int, rules: Sequence[TpRule]) -> None:
        """Reads the manifest and plans. Raises for arguments and for a source that cannot be rewritten."""
        self.origin = read_commit(self.source, folder)
        self.manifest = m = read_manifest(self.source, self.origin)
        self.plan = plan_ranks(m, ranks, tp, rules)
        for t in range(len(m.tensors)):
            m.check_coverage(t)
        code = [0 if m.codec is None or a == b else int(m.codec[a]) for a, b in zip(m.start, m.start[1:], strict=False)]
        self.codecs = [m.codecs[c - 1] if c else None for c in code]

    def claim(self, ranks: int, step: int | None) -> bytes:
        """The leader's: names the step folder and claims an attempt."""
        self.step = self.origin.step if step is None else step
        self.generation = max(generations_in_use(list_run(self.target, commits=False)), default=0)
        self.folder = step_folder(self.step, self.generation)
        self.attempt, self.writer = claim_attempt(self.target, self.folder, ranks)
        told = {name: getattr(self, name) for name in ("step", "generation", "folder", "attempt")}
        return encode(told)

    def write(self, rank: int, progress: Progress | None) -> PackReport | None:
        """Writes one rank's pack; None if the rank holds nothing."""
        rows = self.plan.rows(rank)
        pieces, boxes = [], []
        for t, row in zip(self.plan.tensor[rows].tolist(), self.plan.box[rows], strict=True):
            spec = self.plan.tensors[t]
            box = Box(tuple(row[0, : len(spec.shape)].tolist()), tuple(row[1, : len(spec.shape)].tolist()))
            pieces.append(Piece(spec, box, self.codecs[t]))
            boxes.append((t, box))
        if not pieces:
            return None
        layout = layout_pack(pieces)
        order = layout.order.tolist()
        stream = Stream(self.source, self.origin.folder, self.manifest, [boxes[i] for i in order])
        feed = _Feed(stream, progress)
        sources: list[Source] = [None] * len(pieces)  # type: ignore[list-item]
        for place, i in enumerate(order):
            sources[i] = _Stored(feed, place, pieces[i].nbytes)
        path = f"{self.folder}/{self.attempt}/rank-{rank:05d}.safetensors"
        try:
            self.ring = self.ring or Ring(settings())
            return write_pack(self.target, path, pieces, sources, self.ring, layout)
        finally:
            feed.close()
            self.read += stream.stats.read

    def collect(self, letters: list[bytes]) -> bytes:
        """The leader's: what the ranks of one turn wrote."""
        self.reports += [_decode(letter) for letter in letters]
        return b""

    def commit(self, ranks: int) -> bytes:
        """The leader's: the manifest, then the commit."""
        m = self.manifest
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
            objects=[*(o for o in m.objects if o.name != ORIGIN), _origin(self.origin, m)],
            aliases=m.aliases,
            reports=self.reports[:ranks],
            metrics=self.origin.metrics,
            publishing=publishing,
        )
        return encode({"bytes": done.bytes, "packs": sum(r is not None for r in self.reports)})

    def clean_up(self, rank: int, error: BaseException) -> None:
        """Removes what a failed rewrite left; only the leader, and only if it never tried to publish.

        The claim of the attempt goes last, and stays if a process may still be writing.
        """
        if rank != 0 or not self.attempt or self.publishing:
            return
        at = f"{self.folder}/{self.attempt}"
        with suppress(Exception):
            for entry in self.target.list(at):
                if entry.name != "attempt.json":
                    delete_tree(self.target, f"{at}/{entry.name}")
            if isinstance(error, CkptError) and not isinstance(error, DeadlineError):
                delete_tree(self.target, at)

    def close(self) -> None:
        if self.ring is not None:
            self.ring.threads.shutdown()
        self.source.close()
        self.target.close()


def _origin(commit: Commit, manifest: Manifest) -> ObjectEntry:
    said = {
        "step": commit.step,
        "generation": commit.generation,
        "world": commit.world,
        "packs": len(manifest.packs),
        "manifest_crc32c": f"{commit.manifest_crc:08x}",
    }
    return ObjectEntry(ORIGIN, "replicated", "json", json.dumps(said, separators=(",", ":")))


def _encode(report: PackReport | None) -> bytes:
    if report is None:
        return encode(None)
    head = {k: v for k, v in report.__dict__.items() if isinstance(v, int)}
    return encode(head, offset=report.offset, length=report.length, block=report.block)


def _decode(message: bytes) -> PackReport | None:
    head, arrays = decode(message)
    return None if head is None else PackReport(**{**head, **arrays})


def _flat(stream: Stream) -> Generator[Part, None, None]:
    for window in stream:
        yield from window


class _Feed:
    """The content of a pack's fragments in file order, which is the order in which `write_pack` asks for it."""

    def __init__(self, stream: Stream, progress: Progress | None) -> None:
        self._parts = _flat(stream)
        self._part: Part | None = None
        self._progress = progress

    def copy(self, index: int, start: int, out: _Bytes) -> None:
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
        if self._progress is not None:
            self._progress(len(out))

    def close(self) -> None:
        """Stops reading ahead."""
        self._parts.close()


class _Stored:
    """A fragment to write whose bytes are in another checkpoint."""

    def __init__(self, feed: _Feed, index: int, nbytes: int) -> None:
        self._feed, self._index, self.nbytes, self.flat = feed, index, nbytes, None

    def into(self, start: int, out: _Bytes) -> None:
        """Copies bytes [start, start+len(out)) of the fragment."""
        self._feed.copy(self._index, start, out)
