"""The numbers that stored bytes stand for, by numpy alone: also for the element types that numpy does not have."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ckpt.format.dtypes import dtype

__all__ = ["numbers"]

# Exponent bits, mantissa bits, bias; then what the highest exponent and the negative zero mean.
_FLOAT8 = {"float8_e4m3fn": (4, 3, 7), "float8_e4m3fnuz": (4, 3, 8), "float8_e5m2fnuz": (5, 2, 16)}
_FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def numbers(raw: npt.NDArray[np.uint8], kind: str) -> npt.NDArray[Any]:
    """The values of n elements of dtype `kind`, from their little-endian bytes, uint8 (n, itemsize).

    Integers and booleans (as uint8), float16 to float64 and complex numbers come as they are; bfloat16, float8 and
    float4 as the float32 of the same value. Shape (n,), but (n, 2) where one element packs two numbers.
    """
    d = dtype(kind)
    bits = np.ascontiguousarray(raw).reshape(-1).view(d.numpy)
    if kind == "bool":
        return bits.view(np.uint8)
    if d.exact:
        return bits
    if kind == "bfloat16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if kind == "complex32":
        halves = np.ascontiguousarray(bits).view(np.float16).astype(np.float32)
        return halves.view(np.complex64)
    return _table(kind)[bits]


@lru_cache(maxsize=8)
def _table(kind: str) -> npt.NDArray[np.float32]:
    """The value of each byte of an 8-bit type: (256,), or (256, 2) for two numbers in one byte, the low one first."""
    byte = np.arange(256)
    if kind == "float8_e5m2":
        return (byte.astype(np.uint16) << np.uint16(8)).view(np.float16).astype(np.float32)
    if kind == "float8_e8m0fnu":
        power = np.ldexp(1.0, byte - 127)
        return np.where(byte == 255, np.nan, power).astype(np.float32)
    if kind == "float4_e2m1fn_x2":
        half = np.array([*_FLOAT4, *(-x for x in _FLOAT4)], dtype=np.float32)
        return np.stack([half[byte & 15], half[byte >> 4]], axis=1)
    exponent_bits, mantissa_bits, bias = _FLOAT8[kind]
    exponent, mantissa = byte >> mantissa_bits & (1 << exponent_bits) - 1, byte & (1 << mantissa_bits) - 1
    fraction = mantissa / (1 << mantissa_bits) + (exponent > 0)
    value = np.ldexp(fraction, np.maximum(exponent, 1) - bias) * np.where(byte < 128, 1.0, -1.0)
    nothing = byte == 0x80 if kind.endswith("fnuz") else byte & 0x7F == 0x7F
    return np.where(nothing, np.nan, value).astype(np.float32)
