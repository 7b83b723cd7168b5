"""The compiled kernels of `kernels.c`, called in place through ctypes, which lets go of the GIL.

An installation without a C compiler has none: numpy then does the same, bit by bit, in more passes over memory.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Kernels", "address", "addresses", "kernels", "load"]

_NUMBERS = ("float32", "float64", "bfloat16")
_KINDS = {**{k: k for k in _NUMBERS}, "complex64": "float32", "complex128": "float64"}


@dataclass(frozen=True)
class Kernels:
    """By the type of what is stored; types that are not there are for numpy.

    fold     (x, old, new, made, rates, sums, averages, numbers); x by address, the others arrays of addresses or numbers, one
             for each average, `made` 0 for none; rates of the accumulator's type
    combine  (blocks, weights, terms, base, out, numbers) -> whether all of `out` is finite; blocks: addresses, as an array
    """

    fold: Mapping[str, Callable[[int, int, int, int, int, int, int, int], None]]
    combine: Mapping[str, Callable[[Any, int, int, int, int, int], int]]


def load(path: str) -> Kernels:
    """From a library that was built of kernels.c. Raises OSError or AttributeError for what is none."""
    library = ctypes.CDLL(path)
    fold, combine = {}, {}
    for kind in _NUMBERS:
        one, many = library[f"fold_{kind}"], library[f"combine_{kind}"]
        one.restype, one.argtypes = None, [*[ctypes.c_void_p] * 6, *[ctypes.c_size_t] * 2]
        many.restype = ctypes.c_int
        many.argtypes = [*[ctypes.c_void_p] * 2, ctypes.c_size_t, *[ctypes.c_void_p] * 2, ctypes.c_size_t]
        fold[kind], combine[kind] = one, many
    return Kernels({k: fold[v] for k, v in _KINDS.items()}, {k: combine[v] for k, v in _KINDS.items()})


@cache
def kernels() -> Kernels:
    """Those of this installation; without any if they were not built."""
    found = importlib.util.find_spec("ckpt.merge._kernels")
    if found is not None and found.origin is not None:
        try:
            return load(found.origin)
        except (OSError, AttributeError) as e:
            logging.getLogger("ckpt").warning(
                "ckpt: the compiled kernels cannot be used (%s): numpy does their work", e
            )
    return Kernels({}, {})


def address(array: npt.NDArray[Any]) -> int:
    """Where a contiguous array lies; whoever calls keeps it alive."""
    return int(array.ctypes.data)


def addresses(arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.uintp]:
    """As `address`, of several."""
    return np.array([a.ctypes.data for a in arrays], dtype=np.uintp)
