"""Boxes of a checkpoint as one stream of bytes: read ahead in large windows, in bounded memory, every block checked.

Whole tensors and small pieces alike: a window holds as many of them as fit, or a part of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ckpt.backends import Backend
from ckpt.backends.direct import PAGE
from ckpt.format.codec import BLOCK
from ckpt.format.dtypes import dtype
from ckpt.format.fragment import Box, flat_boxes
from ckpt.format.manifest import Manifest
from ckpt.read import Target, read_targets
from ckpt.stored import Pack, ReadStats

__all__ = ["Part", "Stream", "cut_windows"]

Bytes = npt.NDArray[np.uint8]
_ALIGN = 64
_LARGE = 64 << 10  # bytes of a part that is worth being left a page for


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes [start, start+len(data)) of the row-major content of box `index`; valid until the next window is taken."""

    index: int
    start: int
    data: Bytes


def cut_windows(sizes: Sequence[int], limit: int) -> Iterator[list[tuple[int, int, int]]]:
    """Cuts boxes of `sizes` bytes, in order, into windows of at most `limit` bytes: lists of (index, start, stop).

    A box is cut only at multiples of 256 KiB of itself. `limit` is 256 KiB or more. The same sizes give the same cuts.
    """
    window: list[tuple[int, int, int]] = []
    room = limit
    for index, size in enumerate(sizes):
        at = 0
        while at < size:
            n = size - at if size - at <= room else room // BLOCK * BLOCK
            if n:
                window.append((index, at, at + n))
                at, room = at + n, room - -(-n // _ALIGN) * _ALIGN
            if at < size or room <= 0:
                yield window
                window, room = [], limit
    if window:
        yield window


class Stream:
    """The content of `boxes`, pairs of a tensor's index in the manifest and a box of it, window by window.

    While one window is in use the next one is read, by another thread: 2 * `limit` bytes and 4 MiB of scratch.
    Iterate once. Raises what `read_targets` raises, for any byte that is not what was written.
    """

    def __init__(
        self,
        backend: Backend,
        folder: str,
        manifest: Manifest,
        boxes: Sequence[tuple[int, Box]],
        *,
        limit: int = 16 << 20,
    ) -> None:
        self.stats = ReadStats()
        self._backend, self._folder, self._manifest = backend, folder, manifest
        self._boxes, self._limit = boxes, limit
        kinds = {t: dtype(manifest.tensors[t].dtype) for t in {t for t, _ in boxes}}
        self.sizes = [box.numel * kinds[t].itemsize for t, box in boxes]
        self._kinds = kinds
        self._packs: dict[int, Pack] = {}  # those of the last window

    def __iter__(self) -> Iterator[list[Part]]:
        memory: list[Bytes] = []
        with ThreadPoolExecutor(1, thread_name_prefix="ckpt-ahead") as pool:
            ahead: Future[list[Part]] | None = None
            for turn, cuts in enumerate(cut_windows(self.sizes, self._limit)):
                if len(memory) < 2:
                    memory.append(_pages(min(self._limit, self._total()) * 17 // 16))
                # The window before this one is complete before its successor is asked for: its memory is the other one.
                ready = ahead.result() if ahead is not None else None
                ahead = pool.submit(self._fill, memory[turn % 2], cuts)
                if ready is not None:
                    yield ready
            if ahead is not None:
                yield ahead.result()

    def _total(self) -> int:
        return sum(-(-n // _ALIGN) * _ALIGN for n in self.sizes)

    def _fill(self, memory: Bytes, cuts: Sequence[tuple[int, int, int]]) -> list[Part]:
        targets: list[Target] = []
        parts: list[Part] = []
        at = 0
        for index, start, stop in cuts:
            at += self._shift(at, index, start, stop)
            data = memory[at : at + stop - start]
            parts.append(Part(index, start, data))
            targets += self._targets(index, start, data)
            at += -(-(stop - start) // _ALIGN) * _ALIGN
        stats = read_targets(self._backend, self._folder, self._manifest, targets, threads=1, opened=self._packs)
        self.stats.needed += stats.needed
        self.stats.read += stats.read
        return parts

    def _shift(self, at: int, index: int, start: int, stop: int) -> int:
        """Bytes to leave free before a part, so that it begins in a page of memory where it does in the file."""
        if stop - start < _LARGE:
            return 0
        row = self._manifest.find_box(*self._boxes[index])
        return 0 if row is None else (int(self._manifest.offset[row]) + start - at) % PAGE

    def _targets(self, index: int, start: int, data: Bytes) -> Iterator[Target]:
        tensor, box = self._boxes[index]
        kind = self._kinds[tensor]
        at = 0
        for part in flat_boxes(box.shape, start // kind.itemsize, (start + len(data)) // kind.itemsize):
            n = part.numel * kind.itemsize
            moved = Box(tuple(o + p for o, p in zip(box.offset, part.offset, strict=True)), part.shape)
            yield Target(tensor, moved, data[at : at + n].view(kind.numpy).reshape(part.shape))
            at += n


def _pages(n: int) -> Bytes:
    """Uninitialised memory that begins with a page."""
    memory = np.empty(n + PAGE, dtype=np.uint8)
    first = -memory.ctypes.data % PAGE
    return memory[first : first + n]
