"""A rank's share of a snapshot -> one sealed pack in a slot: what may change at any time at once, the rest beside the
training program."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ckpt.errors import DeadlineError, IntegrityError
from ckpt.format.codec import BLOCK, crc32c
from ckpt.format.pack import PackLayout
from ckpt.write import PackReport, Source, pack_report

__all__ = ["Snapshot", "give_way"]

Bytes = npt.NDArray[np.uint8]
_CHUNK = 1 << 20  # several blocks, checked while they are in cache


def give_way() -> None:
    """For a thread that copies: from now on it wakes up without taking the processor from one that trains, and has a
    quarter of it where both want it. With as many ranks as processors, or more, that is what held up the calls."""
    with suppress(OSError):  # a sandbox may forbid it
        os.nice(5)  # on Linux of this thread alone
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


@dataclass(frozen=True)
class _Place:
    """Where one fragment goes: `into` is its part of the slot, from `at` on, `first` its first block."""

    source: Source
    at: int
    into: Bytes
    first: int


class Snapshot:
    """One pack on its way into memory. `copied` is set when the sources may change again, whether it went well or not.

    layout   a raw pack (memory is never coded)
    sources  in the order of the caller's pieces, as the layout's `order` refers to them
    lazy     for each source, whether it stays as it is until the fence falls
    checked  hash the last block of every lazy source now, and see that this is what is copied later
    and_then  called once everything is copied and before the sources may change

    `final`: so many bytes from the start are as they will be stored, but for the header, which is the last to be written.
    """

    def __init__(
        self,
        layout: PackLayout,
        sources: Sequence[Source],
        lazy: Sequence[bool] | npt.NDArray[np.bool_],
        buffer: Bytes,
        *,
        checked: bool = False,
        and_then: Callable[[], None] | None = None,
    ) -> None:
        self.layout, self.buffer = layout, buffer[: layout.size]
        self.copied, self.final = threading.Event(), 0
        self._table = np.zeros(layout.n_blocks, dtype="<u4")
        self._sources, self._and_then = sources, and_then
        self._given_up = False
        waits = np.asarray(lazy, dtype=np.bool_)[layout.order]
        self._later: list[int] = np.flatnonzero(waits).tolist()
        self._samples: list[tuple[int, int]] = []
        if checked:
            sampled = [(k, sources[layout.order[k]]) for k in self._later]
            self._samples = [(k, _last_block(source)) for k, source in sampled if source.nbytes]
        for k in np.flatnonzero(~waits).tolist():
            self._copy(self._place(k))
        if not self._later and and_then is None:
            self.copied.set()

    def _place(self, k: int) -> _Place:
        """Of the k-th fragment of the layout."""
        source, at = self._sources[self.layout.order[k]], int(self.layout.offset[k])
        return _Place(source, at, self.buffer[at : at + source.nbytes], int(self.layout.block[k]))

    def copy_rest(self, paced: Callable[[int], None]) -> None:
        """Copies what was left for later; `paced` is told the bytes of each chunk and may wait.

        Raises IntegrityError, naming the tensors, if a sample is not what it was when the snapshot began.
        """
        try:
            for k in self._later:
                if not self._given_up:
                    self._copy(self._place(k), paced)
            if self._and_then is not None and not self._given_up:
                self._and_then()
            if self._given_up:
                raise DeadlineError("the snapshot took longer than CKPT_DEADLINE to copy, and was given up")
            changed = [k for k, crc in self._samples if self._last_crc(k) != crc]
            if changed:
                names = ", ".join(repr(self.layout.pieces[k].stored_name) for k in changed[:8])
                raise IntegrityError(
                    f"changed while it was being copied: {names}{' and more' if len(changed) > 8 else ''}; something "
                    "other than a fenced optimizer writes to it: call fence() before that"
                )
        finally:
            self._samples = []
            self._later, self._sources, self._and_then = [], (), None  # the sources may be freed
            self.copied.set()

    def _last_crc(self, k: int) -> int:
        place = self._place(k)
        return int(self._table[place.first + (len(place.into) - 1) // BLOCK])

    def _copy(self, place: _Place, paced: Callable[[int], None] | None = None) -> None:
        row = place.first
        for at in range(0, len(place.into), _CHUNK):
            chunk = place.into[at : at + _CHUNK]
            place.source.into(at, chunk)
            for b in range(0, len(chunk), BLOCK):
                self._table[row] = crc32c(chunk[b : b + BLOCK])
                row += 1
            if paced is not None:
                self.final = place.at + at + len(chunk)
                paced(len(chunk))

    def give_up(self) -> None:
        """From now on the sources may change: what is not copied yet never will be."""
        self._given_up = True

    def seal(self) -> PackReport:
        """Header and block table: the buffer then holds the pack as any medium would."""
        header = self.layout.header
        table = self._table.view(np.uint8)
        self.buffer[: len(header)] = np.frombuffer(header, dtype=np.uint8)
        self.buffer[self.layout.table_offset :] = table
        self.final = self.layout.size
        return pack_report(self.layout, header, table)

    def fragment(self, index: int) -> Bytes:
        """The raw bytes of one of the caller's pieces."""
        k = int(np.flatnonzero(self.layout.order == index)[0])
        at = int(self.layout.offset[k])
        return self.buffer[at : at + int(self.layout.length[k])]


def _last_block(source: Source) -> int:
    at = (source.nbytes - 1) // BLOCK * BLOCK
    block = np.empty(source.nbytes - at, dtype=np.uint8)
    source.into(at, block)
    return crc32c(block)
