"""Reads that go past the page cache, for files that are not in it.

Memory for the page cache comes dear where it was not used before: reading 1.6 GB by way of it took three to nine times
the processor time of direct reads on the machines that this was written on. What several readers of a host need is
still better read once into the cache, and what is cached already is read from there.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Sequence

from ckpt.backends.base import Buffer
from ckpt.backends.local import LocalBackend, storage_errors
from ckpt.errors import IntegrityError

__all__ = ["DirectReads", "past_cache"]

_PAGE = 4096
_MOST = 4 << 20  # bytes of one read
_CACHESTAT = 451  # Linux 6.5; the number is the same everywhere
_libc = ctypes.CDLL(None, use_errno=True)


def past_cache(backend: object, paths: Sequence[str]) -> DirectReads | None:
    """A backend that reads these files past the page cache, if most of their bytes are not in it; None if they are, if
    that cannot be told, or if the backend has no page cache."""
    if type(backend) is not LocalBackend or not backend.direct:
        return None
    cached = total = 0
    try:
        for path in paths:
            with storage_errors("reading", path):
                fd = os.open(os.path.join(backend.root, path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                found = _cached(fd)
                if found is None:
                    return None
                cached, total = cached + found, total + os.fstat(fd).st_size
            finally:
                os.close(fd)
    except Exception:  # whoever reads them will say what is wrong
        return None
    return DirectReads(backend.root) if 2 * cached < total else None


def _cached(fd: int) -> int | None:
    """Bytes of a file that are in the page cache; None if this kernel does not say."""
    span, found = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
    if _libc.syscall(_CACHESTAT, fd, span, found, 0) != 0:
        return None
    return int(found[0]) * mmap.PAGESIZE


class DirectReads(LocalBackend):
    """Files below `root`, read with O_DIRECT by way of aligned memory of each thread, where their filesystem has it."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self._mine = threading.local()
        self._opened = threading.Lock()
        self._fds: dict[str, int] = {}  # -1: not with O_DIRECT

    def read(self, path: str, offset: int, into: Sequence[Buffer]) -> None:
        fd = self._direct_fd(path)
        views = [v for v in into if len(v)]
        if fd < 0 or not views:
            super().read(path, offset, into)
            return
        end = offset + sum(len(v) for v in views)
        with storage_errors("reading", f"{self.root}/{path}"):
            try:
                while offset < end:
                    stop = min(end, offset // _PAGE * _PAGE + _MOST)
                    self._read(fd, offset, stop, views, path)
                    offset = stop
            except OSError as e:
                if e.errno != errno.EINVAL:
                    raise
                super().read(path, offset, views)  # this filesystem lets it be opened so, but not read

    def _read(self, fd: int, start: int, stop: int, views: list[Buffer], path: str) -> None:
        """Bytes start to stop, of which the first go into the first of `views`; those that are full are taken out."""
        first = start // _PAGE * _PAGE
        scratch, got = self._scratch(), 0
        wanted = -(-(stop - first) // _PAGE) * _PAGE
        while got < stop - first:
            n = os.preadv(fd, [scratch[got:wanted]], first + got)
            if n == 0 or (n % _PAGE and got + n < stop - first):
                raise IntegrityError(
                    f"{self.root}/{path}: ends at byte {first + got + n}, before its checkpoint says; it was cut short"
                )
            got += n
        at = start - first
        while at < stop - first:
            n = min(len(views[0]), stop - first - at)
            views[0][:n] = scratch[at : at + n]
            at += n
            views[0] = views[0][n:]
            if not len(views[0]):
                views.pop(0)

    def _scratch(self) -> memoryview:
        if not hasattr(self._mine, "scratch"):
            self._mine.scratch = memoryview(mmap.mmap(-1, _MOST))
        scratch: memoryview = self._mine.scratch
        return scratch

    def _direct_fd(self, path: str) -> int:
        with self._opened:
            if path not in self._fds:
                try:
                    fd = os.open(self._at(path), os.O_RDONLY | os.O_NONBLOCK | os.O_DIRECT | os.O_CLOEXEC)
                except OSError:  # not every filesystem has it; or it is not there, as the other way to read it will say
                    fd = -1
                self._fds[path] = fd
            return self._fds[path]

    def delete(self, path: str) -> None:
        self._let_go([path])
        super().delete(path)

    def close(self) -> None:
        super().close()
        self._let_go(list(self._fds))

    def _let_go(self, paths: Sequence[str]) -> None:
        """Closes descriptors; nobody is reading."""
        with self._opened:
            for fd in [self._fds.pop(p, -1) for p in paths]:
                if fd >= 0:
                    os.close(fd)
