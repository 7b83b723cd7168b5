"""The fold of a running average: new = old + r (theta - old), over the bytes of a snapshot.

By compiled kernels where there are some, else by numpy: the results are the same to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ckpt.merge.native import address, kernels

__all__ = ["ACCUMULATORS", "BLOCK_NUMBERS", "Folds", "NotFinite", "norm"]

Bytes = npt.NDArray[np.uint8]
_Array = npt.NDArray[Any]

ACCUMULATORS = {
    "float64": "float64",
    "float32": "float32",
    "float16": "float32",
    "bfloat16": "float32",
    "complex128": "complex128",
    "complex64": "complex64",
    "complex32": "complex64",
}
"""Element types that are averaged -> the type they are averaged in. Others, float8 among them, whose scales live
elsewhere, are not."""

BLOCK_NUMBERS = 1 << 16
"""Numbers to fold at a time: what is in use fits the core's second cache, and Python's part is small."""


class NotFinite(ArithmeticError):
    """A snapshot holds what cannot be averaged: no number, or an infinity that the average does not have."""


class Folds:
    """new = old + r (theta - old) for each of several averages, one or more, of the same elements, block by block; for
    one thread.

    rates    0 copies the average, 1 copies theta; any other is rounded to the accumulator's type first
    guarded  refuse what is not finite; False is for rates of 0 and 1 alone
    """

    def __init__(self, rates: Sequence[float], *, guarded: bool = True) -> None:
        self._rates, self._guarded = rates, guarded
        self._which = [k for k, r in enumerate(rates) if 0 < r < 1]
        n = len(self._which)
        self._rounded = {4: np.array([rates[k] for k in self._which], "<f4")}
        self._rounded[8] = np.array([rates[k] for k in self._which], "<f8")
        self._sums, self._where = np.empty(n), np.empty((3, n), dtype=np.uintp)
        self._room = np.empty((n, 0), dtype=np.uint8)
        there = address(self._where)
        self._there = there, there + 8 * n, there + 16 * n if n > 1 else 0
        self._rest = {wide: (address(r), address(self._sums), n) for wide, r in self._rounded.items()}

    def __call__(
        self,
        theta: Bytes,
        kind: str,
        old: Sequence[Bytes | None],
        new: Sequence[Bytes],
        at: tuple[int, Sequence[int], Sequence[int]] | None = None,
    ) -> Iterator[tuple[float, Bytes]]:
        """Folds one block.

        theta  stored elements of dtype `kind`, which is in `ACCUMULATORS`
        old    accumulators; None where there is no average yet: the rate is then 1
        new    where the results go; apart from `old`
        at     addresses of theta, of each of `old` (anything for None) and of `new`, where the caller knows them

        Each operation is rounded by itself, so a result does not depend on where a block begins, and what does not change
        stays as it is bit by bit (but -0, which becomes 0). Yields, for each average when it is made, the sum of
        (theta - old)^2, 0 where nothing was to be computed; and the result where it is in the cache, until the next call.

        Raises NotFinite, with `new` undefined.
        """
        done = self._compiled(theta, kind, old, new, at)
        x: _Array | None = None
        for k, (a, r, b) in enumerate(zip(old, self._rates, new, strict=True)):
            if k in done:
                yield done[k], self._room[self._which.index(k), : len(b)] if len(self._which) > 1 else b
                continue
            if x is None:
                x = _widened(theta, kind, np.empty_like(b))
            yield _fold(theta, kind, x, a, r, b, self._guarded), b

    def _compiled(
        self,
        theta: Bytes,
        kind: str,
        old: Sequence[Bytes | None],
        new: Sequence[Bytes],
        at: tuple[int, Sequence[int], Sequence[int]] | None,
    ) -> dict[int, float]:
        """Folds what the compiled kernel can: average -> its sum of squares, which is finite."""
        kernel, which = kernels().fold.get(kind), self._which
        if kernel is None or not which:
            return {}
        if at is None:
            at = address(theta), [0 if a is None else address(a) for a in old], [address(b) for b in new]
        nbytes, wide = len(new[0]), _wide(kind)
        if len(which) > 1 and nbytes > self._room.shape[1]:
            self._room = np.empty((len(which), nbytes), dtype=np.uint8)
            self._where[2] = [address(row) for row in self._room]
        self._where[0] = [at[1][k] for k in which]
        self._where[1] = [at[2][k] for k in which]
        kernel(at[0], *self._there, *self._rest[wide], nbytes // wide)
        return {k: square for k, square in zip(which, self._sums.tolist(), strict=True) if math.isfinite(square)}


def _fold(theta: Bytes, kind: str, x: _Array, a: Bytes | None, r: float, b: Bytes, guarded: bool) -> float:
    """One of them, by numpy; x: theta in the accumulator's type."""
    target: _Array = b.view(x.dtype)
    if a is None or r == 1:
        if guarded and not math.isfinite(float(np.dot(x, x))) and np.isnan(x).any():
            raise NotFinite
        np.copyto(target, x)
        return 0.0
    before = a.view(x.dtype)
    if r == 0:
        np.copyto(target, before)
        return 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        np.subtract(x, before, out=target)
        square = float(np.dot(target, target))
        if not math.isfinite(square):
            square = _carefully(_widened(theta, kind, np.empty_like(b)), before, target)
        np.multiply(target, target.dtype.type(r), out=target)
        np.add(before, target, out=target)
    return square


def _carefully(x: _Array, before: _Array, difference: _Array) -> float:
    """Where something is not finite, or its square is not: equal infinities are no difference."""
    difference[x == before] = 0
    if not np.isfinite(difference).all() or not np.isfinite(x[x != before]).all():
        raise NotFinite
    return float(np.dot(difference.astype(np.float64), difference.astype(np.float64)))


def norm(theta: Bytes, kind: str) -> float:
    """The sum of squares of stored elements."""
    wide = _wide(kind)
    x = _widened(theta, kind, np.empty(len(theta) // _NUMBER.get(kind, wide) * wide, dtype=np.uint8))
    return float(np.dot(x, x))


def _wide(kind: str) -> int:
    """Bytes of a number of an accumulator."""
    return 8 if kind in ("float64", "complex128") else 4


_NUMBER = {"bfloat16": 2, "float16": 2, "complex32": 2}
"""Bytes of a number, where it is not as wide as the accumulator's."""


def _widened(theta: Bytes, kind: str, room: Bytes) -> _Array:
    """Stored numbers in the accumulator's type: as they lie there, or in `room`."""
    if kind in ("float64", "complex128"):
        return theta.view("<f8")
    if kind not in _NUMBER:
        return theta.view("<f4")
    out = room.view("<f4")
    if kind == "bfloat16":
        bits = out.view(np.uint32)
        bits[...] = theta.view("<u2")
        np.left_shift(bits, np.uint32(16), out=bits)
    else:
        out[...] = theta.view("<f2")
    return out
