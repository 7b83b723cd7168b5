"""What a host does with the chunks that others bring: into its parity areas, as far as its `Ward` says so."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ckpt.keeper.areas import Areas
from ckpt.keeper.groups import Group, Placement
from ckpt.keeper.guard import Fold, Mark, Ward
from ckpt.keeper.streams import STEP, Piece

__all__ = ["Receiver"]

Bytes = npt.NDArray[np.uint8]


class Receiver:
    """Of many threads, one for each connection that brings chunks. `lock` guards `ward` and `areas`.

    finished  told of an attempt when a chunk is in
    failed    told of an attempt that cannot be finished, and why
    moved     when bytes were last folded, in monotonic seconds
    """

    def __init__(
        self,
        ward: Ward,
        areas: Areas,
        lock: threading.Condition,
        finished: Callable[[Mark], None],
        failed: Callable[[Mark, str], None],
        patience: float,
    ) -> None:
        self._ward, self._areas, self._lock = ward, areas, lock
        self._finished, self._failed, self._patience = finished, failed, patience
        self.moved = 0.0

    def _group(self, placement: Placement) -> Group:
        return placement.groups[placement.group_of(self._ward.host)]

    def admit(self, piece: Piece) -> bool:
        """Whether to fold a chunk; waits until the order to begin has come and the area is zeroed."""
        until = time.monotonic() + self._patience
        with self._lock:
            while True:
                number = self._ward.area(piece.mark)
                if number is not None and self._areas.ready(number, piece.mark):
                    folded = self._ward.areas[number]
                    assert folded is not None
                    stripe = self._group(folded.area.placement).stripes[piece.stripe]
                    _, start, stop = stripe.data[piece.number]
                    fits = stop - start == piece.total
                    return fits and self._ward.fold(piece.mark, piece.stripe, piece.number) is Fold.NOW
                if (number is None and piece.mark <= self._ward.fence) or time.monotonic() > until:
                    return False
                self._lock.wait(1.0)

    def fold(self, piece: Piece, at: int, data: Bytes) -> bool:
        """Adds a step of a chunk to the parity that is kept here; False if it is of no use any more."""
        with self._lock:
            number = self._ward.area(piece.mark)
            if number is None or piece.mark < self._ward.fence:
                return False
            folded, entered = self._ward.areas[number], self._areas.enter(number)
            if folded is None or entered is None:
                return False
        area, begun = entered
        try:
            group = self._group(folded.area.placement)
            [parity] = [p for p in group.shares[self._ward.host].parity if p.stripe == piece.stripe]
            target = area[parity.offset + at : parity.offset + min(at + STEP, parity.nbytes)]
            place = piece.stripe, at // STEP
            self._areas.fold((group.data, group.parity), piece.number, parity.row, place, begun, target, data)
        finally:
            with self._lock:
                self._areas.leave(number)
        with self._lock:
            self.moved = time.monotonic()
        return True

    def folded(self, piece: Piece) -> None:
        """All of a chunk is in, and is what was sent."""
        with self._lock:
            self._ward.folded(piece.mark, piece.stripe, piece.number)
        self._finished(piece.mark)

    def cut_off(self, piece: Piece | None, why: str) -> None:
        """A connection ended within a chunk; `piece` None: or what it brought was changed on its way, so that nobody knows
        what it was."""
        with self._lock:
            marks = [a.mark for a in self._ward.areas if a is not None and not a.encoded]
        for mark in marks:
            if piece is None or piece.mark == mark:
                self._failed(mark, why)
