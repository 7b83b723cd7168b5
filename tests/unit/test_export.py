"""Exports, read back by the tools they are for."""

from __future__ import annotations

import errno
import json
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import nn

import ckpt
from ckpt import faults
from ckpt.offline import export
from ckpt.offline.export import export_safetensors, export_zarr


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 6, dtype=torch.bfloat16) for _ in range(12)])
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.arange(5))
        self.register_buffer("none", torch.zeros(0, 3))
        self.register_buffer("scalar", torch.tensor(2.5))


@pytest.fixture(scope="module")
def model() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def run(model: Net) -> str:
    run = f"memory://{uuid.uuid4().hex}"
    optimizer = torch.optim.Adam(model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    ckpt.save({"model": model, "optim": optimizer, "ema": {"w": torch.ones(3, dtype=torch.complex64)}}, run)
    return run


def check(model: nn.Module, tensors: dict[str, torch.Tensor], missing: tuple[str, ...] = ("head.weight",)) -> None:
    want = {k: v for k, v in model.state_dict().items() if k not in missing}
    assert tensors.keys() == want.keys()
    for name, t in want.items():
        assert tensors[name].dtype == t.dtype and torch.equal(tensors[name], t), name


def test_one_file(model: Net, run: str, tmp_path: Path) -> None:
    told: list[int] = []
    report = export_safetensors(run, tmp_path / "out", progress=told.append)
    assert report.files == ("model.safetensors",) and os.listdir(tmp_path / "out") == ["model.safetensors"]
    check(model, load_file(tmp_path / "out" / "model.safetensors"))
    assert report.tensors == 28 and report.bytes == sum(told) and report.tied == (("head.weight", "embed.weight"),)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt", "head.weight": "embed.weight"}
    other = Net()
    load_model(other, tmp_path / "out" / "model.safetensors")  # knows what is tied
    check(model, dict(other.state_dict()), ())
    export_safetensors(f"{run}@0", tmp_path / "deep" / "single.safetensors", max_shard_bytes=1)
    check(model, load_file(tmp_path / "deep" / "single.safetensors"))
    assert os.listdir(tmp_path / "deep") == ["single.safetensors"]


def test_many_files_and_an_index(model: Net, run: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    report = export_safetensors(run, tmp_path / "out", max_shard_bytes=200)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    n = len(report.files)
    assert report.files == tuple(f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)) and n > 3
    assert sorted(os.listdir(tmp_path / "out")) == [*report.files, "model.safetensors.index.json"]
    assert index["metadata"] == {"total_size": report.bytes}
    found: dict[str, torch.Tensor] = {}
    for file in report.files:
        part = load_file(tmp_path / "out" / file)
        assert all(index["weight_map"][name] == file for name in part)
        assert len(part) == 1 or sum(t.nbytes for t in part.values()) <= 200
        found |= part
    check(model, found)
    order = [index["weight_map"][f"layers.{i}.weight"] for i in range(12)]
    assert order == sorted(order)  # layer 2 before layer 10


def test_slices_keep_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are cut into parts and joined again."""
    monkeypatch.setattr(export, "_WINDOW", 256 << 10)
    monkeypatch.setattr(export, "_BATCH", 60)
    state = {
        "a": torch.arange(7 * 5 * 3001).reshape(7, 5, 3001),
        "b": torch.arange(11, dtype=torch.int8),
        "c": torch.ones(2),
    }
    ckpt.save({"model": state}, tmp_path / "run")
    for cast in (None, "float64"):
        out = tmp_path / f"{cast}.safetensors"
        export_safetensors(tmp_path / "run", out, dtype=cast)
        got = load_file(out)
        assert torch.equal(got["a"], state["a"]) and torch.equal(got["b"], state["b"])
        assert got["c"].dtype == getattr(torch, cast or "float32") and (got["c"] == 1).all()
    export_zarr(tmp_path / "run", tmp_path / "z")
    np.testing.assert_array_equal(zarr.open_group(tmp_path / "z", mode="r")["model.a"][...], state["a"].numpy())


def test_conversion_of_floats_only(model: Net, run: str, tmp_path: Path) -> None:
    report = export_safetensors(run, tmp_path / "half.safetensors", dtype="float16")
    got = load_file(tmp_path / "half.safetensors")
    assert got["count"].dtype == torch.int64 and got["embed.weight"].dtype == torch.float16
    assert torch.equal(got["embed.weight"], model.embed.weight.to(torch.float16))
    assert report.bytes == sum(t.nbytes for t in got.values())
    with pytest.raises(ckpt.UsageError, match="one of"):
        export_safetensors(run, tmp_path / "x", dtype="int8")


def test_what_is_chosen(run: str, tmp_path: Path) -> None:
    def names(**how: Any) -> set[str]:
        out = tmp_path / f"{uuid.uuid4().hex}.safetensors"
        export_safetensors(run, out, **how)
        return set(load_file(out))

    assert names(only=["model.layers.1.*"]) == {"layers.1.weight", "layers.1.bias"}
    assert names(only=["model.layers.1"], prefix_strip="") == {"model.layers.1.weight", "model.layers.1.bias"}
    assert names(only=["model.layers.1"], prefix_strip="model.layers") == {"1.weight", "1.bias"}
    assert names(only=["model.head.weight"]) == {"head.weight"}
    everything = names(only=["model", "optim"])
    assert everything == names() and not any("exp_avg" in n for n in everything)
    with pytest.raises(ckpt.NotFoundError, match="optimizers"):
        names(only=["optim.*"])
    with pytest.raises(ckpt.NotFoundError):
        names(only=["nothing"])
    with pytest.raises(ckpt.UsageError, match=r"complex64.*export_zarr"):
        names(only=["ema"])
    with pytest.raises(ckpt.UsageError, match="both be called"):
        ckpt.save({"a": {"w": torch.ones(1)}, "w": torch.ones(1)}, tmp_path / "clash")
        export_safetensors(tmp_path / "clash", tmp_path / "c", only=["*"], prefix_strip="a")
    with pytest.raises(ckpt.UsageError, match="there is: a, w"):
        export_safetensors(tmp_path / "clash", tmp_path / "c")
    with pytest.raises(ckpt.NotFoundError):
        export_safetensors(tmp_path / "absent", tmp_path / "c")
    assert not list(tmp_path.glob("c*/*.json"))


@pytest.mark.parametrize("how", [export_safetensors, export_zarr])
def test_what_exists_is_left_alone(how: Any, run: str, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for there in ("full", "file"):
        with pytest.raises(ckpt.ConflictError, match="exists already"):
            how(run, tmp_path / there)
    if how is export_safetensors:
        (tmp_path / "m.safetensors").write_text("mine")
        with pytest.raises(ckpt.ConflictError):
            how(run, tmp_path / "m.safetensors")
        assert (tmp_path / "m.safetensors").read_text() == "mine"
    assert (tmp_path / "full" / "file").read_text() == "mine"
    assert not [n for n in os.listdir(tmp_path) if "tmp" in n]


@pytest.mark.parametrize("how", [export_safetensors, export_zarr])
@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_a_failure_leaves_nothing(how: Any, name: str, run: str, tmp_path: Path) -> None:
    left = [1]

    def hook(where: str) -> None:
        left[0] -= 1
        if where == "export.write" and left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    faults.install(hook)
    try:
        with pytest.raises(ckpt.StorageError, match="No space left"):
            how(run, tmp_path / name, progress=lambda n: left.__setitem__(0, 0))
    finally:
        faults.install(None)
    assert os.listdir(tmp_path) == []
    how(run, tmp_path / name)


def test_damage_is_not_exported(tmp_path: Path) -> None:
    ckpt.save({"model": {"x": torch.arange(1000)}}, tmp_path / "run")
    (pack,) = (tmp_path / "run").rglob("rank-*")
    data = bytearray(pack.read_bytes())
    data[4100] ^= 1
    pack.write_bytes(data)
    for how in (export_safetensors, export_zarr):
        with pytest.raises(ckpt.IntegrityError, match=r"model\.x"):
            how(tmp_path / "run", tmp_path / "out")
    assert os.listdir(tmp_path) == ["run"]


def test_zarr_directory(model: Net, run: str, tmp_path: Path) -> None:
    told: list[int] = []
    report = export_zarr(run, tmp_path / "out", progress=told.append)
    group = zarr.open_group(tmp_path / "out", mode="r")
    with ckpt.open(run) as c:
        assert set(dict(group.arrays())) == set(c.manifest.by_key) == set(report.files)
        for key in c.manifest.by_key:
            np.testing.assert_array_equal(group[key][...], c.tensors[key].raw())
    assert group["ema.w"].dtype == np.complex64 and group["model.layers.0.weight"].attrs["dtype"] == "bfloat16"
    assert group.attrs["ckpt"]["aliases"] == {"model.head.weight": "model.embed.weight"}
    assert report.bytes == sum(told) and report.tied == (("model.head.weight", "model.embed.weight"),)
    part = export_zarr(run, tmp_path / "part", only=["ema"])
    assert part.tensors == 1 and list(zarr.open_group(tmp_path / "part", mode="r").array_keys()) == ["ema.w"]
    with pytest.raises(ckpt.NotFoundError):
        export_zarr(run, tmp_path / "none", only=["nothing"])
