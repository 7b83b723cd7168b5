"""The pack: one writer's fragments in one file, laid out once; a valid safetensors file.

0            u64 little-endian: length of the header
8            header: JSON, padded with spaces so that the data starts on a 4 KiB boundary
data_start   raw fragments, largest element first (then whole pages, then whole cache lines), so that each is aligned without holes;
             then coded fragments
table        last tensor, "ckpt.blocks": u32 CRC32C of each block, in file order; where the pack
             holds coded fragments, each followed by the block's stored length (u32)
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ckpt.errors import FormatError
from ckpt.format.codec import BLOCK, Codec, n_blocks
from ckpt.format.dtypes import dtype
from ckpt.format.fragment import Box

__all__ = ["ALIGN", "MAX_HEADER", "TABLE", "PackLayout", "Piece", "TensorSpec", "layout_pack"]

ALIGN = 4096
TABLE = "ckpt.blocks"
MAX_HEADER = 100_000_000  # as in the safetensors library
_RESERVED = ("__metadata__", TABLE)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A stored tensor: its name, element type and global shape.

    `variant` is "" for the one tensor of that name, or says which of several it is ("rank=3").
    `layout` is the JSON of how the training program cut it ("" if there is nothing to say; see layout.py).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    variant: str = ""
    layout: str = ""

    @property
    def key(self) -> str:
        return f"{self.name}@{self.variant}" if self.variant else self.name

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class Piece:
    """One fragment that a writer stores: a box of a tensor, raw or coded."""

    tensor: TensorSpec
    box: Box
    codec: Codec | None = None

    @property
    def nbytes(self) -> int:
        """Bytes before coding."""
        return self.box.numel * dtype(self.tensor.dtype).itemsize

    @property
    def stored_name(self) -> str:
        """The FQN for a whole tensor, else "fqn[a:b,c:d]"."""
        whole = self.box.shape == self.tensor.shape
        plain = whole and self.codec is None and self.tensor.name not in _RESERVED
        return self.tensor.key if plain else f"{self.tensor.key}{self.box}"


@dataclass(frozen=True)
class PackLayout:
    """Where everything in a pack goes. Offsets are bytes from the start of the file.

    `order[i]` is the index, in the caller's list, of the i-th piece of the file. `offset`, `length` and `block`
    (the number of the piece's first block) are by file order. For coded pieces they hold the raw lengths until
    they are written: then `layout_pack(..., stored=...)` gives the true ones.
    """

    pieces: tuple[Piece, ...]
    order: npt.NDArray[np.int64]
    offset: npt.NDArray[np.uint64]
    length: npt.NDArray[np.uint64]
    block: npt.NDArray[np.uint32]
    n_blocks: int
    entry: int
    data_start: int
    table_offset: int
    size: int

    @cached_property
    def header(self) -> bytes:
        """The first `data_start` bytes of the file."""
        body = _header_json(self.pieces, self.length.tolist(), self.n_blocks, self.entry)
        if 8 + len(body) > self.data_start:
            raise FormatError(
                f"pack header grew to {len(body)} bytes; a codec expanded its input by more than a quarter"
            )
        return struct.pack("<Q", self.data_start - 8) + body.ljust(self.data_start - 8)


def _file_order(item: tuple[int, Piece]) -> tuple[bool, int, int, str, Box]:
    """Raw before coded, large elements first; among them whole pages, then whole cache lines, then the rest: so that
    most bytes lie in the file as they lie in memory, which is worth a quarter of the speed of a read."""
    piece = item[1]
    uneven = 0 if piece.nbytes % ALIGN == 0 else 1 if piece.nbytes % 64 == 0 else 2
    return piece.codec is not None, -dtype(piece.tensor.dtype).itemsize, uneven, piece.tensor.key, piece.box


def layout_pack(pieces: Sequence[Piece], stored: Sequence[int] | None = None) -> PackLayout:
    """Lays out a pack. `stored`: lengths in file order once coded pieces are written; without it, upper bounds.

    The header's room is the same in both cases, so the data can be written before it.
    """
    ranked = sorted(enumerate(pieces), key=_file_order)
    ordered = tuple(p for _, p in ranked)
    raw = [p.nbytes for p in ordered]
    lengths = raw if stored is None else list(stored)
    blocks = [n_blocks(n) for n in raw]
    entry = 8 if any(p.codec for p in ordered) else 4
    # Digits only grow with the numbers: raw lengths plus 25% and 1 KiB a block bound what any codec stores.
    bound = [n if p.codec is None else n + n // 4 + 1024 * b for p, n, b in zip(ordered, raw, blocks, strict=True)]
    room = len(_header_json(ordered, bound, sum(blocks), entry))
    data_start = -(-(8 + room) // ALIGN) * ALIGN
    if data_start - 8 > MAX_HEADER:
        raise FormatError(f"pack header of {len(ordered)} fragments exceeds {MAX_HEADER} bytes; use more writers")
    starts = (
        data_start + np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))) if lengths else np.array([data_start])
    )
    table = int(starts[-1])
    total_blocks = sum(blocks)
    return PackLayout(
        pieces=ordered,
        order=np.array([i for i, _ in ranked], dtype=np.int64),
        offset=starts[: len(ordered)].astype(np.uint64),
        length=np.array(lengths, dtype=np.uint64),
        block=np.concatenate(([0], np.cumsum(blocks)))[: len(ordered)].astype(np.uint32),
        n_blocks=total_blocks,
        entry=entry,
        data_start=data_start,
        table_offset=table,
        size=table + total_blocks * entry,
    )


def _header_json(pieces: Sequence[Piece], lengths: Sequence[int], blocks: int, entry: int) -> bytes:
    header: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    at = 0
    for piece, length in zip(pieces, lengths, strict=True):
        kind = dtype(piece.tensor.dtype)
        name = piece.stored_name
        if name in header:
            raise FormatError(f"two fragments of one pack are both called {name!r}")
        if piece.codec is not None:
            code, shape = "U8", [length]
        elif kind.safetensors is None:
            code, shape = "U8", [*piece.box.shape, kind.itemsize]
        else:
            code, shape = kind.safetensors, list(piece.box.shape)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [at, at + length]}
        if name != piece.tensor.name or kind.safetensors is None:
            extra[name] = _extra(piece)
        at += length
    header[TABLE] = {"dtype": "U8", "shape": [blocks, entry], "data_offsets": [at, at + blocks * entry]}
    meta = {"ckpt": "1", "ckpt.block": str(BLOCK)}
    if extra:
        meta["ckpt.fragments"] = json.dumps(extra, separators=(",", ":"), ensure_ascii=False)
    return json.dumps({"__metadata__": meta, **header}, separators=(",", ":"), ensure_ascii=False).encode()


def _extra(piece: Piece) -> dict[str, Any]:
    """What safetensors cannot say about a stored piece."""
    tensor = piece.tensor
    out: dict[str, Any] = {"tensor": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape)}
    out["offset"], out["extent"] = list(piece.box.offset), list(piece.box.shape)
    if tensor.variant:
        out["variant"] = tensor.variant
    if piece.codec is not None:
        out["codec"] = json.loads(piece.codec.config)
    return out
