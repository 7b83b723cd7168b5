"""Reading a manifest that nobody vouches for: every number that a reader will trust is checked here."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as st_load

from ckpt.errors import FormatError, VersionError
from ckpt.format.codec import BLOCK, Codec
from ckpt.format.dtypes import dtype
from ckpt.format.manifest import PACK_COLUMNS, VERSION, Manifest, ObjectEntry, Packs
from ckpt.format.pack import ALIGN, MAX_HEADER, TensorSpec

__all__ = ["parse_manifest"]

_NO_CODEC = 0
_ATTEMPT = re.compile(r"a(0|[1-9][0-9]{0,8})")


def parse_manifest(data: bytes, where: str = "manifest") -> Manifest:
    """Reads and checks a manifest. Raises FormatError for anything a reader could not rely on."""
    try:
        return _parse(data)
    except FormatError as e:
        raise type(e)(f"{where}: {e}") from None
    except (SafetensorError, ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError) as e:
        raise FormatError(f"{where}: not a readable manifest ({type(e).__name__}: {e})") from None


def _parse(data: bytes) -> Manifest:
    if len(data) < 8 or int.from_bytes(data[:8], "little") > min(len(data), MAX_HEADER):
        raise FormatError("truncated or not a safetensors file")
    columns = st_load(data)
    header = json.loads(_column(columns, "header", "|u1").tobytes())
    _need(isinstance(header, dict) and header.get("format") == "ckpt-manifest", "not a ckpt manifest")
    version = header.get("version")
    _need(isinstance(version, int) and not isinstance(version, bool) and version > 0, f"version {version!r:.200}")
    if version > VERSION:
        raise VersionError(
            f"written in format version {version}, this ckpt reads up to {VERSION}; upgrade ckpt-universal"
        )
    _need(header["block"] == BLOCK, f"block size {header['block']!r:.200}")
    _need(all(isinstance(header[name], list) for name in ("tensors", "objects", "codecs")), "header lists")
    _need(isinstance(header["attempt"], str) and _ATTEMPT.fullmatch(header["attempt"]) is not None, "attempt name")
    tensors = tuple(_tensor(row) for row in header["tensors"])
    objects = tuple(_object(row) for row in header["objects"])
    aliases = header["aliases"]
    _need(isinstance(aliases, dict) and all(_text(v) for pair in aliases.items() for v in pair), "aliases")
    packs = Packs(**{name: _column(columns, f"pack.{name}", kind) for name, kind in PACK_COLUMNS})
    box = columns["box"]
    _need(box.ndim == 1 and box.dtype in (np.dtype("<u4"), np.dtype("<u8")), "box column")
    m = Manifest(
        step=_int(header["step"]),
        generation=_int(header["generation"]),
        attempt=header["attempt"],
        world=_int(header["world"]),
        tensors=tensors,
        objects=objects,
        codecs=tuple(Codec.from_manifest(c) for c in header["codecs"]),
        packs=packs,
        start=_column(columns, "start", "<i8"),
        pack=_column(columns, "pack", "<u4"),
        offset=_column(columns, "offset", "<u8"),
        length=_column(columns, "length", "<u8"),
        block=_column(columns, "block", "<u4"),
        box=box,
        codec=_column(columns, "codec", "|u1") if "codec" in columns else None,
        aliases=aliases,
    )
    _check_packs(m)
    _check_rows(m)
    return m


def _need(ok: object, what: str) -> None:
    if not ok:
        raise FormatError(f"damaged or hostile: {what}")


def _column(columns: Mapping[str, npt.NDArray[Any]], name: str, kind: str) -> npt.NDArray[Any]:
    column = columns[name]
    _need(column.ndim == 1 and column.dtype == np.dtype(kind), f"column {name!r}")
    return column


def _int(value: object) -> int:
    _need(isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62, f"number {value!r:.200}")
    assert isinstance(value, int)
    return value


def _text(value: object) -> bool:
    """Whether it is text that can be written again: JSON escapes can also name half characters."""
    return isinstance(value, str) and (value.isascii() or bool(value.encode()))


def _tensor(row: Sequence[Any]) -> TensorSpec:
    name, kind, shape, variant, layout = row
    _need(_text(name) and _text(variant) and _text(layout), "tensor entry")
    size = dtype(kind).itemsize
    if not isinstance(shape, list) or len(shape) > 64:
        raise FormatError(f"damaged or hostile: shape of {name[:200]!r}")
    for d in shape:
        if type(d) is not int or not 0 <= d < 2**62:
            raise FormatError(f"damaged or hostile: number {d!r:.200}")
        size *= d or 1
    if size >= 2**62:
        raise FormatError(f"damaged or hostile: shape of {name[:200]!r}")
    return TensorSpec(name, kind, tuple(shape), variant, layout)


def _object(row: Sequence[Any]) -> ObjectEntry:
    entry = ObjectEntry(*row)
    _need(all(_text(getattr(entry, f)) for f in ("name", "scope", "encoding", "value")), "object entry")
    _need(entry.encoding in ("json", "pickle"), f"encoding of object {entry.name[:200]!r}")
    return entry


def _check_packs(m: Manifest) -> None:
    p = m.packs
    _need(len({len(getattr(p, name)) for name, _ in PACK_COLUMNS}) == 1, "pack columns differ in length")
    _need(len(np.unique(p.writer)) == len(p), "two packs of one writer")
    limit = np.uint64(2**62)
    _need((p.size < limit).all() and (p.table_offset <= p.size).all(), "pack size")
    _need(((p.entry == 4) | (p.entry == 8)).all(), "block table entry size")
    _need((p.data_start >= ALIGN).all() and (p.data_start <= p.table_offset).all(), "pack data start")
    _need((p.data_start <= MAX_HEADER + 2 * ALIGN).all() and (p.data_start % ALIGN == 0).all(), "pack header size")
    table = p.blocks.astype(np.uint64) * p.entry
    _need((p.size - p.table_offset == table).all(), "block table size")


def _check_rows(m: Manifest) -> None:
    n, t = len(m.pack), len(m.tensors)
    _need(len(m.by_key) == t, "two tensors of one name")
    _need(len({(o.name, o.scope) for o in m.objects}) == len(m.objects), "two objects of one name and scope")
    _need(
        all(len(c) == n for c in (m.offset, m.length, m.block)) and (m.codec is None or len(m.codec) == n),
        "column lengths",
    )
    _need(len(m.start) == t + 1 and m.start[0] == 0 and m.start[-1] == n, "row index")
    _need((m.start[1:] >= m.start[:-1]).all(), "row index")  # compared, not subtracted: a difference can overflow
    _need(len(m.box) == m.box_start[-1], "box column length")
    if m.codec is not None:
        _need((m.codec <= len(m.codecs)).all(), "codec index")
    if not n:
        return
    _need((m.pack < len(m.packs)).all(), "pack index")
    end = m.packs.table_offset[m.pack]
    _need((m.offset >= m.packs.data_start[m.pack]).all() and (m.offset <= end).all(), "fragment offset")
    _need((m.length <= end - m.offset).all(), "fragment length")
    raw = _fragment_bytes(m)
    plain = slice(None) if m.codec is None else m.codec == _NO_CODEC
    _need((m.length[plain].astype(np.int64) == raw[plain]).all(), "fragment length differs from its box")
    blocks = -(-raw // BLOCK)
    _need((m.block.astype(np.int64) + blocks <= m.packs.blocks[m.pack].astype(np.int64)).all(), "block number")
    if m.codec is not None:
        coded = m.codec != _NO_CODEC
        _need((m.packs.entry[m.pack[coded]] == 8).all(), "coded fragment in a pack without stored lengths")


def _fragment_bytes(m: Manifest) -> npt.NDArray[np.int64]:
    """Raw bytes of every fragment, its box checked against its tensor's shape."""
    out = np.empty(len(m.pack), dtype=np.int64)
    for group in m.by_ndim:
        n = group.box[:, 1]
        bad = (group.box[:, 0] + n > group.shape).any(axis=1)
        if bad.any():
            name = m.tensors[int(group.tensor[int(np.argmax(bad))])].key
            raise FormatError(f"damaged or hostile: a box of {name[:200]!r} lies outside its shape")
        # Boxes are inside the shape, whose bytes were checked to stay below 2**62: the product cannot overflow.
        item = np.array([dtype(t.dtype).itemsize for t in m.tensors], dtype=np.int64)[group.tensor]
        out[group.row] = n.prod(axis=1) * item
    return out
