"""A rank's share of a snapshot -> one sealed pack in a slot: what may change at any time at once, the rest beside the
training program."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ckpt.errors import IntegrityError
from ckpt.format.codec import BLOCK, crc32c
from ckpt.format.pack import PackLayout, pack_header
from ckpt.write import PackReport, Source, pack_report

__all__ = ["Snapshot"]

Bytes = npt.NDArray[np.uint8]
_CHUNK = 1 << 20  # several blocks, checked while they are in cache


@dataclass(frozen=True)
class _Place:
    """Where one fragment goes: `into` is its part of the slot, `first` its first block."""

    source: Source
    into: Bytes
    first: int


class Snapshot:
    """One pack on its way into memory. `copied` is set when the sources may change again, whether it went well or not.

    layout   a raw pack (memory is never coded)
    sources  in the order of the caller's pieces, as the layout's `order` refers to them
    lazy     for each source, whether it stays as it is until the fence falls
    checked  hash the last block of every lazy source now, and see that this is what is copied later
    """

    def __init__(
        self,
        layout: PackLayout,
        sources: Sequence[Source],
        lazy: Sequence[bool],
        buffer: Bytes,
        *,
        checked: bool = False,
    ) -> None:
        self.layout, self.buffer = layout, buffer[: layout.size]
        self.copied = threading.Event()
        self._table = np.zeros(layout.n_blocks, dtype="<u4")
        self._later: list[_Place] = []
        now: list[_Place] = []
        offsets, blocks = layout.offset.tolist(), layout.block.tolist()
        for k, index in enumerate(layout.order.tolist()):
            source = sources[index]
            place = _Place(source, self.buffer[offsets[k] : offsets[k] + source.nbytes], blocks[k])
            (self._later if lazy[index] else now).append(place)
        self._samples = [(p, _last_block(p.source)) for p in self._later if p.source.nbytes] if checked else []
        for place in now:
            self._copy(place)
        if not self._later:
            self.copied.set()

    def copy_rest(self, paced: Callable[[int], None]) -> None:
        """Copies what was left for later; `paced` is told the bytes of each chunk and may wait.

        Raises IntegrityError, naming the tensors, if a sample is not what it was when the snapshot began.
        """
        try:
            for place in self._later:
                self._copy(place, paced)
            changed = [p for p, crc in self._samples if self._table[p.first + (len(p.into) - 1) // BLOCK] != crc]
            if changed:
                named = dict(zip(self.layout.block.tolist(), self.layout.pieces, strict=True))
                names = ", ".join(repr(named[p.first].stored_name) for p in changed[:8])
                raise IntegrityError(
                    f"changed while it was being copied: {names}{' and more' if len(changed) > 8 else ''}; something "
                    "other than a fenced optimizer writes to it: call fence() before that"
                )
        finally:
            self._samples = []
            self._later = []  # the sources may be freed
            self.copied.set()

    def _copy(self, place: _Place, paced: Callable[[int], None] | None = None) -> None:
        row = place.first
        for at in range(0, len(place.into), _CHUNK):
            chunk = place.into[at : at + _CHUNK]
            place.source.into(at, chunk)
            for b in range(0, len(chunk), BLOCK):
                self._table[row] = crc32c(chunk[b : b + BLOCK])
                row += 1
            if paced is not None:
                paced(len(chunk))

    def seal(self) -> PackReport:
        """Header and block table: the buffer then holds the pack as any medium would."""
        header = pack_header(self.layout)
        table = self._table.view(np.uint8)
        self.buffer[: len(header)] = np.frombuffer(header, dtype=np.uint8)
        self.buffer[self.layout.table_offset :] = table
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
