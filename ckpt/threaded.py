"""Saves of a Checkpointer without a keeper: to storage, in threads of the trainer, one at a time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ckpt.backends import Backend
from ckpt.background import SaveHandle, begin_save
from ckpt.collective import Group
from ckpt.config import Every
from ckpt.format.codec import Codec
from ckpt.saving import Planner, Request, SaveReport
from ckpt.upkeep import Account

__all__ = ["Threaded"]


class Threaded:
    """Collective in every method but `wait`. Outcomes go to the account."""

    def __init__(
        self,
        backend: Backend,
        group: Group,
        every: Every | None,
        codecs: tuple[tuple[str, Codec], ...],
        account: Account,
    ) -> None:
        self._backend, self._group, self._every, self._codecs, self._account = backend, group, every, codecs, account
        self._planner = Planner()
        self._handle: SaveHandle | None = None  # of the last save begun
        self._last = time.monotonic()

    def begin(self, state: Any, start: int) -> None:
        """A life begins. Nothing is to be made ready for it."""
        self._handle = None

    def step(self, state: Any, step: int, metrics: Mapping[str, float]) -> SaveHandle | None:
        """Begins to save a step, if it is due and no other is being saved."""
        try:
            return self._start(state, step, metrics) if self._due(step) else None
        except Exception as e:
            self._account.failed(step, f"step {step} was not saved, training goes on", e)
            return None

    def _due(self, step: int) -> bool:
        """All ranks must answer alike: clocks, and whether a save is under way, decide only on the leader."""
        every = self._every
        if every is None or (every.minutes is None and not every.due(step, self._last)):
            return False

        def decide(_: list[bytes]) -> bytes:
            if not every.due(step, self._last):
                return b""
            return b"skip" if self._handle is not None and not self._handle.done() else b"save"

        answer = self._group.round(f"due {step}", b"", decide)
        if answer == b"skip":
            self._account.skipped(step, "the save before was still under way")
        return answer == b"save"

    def _start(self, state: Any, step: int, metrics: Mapping[str, float]) -> SaveHandle:
        request = Request(self._backend, step, self._account.generation, metrics, self._codecs)
        self._handle = begin_save(
            request, state, self._group, self._planner, after=lambda outcome: self._ended(step, outcome)
        )
        self._last = time.monotonic()
        self._account.report.stalled += self._handle.stalled
        return self._handle

    def _ended(self, step: int, outcome: SaveReport | Exception) -> None:
        """The bookkeeping of a save that has ended, in the thread that did it."""
        if isinstance(outcome, Exception):
            self._account.failed(step, f"step {step} was not saved, training goes on", outcome)
        else:
            self._account.committed(outcome)

    def store(self, state: Any, step: int, metrics: Mapping[str, float]) -> SaveReport:
        """Has a step in storage when it returns, unless it raises."""
        handle = self._handle
        if handle is None or handle.step != step or (handle.done() and not handle.committed()):
            try:
                handle = self._start(state, step, metrics)
            except Exception as e:
                self._account.failed(step, "", e)
                raise
        return handle.result()

    def wait(self, timeout: float | None) -> bool:
        """Waits until the save under way has ended, well or not; False if it has not after `timeout` seconds."""
        return self._handle is None or self._handle.done(timeout)

    def close(self) -> None:
        """Nothing is held."""
