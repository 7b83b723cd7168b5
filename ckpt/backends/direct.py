"""Reads of files once, past the page cache: for those who go through many large files and come back to none.

Memory for the page cache costs more processor time than the reading where it was not in use before: 5.4 GB took 7 to 11
seconds by way of it, 0.4 without. What is cached already is read from there.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress

from ckpt.backends.base import Backend, Buffer
from ckpt.backends.local import LocalBackend
from ckpt.errors import CkptError

__all__ = ["PAGE", "ReadOnce", "memory_for_disks", "read_once"]

PAGE = 4096
"""Bytes go straight to where they belong if address and place in the file are the same modulo this."""

_LARGE = 64 << 10  # bytes that are worth a read of their own
_SCRATCH = 2 << 20
_HUGE = 2 << 20
_SAMPLE, _SAMPLES = 1 << 20, 32  # bytes of a file that are looked at for pages in the cache, and how many times at most
_CACHESTAT = 451  # Linux 6.5; the number is the same everywhere
_libc = ctypes.CDLL(None, use_errno=True)


def read_once(backend: Backend) -> Backend:
    """The backend to read large files from that are needed once: another one where that is quicker, else the same."""
    if type(backend) is LocalBackend and backend.direct:
        return ReadOnce(backend.root)
    return backend


class ReadOnce(LocalBackend):
    """Files below `root`, read with O_DIRECT where their filesystem has it and most of a file is not in the page cache."""

    _flags = os.O_DIRECT

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self._cached = LocalBackend(root)
        self._mine = threading.local()
        self._past: dict[str, bool] = {}  # file -> whether it is read past the cache

    def goes_past(self, path: str) -> bool:
        """Whether a file is read past the cache. Says the same of it from then on, unless that turns out not to work."""
        past = self._past.get(path)
        if past is None:
            past = self._past[path] = _cold(os.path.join(self.root, path))
        return past

    def read(self, path: str, offset: int, into: Sequence[Buffer]) -> None:
        if self.goes_past(path) and any(len(v) for v in into):
            try:
                if self._read(path, offset, into):
                    return
            except OSError as e:
                if e.errno == errno.EINVAL:  # this filesystem lets files be opened so, but not read
                    self._past[path] = False
            except CkptError:
                pass
        self._cached.read(path, offset, into)  # which also says what is wrong

    def close(self) -> None:
        super().close()
        self._cached.close()

    def _read(self, path: str, offset: int, into: Sequence[Buffer]) -> bool:
        """Whether the buffers are full."""
        file = self._open(path, self._at(path))
        return all(
            self._in_place(file.fd, at, views[0]) if alike else self._by_way(file.fd, at, views)
            for at, views, alike in _calls(offset, into)
        )

    def _in_place(self, fd: int, offset: int, view: Buffer) -> bool:
        """Whole pages go where they belong, what is before and after them by way of a page of scratch memory."""
        head = min(-offset % PAGE, len(view))
        tail = (offset + len(view)) % PAGE if head < len(view) else 0
        middle = view[head : len(view) - tail]
        scratch = self._scratch()
        parts = [scratch[:PAGE]] * bool(head) + [middle] + [scratch[PAGE : 2 * PAGE]] * bool(tail)
        before = PAGE if head else 0
        got = os.preadv(fd, parts, offset + head - before)
        if got < before + len(middle) + tail:
            return False
        view[:head] = scratch[PAGE - head : PAGE] if head else b""
        view[len(view) - tail :] = scratch[PAGE : PAGE + tail]
        return True

    def _by_way(self, fd: int, offset: int, into: Sequence[Buffer]) -> bool:
        """Up to two mebibytes by way of scratch memory."""
        first, end = offset // PAGE * PAGE, offset + sum(len(v) for v in into)
        scratch = self._scratch()[: -(-end // PAGE) * PAGE - first]
        if os.preadv(fd, [scratch], first) < end - first:
            return False
        for view in into:
            view[:] = scratch[offset - first : offset - first + len(view)]
            offset += len(view)
        return True

    def _scratch(self) -> memoryview:
        if not hasattr(self._mine, "scratch"):
            self._mine.scratch = memoryview(mmap.mmap(-1, _SCRATCH + 2 * PAGE))
        scratch: memoryview = self._mine.scratch
        return scratch


def memory_for_disks(size: int) -> memoryview:
    """Page-aligned memory, in huge pages where there are any: a disk is asked for at most some 256 pieces of memory at once,
    and of pages that a process was given just now no two lie next to one another."""
    whole = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):
        whole.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(whole)
    return view[-_address(view) % _HUGE :][:size]


def _calls(offset: int, into: Sequence[Buffer]) -> Iterator[tuple[int, list[Buffer], bool]]:
    """What is read with one call each: (offset, buffers, whether in place). Large ones that lie alike by themselves, others
    together, as much as fits the scratch memory."""
    some: list[Buffer] = []
    first = at = offset
    for view in into:
        if len(view) >= _LARGE and (_address(view) - at) % PAGE == 0:
            if some:
                yield first, some, False
            yield at, [view], True
            at += len(view)
            first, some = at, []
            continue
        for k in range(0, len(view), _LARGE):
            some.append(view[k : k + _LARGE])
            at += len(some[-1])
            if at - first > _SCRATCH - _LARGE:
                yield first, some, False
                first, some = at, []
    if some:
        yield first, some, False


def _address(view: Buffer) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view)) if len(view) else 0


def _cold(full: str) -> bool:
    """Whether less than half of a file is in the page cache; no where that cannot be told."""
    try:
        fd = os.open(full, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        size, cached = os.fstat(fd).st_size, 0
        every = max(_SAMPLE, size // _SAMPLES)  # counting the pages of a large file takes a while
        for at in range(0, size, every):
            span, found = (ctypes.c_uint64 * 2)(at, _SAMPLE), (ctypes.c_uint64 * 5)()
            if _libc.syscall(_CACHESTAT, fd, span, found, 0) != 0:
                return False
            cached += int(found[0]) * mmap.PAGESIZE
        return cached * 2 < size * _SAMPLE // every
    finally:
        os.close(fd)
