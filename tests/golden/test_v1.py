"""Format version 1, as it was first written: read today, bit for bit."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import make_v1
import numpy as np
import pytest
import torch
from make_v1 import RUN

import ckpt
from ckpt import catalog
from ckpt.backends import LocalBackend
from ckpt.commit import sealed
from ckpt.errors import UnsafeError, VersionError
from ckpt.format.codec import crc32c


def bits(t: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    flat = t.detach().contiguous().reshape(-1)
    return t.dtype, t.shape, flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def alike(a: Any, b: Any) -> bool:
    """Equal in value and type, all the way down; nan equals nan."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.dtype.newbyteorder("=") == b.dtype.newbyteorder("=") and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, dict):
        return list(a) == list(b) and all(alike(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


def test_the_files_are_small_and_whole() -> None:
    files = [p for p in RUN.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 200_000
    for step in (1, 2, 3):
        with ckpt.open(f"{RUN}@{step}") as c:
            found = c.verify()
            assert found.ok and found.blocks > 0, found.problems


def test_the_run() -> None:
    listing = catalog.list_run(LocalBackend(str(RUN)))
    (generation,) = listing.generations
    assert (generation.generation, generation.parent, generation.world) == (1, "step-00000001.g0000", 2)
    assert [s.folder for s in catalog.lineage(listing)] == [
        "step-00000003.g0001",
        "step-00000002.g0001",
        "step-00000001.g0000",
    ]
    newest = listing.steps[-1].commit
    assert newest is not None and newest.world == 2 and newest.time == "2025-01-01T00:00:00+00:00"
    with ckpt.open(f"{RUN}@best") as c:
        assert c.step == 2 and c.metrics == {"loss": 1.5, "val_loss": 1.25}
    assert catalog.leftovers(LocalBackend(str(RUN)), listing, 0) == []


def test_load_of_one_rank() -> None:
    state, expected = make_v1.first(False), make_v1.first(True)
    report = ckpt.load(state, f"{RUN}@1")
    assert report.step == 1 and not report.missing
    for name, tensor in expected["t"].items():
        assert bits(state["t"][name]) == bits(tensor), name
    for name, value in expected["o"].items():
        assert alike(state["o"][name], value), (name, state["o"][name])
    for (name, a), (_, b) in zip(
        state["model"].state_dict().items(), expected["model"].state_dict().items(), strict=True
    ):
        assert bits(a) == bits(b), name
    assert state["model"].head.weight is state["model"].embed.weight
    mine, theirs = state["optimizer"].state_dict(), expected["optimizer"].state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    for i, entry in theirs["state"].items():
        assert {k: bits(v) for k, v in mine["state"][i].items()} == {k: bits(v) for k, v in entry.items()}


def test_open_of_one_rank() -> None:
    expected = make_v1.first(True)
    with ckpt.open(f"{RUN}@1") as c:
        for name, tensor in expected["t"].items():
            stored = c.tensors[f"t.{name}"]
            assert bits(stored.read()) == bits(tensor), name
            if tensor.dim() == 2 and tensor.numel():
                assert bits(stored[1:, 2:4]) == bits(tensor[1:, 2:4]), name
        assert bits(c.tensors["model.head.weight"][...]) == bits(expected["model"].embed.weight)
        assert c.manifest.aliases == {"model.head.weight": "model.embed.weight"}
        assert {json.loads(codec.config)["id"] for codec in c.manifest.codecs} == {"zstd"}


def test_load_of_two_ranks_into_one() -> None:
    state = {
        "rows": torch.zeros(6, 7),
        "flat": torch.zeros(6, 7),
        "copy": torch.zeros(4),
        "own": torch.zeros(3),
        "coded": torch.zeros(30, 30, dtype=torch.int64),
        "mine": ckpt.PerRank(None),
        "undeclared": "",
        "shared": "",
    }
    ckpt.load(state, f"{RUN}@2")
    table = torch.arange(42.0).reshape(6, 7)
    assert torch.equal(state["rows"], table) and torch.equal(state["flat"], table)
    assert state["copy"].eq(4).all() and state["own"].eq(1).all()
    assert torch.equal(state["coded"], torch.arange(900).reshape(30, 30))
    assert state["mine"].value == {"rank": 0} and (state["undeclared"], state["shared"]) == ("rank 0", "both")
    with ckpt.open(f"{RUN}@2") as c:
        assert len(c.manifest.packs) == 2
        for rank in (0, 1):
            assert c.tensors[f"own@rank={rank}"][...].eq(1 + rank).all()
            assert c.objects[f"undeclared@rank={rank}"] == f"rank {rank}"
            assert c.objects[f"mine@rank={rank}"] == {"rank": rank}


def test_pickled_content_asks_first() -> None:
    with ckpt.open(RUN) as c, pytest.raises(UnsafeError):
        _ = c.objects["pickled"]
    with ckpt.open(RUN, allow_pickle=True) as c:
        assert c.objects["pickled"] == frozenset({"two"})


@pytest.mark.parametrize("which", ["commit", "manifest", "generation"])
def test_version_2_is_refused(tmp_path: Path, which: str) -> None:
    """With everything else in order: sizes, checksums, the JSON."""
    run = tmp_path / "run"
    shutil.copytree(RUN, run)
    folder = run / "step-00000003.g0001"
    content = json.loads((folder / "commit.json").read_bytes())
    del content["crc32c"]
    if which == "manifest":
        path = folder / "a0/manifest.safetensors"
        data = path.read_bytes()
        assert data.count(b'"version":1') == 1
        data = data.replace(b'"version":1', b'"version":2')
        path.write_bytes(data)
        content["manifest"]["crc32c"] = f"{crc32c(data):08x}"
    elif which == "commit":
        content["version"] = 2
    else:
        gen = json.loads((run / "gen-0001.json").read_bytes())
        del gen["crc32c"]
        (run / "gen-0001.json").write_bytes(sealed({**gen, "version": 2}))
        (generation,) = catalog.list_run(LocalBackend(str(run))).generations
        assert "upgrade ckpt-universal" in generation.error
        return
    (folder / "commit.json").write_bytes(sealed(content))
    for ref in (str(run), f"{run}@3"):
        with pytest.raises(VersionError, match=r"format version 2.*upgrade ckpt-universal"):
            ckpt.load({}, ref)
        with pytest.raises(VersionError, match="upgrade ckpt-universal"):
            ckpt.open(ref)
    with pytest.raises(VersionError, match="upgrade ckpt-universal"):  # not an older step instead of it
        ckpt.Checkpointer(run, {}, storage=ckpt.Every(1)).restore()
