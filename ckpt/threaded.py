"""Saves of a Checkpointer without a keeper: to storage, in threads of the trainer, one at a time.

With two tiers a save commits on the local one; see `ckpt.tiers`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from ckpt.backends import Backend
from ckpt.background import SaveHandle, begin_save
from ckpt.collective import Group
from ckpt.commit import step_folder
from ckpt.config import Every
from ckpt.format.codec import Codec
from ckpt.loading import LoadReport
from ckpt.saving import Planner, Request, SaveReport
from ckpt.tiers import Tiers, mark_due
from ckpt.trickle import Trickle
from ckpt.upkeep import Account

__all__ = ["Threaded"]

_SKIP, _REMOTE, _LOCAL, _BOTH = b"skip", b"remote", b"local", b"both"
_Codecs = tuple[tuple[str, Codec], ...]


class Threaded:
    """Collective in every method but `wait`. Outcomes go to the account."""

    def __init__(
        self,
        backend: Backend,
        group: Group,
        every: Every | None,
        codecs: _Codecs,
        account: Account,
        tiers: Tiers | None = None,
    ) -> None:
        self._backend, self._group, self._every, self._codecs, self._account = backend, group, every, codecs, account
        self._planner = Planner()
        self._handle: SaveHandle | None = None  # of the last save begun
        self._place = b""  # where that went
        self._last = self._last_local = time.monotonic()
        self._tiers = tiers
        self._trickle = (
            Trickle(
                tiers.way,
                lambda *_: account.arrived(),
                lambda _, e: account.detained(e),
                lambda: account.generation,
            )
            if tiers and tiers.leads
            else None
        )

    def begin(self, state: Any, start: int, loaded: LoadReport | None = None) -> None:
        """A life begins. What an earlier one left to be brought to the remote is brought there."""
        self._handle = None
        self._wake()

    def step(self, state: Any, step: int, metrics: Mapping[str, float]) -> SaveHandle | None:
        """Begins to save a step, if it is due and no other is being saved."""
        try:
            place = self._due(step)
            return self._start(state, step, metrics, place) if place else None
        except Exception as e:
            self._account.failed(step, f"step {step} was not saved, training goes on", e)
            return None

    def _due(self, step: int) -> bytes:
        """Where a step is to be saved, if anywhere. All ranks must answer alike: clocks, and whether a save is under way,
        decide only on the leader."""
        local = self._tiers.spec.every if self._tiers else None
        if not any(e is not None and (e.minutes is not None or e.due(step, 0.0)) for e in (self._every, local)):
            return b""

        def decide(_: list[bytes]) -> bytes:
            remote = self._every is not None and self._every.due(step, self._last)
            if not remote and (local is None or not local.due(step, self._last_local)):
                return b""
            if self._handle is not None and not self._handle.done():
                return _SKIP
            return self._where(remote)

        answer = self._group.round(f"due {step}", b"", decide)
        if answer == _SKIP:
            self._account.skipped(step, "the save before was still under way")
        return b"" if answer == _SKIP else answer

    def _where(self, due: bool) -> bytes:
        """Where to save: on the local tier, unless the last save failed there."""
        if self._tiers is None:
            return _REMOTE
        handle = self._handle
        failed = handle is not None and self._place != _REMOTE and handle.done() and not handle.committed()
        return _REMOTE if failed else _BOTH if due else _LOCAL

    def _start(self, state: Any, step: int, metrics: Mapping[str, float], place: bytes) -> SaveHandle:
        backend, folder = self._backend, step_folder(step, self._account.generation)
        if self._tiers is not None and place != _REMOTE:
            backend = self._tiers.place(place == _BOTH)
        self._place = place
        request = Request(backend, step, self._account.generation, metrics, self._codecs)
        with self._trickle.aside() if self._trickle is not None else nullcontext():
            self._handle = begin_save(
                request, state, self._group, self._planner,
                after=lambda outcome: self._ended(step, folder, place, outcome),
            )  # fmt: skip
        if self._trickle is not None:
            self._trickle.copied_when(self._handle.staged)
        self._last_local = time.monotonic()
        self._last = self._last if place == _LOCAL else self._last_local
        self._account.report.stalled += self._handle.stalled
        return self._handle

    def _ended(self, step: int, folder: str, place: bytes, outcome: SaveReport | Exception) -> None:
        """The bookkeeping of a save that has ended, in the thread that did it."""
        if isinstance(outcome, Exception):
            self._account.failed(step, f"step {step} was not saved, training goes on", outcome)
        else:
            self._account.committed(outcome)
        if self._tiers is not None and place != _REMOTE:
            self._tiers.share(folder)
            self._wake()

    def store(self, state: Any, step: int, metrics: Mapping[str, float]) -> SaveReport:
        """Has a step in storage when it returns, unless it raises; with two tiers, in the local one and due for the other."""
        handle = self._handle
        if handle is None or handle.step != step or (handle.done() and not handle.committed()):
            try:
                place = self._group.round(f"store {step}", b"", lambda _: self._where(True)) if self._tiers else _REMOTE
                handle = self._start(state, step, metrics, place)
            except Exception as e:
                self._account.failed(step, "", e)
                raise
        report = handle.result()
        if self._tiers is not None and self._place == _LOCAL:
            if self._tiers.leads:
                mark_due(self._tiers.local, step_folder(report.step, report.generation))
            self._place = _BOTH
            self._wake()
        return report

    def _wake(self) -> None:
        if self._trickle is not None:
            self._trickle.wake()

    def wait(self, timeout: float | None) -> bool:
        """Waits until the save under way has ended, well or not, and what is due for the remote tier is there or cannot be
        brought there now; False if that is not so after `timeout` seconds."""
        until = None if timeout is None else time.monotonic() + timeout
        if self._handle is not None and not self._handle.done(timeout):
            return False
        return self.brought(None if until is None else max(0.0, until - time.monotonic()))

    def brought(self, timeout: float | None) -> bool:
        """The second half of that."""
        return self._trickle is None or self._trickle.quiet(timeout)

    def close(self) -> None:
        """Stops bringing steps to the remote; what is left the next life brings."""
        if self._trickle is not None:
            self._trickle.close()
