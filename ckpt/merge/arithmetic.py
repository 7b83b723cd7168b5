"""Linear combinations of stored elements, block by block.

result = base - sum of w_i (base - x_i), each operation rounded by itself to float32 (float64 where that is stored) and
the result rounded once to the stored type, to the nearest, ties to even. So it depends on nothing but the elements: not
on where a block begins, how wide the processor's vectors are, or how many processes share the work. And what is the same
in all checkpoints stays as it is, bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ckpt.merge.native import address, addresses, kernels
from ckpt.merge.weights import Floats

__all__ = ["AVERAGED", "NotFinite", "Room", "combine", "squares"]

Bytes = npt.NDArray[np.uint8]
_Array = npt.NDArray[Any]
_CHUNK = 1 << 17  # numbers at a time: few enough that what is in use stays in the processor's caches

AVERAGED = {
    "float64": "float64",
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "complex128": "float64",
    "complex64": "float32",
    "complex32": "float16",
}
"""Element types that are averaged -> the type of the numbers they consist of. All others are only copied."""

_STORED = {"float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}


_UPPER = np.uint32(0xFFFF0000)
_TOO_LARGE = np.array(0x7F7F8000, dtype=np.uint32).view(np.float32)
"""The smallest float32 that bfloat16 rounds to infinity."""


class NotFinite(ArithmeticError):
    """A combination is not a finite number. `inputs`: which of the blocks hold such numbers; none if it overflowed."""

    def __init__(self, inputs: Sequence[int]) -> None:
        super().__init__(list(inputs))
        self.inputs = tuple(inputs)


class Room:
    """Scratch memory of `combine`, kept from call to call: 0.5 MiB (float64: 1) times 4 + rows. For one thread."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, int], _Array] = {}

    def take(self, rows: int, wide: str) -> _Array:
        """Uninitialised numbers (rows, 131072)."""
        found = self._kept.get((wide, rows))
        if found is None:
            found = self._kept[wide, rows] = np.empty((rows, _CHUNK), dtype=wide)
        return found


def combine(blocks: Sequence[Bytes], weights: Floats, kind: str, out: Sequence[Bytes], room: Room) -> None:
    """Combines stored elements with each row of weights.

    blocks    n arrays of as many bytes: elements of dtype `kind`, which is in `AVERAGED`; the last is the base
    weights   float64 (rows, n); each row adds up to 1, that of the base follows from the others and is not used
    out       an array of bytes for each row, apart from the blocks

    Raises NotFinite where a result is infinite or no number, unless all blocks agree on that infinity.
    """
    stored = np.dtype(_STORED[AVERAGED[kind]])
    wide = "<f8" if stored.itemsize == 8 else "<f4"
    inputs, results = [b.view(stored) for b in blocks], [o.view(stored) for o in out]
    memory = room.take(4 + len(results), wide)
    used = [k for k in range(len(blocks) - 1) if weights[:, k].any()]
    factor = weights.astype(wide)
    compiled = kernels().combine.get(kind) if len(out) == 1 else None
    with np.errstate(over="ignore", invalid="ignore"):
        for at in range(0, len(inputs[0]), _CHUNK):
            if compiled is not None and _compiled(
                compiled, [i[at : at + _CHUNK] for i in inputs], factor[0], used, results[0][at : at + _CHUNK]
            ):
                continue
            some = [i[at : at + _CHUNK] for i in inputs]
            n = len(some[0])
            x, base, d, p = (row[:n] for row in memory[:4])
            total = memory[4:, :n]
            b = _widen(some[-1], kind, base)
            total[...] = 0
            for k in used:
                np.subtract(b, _widen(some[k], kind, x), out=d)
                for row in range(len(results)):
                    if weights[row, k]:
                        product = p if len(results) > 1 else d
                        np.multiply(d, factor[row, k], out=product)
                        np.add(total[row], product, out=total[row])
            for row, result in enumerate(results):
                np.subtract(b, total[row], out=p)
                if not _narrow(p, kind, result[at : at + n], d):
                    _carefully(some, factor[row], kind, result[at : at + n])


def squares(blocks: Sequence[Bytes], start: Bytes, kind: str, room: Room) -> list[float]:
    """For each block the sum of (x - start)^2 over its numbers, in float64: numpy's pairwise sum, always of the whole block, so that
    it depends on nothing but the elements. A complex number counts as its two parts; equal infinities are no difference.

    blocks, start   arrays of as many bytes, at most 256 KiB: elements of dtype `kind`, which is in `AVERAGED`

    Raises NotFinite for any other number that is not finite; the index of `start` is len(blocks).
    """
    stored = np.dtype(_STORED[AVERAGED[kind]])
    memory = room.take(1, "<f8" if stored.itemsize == 8 else "<f4")[0]
    d, begun = (row[: len(start) // stored.itemsize] for row in room.take(2, "<f8"))
    begun[...] = _widen(start.view(stored), kind, memory)
    out = []
    with np.errstate(over="ignore", invalid="ignore"):
        for k, block in enumerate(blocks):
            x = _widen(block.view(stored), kind, memory)
            total = float(np.square(np.subtract(x, begun, out=d), out=d).sum())
            if not math.isfinite(total):
                np.subtract(x, begun, out=d)
                d[x == begun] = 0
                bad = ~np.isfinite(d)
                total = float(np.square(d, out=d).sum())
                if not math.isfinite(total):
                    raise NotFinite([i for i, v in ((k, x), (len(blocks), begun)) if not np.isfinite(v[bad]).all()])
            out.append(total)
    return out


def _compiled(
    function: Callable[..., int], inputs: Sequence[_Array], factor: _Array, used: Sequence[int], out: _Array
) -> bool:
    """One row of weights by a compiled kernel; whether all that came out is finite."""
    blocks, weights = addresses([inputs[k] for k in used]), factor[used]
    where = address(blocks), address(weights), len(used), address(inputs[-1]), address(out), len(out)
    return bool(function(*where))


def _carefully(inputs: Sequence[_Array], factor: _Array, kind: str, out: _Array) -> None:
    """As `combine`, where something is not finite: equal infinities are no difference."""
    wide = factor.dtype
    n = len(out)
    values = [_widen(i, kind, np.empty(n, dtype=wide)).copy() for i in inputs]
    base, total = values[-1], np.zeros(n, dtype=wide)
    for x, w in zip(values[:-1], factor[:-1], strict=True):
        if w:
            total += np.where(base == x, wide.type(0), base - x) * w
    result = base - total
    same = np.all([v == base for v, w in zip(values, factor, strict=True) if w or v is base], axis=0)
    _narrow(result, kind, out, np.empty(n, dtype=wide))
    rounded = _widen(out, kind, np.empty(n, dtype=wide))
    bad = ~(np.isfinite(base - total) & np.isfinite(rounded) | same)
    if bad.any():
        raise NotFinite([k for k, v in enumerate(values) if not np.isfinite(v[bad]).all()])


def _widen(stored: _Array, kind: str, room: _Array) -> _Array:
    """Stored numbers as float32 or float64: as they lie there, or in `room`.

    Those of bfloat16 in an order of their own: the lower and then the upper halves of 32-bit words, which processors
    take apart faster than they convert 16 bits to 32. `_narrow` puts them together again.
    """
    if stored.dtype == room.dtype:
        return stored
    out = room[: len(stored)]
    if kind == "bfloat16":
        half = len(stored) // 2
        bits, words = out.view(np.uint32), stored[: 2 * half].view(np.uint32)
        np.left_shift(words, np.uint32(16), out=bits[:half])
        np.bitwise_and(words, _UPPER, out=bits[half : 2 * half])
        if len(stored) % 2:
            bits[-1] = np.uint32(stored[-1]) << np.uint32(16)
    else:
        out[...] = stored
    return out


def _narrow(values: _Array, kind: str, out: _Array, scratch: _Array) -> bool:
    """Rounds to the stored type. Says whether all that came out is finite. Changes `values`, as `_widen` orders them, and
    `scratch`, which is as large."""
    if out.dtype == values.dtype:
        out[...] = values
        return bool(np.isfinite(values.sum())) or bool(np.isfinite(values).all())
    if kind != "bfloat16":
        out[...] = values
        return bool(np.isfinite(out).all())
    finite = bool(values.max(initial=0) < _TOO_LARGE and values.min(initial=0) > -_TOO_LARGE)
    bits, up = values.view(np.uint32), scratch.view(np.uint32)
    np.right_shift(bits, np.uint32(16), out=up)
    np.bitwise_and(up, np.uint32(1), out=up)
    np.add(up, np.uint32(0x7FFF), out=up)
    np.add(bits, up, out=bits)
    half = len(out) // 2
    np.bitwise_and(bits[half : 2 * half], _UPPER, out=up[:half])
    np.right_shift(bits, np.uint32(16), out=bits)
    np.bitwise_or(bits[:half], up[:half], out=out[: 2 * half].view(np.uint32))
    if len(out) % 2:
        out[-1] = bits[-1]
    return finite
