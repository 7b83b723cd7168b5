"""Boxes of a tensor's global shape, flat ranges, intersections, coverage.

A fragment is an n-dimensional box. A row-major flat range (FSDP1, ZeRO, Megatron's distributed optimizer)
is at most 2*ndim-1 boxes that follow each other in memory.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Box", "contiguous_span", "disjoint", "flat_boxes", "in_a_row", "tiles", "whole"]


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """The half-open box [offset, offset+shape) of a tensor, in elements."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def stop(self) -> tuple[int, ...]:
        return tuple(o + s for o, s in zip(self.offset, self.shape, strict=True))

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(o, o + s) for o, s in zip(self.offset, self.shape, strict=True))

    def __and__(self, other: Box) -> Box | None:
        """The common box, or None if no element is in both."""
        lo = tuple(max(a, b) for a, b in zip(self.offset, other.offset, strict=True))
        hi = tuple(min(a, b) for a, b in zip(self.stop, other.stop, strict=True))
        if any(b <= a for a, b in zip(lo, hi, strict=True)):
            return None
        return Box(lo, tuple(b - a for a, b in zip(lo, hi, strict=True)))

    def relative_to(self, outer: Box) -> Box:
        """This box in the coordinates of `outer`."""
        return Box(tuple(a - b for a, b in zip(self.offset, outer.offset, strict=True)), self.shape)

    def within(self, shape: Sequence[int]) -> bool:
        return len(self.offset) == len(shape) and all(
            o >= 0 and s >= 0 and o + s <= n for o, s, n in zip(self.offset, self.shape, shape, strict=True)
        )

    def __str__(self) -> str:
        return "[" + ",".join(f"{o}:{o + s}" for o, s in zip(self.offset, self.shape, strict=True)) + "]"


def whole(shape: Sequence[int]) -> Box:
    """The box of all elements of a tensor of this shape."""
    return Box((0,) * len(shape), tuple(shape))


def contiguous_span(shape: Sequence[int], box: Box) -> tuple[int, int] | None:
    """Where `box` lies in a row-major array of `shape`: (first element, number), or None if it is not one run."""
    first, run, open_ = 0, 1, False
    for n, o, s in zip(shape, box.offset, box.shape, strict=True):
        first = first * n + o
        if open_ and s != n:
            return None
        if s != 1:
            open_ = True
        run *= s
    return first, run


def flat_boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The row-major elements [start, stop) of a tensor of `shape`, as boxes in order: at most 2*ndim-1."""
    if stop <= start:
        return
    if not shape:
        yield Box((), ())
        return
    inner = math.prod(shape[1:])
    first, head = divmod(start, inner)
    last, tail = divmod(stop, inner)
    if first == last:
        for box in flat_boxes(shape[1:], head, tail):
            yield Box((first, *box.offset), (1, *box.shape))
        return
    if head:
        for box in flat_boxes(shape[1:], head, inner):
            yield Box((first, *box.offset), (1, *box.shape))
        first += 1
    if last > first:
        yield Box((first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:]))
    for box in flat_boxes(shape[1:], 0, tail):
        yield Box((last, *box.offset), (1, *box.shape))


def disjoint(offsets: npt.NDArray[np.int64], shapes: npt.NDArray[np.int64]) -> tuple[int, int] | None:
    """None if no two of the n boxes overlap, else the indices of two that do.

    `offsets` and `shapes` are int64 of shape (n, ndim). Empty boxes overlap nothing. Sweeps along the axis
    on which the boxes start at the most different places, keeping the boxes that are still open.
    """
    n, ndim = offsets.shape
    live = np.flatnonzero((shapes > 0).all(axis=1)) if ndim else np.arange(n)
    if len(live) < 2:
        return None
    if ndim == 0:
        return int(live[0]), int(live[1])
    lo, hi = offsets[live], offsets[live] + shapes[live]
    axis = int(np.argmax([len(np.unique(lo[:, d])) for d in range(ndim)]))
    order = np.argsort(lo[:, axis], kind="stable")
    lo, hi = lo[order], hi[order]
    if (lo[1:, axis] >= np.maximum.accumulate(hi[:-1, axis])).all():
        return None
    open_ = np.empty(0, dtype=np.int64)
    for i in range(len(order)):
        open_ = open_[hi[open_, axis] > lo[i, axis]]
        if len(open_):
            hit = ((lo[open_] < hi[i]) & (lo[i] < hi[open_])).all(axis=1)
            if hit.any():
                return int(live[order[open_[int(np.argmax(hit))]]]), int(live[order[i]])
        open_ = np.append(open_, i)
    return None


def in_a_row(shape: Sequence[int], offsets: npt.NDArray[np.int64], shapes: npt.NDArray[np.int64]) -> bool:
    """Whether the boxes, in this order, cut a tensor of `shape` along one axis and nowhere else: the usual tiling.

    `offsets` and `shapes` are int64 of shape (n, ndim).
    """
    if len(offsets) == 0 or not shape:
        return len(offsets) == 1 and not shape
    cut = np.flatnonzero((shapes != np.array(shape)).any(axis=0))
    if len(cut) == 0:
        return len(offsets) == 1 and bool((shapes > 0).all())
    if len(cut) > 1:
        return False
    axis = int(cut[0])
    lo, n = offsets[:, axis], shapes[:, axis]
    return bool(lo[0] == 0 and lo[-1] + n[-1] == shape[axis] and (lo[1:] == lo[:-1] + n[:-1]).all() and (n > 0).all())


_PRIME = np.uint64(2**31 - 1)


def tiles(shape: Sequence[int], offsets: npt.NDArray[np.int64], shapes: npt.NDArray[np.int64]) -> bool:
    """Whether n boxes inside a tensor of `shape` hold each of its elements exactly once.

    `offsets` and `shapes` are int64 of shape (n, ndim). Takes n*ndim steps for any boxes, however they were chosen:
    every position on every axis gets a secret random value, and with them the measures of all boxes must add up to
    that of the tensor. They do if the boxes tile it; if not, with a chance below 2**-70 (for up to 64 axes).
    """
    ends = np.array([(0,) * len(shape), shape], dtype=np.uint64)
    for _ in range(3):
        total, held = np.uint64(1), np.ones(len(offsets), dtype=np.uint64)
        for axis in range(len(shape)):
            key = np.uint64(secrets.randbits(64))
            lo, hi = _scatter(offsets[:, axis], key), _scatter(offsets[:, axis] + shapes[:, axis], key)
            held = held * (hi + _PRIME - lo) % _PRIME
            first, last = _scatter(ends[:, axis], key)
            total = total * (last + _PRIME - first) % _PRIME
        if held.sum() % _PRIME != total:
            return False
    return True


def _scatter(position: npt.NDArray[Any], key: np.uint64) -> npt.NDArray[np.uint64]:
    """A pseudo-random number below the prime for each position (the finaliser of splitmix64)."""
    x = position.astype(np.uint64) + key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) % _PRIME
