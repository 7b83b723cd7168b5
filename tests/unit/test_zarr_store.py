"""A checkpoint as a Zarr store, read by stock zarr, against what was saved."""

import asyncio
import json
import math
import uuid

import numpy as np
import pytest
import torch
import zarr
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype

import ckpt
from ckpt.format.dtypes import DTYPES, dtype
from ckpt.format.fragment import Box
from ckpt.format.zarr_store import CheckpointStore, array_name, chunk_shape


def saved(state):
    run = f"memory://{uuid.uuid4().hex}"
    ckpt.save(state, run)
    return ckpt.open(run)


def raw(tensor):
    """A tensor as the store shows it."""
    name = str(tensor.dtype).removeprefix("torch.")
    flat = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat.view(dtype(name).numpy).reshape(tensor.shape)


def collect(iterator):
    async def run():
        return [item async for item in iterator]

    return asyncio.run(run())


@pytest.fixture(scope="module")
def everything():
    torch.manual_seed(0)
    state = {name: torch.randint(0, 255, (5, 6, dtype(name).itemsize), dtype=torch.uint8) for name in DTYPES}
    state["bool"] = state["bool"] % 2
    state = {n: t.reshape(-1).view(getattr(torch, n)).view(5, 6) for n, t in state.items()}
    state |= {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "model": {"a": torch.arange(6.0), "a.b": torch.arange(4)},
        "slash/and%": torch.ones(2),
        "__hidden": torch.ones(3),
    }
    with saved({"t": state}) as c:
        yield state, c


def test_every_tensor_opens_with_its_content(everything):
    _, c = everything
    group = zarr.open_group(c.zarr_store(), mode="r")
    assert group.metadata.consolidated_metadata is not None
    for name in c.tensors:
        array = group[array_name(name)]
        want = c.tensors[name].read()
        assert array.shape == tuple(want.shape)
        assert array.attrs["dtype"] == str(want.dtype).removeprefix("torch.") and array.attrs["key"] == name
        np.testing.assert_array_equal(np.reshape(array[...], -1).view(np.uint8), raw(want).reshape(-1).view(np.uint8))
    assert set(dict(group.arrays())) == {array_name(n) for n in c.tensors}
    assert group["t.bfloat16"].dtype == np.uint16 and group["t.float8_e5m2"].dtype == np.uint8
    assert group["t.scalar"][()] == 3.5 and group["t.empty"].shape == (0, 4)
    assert group["t.slash%2Fand%25"].attrs["key"] == "t.slash/and%" and group["t.model.a.b"].shape == (4,)


def test_slices_and_selections(everything):
    state, c = everything
    group = zarr.open_group(c.zarr_store(), mode="r")
    want = raw(state["float32"])
    np.testing.assert_array_equal(group["t.float32"][1:4, ::2], want[1:4, ::2])
    np.testing.assert_array_equal(group["t.float32"].oindex[[0, 3], :], want[[0, 3]])


def test_opens_without_consolidated_metadata_and_as_a_single_array(everything):
    state, c = everything
    group = zarr.open_group(c.zarr_store(), mode="r", use_consolidated=False)
    assert len(list(group.array_keys())) == len(c.tensors)
    array = zarr.open_array(c.zarr_store(), path="t.int64", mode="r")
    np.testing.assert_array_equal(array[...], state["int64"].numpy())


def test_fragments_become_chunks_and_irregular_ones_virtual_chunks(monkeypatch):
    whole = torch.arange(4 * 7, dtype=torch.float32).reshape(4, 7)
    shards = {
        "regular": [((0, 0), (3, 7)), ((3, 0), (1, 7))],
        "irregular": [((0, 0), (1, 7)), ((1, 0), (3, 3)), ((1, 3), (3, 4))],
    }
    with made_of(whole, shards) as c:
        group = zarr.open_group(CheckpointStore(c, chunk_bytes=3 * 7 * 4), mode="r")
        assert group["regular"].chunks == (3, 7) and group["irregular"].chunks == (2, 7)
        for name in shards:
            np.testing.assert_array_equal(group[name][...], whole.numpy())
        tiny = zarr.open_group(CheckpointStore(c, chunk_bytes=5), mode="r")
        assert tiny["regular"].chunks == (1, 1)
        np.testing.assert_array_equal(tiny["irregular"][2:, 5:], whole.numpy()[2:, 5:])


def made_of(whole, shards):
    """A checkpoint whose tensors are stored in the given boxes, in one pack."""
    from ckpt.backends import backend_for
    from ckpt.commit import claim_attempt, commit_step, read_commit
    from ckpt.config import settings
    from ckpt.format.pack import Piece, TensorSpec
    from ckpt.plan import Plan
    from ckpt.source import source_of
    from ckpt.write import Ring, write_pack

    run = f"memory://{uuid.uuid4().hex}"
    backend = backend_for(run)
    attempt, writer = claim_attempt(backend, "step-00000000.g0000", 1)
    specs = tuple(TensorSpec(name, "float32", tuple(whole.shape)) for name in shards)
    boxes = [(t, Box(*b)) for t, spec in enumerate(specs) for b in shards[spec.name]]
    pieces = [Piece(specs[t], box) for t, box in boxes]
    ring = Ring(settings())
    path = f"step-00000000.g0000/{attempt}/rank-00000.safetensors"
    report = write_pack(backend, path, pieces, [source_of(whole, box) for _, box in boxes], ring)
    column = np.array([[box.offset, box.shape] for _, box in boxes])
    tensor = np.array([t for t, _ in boxes])
    plan = Plan(specs, np.zeros(len(boxes), np.int64), tensor, tensor, column, ())
    commit_step(
        backend,
        step=0,
        generation=0,
        attempt=attempt,
        writer=writer,
        plan=plan,
        codecs=[],
        codec=None,
        objects=[],
        aliases={},
        reports=[report],
        metrics={},
    )
    return ckpt.Checkpoint(backend, read_commit(backend, "step-00000000.g0000"))


@pytest.mark.parametrize(
    "shape, itemsize, step, target, want",
    [
        ((), 4, (), 8, ()),
        ((0, 3), 4, None, 1 << 20, (1, 3)),
        ((1000, 64), 4, (250, 64), 1 << 30, (1000, 64)),  # many small fragments: several to a chunk
        ((1000, 64), 4, (250, 64), 250 * 256, (250, 64)),
        ((1000, 64), 4, (250, 64), 125 * 256, (125, 64)),  # large ones: equal parts
        ((1000, 64), 4, (250, 64), 130 * 256, (125, 64)),
        ((1000, 64), 4, (250, 64), 500 * 256 + 9, (500, 64)),
        ((1000, 64), 4, (1000, 16), 1000 * 128, (1000, 32)),  # cut along columns
        ((7, 13), 1, None, 6, (1, 6)),
        ((2, 3, 1 << 20), 8, None, 1 << 20, (1, 1, 1 << 17)),
        ((1, 1 << 40), 1, None, 8 << 20, (1, 8 << 20)),
    ],
)
def test_chunk_shapes(shape, itemsize, step, target, want):
    boxes = np.zeros((0, 2, len(shape)), dtype=np.int64)
    if step:
        offsets = np.stack(
            np.meshgrid(*(np.arange(0, n, s) for n, s in zip(shape, step, strict=True)), indexing="ij"), -1
        )
        offsets = offsets.reshape(-1, len(shape))
        boxes = np.stack([offsets, np.minimum(step, np.array(shape) - offsets)], axis=1)
    got = chunk_shape(shape, itemsize, boxes, target)
    assert got == want
    assert math.prod(got) * itemsize <= max(target, itemsize)


def test_keys_sizes_and_ranges(everything):
    _, c = everything
    store = c.zarr_store()
    keys = collect(store.list())
    assert len(keys) == len(set(keys)) and "zarr.json" in keys
    prototype = default_buffer_prototype()

    async def look():
        for key in keys:
            assert await store.exists(key)
            value = (await store.get(key, prototype)).to_bytes()
            assert await store.getsize(key) == len(value)
        key = "t.float64/c/0/0"
        whole = (await store.get(key, prototype)).to_bytes()
        cuts = [RangeByteRequest(3, 20), OffsetByteRequest(5), SuffixByteRequest(7), None]
        parts = await store.get_partial_values(prototype, [(key, cut) for cut in cuts] + [("nothing", None)])
        assert [p and p.to_bytes() for p in parts] == [whole[3:20], whole[5:], whole[-7:], whole, None]
        for absent in (
            "t.float64/c/0/00",
            "t.float64/c/0",
            "t.float64/c/9/9",
            "t.float64",
            "c",
            "",
            "t.float64/c/0/\u0660",
        ):
            assert not await store.exists(absent) and await store.get(absent, prototype) is None
            with pytest.raises(FileNotFoundError):
                await store.getsize(absent)

    asyncio.run(look())
    assert collect(store.list_prefix("t.float64/")) == ["t.float64/zarr.json", "t.float64/c/0/0"]
    assert sorted(collect(store.list_dir("t.float64"))) == ["c", "zarr.json"]
    assert "t.float64" in collect(store.list_dir("")) and collect(store.list_dir("t.float64/c/0")) == ["0"]
    assert collect(store.list_dir("t.scalar")) == ["zarr.json", "c"]
    assert json.loads(store.read_key("zarr.json"))["attributes"]["ckpt"]["step"] == 0


def test_tied_tensors_appear_under_every_name():
    embedding = torch.nn.Embedding(4, 2)
    model = torch.nn.ModuleDict({"inp": embedding, "out": embedding})
    with saved({"model": model}) as c:
        group = zarr.open_group(c.zarr_store(), mode="r")
        np.testing.assert_array_equal(group["model.out.weight"][...], embedding.weight.detach().numpy())
        assert group["model.out.weight"].attrs["alias_of"] == "model.inp.weight"
        once = zarr.open_group(CheckpointStore(c, aliases=False), mode="r")
        assert list(once.array_keys()) == ["model.inp.weight"]
        assert once.attrs["ckpt"]["aliases"] == {"model.out.weight": "model.inp.weight"}


def test_writing_is_refused(everything):
    _, c = everything
    store = c.zarr_store()
    group = zarr.open_group(store, mode="r")
    with pytest.raises(Exception, match=r"never changed|read.only"):
        group["t.int8"][0, 0] = 1
    with pytest.raises(Exception, match=r"never changed|read.only"):
        zarr.open_group(store, mode="w")
    with pytest.raises(ckpt.UsageError):
        store.with_read_only(False)
    assert store.with_read_only(True) == store == c.zarr_store() and store != CheckpointStore(c, chunk_bytes=9)


def test_damage_is_named(tmp_path):
    ckpt.save({"x": torch.arange(1000)}, tmp_path / "run")
    (pack,) = (tmp_path / "run").rglob("rank-*.safetensors")
    data = bytearray(pack.read_bytes())
    data[4096 + 77] ^= 1
    pack.write_bytes(data)
    with ckpt.open(tmp_path / "run") as c, pytest.raises(ckpt.IntegrityError, match="'x'"):
        zarr.open_group(c.zarr_store(), mode="r")["x"][...]


def test_names_are_injective():
    keys = ["a/b", "a%2Fb", "a\\b", "a.b", "zarr.json", "%7Aarr.json", "__x", "%5F_x", ".", "..", "", "%", "a\nb"]
    assert len({array_name(k) for k in keys}) == len(keys)
    assert not any("/" in array_name(k) or "\\" in array_name(k) for k in keys)
