"""What a keeper writes to storage, in threads of its own: packs of steps, and the events of trainers that died."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ckpt.backends import Backend
from ckpt.config import Settings
from ckpt.errors import CkptError, ConflictError, IntegrityError, to_wire
from ckpt.events import Event, encode_rows, last_rows, object_name
from ckpt.format.codec import Codec
from ckpt.keeper.holding import Held, write_packs
from ckpt.keeper.lead import Key
from ckpt.keeper.protocol import Frame, frame
from ckpt.keeper.seat import Life
from ckpt.write import Ring, encode_report

__all__ = ["Writing"]

log = logging.getLogger("ckpt.keeper")


class Writing:
    """`later` has the loop do something, from any thread; `tell` tells the seat. Everything else is called in the loop."""

    def __init__(
        self, host: str, config: Settings, later: Callable[[Callable[[], None]], None], tell: Callable[[Frame], None]
    ) -> None:
        self._host, self._config, self._later, self._tell = host, config, later, tell
        self._storage = ThreadPoolExecutor(1, "ckpt-keeper")
        self._storage.submit(lambda: None).result()  # its thread is there before memory may be short
        self._rows = ThreadPoolExecutor(1, "ckpt-events")  # so that no step waits for them
        self._ring: Ring | None = None
        self._tails: dict[int, int] = {}  # by rank: the memory that its events are in
        self._jobs = 0

    @property
    def busy(self) -> bool:
        """Whether something is being written."""
        return self._jobs > 0

    def work(self, function: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Runs a function in the storage thread; the loop hears its result, or its error."""
        self._submit(self._storage, function, then)

    def _submit(self, pool: ThreadPoolExecutor, function: Callable[[], Any], then: Callable[[Any], None]) -> None:
        def work() -> None:
            try:
                result = function()
            except Exception as e:
                result = e
            self._later(lambda: done(result))

        def done(result: Any) -> None:
            self._jobs -= 1
            then(result)

        pool.submit(work)
        self._jobs += 1

    def packs(
        self,
        key: Key,
        held: Held,
        codecs: Sequence[tuple[str, Codec]],
        attempt: str,
        backend: Callable[[], Backend],
        spoilt: Callable[[str], None],
    ) -> None:
        """The packs of this host; the seat is told how that ended, and `spoilt` why a step is damaged."""

        def write() -> Any:
            return write_packs(backend(), held, attempt, codecs, self._config, self._ring_made)

        def wrote(found: Any) -> None:
            told: dict[str, Any] = {"key": list(key), "attempt": attempt, "host": self._host}
            if isinstance(found, Exception):
                if isinstance(found, IntegrityError):
                    spoilt(str(found))
                self._tell(frame("wrote", error=to_wire(found), **told))
                return
            reports = {rank: encode_report(report) for rank, report in found.items()}
            ranks = [[rank, len(text)] for rank, text in reports.items()]
            self._tell(frame("wrote", b"".join(reports.values()), ranks=ranks, **told))

        self.work(write, wrote)

    def _ring_made(self) -> Ring:
        self._ring = self._ring or Ring(self._config)
        return self._ring

    # Events.

    def listen(self, rank: int, tail: Sequence[int]) -> None:
        """A trainer's events are in this memory until it has written them itself; none if it has none."""
        old = self._tails.pop(rank, -1)
        if old >= 0:
            os.close(old)
        self._tails.update((rank, fd) for fd in tail)

    def bury(self, rank: int, life: Life | None) -> None:
        """A trainer is gone: what it had not written is."""
        fd = self._tails.pop(rank, -1)
        if fd < 0:
            return
        name, rows = last_rows(fd)
        os.close(fd)
        if life is not None and rows:
            self._write_rows(life, name, rows)

    def stored(self, order: Frame, life: Life) -> None:
        """How a save ended that no trainer was there to hear of."""
        ranks = [rank for rank, host in sorted(life.hosts.items()) if host == self._host]
        failed, why = ("failed", str(order["error"][1])) if "error" in order.head else ("", "")
        write, commit = (0.0, 0.0) if failed else (float(order["write"]), float(order["commit"]))
        rows = [
            Event(
                "save", rank, int(order["step"]), life.generation, time.time(), self._host,
                outcome=failed or "committed", why=why, write=write, commit=commit,
            )
            for rank in ranks
        ]  # fmt: skip
        self._write_rows(
            life, object_name(life.generation, f"keeper-{ranks[0] if ranks else 0:05d}"), encode_rows(rows)
        )

    def _write_rows(self, life: Life, name: str, rows: bytes) -> None:
        def wrote(found: Any) -> None:
            if isinstance(found, CkptError) and not isinstance(found, ConflictError):  # that it did write them is fine
                log.error("%s was not written: %s", name, found)

        try:
            self._submit(self._rows, lambda: life.backend(self._config.direct).create(name, rows), wrote)
        except RuntimeError as e:  # no thread to be had: no reason to lose what is in memory
            log.error("%s was not written: %s", name, e)

    def close(self) -> None:
        """Once nothing is being written."""
        self._storage.shutdown()
        self._rows.shutdown()
        for rank in list(self._tails):
            self.listen(rank, ())
