"""What is written into a manifest is what is read from it, whatever order it came in."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import CODECS, Case, assemble, cases, content

from ckpt.errors import FormatError, NotFoundError
from ckpt.format.codec import BLOCK, crc32c, n_blocks
from ckpt.format.fragment import Box, whole
from ckpt.format.manifest import Manifest, Packs, build_manifest, dump_manifest
from ckpt.format.pack import ALIGN, TensorSpec
from ckpt.format.parse import parse_manifest

CHECK = settings(max_examples=60, deadline=None, derandomize=True)


def assert_equal(a: Manifest, b: Manifest) -> None:
    for f in dataclasses.fields(Manifest):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if isinstance(x, np.ndarray):
            assert x.dtype == y.dtype and np.array_equal(x, y), f.name
        elif isinstance(x, Packs):
            assert all(np.array_equal(getattr(x, g.name), getattr(y, g.name)) for g in dataclasses.fields(Packs))
        else:
            assert x == y, f.name


@CHECK
@given(cases(), st.randoms(use_true_random=False))
def test_round_trip(case: Case, random: object) -> None:
    data = dump_manifest(case.manifest)
    back = parse_manifest(data)
    assert_equal(back, case.manifest)
    assert dump_manifest(back) == data
    rows = list(case.rows)
    random.shuffle(rows)  # type: ignore[attr-defined]
    m = case.manifest
    more = {name: getattr(m, name) for name in ("step", "generation", "attempt", "world", "objects", "aliases")}
    packs, again = assemble(case.tensors, rows, **more)
    assert dump_manifest(again) == data and tuple(packs) == case.packs


@CHECK
@given(cases())
def test_a_reader_finds_every_fragment(case: Case) -> None:
    m = parse_manifest(dump_manifest(case.manifest))
    assert m.nbytes == sum(t.nbytes for t in case.tensors)
    for t, spec in enumerate(m.tensors):
        assert m.by_key[spec.key] == t == m.index(spec.key) or spec.key in m.aliases
        assert (spec.variant != "") == (spec.variant in m.has_variants.get(spec.name, []))
        m.check_coverage(t)
        offsets = [tuple(row) for row in m.boxes(t)[:, 0].tolist()]
        assert offsets == sorted(offsets)
        for k, (offset, extent) in enumerate(m.boxes(t).tolist()):
            row = int(m.start[t]) + k
            box = Box(tuple(offset), tuple(extent))
            pack = case.packs[int(m.pack[row])]
            stored = pack[int(m.offset[row]) : int(m.offset[row]) + int(m.length[row])]
            assert decode(m, row, stored, pack) == content(box, spec)
    with pytest.raises(NotFoundError):
        m.index("no such\x00tensor")


def decode(m: Manifest, row: int, stored: bytes, pack: bytes) -> bytes:
    p = int(m.pack[row])
    table = np.frombuffer(pack[int(m.packs.table_offset[p]) :], "<u4").reshape(-1, int(m.packs.entry[p]) // 4)
    code = 0 if m.codec is None else int(m.codec[row])
    if not code:
        for b in range(n_blocks(len(stored))):
            assert crc32c(stored[b * BLOCK : (b + 1) * BLOCK]) == table[int(m.block[row]) + b, 0]
        return stored
    coder, out, at, b = m.codecs[code - 1].make(), b"", 0, int(m.block[row])
    while at < len(stored):
        block = stored[at : at + int(table[b, 1])]
        assert crc32c(block) == table[b, 0]
        out, at, b = out + bytes(coder.decode(block)), at + len(block), b + 1
    return out


def test_nothing_at_all() -> None:
    m = assemble([], [])[1]
    assert_equal(parse_manifest(dump_manifest(m)), m)
    assert m.nbytes == 0 and len(m.packs) == 0


def test_two_keys_that_read_the_same_are_not_written() -> None:
    clash = [TensorSpec("a@rank=0", "int8", ()), TensorSpec("a", "int8", (), "rank=0")]
    with pytest.raises(FormatError, match="both called 'a@rank=0'"):
        assemble(clash, [(0, Box((), ()), 0, None), (1, Box((), ()), 1, None)])


def test_damaged_coverage_is_named() -> None:
    spec = TensorSpec("model.w", "float32", (4, 4))
    halves = [(0, Box((0, 0), (2, 4)), 0, None), (0, Box((2, 0), (2, 4)), 1, None)]
    m = assemble([spec], halves)[1]
    m.check_coverage(0)
    for second, word in (
        (Box((0, 0), (2, 4)), "overlap"),
        (Box((1, 0), (2, 4)), "overlap"),
        (Box((3, 0), (1, 4)), "12 of 16"),
    ):
        bad = assemble([spec], [halves[0], (0, second, 1, None)])[1]
        with pytest.raises(FormatError, match=rf"model\.w.*{word}"):
            bad.check_coverage(0)


def test_columns_of_a_table_may_be_strided() -> None:
    rows = [(0, whole((4,)), 0, None), (1, whole((4,)), 1, CODECS[0])]
    m = assemble([TensorSpec("a", "int8", (4,)), TensorSpec("b", "int8", (4,))], rows)[1]
    strided = {f.name: np.repeat(getattr(m.packs, f.name), 2)[::2] for f in dataclasses.fields(Packs)}
    assert dump_manifest(dataclasses.replace(m, packs=Packs(**strided))) == dump_manifest(m)


def test_offsets_beyond_32_bits() -> None:
    n = 2**33
    spec = TensorSpec("w", "uint8", (n,))
    m = large(np.array([[[0], [n - 8]], [[n - 8], [8]]]), [spec])
    back = parse_manifest(dump_manifest(m))
    assert back.box.dtype == np.uint64 and back.boxes(0).tolist() == [[[0], [n - 8]], [[n - 8], [8]]]
    back.check_coverage(0)


def large(boxes: np.ndarray, tensors: list[TensorSpec]) -> Manifest:
    """A manifest over one pack that is never written: raw one-byte elements, fragments one after another."""
    n, per = len(boxes), len(boxes) // len(tensors)
    length = boxes[:, 1].prod(axis=1).astype(np.uint64)
    blocks = -(-length.astype(np.int64) // BLOCK)
    end = ALIGN + int(length.sum())
    packs = Packs(
        writer=np.zeros(1, np.uint32),
        size=np.array([end + 4 * int(blocks.sum())], np.uint64),
        data_start=np.array([ALIGN], np.uint64),
        header_crc=np.zeros(1, np.uint32),
        table_offset=np.array([end], np.uint64),
        blocks=np.array([blocks.sum()], np.uint32),
        entry=np.array([4], np.uint8),
        table_crc=np.zeros(1, np.uint32),
    )
    return build_manifest(
        step=1,
        generation=0,
        attempt="a0",
        world=1,
        tensors=tensors,
        objects=[],
        codecs=[],
        packs=packs,
        aliases={},
        tensor=np.repeat(np.arange(len(tensors)), per),
        boxes=boxes,
        pack=np.zeros(n, np.int64),
        offset=(ALIGN + np.concatenate(([0], np.cumsum(length)[:-1]))).astype(np.uint64),
        length=length,
        block=np.concatenate(([0], np.cumsum(blocks)[:-1])).astype(np.uint32),
        codec=None,
    )


def test_many_fragments_are_small_and_quick() -> None:
    tensors, per = 1000, 256
    start = np.arange(per) * 2
    one = np.stack([np.stack([start, 0 * start], 1), np.stack([0 * start + 2, 0 * start + 64], 1)], 1)
    m = large(
        np.tile(one, (tensors, 1, 1)), [TensorSpec(f"model.layers.{i}.w", "uint8", (512, 64)) for i in range(tensors)]
    )
    data = dump_manifest(m)
    assert len(data) / (tensors * per) <= 48
    begun = time.process_time()
    back = parse_manifest(data)
    for t in range(tensors):
        back.check_coverage(t)
    assert time.process_time() - begun < 5  # a fifth of a second on an idle core
    assert_equal(back, m)
