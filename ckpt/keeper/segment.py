"""This host's part of one step, as one stretch of bytes: its ranks' slots, one behind the other, never copied."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ckpt.errors import IntegrityError, NotFoundError
from ckpt.keeper.groups import Share
from ckpt.keeper.holding import Held, Intact
from ckpt.keeper.streams import PIECE, pieces
from ckpt.keeper.sums import Blocks, sum_of
from ckpt.keeper.wire import Layout

__all__ = ["Segment"]

Bytes = npt.NDArray[np.uint8]
_CHECKED = 16 << 20  # bytes that are checked in one go
_NONE = np.empty(0, dtype=np.int64)


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
        self._sums: dict[int, int] = {}  # where a piece begins -> its CRC32C, once it was to be sent
        writers = [w for w in sorted(held.memory) if held.parts[w].report is not None]
        self._intact = [Intact(held, w) for w in writers]
        begin = {rank: at for rank, at, _ in layout.of(name)}
        starts, ends, sums = [_NONE], [_NONE], [_NONE.astype(np.uint32)]
        for writer, intact in zip(writers, self._intact, strict=True):
            base, (start, end, crc) = begin[writer % held.world] + held.start(writer), intact.blocks
            starts.append(base + start)
            ends.append(base + end)
            sums.append(crc)
        order = np.argsort(start_of_all := np.concatenate(starts), kind="stable")
        end_of_all, crc_of_all = np.concatenate(ends)[order], np.concatenate(sums)[order]
        self._blocks = Blocks(start_of_all[order], end_of_all, crc_of_all, self.read)

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
        """A piece of a chunk, and its CRC32C as the trainers sealed it. Raises IntegrityError."""
        if start not in self._sums:
            try:
                self._sums[start] = self._blocks.sum(start, stop)
            except IntegrityError as e:
                raise self._damaged(str(e)) from None
        return self.read(start, stop), self._sums[start]

    def check_packs(self) -> None:
        """Whether the packs are what their trainers sealed. Raises IntegrityError."""
        for intact in self._intact:
            for at in range(0, intact.size, _CHECKED):
                intact.check(at, at + _CHECKED)

    def check(self, start: int, stop: int, sound: set[int]) -> None:
        """Whether these bytes are what was sent, as far as anything was; of pieces that begin at `sound` that is known, and
        those that are join them. Raises IntegrityError."""
        for chunk in self.share.chunks:
            lo, hi = max(start, chunk.start), min(stop, chunk.stop)
            for a, b in pieces(lo - (lo - chunk.start) % PIECE, chunk.stop) if lo < hi else ():
                if a >= hi:
                    break
                if a in sound:
                    continue
                if a in self._sums and sum_of(self.read(a, b)) != self._sums[a]:
                    raise self._damaged(f"bytes {a} to {b}, in pieces of {PIECE}")
                sound.add(a)

    def _damaged(self, what: str) -> IntegrityError:
        return IntegrityError(
            f"what {self.name} holds of step {self.held.step} is damaged ({what}); have the memory of that host tested"
        )
