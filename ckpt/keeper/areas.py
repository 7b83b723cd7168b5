"""The two parity areas of a host: memory that chunks of other hosts are folded into, in place, by several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt

from ckpt import faults
from ckpt.errors import CapacityError, IntegrityError
from ckpt.format.codec import crc32c
from ckpt.keeper.erasure import Code
from ckpt.keeper.guard import Mark
from ckpt.keeper.streams import PIECE, pieces
from ckpt.snapshot.arena import Slot

__all__ = ["Areas"]

Bytes = npt.NDArray[np.uint8]
_LOCKS = 64  # of the places in an area that are folded into at once
code = cache(Code)


class Areas:
    """`lock`: behind which its owner keeps what else belongs to the areas; waited on, and told of every change here."""

    def __init__(self, host: str, lock: threading.Condition) -> None:
        self._host, self._lock = host, lock
        self._slots: list[Slot | None] = [None, None]
        self._larger: list[Slot | None] = [None, None]  # take the places of those that are needed as they are
        self._zeroed: list[Mark | None] = [None, None]
        self._begun: list[set[tuple[int, int]]] = [set(), set()]  # the places that something was folded into
        self._sums: list[tuple[int, list[int]] | None] = [None, None]  # bytes, and CRC32C by piece, once all is folded
        self._folding = [0, 0]
        self._places = [threading.Lock() for _ in range(_LOCKS)]

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return sum(s.size for s in (*self._slots, *self._larger) if s is not None)

    def reserve(self, size: int, give_up: Callable[[int], bool]) -> None:
        """Two areas of `size` bytes, touched. `give_up(number)` ends what is under way in an area; False if that is
        needed as it is, and so stays beside the new one until `zero`.

        Raises CapacityError, with the numbers; what was there stays.
        """
        for number in (0, 1):
            if any(s is not None and s.size >= size for s in (self._slots[number], self._larger[number])):
                continue
            with self._lock:
                if (small := self._larger[number]) is not None:
                    self._larger[number] = None
                    small.close()
                if give_up(number):
                    self._wait(number)
                    self.begin(number)
                    self._put(number, None)
            try:
                slot = Slot(size, f"ckpt-parity-{number}") if size else None
            except CapacityError as e:
                raise CapacityError(
                    f"{self._host} is to keep parity for other hosts, two areas of {size / 2**20:.0f} MiB beside its own "
                    f"snapshots: {e}"
                ) from e
            with self._lock:
                self._larger[number] = slot

    def _put(self, number: int, slot: Slot | None) -> None:
        old, self._slots[number] = self._slots[number], slot
        if old is not None:
            old.close()

    def _wait(self, number: int) -> None:
        """Until nobody folds into an area."""
        while self._folding[number]:
            self._lock.wait()

    def begin(self, number: int) -> None:
        """From now on what an area holds is of no use; under the lock."""
        self._zeroed[number] = self._sums[number] = None

    def zero(self, number: int, size: int, mark: Mark, wanted: Callable[[], bool]) -> None:
        """Has an area count as zeros for an attempt, unless that is no longer `wanted`: what comes first to a place is not
        added to what is there. Raises CapacityError if it is too small."""
        with self._lock:
            self._wait(number)
            if not wanted():
                return
            if self._larger[number] is not None:
                self._put(number, self._larger[number])
                self._larger[number] = None
            slot = self._slots[number]
        if size and (slot is None or slot.size < size):
            raise CapacityError(f"{self._host} has no memory for {size / 2**20:.0f} MiB of parity")
        with self._lock:
            if wanted():
                self._begun[number], self._zeroed[number] = set(), mark
            self._lock.notify_all()

    def ready(self, number: int, mark: Mark) -> bool:
        """Whether an area is zeroed for an attempt; under the lock."""
        return self._zeroed[number] == mark

    def enter(self, number: int) -> tuple[Bytes, set[tuple[int, int]]] | None:
        """Somebody begins to fold; under the lock. The area, and its places that are not zeros any more; None if there is
        nothing to fold into; else `leave` follows."""
        slot = self._slots[number]
        if slot is None:
            return None
        self._folding[number] += 1
        return slot.buffer, self._begun[number]

    def leave(self, number: int) -> None:
        """He is done; under the lock."""
        self._folding[number] -= 1
        if not self._folding[number]:  # not at each piece: threads that wait for orders would wake
            self._lock.notify_all()

    def fold(
        self,
        group: tuple[int, int],
        chunk: int,
        row: int,
        place: tuple[int, int],
        begun: set[tuple[int, int]],
        target: Bytes,
        data: Bytes,
    ) -> None:
        """Adds a step of a data chunk to parity of (data, parity) chunks, which `target` has all of that place of. Chunks of
        a stripe take turns at a place."""
        with self._places[hash(place) % _LOCKS]:
            faults.point("shield folding")
            if place in begun:
                code(*group).fold(chunk, data, {row: target})
            else:
                code(*group).begin(chunk, data, {row: target})
                begun.add(place)

    def sums(self, number: int, size: int) -> tuple[int, list[int]]:
        """Of an area that is encoded in full, for `seal`."""
        slot = self._slots[number]
        return size, [] if slot is None else [crc32c(slot.buffer[a:b]) for a, b in pieces(0, size)]

    def seal(self, number: int, sums: tuple[int, list[int]]) -> None:
        """Under the lock, if nothing has begun in the area meanwhile."""
        self._sums[number] = sums

    def sealed(self, number: int) -> bool:
        return self._sums[number] is not None

    def size(self, number: int) -> int:
        """Bytes of an area that is encoded in full; 0 if it is not."""
        sums = self._sums[number]
        return sums[0] if sums is not None else 0

    def read(self, number: int, start: int, stop: int, sound: set[int]) -> Bytes:
        """Bytes of an area that is encoded in full; as for `Segment.check`, `sound` is known. Raises IntegrityError if they
        are not what was folded."""
        slot, sums = self._slots[number], self._sums[number]
        assert slot is not None and sums is not None
        for n in range(start // PIECE, -(-stop // PIECE)):
            if n in sound:
                continue
            if crc32c(slot.buffer[n * PIECE : min((n + 1) * PIECE, sums[0])]) != sums[1][n]:
                raise IntegrityError(
                    f"parity on {self._host} is damaged (piece {n} of area {number}); have the memory of this host tested"
                )
            sound.add(n)
        return slot.buffer[start:stop]
