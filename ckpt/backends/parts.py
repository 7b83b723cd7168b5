"""Which bytes of an upload become which of its parts. Pure: knows no store and no threads.

A store takes parts of at least `UNIT` bytes (but for the last one), numbered 1 to 10,000 in the order of the object.
Writers hand over pieces of any size in any order; a pack's header even comes last.
"""

from __future__ import annotations

from bisect import bisect_right, insort

from ckpt.backends.base import Buffer
from ckpt.errors import StorageError

__all__ = ["PARTS", "UNIT", "Parts"]

UNIT = 5 << 20
PARTS = 10_000


class Parts:
    """The pieces of an object of at most `size` bytes on their way to being parts.

    Invariant: between two parts that are out, or between the beginning and the first of them, lie no bytes or at least
    `unit`; so what is still to come can always be sent. A piece is held (copied) only where sending it would break that.
    """

    def __init__(self, size: int, unit: int = UNIT) -> None:
        self.unit = max(unit, -(-size // (PARTS - 1)))
        self._out: list[tuple[int, int]] = []
        self._held: list[tuple[int, bytes]] = []

    def number(self, offset: int) -> int:
        """Of the part that begins at `offset`: no two parts begin within one unit, so none is used twice."""
        return 1 + offset // self.unit

    def put(self, offset: int, data: Buffer) -> tuple[int, Buffer] | None:
        """Takes a piece. Returns what can be sent now, an offset and bytes: `data` itself or a part of it, or a copy
        that holds earlier pieces too."""
        k = bisect_right(self._out, (offset, offset))
        lo = self._out[k - 1][1] if k else 0
        hi = self._out[k][0] if k < len(self._out) else None
        first, last = self._run(offset, offset + len(data))
        start = first if first == lo or first - lo >= self.unit else lo + self.unit
        stop = last if hi is None or hi == last or hi - last >= self.unit else hi - self.unit
        if stop - start < self.unit:
            insort(self._held, (offset, bytes(data)))
            return None
        insort(self._out, (start, stop))
        end = offset + len(data)
        if offset <= start and stop <= end:
            for a, b in ((offset, start), (stop, end)):
                if a < b:
                    insort(self._held, (a, bytes(data[a - offset : b - offset])))
            return start, data[start - offset : stop - offset]
        insort(self._held, (offset, bytes(data)))
        return start, memoryview(self._take(start, stop))

    def rest(self, size: int | None) -> list[tuple[int, Buffer]]:
        """What is left to send at the end of an object of `size` bytes (None: of what was put).

        Raises StorageError for bytes that were never put, or if a part that is out reaches beyond the size.
        """
        end = max([b for _, b in self._out] + [a + len(d) for a, d in self._held], default=0)
        size = end if size is None else size
        if any(a < size < b for a, b in self._out):
            raise StorageError(
                f"an upload cannot be cut to {size} bytes: the part that reaches beyond is stored already"
            )
        self._out = [(a, b) for a, b in self._out if a < size or b == size]
        rest: list[tuple[int, Buffer]] = []
        at = 0
        for start, stop in [*self._out, (size, size)]:
            if at < start:
                rest.append((at, memoryview(self._take(at, start))))
            at = stop
        self._out = sorted([*self._out, *((a, a + len(d)) for a, d in rest)])
        return rest

    def out(self) -> list[int]:
        """Where the parts begin that were handed out, in order; without those that `rest` cut off."""
        return [a for a, _ in self._out]

    def _run(self, first: int, last: int) -> tuple[int, int]:
        """The held pieces on both sides that [first, last) makes one run with, and itself."""
        for a, d in reversed(self._held):
            if a + len(d) == first:
                first = a
        for a, d in self._held:
            if a == last:
                last = a + len(d)
        return first, last

    def _take(self, start: int, stop: int) -> bytearray:
        """Bytes [start, stop) of what is held, which is held no longer."""
        out, kept, got = bytearray(stop - start), [], 0
        for a, d in self._held:
            lo, hi = max(a, start), min(a + len(d), stop)
            if lo < hi:
                out[lo - start : hi - start] = d[lo - a : hi - a]
                got += hi - lo
                kept += [(x, d[x - a : y - a]) for x, y in ((a, lo), (hi, a + len(d))) if x < y]
            else:
                kept.append((a, d))
        if got != stop - start:
            raise StorageError(f"bytes {start} to {stop} of an upload were never written in full")
        self._held = sorted(kept)
        return out
