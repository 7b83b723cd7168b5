"""What a load has to read: wanted boxes ∩ stored boxes -> blocks of stored fragments, and where their bytes go.

Knows no torch and reads nothing: a target is a numpy array over whatever memory the bytes belong in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ckpt.errors import FormatError
from ckpt.format.codec import BLOCK, n_blocks
from ckpt.format.dtypes import dtype
from ckpt.format.fragment import Box, contiguous_span
from ckpt.format.manifest import Manifest

__all__ = ["Segment", "Target", "bounds", "plan_reads"]

SCRATCH = 4 << 20
"""What cannot be read in place is cut so that no piece takes more bytes than this."""

_FEW = 8  # fragments of a tensor that are all looked at


@dataclass(frozen=True)
class Target:
    """Where a box of a stored tensor is to go: `array` has the box's shape and the dtype's numpy type."""

    tensor: int
    box: Box
    array: npt.NDArray[np.generic]


class Segment(NamedTuple):
    """Blocks [first, first+blocks) of one stored fragment, `nbytes` raw bytes, and what to do with these.

    The fragment is row `row` of the manifest and has `shape`. `direct`: bytes of the target to which they go as they are,
    but for the first `skip` and what is left after it, which belong to somebody else. Otherwise they are read into scratch
    memory and `box` (relative to the fragment) is copied to `out`.
    """

    row: int
    tensor: int
    shape: tuple[int, ...]
    first: int
    blocks: int
    nbytes: int
    direct: memoryview | None
    skip: int = 0
    box: Box | None = None
    out: npt.NDArray[np.generic] | None = None


def plan_reads(manifest: Manifest, targets: Sequence[Target]) -> dict[int, list[Segment]]:
    """Pack -> segments, in file order. Raises FormatError if a target is not fully covered by stored fragments."""
    found: list[Segment] = []
    usual: dict[int, list[Target]] = {}
    for target in targets:
        if not target.array.size:
            continue
        if target.array.flags.c_contiguous and manifest.count(target.tensor) <= _FEW:
            usual.setdefault(len(target.box.shape), []).append(target)
        else:
            found += _of_one(manifest, target)
    for group in usual.values():
        for target in _in_rows(manifest, group, found):
            found += _partly(manifest, target)
    rows = np.array([segment.row for segment in found], dtype=np.int64)
    first = np.array([segment.first for segment in found], dtype=np.int64)
    pack = manifest.pack[rows]
    order = np.lexsort((first, manifest.offset[rows], pack))
    out: dict[int, list[Segment]] = {}
    for k, p in zip(order.tolist(), pack[order].tolist(), strict=True):
        out.setdefault(p, []).append(found[k])
    return out


def _in_rows(manifest: Manifest, targets: Sequence[Target], found: list[Segment]) -> list[Target]:
    """Finds the segments of all contiguous targets of so many dimensions whose fragments differ from them along the first
    axis alone: whole rows of the same width, one run on both sides. Returns the targets that are not like that."""
    d = len(targets[0].box.shape)
    tensor = np.array([t.tensor for t in targets], dtype=np.int64)
    begin = manifest.start[tensor]
    count = manifest.start[tensor + 1] - begin
    of = np.repeat(np.arange(len(targets)), count)
    nth = np.arange(len(of)) - np.repeat(np.cumsum(count) - count, count)
    wanted = np.array([(t.box.offset, t.box.shape) for t in targets], dtype=np.int64).reshape(len(targets), 2, d)
    at = manifest.box_start[tensor][of] + 2 * d * nth
    stored = manifest.box[at[:, None] + np.arange(2 * d)].astype(np.int64).reshape(len(of), 2, d)
    if d == 0:  # one row of one element
        wanted, stored = (np.broadcast_to(np.array([[0], [1]]), (n, 2, 1)) for n in (len(targets), len(of)))
    here = wanted[of]
    lo, hi = np.maximum(stored[:, 0], here[:, 0]), np.minimum(stored.sum(axis=1), here.sum(axis=1))
    meets = (lo < hi).all(axis=1)
    alike = (stored[:, :, 1:] == here[:, :, 1:]).all(axis=(1, 2))
    rows = np.where(meets, hi[:, 0] - lo[:, 0], 0)
    other = np.bincount(of, rows, minlength=len(targets)) != wanted[:, 1, 0]
    other[of[meets & ~alike]] = True
    k = np.flatnonzero(meets & ~other[of])
    item = np.array([dtype(manifest.tensors[t].dtype).itemsize for t in tensor.tolist()], dtype=np.int64)
    width = (wanted[:, 1, 1:].prod(axis=1) * item)[of[k]]
    start, n = (lo[k, 0] - stored[k, 0, 0]) * width, rows[k] * width
    place = (lo[k, 0] - here[k, 0, 0]) * width
    first, stop = start // BLOCK, -(-(start + n) // BLOCK)
    nbytes = np.minimum(stop * BLOCK, stored[k, 1, 0] * width) - first * BLOCK
    columns = (begin[of[k]] + nth[k], of[k], first, stop - first, nbytes, start - first * BLOCK, place, place + n)
    shapes = stored[k, 1].tolist() if d else [()] * len(k)
    memory = [_raw(target.array) for target in targets]
    for row, t, a, blocks, size, skip, x, y, shape in zip(*(c.tolist() for c in columns), shapes, strict=True):
        direct = memory[t]
        if y - x < len(direct):
            direct = direct[x:y]
        found.append(Segment(row, targets[t].tensor, tuple(shape), a, blocks, size, direct, skip))
    return [targets[t] for t in np.flatnonzero(other).tolist()]


def _raw(array: npt.NDArray[np.generic]) -> memoryview:
    """The bytes of a contiguous array."""
    return memoryview(array.reshape(-1).view(np.uint8))


def _of_one(manifest: Manifest, target: Target) -> Iterator[Segment]:
    """The segments of a target which may be one stored fragment, of many."""
    box, array = target.box, target.array
    row = manifest.find_box(target.tensor, box) if array.flags.c_contiguous else None
    if row is None:
        yield from _partly(manifest, target)
    else:
        yield Segment(row, target.tensor, box.shape, 0, n_blocks(array.nbytes), array.nbytes, _raw(array))


def _partly(manifest: Manifest, target: Target) -> Iterator[Segment]:
    """The segments of any target."""
    box, array = target.box, target.array
    spec, found = manifest.tensors[target.tensor], 0
    base, item = int(manifest.start[target.tensor]), dtype(spec.dtype).itemsize
    memory = _raw(array) if array.flags.c_contiguous else None
    for k, stored in _touching(manifest, target.tensor, box):
        common = stored & box
        if common is not None:
            found += common.numel
            yield from _segments(base + k, stored, common, target, item, memory)
    if found != box.numel:
        raise FormatError(f"tensor {spec.key!r}: the manifest holds {found} of the {box.numel} elements of {box}")


def _touching(manifest: Manifest, t: int, box: Box) -> Iterator[tuple[int, Box]]:
    """(number, box) of the stored boxes of tensor t that may meet `box`."""
    if not box.shape or manifest.count(t) <= _FEW:
        yield from enumerate(manifest.box_list(t))
        return
    boxes = manifest.boxes(t)
    lo, hi = np.array(box.offset), np.array(box.stop)
    which = np.flatnonzero(((boxes[:, 0] < hi) & (boxes[:, 0] + boxes[:, 1] > lo)).all(axis=1))
    for k, (offset, shape) in zip(which.tolist(), boxes[which].tolist(), strict=True):
        yield k, Box(tuple(offset), tuple(shape))


def _segments(
    row: int, stored: Box, common: Box, target: Target, item: int, memory: memoryview | None
) -> Iterator[Segment]:
    inside, there = common.relative_to(stored), common.relative_to(target.box)
    total = stored.numel * item
    source = contiguous_span(stored.shape, inside)
    place = contiguous_span(target.box.shape, there)
    if memory is not None and source is not None and place is not None:
        lo, n, at = source[0] * item, source[1] * item, place[0] * item
        first, count, nbytes = _blocks(lo, lo + n, total)
        yield Segment(row, target.tensor, stored.shape, first, count, nbytes, memory[at : at + n], lo - first * BLOCK)
        return
    out = target.array[there.slices]
    for slab in _slabs(stored.shape, inside, item):
        lo, hi = bounds(stored.shape, slab, item)
        first, count, nbytes = _blocks(lo, hi, total)
        view = out[slab.relative_to(inside).slices]
        yield Segment(row, target.tensor, stored.shape, first, count, nbytes, None, 0, slab, view)


def _blocks(lo: int, hi: int, total: int) -> tuple[int, int, int]:
    """(first block, number, their raw bytes) that cover bytes [lo, hi) of a fragment of `total` bytes."""
    first, stop = lo // BLOCK, n_blocks(hi)
    return first, stop - first, min(stop * BLOCK, total) - first * BLOCK


def bounds(shape: tuple[int, ...], box: Box, item: int) -> tuple[int, int]:
    """The bytes of a row-major array of `shape` from the first to the last element of `box`."""
    first = last = 0
    for n, o, s in zip(shape, box.offset, box.shape, strict=True):
        first, last = first * n + o, last * n + o + s - 1
    return first * item, (last + 1) * item


def _slabs(shape: tuple[int, ...], box: Box, item: int) -> Iterator[Box]:
    """Cuts a box of a fragment into boxes whose bytes, from first to last, fit the scratch memory, and which do not
    span long stretches that nobody asked for."""
    lo, hi = bounds(shape, box, item)
    wide = hi - lo > SCRATCH - 2 * BLOCK
    sparse = hi - lo > 4 * BLOCK and hi - lo > 2 * box.numel * item
    d = next((d for d, s in enumerate(box.shape) if s > 1), None)
    if d is None or not (wide or sparse):
        yield box
        return
    half = box.shape[d] // 2
    for o, s in ((box.offset[d], half), (box.offset[d] + half, box.shape[d] - half)):
        yield from _slabs(
            shape, Box((*box.offset[:d], o, *box.offset[d + 1 :]), (*box.shape[:d], s, *box.shape[d + 1 :])), item
        )
