"""Values that are not tensors: to JSON and back, without pickle.

Python's and numpy's scalars and containers keep their types: what JSON lacks is tagged with "$". Anything else
must be wrapped in `Pickled` by whoever saves it, and allowed by whoever loads it.
"""

from __future__ import annotations

import base64
import datetime
import json
import math
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ckpt.errors import CkptError, FormatError, UnsafeError, UsageError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["PerCoordinate", "PerRank", "Pickled", "Replicated", "decode_object", "encode_object"]

_MAX_DEPTH = 200
_AS_IT_IS = frozenset((str, int, bool, type(None)))


@dataclass(frozen=True)
class Pickled:
    """Saves `value` with pickle. Reading it back needs `allow_pickle=True` at that call."""

    value: Any


@dataclass(frozen=True)
class Replicated:
    """`value` is the same on every rank; a save on ranks that differ fails and names them."""

    value: Any


@dataclass(frozen=True)
class PerRank:
    """`value` belongs to this rank. In another world rank r reads the value of rank r mod W, with a warning."""

    value: Any


@dataclass(frozen=True)
class PerCoordinate:
    """`value` belongs to this rank's coordinate on the named dimensions of a mesh, the same for all ranks there.

    On load a rank takes the value of its own coordinate; a coordinate that was not saved is an error.
    """

    value: Any
    mesh: DeviceMesh
    dims: tuple[str, ...]

    @property
    def scope(self) -> str:
        return ",".join(f"{d}={self.mesh.get_local_rank(d)}" for d in self.dims)


def encode_object(value: Any, where: str, tensor: Callable[[str, Any], bool] | None = None) -> tuple[str, str]:
    """(encoding, text) of a value. `tensor(path, leaf)` takes out the leaves it returns True for.

    Raises UsageError, naming `where`, for a value that JSON cannot hold and that is not `Pickled`.
    """
    if isinstance(value, Pickled):
        return "pickle", base64.b64encode(pickle.dumps(value.value)).decode()
    return "json", json.dumps(
        _plain(value, where, tensor, 0), separators=(",", ":"), allow_nan=False, ensure_ascii=False
    )


def decode_object(
    encoding: str, text: str, where: str, *, allow_pickle: bool = False, tensor: Callable[[str], Any] | None = None
) -> Any:
    """The value that was encoded; `tensor(path)` gives back the leaves that were taken out.

    Raises UnsafeError for pickled content without `allow_pickle`, FormatError for damage.
    """
    if encoding == "pickle":
        if not allow_pickle:
            raise UnsafeError(
                f"{where} is stored with pickle, which can run code; pass allow_pickle=True if you trust its writer"
            )
        return pickle.loads(base64.b64decode(text))
    try:
        return _rich(json.loads(text), tensor)
    except CkptError:
        raise
    except Exception as e:  # of whatever kind: the text comes from a file
        raise FormatError(f"{where}: damaged value ({type(e).__name__}: {str(e)[:500]})") from None


def _plain(value: Any, where: str, tensor: Callable[[str, Any], bool] | None, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise UsageError(f"{where}: nested deeper than {_MAX_DEPTH}, or it contains itself")
    if value is None or (isinstance(value, (bool, str)) and type(value) in (bool, str)):
        return value
    if type(value) is int:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else _tag("float", repr(value))
    if tensor is not None and tensor(where, value):
        return _tag("tensor", where)

    def below(part: object, child: Any) -> Any:
        return _plain(child, f"{where}.{part}", tensor, depth + 1)

    if isinstance(value, Mapping):
        if all(type(k) is str for k in value) and "$" not in value:
            return {k: below(k, v) for k, v in value.items()}
        return _tag("dict", [[_plain(k, where, None, depth + 1), below(k, v)] for k, v in value.items()])
    if type(value) is list:
        if _AS_IT_IS.issuperset(map(type, value)):
            return value  # thousands of parameter names, or a generator's state
        return [below(i, v) for i, v in enumerate(value)]
    if isinstance(value, tuple):
        if _AS_IT_IS.issuperset(map(type, value)):
            return _tag("tuple", list(value))
        return _tag("tuple", [below(i, v) for i, v in enumerate(value)])
    if isinstance(value, (set, frozenset)):
        items = [_plain(v, where, None, depth + 1) for v in value]
        return _tag("set", sorted(items, key=lambda v: json.dumps(v, sort_keys=True)))
    return _scalar(value, where)


def _scalar(value: Any, where: str) -> Any:
    if isinstance(value, (bytes, bytearray)):
        return _tag("bytes", base64.b64encode(value).decode())
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biufcSU":
        array = np.asarray(value)
        order = array.dtype.newbyteorder("<")
        data = base64.b64encode(np.ascontiguousarray(array, dtype=order).tobytes()).decode()
        return _tag("ndarray", [order.str, list(array.shape), data, isinstance(value, np.generic)])
    if isinstance(value, datetime.datetime):
        return _tag("datetime", value.isoformat())
    if isinstance(value, complex):
        return _tag("complex", [repr(value.real), repr(value.imag)])
    if isinstance(value, (bool, int, str, float)):  # subclasses, as enum.IntEnum
        return _plain(next(t for t in (bool, int, str, float) if isinstance(value, t))(value), where, None, 0)
    text = str(value)
    if type(value).__module__ == "torch" and type(value).__name__ in ("dtype", "device"):
        return _tag(type(value).__name__, text)
    raise UsageError(
        f"{where}: a {type(value).__module__}.{type(value).__qualname__} cannot be stored as JSON; "
        "store its plain parts, or wrap it in ckpt.Pickled(...)"
    )


def _tag(kind: str, value: Any) -> dict[str, Any]:
    return {"$": kind, "v": value}


def _rich(value: Any, tensor: Callable[[str], Any] | None) -> Any:
    if isinstance(value, list):
        return [_rich(v, tensor) for v in value]
    if not isinstance(value, dict):
        return value
    if "$" not in value:
        return {k: _rich(v, tensor) for k, v in value.items()}
    kind, v = value["$"], value["v"]
    if kind == "tensor":
        if tensor is None:
            raise ValueError(f"tensor {v!r} where none can be")
        return tensor(v)
    if kind == "float" and v in ("nan", "inf", "-inf"):
        return float(v)
    if kind == "dict":
        return {_key(_rich(k, None)): _rich(x, tensor) for k, x in v}
    if kind == "tuple":
        return tuple(_rich(x, tensor) for x in v)
    if kind == "set":
        return {_key(_rich(x, None)) for x in v}
    if kind == "bytes":
        return base64.b64decode(v, validate=True)
    if kind == "complex":
        return complex(float(v[0]), float(v[1]))
    if kind == "datetime":
        return datetime.datetime.fromisoformat(v)
    if kind == "ndarray":
        order, shape, data, scalar = v
        if np.dtype(order).kind not in "biufcSU":
            raise ValueError(f"array of {order}")
        array = np.frombuffer(base64.b64decode(data, validate=True), dtype=order).reshape(shape)
        return array.reshape(-1)[0] if scalar else array.copy()
    if kind in ("dtype", "device"):
        return _torch_word(kind, v)
    raise ValueError(f"unknown tag {kind!r}; a newer ckpt may read it")


def _key(value: Any) -> Any:
    hash(value)
    return value


def _torch_word(kind: str, text: str) -> Any:
    import torch

    if kind == "device":
        return torch.device(text)
    found = getattr(torch, text.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"no dtype {text!r}")
    return found
