"""The manifest: a columnar index over all packs of one step, itself a safetensors file.

Columns over fragments are sorted by tensor (then by box offset); what is said once per tensor, per pack or per
checkpoint stands in a JSON header. Parsing checks every number that a reader will trust: a manifest that came
through `parse.parse_manifest` cannot point outside its packs or outside a tensor's shape.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save as st_save

from ckpt.errors import FormatError, NotFoundError
from ckpt.format.codec import BLOCK, Codec
from ckpt.format.fragment import Box, tiles
from ckpt.format.pack import TensorSpec

__all__ = ["VERSION", "Manifest", "ObjectEntry", "Packs", "build_manifest", "dump_manifest", "PACK_COLUMNS"]

VERSION = 1
_SMALL = 1 << 16
_MANY = 16


@dataclass(frozen=True, slots=True)
class ObjectEntry:
    """A stored value that is not a tensor.

    `scope` is "replicated", or names one holder ("rank=3", "dp=1,tp=0"). `encoding` is "json" or "pickle"
    (base64 text); `value` is the text.
    """

    name: str
    scope: str
    encoding: str
    value: str


@dataclass(frozen=True, slots=True)
class Packs:
    """One row a pack. `writer` names it: a pack is `<attempt>/rank-<writer>.safetensors`. Bytes, from file start."""

    writer: npt.NDArray[np.uint32]
    size: npt.NDArray[np.uint64]
    data_start: npt.NDArray[np.uint64]
    header_crc: npt.NDArray[np.uint32]
    table_offset: npt.NDArray[np.uint64]
    blocks: npt.NDArray[np.uint32]
    entry: npt.NDArray[np.uint8]
    table_crc: npt.NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.writer)


PACK_COLUMNS: tuple[tuple[str, str], ...] = (
    ("writer", "<u4"),
    ("size", "<u8"),
    ("data_start", "<u8"),
    ("header_crc", "<u4"),
    ("table_offset", "<u8"),
    ("blocks", "<u4"),
    ("entry", "|u1"),
    ("table_crc", "<u4"),
)


@dataclass(frozen=True, slots=True)
class Rows:
    """Fragments of tensors with d dimensions: `row` of each, `tensor` it belongs to, `box` (n, 2, d), and the tensor's
    `shape` (n, d). Numbers above 2**62 are cut to that, so that sums of two cannot overflow."""

    row: npt.NDArray[np.int64]
    tensor: npt.NDArray[np.int64]
    box: npt.NDArray[np.int64]
    shape: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Manifest:
    """The index of one checkpoint.

    Fragment columns, one row a fragment, rows of tensor t at `start[t]:start[t+1]`:
    `pack` (row of `packs`), `offset` and `length` (bytes in the pack's file, as stored), `block` (number of its
    first block in the pack), `box` (offset then extent of each dimension, all rows of all tensors flattened),
    `codec` (0 for raw, else 1 + index into `codecs`).
    """

    step: int
    generation: int
    attempt: str
    world: int
    tensors: tuple[TensorSpec, ...]
    objects: tuple[ObjectEntry, ...]
    codecs: tuple[Codec, ...]
    packs: Packs
    start: npt.NDArray[np.int64]
    pack: npt.NDArray[np.uint32]
    offset: npt.NDArray[np.uint64]
    length: npt.NDArray[np.uint64]
    block: npt.NDArray[np.uint32]
    box: npt.NDArray[np.uint32] | npt.NDArray[np.uint64]
    codec: npt.NDArray[np.uint8] | None
    aliases: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def by_key(self) -> dict[str, int]:
        """Tensor key -> its index."""
        return {t.key: i for i, t in enumerate(self.tensors)}

    @cached_property
    def box_start(self) -> npt.NDArray[np.int64]:
        """Where the boxes of tensor t begin in `box`; one entry more than there are tensors."""
        width = np.array([2 * len(t.shape) for t in self.tensors], dtype=np.int64)
        return np.concatenate(([0], np.cumsum(np.diff(self.start) * width))).astype(np.int64)

    @cached_property
    def by_ndim(self) -> tuple[Rows, ...]:
        """All fragments, those of tensors with equally many dimensions together."""
        ndim = np.array([len(t.shape) for t in self.tensors], dtype=np.int64)
        owner = np.repeat(np.arange(len(self.tensors)), np.diff(self.start))
        of_row = ndim[owner]
        first = np.concatenate(([0], np.cumsum(2 * of_row)))[:-1]
        out = []
        for d in np.unique(of_row).tolist():
            row = np.flatnonzero(of_row == d)
            flat = self.box if len(row) == len(of_row) else self.box[first[row][:, None] + np.arange(2 * d)]
            box = np.minimum(flat, flat.dtype.type(min(2**62, np.iinfo(flat.dtype).max))).astype(np.int64)
            tensors = np.flatnonzero(ndim == d)
            shapes = np.array([self.tensors[t].shape for t in tensors.tolist()], dtype=np.int64).reshape(
                len(tensors), d
            )
            place = np.zeros(len(ndim), dtype=np.int64)
            place[tensors] = np.arange(len(tensors))
            out.append(Rows(row, owner[row], box.reshape(len(row), 2, d), shapes[place[owner[row]]]))
        return tuple(out)

    @cached_property
    def _in_a_row(self) -> npt.NDArray[np.bool_]:
        """Per tensor: whether its fragments, in order, cut it along one axis and nowhere else: the usual tiling."""
        out = np.zeros(len(self.tensors), dtype=bool)
        for group in self.by_ndim:
            first = np.flatnonzero(np.diff(group.tensor, prepend=-1))
            last = np.append(first[1:], len(group.tensor)) - 1
            lo, n = group.box[:, 0], group.box[:, 1]
            if lo.shape[1] == 0:
                out[group.tensor[first]] = first == last
                continue
            cut = np.logical_or.reduceat(n != group.shape, first, axis=0)
            axis = np.repeat(np.argmax(cut, axis=1), last - first + 1)
            at = np.arange(len(axis))
            lo, n, size = lo[at, axis], n[at, axis], group.shape[at, axis]
            joined = np.append(lo[1:] == lo[:-1] + n[:-1], True) & (n > 0)
            joined[last] = (lo + n == size)[last] & (n > 0)[last]
            whole = np.logical_and.reduceat(joined, first) & (lo[first] == 0)
            out[group.tensor[first]] = whole & (cut.sum(axis=1) <= 1)
        return out

    @cached_property
    def has_variants(self) -> dict[str, list[str]]:
        """Tensor name -> its variants, for those that have any."""
        out: dict[str, list[str]] = {}
        for t in self.tensors:
            if t.variant:
                out.setdefault(t.name, []).append(t.variant)
        return out

    def index(self, key: str) -> int:
        """The index of a tensor by key, aliases resolved. Raises NotFoundError."""
        found = self.by_key.get(key, self.by_key.get(self.aliases.get(key, key)))
        if found is None:
            raise NotFoundError(f"no tensor {key!r} in this checkpoint; `ckpt inspect` lists them")
        return found

    def boxes(self, t: int) -> npt.NDArray[np.int64]:
        """int64 (fragments of t, 2, ndim): offsets and extents."""
        ndim = len(self.tensors[t].shape)
        raw = self.box[self.box_start[t] : self.box_start[t + 1]].astype(np.int64)
        return raw.reshape(int(self.start[t + 1] - self.start[t]), 2, ndim)

    def count(self, t: int) -> int:
        """How many fragments tensor t has."""
        return self._row_start[t + 1] - self._row_start[t]

    def box_list(self, t: int) -> list[Box]:
        """The boxes of tensor t. From plain lists where the manifest is small: a load asks for every tensor."""
        spec = self.tensors[t]
        if len(self.pack) > _SMALL:
            return [Box(tuple(offset), tuple(shape)) for offset, shape in self.boxes(t).tolist()]
        flat, d = self._flat, len(spec.shape)
        at, n = self._flat_start[t], self._row_start[t + 1] - self._row_start[t]
        if not d:
            return [Box((), ())] * n
        return [Box(tuple(flat[k : k + d]), tuple(flat[k + d : k + 2 * d])) for k in range(at, at + 2 * d * n, 2 * d)]

    def find_box(self, t: int, box: Box) -> int | None:
        """The row of the fragment of tensor t that is this very box; None if there is none, or several."""
        first, stop, d = self._row_start[t], self._row_start[t + 1], len(self.tensors[t].shape)
        want = [*box.offset, *box.shape]
        if stop - first > _MANY:
            boxes = self.boxes(t).reshape(stop - first, 2 * d)
            rows = (first + np.flatnonzero((boxes == np.array(want)).all(axis=1))).tolist()
        elif len(self.pack) > _SMALL:
            rows = [
                first + k for k, row in enumerate(self.boxes(t).reshape(stop - first, 2 * d).tolist()) if row == want
            ]
        else:
            at, flat = self._flat_start[t], self._flat
            rows = [r for k, r in enumerate(range(first, stop)) if flat[at + 2 * d * k : at + 2 * d * (k + 1)] == want]
        return rows[0] if len(rows) == 1 else None

    @cached_property
    def _flat(self) -> list[int]:
        out: list[int] = self.box.tolist()
        return out

    @cached_property
    def _flat_start(self) -> list[int]:
        out: list[int] = self.box_start.tolist()
        return out

    @cached_property
    def _row_start(self) -> list[int]:
        out: list[int] = self.start.tolist()
        return out

    def pack_path(self, p: int) -> str:
        """Path of a pack, relative to the step's folder."""
        return f"{self.attempt}/rank-{int(self.packs.writer[p]):05d}.safetensors"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, before coding."""
        return sum(t.nbytes for t in self.tensors)

    def check_coverage(self, t: int) -> None:
        """Raises FormatError unless the fragments of tensor t tile it exactly."""
        if self._in_a_row[t]:
            return
        spec, boxes = self.tensors[t], self.boxes(t)
        total = sum(math.prod(row) for row in boxes[:, 1].tolist())
        if total != math.prod(spec.shape):
            raise FormatError(f"tensor {spec.key!r}: fragments hold {total} of {math.prod(spec.shape)} elements")
        if not tiles(spec.shape, boxes[:, 0], boxes[:, 1]):
            raise FormatError(f"tensor {spec.key!r}: fragments overlap and leave holes; the manifest is damaged")


def build_manifest(
    *,
    step: int,
    generation: int,
    attempt: str,
    world: int,
    tensors: Sequence[TensorSpec],
    objects: Sequence[ObjectEntry],
    codecs: Sequence[Codec],
    packs: Packs,
    aliases: Mapping[str, str],
    tensor: npt.NDArray[np.int64],
    boxes: npt.NDArray[np.int64],
    pack: npt.NDArray[np.int64],
    offset: npt.NDArray[np.uint64],
    length: npt.NDArray[np.uint64],
    block: npt.NDArray[np.uint32],
    codec: npt.NDArray[np.uint8] | None,
) -> Manifest:
    """Sorts fragments in any order into the manifest's. `boxes` is int64 (n, 2, D), zero-padded to D dimensions.

    Raises FormatError if two tensors would go by one key, as "a@rank=0" and "a" of rank 0 do.
    """
    names = Counter(t.key for t in tensors)
    if len(names) < len(tensors):
        raise FormatError(f"two tensors are both called {names.most_common(1)[0][0]!r}; rename one of them")
    keys = [boxes[:, 0, d] for d in reversed(range(boxes.shape[2]))]
    order = np.lexsort([*keys, tensor])
    tensor, boxes = tensor[order], boxes[order]
    start = np.searchsorted(tensor, np.arange(len(tensors) + 1)).astype(np.int64)
    ndim = np.array([len(t.shape) for t in tensors], dtype=np.int64)
    used = np.arange(boxes.shape[2])[None, None, :] < ndim[tensor][:, None, None]
    flat = boxes[np.broadcast_to(used, boxes.shape)]
    wide = any(d > 0xFFFFFFFF for t in tensors for d in t.shape)
    return Manifest(
        step=step,
        generation=generation,
        attempt=attempt,
        world=world,
        tensors=tuple(tensors),
        objects=tuple(objects),
        codecs=tuple(codecs),
        packs=packs,
        start=start,
        pack=pack[order].astype(np.uint32),
        offset=offset[order].astype(np.uint64),
        length=length[order].astype(np.uint64),
        block=block[order].astype(np.uint32),
        box=flat.astype(np.uint64) if wide else flat.astype(np.uint32),
        codec=None if codec is None or not codec.any() else codec[order].astype(np.uint8),
        aliases=dict(aliases),
    )


def dump_manifest(m: Manifest) -> bytes:
    """The bytes of a manifest; the same for the same content."""
    header = {
        "format": "ckpt-manifest",
        "version": VERSION,
        "block": BLOCK,
        "step": m.step,
        "generation": m.generation,
        "attempt": m.attempt,
        "world": m.world,
        "tensors": [[t.name, t.dtype, list(t.shape), t.variant, t.layout] for t in m.tensors],
        "aliases": dict(sorted(m.aliases.items())),
        "objects": [[o.name, o.scope, o.encoding, o.value] for o in m.objects],
        "codecs": [c.config for c in m.codecs],
    }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    columns: dict[str, npt.NDArray[Any]] = {
        "header": np.frombuffer(text, dtype=np.uint8),
        "start": m.start,
        "pack": m.pack,
        "offset": m.offset,
        "length": m.length,
        "block": m.block,
        "box": m.box,
    }
    if m.codec is not None:
        columns["codec"] = m.codec
    for name, _ in PACK_COLUMNS:
        columns[f"pack.{name}"] = getattr(m.packs, name)
    dense = {name: np.ascontiguousarray(column) for name, column in columns.items()}
    return bytes(st_save(dense, metadata={"ckpt": str(VERSION)}))
