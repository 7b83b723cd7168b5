"""torch.distributed.checkpoint with ckpt's storage, held against torch's own and against ckpt.load."""

from __future__ import annotations

import copy
import errno
import gc
import io
import logging
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pool import Pool
from torch import nn
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

import ckpt
from ckpt import faults
from ckpt.adapters.dcp import Reader, Writer
from ckpt.format.dtypes import DTYPES, dtype
from ckpt.offline.importing import import_dcp

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:.*:FutureWarning")


def same(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a:
            same(a[k], b[k], f"{where}.{k}")
    elif isinstance(a, (list, tuple)):
        assert type(a) is type(b) and len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}.{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, where
        assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)), where
    else:
        assert a == b and type(a) is type(b), where


def blank(value: Any) -> Any:
    """The same structure with other content."""
    if isinstance(value, dict):
        return {k: blank(v) for k, v in value.items()}
    if isinstance(value, list):
        return [blank(v) for v in value]
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    return None


def trained(layers: int = 2) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(layers)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
    groups = [{"params": list(m.parameters()), "lr": 0.1 / (i + 1)} for i, m in enumerate(model)]
    optimizer = torch.optim.AdamW(groups)
    model(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def everything() -> dict[str, Any]:
    model, optimizer = trained()
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {
        "model": model_state,
        "optim": optimizer_state,
        "step": 7,
        "words": ["a", "b"],
        "pair": (1, torch.arange(3)),
        "mixed": [{"a": 1}, {"b": [torch.ones(2), {"c": 2.5}]}],
        "strange": {"nan": float("inf"), "bytes": b"\x00\xff", "complex": 3 + 2j, "none": None, 5: "five"},
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
        "strided": torch.arange(12.0).reshape(3, 4).t(),
    }


def fail_once(what: int, point: str, rank: int | None = None) -> None:
    left = [1]

    def hook(name: str) -> None:
        if name.startswith(point) and left[0] and rank in (None, int(os.environ.get("RANK", 0))):
            left[0] = 0
            raise OSError(what, os.strerror(what), name)

    faults.install(hook)


def failures(e: CheckpointException) -> list[BaseException]:
    return [error for error, _ in e.failures.values()]


# One process.


def test_a_nested_state_comes_back_through_dcp_and_through_ckpt(tmp_path: Path) -> None:
    state = everything()
    metadata = dcp.save(state, storage_writer=Writer(tmp_path / "run"))
    assert metadata.storage_meta.checkpoint_id == f"{tmp_path}/run/step-00000000.g0000"
    with ckpt.open(tmp_path / "run") as c:
        assert c.verify().ok and c.objects["step"] == 7
        assert torch.equal(c.tensors["model.1.weight"][2:4], state["model"]["1.weight"][2:4])
    state["strange"]["5"] = state["strange"].pop(5)  # torch makes text of keys
    target = blank(state)
    dcp.load(target, storage_reader=Reader(tmp_path / "run"))
    same(state, target)
    own = blank(state) | {"pair": (0, torch.zeros(3, dtype=torch.int64))}
    own["optim"]["param_groups"] = None
    ckpt.load(own, tmp_path / "run", allow_missing=["pair.0"])
    own["pair"] = (1, own["pair"][1])  # torch flattens dicts and lists; a tuple reaches a storage as one value
    same(state, own)


def test_what_dcp_saved_loads_into_model_and_optimizer_themselves(tmp_path: Path) -> None:
    for flat in (False, True):
        model, optimizer = trained()
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
        run = tmp_path / f"flat-{flat}"
        dcp.save({"model": model_state, "optim": optimizer_state}, storage_writer=Writer(run))
        other, target = trained()
        for p in other.parameters():
            nn.init.zeros_(p)
        target.param_groups[0]["lr"] = 9.0
        ckpt.load({"model": other, "optim": target}, run)
        same(dict(model.state_dict()), dict(other.state_dict()))
        same(optimizer.state_dict(), target.state_dict())


def test_dcp_loads_what_ckpt_saved(tmp_path: Path) -> None:
    model, optimizer = trained()
    tied = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    tied["b"].weight = tied["a"].weight
    state = {
        "model": model,
        "optim": optimizer,
        "tied": tied,
        "step": 9,
        "list": [{"x": 1, "y": {}}],
        "deep": {"k": [1]},
    }
    ckpt.save(state, tmp_path / "run", step=3)
    for flat in (False, True):
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        other, target = trained()
        target.param_groups[1]["lr"] = 9.0
        model_state, optimizer_state = get_state_dict(other, target, options=options)
        loaded = {
            "model": blank(model_state),
            "optim": optimizer_state,
            "tied": blank(dict(tied.state_dict())),
            "step": 0,
            "list": [{"x": 0}],
            "deep": {"k": [0]},
        }
        dcp.load(loaded, storage_reader=Reader(f"{tmp_path}/run@3"))
        set_state_dict(
            other, target, model_state_dict=loaded["model"], optim_state_dict=loaded["optim"], options=options
        )
        same(dict(model.state_dict()), dict(other.state_dict()))
        same(optimizer.state_dict(), target.state_dict())
        same(loaded["tied"], dict(tied.state_dict()))
        assert (loaded["step"], loaded["list"], loaded["deep"]) == (9, [{"x": 1}], {"k": [1]})


def test_a_state_is_rebuilt_from_the_checkpoint_alone(tmp_path: Path) -> None:
    state = everything()
    del state["strange"][5]
    flat = {f"layers.{i}.weight": torch.full((2,), i) for i in range(3)}
    for name, content in {"nested": state, "flat": flat}.items():
        dcp.save(content, storage_writer=Writer(tmp_path / name))
        rebuilt = _load_state_dict_from_keys(storage_reader=Reader(tmp_path / name))
        same(content, rebuilt)
    with ckpt.open(tmp_path / "flat") as c:
        assert c.objects["__ckpt__.dcp_paths"] == {"layers.": []}


def test_every_dtype(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {}
    for name in DTYPES:
        raw = torch.randint(0, 2 if name == "bool" else 255, (6, 4 * dtype(name).itemsize), dtype=torch.uint8)
        state[name] = raw.view(getattr(torch, name))
    dcp.save(state, storage_writer=Writer(tmp_path / "run"))
    target = {k: torch.empty_like(v) for k, v in state.items()}
    dcp.load(target, storage_reader=Reader(tmp_path / "run"))
    same(state, target)


def test_steps(tmp_path: Path) -> None:
    run = tmp_path / "run"
    writer = Writer(run)
    for n in range(2):
        dcp.save({"x": torch.tensor(n)}, storage_writer=writer)
    writer.step = 10
    dcp.save({"x": torch.tensor(10)}, storage_writer=writer)
    dcp.save({"x": torch.tensor(11)}, storage_writer=Writer(run))
    dcp.save({"x": torch.tensor(20)}, storage_writer=Writer(f"{run}@20", metrics={"loss": 0.5}))
    dcp.save({"x": torch.tensor(7)}, storage_writer=Writer(run), checkpoint_id=str(tmp_path / "other" / "step-7"))
    dcp.save({"x": torch.tensor(30)}, storage_writer=Writer("nowhere"), checkpoint_id=f"{run}/step-00000030.g0000")
    for n in (0, 1, 10, 11, 20, 30):
        target = {"x": torch.tensor(-1)}
        dcp.load(target, storage_reader=Reader(f"{run}@{n}"))
        assert target["x"] == n
    target = {"x": torch.tensor(-1)}
    dcp.load(target, storage_reader=Reader("nowhere"), checkpoint_id=tmp_path / "other" / "step-7")
    assert target["x"] == 7
    with ckpt.open(f"{run}@20") as c:
        assert c.metrics == {"loss": 0.5} and c.step == 20
    with pytest.raises(CheckpointException, match="committed already") as e:
        dcp.save({"x": torch.tensor(0)}, storage_writer=writer)
    assert isinstance(failures(e.value)[0], ckpt.ConflictError)
    for url, step in ((f"{run}@best", None), (f"{run}@latest", None), (f"{run}@3", 4)):
        with pytest.raises(ckpt.UsageError):
            Writer(url, step=step)
    again = pickle.loads(pickle.dumps(writer))
    assert (again.url, again.step, again.metrics) == (writer.url, 10, {})


class Thing:
    def __init__(self, x: int) -> None:
        self.x = x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Thing) and other.x == self.x

    __hash__ = None  # type: ignore[assignment]


def test_what_only_pickle_can_hold_needs_to_be_allowed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = {"thing": Thing(3), "groups": [{"thing": Thing(4), "lr": 0.1}]}
    dcp.save(state, storage_writer=Writer(tmp_path / "run"))
    assert "groups.0.thing" in caplog.text and "allow_pickle" in caplog.text
    target = blank(state)
    with pytest.raises(CheckpointException) as e:
        dcp.load(target, storage_reader=Reader(tmp_path / "run"))
    assert isinstance(failures(e.value)[0], ckpt.UnsafeError)
    part = {"groups": [{"lr": None}]}
    dcp.load(part, storage_reader=Reader(tmp_path / "run"))
    assert part["groups"][0]["lr"] == 0.1
    dcp.load(target, storage_reader=Reader(tmp_path / "run", allow_pickle=True))
    same(state, target)


def test_a_dtype_changes_only_if_asked(tmp_path: Path) -> None:
    dcp.save({"x": torch.arange(4.0)}, storage_writer=Writer(tmp_path / "run"))
    target = {"x": torch.full((4,), -1, dtype=torch.bfloat16)}
    with pytest.raises(CheckpointException, match="state bfloat16, checkpoint float32") as e:
        dcp.load(target, storage_reader=Reader(tmp_path / "run"))
    assert isinstance(failures(e.value)[0], ckpt.MismatchError) and (target["x"] == -1).all()
    dcp.load(target, storage_reader=Reader(tmp_path / "run", cast=True))
    assert target["x"].tolist() == [0, 1, 2, 3]


class Halves(DefaultSavePlanner):
    """As in torch's documentation: everything is stored as float16."""

    def create_local_plan(self) -> Any:
        plan = super().create_local_plan()
        for item in plan.items:
            if item.tensor_data is not None:
                item.tensor_data.properties.dtype = torch.float16
        return plan

    def resolve_data(self, write_item: Any) -> Any:
        data = super().resolve_data(write_item)
        return data if write_item.tensor_data is None else data.to(torch.float16)


def test_planners_may_transform(tmp_path: Path) -> None:
    dcp.save({"x": torch.arange(4.0), "n": [1]}, storage_writer=Writer(tmp_path / "run"), planner=Halves())
    with ckpt.open(tmp_path / "run") as c:
        assert c.tensors["x"].dtype == "float16" and c.objects["n"] == [1]
    with pytest.raises(CheckpointException, match="planned as float32"):
        planner = Halves()
        planner.create_local_plan = lambda: DefaultSavePlanner.create_local_plan(planner)  # type: ignore[method-assign]
        dcp.save({"x": torch.arange(4.0)}, storage_writer=Writer(tmp_path / "bad"), planner=planner)


class OwnBytes(DefaultSavePlanner):
    """A planner that serialises values in a way of its own."""

    def transform_object(self, write_item: Any, object: Any) -> Any:
        if write_item.tensor_data is not None:
            return object
        return io.BytesIO(b"mine:" + pickle.dumps(object))


class OwnBytesBack(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        data = value.getvalue()
        assert data.startswith(b"mine:")
        self.state_dict[read_item.dest_index.fqn] = self.original_state_dict[read_item.dest_index.fqn] = pickle.loads(
            data[5:]
        )


def test_planners_may_serialise_in_their_own_way(tmp_path: Path) -> None:
    """Such bytes come back as they are; since the default planner would unpickle them, only if that is allowed."""
    dcp.save({"n": [1, 2]}, storage_writer=Writer(tmp_path / "run"), planner=OwnBytes())
    target: dict[str, Any] = {"n": None}
    with pytest.raises(CheckpointException) as e:
        dcp.load(target, storage_reader=Reader(tmp_path / "run"))
    assert isinstance(failures(e.value)[0], ckpt.UnsafeError)
    dcp.load(target, storage_reader=Reader(tmp_path / "run", allow_pickle=True), planner=OwnBytesBack())
    assert target == {"n": [1, 2]}


def test_cached_plans_go_to_the_step_of_today(tmp_path: Path) -> None:
    for n in range(3):
        state = {"x": torch.tensor([n]), "n": n}
        dcp.save(state, storage_writer=Writer(tmp_path / "run"), planner=DefaultSavePlanner(enable_plan_caching=True))
    for n in range(3):
        target = {"x": torch.tensor([-1]), "n": -1}
        dcp.load(target, storage_reader=Reader(f"{tmp_path}/run@{n}"))
        assert target["x"] == n and target["n"] == n


def test_saving_without_collectives_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ckpt.UsageError, match="use_collectives"):
        dcp.save({"x": torch.ones(1)}, storage_writer=Writer(tmp_path / "run"), use_collectives=False)


def test_damage_is_found(tmp_path: Path) -> None:
    dcp.save({"x": torch.arange(10)}, storage_writer=Writer(tmp_path / "run"))
    (pack,) = (tmp_path / "run").rglob("rank-*")
    data = bytearray(pack.read_bytes())
    data[4096 + 3] ^= 1
    pack.write_bytes(data)
    with pytest.raises(CheckpointException) as e:
        dcp.load({"x": torch.zeros(10, dtype=torch.int64)}, storage_reader=Reader(tmp_path / "run"))
    assert isinstance(failures(e.value)[0], ckpt.IntegrityError)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("where", ["local.new.write", "local.new.fsync", "local.new.allocate", "local.create.link"])
@pytest.mark.parametrize("kind", ["save", "async_save"])
def test_a_failed_write_publishes_nothing(tmp_path: Path, code: int, where: str, kind: str) -> None:
    """pytorch/pytorch#191391: torch's own writer publishes after a writer thread has failed."""
    state = {"x": torch.arange(1000), "step": 1}
    writer = Writer(tmp_path / "run")
    fail_once(code, where)
    try:
        with pytest.raises(CheckpointException) as e:
            if kind == "save":
                dcp.save(state, storage_writer=writer)
            else:
                dcp.async_save(state, storage_writer=writer).result()
    finally:
        faults.install(None)
    (error,) = failures(e.value)
    assert isinstance(error, ckpt.StorageError) and os.strerror(code) in str(error)
    assert not list((tmp_path / "run").rglob("commit.json"))
    with pytest.raises(ckpt.NotFoundError):
        ckpt.open(tmp_path / "run")
    dcp.save(state, storage_writer=writer)
    with ckpt.open(tmp_path / "run") as c:
        assert c.verify().ok
    assert len(list((tmp_path / "run").rglob("rank-*"))) == 1  # and nothing of the failed one is left


def test_what_a_failed_save_left_goes_with_its_writer(tmp_path: Path) -> None:
    fail_once(errno.EIO, "local.new.fsync")
    try:
        with pytest.raises(CheckpointException):
            dcp.save({"x": torch.arange(1000)}, storage_writer=Writer(tmp_path / "run"))
    finally:
        faults.install(None)
    gc.collect()
    assert not list((tmp_path / "run").rglob("rank-*"))


def test_async_save_keeps_what_was_there(tmp_path: Path) -> None:
    state = {"x": torch.zeros(1000), "n": 1}
    future = dcp.async_save(state, storage_writer=Writer(tmp_path / "run"))
    state["x"].fill_(5)
    future.result()
    target = {"x": torch.ones(1000), "n": 0}
    dcp.load(target, storage_reader=Reader(tmp_path / "run"))
    assert (target["x"] == 0).all() and target["n"] == 1


def test_async_saves_stage_into_the_same_memory_unless_it_is_in_use(tmp_path: Path) -> None:
    state = {"x": torch.zeros(300_000)}
    writer, staged = Writer(tmp_path / "run"), []
    futures = []
    for step in range(6):
        writer.step = step
        state["x"].fill_(step)
        staged.append(writer.stage(state)["x"])
        if step % 3 < 2:  # else the next one begins while this one is being written
            dcp.save({"x": staged[-1]}, storage_writer=writer)
            futures.append(step)
    where = [t.data_ptr() for t in staged]
    assert where[0] == where[1] == where[2] and len({where[2], where[3], where[4]}) == 3
    assert [float(t[0]) for t in staged[3:]] == [3, 4, 5]  # not one was written over while it was not written
    for step in futures:
        target = {"x": torch.ones(300_000)}
        dcp.load(target, storage_reader=Reader(f"{tmp_path}/run@{step}"))
        assert (target["x"] == step).all()


# Several.


def _save_sharded(rank: int, world: int, run: str, layout: str, how: str) -> str:
    warnings.simplefilter("ignore")
    model = models.build(layout, rank, world)
    optimizer = models.train_once(model)
    models.fill(model, optimizer, 1)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optim": optimizer_state, "epoch": 4}
    if how == "save":
        metadata = dcp.save(state, storage_writer=Writer(run))
    else:
        group = dist.new_group(backend="gloo")
        future = dcp.async_save(state, storage_writer=Writer(run), process_group=group)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1)
        metadata = future.result()
    return str(metadata.storage_meta.checkpoint_id)


def _load_sharded(rank: int, world: int, run: str, layout: str, how: str) -> tuple[int, int]:
    warnings.simplefilter("ignore")
    model = models.build(layout, rank, world)
    optimizer = models.train_once(model)
    models.fill(model, optimizer, 2)
    if how == "ckpt":
        state: dict[str, Any] = {"model": model, "optim": optimizer, "epoch": 0}
        ckpt.load(state, run)
    else:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optim": optimizer_state, "epoch": 0}
        dcp.load(state, storage_reader=Reader(run))
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    return models.check(model, optimizer, 1), state["epoch"]


@pytest.mark.parametrize(
    "before, after",
    [
        (("fsdp", 2, "save"), [("single", 1, "dcp"), ("fsdp", 4, "dcp"), ("tp", 2, "ckpt")]),
        (("fsdp_tp", 4, "async"), [("fsdp", 2, "dcp"), ("single", 1, "ckpt")]),
        (("single", 1, "async"), [("hsdp", 4, "dcp")]),
    ],
    ids=lambda v: v[0] if isinstance(v, tuple) else "",
)
def test_onto_another_parallelism(pool: Pool, tmp_path: Path, before: Any, after: Any) -> None:
    layout, world, how = before
    run = str(tmp_path / "run")
    refs = pool.run(_save_sharded, run, layout, how, world=world)
    assert refs == [f"{run}/step-00000000.g0000"] * world
    with ckpt.open(run) as c:
        assert c.verify().ok and c.commit.world == world
    for layout, world, how in after:
        for checked, epoch in pool.run(_load_sharded, run, layout, how, world=world):
            assert checked > 20 and epoch == 4


def _save_with_torch(rank: int, world: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    model = models.build("fsdp", rank, world)
    optimizer = models.train_once(model)
    models.fill(model, optimizer, 1)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optim": optimizer_state, "epoch": 4}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder, thread_count=2))


def test_what_torch_saved_sharded_is_imported(pool: Pool, tmp_path: Path) -> None:
    pool.run(_save_with_torch, str(tmp_path / "dcp"), world=2)
    import_dcp(tmp_path / "dcp", tmp_path / "run")
    with ckpt.open(tmp_path / "run") as c:
        assert len(c.manifest.boxes(c.manifest.index("model.blocks.0.up.weight"))) == 2 and c.verify().ok
    for checked, epoch in pool.run(_load_sharded, str(tmp_path / "run"), "tp", "ckpt", world=2):
        assert checked > 20 and epoch == 4
    pool.run(_load_sharded, str(tmp_path / "run"), "single", "dcp", world=1)


def _fail_on_one(rank: int, world: int, run: str, how: str) -> list[str]:
    warnings.simplefilter("ignore")
    state = {f"x{rank}": torch.arange(1000), "both": torch.ones(5), "step": 1}
    writer = Writer(run)
    told = []
    for code, where in ((errno.EIO, "local.new.write"), (errno.ENOSPC, "local.new.allocate")):
        fail_once(code, where, rank=1)
        try:
            if how == "save":
                dcp.save(state, storage_writer=writer)
            else:
                dcp.async_save(state, storage_writer=writer).result()
        except CheckpointException as e:
            told += [f"{r}: {type(error).__name__}: {error}" for r, (error, _) in e.failures.items()]
        finally:
            faults.install(None)
    assert not list(Path(run).rglob("commit.json"))
    dist.barrier()
    dcp.save(state, storage_writer=writer)
    return told


@pytest.mark.parametrize("how", ["save", "async"])
def test_a_failure_of_one_rank_fails_all(pool: Pool, tmp_path: Path, how: str) -> None:
    run = tmp_path / "run"
    for told in pool.run(_fail_on_one, str(run), how, world=2):
        assert [t.partition(":")[0] for t in told] == ["1", "1"]
        assert "StorageError" in told[0] and os.strerror(errno.EIO) in told[0]
        assert os.strerror(errno.ENOSPC) in told[1]
    with ckpt.open(run) as c:
        assert c.verify().ok and set(c.tensors) == {"x0", "x1", "both"}
    assert len(list(run.rglob("rank-*"))) == 2


def _per_rank(rank: int, world: int, run: str) -> tuple[Any, str]:
    warnings.simplefilter("ignore")
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ckpt").addHandler(handler)
    state = {"rng": {"seed": rank, "common": 5}, "loader": [{"at": 10 * rank}], "counter": torch.tensor(rank)}
    dcp.save(copy.deepcopy(state), storage_writer=Writer(run))
    target = {"rng": {"seed": -1, "common": -1}, "loader": [{"at": -1}], "counter": torch.tensor(-1)}
    dcp.load(target, storage_reader=Reader(run))
    logging.getLogger("ckpt").removeHandler(handler)
    target.pop("counter")
    return target, "\n".join(seen)


def test_values_that_differ_come_back_to_their_rank(pool: Pool, tmp_path: Path) -> None:
    out = pool.run(_per_rank, str(tmp_path / "run"), world=2)
    for rank, (target, _) in enumerate(out):
        assert target == {"rng": {"seed": rank, "common": 5}, "loader": [{"at": 10 * rank}]}
    assert "counter" in out[0][1]  # a tensor cannot be stored twice at that point, but it is said
    with ckpt.open(tmp_path / "run") as c:
        assert c.objects["loader@rank=1"] == [{"at": 10}] and c.objects["rng.common"] == 5


def _late(rank: int, world: int, run: str) -> int:
    """Rank 1 looks for the latest step before the newest is committed."""
    warnings.simplefilter("ignore")
    from ckpt.adapters import _dcp_read

    found = _dcp_read.resolve
    if rank == 1:
        _dcp_read.resolve = lambda ref: found(f"{ref}@0")  # type: ignore[assignment]
    target = {"x": torch.zeros(4)}
    try:
        dcp.load(target, storage_reader=Reader(run))
    finally:
        _dcp_read.resolve = found
    return int(target["x"][0])


def test_all_ranks_load_the_same_step(pool: Pool, tmp_path: Path) -> None:
    for n in range(2):
        dcp.save({"x": torch.full((4,), n + 1.0)}, storage_writer=Writer(tmp_path / "run"))
    assert pool.run(_late, str(tmp_path / "run"), world=2) == [2, 2]


def _holes(rank: int, world: int, run: str) -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    warnings.simplefilter("ignore")
    mesh = init_device_mesh("cpu", (world,))
    good = DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)])
    bad = DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)], shape=torch.Size([5, 3]), stride=(3, 1))
    try:
        dcp.save({"good": good, "bad": bad}, storage_writer=Writer(run))
    except CheckpointException as e:
        return [str(error) for error in failures(e)]
    return []


def test_pieces_that_do_not_fit_are_refused(pool: Pool, tmp_path: Path) -> None:
    for told in pool.run(_holes, str(tmp_path / "run"), world=2):
        assert told and "bad" in told[0]
    assert not list(tmp_path.rglob("commit.json"))
