"""A checkpoint as a read-only Zarr v3 store: every tensor is an array that stock zarr opens.

Nothing is copied or converted: metadata is made from the manifest, chunks are made from checked bytes when they are
asked for. The tree is flat. A tensor's key is one array name below the root group ("model.layers.0.weight"), not
groups split at the dots: tensors may be called "a" and "a.b" in one checkpoint, but an array cannot hold another.
Characters that a Zarr path gives a meaning to are written as in URLs ("%2F"); the attribute "key" holds the true
key. Dtypes that Zarr lacks (bfloat16, float8, complex32, ...) appear as the unsigned integers of their width, with
the attribute "dtype" naming the true one. A further name of a tied tensor is an array, too, with the attribute
"alias_of".

Where the stored fragments form a regular grid, a chunk is one fragment, or equal parts or whole numbers of them
where those would be too large or too small; of irregular fragments a regular grid of virtual chunks is assembled.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest

from ckpt.errors import UsageError
from ckpt.format.dtypes import dtype
from ckpt.format.fragment import Box
from ckpt.format.manifest import Manifest

__all__ = ["CHUNK_BYTES", "CheckpointStore", "array_name", "chunk_shape"]

CHUNK_BYTES = 8 << 20
_METADATA = "zarr.json"


class _Tensor(Protocol):
    def raw(self, box: Box | None = None) -> npt.NDArray[Any]: ...


class _Checkpoint(Protocol):
    """What the store needs of an opened checkpoint."""

    manifest: Manifest

    @property
    def ref(self) -> str: ...

    @property
    def tensors(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class _Array:
    """One tensor as an array. `grid`: number of chunks along each axis."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    grid: tuple[int, ...]
    metadata: Mapping[str, Any]

    @property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunk) * dtype(self.dtype).itemsize

    def chunk_keys(self) -> Iterator[str]:
        """Relative to the array."""
        for index in itertools.product(*(range(n) for n in self.grid)):
            yield "/".join(["c", *map(str, index)])

    def box(self, chunk_key: str) -> Box | None:
        """The elements in a chunk ("c/0/1"), cut at the tensor's edge; None if there is no such chunk."""
        head, *digits = chunk_key.split("/")
        if head != "c" or len(digits) != len(self.grid) or not all(d.isascii() and d.isdecimal() for d in digits):
            return None
        index = [int(d) for d in digits]
        if any(str(i) != d or i >= n for i, d, n in zip(index, digits, self.grid, strict=True)):
            return None
        offset = tuple(i * c for i, c in zip(index, self.chunk, strict=True))
        extent = tuple(min(c, n - o) for o, c, n in zip(offset, self.chunk, self.shape, strict=True))
        return Box(offset, extent)


def array_name(key: str) -> str:
    """The name of a tensor's array: its key, with what a Zarr path would not keep written as in URLs."""
    text = "".join(f"%{ord(c):02X}" if c in "%/\\" or ord(c) < 32 else c for c in key)
    if text in ("", ".", "..", _METADATA) or text.startswith("__"):
        return f"%{ord(text[0]):02X}{text[1:]}" if text else "%"
    return text


def chunk_shape(
    shape: tuple[int, ...], itemsize: int, boxes: npt.NDArray[np.int64], target: int = CHUNK_BYTES
) -> tuple[int, ...]:
    """The chunks of a tensor whose fragments are `boxes` (int64 (n, 2, ndim): offsets, extents).

    At most `target` bytes, unless one element is larger, and not much less where the tensor is larger. Every axis of
    a chunk is at least 1, as Zarr asks even of an empty array.
    """
    grid = _grid_step(shape, boxes)
    chunk = list(grid)
    for d in range(len(shape)):
        inner = math.prod(chunk[d + 1 :]) * itemsize
        if chunk[d] * inner <= target:
            break
        chunk[d] = _part(grid[d], max(1, target // inner))
    for d in reversed(range(len(shape))):
        room = target // (math.prod(chunk) * itemsize)
        if chunk[d] % grid[d] or room < 2:
            break
        chunk[d] = min(chunk[d] * room, max(1, shape[d]))
        if chunk[d] < shape[d]:
            break
    return tuple(chunk)


def _grid_step(shape: tuple[int, ...], boxes: npt.NDArray[np.int64]) -> tuple[int, ...]:
    """The extent of the fragments if they form a regular grid (shorter ones at the edges only), else the shape."""
    full = np.maximum(1, np.array(shape, dtype=np.int64))
    if len(boxes) and shape:
        step = boxes[:, 1].max(axis=0)
        offset, extent = boxes[:, 0], boxes[:, 1]
        if (step > 0).all() and (offset % step == 0).all() and (extent == np.minimum(step, full - offset)).all():
            full = step
    return tuple(int(n) for n in full)


def _part(n: int, most: int) -> int:
    """An equal part of n, at most `most`, if there is one near it; else `most`."""
    fewest = -(-n // most)
    return next((n // k for k in range(fewest, min(2 * fewest, fewest + 64) + 1) if n % k == 0), most)


class CheckpointStore(Store):  # type: ignore[misc]  # zarr is untyped here
    """A checkpoint that zarr reads: `zarr.open_group(CheckpointStore(c), mode="r")`.

    Values are checked against their checksums whenever they are read; IntegrityError names what differs. Writing is
    refused. `aliases=False` leaves out the further names of tied tensors.
    """

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, checkpoint: _Checkpoint, *, chunk_bytes: int = CHUNK_BYTES, aliases: bool = True) -> None:
        super().__init__(read_only=True)
        if chunk_bytes < 1:
            raise UsageError(f"chunk_bytes={chunk_bytes!r}: a number of bytes, 1 or more")
        self._checkpoint, self._chunk_bytes, self._aliases = checkpoint, chunk_bytes, aliases
        m = checkpoint.manifest
        self._index = {array_name(spec.key): (spec.key, t) for t, spec in enumerate(m.tensors)}
        if aliases:
            self._index |= {array_name(alias): (alias, m.index(alias)) for alias in m.aliases}
        self._arrays: dict[str, _Array] = {}
        self._root: bytes | None = None

    # Content.

    def _array(self, name: str) -> _Array | None:
        if name not in self._index:
            return None
        if name not in self._arrays:
            self._arrays[name] = self._make(*self._index[name])
        return self._arrays[name]

    def _make(self, key: str, t: int) -> _Array:
        m = self._checkpoint.manifest
        spec = m.tensors[t]
        kind = dtype(spec.dtype)
        chunk = chunk_shape(spec.shape, kind.itemsize, m.boxes(t), self._chunk_bytes)
        zero: Any = {"b": False, "f": 0.0, "c": [0.0, 0.0]}.get(kind.numpy.kind, 0)
        endian = {} if kind.numpy.itemsize == 1 else {"configuration": {"endian": "little"}}
        attributes = {"key": key, "dtype": spec.dtype}
        if key != spec.key:
            attributes["alias_of"] = spec.key
        metadata = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(spec.shape),
            "data_type": kind.numpy.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": zero,
            "codecs": [{"name": "bytes", **endian}],
            "attributes": attributes,
            "storage_transformers": [],
        }
        grid = tuple(-(-n // c) for n, c in zip(spec.shape, chunk, strict=True))
        return _Array(key, spec.dtype, spec.shape, chunk, grid, metadata)

    def _root_metadata(self) -> bytes:
        """The root group with the metadata of all arrays inside: one read opens the tree."""
        if self._root is None:
            m = self._checkpoint.manifest
            arrays = {name: array.metadata for name in self._index if (array := self._array(name)) is not None}
            attributes: dict[str, Any] = {"ckpt": {"ref": self._checkpoint.ref, "step": m.step}}
            if m.aliases:
                attributes["ckpt"]["aliases"] = dict(m.aliases)
            root = {
                "zarr_format": 3,
                "node_type": "group",
                "attributes": attributes,
                "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": arrays},
            }
            self._root = json.dumps(root).encode()
        return self._root

    def read_key(self, key: str) -> bytes | npt.NDArray[np.uint8] | None:
        """The value of a store key, or None if there is none."""
        if key == _METADATA:
            return self._root_metadata()
        name, _, inner = key.partition("/")
        array = self._array(name)
        if array is None:
            return None
        if inner == _METADATA:
            return json.dumps(array.metadata).encode()
        box = array.box(inner)
        return None if box is None else self._chunk(array, box)

    def _chunk(self, array: _Array, box: Box) -> npt.NDArray[np.uint8]:
        tensor: _Tensor = self._checkpoint.tensors[array.key]
        values = tensor.raw(box)
        if box.shape != array.chunk:  # Zarr wants the chunks at the edges whole
            full = np.zeros(array.chunk, dtype=values.dtype)
            full[tuple(slice(0, n) for n in box.shape)] = values
            values = full
        return np.ascontiguousarray(values).reshape(-1).view(np.uint8)

    def chunks(self, name: str) -> Iterator[tuple[str, Box, tuple[int, ...]]]:
        """(store key, the elements in it, the shape it is filled up to) of every chunk of an array."""
        array = self._array(name)
        for key in array.chunk_keys() if array is not None else ():
            box = array.box(key) if array is not None else None
            if array is not None and box is not None:
                yield f"{name}/{key}", box, array.chunk

    def keys(self) -> Iterator[str]:
        """Every key of the store."""
        yield _METADATA
        for name in self._index:
            yield from self._keys_of(name)

    def _keys_of(self, name: str) -> Iterator[str]:
        array = self._array(name)
        if array is not None:
            yield f"{name}/{_METADATA}"
            for key in array.chunk_keys():
                yield f"{name}/{key}"

    def _keys_with(self, prefix: str) -> Iterator[str]:
        name, slash, _ = prefix.partition("/")
        candidates = self._keys_of(name) if slash else self.keys()
        return (key for key in candidates if key.startswith(prefix))

    def _size(self, key: str) -> int | None:
        """Bytes of a value, without reading a chunk."""
        name, _, inner = key.partition("/")
        array = self._array(name)
        if array is not None and array.box(inner) is not None:
            return array.chunk_bytes
        value = self.read_key(key)
        return None if value is None else len(value)

    # What zarr calls.

    def __eq__(self, value: object) -> bool:
        return (
            isinstance(value, CheckpointStore)
            and value._checkpoint is self._checkpoint
            and (value._chunk_bytes, value._aliases) == (self._chunk_bytes, self._aliases)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"CheckpointStore({self._checkpoint.ref!r})"

    def with_read_only(self, read_only: bool = False) -> CheckpointStore:
        if not read_only:
            self._refuse()
        return CheckpointStore(self._checkpoint, chunk_bytes=self._chunk_bytes, aliases=self._aliases)

    def get_sync(self, key: str, *, prototype: Any = None, byte_range: Any = None) -> Any:
        if prototype is None:
            from zarr.core.buffer import default_buffer_prototype

            prototype = default_buffer_prototype()
        value = self.read_key(key)
        return None if value is None else prototype.buffer.from_bytes(_cut(memoryview(value), byte_range))

    async def get(self, key: str, prototype: Any = None, byte_range: Any = None) -> Any:
        if not self._is_open:
            await self._open()
        return await asyncio.to_thread(self.get_sync, key, prototype=prototype, byte_range=byte_range)

    async def get_partial_values(self, prototype: Any, key_ranges: Iterable[tuple[str, Any]]) -> list[Any]:
        return list(await asyncio.gather(*(self.get(key, prototype, cut) for key, cut in key_ranges)))

    async def exists(self, key: str) -> bool:
        name, _, inner = key.partition("/")
        array = self._array(name)
        return key == _METADATA or (array is not None and (inner == _METADATA or array.box(inner) is not None))

    async def getsize(self, key: str) -> int:
        size = self._size(key)
        if size is None:
            raise FileNotFoundError(key)
        return size

    async def list(self) -> AsyncIterator[str]:
        for key in self.keys():
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        for key in self._keys_with(prefix):
            yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        prefix = prefix.rstrip("/")
        if not prefix:
            names: Iterable[str] = [_METADATA, *self._index]
        else:
            names = dict.fromkeys(key[len(prefix) + 1 :].split("/")[0] for key in self._keys_with(f"{prefix}/"))
        for name in names:
            yield name

    async def set(self, key: str, value: Any) -> None:
        self._refuse()

    async def delete(self, key: str) -> None:
        self._refuse()

    def _refuse(self) -> None:
        raise UsageError(f"{self._checkpoint.ref} is a checkpoint, which is never changed; write to another store")


def _cut(value: memoryview, byte_range: Any) -> memoryview:
    """The part of a value that a ByteRequest asks for."""
    if byte_range is None:
        return value
    if isinstance(byte_range, RangeByteRequest):
        return value[byte_range.start : byte_range.end]
    if isinstance(byte_range, OffsetByteRequest):
        return value[byte_range.offset :]
    if isinstance(byte_range, SuffixByteRequest):
        return value[max(0, len(value) - byte_range.suffix) :]
    raise UsageError(f"unknown byte range {byte_range!r}")
