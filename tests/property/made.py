"""Random tensors, cut and spread over packs, with the bytes and the manifest of a checkpoint that holds them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from ckpt.format.codec import BLOCK, Codec, crc32c
from ckpt.format.dtypes import DTYPES, dtype
from ckpt.format.fragment import Box, whole
from ckpt.format.manifest import Manifest, ObjectEntry, Packs, build_manifest
from ckpt.format.pack import PackLayout, Piece, TensorSpec, layout_pack

CODECS = [Codec.of("zstd"), Codec.of({"id": "blosc", "cname": "lz4", "shuffle": 2}), Codec.of("lz4")]

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
names = st.one_of(
    text,
    st.from_regex(r"(model|optim)\.layers\.[0-9]\.(weight|bias)", fullmatch=True),
    st.sampled_from(["__metadata__", "ckpt.blocks", "a", "a[0:2]", "a@rank=1", "a@rank=1[0:2]"]),
)
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
specs = st.builds(
    TensorSpec, names, st.sampled_from(sorted(DTYPES)), shapes, st.sampled_from(["", "", "rank=1", "dp=0,tp=1"]), text
)
objects = st.builds(
    ObjectEntry, text, st.sampled_from(["replicated", "rank=3", "dp=1,tp=0"]), st.sampled_from(["json", "pickle"]), text
)


@dataclass(frozen=True)
class Case:
    """A checkpoint: what was cut, the bytes of each pack, and its manifest before it is written."""

    tensors: tuple[TensorSpec, ...]
    rows: tuple[tuple[int, Box, int, Codec | None], ...]  # tensor, box, pack, codec
    packs: tuple[bytes, ...]
    manifest: Manifest


@st.composite
def cuts(draw: st.DrawFn, shape: tuple[int, ...], most: int = 3) -> list[Box]:
    """A tiling without empty boxes."""
    out = [whole(shape)] if math.prod(shape) else []
    for _ in range(draw(st.sampled_from([most, 1, 0, 2])) if out else 0):
        box = out.pop(draw(st.integers(0, len(out) - 1)))
        longest = max(box.shape, default=1)
        if longest < 2:
            return [*out, box]
        axis = box.shape.index(longest)
        k = draw(st.integers(1, longest - 1))
        for o, s in ((0, k), (k, longest - k)):
            offset = tuple(a + (o if d == axis else 0) for d, a in enumerate(box.offset))
            out.append(Box(offset, tuple(s if d == axis else n for d, n in enumerate(box.shape))))
    return out


def content(box: Box, spec: TensorSpec, seed: int = 0) -> bytes:
    """Bytes that are valid for every dtype, bool included."""
    n = box.numel * dtype(spec.dtype).itemsize
    return np.random.default_rng([seed, *box.offset]).integers(0, 2, n, dtype=np.uint8).tobytes()


def write(pieces: Sequence[Piece]) -> tuple[PackLayout, bytes]:
    """A pack, as a writer makes it."""
    layout = layout_pack(pieces)
    stored, table = [], []
    for piece in layout.pieces:
        raw = content(piece.box, piece.tensor)
        blocks = [raw[i : i + BLOCK] for i in range(0, len(raw), BLOCK)]
        if piece.codec is not None:
            coder = piece.codec.make()
            blocks = [bytes(coder.encode(np.frombuffer(b, np.uint8))) for b in blocks]
        stored.append(b"".join(blocks))
        table += [[crc32c(b), len(b)][: layout.entry // 4] for b in blocks]
    layout = layout_pack(pieces, [len(s) for s in stored])
    data = layout.header + b"".join(stored) + np.array(table, dtype="<u4").tobytes()
    assert len(data) == layout.size
    return layout, data


def assemble(
    tensors: Sequence[TensorSpec], rows: Sequence[tuple[int, Box, int, Codec | None]], **more: object
) -> tuple[list[bytes], Manifest]:
    """Packs and manifest of fragments in any order."""
    writers = sorted({p for _, _, p, _ in rows})
    ndim = max((len(t.shape) for t in tensors), default=0)
    boxes = np.zeros((len(rows), 2, ndim), dtype=np.int64)
    offset, length = np.zeros(len(rows), np.uint64), np.zeros(len(rows), np.uint64)
    block = np.zeros(len(rows), np.uint32)
    layouts, data = [], []
    for w in writers:
        mine = [i for i, row in enumerate(rows) if row[2] == w]
        layout, packed = write([Piece(tensors[rows[i][0]], rows[i][1], rows[i][3]) for i in mine])
        layouts.append(layout)
        data.append(packed)
        for k, i in enumerate(layout.order.tolist()):
            row = mine[i]
            offset[row], length[row], block[row] = layout.offset[k], layout.length[k], layout.block[k]
    for i, (_, box, _, _) in enumerate(rows):
        boxes[i, 0, : len(box.offset)], boxes[i, 1, : len(box.shape)] = box.offset, box.shape
    used = sorted({c for *_, c in rows if c is not None}, key=lambda c: c.config)
    packs = Packs(
        writer=np.array(writers, np.uint32),
        size=np.array([x.size for x in layouts], np.uint64),
        data_start=np.array([x.data_start for x in layouts], np.uint64),
        header_crc=np.array([crc32c(d[: x.data_start]) for x, d in zip(layouts, data, strict=True)], np.uint32),
        table_offset=np.array([x.table_offset for x in layouts], np.uint64),
        blocks=np.array([x.n_blocks for x in layouts], np.uint32),
        entry=np.array([x.entry for x in layouts], np.uint8),
        table_crc=np.array([crc32c(d[x.table_offset :]) for x, d in zip(layouts, data, strict=True)], np.uint32),
    )
    fields: dict[str, object] = {
        "step": 100,
        "generation": 7,
        "attempt": "a0",
        "world": 4,
        "objects": (),
        "aliases": {},
    }
    manifest = build_manifest(
        **(fields | more),  # type: ignore[arg-type]
        tensors=tensors,
        codecs=used,
        packs=packs,
        tensor=np.array([t for t, *_ in rows], np.int64),
        boxes=boxes,
        pack=np.array([writers.index(p) for _, _, p, _ in rows], np.int64),
        offset=offset,
        length=length,
        block=block,
        codec=np.array([0 if c is None else 1 + used.index(c) for *_, c in rows], np.uint8),
    )
    return data, manifest


def collide(pieces: Sequence[Piece]) -> bool:
    found = [p.stored_name for p in pieces]
    return len(set(found)) < len(found)


@st.composite
def cases(draw: st.DrawFn, most: int = 7, coded: bool = True) -> Case:
    """Tensors with distinct keys, cut, coded and spread at random; no two fragments of a pack are called the same."""
    tensors = draw(st.lists(specs, min_size=2, max_size=most, unique_by=lambda t: t.key))
    writers = draw(st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True))
    codec = st.sampled_from([None, None, *CODECS]) if coded else st.none()
    rows: list[tuple[int, Box, int, Codec | None]] = []
    taken: set[tuple[int, str]] = set()
    for t, spec in enumerate(tensors):
        for box in draw(cuts(spec.shape)):
            row = (t, box, draw(st.sampled_from(writers)), draw(codec))
            mark = (row[2], Piece(spec, box, row[3]).stored_name)
            if mark in taken:
                row = (t, box, 100 + len(rows), row[3])
            taken.add(mark)
            rows.append(row)
    more = {
        "step": draw(st.integers(0, 2**40)),
        "generation": draw(st.integers(0, 10**6)),
        "attempt": f"a{draw(st.integers(0, 999_999_999))}",
        "world": draw(st.integers(0, 10**6)),
        "objects": draw(st.lists(objects, max_size=3, unique_by=lambda o: (o.name, o.scope))),
        "aliases": draw(st.dictionaries(text, text, max_size=3)),
    }
    packs, manifest = assemble(tensors, rows, **more)
    return Case(tuple(tensors), tuple(rows), tuple(packs), manifest)
