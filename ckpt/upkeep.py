"""What a run needs besides its steps: metrics in the ledger, a word on surprises, the deletion of what no policy keeps."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ckpt.backends import Backend
from ckpt.catalog import write_ledger
from ckpt.commit import refuse_superseded
from ckpt.config import settings
from ckpt.errors import CkptError, UsageError
from ckpt.events import Event, Events
from ckpt.offline.prune import retain
from ckpt.retention import Policy
from ckpt.saving import SaveReport
from ckpt.snapshot.fence import fence_here

__all__ = ["Account", "CloseReport", "Metrics", "numbers", "warn_per_rank", "write_rows"]

log = logging.getLogger("ckpt")
Metrics = Mapping[str, Any]
_LATER = 100_000  # rows that wait for a store that is away


def numbers(metrics: Metrics | None) -> dict[str, float]:
    """Metrics as plain numbers; those that are not finite have no place in JSON and are left out."""
    out = {}
    for name, value in (metrics or {}).items():
        try:
            number = float(value.detach() if hasattr(value, "detach") else value)  # a loss may still have its graph
        except (TypeError, ValueError, OverflowError, RuntimeError):  # torch's own for a tensor of many elements
            raise UsageError(f"metric {name!r}: {value!r:.200} is not a number") from None
        if number - number == 0:
            out[str(name)] = number
    return out


def write_rows(backend: Backend, generation: int, waiting: deque[dict[str, object]]) -> None:
    """Writes all rows that wait into one object of the ledger; a failure is logged, not raised."""
    rows = []
    with suppress(IndexError):
        while True:
            rows.append(waiting.popleft())
    if not rows:
        return
    name = f"g{generation:04d}-{rows[0]['step']:08d}-{time.time_ns():x}"
    try:
        write_ledger(backend, name, rows)
    except CkptError as e:
        log.error("ckpt: metrics of %d steps were not written yet: %s", len(rows), e)
        waiting.extendleft(reversed(rows[-_LATER:]))


def warn_per_rank(names: Sequence[str], rank: int) -> None:
    """Says, once a save and on one rank, which leaves were stored per rank although nobody declared it."""
    if names and rank == 0:
        log.warning(
            "ckpt: stored per rank, since the ranks hold different values: %s (declare ckpt.PerRank to say so)",
            ", ".join(names[:10]),
        )


@dataclass
class CloseReport:
    """What a Checkpointer did, on this rank.

    steps counted; snapshots `sealed` in memory by all ranks, `announced` as protected, and `voided`; saves to storage `committed` and `failed`;
    steps that were due and `skipped`; bytes stored by all ranks; seconds that saves held up the loop; the last error.
    With a local tier: steps that `arrived` at the remote, and how often one could not be brought there (`detained`), on the
    rank that does this for its host.
    """

    steps: int = 0
    sealed: int = 0
    announced: int = 0
    voided: int = 0
    committed: int = 0
    failed: int = 0
    skipped: int = 0
    arrived: int = 0
    detained: int = 0
    bytes: int = 0
    stalled: float = 0.0
    last_step: int | None = None
    last_error: str = ""
    saves: list[SaveReport] = field(default_factory=list)


class Account:
    """What the checkpoints of one run come to: counts, ledger, events, retention. Threads share it."""

    def __init__(self, backend: Backend, rank: int, keep: Sequence[Policy], events: Events) -> None:
        self.backend, self.rank, self.keep, self.events = backend, rank, tuple(keep), events
        self.report = CloseReport()
        self.generation = 0
        self._host = settings().host or socket.gethostname()
        self.durable = time.monotonic()
        self._ledger: deque[dict[str, object]] = deque()
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._tidying: list[Future[None]] = []
        self._steps, self._since, self._fenced = 0, time.monotonic(), fence_here().waited

    def note(self, step: int, metrics: Metrics | None) -> dict[str, float]:
        """A step was done; its metrics as numbers, which go into the ledger."""
        self.report.steps += 1
        self._steps += 1
        if not metrics:
            return {}
        try:
            found = numbers(metrics)
        except UsageError as e:
            log.error("ckpt: step %d: %s", step, e)
            return {}
        self.record(step, found)
        return found

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        self._ledger.append({"step": int(step), **metrics})

    def event(self, kind: str, step: int, **more: Any) -> None:
        """A row of this rank, with how training went since the last one."""
        now, waited = time.monotonic(), fence_here().waited
        loop: dict[str, Any] = {"steps": self._steps, "loop": now - self._since, "fence": waited - self._fenced}
        self._steps, self._since, self._fenced = 0, now, waited
        self.events.add(Event(kind, self.rank, step, self.generation, time.time(), self._host, **loop, **more))
        if self.events.due:
            self.tidy()

    def skipped(self, step: int, why: str) -> None:
        self.report.skipped += 1
        self.event("skip", step, why=why)

    def announced(self, step: int, lag: float, again: float | None = None) -> None:
        """A step in memory outlives the hosts that it is to outlive, `again` so many seconds after a restart from memory."""
        self.report.announced += 1
        why = ""
        if again is not None:
            why = f"protected again {again:.1f} s after the restart"
            if self.rank == 0:
                log.warning("ckpt: step %d: %s", step, why)
        self.event("protect", step, outcome="announced", lag=lag, why=why)

    def committed(self, done: SaveReport) -> None:
        """A save has reached storage."""
        self.durable = time.monotonic()
        self.report.last_step = done.step
        self.report.committed += 1
        self.report.bytes += done.bytes
        self.report.saves.append(done)
        warn_per_rank(done.per_rank, self.rank)
        self.event(
            "save", done.step, outcome="committed", write=done.seconds_write,
            commit=max(0.0, done.seconds - done.seconds_plan - done.seconds_write), bytes=done.bytes_here,
        )  # fmt: skip
        self.tidy()

    def arrived(self) -> None:
        """A step has reached the remote tier."""
        self.report.arrived += 1
        self.tidy()

    def detained(self, e: Exception) -> None:
        """Counts a step that could not be brought to the remote tier now."""
        self.report.detained += 1
        self.report.last_error = f"{e.kind if isinstance(e, CkptError) else type(e).__name__}: {e}"

    def failed(self, step: int, what: str, e: Exception) -> None:
        """Counts a failed save, and logs it once with its cause; with the way to it only if it is not one of ours."""
        self.report.failed += 1
        self.report.last_error = f"{e.kind if isinstance(e, CkptError) else type(e).__name__}: {e}"
        self.event("save", step, outcome="failed", why=self.report.last_error)
        if what:
            log.error("ckpt: %s: %s", what, e, exc_info=None if isinstance(e, CkptError) else e)

    def tidy(self, last: bool = False) -> None:
        """Has what waits to be written written into the run, and what no policy keeps deleted: in a thread of its own,
        since neither the loop nor a save is to wait for a store that lists and deletes."""
        with self._lock:
            self._tidying = [t for t in self._tidying if not t.done()]
            if len(self._tidying) > 1 and not last:
                return  # one is yet to begin
            self._pool = self._pool or ThreadPoolExecutor(1, "ckpt-tidy")
            self._tidying.append(self._pool.submit(self._tidy, last))

    def _tidy(self, last: bool) -> None:
        try:
            if last or self.events.due:
                self.events.write(self.backend, self.generation)
            if self.rank == 0:
                write_rows(self.backend, self.generation, self._ledger)
                if self.keep:
                    refuse_superseded(self.backend, self.generation)  # what another job has is not ours to delete
                retain(self.backend, self.keep)
        except Exception as e:
            log.error("ckpt: the run was not tidied: %s", e, exc_info=None if isinstance(e, CkptError) else e)

    def tidied(self, timeout: float | None) -> bool:
        """Waits until that has happened; False if it has not after `timeout` seconds."""
        with self._lock:
            waiting = list(self._tidying)
        return not wait(waiting, timeout).not_done

    def close(self) -> None:
        """Tidies for the last time."""
        self.tidy(last=True)
        if not self.tidied(settings().deadline):
            log.error("ckpt: the run is still being tidied after %.0f s; that goes on", settings().deadline)
        self.events.close()
