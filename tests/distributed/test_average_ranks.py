"""average: checkpoints of several layouts, combined by any number of processes: the same bytes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_reshard_cli import Threads, content, environment, quick  # noqa: F401

import ckpt
from ckpt.collective import Solo
from ckpt.merge.recipe import Recipe, average
from ckpt.merge.write import MergeReport, materialise
from ckpt.saving import Planner, Request, save_state

WORLDS = (1, 2, 3)
OPTIONS = ["--weights", "wsm:1-sqrt", "--moments", "averaged", "--ranks", "5"]


def tensors(step: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    w = torch.rand(301, 450, generator=g)
    return {
        "w": w,
        "m": 0.1 * w,
        "h": torch.rand(600, 7, generator=g).bfloat16(),
        "d": torch.rand(5, generator=g).double(),
    }


def state(step: int, rank: int, world: int) -> dict[str, Any]:
    """Rows of w, columns of h; an optimizer by hand; the rest is the same on all, or a rank's own."""
    t = tensors(step)

    def part(x: torch.Tensor, dim: int) -> ckpt.Shard:
        size = -(-x.shape[dim] // world)
        lo, hi = min(rank * size, x.shape[dim]), min((rank + 1) * size, x.shape[dim])
        offset = [0] * x.dim()
        offset[dim] = lo
        return ckpt.Shard(x.narrow(dim, lo, hi - lo).contiguous(), tuple(x.shape), offset=tuple(offset))

    moment = {"state": {"w": {"exp_avg": part(t["m"], 0), "step": torch.tensor(float(step))}}, "groups": [{"lr": 0.1}]}
    own = torch.full((3,), step + 100.0 * rank)
    return {
        "model": {"w": part(t["w"], 0), "h": part(t["h"], 1), "d": t["d"]},
        "optimizer": moment,
        "own": own,
        "n": step,
    }


@pytest.fixture(scope="module")
def run(quick: Path) -> Iterator[Path]:  # noqa: F811
    """Three steps, saved by one, two and three ranks."""
    run = quick / "average"
    backend = ckpt.backends.LocalBackend(str(run))
    for step, world in enumerate(WORLDS):

        def save(group: Any, step: int = step, world: int = world) -> Any:
            request = Request(backend, step, 0, {"loss": 1.0}, ())
            return save_state(request, state(step, group.rank, world), group, Planner())

        for result in Threads(world).run(save):
            assert not isinstance(result, BaseException), result
    yield run


@pytest.fixture(scope="module")
def recipe(run: Path) -> Recipe:
    return average(run, weights="wsm:1-sqrt", moments="averaged")


@pytest.fixture(scope="module")
def alone(recipe: Recipe, quick: Path) -> Path:  # noqa: F811
    report = materialise(recipe, quick / "average-alone", group=Solo(), ranks=5)
    assert (report.packs, report.ranks, report.terms, report.averaged) == (5, 5, 3, 4)
    return quick / "average-alone"


def test_layouts_may_differ(recipe: Recipe, alone: Path) -> None:
    wanted = {
        name: sum(w * tensors(s)[name].double() for s, w in enumerate(recipe.weights.tolist())) for name in tensors(0)
    }
    with ckpt.open(alone) as c:
        assert c.verify().ok
        for name, near in (("w", 2e-7), ("h", 2**-8), ("d", 1e-15)):
            torch.testing.assert_close(c.tensors[f"model.{name}"][:].double(), wanted[name], rtol=near, atol=near)
        got = c.tensors["optimizer.state.w.exp_avg"][:].double()
        torch.testing.assert_close(got, wanted["m"], rtol=1e-6, atol=1e-7)
        assert c.tensors["optimizer.state.w.step"][()].item() == 2  # never averaged
        assert {k: c.tensors[k][0].item() for k in c.tensors if k.startswith("own")} == {
            "own@rank=0": 2.0,
            "own@rank=1": 102.0,
            "own@rank=2": 202.0,
        }
        assert c.objects["n"] == 2


@pytest.mark.parametrize("world", [2, 3, 7])
def test_any_number_of_processes_write_the_same(recipe: Recipe, alone: Path, tmp_path: Path, world: int) -> None:
    results = Threads(world).run(lambda group: materialise(recipe, tmp_path / "dst", group=group, ranks=5))
    assert all(isinstance(r, MergeReport) for r in results), results
    assert content(tmp_path / "dst") == content(alone)


@pytest.mark.parametrize("ranks", [1, 4])
def test_the_elements_do_not_depend_on_the_layout_of_the_result(
    recipe: Recipe, alone: Path, tmp_path: Path, ranks: int
) -> None:
    materialise(recipe, tmp_path / "dst", group=Solo(), ranks=ranks)
    with ckpt.open(alone) as a, ckpt.open(tmp_path / "dst") as b:
        for name in a.tensors:
            assert a.tensors[name].raw().tobytes() == b.tensors[name].raw().tobytes(), name


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_that_load_a_recipe_get_the_elements_of_the_written_one(recipe: Recipe, alone: Path, world: int) -> None:
    from ckpt.loading import LoadOptions, load_ref

    states = [state(9, rank, world) for rank in range(world)]
    for s in states:
        del s["own"]
    results = Threads(world).run(lambda group: load_ref(states[group.rank], recipe, LoadOptions(), group))
    assert not [r for r in results if isinstance(r, BaseException)], results
    with ckpt.open(alone) as c:
        for s in states:
            for name in ("w", "h"):
                shard = s["model"][name]
                there = c.tensors[f"model.{name}"][
                    tuple(slice(o, o + n) for o, n in zip(shard.offset, shard.tensor.shape, strict=True))
                ]
                assert torch.equal(shard.tensor, there)
            assert s["n"] == 2


def test_damage_met_by_one_process_fails_all(recipe: Recipe, run: Path, tmp_path: Path) -> None:
    pack = run / "step-00000002.g0000/a0/rank-00002.safetensors"
    data = pack.read_bytes()
    try:
        pack.write_bytes(data[:-500] + bytes([data[-500] ^ 1]) + data[-499:])
        for result in Threads(2).run(lambda group: materialise(recipe, tmp_path / "dst", group=group)):
            assert isinstance(result, ckpt.IntegrityError), result
    finally:
        pack.write_bytes(data)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def launched(command: list[str], run: Path, dst: Path) -> None:
    whole = [*command, "average", str(run), "--to", str(dst), *OPTIONS, "--json"]
    done = subprocess.run(whole, capture_output=True, text=True, timeout=200, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["packs"] == 5  # one document, from one of the two


def test_under_torchrun(run: Path, alone: Path, tmp_path: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ckpt.cli"]
    launched([sys.executable, *launch], run, tmp_path / "dst")
    assert content(tmp_path / "dst") == content(alone)


@pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="needs the mpi extra")
def test_under_mpiexec(run: Path, alone: Path, tmp_path: Path) -> None:
    mpiexec = Path(sys.executable).with_name("mpiexec")
    if not os.access(mpiexec, os.X_OK):
        pytest.skip("needs mpiexec beside this python")
    launched([str(mpiexec), "-n", "2", sys.executable, "-m", "ckpt.cli"], run, tmp_path / "dst")
    assert content(tmp_path / "dst") == content(alone)


def test_delta_weights_do_not_depend_on_how_the_checkpoints_were_cut(quick: Path, tmp_path: Path) -> None:  # noqa: F811
    """The same three states, saved by one, two and three ranks: the same weights, and the same elements for all that write them."""
    weights, contents = [], []
    for world in WORLDS:
        backend = ckpt.backends.LocalBackend(str(quick / f"delta-{world}"))

        def save(group: Any, step: int, backend: Any = backend, world: int = world) -> Any:
            whole = {k: v for k, v in state(step, group.rank, world).items() if k != "own"}
            return save_state(Request(backend, step, 0, {}, ()), whole, group, Planner())

        for step in range(3):
            for result in Threads(world).run(lambda group, step=step: save(group, step)):
                assert not isinstance(result, BaseException), result
        recipe = average(backend.root, last=2, weights=f"delta:{backend.root}@0", moments="latest")
        weights.append(recipe.weights_of)
        results = Threads(world).run(
            lambda group, r=recipe, w=world: materialise(r, tmp_path / f"dst-{w}", group=group, ranks=2)
        )
        assert all(isinstance(r, MergeReport) for r in results), results
        with ckpt.open(tmp_path / f"dst-{world}") as c:
            contents.append({name: c.tensors[name].raw().tobytes() for name in c.tensors})
    assert weights[0] == weights[1] == weights[2]
    assert contents[0] == contents[1] == contents[2]
    far = [float((tensors(s)["w"].double() - tensors(0)["w"].double()).norm()) for s in (1, 2)]
    assert weights[0] is not None
    assert weights[0]["model.w"] == pytest.approx([f / sum(far) for f in far], rel=1e-12)


def _net(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(33, 50), torch.nn.Linear(50, 7, bias=False))


def _sharded(rank: int, world: int, run: str, dst: str) -> dict[str, Any]:
    """On a rank: the recipe into an FSDP2 model in place, and written by all ranks together."""
    from torch.distributed.fsdp import fully_shard

    model = _net(99)
    fully_shard(model)
    recipe = ckpt.average(run, weights="0.7,-0.5,0.8")
    ckpt.load({"model": model}, recipe)
    report = ckpt.materialise(recipe, dst, ranks=3)
    assert (report.packs, report.terms) == (3, 3)
    got = {n: v.full_tensor() for n, v in model.state_dict().items()}
    delta = ckpt.average(run, last=2, weights=f"delta:{run}@0")
    ckpt.load({"model": model}, delta)
    ckpt.materialise(delta, f"{dst}-delta", ranks=3)
    return got | {f"delta {n}": v.full_tensor() for n, v in model.state_dict().items()}


def test_fsdp2_loads_a_recipe_and_all_ranks_write_it(pool: Any, tmp_path: Path) -> None:
    for step in range(3):
        ckpt.save({"model": _net(step)}, tmp_path / "run", step=step)
    recipe = average(tmp_path / "run", weights="0.7,-0.5,0.8")
    materialise(recipe, tmp_path / "alone", group=Solo(), ranks=3)
    results = pool.run(_sharded, str(tmp_path / "run"), str(tmp_path / "dst"), world=2)
    delta = average(tmp_path / "run", last=2, weights=f"delta:{tmp_path}/run@0")
    materialise(delta, tmp_path / "alone-delta", group=Solo(), ranks=3)
    assert content(tmp_path / "dst") == content(tmp_path / "alone")
    assert content(tmp_path / "dst-delta") == content(tmp_path / "alone-delta")
    with ckpt.open(tmp_path / "alone") as c, ckpt.open(tmp_path / "alone-delta") as d:
        for got in results:
            for name, value in got.items():
                stored = (d if name.startswith("delta ") else c).tensors[f"model.{name.removeprefix('delta ')}"][:]
                assert torch.equal(value, stored)
