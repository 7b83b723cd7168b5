"""A recipe's result, window by window in bounded memory: every checkpoint is read ahead, checked, and combined.

`Blend` is a recipe whose checkpoints are open. What it yields depends on the stored elements alone, not on how the work
is divided: see `ckpt.merge.arithmetic`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType

import numpy as np
import numpy.typing as npt

from ckpt.backends import Backend, backend_for
from ckpt.backends.direct import read_once
from ckpt.catalog import parse_ref
from ckpt.commit import Commit, read_commit, read_manifest
from ckpt.config import settings
from ckpt.errors import MismatchError
from ckpt.format.codec import BLOCK
from ckpt.format.fragment import Box
from ckpt.format.manifest import Manifest
from ckpt.merge.arithmetic import NotFinite, Room, combine
from ckpt.merge.recipe import Recipe
from ckpt.merge.rules import Sources, base_of, match
from ckpt.merge.weights import Floats
from ckpt.offline.window import Part, Stream
from ckpt.stored import ReadStats

__all__ = ["Blend", "cores"]

_AHEAD = 64 << 20  # bytes of one window of all checkpoints; the next one is read meanwhile
_SHARE = 1 << 20  # bytes of each checkpoint that one thread combines at a time

Bytes = npt.NDArray[np.uint8]
Boxes = Sequence[tuple[int, Box]]


class Blend:
    """A recipe with its checkpoints open. `manifest`: what the result consists of, as the base stores it.

    once   it is read once, so that nothing is gained by the page cache

    Raises NotFoundError, IntegrityError or FormatError for checkpoints that are gone or damaged, MismatchError for one
    that is not the one that the recipe was made of.
    """

    def __init__(self, recipe: Recipe, *, once: bool = False) -> None:
        self.recipe, self.stats = recipe, ReadStats()
        self._same = recipe.weights[None, :]
        self._limit = max(BLOCK, _AHEAD // len(recipe.terms) // BLOCK * BLOCK)
        self._mine = threading.local()
        self._hands = ThreadPoolExecutor(cores(), thread_name_prefix="ckpt-combine")
        self._open: dict[str, Backend] = {}
        self.backends: list[Backend] = []
        self.commits: list[Commit] = []
        self.manifests: list[Manifest] = []
        try:
            for term in recipe.terms:
                parsed = parse_ref(term.ref)
                if parsed.run not in self._open:  # one for a run: it bounds how many files are open
                    backend = backend_for(parsed.run, direct=settings().direct)
                    self._open[parsed.run] = read_once(backend) if once else backend
                self.backends.append(self._open[parsed.run])
                commit = read_commit(self.backends[-1], parsed.which)
                if f"{commit.manifest_crc:08x}" != term.manifest:
                    raise MismatchError(
                        f"{term.ref} is not the checkpoint that recipe {recipe.method!r} was made of; make the recipe anew"
                    )
                self.commits.append(commit)
                self.manifests.append(read_manifest(self.backends[-1], commit))
            self.manifests[-1] = base_of(recipe, self.manifests[-1])
        except BaseException:
            self.close()
            raise

    @property
    def manifest(self) -> Manifest:
        return self.manifests[-1]

    @property
    def commit(self) -> Commit:
        """The base's."""
        return self.commits[-1]

    def match(self, wanted: Sequence[int] | None = None) -> Sources:
        """See `ckpt.merge.rules.match`."""
        return match(self.recipe, self.manifests, wanted)

    def copied(self, boxes: Boxes) -> Generator[Part, None, None]:
        """The content of boxes of the base, (index of the tensor in `manifest`, box)."""
        stream = Stream(self.backends[-1], self.commit.folder, self.manifest, boxes, limit=_AHEAD // 4)
        try:
            for window in stream:
                yield from window
        finally:
            self._count([stream])

    def averaged(self, boxes: Boxes, sources: Sources) -> Generator[Part, None, None]:
        """The average's content of boxes, (index of the tensor in `manifest`, box), of leaves that have sources."""
        for window in self.weighed(boxes, sources, None):
            for rows in window:
                yield rows[0]

    def streams(self, boxes: Boxes, sources: Sources) -> list[Stream]:
        """The content of boxes in each checkpoint: windows that are cut alike, 128 MiB for all together, and 4 MiB of scratch each."""
        return [
            Stream(b, c.folder, m, [(sources[t][k], box) for t, box in boxes], limit=self._limit)
            for k, (b, c, m) in enumerate(zip(self.backends, self.commits, self.manifests, strict=True))
        ]

    def weighed(self, boxes: Boxes, sources: Sources, weights: Floats | None) -> Iterator[list[list[Part]]]:
        """As `averaged`, for each row of `weights` (rows, terms), from one pass over the checkpoints. None: the recipe's own, one row.

        Yields windows: for each part of one the parts of all rows, valid until the next window is taken. Memory: 128 MiB for
        windows, 64 MiB times rows / terms, 4 MiB of scratch for each term, and that of `Room` for each thread.
        """
        streams = self.streams(boxes, sources)
        size = min(self._limit, sum(map(_aligned, streams[-1].sizes)))
        room = [np.empty(size, dtype=np.uint8) for _ in range(1 if weights is None else len(weights))]
        try:
            for windows in zip(*streams, strict=True):
                yield self._window(windows, boxes, weights, room)
        finally:
            self._count(streams)

    def _window(
        self, windows: Sequence[list[Part]], boxes: Boxes, weights: Floats | None, room: Sequence[Bytes]
    ) -> list[list[Part]]:
        """One window of all checkpoints, combined into `room`, an array for each row of weights. Threads share the work in
        pieces, which does not show in the bits."""
        at = share = 0
        out, some = [], []
        under_way: list[Future[None]] = []
        for parts in zip(*windows, strict=True):
            base = parts[-1]
            results = [r[at : at + len(base.data)] for r in room]
            for lo in range(0, len(base.data), _SHARE):
                blocks, into = ([b[lo : lo + _SHARE] for b in part] for part in ([p.data for p in parts], results))
                some.append((blocks, boxes[base.index][0], into))
                share += len(into[0])
                if share >= _SHARE:
                    under_way.append(self._hands.submit(self._combine_all, some, weights))
                    share, some = 0, []
            out.append([Part(base.index, base.start, r) for r in results])
            at += _aligned(len(base.data))
        under_way.append(self._hands.submit(self._combine_all, some, weights))
        wait(under_way)
        for done in under_way:
            done.result()
        return out

    def _combine_all(
        self, some: Sequence[tuple[Sequence[Bytes], int, Sequence[Bytes]]], weights: Floats | None
    ) -> None:
        for blocks, tensor, into in some:
            self._combine(blocks, self._own(tensor) if weights is None else weights, tensor, into)

    def _own(self, tensor: int) -> Floats:
        """The recipe's weights for a leaf, as one row."""
        own = self.recipe.weights_of
        return self._same if own is None else np.array([own[self.manifest.tensors[tensor].name]], dtype=np.float64)

    def _combine(self, blocks: Sequence[Bytes], weights: Floats, tensor: int, out: Sequence[Bytes]) -> None:
        spec = self.manifest.tensors[tensor]
        if not hasattr(self._mine, "room"):
            self._mine.room = Room()
        try:
            combine(blocks, weights, spec.dtype, out, self._mine.room)
        except NotFinite as e:
            steps = ", ".join(str(self.recipe.terms[k].step) for k in e.inputs)
            what = f"holds infinities or NaN in step {steps}" if steps else f"comes out too large for {spec.dtype}"
            raise MismatchError(
                f"tensor {spec.key!r} {what}; leave such steps out, or take it from the last one (latest)"
            ) from None

    def _count(self, streams: Sequence[Stream]) -> None:
        for stream in streams:
            self.stats.needed += stream.stats.needed
            self.stats.read += stream.stats.read

    def close(self) -> None:
        self._hands.shutdown()
        for backend in self._open.values():
            backend.close()

    def __enter__(self) -> Blend:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def cores() -> int:
    """The cores of this host over its ranks, at most 4."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return max(1, min(4, len(os.sched_getaffinity(0)) // here))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 64) * 64
