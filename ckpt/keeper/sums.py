"""The CRC32C of any range of packs, made from those of their blocks: what their trainers took while they sealed them.

Bytes that were read anew only to take their sum would pass for well if they were damaged by then. Sums that follow from
those of the trainer do not: whoever compares them with what came has compared it with what was sealed.

CRC32C of A followed by B = shift(CRC(A), bytes of B) xor CRC(B), where shift multiplies by x^8 once a byte, modulo the
polynomial of Castagnoli (as crc32_combine of zlib does for its own).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

from ckpt.errors import IntegrityError
from ckpt.format.codec import crc32c

__all__ = ["Blocks", "joined", "sum_of"]

Bytes = npt.NDArray[np.uint8]
_POLYNOMIAL = 0x82F63B78  # bits in the order in which CRC32C has them
_LARGE = 1 << 15  # bytes: the sum of a smaller block is sooner taken than joined


def sum_of(parts: Sequence[Bytes], crc: int = 0) -> int:
    """CRC32C of several buffers as if they were one, continuing from `crc`."""
    for part in parts:
        crc = crc32c(part, crc)
    return crc


def joined(first: int, second: int, nbytes: int) -> int:
    """CRC32C of two stretches of bytes, from that of each; the second has `nbytes`."""
    bit = 0
    while nbytes >> bit:
        if nbytes >> bit & 1:
            first = _times(_byte_shift(bit), first)
        bit += 1
    return first ^ second


@cache
def _byte_shift(bit: int) -> tuple[int, ...]:
    """A multiplication by x^(8 * 2^bit), as what becomes of each bit of a sum."""
    if bit:
        half = _byte_shift(bit - 1)
        return tuple(_times(half, column) for column in half)
    out = []
    for n in range(32):
        crc = 1 << n
        for _ in range(8):
            crc = crc >> 1 ^ (_POLYNOMIAL if crc & 1 else 0)
        out.append(crc)
    return tuple(out)


def _times(columns: Sequence[int], crc: int) -> int:
    out = 0
    for column in columns:
        if crc & 1:
            out ^= column
        crc >>= 1
    return out


class Blocks:
    """Where the blocks of packs lie in a stretch of bytes, and their sums: int64 [n], int64 [n], and n of CRC32C, sorted.

    read  gives bytes `start` to `stop` of the stretch, where they are
    """

    def __init__(
        self,
        start: npt.NDArray[np.int64],
        end: npt.NDArray[np.int64],
        crc: npt.NDArray[np.uint32],
        read: Callable[[int, int], list[Bytes]],
    ) -> None:
        self._start, self._end, self._crc, self._read = start, end, crc, read

    def sum(self, start: int, stop: int) -> int:
        """CRC32C of this range, as it was sealed: of blocks that end in it and are large, without reading more of them
        than lies outside. The others are checked. Raises IntegrityError, naming the bytes.

        A block that goes over the end of the range is taken as it is there: the sum of the range in which it ends, which
        follows from the whole, does not fit then, if it is damaged.
        """
        lo, hi = np.searchsorted(self._end, start, "right"), np.searchsorted(self._start, stop, "left")
        crc, at = 0, start
        blocks = zip(
            self._start[lo:hi].tolist(), self._end[lo:hi].tolist(), self._crc[lo:hi].tolist(), strict=True
        )  # fmt: skip
        for first, end, known in blocks:
            if end - first < _LARGE:
                if sum_of(self._read(first, end)) != known:
                    raise IntegrityError(f"bytes {first} to {end}")
                continue
            if end > stop:
                break
            if first > at:
                crc, at = sum_of(self._read(at, first), crc), first
            if first < at:  # known = joined(what comes before, the rest)
                known = joined(sum_of(self._read(first, at)), known, end - at)
            crc, at = joined(crc, known, end - at), end
        return sum_of(self._read(at, stop), crc)
