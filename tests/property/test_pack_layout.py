"""Every pack is a valid safetensors file, aligned, dense and the same for the same pieces."""

from __future__ import annotations

import itertools
import json
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made import CODECS, collide, content, cuts, specs, write
from safetensors import safe_open
from safetensors.torch import load_file

from ckpt.errors import FormatError
from ckpt.format.codec import BLOCK, crc32c, n_blocks
from ckpt.format.dtypes import DTYPES, dtype
from ckpt.format.fragment import Box, whole
from ckpt.format.pack import ALIGN, TABLE, PackLayout, Piece, TensorSpec, layout_pack

CHECK = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def piece_lists(draw: st.DrawFn) -> list[Piece]:
    tensors = draw(st.lists(specs, min_size=2, max_size=6, unique_by=lambda t: t.key))
    codec = st.sampled_from([None, None, None, *CODECS])
    pieces = [Piece(t, box, draw(codec)) for t in tensors for box in draw(cuts(t.shape)) or [whole(t.shape)]]
    return draw(st.permutations(pieces))


def header_of(data: bytes) -> tuple[int, dict[str, dict[str, object]]]:
    (n,) = struct.unpack("<Q", data[:8])
    return 8 + n, json.loads(data[8 : 8 + n])


@CHECK
@given(piece_lists(), st.randoms(use_true_random=False))
def test_every_pack(pieces: list[Piece], random: object) -> None:
    if collide(pieces):
        with pytest.raises(FormatError, match="both called"):
            layout_pack(pieces)
        return
    layout, data = write(pieces)
    check_layout(pieces, layout, data)
    shuffled = list(pieces)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert write(shuffled)[1] == data
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rank-00000.safetensors"
        path.write_bytes(data)
        check_safetensors(layout, data, path)


def check_layout(pieces: list[Piece], layout: PackLayout, data: bytes) -> None:
    assert sorted(layout.order.tolist()) == list(range(len(pieces)))
    assert [pieces[i] for i in layout.order.tolist()] == list(layout.pieces)
    assert layout.data_start % ALIGN == 0 and layout.data_start >= ALIGN
    assert data[: layout.data_start] == layout.header
    end, blocks = layout.data_start, 0
    for k, piece in enumerate(layout.pieces):
        assert int(layout.offset[k]) == end and int(layout.block[k]) == blocks
        if piece.codec is None:
            assert int(layout.length[k]) == piece.nbytes
            assert end % dtype(piece.tensor.dtype).itemsize == 0
        end += int(layout.length[k])
        blocks += n_blocks(piece.nbytes)
    assert layout.table_offset == end and layout.n_blocks == blocks
    assert layout.entry == (8 if any(p.codec for p in pieces) else 4)
    assert layout.size == len(data) == end + blocks * layout.entry
    start, header = header_of(data)
    assert start == layout.data_start
    spans = [tuple(v["data_offsets"]) for k, v in header.items() if k != "__metadata__"]  # type: ignore[arg-type]
    assert spans[0][0] == 0 and spans[-1][1] == layout.size - start
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))


def check_safetensors(layout: PackLayout, data: bytes, path: Path) -> None:
    loaded = load_file(path)
    with safe_open(path, framework="pt") as f:
        assert set(f.keys()) == {*(p.stored_name for p in layout.pieces), TABLE} == set(loaded)
        meta = f.metadata()
        again = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    assert meta["ckpt"] == "1" and meta["ckpt.block"] == str(BLOCK)
    extra = json.loads(meta.get("ckpt.fragments", "{}"))
    table = loaded[TABLE].numpy().reshape(-1).view("<u4").reshape(layout.n_blocks, layout.entry // 4)
    for k, piece in enumerate(layout.pieces):
        name, spec = piece.stored_name, piece.tensor
        lo, n = int(layout.offset[k]), int(layout.length[k])
        stored, tensor = data[lo : lo + n], loaded[name]
        flat = tensor.contiguous().reshape(-1)
        assert (flat.view(torch.uint8).numpy().tobytes() if n else b"") == stored
        assert tensor.shape == again[name].shape and tensor.dtype == again[name].dtype
        first, at = int(layout.block[k]), 0
        for b in range(n_blocks(piece.nbytes)):
            size = int(table[first + b, 1]) if layout.entry == 8 else min(BLOCK, n - at)
            assert crc32c(stored[at : at + size]) == table[first + b, 0]
            at += size
        assert at == n
        if piece.codec is None and dtype(spec.dtype).safetensors is not None:
            assert str(tensor.dtype) == f"torch.{spec.dtype}" and tuple(tensor.shape) == piece.box.shape
        else:
            assert tensor.dtype == torch.uint8
        if name in extra:
            said = extra[name]
            assert said["tensor"] == spec.name and said["dtype"] == spec.dtype and said["shape"] == list(spec.shape)
            assert (said["offset"], said["extent"]) == (list(piece.box.offset), list(piece.box.shape))
            assert said.get("variant", "") == spec.variant and ("codec" in said) == (piece.codec is not None)
        else:
            assert name == spec.name and piece.box.shape == spec.shape and not spec.variant and piece.codec is None


def test_a_pack_of_whole_tensors_is_an_ordinary_file(tmp_path: Path) -> None:
    pieces = [
        Piece(TensorSpec(f"model.{n}", n, (3, 2)), whole((3, 2))) for n in ("float32", "bfloat16", "bool", "int64")
    ]
    _, data = write(pieces)
    (tmp_path / "x.safetensors").write_bytes(data)
    loaded = load_file(tmp_path / "x.safetensors")
    assert set(loaded) == {p.tensor.name for p in pieces} | {TABLE}
    assert all(loaded[p.tensor.name].dtype == getattr(torch, p.tensor.dtype) for p in pieces)
    assert "ckpt.fragments" not in header_of(data)[1]["__metadata__"]


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_opens(name: str, tmp_path: Path) -> None:
    spec = TensorSpec("w", name, (4, 3))
    _, data = write([Piece(spec, Box((1, 0), (2, 3))), Piece(spec, Box((3, 0), (1, 3)), CODECS[0])])
    (tmp_path / "x.safetensors").write_bytes(data)
    part = load_file(tmp_path / "x.safetensors")["w[1:3,0:3]"]
    raw = content(Box((1, 0), (2, 3)), spec)
    assert part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() == raw


def test_blocks_of_long_fragments(tmp_path: Path) -> None:
    spec = TensorSpec("w", "int16", (BLOCK + 5,))
    pieces = [Piece(spec, whole(spec.shape)), Piece(TensorSpec("v", "uint8", (BLOCK,)), whole((BLOCK,)), CODECS[0])]
    layout, data = write(pieces)
    assert [p.tensor.name for p in layout.pieces] == ["w", "v"] and layout.n_blocks == 4
    assert layout.block.tolist() == [0, 3] and layout.length[1] < BLOCK
    check_layout(pieces, layout, data)
    (tmp_path / "x.safetensors").write_bytes(data)
    check_safetensors(layout, data, tmp_path / "x.safetensors")


def test_header_room_does_not_depend_on_stored_lengths() -> None:
    pieces = [Piece(TensorSpec(f"w{i}", "float32", (1000,)), whole((1000,)), CODECS[0]) for i in range(100)]
    before = layout_pack(pieces)
    for stored in (1, 4000, 5000):
        after = layout_pack(pieces, [stored] * 100)
        assert after.data_start == before.data_start
        assert len(after.header) == before.data_start


def test_a_codec_that_expands_without_bound_is_refused() -> None:
    pieces = [Piece(TensorSpec(f"w{i}", "uint8", (1,)), whole((1,)), CODECS[0]) for i in range(2000)]
    with pytest.raises(FormatError, match="expanded"):
        _ = layout_pack(pieces, [10**12] * 2000).header


def test_two_names_that_read_the_same_are_refused() -> None:
    clash = [
        Piece(TensorSpec("a[0:2]", "int8", (2,)), whole((2,))),
        Piece(TensorSpec("a", "int8", (4,)), Box((0,), (2,))),
    ]
    with pytest.raises(FormatError, match="both called"):
        layout_pack(clash)


@pytest.mark.parametrize("name", ["__metadata__", TABLE])
def test_reserved_names_can_be_stored(name: str, tmp_path: Path) -> None:
    for shape in ((), (3,)):
        _, data = write([Piece(TensorSpec(name, "float32", shape), whole(shape))])
        (tmp_path / "x.safetensors").write_bytes(data)
        assert set(load_file(tmp_path / "x.safetensors")) == {f"{name}{whole(shape)}", TABLE}


def test_an_empty_pack_is_a_file_too(tmp_path: Path) -> None:
    layout, data = write([])
    assert layout.size == len(data) == ALIGN and layout.n_blocks == 0
    (tmp_path / "x.safetensors").write_bytes(data)
    assert set(load_file(tmp_path / "x.safetensors")) == {TABLE}


def test_a_header_that_no_reader_would_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt.format.pack.MAX_HEADER", 8000)
    one = TensorSpec("w", "int8", (10_000,))
    with pytest.raises(FormatError, match="more writers"):
        layout_pack([Piece(one, Box((i,), (1,))) for i in range(200)])


def test_spec_sizes() -> None:
    spec = TensorSpec("w", "bfloat16", (3, 5), "rank=3")
    assert spec.key == "w@rank=3" and spec.nbytes == 30
    assert Piece(spec, Box((1, 0), (2, 5))).stored_name == "w@rank=3[1:3,0:5]"
    assert Piece(spec, whole((3, 5))).stored_name == "w@rank=3"
