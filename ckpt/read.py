"""The reading of what `ckpt.ranges` found: ranges of packs -> checked bytes in place.

Every block that is touched is read whole and checked. What lies in the target as it does in the file is read right there,
with one call for what is next to one another, and checked while it is in the core's own cache; other bytes, and all that
come past the page cache, go by way of scratch memory.
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
from ckpt.backends.base import ReadsAhead, ReadsMany
from ckpt.backends.direct import PAGE, ReadOnce, memory_for_disks
from ckpt.format.codec import BLOCK, crc32c
from ckpt.format.dtypes import dtype
from ckpt.format.manifest import Manifest
from ckpt.ranges import SCRATCH, Segment, Target, bounds, plan_reads
from ckpt.stored import Pack, ReadStats, StoredFragment

__all__ = ["Segment", "Target", "plan_reads", "read_targets"]

Bytes = npt.NDArray[np.uint8]
_JOB = 2 << 20  # bytes of one read: few enough to be checked while still in a cache, and no more calls than needed
_PAST = (4 << 20) - BLOCK  # where it is one from the disk; with what is before it in its page it fits two huge pages
_RANGE = 8 << 20  # where it is a request over a network
_GAP = 64 << 10  # a smaller hole between two ranges is read rather than skipped
_MANY = 512  # parts of one read, at most


class _Part(NamedTuple):
    """A segment, or some blocks of one, as bytes [lo, hi) of a pack, from block `first` of the fragment on, which is `block`
    of the pack. `place`: where the stored bytes but the first `head` go, None for scratch memory."""

    segment: Segment
    lo: int
    hi: int
    first: int
    block: int
    head: int
    place: memoryview | None


@dataclass(slots=True)
class _Job:
    """One range of a pack: neighbouring parts, read with one call. `room`: bytes of the scratch memory by way of which jobs
    like this one are read past the page cache; for reads in place, what is not 0 is one request for just that."""

    pack: Pack
    room: int
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
    streams: int = 0,
    at_once: bool = False,
    progress: Callable[[int], None] | None = None,
    opened: dict[int, Pack] | None = None,
) -> ReadStats:
    """Fills all targets from the packs under `folder`. Returns what it took.

    `at_once`: that is all that will be read. Where a backend reads ahead, the plan then knows better: ranges of up to 8 MiB
    are asked for as they are, and nothing else; past the page cache, ranges of almost 4 MiB. `opened`: packs that a call
    before this one has opened, by index; afterwards those that this one needed.

    Uses `threads` threads with 4 MiB of scratch memory each, or 8 MiB then; past the page cache `streams`, if that is more.
    Raises IntegrityError naming file, block and tensor for the first bytes that are not what was written; the targets'
    content is then undefined.
    """
    stats = ReadStats(needed=sum([t.array.nbytes for t in targets]))
    plan = plan_reads(manifest, targets)
    far = at_once and isinstance(backend, ReadsAhead | ReadOnce)
    known = {} if opened is None else opened
    fresh = [index for index in sorted(plan) if index not in known]
    packs = {p.index: p for p in _open(backend, folder, manifest, fresh, stats, threads if far else 1)}
    packs |= {index: known[index] for index in plan if index in known}
    if opened is not None:
        opened.clear()
        opened.update(packs)
    jobs = itertools.chain.from_iterable(_jobs(packs[p], plan[p], _size(packs[p], at_once)) for p in sorted(packs))
    if any(_size(pack, at_once) == _PAST for pack in packs.values()):
        threads = max(threads, streams)
    few = stats.needed < 4 * _JOB
    together = _RANGE if isinstance(backend, ReadsMany) else 0
    stats.read += _run_all(jobs, together, 1 if few else threads, progress)
    return stats


def _size(pack: Pack, at_once: bool) -> int:
    """Bytes of one read of a pack."""
    if at_once and isinstance(pack.backend, ReadsAhead):
        return _RANGE
    return _PAST if at_once and isinstance(pack.backend, ReadOnce) and pack.backend.goes_past(pack.path) else _JOB


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
    for part in _parts(pack, segments, size):
        lo, hi = part.lo, part.hi
        if job is None or lo < job.stop or lo - job.stop > _GAP or hi - job.start > size or len(job.parts) == _MANY:
            if job is not None:
                yield job
            job = _Job(pack, size if size > _JOB else 0, lo, hi)
        job.parts.append(part)
        job.stop = hi
    if job is not None:
        yield job


def _parts(pack: Pack, segments: Sequence[Segment], size: int) -> Iterator[_Part]:
    """One part of each segment, or parts of one job each of a long one that is read in place."""
    m = pack.manifest
    rows = [segment.row for segment in segments]
    offsets, blocks = m.offset[rows].tolist(), m.block[rows].tolist()
    coded = m.codec[rows].tolist() if m.codec is not None else [0] * len(rows)
    for segment, offset, block, code in zip(segments, offsets, blocks, coded, strict=True):
        first, nbytes, place, head = segment.first, segment.nbytes, segment.direct, segment.skip
        block += first
        if code:
            starts = pack.starts(_fragment(pack, segment))
            assert starts is not None
            lo, hi = offset + int(starts[first]), offset + int(starts[first + segment.blocks])
            yield _Part(segment, lo, hi, first, block, 0, None)
            continue
        lo = offset + first * BLOCK
        if place is None or nbytes <= size:
            yield _Part(segment, lo, lo + nbytes, first, block, head, place)
            continue
        for at in range(0, nbytes, size):
            view, n = place[max(0, at - head) : at + size - head], at // BLOCK
            yield _Part(segment, lo + at, lo + min(at + size, nbytes), first + n, block + n, max(0, head - at), view)


def _fragment(pack: Pack, segment: Segment) -> StoredFragment:
    return pack.fragment(segment.row, segment.tensor, segment.shape)


def _some(jobs: Iterator[_Job], size: int) -> Iterator[_Job]:
    """The next ones, as many as have about `size` bytes, or one."""
    for job in jobs:
        yield job
        size -= job.stop - job.start
        if size <= 0:
            return


def _run_all(jobs: Iterator[_Job], together: int, threads: int, progress: Callable[[int], None] | None) -> int:
    """Runs all jobs, about `together` bytes of them at a time; they are made while others are read. Returns the bytes read."""
    failed: list[BaseException] = []
    total = 0
    lock = threading.Lock()

    def work() -> None:
        nonlocal total
        scratch = _Scratch()
        try:
            while not failed:
                with lock:
                    some = list(_some(jobs, together))
                if not some:
                    return
                if some[0].room and not isinstance(some[0].pack.backend, ReadsAhead):
                    _by_way(some[0], scratch)
                else:
                    _in_place(some, scratch)
                nbytes = sum(job.stop - job.start for job in some)
                with lock:
                    total += nbytes
                    if progress is not None:
                        progress(nbytes)
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


class _Scratch:
    """Memory for what is not read in place, of one thread; none is taken before it is needed."""

    def __init__(self) -> None:
        self._small: memoryview | None = None
        self._large: memoryview | None = None
        self._used = 0

    def begin(self) -> None:
        """What was taken before is not needed any more."""
        self._used = 0

    def take(self, size: int) -> memoryview:
        """Memory for some part of a job."""
        if self._small is None:
            self._small = memoryview(np.empty(SCRATCH, dtype=np.uint8))
        at = self._used
        if at + size > SCRATCH:
            return memoryview(np.empty(size, np.uint8))
        self._used = at + -(-size // 64) * 64
        return self._small[at : at + size]

    def like(self, job: _Job) -> memoryview:
        """Memory for a whole job, which lies in its page as the bytes do in theirs in the file."""
        size = job.stop - job.start
        if self._large is None or len(self._large) < size + PAGE:
            self._large = memory_for_disks(-(-(max(size, job.room) + PAGE) // BLOCK) * BLOCK)
        return self._large[job.start % PAGE :][:size]


def _in_place(jobs: Sequence[_Job], scratch: _Scratch) -> None:
    """One read call, if the backend has one for many jobs, each part to where it belongs; then each is checked."""
    scratch.begin()
    places = [_places(job, scratch) for job in jobs]
    backend = jobs[0].pack.backend
    if jobs[0].room and isinstance(backend, ReadsAhead):
        backend.read_just(jobs[0].pack.path, jobs[0].start, places[0][0])
    elif len(jobs) == 1:
        backend.read(jobs[0].pack.path, jobs[0].start, places[0][0])
    else:
        assert isinstance(backend, ReadsMany)
        wanted = [(job.pack.path, job.start, into) for job, (into, _) in zip(jobs, places, strict=True)]
        backend.read_many(wanted)
    for job, (_, read) in zip(jobs, places, strict=True):
        pack, expected = job.pack, job.pack.crc
        for part, there in zip(job.parts, read, strict=True):
            if isinstance(there, list):
                _check_pieces(pack, part, there)
            elif part.place is None:
                _put(pack, part, there)
            elif len(there) > BLOCK or crc32c(there) != expected[part.block]:
                _check(pack, part, there)


def _places(job: _Job, scratch: _Scratch) -> tuple[list[memoryview], list[memoryview | list[memoryview]]]:
    """Where the bytes of a job go, one after the other; and where those of each part of it are then."""
    into: list[memoryview] = []
    read: list[memoryview | list[memoryview]] = []
    at = job.start
    for _, lo, hi, _, _, head, place in job.parts:
        if lo > at:
            into.append(scratch.take(lo - at))
        at = hi
        if place is None:
            place = scratch.take(hi - lo)
        elif len(place) != hi - lo:
            views = [scratch.take(head)] if head else []
            views.append(place)
            if tail := hi - lo - head - len(place):
                views.append(scratch.take(tail))
            into += views
            read.append(views)
            continue
        into.append(place)
        read.append(place)
    return into, read


def _by_way(job: _Job, scratch: _Scratch) -> None:
    """One read past the page cache, into scratch memory and on from there, block by block."""
    pack, got = job.pack, scratch.like(job)
    pack.backend.read(pack.path, job.start, [got])
    for part in job.parts:
        stored = got[part.lo - job.start : part.hi - job.start]
        if part.place is None:
            _put(pack, part, stored)
            continue
        end = part.head + len(part.place)
        for k, at in enumerate(range(0, len(stored), BLOCK)):
            block = stored[at : at + BLOCK]
            if crc32c(block) != pack.crc[part.block + k]:
                pack.mend(_fragment(pack, part.segment), part.first + k, [block])
            a, b = max(at, part.head), min(at + len(block), end)
            if a < b:
                part.place[a - part.head : b - part.head] = stored[a:b]


def _check(pack: Pack, part: _Part, raw: memoryview) -> None:
    """Raises IntegrityError unless `raw` is what was written as the blocks of the part; a block that is not is mended in
    place where there is another way to it."""
    expected, block = pack.crc, part.block
    for k, at in enumerate(range(0, len(raw), BLOCK)):
        if crc32c(raw[at : at + BLOCK]) != expected[block + k]:
            pack.mend(_fragment(pack, part.segment), part.first + k, [raw[at : at + BLOCK]])


def _check_pieces(pack: Pack, part: _Part, views: Sequence[memoryview]) -> None:
    """The same for bytes that lie here and there."""
    value = filled = k = 0
    pieces: list[memoryview] = []
    left = part.hi - part.lo
    for view in views:
        at = 0
        while at < len(view):
            piece = view[at : at + BLOCK - filled]
            value = crc32c(piece, value)
            pieces.append(piece)
            at, filled, left = at + len(piece), filled + len(piece), left - len(piece)
            if filled == BLOCK or not left:
                if value != pack.crc[part.block + k]:
                    pack.mend(_fragment(pack, part.segment), part.first + k, pieces)
                value, filled, k, pieces = 0, 0, k + 1, []


def _put(pack: Pack, part: _Part, stored: memoryview) -> None:
    """Brings what was read into scratch memory to its target, once it was checked."""
    segment, fragment = part.segment, _fragment(pack, part.segment)
    raw: Bytes = np.frombuffer(stored, dtype=np.uint8)
    if fragment.codec is None:
        _check(pack, part, stored)
    else:
        raw = pack.decode(fragment, segment.first, segment.blocks, segment.nbytes, raw)
        if segment.direct is not None:
            segment.direct[:] = memoryview(raw)[segment.skip : segment.skip + len(segment.direct)]
            return
    assert segment.box is not None and segment.out is not None
    kind = dtype(pack.manifest.tensors[fragment.tensor].dtype)
    lo, _ = bounds(fragment.shape, segment.box, kind.itemsize)
    strides = [kind.itemsize] * len(fragment.shape)
    for d in range(len(fragment.shape) - 2, -1, -1):
        strides[d] = strides[d + 1] * fragment.shape[d + 1]
    segment.out[...] = np.ndarray(
        segment.box.shape, dtype=kind.numpy, buffer=memoryview(raw), offset=lo - segment.first * BLOCK, strides=strides
    )
