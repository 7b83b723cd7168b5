"""Linear combinations of stored elements, block by block, by numpy alone.

result = base - sum of w_i (base - x_i), each operation rounded by itself to float32 (float64 where that is stored) and
the result rounded once to the stored type, to the nearest, ties to even. So it depends on nothing but the elements: not
on where a block begins, how wide the processor's vectors are, or how many processes share the work. And what is the same
in all checkpoints stays as it is, bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ckpt.merge.weights import Floats

__all__ = ["AVERAGED", "NotFinite", "combine"]

Bytes = npt.NDArray[np.uint8]
_Array = npt.NDArray[Any]
_CHUNK = 1 << 16  # numbers at a time: all that is in use fits the core's own cache

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


class NotFinite(ArithmeticError):
    """A combination is not a finite number. `inputs`: which of the blocks hold such numbers; none if it overflowed."""

    def __init__(self, inputs: Sequence[int]) -> None:
        super().__init__(list(inputs))
        self.inputs = tuple(inputs)


def combine(blocks: Sequence[Bytes], weights: Floats, kind: str, out: Sequence[Bytes]) -> None:
    """Combines stored elements with each row of weights.

    blocks    n arrays of as many bytes: elements of dtype `kind`, which is in `AVERAGED`; the last is the base
    weights   float64 (rows, n); each row adds up to 1, that of the base follows from the others and is not used
    out       an array of bytes for each row, apart from the blocks

    Raises NotFinite where a result is infinite or no number, unless all blocks agree on that infinity.
    """
    stored = np.dtype(_STORED[AVERAGED[kind]])
    wide = np.float64 if stored.itemsize == 8 else np.float32
    inputs, results = [b.view(stored) for b in blocks], [o.view(stored) for o in out]
    x, base, apart, part = (np.zeros(_CHUNK, dtype=wide) for _ in range(4))
    sums = np.zeros((len(results), _CHUNK), dtype=wide)
    used = [k for k in range(len(blocks) - 1) if weights[:, k].any()]
    factor = weights.astype(wide)
    with np.errstate(over="ignore", invalid="ignore"):
        for at in range(0, len(inputs[0]), _CHUNK):
            n = min(_CHUNK, len(inputs[0]) - at)
            b = _widen(inputs[-1][at : at + n], kind, base)
            total, d, p = sums[:, :n], apart[:n], part[:n]
            total[...] = 0
            for k in used:
                np.subtract(b, _widen(inputs[k][at : at + n], kind, x), out=d)
                for row in range(len(results)):
                    if weights[row, k]:
                        np.multiply(d, factor[row, k], out=p)
                        np.add(total[row], p, out=total[row])
            for row, result in enumerate(results):
                np.subtract(b, total[row], out=p)
                if not _narrow(p, kind, result[at : at + n]):
                    some = [i[at : at + n] for i in inputs]
                    _carefully(some, factor[row], kind, result[at : at + n], wide)


def _carefully(inputs: Sequence[_Array], factor: _Array, kind: str, out: _Array, wide: Any) -> None:
    """As `combine`, where something is not finite: equal infinities are no difference."""
    values = [_widen(i, kind, np.zeros(len(i), dtype=wide)).copy() for i in inputs]
    base, total = values[-1], np.zeros(len(out), dtype=wide)
    for x, w in zip(values[:-1], factor[:-1], strict=True):
        if w:
            total += np.where(base == x, wide(0), base - x) * w
    result = base - total
    same = np.all([v == base for v, w in zip(values, factor, strict=True) if w or v is base], axis=0)
    _narrow(result, kind, out)
    rounded = _widen(out, kind, np.zeros(len(out), dtype=wide))
    bad = ~(np.isfinite(base - total) & np.isfinite(rounded) | same)
    if bad.any():
        raise NotFinite([k for k, v in enumerate(values) if not np.isfinite(v[bad]).all()])


def _widen(stored: _Array, kind: str, room: _Array) -> _Array:
    """Stored numbers as float32 or float64: as they lie there, or in `room`, whose lower halves are 0 for bfloat16."""
    if stored.dtype == room.dtype:
        return stored
    out = room[: len(stored)]
    if kind == "bfloat16":
        room.view("<u2")[1 : 2 * len(stored) : 2] = stored
    else:
        out[...] = stored
    return out


def _narrow(values: _Array, kind: str, out: _Array) -> bool:
    """Rounds to the stored type. Says whether all that came out is finite. Changes `values`."""
    if out.dtype == values.dtype:
        out[...] = values
        return bool(np.isfinite(values.sum())) or bool(np.isfinite(values).all())
    if kind != "bfloat16":
        out[...] = values
        return bool(np.isfinite(out).all())
    bits = values.view(np.uint32)
    finite = bool(np.isfinite(values.sum()))
    np.add(bits, (bits >> np.uint32(16) & np.uint32(1)) + np.uint32(0x7FFF), out=bits)
    out[...] = values.view("<u2")[1::2]
    return finite and int((out & np.uint16(0x7F80)).max(initial=0)) < 0x7F80
