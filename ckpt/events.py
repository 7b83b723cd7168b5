"""What happened to every snapshot and save, as rows: kept in the run as JSON lines, told to one callback, drawn by
`ckpt report`."""

from __future__ import annotations

import ctypes
import fcntl
import json
import logging
import mmap
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields

from ckpt.backends import Backend
from ckpt.errors import CkptError

__all__ = ["Event", "Events", "encode_rows", "last_rows", "object_name", "read_events"]

log = logging.getLogger("ckpt")
_NAME = re.compile(r"g(\d{4,9})-.*\.jsonl", re.ASCII)
_MAX = 256 << 20
_ROWS, _SECONDS = 1000, 60.0
_TAIL, _HEAD = 512 << 10, 256  # bytes of a tail: in all, before its rows


@dataclass(frozen=True)
class Event:
    """One thing that happened on one rank. Seconds, bytes; what does not apply is 0 or "".

    kind        "snapshot": a step went into memory · "save": a step went to storage · "skip": a step was due and was not
                taken · "restore": a state was loaded · "protect": a step in memory outlives the loss of hosts
    time        Unix time at which it began
    outcome     of a snapshot: "sealed", "voided", "failed"; of a save: "committed", "failed"; of a restore: its source,
                "memory" or "storage"
    why         the reason of a skip, a void or a failure; of the first step that is protected after a restart from memory,
                how long that took
    steps       training steps since this rank's last row, this one included, and `loop`, the seconds they took
    stall       seconds that the training thread spent in `step`; `eager` of them copying
    lazy        seconds that copying took beside training; `fence`: that the optimizer waited for it since the last row
    encode      seconds of compression, `write` of writing this rank's pack, `commit` from then until it was committed
    lag         of a step that is protected: seconds from when it was complete
    bytes       of this rank's pack, or read by it
    """

    kind: str
    rank: int
    step: int
    generation: int
    time: float
    host: str = ""
    outcome: str = ""
    why: str = ""
    steps: int = 0
    loop: float = 0.0
    stall: float = 0.0
    eager: float = 0.0
    lazy: float = 0.0
    fence: float = 0.0
    encode: float = 0.0
    write: float = 0.0
    commit: float = 0.0
    lag: float = 0.0
    bytes: int = 0


class Events:
    """The events of one rank: told to a callback as they happen, written to the run when asked to. Threads may share it.

    At most `limit` rows wait to be written; older ones are dropped, since a log must not outgrow what it tells about.
    """

    def __init__(self, name: str, callback: Callable[[Event], None] | None = None, limit: int = 20_000) -> None:
        self._name, self._callback = name, callback
        self._waiting: deque[bytes] = deque(maxlen=limit)
        self._written = time.monotonic()
        self._lock = threading.Lock()
        self._tail: _Tail | None = None

    def outlive(self) -> int:
        """From now on what waits is also in memory that whoever holds this descriptor can read after this process has
        died, with `last_rows`; -1 if there is none to be had."""
        with self._lock, suppress(OSError, ValueError):
            self._tail = self._tail or _Tail()
        return -1 if self._tail is None else self._tail.fd

    def add(self, event: Event) -> None:
        row = encode_rows([event])
        with self._lock:
            self._waiting.append(row)
            if self._tail is not None and not self._tail.put(row, object_name(event.generation, self._name)):
                self._tail.refill(self._waiting, object_name(event.generation, self._name))
        if self._callback is not None:
            try:
                self._callback(event)
            except Exception as e:
                log.error("ckpt: the callback for events failed, training goes on: %s", e, exc_info=e)

    @property
    def due(self) -> bool:
        """Whether enough has come together to be written."""
        return len(self._waiting) >= _ROWS or time.monotonic() - self._written >= _SECONDS

    def write(self, backend: Backend, generation: int) -> None:
        """Writes what waits as one object of the run; a failure is logged, not raised."""
        self._written = time.monotonic()
        with self._lock:
            rows = list(self._waiting)
            self._waiting.clear()
            name = (self._tail.name if self._tail is not None else "") or object_name(generation, self._name)
        if not rows:
            return
        try:
            backend.create(name, b"".join(rows))
        except CkptError as e:
            log.error("ckpt: %d events were not written: %s", len(rows), e)
        with self._lock:
            if self._tail is not None:
                self._tail.refill(self._waiting, object_name(generation, self._name))

    def close(self) -> None:
        """Nothing outlives this process any more."""
        with self._lock:
            if self._tail is not None:
                self._tail.close()
            self._tail = None


class _Tail:
    """Rows that are not in the run yet, in a memfd: how many bytes, the name of the object that they are to be, the rows.

    A row counts once the number says so, which is one store: one that was cut short is not there. The name goes with them,
    so that rows are written once, whoever does it.
    """

    def __init__(self) -> None:
        self.fd = os.memfd_create("events", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(self.fd, 0, _TAIL)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self._map = mmap.mmap(self.fd, _TAIL)
        except BaseException:
            os.close(self.fd)
            raise
        self._bytes = ctypes.c_uint64.from_buffer(self._map)
        self.name = ""

    def close(self) -> None:
        os.close(self.fd)
        del self._bytes
        self._map.close()

    def put(self, row: bytes, name: str) -> bool:
        """Adds a row; the first one says what all are to be called. False if there is no room."""
        at = self._bytes.value
        if _HEAD + at + len(row) > _TAIL:
            return False
        if not at:
            self.name = name
            self._map[8:_HEAD] = name.encode()[: _HEAD - 8].ljust(_HEAD - 8, b"\0")
        self._map[_HEAD + at : _HEAD + at + len(row)] = row
        self._bytes.value = at + len(row)
        return True

    def refill(self, rows: Iterable[bytes], name: str) -> None:
        """Holds these rows and no others; the newest of them, if they are many."""
        self._bytes.value, self.name = 0, ""
        kept, room = list(rows), (_TAIL - _HEAD) // 2
        while kept and sum(map(len, kept[-_ROWS:])) > room:
            kept = kept[-_ROWS:][len(kept[-_ROWS:]) // 2 + 1 :]
        for row in kept[-_ROWS:]:
            self.put(row, name)


def last_rows(fd: int) -> tuple[str, bytes]:
    """(name, content) of the object that a process which has died would have written; no name if there is nothing."""
    head = os.pread(fd, _HEAD, 0)
    n, name = int.from_bytes(head[:8], "little"), head[8:].rstrip(b"\0").decode(errors="replace")
    rows = os.pread(fd, min(n, _TAIL), _HEAD)
    known = name.startswith("events/") and _NAME.fullmatch(name.removeprefix("events/")) and "/" not in name[7:]
    return (name, rows) if rows and known else ("", b"")


def object_name(generation: int, name: str) -> str:
    """Of an object with events, in a run."""
    return f"events/g{generation:04d}-{name}-{time.time_ns():x}.jsonl"


def encode_rows(events: Iterable[Event]) -> bytes:
    """As JSON lines; what is 0 or empty is left out."""
    return "".join(json.dumps(_row(e), separators=(",", ":")) + "\n" for e in events).encode()


def _row(event: Event) -> dict[str, object]:
    always = ("rank", "step", "generation")
    row = {k: v for k, v in vars(event).items() if v not in (0, "") or k in always}
    return {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}


def read_events(backend: Backend) -> Iterator[Event]:
    """All events of a run, object by object; what cannot be read is passed over: events are advice, not state."""
    known = {f.name: f.type for f in fields(Event)}
    for entry in backend.list("events"):
        if not _NAME.fullmatch(entry.name):
            continue
        with suppress(CkptError):
            for line in backend.fetch(f"events/{entry.name}", _MAX).splitlines():
                with suppress(ValueError, TypeError, AttributeError, OverflowError, RecursionError):
                    row = json.loads(line)
                    cast = {"int": int, "float": float, "str": str}
                    yield Event(**{k: cast[str(known[k])](v) for k, v in row.items() if k in known})
