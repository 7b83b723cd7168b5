"""The index of a torch DCP directory (".metadata"), a pickle, read without running anything that it says.

The reader makes plain records of the few names that such an index consists of, and refuses every other name.
Everything in the result was checked: shapes, boxes, places in files, names of files.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ckpt.backends import Backend
from ckpt.errors import CkptError, FormatError, NotFoundError, UnsafeError
from ckpt.format.dtypes import DTYPES, dtype
from ckpt.format.fragment import Box
from ckpt.format.pack import TensorSpec
from ckpt.offline.dcp_tree import Path, join

__all__ = ["Chunk", "Index", "Place", "read_index"]

_MAX_METADATA = 4 << 30


class _Record:
    """An instance of a class of DCP: its fields, and none of its code."""

    def __init__(self, *args: Any) -> None:
        self.__dict__["args"] = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.__dict__["state"] = state


class _Key(_Record):
    """MetadataIndex: it is a key of dicts."""

    def __hash__(self) -> int:
        return hash(self.__dict__["fqn"])

    def __eq__(self, other: object) -> bool:
        mine, theirs = self.__dict__, getattr(other, "__dict__", {})
        return bool(mine["fqn"] == theirs.get("fqn") and mine.get("offset") == theirs.get("offset"))


_DCP = "torch.distributed.checkpoint."
_RECORDS = {
    (_DCP + "metadata", "Metadata"),
    (_DCP + "metadata", "TensorStorageMetadata"),
    (_DCP + "metadata", "BytesStorageMetadata"),
    (_DCP + "metadata", "ChunkStorageMetadata"),
    (_DCP + "metadata", "TensorProperties"),
    (_DCP + "metadata", "StorageMeta"),
    (_DCP + "filesystem", "_StorageInfo"),
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"),
}
_PLAIN: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    (_DCP + "metadata", "_MEM_FORMAT_ENCODING"): int,
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"): int,
    ("torch.serialization", "_get_layout"): str,
    **{
        (module, f"{flavour}Path"): lambda *parts: "/".join(map(str, parts))
        for module in ("pathlib", "pathlib._local")
        for flavour in ("Posix", "PurePosix", "Windows", "PureWindows")
    },
}


class _Unpickler(pickle.Unpickler):
    """Knows the names that a DCP index is made of, and takes each for a plain record or a plain type."""

    def __init__(self, file: io.BytesIO, where: str) -> None:
        super().__init__(file)
        self._where = where
        # Classes of this call alone: a pickle can set attributes of the classes that it gets.
        self._known: dict[tuple[str, str], Any] = {name: type(name[1], (_Record,), {}) for name in _RECORDS}
        self._known[_DCP + "metadata", "MetadataIndex"] = type("MetadataIndex", (_Key,), {})
        self._known |= _PLAIN

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._known:
            return self._known[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return f"torch.{name}"
        raise UnsafeError(f"{self._where}: wants {module}.{name}, which has no place in the index of a checkpoint")


@dataclass(frozen=True)
class Place:
    """Bytes of one archive."""

    path: str
    offset: int
    length: int


@dataclass(frozen=True)
class Chunk:
    """A stored box of a tensor."""

    spec: TensorSpec
    box: Box
    place: Place

    @property
    def nbytes(self) -> int:
        return self.box.numel * dtype(self.spec.dtype).itemsize


@dataclass(frozen=True)
class Index:
    """What ".metadata" says. `paths`: DCP's names -> paths, where its planner recorded them."""

    chunks: tuple[Chunk, ...]
    objects: Mapping[str, Place]
    paths: Mapping[str, Path]
    specs: Mapping[str, TensorSpec]


def read_index(source: Backend) -> Index:
    """Raises NotFoundError, UnsafeError for names that do not belong there, FormatError for all else."""
    where = f"{source.root}/.metadata"
    try:
        data = source.fetch(".metadata", _MAX_METADATA)
    except NotFoundError:
        part = any(e.name.endswith(".metadata") for e in source.list(""))
        why = "one index a rank (use_collectives=False), which is not served" if part else "no .metadata"
        raise NotFoundError(f"{source.root}: not a torch DCP directory ({why})") from None
    try:
        return _index_of(_Unpickler(io.BytesIO(data), where).load())
    except CkptError as e:
        raise type(e)(str(e) if where in str(e) else f"{where}: {e}") from None
    except Exception as e:
        raise FormatError(f"{where}: not the index of a DCP checkpoint ({type(e).__name__}: {e})") from None


def _index_of(metadata: Any) -> Index:
    storage: dict[tuple[str, tuple[int, ...] | None], Place] = {}
    for key, info in metadata.storage_data.items():
        storage[str(key.fqn), _offset(getattr(key, "offset", None))] = _place(info)
    chunks: list[Chunk] = []
    objects: dict[str, Place] = {}
    specs: dict[str, TensorSpec] = {}
    for name, entry in metadata.state_dict_metadata.items():
        _need(isinstance(name, str), f"name {name!r:.100}")
        if type(entry).__name__ == "BytesStorageMetadata":
            objects[name] = _found(storage, name, None)
            continue
        spec = specs[name] = TensorSpec(name, _dtype(entry.properties, name), _sizes(entry.size))
        for chunk in entry.chunks:
            box = Box(_sizes(chunk.offsets), _sizes(chunk.sizes))
            _need(len(box.offset) == len(box.shape) and box.within(spec.shape), f"box {box} of {name!r}")
            if box.numel:
                chunks.append(Chunk(spec, box, _found(storage, name, box.offset)))
                _need(chunks[-1].nbytes <= chunks[-1].place.length, f"{box} of {name!r} is larger than its archive")
    planner = getattr(metadata, "planner_data", None)
    paths = dict(planner) if isinstance(planner, dict) else {}
    paths = {n: p for n, p in paths.items() if isinstance(n, str) and isinstance(p, tuple) and join(p) == n}
    _need(all(type(part) in (str, int) for p in paths.values() for part in p), "planner data")
    return Index(tuple(sorted(chunks, key=lambda c: (c.spec.name, c.box))), objects, paths, specs)


def _need(ok: object, what: str) -> None:
    if not ok:
        raise FormatError(f"damaged or hostile: {what}")


def _sizes(value: Any) -> tuple[int, ...]:
    _need(isinstance(value, tuple) and len(value) <= 64, f"shape {value!r:.100}")
    _need(all(type(n) is int and 0 <= n < 2**62 for n in value), f"shape {value!r:.100}")
    return tuple(value)


def _offset(value: Any) -> tuple[int, ...] | None:
    return None if value is None else _sizes(value)


def _dtype(properties: Any, name: str) -> str:
    found = getattr(properties, "dtype", None) or properties.__dict__["state"][0]
    kind = str(found).removeprefix("torch.")
    _need(kind in DTYPES, f"dtype {found!r:.100} of {name!r}")
    return kind


def _place(info: Any) -> Place:
    path, offset, length = info.relative_path, info.offset, info.length
    _need(isinstance(path, str) and all(type(n) is int and 0 <= n < 2**62 for n in (offset, length)), "storage entry")
    parts = path.split("/")
    inside = not any(p in ("", ".", "..") for p in parts) and "\x00" not in path and "\\" not in path
    _need(inside, f"file name {path!r:.200} leaves the folder")
    if getattr(info, "transform_descriptors", None):
        raise FormatError(f"stored through stream extensions {info.transform_descriptors!r:.100}, which are not served")
    return Place(path, offset, length)


def _found(storage: Mapping[Any, Place], name: str, offset: tuple[int, ...] | None) -> Place:
    place = storage.get((name, offset))
    if place is None:
        raise FormatError(f"no bytes for {name!r} at {offset}")
    return place
