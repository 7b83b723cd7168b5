"""A backend around another one in which what can go wrong does, where a test says so. Waits for events, never sleeps."""

from __future__ import annotations

import fnmatch
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from ckpt.backends.base import Backend, Buffer, Entry, Upload
from ckpt.errors import CkptError, StorageError, UsageError

__all__ = ["Fault", "FaultyBackend"]

_VERBS = ("create", "new", "write", "finish", "read", "fetch", "size", "list", "delete")
_WRITING = ("create", "write")
_Bytes = TypeVar("_Bytes", bytes, Buffer)
_KINDS = ("error", "lost", "torn", "short", "delay")


@dataclass(frozen=True)
class Fault:
    """What happens at the `nth` call (0: at every call) of a verb on a path that the glob `path` matches.

    verb   one of the seven verbs of a backend, or "write" or "finish" of an upload
    what   error: nothing is done, and `error` (a StorageError by default) is raised
           lost:  it is done, but the answer is lost: the caller gets the error
           torn:  the first half of the bytes is written, and the caller gets the error
           short: the first half of the bytes is written, and the caller is told that all is well
           delay: it waits for `until`, then goes on
    """

    verb: str
    what: str
    path: str = "*"
    nth: int = 1
    error: CkptError | None = None
    until: threading.Event | None = None

    def __post_init__(self) -> None:
        if self.verb not in _VERBS or self.what not in _KINDS or self.nth < 0:
            raise UsageError(f"a fault is one of {_KINDS} at one of {_VERBS}, not {self.what!r} at {self.verb!r}")
        if self.what in ("torn", "short") and self.verb not in _WRITING:
            raise UsageError(f"{self.what!r} is for {_WRITING}, not for {self.verb!r}")
        if (self.what == "delay") != (self.until is not None):
            raise UsageError("a delay, and nothing else, needs an event to wait for")


class FaultyBackend:
    """`inner`, with faults. `calls`: (verb, path) of every call so far, in order."""

    def __init__(self, inner: Backend, faults: Sequence[Fault] = ()) -> None:
        self.inner, self.faults = inner, list(faults)
        self.root = inner.root
        self.calls: list[tuple[str, str]] = []
        self._lock = threading.Lock()

    def met(self, verb: str, path: str) -> Fault | None:
        """Counts a call; the first fault that it meets, if any. A delay is over when this returns."""
        found = None
        with self._lock:
            self.calls.append((verb, path))
            for fault in self.faults:
                if fault.verb == verb and fnmatch.fnmatchcase(path, fault.path):
                    n = sum(v == verb and fnmatch.fnmatchcase(p, fault.path) for v, p in self.calls)
                    if fault.nth in (0, n):
                        found = fault
                        break
        if found is not None and found.until is not None:
            found.until.wait()
            return None
        if found is not None and found.what == "error":
            raise _failure(found, path)
        return found

    def create(self, path: str, data: bytes) -> None:
        fault = self.met("create", path)
        self.inner.create(path, _half(fault, data))
        _answer(fault, path)

    def new(self, path: str, size: int) -> Upload:
        fault = self.met("new", path)
        upload = self.inner.new(path, size)
        if fault is not None:  # the caller never learns of it: it is left behind
            raise _failure(fault, path)
        return _FaultyUpload(self, path, upload)

    def read(self, path: str, offset: int, into: Sequence[Buffer]) -> None:
        fault = self.met("read", path)
        self.inner.read(path, offset, into)
        _answer(fault, path)

    def fetch(self, path: str, limit: int) -> bytes:
        fault = self.met("fetch", path)
        data = self.inner.fetch(path, limit)
        _answer(fault, path)
        return data

    def size(self, path: str) -> int:
        fault = self.met("size", path)
        size = self.inner.size(path)
        _answer(fault, path)
        return size

    def list(self, prefix: str) -> list[Entry]:
        fault = self.met("list", prefix)
        entries = self.inner.list(prefix)
        _answer(fault, prefix)
        return entries

    def delete(self, path: str) -> None:
        fault = self.met("delete", path)
        self.inner.delete(path)
        _answer(fault, path)

    def close(self) -> None:
        self.inner.close()


class _FaultyUpload:
    def __init__(self, backend: FaultyBackend, path: str, inner: Upload) -> None:
        self._backend, self._path, self._inner = backend, path, inner

    def write(self, offset: int, data: Buffer) -> None:
        fault = self._backend.met("write", self._path)
        self._inner.write(offset, _half(fault, data))
        _answer(fault, self._path)

    def finish(self, size: int | None = None) -> None:
        fault = self._backend.met("finish", self._path)
        self._inner.finish(size)
        _answer(fault, self._path)

    def abort(self) -> None:
        self._inner.abort()


def _failure(fault: Fault, path: str) -> CkptError:
    return fault.error or StorageError(f"{path}: a fault was planned here ({fault.what} at {fault.verb})")


def _half(fault: Fault | None, data: _Bytes) -> _Bytes:
    return data if fault is None or fault.what not in ("torn", "short") else data[: len(data) // 2]


def _answer(fault: Fault | None, path: str) -> None:
    if fault is not None and fault.what in ("lost", "torn"):
        raise _failure(fault, path)
