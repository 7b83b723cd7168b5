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
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ckpt.backends import Backend
from ckpt.backends.base import ReadsAhead
from ckpt.errors import FormatError
from ckpt.format.codec import BLOCK, n_blocks
from ckpt.format.dtypes import dtype
from ckpt.format.fragment import Box, contiguous_span
from ckpt.format.manifest import Manifest
from ckpt.stored import Pack, ReadStats, StoredFragment

__all__ = ["Segment", "Target", "plan_reads", "read_targets"]

Bytes = npt.NDArray[np.uint8]
_JOB = 1 << 20  # bytes of one read: few enough to be checked while still in the core's own cache
_RANGE = 8 << 20  # where a read is a request over a network
_SCRATCH = 4 << 20
_GAP = 64 << 10  # a smaller hole between two ranges is read rather than skipped


@dataclass(frozen=True)
class Target:
    """Where a box of a stored tensor is to go: `array` has the box's shape and the dtype's numpy type."""

    tensor: int
    box: Box
    array: npt.NDArray[np.generic]


class Segment(NamedTuple):
    """Blocks [first, first+count) of one stored fragment and what to do with their raw bytes.

    The fragment is row `row` of the manifest and has `shape`. `direct`: bytes of the target to which they go as they
    are. Otherwise they are read into scratch memory and `box` (relative to the fragment) is copied to `out`.
    """

    row: int
    tensor: int
    shape: tuple[int, ...]
    first: int
    blocks: int
    nbytes: int
    direct: memoryview | None
    box: Box | None = None
    out: npt.NDArray[np.generic] | None = None


def plan_reads(manifest: Manifest, targets: Sequence[Target]) -> dict[int, list[Segment]]:
    """Pack -> segments, in file order. Raises FormatError if a target is not fully covered by stored fragments."""
    found: list[tuple[int, Segment]] = []
    for target in targets:
        t, box, array = target.tensor, target.box, target.array
        if not array.size:
            continue
        row = manifest.find_box(t, box) if array.flags.c_contiguous else None
        if row is not None:
            found.append((row, Segment(row, t, box.shape, 0, n_blocks(array.nbytes), array.nbytes, _raw(array))))
        else:
            found.extend((segment.row, segment) for segment in _partly(manifest, target))
    rows = np.array([row for row, _ in found], dtype=np.int64)
    first = np.array([segment.first for _, segment in found], dtype=np.int64)
    pack = manifest.pack[rows]
    order = np.lexsort((first, manifest.offset[rows], pack))
    out: dict[int, list[Segment]] = {}
    for k, p in zip(order.tolist(), pack[order].tolist(), strict=True):
        out.setdefault(p, []).append(found[k][1])
    return out


def _raw(array: npt.NDArray[np.generic]) -> memoryview:
    """The bytes of a contiguous array."""
    return memoryview(array.reshape(-1).view(np.uint8))


def _partly(manifest: Manifest, target: Target) -> Iterator[Segment]:
    """The segments of a target that is not one stored fragment."""
    box, array = target.box, target.array
    spec, found = manifest.tensors[target.tensor], 0
    base, item = int(manifest.start[target.tensor]), dtype(spec.dtype).itemsize
    memory = _raw(array) if array.flags.c_contiguous else None
    row = array.nbytes // box.shape[0] if box.shape else 0
    for k, stored in _touching(manifest, target.tensor, box):
        if memory is not None and stored.offset[1:] == box.offset[1:] and stored.shape[1:] == box.shape[1:]:
            # Whole rows of the same width, one run on both sides: what resharding along the first axis comes down to.
            lo = max(stored.offset[0], box.offset[0])
            hi = min(stored.offset[0] + stored.shape[0], box.offset[0] + box.shape[0])
            if lo < hi:
                found += (hi - lo) * row // item
                first, n, at = (lo - stored.offset[0]) * row, (hi - lo) * row, (lo - box.offset[0]) * row
                yield from _runs(base + k, target, stored, first, n, at, item, memory)
            continue
        common = stored & box
        if common is not None:
            found += common.numel
            yield from _segments(base + k, stored, common, target, item, memory)
    if found != box.numel:
        raise FormatError(f"tensor {spec.key!r}: the manifest holds {found} of the {box.numel} elements of {box}")


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


def _segments(
    row: int, stored: Box, common: Box, target: Target, item: int, memory: memoryview | None
) -> Iterator[Segment]:
    inside, there = common.relative_to(stored), common.relative_to(target.box)
    total = stored.numel * item
    source = contiguous_span(stored.shape, inside)
    place = contiguous_span(target.box.shape, there)
    if memory is not None and source is not None and place is not None:
        yield from _runs(row, target, stored, source[0] * item, source[1] * item, place[0] * item, item, memory)
        return
    out = target.array[there.slices]
    for slab in _slabs(stored.shape, inside, item):
        lo, hi = _bounds(stored.shape, slab, item)
        first, count, nbytes = _blocks(lo, hi, total)
        yield Segment(
            row, target.tensor, stored.shape, first, count, nbytes, None, slab, out[slab.relative_to(inside).slices]
        )


def _runs(
    row: int, target: Target, stored: Box, lo: int, n: int, at: int, item: int, memory: memoryview
) -> Iterator[Segment]:
    """Bytes [lo, lo+n) of a fragment, one run in the target too, from its byte `at`: whole blocks in place, the edges
    through scratch."""
    total = stored.numel * item
    hi = lo + n
    inner_lo = min(-(-lo // BLOCK) * BLOCK, hi)
    inner_hi = hi if hi == total else max(hi // BLOCK * BLOCK, inner_lo)
    if inner_lo < inner_hi:
        first, count, nbytes = _blocks(inner_lo, inner_hi, total)
        direct = memory[at + inner_lo - lo : at + inner_hi - lo]
        yield Segment(row, target.tensor, stored.shape, first, count, nbytes, direct)
    for a, b in ((lo, inner_lo), (inner_hi, hi)):
        if a < b:
            first, count, nbytes = _blocks(a, b, total)
            view = target.array.reshape(-1)[(at + a - lo) // item : (at + b - lo) // item]
            box = Box((a // item,), ((b - a) // item,))
            yield Segment(row, target.tensor, stored.shape, first, count, nbytes, None, box, view)


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


class _Part(NamedTuple):
    """A segment, or some blocks of one, as bytes [lo, hi) of a pack. `place`: where the stored bytes go, None for
    scratch memory."""

    segment: Segment
    fragment: StoredFragment
    first: int
    lo: int
    hi: int
    place: memoryview | None


@dataclass(slots=True)
class _Job:
    """One range of a pack: neighbouring parts, read with one call."""

    pack: Pack
    start: int
    stop: int
    parts: list[_Part] = field(default_factory=list)


def read_targets(
    backend: Backend,
    folder: str,
    manifest: Manifest,
    targets: Sequence[Target],
    *,
    threads: int = 2,
    at_once: bool = False,
    progress: Callable[[int], None] | None = None,
    opened: dict[int, Pack] | None = None,
) -> ReadStats:
    """Fills all targets from the packs under `folder`. Returns what it took.

    `at_once`: that is all that will be read. Where a backend reads ahead, the plan then knows better: ranges of up to 8 MiB
    are asked for as they are, and nothing else. `opened`: packs that a call before this one has opened, by index; afterwards
    those that this one needed.

    Uses `threads` threads with 4 MiB of scratch memory each, or 8 MiB then. Raises IntegrityError naming file, block and tensor
    for the first bytes that are not what was written; the targets' content is then undefined.
    """
    stats = ReadStats(needed=sum(t.array.nbytes for t in targets))
    plan = plan_reads(manifest, targets)
    far = at_once and isinstance(backend, ReadsAhead)
    known = {} if opened is None else opened
    fresh = [index for index in sorted(plan) if index not in known]
    packs = {p.index: p for p in _open(backend, folder, manifest, fresh, stats, threads if far else 1)}
    packs |= {index: known[index] for index in plan if index in known}
    if opened is not None:
        opened.clear()
        opened.update(packs)
    size = _RANGE if far else _JOB
    jobs = itertools.chain.from_iterable(_jobs(packs[index], plan[index], size) for index in sorted(packs))
    few = stats.needed < 4 * _JOB
    stats.read += _run_all(jobs, 1 if few else threads, _ask if far else _run, size if far else _SCRATCH, progress)
    return stats


def _open(
    backend: Backend, folder: str, manifest: Manifest, indices: Sequence[int], stats: ReadStats, threads: int
) -> list[Pack]:
    """The packs, several at a time where that takes requests, and then as few as will do."""
    if threads == 1 or len(indices) < 2:
        return [Pack(backend, folder, manifest, index, stats, lean=threads > 1) for index in indices]
    each = [ReadStats() for _ in indices]
    with ThreadPoolExecutor(threads, thread_name_prefix="ckpt-open") as pool:
        packs = list(
            pool.map(lambda at: Pack(backend, folder, manifest, at[0], at[1], True), zip(indices, each, strict=True))
        )
    stats.read += sum(s.read for s in each)
    return packs


def _jobs(pack: Pack, segments: Sequence[Segment], size: int) -> Iterator[_Job]:
    """Joins neighbouring segments into ranges of about `size` bytes; cuts long ones at blocks."""
    job: _Job | None = None
    fragment: StoredFragment | None = None
    row = -1
    for segment in segments:
        if segment.row != row or fragment is None:
            row = segment.row
            fragment = pack.fragment(row, segment.tensor, segment.shape)
        for part in _parts(pack, segment, fragment, size):
            lo, hi = part.lo, part.hi
            if job is None or lo < job.stop or lo - job.stop > _GAP or hi - job.start > size:
                if job is not None:
                    yield job
                job = _Job(pack, lo, hi)
            job.parts.append(part)
            job.stop = hi
    if job is not None:
        yield job


def _parts(pack: Pack, segment: Segment, fragment: StoredFragment, size: int) -> Iterator[_Part]:
    """One part, or parts of one job each of a long segment whose stored bytes are read in place."""
    first, at = segment.first, fragment.offset
    if fragment.codec is not None:
        starts = pack.starts(fragment)
        assert starts is not None
        yield _Part(segment, fragment, first, at + int(starts[first]), at + int(starts[first + segment.blocks]), None)
        return
    at += first * BLOCK
    place = segment.direct
    if place is None or segment.nbytes <= size:
        yield _Part(segment, fragment, first, at, at + segment.nbytes, place)
        return
    for k in range(0, segment.nbytes, size):
        view = place[k : k + size]
        yield _Part(segment, fragment, first + k // BLOCK, at + k, at + k + len(view), view)


def _run_all(
    jobs: Iterator[_Job],
    threads: int,
    run: Callable[[_Job, memoryview], None],
    scratch_size: int,
    progress: Callable[[int], None] | None,
) -> int:
    """Runs all jobs; each is made while others are read. Returns the bytes read."""
    failed: list[BaseException] = []
    total = 0
    lock = threading.Lock()

    def work() -> None:
        nonlocal total
        try:
            scratch = memoryview(np.empty(scratch_size, dtype=np.uint8))
            while not failed:
                with lock:
                    job = next(jobs, None)
                if job is None:
                    return
                run(job, scratch)
                with lock:
                    total += job.stop - job.start
                    if progress is not None:
                        progress(job.stop - job.start)
        except BaseException as e:
            failed.append(e)

    others = [threading.Thread(target=work, name=f"ckpt-read-{k}") for k in range(1, threads)]
    for thread in others:
        thread.start()
    work()
    for thread in others:
        thread.join()
    if failed:
        raise failed[0]
    return total


def _run(job: _Job, scratch: memoryview) -> None:
    """One read call, then check and place each part."""
    pack, first = job.pack, job.parts[0]
    if first.place is not None and len(job.parts) == 1:
        pack.backend.read(pack.path, job.start, [first.place])
        pack.check(first.fragment, first.first, first.place)
        return
    into: list[memoryview] = []
    read: list[tuple[_Part, memoryview]] = []
    at, used = job.start, 0
    for part in job.parts:
        size, place = part.hi - part.lo, part.place
        if part.lo > at:
            into.append(memoryview(bytearray(part.lo - at)))
        if place is None:
            if used + size <= len(scratch):
                place = scratch[used : used + size]
                used += -(-size // 64) * 64
            else:
                place = memoryview(np.empty(size, np.uint8))
        into.append(place)
        read.append((part, place))
        at = part.hi
    pack.backend.read(pack.path, job.start, into)
    for part, place in read:
        if part.fragment.codec is None:
            pack.check(part.fragment, part.first, place)
        if part.place is None:
            _put(pack, part, place)


def _ask(job: _Job, scratch: memoryview) -> None:
    """The same with one request: into the target if that is all of it, else into scratch memory and on from there."""
    pack, first = job.pack, job.parts[0]
    if first.place is not None and len(job.parts) == 1:
        _request(pack, job.start, first.place)
        pack.check(first.fragment, first.first, first.place)
        return
    size = job.stop - job.start
    got = scratch[:size] if size <= len(scratch) else memoryview(np.empty(size, np.uint8))
    _request(pack, job.start, got)
    for part in job.parts:
        stored = got[part.lo - job.start : part.hi - job.start]
        if part.fragment.codec is None:
            pack.check(part.fragment, part.first, stored)
        if part.place is None:
            _put(pack, part, stored)
        else:
            part.place[:] = stored


def _request(pack: Pack, offset: int, into: memoryview) -> None:
    assert isinstance(pack.backend, ReadsAhead)
    pack.backend.read_just(pack.path, offset, into)


def _put(pack: Pack, part: _Part, stored: memoryview) -> None:
    """Brings what was read into scratch memory to its target."""
    segment, fragment = part.segment, part.fragment
    raw: Bytes = np.frombuffer(stored, dtype=np.uint8)
    if fragment.codec is not None:
        raw = pack.decode(fragment, segment.first, segment.blocks, segment.nbytes, raw)
        if segment.direct is not None:
            segment.direct[:] = memoryview(raw)
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
