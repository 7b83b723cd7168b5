"""The element types a checkpoint can hold, by torch's names, without importing torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ckpt.errors import FormatError

__all__ = ["DTYPES", "DType", "dtype"]


@dataclass(frozen=True, slots=True)
class DType:
    """One element type.

    `numpy` is a type of the same width under which the raw little-endian bytes can be moved and sliced;
    `exact` says that it also means the same values. `safetensors` is the code under which packs store it,
    or None where readers of that format may not know it: such tensors are stored as U8 with one more axis.
    """

    name: str
    itemsize: int
    numpy: np.dtype[np.generic]
    exact: bool
    safetensors: str | None


def _table() -> dict[str, DType]:
    rows: list[tuple[str, str, bool, str | None]] = [
        ("float64", "<f8", True, "F64"),
        ("float32", "<f4", True, "F32"),
        ("float16", "<f2", True, "F16"),
        ("bfloat16", "<u2", False, "BF16"),
        ("int64", "<i8", True, "I64"),
        ("int32", "<i4", True, "I32"),
        ("int16", "<i2", True, "I16"),
        ("int8", "|i1", True, "I8"),
        ("uint64", "<u8", True, "U64"),
        ("uint32", "<u4", True, "U32"),
        ("uint16", "<u2", True, "U16"),
        ("uint8", "|u1", True, "U8"),
        ("bool", "|b1", True, "BOOL"),
        ("float8_e4m3fn", "|u1", False, "F8_E4M3"),
        ("float8_e5m2", "|u1", False, "F8_E5M2"),
        ("float8_e4m3fnuz", "|u1", False, None),
        ("float8_e5m2fnuz", "|u1", False, None),
        ("float8_e8m0fnu", "|u1", False, None),
        ("float4_e2m1fn_x2", "|u1", False, None),
        ("complex32", "<u4", False, None),
        ("complex64", "<c8", True, None),
        ("complex128", "<c16", True, None),
    ]
    return {n: DType(n, np.dtype(np_).itemsize, np.dtype(np_), exact, st) for n, np_, exact, st in rows}


DTYPES = _table()


def dtype(name: str) -> DType:
    """The element type called `name`. Raises FormatError for one this version does not know."""
    try:
        return DTYPES[name]
    except (KeyError, TypeError):
        raise FormatError(f"unknown dtype {name!r}; a newer ckpt may read it") from None
