"""A manifest may come from anybody: whatever it says, a reader gets FormatError or something it can rely on."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
import struct
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import CODECS, assemble
from safetensors.numpy import load

from ckpt.errors import FormatError, NotFoundError
from ckpt.format.codec import BLOCK
from ckpt.format.dtypes import dtype
from ckpt.format.fragment import Box
from ckpt.format.manifest import Manifest, ObjectEntry, dump_manifest
from ckpt.format.pack import TensorSpec
from ckpt.format.parse import parse_manifest

CHECK = settings(max_examples=150, deadline=None, derandomize=True)
Columns = dict[str, np.ndarray]
CODES = {"<u4": "U32", "<u8": "U64", "<i8": "I64", "|u1": "U8", "<i4": "I32", "<f8": "F64", "|b1": "BOOL", "<u2": "U16"}


@functools.cache
def good() -> bytes:
    """A manifest with something of everything."""
    tensors = [
        TensorSpec("model.w", "float32", (4, 6)),
        TensorSpec("model.b", "bfloat16", (5,), "", '{"version":1}'),
        TensorSpec("rng", "uint8", (3,), "rank=0"),
        TensorSpec("rng", "uint8", (3,), "rank=1"),
        TensorSpec("step", "int64", ()),
        TensorSpec("none", "float64", (0, 7)),
    ]
    rows = [
        (0, Box((0, 0), (2, 6)), 0, None),
        (0, Box((2, 0), (2, 3)), 1, None),
        (0, Box((2, 3), (2, 3)), 1, CODECS[0]),
        (1, Box((0,), (5,)), 0, CODECS[1]),
        (2, Box((0,), (3,)), 0, None),
        (3, Box((0,), (3,)), 1, None),
        (4, Box((), ()), 1, None),
    ]
    objects = [ObjectEntry("lr", "replicated", "json", "0.1"), ObjectEntry("loader", "rank=1", "pickle", "gAQu")]
    return dump_manifest(assemble(tensors, rows, objects=objects, aliases={"model.tied": "model.w"})[1])


def parts() -> tuple[dict[str, Any], Columns]:
    """The JSON header and the columns of a good manifest, to be changed."""
    columns = {name: column.copy() for name, column in load(good()).items()}
    return json.loads(columns.pop("header").tobytes()), columns


def container(columns: Columns) -> bytes:
    """A safetensors file of any columns, in the order given."""
    header: dict[str, Any] = {}
    at = 0
    for name, column in columns.items():
        code = CODES[column.dtype.str]
        header[name] = {"dtype": code, "shape": list(column.shape), "data_offsets": [at, at + column.nbytes]}
        at += column.nbytes
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(c.tobytes() for c in columns.values())


def join(header: object, columns: Columns) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return container({"header": np.frombuffer(text, np.uint8), **columns})


def use(m: Manifest) -> None:
    """Everything that a reader does with a manifest, without a pack."""
    assert dump_manifest(parse_manifest(dump_manifest(m))) == dump_manifest(m)
    for p in range(len(m.packs)):
        attempt, slash, name = m.pack_path(p).partition("/")
        assert slash and attempt.strip("0123456789") == "a" and name.startswith("rank-") and "/" not in name
        assert 0 < m.packs.data_start[p] <= m.packs.table_offset[p] <= m.packs.size[p]
    for t, spec in enumerate(m.tensors):
        assert m.by_key[spec.key] == t and spec.nbytes < 2**62
        boxes = m.boxes(t)
        assert boxes.shape == (m.start[t + 1] - m.start[t], 2, len(spec.shape))
        for k, (offset, extent) in enumerate(boxes.tolist()):
            row = int(m.start[t]) + k
            assert Box(tuple(offset), tuple(extent)).within(spec.shape)
            p, n = int(m.pack[row]), math.prod(extent) * dtype(spec.dtype).itemsize
            assert int(m.offset[row]) + int(m.length[row]) <= int(m.packs.table_offset[p])
            assert int(m.block[row]) + -(-n // BLOCK) <= int(m.packs.blocks[p])
            assert (m.codec is not None and m.codec[row]) or int(m.length[row]) == n
        with contextlib.suppress(FormatError):
            m.check_coverage(t)
    for name in [*m.aliases, "no such tensor"]:
        with contextlib.suppress(NotFoundError):
            m.index(name)
    assert m.nbytes >= 0 and m.has_variants is not None
    assert all(c.make() is not None or True for c in m.codecs)


def survives(data: bytes) -> Manifest | None:
    """None if `data` is refused, as it should be."""
    try:
        m = parse_manifest(data, "here")
    except FormatError as e:
        assert str(e).startswith("here: ") and len(str(e)) < 2000
        str(e).encode()
        return None
    use(m)
    return m


def test_the_good_one_is_good() -> None:
    m = survives(good())
    assert m is not None and len(m.tensors) == 6 and len(m.pack) == 7 and len(m.codecs) == 2
    header, columns = parts()
    again = survives(join(header, columns))
    assert again is not None and dump_manifest(again) == good()


# --- bytes -----------------------------------------------------------------------------------------------------


@CHECK
@given(st.data())
def test_flipped_bits(data: st.DataObject) -> None:
    damaged = bytearray(good())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    survives(bytes(damaged))


@CHECK
@given(st.data())
def test_cut_and_spliced(data: st.DataObject) -> None:
    n = len(good())
    a, b = data.draw(st.integers(0, n)), data.draw(st.integers(0, n))
    survives(good()[:a] + data.draw(st.binary(max_size=16)) + good()[b:])


def test_every_truncation_is_refused() -> None:
    for n in [*range(0, 600), *range(600, len(good()), 37)]:
        assert survives(good()[:n]) is None


@given(st.binary(max_size=64))
@CHECK
def test_noise(data: bytes) -> None:
    assert survives(data) is None
    assert survives(struct.pack("<Q", len(data)) + data) is None


# --- fields ----------------------------------------------------------------------------------------------------

numbers = st.one_of(
    st.integers(-3, 9),
    st.sampled_from([s * 2**k + d for s in (1, -1) for k in (8, 31, 32, 61, 62, 63, 64, 100) for d in (-1, 0, 1)]),
)
odd = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.floats(), st.text(max_size=4), st.sampled_from(["../x", "\ud800"])),
    lambda inner: st.one_of(st.lists(inner, max_size=6), st.dictionaries(st.text(max_size=4), inner, max_size=4)),
    max_leaves=8,
)


def places(value: object) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    here: list[tuple[Any, Any]] = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(items):
        here += [(value, key), *places(child)]
    return here


@CHECK
@given(st.data())
def test_edited_header(data: st.DataObject) -> None:
    header, columns = parts()
    for _ in range(data.draw(st.integers(1, 3))):
        holder, key = data.draw(st.sampled_from(places(header)))
        what = data.draw(st.sampled_from(["set", "set", "drop", "twice"]))
        if what == "drop":
            holder.pop(key)
        elif what == "twice" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        else:
            holder[key] = data.draw(odd)
        if not places(header):
            break
    survives(join(header, columns))


@st.composite
def columns_like(draw: st.DrawFn, column: np.ndarray) -> np.ndarray:
    """A column with some values, its length, its type or its shape changed."""
    what = draw(st.sampled_from(["values", "values", "values", "length", "type", "shape"]))
    if what == "length":
        return np.resize(column, draw(st.integers(0, 2 * len(column) + 2)))
    if what == "type":
        return column.astype(draw(st.sampled_from(sorted(CODES))))
    if what == "shape":
        return column.reshape(1, -1) if draw(st.booleans()) else column.reshape(-1, 1)
    if column.ndim == 1 and len(column) and column.dtype.kind in "iu":
        i = draw(st.integers(0, len(column) - 1))
        info = np.iinfo(column.dtype)
        value = draw(st.one_of(numbers, st.sampled_from([int(info.min), int(info.max), int(column[i]) + 1])))
        column[i] = min(max(value, info.min), info.max)
    return column


@CHECK
@given(st.data())
def test_edited_columns(data: st.DataObject) -> None:
    header, columns = parts()
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(columns)))
        if data.draw(st.integers(0, 9)) == 0 and len(columns) > 1:
            del columns[name]
        else:
            columns[name] = data.draw(columns_like(columns[name]))
    survives(join(header, columns))


# --- cases that failed once, or that were thought of ---------------------------------------------------------------

Edit = Callable[[dict[str, Any], Columns], object]


def at(*path: object, value: object) -> Edit:
    """Sets a field of the header."""

    def edit(header: dict[str, Any], columns: Columns) -> None:
        holder: Any = header
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = value

    return edit


def cell(name: str, i: int, value: int) -> Edit:
    """Sets one value of a column."""
    return lambda header, columns: columns[name].__setitem__(i, value)


def column(name: str, *args: Any) -> Edit:
    """Replaces a column."""
    return lambda header, columns: columns.__setitem__(name, np.array(*args))


SHAPE = ("tensors", 0, 2)
REFUSED: dict[str, Edit] = {
    # Once accepted, hung, or ended in another error:
    "rows that wrap around 64 bits": column("start", [0, 2**63 - 1, -2, 7, 7, 7, 7], "<i8"),
    "a hundred thousand huge axes": at(*SHAPE, value=[2**61] * 100_000),
    "shape is text": at("tensors", 4, 2, value=""),
    "shape is an object": at("tensors", 4, 2, value={}),
    "version true": at("version", value=True),
    "version 0": at("version", value=0),
    "version -1": at("version", value=-1),
    "half a character in a name": at("tensors", 0, 0, value="\ud800"),
    "half a character in an alias": at("aliases", value={"\udfff": "model.w"}),
    "one object twice": lambda h, c: h["objects"].append(h["objects"][0]),
    "codecs is an object": lambda h, c: h.__setitem__("codecs", dict.fromkeys(h["codecs"])),
    # Versions and words:
    "version 2": at("version", value=2),
    "version 1.0": at("version", value=1.0),
    "version text": at("version", value="1"),
    "no version": lambda h, c: h.pop("version"),
    "another format": at("format", value="ckpt-commit"),
    "another block size": at("block", value=4096),
    "no tensors": lambda h, c: h.pop("tensors"),
    "tensors null": at("tensors", value=None),
    "tensors an object": at("tensors", value={"a": 1}),
    "row too short": at("tensors", 0, value=["w", "float32", [4, 6], ""]),
    "row too long": at("tensors", 0, value=["w", "float32", [4, 6], "", "", ""]),
    "row is text": at("tensors", 0, value="abcde"),
    "name is a number": at("tensors", 0, 0, value=7),
    "variant null": at("tensors", 0, 3, value=None),
    "layout an object": at("tensors", 0, 4, value={}),
    "unknown dtype": at("tensors", 0, 1, value="object"),
    "dtype a list": at("tensors", 0, 1, value=["float32"]),
    "another dtype": at("tensors", 0, 1, value="float64"),
    # Numbers:
    "step -1": at("step", value=-1),
    "step 2**62": at("step", value=2**62),
    "step true": at("step", value=True),
    "step 1.0": at("step", value=1.0),
    "step nan": at("step", value=math.nan),
    "step text": at("step", value="1"),
    "generation null": at("generation", value=None),
    "world a list": at("world", value=[4]),
    "shape negative": at(*SHAPE, value=[-4, -6]),
    "shape overflows to right": at(*SHAPE, value=[2**32, 2**32 + 6]),
    "shape overflows to zero": at(*SHAPE, value=[2**32, 2**32]),
    "shape huge beside zero": at(*SHAPE, value=[0, 2**61, 2**61]),
    "shape of 65 axes": at(*SHAPE, value=[1] * 65),
    "shape smaller than its boxes": at(*SHAPE, value=[3, 6]),
    "shape of another rank": at(*SHAPE, value=[24]),
    # Paths:
    "attempt ..": at("attempt", value=".."),
    "attempt a0/../..": at("attempt", value="a0/../.."),
    "attempt /a0": at("attempt", value="/a0"),
    "attempt a00": at("attempt", value="a00"),
    "attempt a0\\n": at("attempt", value="a0\n"),
    "attempt a-1": at("attempt", value="a-1"),
    "attempt a٣": at("attempt", value="a٣"),
    "attempt empty": at("attempt", value=""),
    "attempt a": at("attempt", value="a"),
    "attempt of ten digits": at("attempt", value="a1000000000"),
    "attempt a list": at("attempt", value=["a0"]),
    # Names twice:
    "two tensors of one name": at("tensors", 1, 0, value="model.w"),
    "two keys that read the same": at("tensors", 0, 0, value="rng@rank=0"),
    # Aliases, objects, codecs:
    "aliases a list": at("aliases", value=[["a", "b"]]),
    "alias of a number": at("aliases", value={"a": 1}),
    "object too short": at("objects", 0, value=["a", "replicated", "json"]),
    "object name null": at("objects", 0, 0, value=None),
    "object value not text": at("objects", 0, 3, value=1),
    "object encoding marshal": at("objects", 0, 2, value="marshal"),
    "codec pickle": at("codecs", 0, value='{"id": "pickle"}'),
    "codec of objects": at("codecs", 0, value='{"id": "json2"}'),
    "codec not text": at("codecs", 0, value={"id": "zstd"}),
    "codec a number": at("codecs", 0, value=5),
    "codec nested deeply": at("codecs", 0, value="[" * 100_000),
    "fewer codecs than used": lambda h, c: h["codecs"].pop(),
    # Columns:
    "no start": lambda h, c: c.pop("start"),
    "no pack.size": lambda h, c: c.pop("pack.size"),
    "start backwards": column("start", [0, 3, 2, 5, 6, 7, 7], "<i8"),
    "start from one": column("start", [1, 3, 4, 5, 6, 7, 7], "<i8"),
    "start too far": column("start", [0, 3, 4, 5, 6, 7, 8], "<i8"),
    "start too short": column("start", [0, 7], "<i8"),
    "start empty": column("start", [], "<i8"),
    "start negative": column("start", [0, -1, 4, 5, 6, 7, 7], "<i8"),
    "start unsigned": column("start", [0, 3, 4, 5, 6, 7, 7], "<u8"),
    "pack out of range": cell("pack", 0, 2),
    "pack at the end": cell("pack", 0, 2**32 - 1),
    "offset in the header": cell("offset", 0, 0),
    "offset behind the end": cell("offset", 0, 2**64 - 1),
    "offset and length wrap": lambda h, c: (cell("offset", 0, 2**64 - 40)(h, c), cell("length", 0, 96)(h, c)),
    "length too long": cell("length", 0, 2**64 - 1),
    "length too short": cell("length", 0, 44),
    "block out of range": cell("block", 0, 2**32 - 1),
    "codec out of range": cell("codec", 0, 255),
    "box outside": cell("box", 0, 3),
    "box extent huge": cell("box", 2, 2**32 - 1),
    "box offset huge": cell("box", 0, 2**32 - 1),
    "box offset and extent wrap": lambda h, c: (cell("box", 0, 2**32 - 1)(h, c), cell("box", 2, 3)(h, c)),
    "box wraps in 64 bits": lambda h, c: (
        c.__setitem__("box", c["box"].astype("<u8")),
        cell("box", 0, 2**64 - 1)(h, c),
        cell("box", 2, 3)(h, c),
    ),
    "box too short": lambda h, c: c.__setitem__("box", c["box"][:-1]),
    "box too long": lambda h, c: c.__setitem__("box", np.append(c["box"], c["box"][:1])),
    "box signed": lambda h, c: c.__setitem__("box", c["box"].astype("<i8")),
    "box of floats": lambda h, c: c.__setitem__("box", c["box"].astype("<f8")),
    "columns of two axes": lambda h, c: c.__setitem__("pack", c["pack"].reshape(1, -1)),
    "columns of other lengths": lambda h, c: c.__setitem__("length", c["length"][:-1]),
    "codec column short": lambda h, c: c.__setitem__("codec", c["codec"][:-1]),
    # Packs:
    "one writer twice": column("pack.writer", [1, 1], "<u4"),
    "pack columns of other lengths": column("pack.entry", [8], "|u1"),
    "pack of 2**62 bytes": cell("pack.size", 0, 2**62),
    "pack of 2**64 - 1 bytes": cell("pack.size", 0, 2**64 - 1),
    "data from 0": cell("pack.data_start", 0, 0),
    "data not on a page": cell("pack.data_start", 0, 4100),
    "data behind the table": cell("pack.data_start", 0, 2**40),
    "table behind the end": cell("pack.table_offset", 0, 2**63),
    "table inside the header": cell("pack.table_offset", 0, 0),
    "entries of 0 bytes": cell("pack.entry", 0, 0),
    "entries of 5 bytes": cell("pack.entry", 0, 5),
    "coded without stored lengths": cell("pack.entry", 0, 4),
    "more blocks than table": cell("pack.blocks", 0, 2**32 - 1),
    "header of a gigabyte": lambda h, c: [
        cell(f"pack.{name}", 0, value)(h, c)
        for name, value in (("data_start", 1 << 30), ("table_offset", 1 << 31), ("size", (1 << 31) + 24))
    ],
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    header, columns = parts()
    REFUSED[name](header, columns)
    begun = time.process_time()
    assert survives(join(header, columns)) is None
    assert time.process_time() - begun < 2


def test_a_newer_version_says_what_to_do() -> None:
    header, columns = parts()
    with pytest.raises(FormatError, match=r"version 2, .* up to 1; upgrade"):
        parse_manifest(join(header | {"version": 2}, columns))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[]",
        b"1",
        b"\xff\xfe",
        b"[" * 1_000_000,
        b'{"a":' * 200_000,
        b'{"format":"ckpt-manifest","version":1' + b"0" * 10_000 + b"}",
        b'{"format":"ckpt-manifest","version":NaN}',
        b'{"format":"ckpt-manifest","version":1e999}',
    ],
    ids=lambda b: b[:24].decode(errors="replace"),
)
def test_headers_that_are_no_header(text: bytes) -> None:
    assert survives(join(text, parts()[1])) is None


@pytest.mark.parametrize("claimed", [0, 7, 10**8 + 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 9, 2**64 - 1])
def test_container_headers_of_any_length(claimed: int) -> None:
    assert survives(struct.pack("<Q", claimed) + good()[8:]) is None


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]},
        {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]},
        {"dtype": "C64", "shape": [0], "data_offsets": [0, 0]},
        {"dtype": "U8", "shape": [2**40], "data_offsets": [0, 2**40]},
        {"dtype": "U8", "shape": [2**63, 2], "data_offsets": [0, 0]},
        {"dtype": "U8", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "U8", "shape": [4], "data_offsets": [4, 0]},
        {"dtype": "O", "shape": [], "data_offsets": [0, 8]},
    ],
    ids=lambda e: f"{e['dtype']} {e['shape']}",
)
def test_columns_of_no_known_type(entry: dict[str, Any]) -> None:
    text = json.dumps({"header": entry}).encode()
    assert survives(struct.pack("<Q", len(text)) + text + bytes(entry["data_offsets"][1] % 2**16)) is None


def test_claims_allocate_nothing() -> None:
    """Whatever is claimed, memory stays within a small multiple of what was sent."""
    claims = [
        [at(*SHAPE, value=[2**30, 2**29]), cell("box", 2, 2**30), cell("box", 3, 2**29)],
        [column("start", [0, 2**40, 2**41, 2**42, 2**43, 2**44, 7], "<i8")],
        [cell("pack.blocks", 0, 2**32 - 1), cell("pack.size", 0, 2**61)],
        [cell("length", 0, 2**61), cell("offset", 0, 2**61)],
        [at("world", value=2**61), at("step", value=2**61), at("generation", value=2**61)],
    ]
    survives(good())
    tracemalloc.start()
    try:
        for edits in claims:
            header, columns = parts()
            for edit in edits:
                edit(header, columns)
            data = join(header, columns)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            survives(data)
            assert tracemalloc.get_traced_memory()[1] - before < 64 * len(data) + (1 << 20)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("bits", [59, 60, 61, 62])
def test_rows_of_scalars_that_wrap_around(bits: int) -> None:
    """Their differences, taken in 64 bits, all look like counts; once that many were allocated."""
    header, columns = parts()
    n = 2 ** (64 - bits)
    header["tensors"] = [[f"t{i}", "int64", [], "", ""] for i in range(n)]
    columns |= {name: columns[name][-1:] for name in ("pack", "offset", "length", "block", "codec")}
    start = np.arange(n + 1, dtype=np.uint64) << np.uint64(bits)
    start[-1] = 1
    columns |= {"start": start.view("<i8"), "box": columns["box"][:0]}
    assert (np.diff(columns["start"]) >= 0).all()
    assert survives(join(header, columns)) is None
    columns["start"] = np.minimum(np.arange(n + 1), 1).astype("<i8")
    assert survives(join(header, columns)) is not None


def test_coverage_of_a_staircase_is_quick() -> None:
    """Boxes that all overlap along either axis took minutes with a sweep."""
    n = 30_000
    boxes = np.zeros((n, 2, 2), dtype=np.uint32)
    boxes[:, 0, 0] = boxes[:, 0, 1] = np.arange(n)
    boxes[:, 1, 0], boxes[:, 1, 1] = n - np.arange(n), 1
    header, columns = parts()
    header["tensors"] = [["w", "uint8", [n, n], "", ""]]
    length = (n - np.arange(n)).astype("<u8")
    end = int(columns["pack.data_start"][0]) + int(length.sum())
    columns |= {
        "start": np.array([0, n], "<i8"),
        "pack": np.zeros(n, "<u4"),
        "offset": (end - np.cumsum(length[::-1])[::-1]).astype("<u8"),
        "length": length,
        "block": np.zeros(n, "<u4"),
        "box": boxes.reshape(-1),
        "codec": np.zeros(n, "|u1"),
    }
    columns["pack.table_offset"][0] = end
    columns["pack.size"][0] = end + int(columns["pack.blocks"][0]) * int(columns["pack.entry"][0])
    m = parse_manifest(join(header, columns))
    begun = time.process_time()
    with pytest.raises(FormatError, match=f"of {n * n} elements"):
        m.check_coverage(0)
    assert time.process_time() - begun < 2
