"""What becomes of steps in the hands of a keeper, and of its saves to storage, for those who wait for them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckpt.errors import CkptError, DeadlineError

__all__ = ["Outcome", "Storing", "Taken"]

_ENDS = 8  # saves whose end is remembered


@dataclass
class Taken:
    """A snapshot that has begun. `copied` is set when the state may change again. Seconds: `eager` of copying in `step`,
    `lazy` beside training, once that is over."""

    copied: threading.Event
    eager: float
    bytes: int
    lazy: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What became of a step: kind "complete", "announced", "void", "stored", "arrived" at the run or "detained" on the local
    tier, or "lost"; seconds and bytes of a save to storage; `lag`: seconds from complete to announced."""

    kind: str
    step: int
    why: str = ""
    error: tuple[str, str] | None = None
    write: float = 0.0
    commit: float = 0.0
    bytes: int = 0
    lag: float = 0.0

    @classmethod
    def brought(cls, kind: str, head: Mapping[str, Any]) -> Outcome:
        """As the keeper tells of a step on its way from the local tier."""
        error = (str(head["error"][0]), str(head["error"][1])) if "error" in head else None
        return cls(kind, int(head["step"]), error=error, bytes=int(head.get("bytes", 0)))

    @classmethod
    def stored(cls, head: Mapping[str, Any]) -> Outcome:
        """As the keeper tells of the end of a save."""
        step = int(head["step"])
        if "error" in head:
            return cls("stored", step, error=(str(head["error"][0]), str(head["error"][1])))
        return cls("stored", step, write=head["write"], commit=head["commit"], bytes=head["bytes"])


class Storing:
    """The saves to storage that are under way, by step, and how the last ones ended. Threads share it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._under_way: set[int] = set()
        self._ends: dict[int, Outcome] = {}
        self._lost: Outcome | None = None

    def begin(self, step: int) -> None:
        with self._changed:
            self._under_way.add(step)

    def end(self, outcome: Outcome) -> None:
        with self._changed:
            self._under_way.discard(outcome.step)
            for old in sorted(self._ends)[:-_ENDS]:
                del self._ends[old]
            self._ends[outcome.step] = outcome
            self._changed.notify_all()

    def forget(self, step: int) -> None:
        """The step will be saved once more."""
        with self._changed:
            self._ends.pop(step, None)

    def lose(self, error: CkptError) -> None:
        """The keeper is gone: nothing that is under way will end."""
        with self._changed:
            self._under_way.clear()
            self._lost = Outcome("lost", -1, error=(error.kind, str(error)))
            self._changed.notify_all()

    def found(self) -> None:
        """There is a keeper again."""
        with self._changed:
            self._lost = None

    def wait(self, step: int, timeout: float) -> Outcome:
        """How a save ended. Raises DeadlineError."""
        with self._changed:
            if not self._changed.wait_for(lambda: step in self._ends or self._lost is not None, timeout):
                raise DeadlineError(f"step {step} is still being written to storage after {timeout:.0f} s")
            end = self._ends.get(step, self._lost)
            assert end is not None
            return end

    def quiet(self, timeout: float | None) -> bool:
        """Waits until nothing is being written to storage."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._under_way, timeout)
