"""A checkpoint rewritten for another number of ranks, by as many processes as there are.

Which rank is to hold what is a pure function of the manifest and the wanted layout, so every process knows it:
process k of K writes the packs of ranks k, k+K, k+2K, ... The result does not depend on K. Loading reshards anyway;
this is for ranks that read their share in one piece again and again, and for tools that want a file per rank.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ckpt.backends import Backend, backend_for
from ckpt.catalog import parse_ref, resolve
from ckpt.collective import Group
from ckpt.commit import Commit, read_commit, read_manifest
from ckpt.config import settings
from ckpt.errors import UsageError
from ckpt.format.manifest import Manifest, ObjectEntry
from ckpt.offline.recut import TpRule, plan_ranks
from ckpt.offline.rewrite import Feed, Outline, Sent, Wanted, rewrite
from ckpt.offline.window import Stream
from ckpt.write import Source

__all__ = ["ORIGIN", "ReshardReport", "TpRule", "reshard"]

ORIGIN = "__ckpt__.resharded_from"
"""The object that says what a checkpoint was rewritten from: step, generation, world, packs, manifest checksum."""

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
    try:
        folder = group.round("source", b"", lambda _: resolve(src)[1].folder.encode()).decode()
        content = _Recut(source, folder, ranks, tp, rules)
        done = rewrite(content, target, group, name="reshard", step=step, progress=progress)
    finally:
        source.close()
        target.close()
    return ReshardReport(
        ref=f"{target.root}/{done.folder}",
        source=f"{source.root}/{folder}",
        step=done.step,
        generation=done.generation,
        ranks=ranks,
        packs=done.packs,
        tensors=len(content.manifest.tensors),
        bytes=done.bytes,
        bytes_read=content.read,
        seconds=time.monotonic() - began,
    )


class _Recut:
    """One checkpoint, cut in another way."""

    manifest: Manifest

    def __init__(self, source: Backend, folder: str, ranks: int, tp: int, rules: Sequence[TpRule]) -> None:
        self._source, self._folder, self._cut = source, folder, (ranks, tp, rules)
        self.read = 0

    def outline(self) -> Outline:
        origin = read_commit(self._source, self._folder)
        self.manifest = m = read_manifest(self._source, origin)
        objects = [*(o for o in m.objects if o.name != ORIGIN), _origin(origin, m)]
        return Outline(m, plan_ranks(m, *self._cut), self._cut[0], origin.step, objects, origin.metrics)

    @contextmanager
    def sources(self, wanted: Wanted, progress: Progress | None) -> Iterator[Sequence[Source]]:
        stream = Stream(self._source, self._folder, self.manifest, [(t, p.box) for t, p in wanted])
        feed = Feed(part for window in stream for part in window)
        try:
            yield [Sent(feed, i, p.nbytes, progress) for i, (_, p) in enumerate(wanted)]
        finally:
            feed.close()
            self.read += stream.stats.read


def _origin(commit: Commit, manifest: Manifest) -> ObjectEntry:
    said = {
        "step": commit.step,
        "generation": commit.generation,
        "world": commit.world,
        "packs": len(manifest.packs),
        "manifest_crc32c": f"{commit.manifest_crc:08x}",
    }
    return ObjectEntry(ORIGIN, "replicated", "json", json.dumps(said, separators=(",", ":")))
