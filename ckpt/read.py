"""Who reads what, and the reading: wanted boxes ∩ stored boxes -> byte ranges -> checked bytes in place.

Knows no torch: a target is a numpy array over whatever memory the bytes belong in. Every block that is touched is
read whole and checked before any of it is used; blocks that lie contiguously in the target are read right there.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ckpt.backends import Backend
from ckpt.errors import FormatError
from ckpt.format.codec import BLOCK, crc32c, n_blocks
from ckpt.format.dtypes import dtype
from ckpt.format.fragment import Box, contiguous_span
from ckpt.format.manifest import Manifest
from ckpt.stored import Pack, ReadStats, StoredFragment

__all__ = ["Segment", "Target", "plan_reads", "read_targets"]

Bytes = npt.NDArray[np.uint8]
_JOB = 2 << 20  # bytes of one read: several blocks, few enough to be checked while still in cache
_SCRATCH = 4 << 20
_GAP = 64 << 10  # a smaller hole between two ranges is read rather than skipped


@dataclass(frozen=True)
class Target:
    """Where a box of a stored tensor is to go: `array` has the box's shape and the dtype's numpy type."""

    tensor: int
    box: Box
    array: npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class Segment:
    """Blocks [first, first+count) of one stored fragment and what to do with their raw bytes.

    The fragment is row `row` of the manifest and has `shape`.     `direct`: bytes of the target to which they go as they are. Otherwise they are read into scratch memory and
    `box` (relative to the fragment) is copied to `out`.
    """

    row: int
    tensor: int
    shape: tuple[int, ...]
    first: int
    count: int
    nbytes: int
    direct: Bytes | None
    box: Box | None = None
    out: npt.NDArray[np.generic] | None = None


def plan_reads(manifest: Manifest, targets: Sequence[Target]) -> dict[int, list[Segment]]:
    """Pack -> segments, in file order. Raises FormatError if a target is not fully covered by stored fragments."""
    out: dict[int, list[Segment]] = {}
    for target in targets:
        if not target.box.numel:
            continue
        t = target.tensor
        spec = manifest.tensors[t]
        base, item = int(manifest.start[t]), dtype(spec.dtype).itemsize
        found = 0
        for k, stored in _touching(manifest, t, target.box):
            row = base + k
            segments = out.setdefault(int(manifest.pack[row]), [])
            if stored == target.box and target.array.flags.c_contiguous:
                found += stored.numel
                raw = target.array.reshape(-1).view(np.uint8)
                segments.append(Segment(row, t, stored.shape, 0, n_blocks(len(raw)), len(raw), raw))
                continue
            common = stored & target.box
            if common is not None:
                found += common.numel
                segments.extend(_segments(row, stored, common, target, item))
        if found != target.box.numel:
            raise FormatError(
                f"tensor {spec.key!r}: the manifest holds {found} of the {target.box.numel} elements of {target.box}"
            )
    offset = {s.row: int(manifest.offset[s.row]) for segments in out.values() for s in segments}
    for segments in out.values():
        segments.sort(key=lambda s: (offset[s.row], s.first))
    return out


def _touching(manifest: Manifest, t: int, box: Box) -> Iterator[tuple[int, Box]]:
    """(number, box) of the stored boxes of tensor t that may meet `box`."""
    if not box.shape or manifest.start[t + 1] - manifest.start[t] <= 8:
        yield from enumerate(manifest.box_list(t))
        return
    boxes = manifest.boxes(t)
    lo, hi = np.array(box.offset), np.array(box.stop)
    which = np.flatnonzero(((boxes[:, 0] < hi) & (boxes[:, 0] + boxes[:, 1] > lo)).all(axis=1))
    for k, (offset, shape) in zip(which.tolist(), boxes[which].tolist(), strict=True):
        yield k, Box(tuple(offset), tuple(shape))


def _segments(row: int, stored: Box, common: Box, target: Target, item: int) -> Iterator[Segment]:
    inside, there = common.relative_to(stored), common.relative_to(target.box)
    total = stored.numel * item
    source = contiguous_span(stored.shape, inside)
    place = contiguous_span(target.box.shape, there) if target.array.flags.c_contiguous else None
    if source is not None and place is not None:
        yield from _runs(
            row, target.tensor, stored, source[0] * item, source[1] * item, total, target.array, place[0] * item, item
        )
        return
    out = target.array[there.slices]
    for slab in _slabs(stored.shape, inside, item):
        lo, hi = _bounds(stored.shape, slab, item)
        first, count, nbytes = _blocks(lo, hi, total)
        yield Segment(
            row, target.tensor, stored.shape, first, count, nbytes, None, slab, out[slab.relative_to(inside).slices]
        )


def _runs(
    row: int, tensor: int, stored: Box, lo: int, n: int, total: int, array: npt.NDArray[np.generic], at: int, item: int
) -> Iterator[Segment]:
    """Bytes [lo, lo+n) of a fragment, one run in the target too: whole blocks in place, the edges through scratch."""
    flat = array.reshape(-1)
    memory = flat.view(np.uint8)
    hi = lo + n
    inner_lo = min(-(-lo // BLOCK) * BLOCK, hi)
    inner_hi = hi if hi == total else max(hi // BLOCK * BLOCK, inner_lo)
    for a, b in ((lo, inner_lo), (inner_hi, hi)):
        if a < b:
            first, count, nbytes = _blocks(a, b, total)
            view = flat[(at + a - lo) // item : (at + b - lo) // item]
            yield Segment(
                row, tensor, stored.shape, first, count, nbytes, None, Box((a // item,), ((b - a) // item,)), view
            )
    if inner_lo < inner_hi:
        first, count, nbytes = _blocks(inner_lo, inner_hi, total)
        yield Segment(row, tensor, stored.shape, first, count, nbytes, memory[at + inner_lo - lo : at + inner_hi - lo])


def _blocks(lo: int, hi: int, total: int) -> tuple[int, int, int]:
    """(first block, number, their raw bytes) that cover bytes [lo, hi) of a fragment of `total` bytes."""
    first, stop = lo // BLOCK, n_blocks(hi)
    return first, stop - first, min(stop * BLOCK, total) - first * BLOCK


def _bounds(shape: tuple[int, ...], box: Box, item: int) -> tuple[int, int]:
    """The bytes of a row-major array of `shape` from the first to the last element of `box`."""
    first = last = 0
    for n, o, s in zip(shape, box.offset, box.shape, strict=True):
        first, last = first * n + o, last * n + o + s - 1
    return first * item, (last + 1) * item


def _slabs(shape: tuple[int, ...], box: Box, item: int) -> Iterator[Box]:
    """Cuts a box of a fragment into boxes whose bytes, from first to last, fit the scratch memory, and which do not
    span long stretches that nobody asked for."""
    lo, hi = _bounds(shape, box, item)
    wide = hi - lo > _SCRATCH - 2 * BLOCK
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


@dataclass
class _Job:
    """One range of a pack: consecutive segments, read with one call."""

    pack: Pack
    start: int
    stop: int
    parts: list[tuple[Segment, StoredFragment, int, int]] = field(default_factory=list)  # segment, fragment, file range


def read_targets(
    backend: Backend,
    folder: str,
    manifest: Manifest,
    targets: Sequence[Target],
    *,
    threads: int = 2,
    progress: Callable[[int], None] | None = None,
) -> ReadStats:
    """Fills all targets from the packs under `folder`. Returns what it took.

    Uses `threads` threads with 4 MiB of scratch memory each. Raises IntegrityError naming file, block and tensor
    for the first bytes that are not what was written; the targets' content is then undefined.
    """
    stats = ReadStats(needed=sum(t.array.nbytes for t in targets))
    plan = plan_reads(manifest, targets)
    jobs: list[_Job] = []
    for index in sorted(plan):
        pack = Pack(backend, folder, manifest, index, stats)
        jobs.extend(_jobs(pack, plan[index]))
    stats.read += sum(job.stop - job.start for job in jobs)
    _run_all(jobs, threads, progress)
    return stats


def _jobs(pack: Pack, segments: Sequence[Segment]) -> Iterator[_Job]:
    """Joins neighbouring segments into ranges of about a megabyte; cuts long ones at blocks."""
    job: _Job | None = None
    row, fragment, starts = -1, None, None
    for segment in segments:
        if segment.row != row or fragment is None:
            row = segment.row
            fragment = pack.fragment(row, segment.tensor, segment.shape)
            starts = pack.starts(fragment)
        for part in _pieces(segment, fragment):
            lo = fragment.offset + (part.first * BLOCK if starts is None else int(starts[part.first]))
            hi = lo + part.nbytes if starts is None else fragment.offset + int(starts[part.first + part.count])
            full = job is not None and (lo < job.stop or lo - job.stop > _GAP or hi - job.start > _JOB)
            if job is None or full:
                if job is not None:
                    yield job
                job = _Job(pack, lo, hi)
            job.parts.append((part, fragment, lo, hi))
            job.stop = hi
    if job is not None:
        yield job


def _pieces(segment: Segment, fragment: StoredFragment) -> Iterator[Segment]:
    """A long in-place segment in parts of one job each."""
    step = _JOB // BLOCK
    if segment.direct is None or segment.count <= step:
        yield segment
        return
    for k in range(0, segment.count, step):
        count = min(step, segment.count - k)
        view = segment.direct[k * BLOCK : (k + count) * BLOCK]
        yield Segment(segment.row, segment.tensor, segment.shape, segment.first + k, count, len(view), view)


def _run_all(jobs: Sequence[_Job], threads: int, progress: Callable[[int], None] | None) -> None:
    turn = itertools.count()
    failed: list[BaseException] = []
    lock = threading.Lock()

    def work() -> None:
        try:
            scratch = np.empty(_SCRATCH, dtype=np.uint8)
            while not failed and (i := next(turn)) < len(jobs):
                _run(jobs[i], scratch)
                if progress is not None:
                    with lock:
                        progress(jobs[i].stop - jobs[i].start)
        except BaseException as e:
            failed.append(e)

    if threads <= 1 or len(jobs) < 4:
        work()
    else:
        with ThreadPoolExecutor(threads, thread_name_prefix="ckpt-read") as pool:
            for future in [pool.submit(work) for _ in range(threads)]:
                future.result()
    if failed:
        raise failed[0]


def _run(job: _Job, scratch: Bytes) -> None:
    """One read call, then check and place each segment."""
    pack = job.pack
    into: list[memoryview] = []
    places: list[Bytes] = []
    at, used = job.start, 0
    for segment, fragment, lo, hi in job.parts:
        if lo > at:
            into.append(memoryview(np.empty(lo - at, np.uint8)))
        if segment.direct is not None and fragment.codec is None:
            place = segment.direct
        elif used + hi - lo <= len(scratch):
            place = scratch[used : used + hi - lo]
            used += -(-(hi - lo) // 64) * 64
        else:
            place = np.empty(hi - lo, np.uint8)
        into.append(memoryview(place))
        places.append(place)
        at = hi
    pack.backend.read(pack.path, job.start, into)
    for (segment, fragment, _, _), place in zip(job.parts, places, strict=True):
        _place(pack, segment, fragment, place)


def _place(pack: Pack, segment: Segment, fragment: StoredFragment, stored: Bytes) -> None:
    """Checks the blocks of a segment and brings their content to the target."""
    base = fragment.block + segment.first
    if fragment.codec is None:
        for k in range(segment.count):
            if crc32c(stored[k * BLOCK : (k + 1) * BLOCK]) != pack.crc[base + k]:
                raise pack.bad_block(fragment, segment.first + k)
        raw = stored
    else:
        raw = pack.decode(fragment, segment.first, segment.count, segment.nbytes, stored)
        if segment.direct is not None:
            segment.direct[:] = raw
    if segment.direct is not None:
        return
    assert segment.box is not None and segment.out is not None
    kind = dtype(pack.manifest.tensors[fragment.tensor].dtype)
    if len(segment.box.shape) == 1 and segment.out.ndim == 1:  # a run of elements, wherever it lies in the fragment
        start = segment.box.offset[0] * kind.itemsize - segment.first * BLOCK
        segment.out[...] = raw[start : start + segment.out.nbytes].view(kind.numpy)
        return
    lo, _ = _bounds(fragment.shape, segment.box, kind.itemsize)
    strides = [kind.itemsize] * len(fragment.shape)
    for d in range(len(fragment.shape) - 2, -1, -1):
        strides[d] = strides[d + 1] * fragment.shape[d + 1]
    segment.out[...] = np.ndarray(
        segment.box.shape, dtype=kind.numpy, buffer=memoryview(raw), offset=lo - segment.first * BLOCK, strides=strides
    )
