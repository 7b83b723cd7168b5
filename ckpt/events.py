"""What happened to every snapshot and save, as rows: kept in the run as JSON lines, told to one callback, drawn by
`ckpt report`."""

from __future__ import annotations

import json
import logging
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields

from ckpt.backends import Backend
from ckpt.errors import CkptError

__all__ = ["Event", "Events", "read_events"]

log = logging.getLogger("ckpt")
_NAME = re.compile(r"g(\d{4,9})-.*\.jsonl", re.ASCII)
_MAX = 256 << 20
_ROWS, _SECONDS = 1000, 60.0


@dataclass(frozen=True)
class Event:
    """One thing that happened on one rank. Seconds, bytes; what does not apply is 0 or "".

    kind        "snapshot": a step went into memory · "save": a step went to storage · "skip": a step was due and was not
                taken · "restore": a state was loaded · "protect": a step in memory outlives the loss of hosts
    time        Unix time at which it began
    outcome     of a snapshot: "sealed", "voided", "failed"; of a save: "committed", "failed"; of a restore: its source,
                "memory" or "storage"
    why         the reason of a skip, a void or a failure
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
        self._waiting: deque[Event] = deque(maxlen=limit)
        self._written = time.monotonic()

    def add(self, event: Event) -> None:
        self._waiting.append(event)
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
        rows = []
        with suppress(IndexError):
            while True:
                rows.append(self._waiting.popleft())
        if not rows:
            return
        data = "".join(json.dumps(_row(e), separators=(",", ":")) + "\n" for e in rows)
        try:
            backend.create(f"events/g{generation:04d}-{self._name}-{time.time_ns():x}.jsonl", data.encode())
        except CkptError as e:
            log.error("ckpt: %d events were not written: %s", len(rows), e)


def _row(event: Event) -> dict[str, object]:
    row = {k: v for k, v in asdict(event).items() if v not in (0, "") or k in ("rank", "step", "generation")}
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
