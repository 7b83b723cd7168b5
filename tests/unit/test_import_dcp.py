"""torch DCP directories, honest and hostile, imported."""

from __future__ import annotations

import io
import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

import ckpt
from ckpt.format.dtypes import DTYPES, dtype
from ckpt.offline import importing
from ckpt.offline.importing import import_dcp


def saved(state: dict[str, Any], folder: Path, **how: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder, **how))
    return folder


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def test_model_and_optimizer(tmp_path: Path) -> None:
    for flat in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
        optimizer = torch.optim.AdamW([{"params": m.parameters(), "lr": 0.1 / (i + 1)} for i, m in enumerate(model)])
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
        src = saved(
            {"model": model_state, "optim": optimizer_state, "epoch": 3}, tmp_path / f"src-{flat}", thread_count=2
        )
        told: list[int] = []
        report = import_dcp(src, tmp_path / f"run-{flat}", step=5, progress=told.append)
        assert report.ref == f"{tmp_path}/run-{flat}/step-00000005.g0000" and report.step == 5 and not report.pickled
        assert report.tensors == 16 and report.bytes == sum(told)
        other = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
        target = torch.optim.AdamW([{"params": m.parameters()} for m in other], lr=9.0)
        state = {"model": other, "optim": target, "epoch": 0}
        ckpt.load(state, report.ref, allow_unexpected=["optim.param_groups"])
        assert state["epoch"] == 3
        for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
            assert equal(a, b), name
        assert [g["lr"] for g in target.param_groups] == [0.1, 0.05]
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert all(equal(optimizer.state[p][k], target.state[q][k]) for k in optimizer.state[p])
    with ckpt.open(f"{tmp_path}/run-{False}") as c:
        assert c.verify().ok
    with pytest.raises(ckpt.ConflictError):
        import_dcp(tmp_path / "src-True", tmp_path / "run-True", step=5)


def test_dtypes_shapes_and_values(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors: dict[str, Any] = {}
    for name in DTYPES:
        raw = torch.randint(0, 2 if name == "bool" else 255, (6, 4 * dtype(name).itemsize), dtype=torch.uint8)
        tensors[name] = raw.view(getattr(torch, name))
    tensors |= {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "strided": torch.arange(12.0).reshape(3, 4).t(),
        "slice": torch.arange(100)[3:7],
        "expanded": torch.ones(1).expand(5),
        "parameter": nn.Parameter(torch.ones(2)),
    }
    values = {
        "none": None,
        "words": ["a", "b"],
        "groups": [{"x": 1, "y": (1, 2)}, {"x": torch.ones(2)}],
        "pair": (torch.arange(3), "x"),
        "array": np.arange(6, dtype=np.int16).reshape(2, 3),
        "float": np.float32(2.5),
        "dtype": torch.bfloat16,
        "bytes": b"\x00\xff",
    }
    src = saved({"t": tensors, "v": values}, tmp_path / "src")
    report = import_dcp(src, tmp_path / "run")
    with ckpt.open(tmp_path / "run") as c:
        for name, t in tensors.items():
            assert equal(c.tensors[f"t.{name}"].read(), t.detach().contiguous()), name
        assert equal(c.tensors["v.groups.1.x"].read(), torch.ones(2)) and c.objects["v.groups.0.y"] == (1, 2)
        assert equal(c.tensors["v.pair.0"].read(), torch.arange(3)) and c.objects["v.pair"][1] == "x"
        np.testing.assert_array_equal(c.objects["v.array"], values["array"])
        assert c.objects["v.float"] == np.float32(2.5) and c.objects["v.float"].dtype == np.float32
        for name in ("none", "words", "dtype", "bytes"):
            assert c.objects[f"v.{name}"] == values[name]
        assert c.verify().ok and report.objects == len(c.objects)
    restored = {"t": {k: torch.zeros_like(v) for k, v in tensors.items()}, "v": {"words": None, "pair": None}}
    restored["t"]["strided"] = torch.zeros(4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(restored, storage_reader=ckpt.adapters.dcp.Reader(tmp_path / "run"))
    assert all(equal(restored["t"][k], v.detach().contiguous()) for k, v in tensors.items() if k != "expanded")
    assert equal(restored["v"]["pair"][0], torch.arange(3))


def test_many_packs_hold_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {f"x{i}": torch.arange(i + 1) for i in range(7)} | {"n": 1}
    src = saved(state, tmp_path / "src")
    monkeypatch.setattr(importing, "_PACK_BYTES", 100)
    monkeypatch.setattr(importing, "_PACK_PIECES", 3)
    import_dcp(src, tmp_path / "run")
    with ckpt.open(tmp_path / "run") as c:
        assert len(c.manifest.packs) == 4 and c.verify().ok
        assert all(equal(c.tensors[f"x{i}"].read(), state[f"x{i}"]) for i in range(7))
    import_dcp(saved({"n": 1}, tmp_path / "values"), tmp_path / "values-run")
    with ckpt.open(tmp_path / "values-run") as c:
        assert dict(c.objects) == {"n": 1} and c.verify().ok


class Strange:
    def __init__(self) -> None:
        self.x = 3

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Strange) and self.x == other.x

    __hash__ = None  # type: ignore[assignment]


class Touch:
    """What it leaves behind shows that it was run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_pickled_values_are_run_only_if_allowed(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    src = saved({"x": torch.ones(2), "a": {"thing": Strange()}, "b": Touch(mark), "fine": 1}, tmp_path / "src")
    with pytest.raises(ckpt.UnsafeError, match=r"a\.thing, b"):
        import_dcp(src, tmp_path / "run")
    assert not mark.exists() and not (tmp_path / "run").exists()
    report = import_dcp(src, tmp_path / "run", allow_pickle=True)
    assert mark.exists() and report.pickled == ("a.thing",)
    with ckpt.open(tmp_path / "run", allow_pickle=True) as c:
        assert c.objects["a.thing"] == Strange() and c.objects["fine"] == 1
    with ckpt.open(tmp_path / "run") as c, pytest.raises(ckpt.UnsafeError):
        c.objects["a.thing"]


def rewritten(src: Path, change: Any) -> None:
    """Changes the index of a directory, as somebody who may write anything would."""
    metadata = pickle.loads((src / ".metadata").read_bytes())
    data = change(metadata)
    (src / ".metadata").write_bytes(data if isinstance(data, bytes) else pickle.dumps(metadata))


class Calls:
    """Pickles as a call of a function of this name."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.what = function, args

    def __reduce__(self) -> Any:
        return self.what


def deep() -> bytes:
    return b"\x80\x04" + b"(" * 100_000 + b"."


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("where", ["whole", "planner", "storage", "key", "state"])
def test_a_hostile_index_runs_nothing(tmp_path: Path, where: str, allow: bool) -> None:
    src = saved({"x": torch.ones(2)}, tmp_path / "src")
    mark = tmp_path / "mark"

    def change(m: Metadata) -> Any:
        if where == "whole":
            return pickle.dumps(Touch(mark))
        if where == "planner":
            m.planner_data = {"x": Touch(mark)}
        elif where == "storage":
            m.storage_data[MetadataIndex("y")] = Touch(mark)
        elif where == "key":
            m.storage_data = {Calls(eval, f"open({str(mark)!r}, 'w')"): 1}
        else:
            m.state_dict_metadata["y"] = Calls(getattr, Calls(__import__, "os"), "environ")
        return None

    rewritten(src, change)
    with pytest.raises((ckpt.UnsafeError, ckpt.FormatError)):
        import_dcp(src, tmp_path / "run", allow_pickle=allow)
    assert not mark.exists() and not (tmp_path / "run").exists()


def test_an_index_cannot_change_the_reader(tmp_path: Path) -> None:
    """A pickle can set attributes of the classes it is given; the next index must not see that."""
    src = saved({"x": torch.ones(2)}, tmp_path / "src")
    honest = (src / ".metadata").read_bytes()
    poison = b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadataIndex\nN}X\x08\x00\x00\x00__hash__K\x01s\x86b."
    (src / ".metadata").write_bytes(poison)
    with pytest.raises(ckpt.FormatError):
        import_dcp(src, tmp_path / "run")
    assert MetadataIndex.__hash__ is not None and hash(MetadataIndex("x")) is not None
    (src / ".metadata").write_bytes(honest)
    import_dcp(src, tmp_path / "run")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04N.",
        b"garbage",
        deep(),
        pickle.dumps([1, 2]),
        pickle.dumps({"storage_data": 1}),
        b"\x80\x02]q\x00h\x00a.",
    ],
)
def test_what_is_no_index_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / ".metadata").write_bytes(data)
    with pytest.raises(ckpt.FormatError):
        import_dcp(tmp_path / "src", tmp_path / "run")


def one(**changes: Any) -> Any:
    """Rewrites the one chunk of tensor x, or the place of its bytes."""

    def change(m: Metadata) -> None:
        (key,) = [k for k in m.storage_data if k.fqn == "x"]
        info = m.storage_data[key]
        for name, value in changes.items():
            if hasattr(info, name):
                setattr(info, name, value)
            else:
                setattr(m.state_dict_metadata["x"], name, value)

    return change


def missing(m: Metadata) -> None:
    m.storage_data = {k: v for k, v in m.storage_data.items() if k.fqn != "x"}


@pytest.mark.parametrize(
    "change, why",
    [
        (one(relative_path="../outside"), "leaves the folder"),
        (one(relative_path="/etc/passwd"), "leaves the folder"),
        (one(relative_path="a/../../b"), "leaves the folder"),
        (one(relative_path="a\x00b"), "leaves the folder"),
        (one(relative_path=7), "storage entry"),
        (one(offset=-1), "storage entry"),
        (one(offset=2**40), "bytes long"),
        (one(length=2**40), "bytes long"),
        (one(offset=1), "not an archive"),
        (one(length=10), "larger than its archive|not an archive"),
        (one(transform_descriptors=["zstd"]), "extensions"),
        (one(size=torch.Size([4, 5])), "of 20 elements"),
        (one(size=torch.Size([2])), "box"),
        (one(properties=TensorProperties(torch.float64)), "index says float64"),
        (one(size=(2**62, 2)), "shape"),
        (one(size=[4]), "shape"),
        (one(chunks=[ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([4, 5]))] * 2, size=torch.Size([4, 5])), "x"),
        (missing, "no bytes"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, change: Any, why: str) -> None:
    src = saved({"x": torch.arange(15.0).reshape(3, 5).to(torch.float32), "n": 1}, tmp_path / "src")
    (tmp_path / "outside").write_bytes(b"secret")
    rewritten(src, change)
    with pytest.raises(ckpt.FormatError, match=why):
        import_dcp(src, tmp_path / "run")
    assert not list((tmp_path / "run").rglob("commit.json"))


def archive(content: Any, how: int = zipfile.ZIP_STORED) -> bytes:
    plain = io.BytesIO()
    torch.save(content, plain)
    if how == zipfile.ZIP_STORED:
        return plain.getvalue()
    out = io.BytesIO()
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(out, "w", how) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return out.getvalue()


def made(folder: Path, shape: tuple[int, ...], data: bytes, *, value: bytes | None = None) -> Path:
    """A directory with one tensor "x" of float32 and perhaps one value "v", whatever they hold."""
    folder.mkdir()
    (folder / "__0_0.distcp").write_bytes(data + (value or b""))
    size = torch.Size(shape)
    chunk = ChunkStorageMetadata(torch.Size([0] * len(shape)), size)
    entries: dict[str, Any] = {"x": TensorStorageMetadata(TensorProperties(torch.float32), size, [chunk])}
    places = {MetadataIndex("x", chunk.offsets): _StorageInfo("__0_0.distcp", 0, len(data))}
    if value is not None:
        entries["v"] = BytesStorageMetadata()
        places[MetadataIndex("v")] = _StorageInfo("__0_0.distcp", len(data), len(value))
    metadata = Metadata(entries, storage_data=places)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


def test_archives_that_are_not_what_they_seem(tmp_path: Path) -> None:
    good = archive(torch.ones(4))
    import_dcp(made(tmp_path / "good", (4,), good, value=archive({"k": [1, 2.5]})), tmp_path / "good-run")
    bad: dict[str, tuple[tuple[int, ...], bytes, bytes | None]] = {
        "bomb": ((1 << 20,), archive(torch.zeros(1 << 20), zipfile.ZIP_DEFLATED), None),
        "bomb-padded": ((4,), archive(torch.zeros(1 << 20), zipfile.ZIP_DEFLATED) + bytes(100), None),
        "expanded": ((1 << 30,), archive(torch.ones(1).expand(1 << 30)), None),
        "not-a-tensor": ((4,), archive([1.0] * 4), None),
        "sparse": ((4,), archive(torch.ones(4).to_sparse()), None),
        "cut": ((4,), good[:-30], None),
        "pickle": ((4,), pickle.dumps(Touch(tmp_path / "mark")) + bytes(64), None),
        "expanded-value": ((4,), good, archive((torch.ones(1).expand(1 << 40),))),
        "endless-array": ((4,), good, archive(np.lib.stride_tricks.as_strided(np.ones(1), (2,), (0,)))[:-1]),
    }
    for name, (shape, data, value) in bad.items():
        with pytest.raises((ckpt.FormatError, ckpt.UnsafeError, ckpt.LayoutError)):
            import_dcp(made(tmp_path / name, shape, data, value=value), tmp_path / "bad-run")
    assert not (tmp_path / "mark").exists() and not list((tmp_path / "bad-run").rglob("commit.json"))
    assert not list((tmp_path / "bad-run").rglob("rank-*"))


def test_a_tensor_that_is_a_pickle_is_refused_even_if_allowed(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    src = made(tmp_path / "src", (4,), archive(Touch(mark)))
    with pytest.raises(ckpt.UnsafeError, match="'x'"):
        import_dcp(src, tmp_path / "run", allow_pickle=True)
    assert not mark.exists() and not list((tmp_path / "run").rglob("commit.json"))


def test_damaged_data_is_refused(tmp_path: Path) -> None:
    src = saved({"x": torch.arange(1000)}, tmp_path / "src")
    (file,) = src.glob("*.distcp")
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(ckpt.FormatError, match="bytes long"):
        import_dcp(src, tmp_path / "run")
    file.unlink()
    with pytest.raises(ckpt.NotFoundError):
        import_dcp(src, tmp_path / "run")


def test_what_is_no_directory_of_dcp_is_named(tmp_path: Path) -> None:
    with pytest.raises(ckpt.NotFoundError, match=r"no \.metadata"):
        import_dcp(tmp_path, tmp_path / "run")
    (tmp_path / "__0.metadata").write_bytes(b"")
    with pytest.raises(ckpt.NotFoundError, match="one index a rank"):
        import_dcp(tmp_path, tmp_path / "run")
    for run, step in (("run@3", 0), ("run", -1), ("run", True)):
        with pytest.raises(ckpt.UsageError):
            import_dcp(tmp_path, tmp_path / run, step=step)


def test_memory_stays_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk is open at a time."""
    opened: list[str] = []
    open_now: set[int] = set()
    most = [0]
    real = importing._Stored._tensor

    def watched(self: Any) -> torch.Tensor:
        for other in list(open_now):
            if alive[other]._source is None:
                open_now.discard(other)
        open_now.add(id(self))
        alive[id(self)] = self
        most[0] = max(most[0], len(open_now))
        opened.append(self._chunk.spec.name)
        return real(self)

    alive: dict[int, Any] = {}
    monkeypatch.setattr(importing._Stored, "_tensor", watched)
    src = saved({f"x{i}": torch.arange(100_000) for i in range(5)}, tmp_path / "src")
    import_dcp(src, tmp_path / "run")
    assert len(opened) == 5 and most[0] == 1
