"""This host's part of one step, as one stretch of bytes: its ranks' slots, one behind the other, never copied."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ckpt.errors import IntegrityError, NotFoundError
from ckpt.keeper.groups import Share
from ckpt.keeper.holding import Held, Intact
from ckpt.keeper.streams import PIECE, pieces, sum_of
from ckpt.keeper.wire import Layout

__all__ = ["Segment"]

Bytes = npt.NDArray[np.uint8]
_CHECKED = 16 << 20  # bytes that are checked in one go


class Segment:
    """`held` as `layout` says it lies on the host `name`. Threads share it.

    Raises NotFoundError, naming the rank, if the memory of a rank is not here or has not that much.
    """

    def __init__(self, held: Held, layout: Layout, name: str) -> None:
        self.held, self.layout, self.name = held, layout, name
        self._parts: list[tuple[int, int, Bytes]] = []
        for rank, at, n in layout.of(name):
            report = held.parts[rank].report if rank in held.parts else None
            size = held.memory[rank].size if rank in held.memory else 0
            if size < n or (report is not None and report.size > n):
                raise NotFoundError(f"{size} bytes of rank {rank} at step {held.step} where {n} are to be")
            self._parts.append((at, n, held.memory[rank].buffer))
        self.nbytes = sum(n for _, n, _ in self._parts)
        self._sums: dict[int, int] = {}  # where a piece begins -> its CRC32C, taken when it was first sent
        self._intact = [Intact(held, r) for r in sorted(held.memory) if held.parts[r].report is not None]

    @property
    def share(self) -> Share:
        """Of its group's stripes."""
        placement = self.layout.placement
        return placement.groups[placement.group_of(self.name)].shares[self.name]

    def read(self, start: int, stop: int) -> list[Bytes]:
        """These bytes, where they are."""
        out = []
        for at, n, buffer in self._parts:
            first, last = max(start, at), min(stop, at + n)
            if first < last:
                out.append(buffer[first - at : last - at])
        return out

    def piece(self, start: int, stop: int) -> tuple[list[Bytes], int]:
        """A piece of a chunk, and its CRC32C as it was when it was first asked for."""
        parts = self.read(start, stop)
        if start not in self._sums:
            self._sums[start] = sum_of(parts)
        return parts, self._sums[start]

    def check_packs(self) -> None:
        """Whether the packs are what their trainers sealed. Raises IntegrityError."""
        for intact in self._intact:
            for at in range(0, intact.size, _CHECKED):
                intact.check(at, at + _CHECKED)

    def check(self, start: int, stop: int) -> None:
        """Whether these bytes are what was sent, as far as anything was. Raises IntegrityError."""
        for chunk in self.share.chunks:
            lo, hi = max(start, chunk.start), min(stop, chunk.stop)
            for a, b in pieces(lo - (lo - chunk.start) % PIECE, chunk.stop) if lo < hi else ():
                if a >= hi:
                    break
                if a in self._sums and sum_of(self.read(a, b)) != self._sums[a]:
                    raise IntegrityError(
                        f"what {self.name} holds of step {self.held.step} is damaged (bytes {a} to {b}, in pieces of "
                        f"{PIECE}); have the memory of that host tested"
                    )
