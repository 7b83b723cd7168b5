"""Recipes: what is chosen, what becomes of each leaf, and that the result is an ordinary checkpoint."""

from __future__ import annotations

import copy
import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import ckpt
from ckpt.cli import cli
from ckpt.collective import Solo
from ckpt.merge import weights as maths
from ckpt.merge.recipe import Recipe, Term, posthoc
from ckpt.merge.write import RECIPE, recipe_in

STEPS = (10, 20, 40, 50)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(31, 8)
        self.up = torch.nn.Linear(8, 700)
        self.norm = torch.nn.BatchNorm1d(700)
        self.thin = torch.nn.Parameter(torch.randn(5, 3, 7).to(torch.bfloat16))
        self.wide = torch.nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.scale = torch.nn.Parameter(torch.tensor(1.5))
        self.frozen = torch.nn.Parameter(torch.tensor([0.1, -0.0, 3.0]), requires_grad=False)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.head = torch.nn.Linear(8, 31, bias=False)
        self.head.weight = self.embed.weight


def train(model: Net, optimizer: torch.optim.Optimizer, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)
    optimizer.step()
    model.norm.running_mean += 0.1 * seed
    model.norm.num_batches_tracked += 1


def fresh() -> dict[str, Any]:
    torch.manual_seed(0)
    model = Net()
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.05), "epoch": 0}


Snapshots = list[dict[str, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Snapshots]:
    """A run of four steps, uneven, and the states as they were saved. Read-only."""
    run = tmp_path_factory.mktemp("made") / "run"
    state = fresh()
    states = []
    for i, step in enumerate(STEPS):
        train(state["model"], state["optimizer"], i + 1)
        state["epoch"] = i
        ckpt.save(state, run, step=step, metrics={"loss": 4.0 - i, "acc": 0.2 * (i + 1)})
        states.append(copy.deepcopy(state))
    return run, states


def mean(states: Snapshots, weights: Any, name: str) -> torch.Tensor:
    return sum(w * s["model"].state_dict()[name].double() for w, s in zip(weights, states, strict=True))  # type: ignore[no-any-return]


def check_model(got: dict[str, torch.Tensor], states: Snapshots, weights: Any) -> None:
    for name, value in got.items():
        last = states[-1]["model"].state_dict()[name]
        if name in ("mask", "frozen"):
            assert value.numpy().tobytes() == last.numpy().tobytes(), name
        elif not value.is_floating_point():
            assert torch.equal(value, last), name
        else:
            near = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float64: 1e-14}[value.dtype]
            torch.testing.assert_close(value.double(), mean(states, weights, name), rtol=near, atol=near, msg=name)


# What is chosen, and how much it counts.


def steps_of(recipe: Recipe) -> list[int]:
    return [t.step for t in recipe.terms]


def test_which_checkpoints(made: tuple[Path, Snapshots]) -> None:
    run = made[0]
    assert steps_of(ckpt.average(run)) == [10, 20, 40, 50]
    assert steps_of(ckpt.average(run, last=2)) == [40, 50]
    assert steps_of(ckpt.average(run, steps="10,30:")) == [10, 40, 50]
    assert steps_of(ckpt.average(run, steps=":20")) == [10, 20]
    assert steps_of(ckpt.average(run, steps=[20, 50])) == [20, 50]
    assert steps_of(ckpt.average([f"{run}@10", f"{run}@latest"])) == [10, 50]
    assert steps_of(ckpt.average(run, weights="interpolate:0.25")) == [10, 50]
    assert ckpt.average(run, weights="interpolate:0.25").weights.tolist() == [0.75, 0.25]
    assert ckpt.average(run, last=1).weights.tolist() == [1.0]


def test_steps_that_a_rollback_left_behind_are_not_averaged(tmp_path: Path) -> None:
    x = {"x": torch.zeros(3)}
    with ckpt.Checkpointer(tmp_path / "run", x, storage=ckpt.Every(1)) as cp:
        cp.restore()
        for step in range(3):
            x["x"].fill_(step)
            cp.step(step)
            cp.wait(60)
    with ckpt.Checkpointer(tmp_path / "run", x, storage=ckpt.Every(1)) as cp:
        cp.restore(ref=f"{tmp_path}/run@1")
        cp.step(2)
    recipe = ckpt.average(tmp_path / "run")
    assert [t.ref.rpartition("/")[2] for t in recipe.terms] == [
        "step-00000000.g0001",
        "step-00000001.g0001",
        "step-00000002.g0002",
    ]


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ("uniform", lambda: maths.uniform(4)),
        ("wsm:1-sqrt", lambda: maths.wsm(STEPS, maths.DECAYS["1-sqrt"])),
        ("ema:0.97", lambda: maths.ema(STEPS, 0.97)),
        ("power:2", lambda: maths.power(STEPS, 2)),
        ("edm:0.1", lambda: maths.power_ema([s + 1 for s in STEPS], 0.1)),
        ("mwa:loss,4", lambda: maths.mwa([4, 3, 2, 1], 4)),
        ("mwa:loss,4,range", lambda: maths.mwa([4, 3, 2, 1], 4, "range")),
        ("mwa:acc,2", lambda: maths.mwa([0.2, 0.4, 0.6, 0.8], -2)),
        ("mwa:step,2", lambda: maths.mwa([11, 21, 41, 51], -2)),
        ("0.2,0.3,1/4,1/4", lambda: np.array([0.2, 0.3, 0.25, 0.25])),
        ("runs", lambda: maths.uniform(4)),
        (lambda commits: [c.step / 120 for c in commits], lambda: np.array(STEPS) / 120),
        ([0.0, 2.0, -1.0, 0.0], lambda: np.array([2.0, -1.0, 0.0])),
    ],
)
def test_how_much_they_count(made: tuple[Path, Snapshots], how: Any, wanted: Callable[[], Any]) -> None:
    np.testing.assert_allclose(ckpt.average(made[0], weights=how).weights, wanted(), rtol=1e-12)


def test_metrics_that_came_late_count(made: tuple[Path, Snapshots], tmp_path: Path) -> None:
    run = shutil.copytree(made[0], tmp_path / "run")
    rows = [{"step": s, "val": s / 10} for s in STEPS]
    ckpt.catalog.write_ledger(ckpt.backends.LocalBackend(str(run)), "g0000-x", rows)
    np.testing.assert_allclose(ckpt.average(run, weights="mwa:val,1").weights, maths.mwa([1, 2, 4, 5], 1))


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"weights": "mwa:val,4"}, ckpt.NotFoundError, "step 10, 20, 40, 50"),
        ({"weights": "nonsense"}, ckpt.UsageError, "no number"),
        ({"weights": "wsm:round"}, ckpt.UsageError, "1-sqrt"),
        ({"weights": "ema:1.5"}, ckpt.UsageError, "below 1"),
        ({"weights": "0.5,0.5"}, ckpt.UsageError, "2 weights for 4"),
        ({"weights": "0.5,0.2,0.1,0.1"}, ckpt.UsageError, "add up to 0.9"),
        ({"steps": "10,30"}, ckpt.NotFoundError, "no committed step 30"),
        ({"steps": "ten"}, ckpt.UsageError, "write them as"),
        ({"last": 5}, ckpt.NotFoundError, "4 are there"),
        ({"moments": "fresh"}, ckpt.UsageError, "latest, averaged, reset"),
        ({"weights": [2.0, -1.0, 0.0, 0.0], "moments": "averaged"}, ckpt.UsageError, "negative"),
    ],
)
def test_bad_requests_are_refused(
    made: tuple[Path, Snapshots], given: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        ckpt.average(made[0], **given)


def test_a_checkpoint_named_twice_is_refused(made: tuple[Path, Snapshots]) -> None:
    with pytest.raises(ckpt.UsageError, match="twice"):
        ckpt.average([made[0], f"{made[0]}@50"])


names = st.text('ab.é"', max_size=4)
terms = st.lists(
    st.builds(
        Term,
        names,
        st.integers(0, 2**50),
        names,
        st.floats(-4, 4),
        st.lists(st.tuples(names, names), max_size=2).map(tuple),
    ),
    max_size=5,
)


@given(terms, names, st.sampled_from(["", "latest", "reset"]), st.lists(names, max_size=3).map(tuple))
def test_a_recipe_survives_json(some: list[Term], method: str, moments: str, only: tuple[str, ...]) -> None:
    rest = 1 - sum(t.weight for t in some)
    recipe = Recipe(method, (*some, Term("r", 1, "00", rest)), moments, only, said={"score": 0.1})
    assert Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version":2}', '{"version":1,"method":"m","terms":[{}],"only":[],"latest":[]}']
)
def test_what_is_no_recipe_is_a_format_error(text: str) -> None:
    with pytest.raises(ckpt.FormatError):
        Recipe.from_json(text)


# What becomes of each leaf.


@pytest.mark.parametrize("how", ["uniform", "wsm:1-sqrt", "0.7,-0.4,0.1,0.6"])
def test_the_result_is_the_average_and_loads_as_any_checkpoint(
    made: tuple[Path, Snapshots], tmp_path: Path, how: str
) -> None:
    run, states = made
    recipe = ckpt.average(run, weights=how, moments="latest")
    report = ckpt.materialise(recipe, tmp_path / "dst", group=Solo(), metrics={"val": 0.5})
    target = fresh()
    ckpt.load(target, tmp_path / "dst")
    check_model(target["model"].state_dict(), states, recipe.weights)
    assert target["epoch"] == 3
    for a, b in zip(target["optimizer"].state.values(), states[-1]["optimizer"].state.values(), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in b)
    with ckpt.open(tmp_path / "dst") as c:
        assert c.verify().ok
        assert recipe_in(c.objects) == recipe
        assert c.manifest.aliases == {"model.head.weight": "model.embed.weight"}
        assert (c.step, dict(c.metrics)) == (50, {"val": 0.5})
        assert report.averaged == len([n for n in c.manifest.by_key if n.startswith("model.")]) - 1
        assert report.bytes == sum(p.stat().st_size for p in tmp_path.rglob("rank-*.safetensors"))
    assert report.bytes_read > 3 * sum(p.numel() * 4 for p in target["model"].parameters())


def test_merge_on_load_is_the_same_without_writing(made: tuple[Path, Snapshots], tmp_path: Path) -> None:
    run, states = made
    before = sorted(run.rglob("*"))
    recipe = ckpt.average(run, weights="ema:0.98", moments="averaged")
    ckpt.materialise(recipe, tmp_path / "dst", group=Solo())
    one, two = fresh(), fresh()
    ckpt.load(one, tmp_path / "dst")
    report = ckpt.load(two, recipe)
    assert report.step == 50
    assert report.bytes_read > report.bytes_needed > 0
    for a, b in zip(one["model"].state_dict().values(), two["model"].state_dict().values(), strict=True):
        assert a.flatten().view(torch.uint8).tolist() == b.flatten().view(torch.uint8).tolist()
    for a, b in zip(one["optimizer"].state.values(), two["optimizer"].state.values(), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)
    check_model(two["model"].state_dict(), states, recipe.weights)
    assert sorted(run.rglob("*")) == before


def test_merge_on_load_takes_views_and_other_types(made: tuple[Path, Snapshots]) -> None:
    run, states = made
    recipe = ckpt.average(run)
    turned = torch.zeros(8, 700).t()  # not contiguous
    ckpt.load({"model": {"up": {"weight": turned}}}, recipe)
    whole = torch.zeros(700, 8)
    ckpt.load({"model": {"up": {"weight": whole}}}, recipe)
    assert torch.equal(turned, whole)
    cast = torch.zeros(700, 8, dtype=torch.float64)
    ckpt.load({"model": {"up": {"weight": cast}}}, recipe, cast=True)
    assert torch.equal(cast, whole.double())
    rows = torch.zeros(30, 3)
    ckpt.load({"model": {"up": {"weight": ckpt.Shard(rows, (700, 8), offset=(101, 4))}}}, recipe)
    assert torch.equal(rows, whole[101:131, 4:7])
    torch.testing.assert_close(whole.double(), mean(states, recipe.weights, "up.weight"), rtol=1e-6, atol=1e-7)


def test_moments_are_chosen_by_hand(made: tuple[Path, Snapshots], tmp_path: Path) -> None:
    run, states = made
    with pytest.raises(ckpt.UsageError, match="state of 'optimizer'; say what becomes of it"):
        ckpt.materialise(ckpt.average(run), tmp_path / "dst", group=Solo())
    assert not list(tmp_path.rglob("*.*"))
    recipe = ckpt.average(run, last=2, moments="averaged")
    ckpt.materialise(recipe, tmp_path / "averaged", group=Solo())
    target = fresh()
    ckpt.load(target, tmp_path / "averaged")
    p, a, b = (s["optimizer"].state[s["model"].up.weight] for s in (target, *states[2:]))
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(p[name], (a[name] + b[name]) / 2, rtol=1e-6, atol=3e-8)
    assert p["step"].item() == b["step"].item() == 4


def test_reset_moments_begin_anew(made: tuple[Path, Snapshots], tmp_path: Path) -> None:
    recipe = ckpt.average(made[0], moments="reset")
    ckpt.materialise(recipe, tmp_path / "dst", group=Solo())
    for ref in (tmp_path / "dst", recipe):
        target = copy.deepcopy(made[1][0])
        target["optimizer"].param_groups[0]["lr"] = 9.0
        ckpt.load(target, ref)
        assert not target["optimizer"].state
        assert target["optimizer"].param_groups[0]["lr"] == 0.05
        train(target["model"], target["optimizer"], 7)
    with ckpt.open(tmp_path / "dst") as c:
        assert not [n for n in c.tensors if n.startswith("optimizer.state.")]
        assert c.verify().ok


def test_training_resumes_from_the_result(made: tuple[Path, Snapshots], tmp_path: Path) -> None:
    ckpt.materialise(ckpt.average(made[0], moments="latest"), tmp_path / "dst", group=Solo())
    state = fresh()
    with ckpt.Checkpointer(tmp_path / "dst", state, storage=ckpt.Every(1)) as cp:
        assert cp.restore() == 51
        train(state["model"], state["optimizer"], 5)
        cp.step(51)
    with ckpt.open(tmp_path / "dst") as c:
        assert c.step == 51
        assert RECIPE not in c.objects


def test_an_average_can_be_averaged_again(made: tuple[Path, Snapshots], tmp_path: Path) -> None:
    for step, how in enumerate(("uniform", "ema:0.9")):
        recipe = ckpt.average(made[0], weights=how, moments="reset")
        ckpt.materialise(recipe, tmp_path / "first", group=Solo(), step=step)
    again = ckpt.average(tmp_path / "first", weights="interpolate:0.5", moments="reset")
    ckpt.materialise(again, tmp_path / "second", group=Solo())
    with ckpt.open(tmp_path / "second") as c:
        assert recipe_in(c.objects) == again
        assert c.verify().ok


def saved(folder: Path, *states: dict[str, Any]) -> Path:
    for step, state in enumerate(states):
        ckpt.save(state, folder / "run", step=step)
    return folder / "run"


def test_leaves_by_name(tmp_path: Path) -> None:
    run = saved(tmp_path, *({"a": torch.full((2,), v), "b": torch.full((2,), v)} for v in (0.0, 1.0)))
    for how, wanted in (({"only": ["a"]}, (0.5, 1.0)), ({"latest": ["a*"]}, (1.0, 0.5)), ({}, (0.5, 0.5))):
        target = {"a": torch.zeros(2), "b": torch.zeros(2)}
        ckpt.load(target, ckpt.average(run, **how))
        assert (target["a"][0].item(), target["b"][0].item()) == wanted


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("first", "says"),
    [
        ({"x": X}, r"missing from step 0 \(1\): y"),
        ({"x": X, "y": X.t()}, r"another shape or type in step 0 \(1\): y \(float32 \[3, 2\]"),
        ({"x": X, "y": X.double()}, r"y \(float64"),
        ({"x": X, "y": X, "z": X}, r"in step 0 but not in step 1 \(1\): z"),
    ],
)
def test_leaves_that_do_not_fit_are_named_and_nothing_is_written(
    tmp_path: Path, first: dict[str, Any], says: str
) -> None:
    run = saved(tmp_path, first, {"x": X, "y": X.clone()})
    with pytest.raises(ckpt.MismatchError, match=says):
        ckpt.materialise(ckpt.average(run), tmp_path / "dst", group=Solo())
    assert not list((tmp_path / "dst").rglob("*.*"))
    ckpt.materialise(ckpt.average(run, latest=["y", "z"]), tmp_path / "dst", group=Solo())


def test_merge_on_load_names_them_before_it_touches_anything(tmp_path: Path) -> None:
    run = saved(tmp_path, {"x": X, "y": X.t()}, {"x": X + 1, "y": X + 1})
    target = {"x": X - 5, "y": X - 5}
    with pytest.raises(ckpt.MismatchError, match="y"):
        ckpt.load(target, ckpt.average(run))
    assert target["x"].unique().item() == target["y"].unique().item() == -5
    part = {"x": X.clone()}  # what is not asked for need not fit
    ckpt.load(part, ckpt.average(run))
    assert part["x"].unique().item() == 0.5


class Two(torch.nn.Module):
    def __init__(self, tied: bool, value: float) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
        torch.nn.init.constant_(self.a.weight, value)
        torch.nn.init.constant_(self.b.weight, -value)
        if tied:
            self.b.weight = self.a.weight


def test_tied_once_and_apart_before_is_refused(tmp_path: Path) -> None:
    run = saved(tmp_path, {"model": Two(False, 1.0)}, {"model": Two(True, 3.0)})
    with pytest.raises(ckpt.MismatchError, match=r"stored apart in step 0.*model.b.weight and model.a.weight"):
        ckpt.load({"model": Two(True, 0.0)}, ckpt.average(run))


def test_apart_now_and_tied_before_counts_for_both(tmp_path: Path) -> None:
    run = saved(tmp_path, {"model": Two(True, 1.0)}, {"model": Two(False, 3.0)})
    target = Two(False, 0.0)
    ckpt.load({"model": target}, ckpt.average(run))
    assert (target.a.weight[0, 0].item(), target.b.weight[0, 0].item()) == (2.0, -1.0)


def test_float8_needs_a_word(tmp_path: Path) -> None:
    run = saved(tmp_path, *({"q": torch.ones(3).to(torch.float8_e4m3fn)} for _ in range(2)))
    with pytest.raises(ckpt.MismatchError, match=r"of type float8_e4m3fn, which cannot be averaged \(1\): q"):
        ckpt.materialise(ckpt.average(run), tmp_path / "dst", group=Solo())
    ckpt.materialise(ckpt.average(run, latest=["q"]), tmp_path / "dst", group=Solo())


def test_not_a_number_is_told_of_leaf_and_step_and_nothing_is_published(tmp_path: Path) -> None:
    bad = torch.ones(5)
    bad[3] = torch.nan
    run = saved(tmp_path, {"x": torch.ones(5)}, {"x": bad}, {"x": torch.ones(5)})
    recipe = ckpt.average(run)
    with pytest.raises(ckpt.MismatchError, match=r"'x' holds infinities or NaN in step 1;"):
        ckpt.materialise(recipe, tmp_path / "dst", group=Solo())
    assert not [p for p in (tmp_path / "dst").rglob("*") if p.is_file()]
    with pytest.raises(ckpt.MismatchError, match="step 1"):
        ckpt.load({"x": torch.zeros(5)}, recipe)
    ckpt.materialise(ckpt.average(run, steps="0,2"), tmp_path / "dst", group=Solo())


def test_codecs_go_on(tmp_path: Path) -> None:
    for step in range(2):
        ckpt.save({"x": torch.full((1 << 18,), 1.0 + step)}, tmp_path / "run", step=step, codec={"x": "zstd"})
    report = ckpt.materialise(ckpt.average(tmp_path / "run"), tmp_path / "dst", group=Solo(), ranks=3, step=7)
    assert (report.packs, report.step) == (3, 7)
    assert report.bytes < 1 << 16
    target = {"x": torch.zeros(1 << 18)}
    ckpt.load(target, tmp_path / "dst@7")
    assert target["x"].unique().tolist() == [1.5]


# Storage.


def test_damage_in_any_checkpoint_is_found(made: tuple[Path, Snapshots], tmp_path: Path) -> None:
    for step in (10, 50):
        run = shutil.copytree(made[0], tmp_path / f"run{step}")
        recipe = ckpt.average(run, moments="latest")
        with ckpt.open(f"{run}@{step}") as c:
            t = c.manifest.by_key["model.up.weight"]
            at = int(c.manifest.offset[c.manifest.start[t]]) + 100
        pack = run / f"step-000000{step}.g0000/a0/rank-00000.safetensors"
        data = bytearray(pack.read_bytes())
        data[at] ^= 4
        pack.write_bytes(data)
        with pytest.raises(ckpt.IntegrityError, match=f"step-000000{step}.*model.up.weight"):
            ckpt.materialise(recipe, tmp_path / "dst", group=Solo())
        assert not [p for p in (tmp_path / "dst").rglob("*") if p.is_file()]
        with pytest.raises(ckpt.IntegrityError):
            ckpt.load(fresh(), recipe)


def test_a_recipe_means_the_checkpoints_it_was_made_of(made: tuple[Path, Snapshots], tmp_path: Path) -> None:
    run = shutil.copytree(made[0], tmp_path / "run")
    recipe = ckpt.average(run, steps="10,20", moments="latest")
    shutil.rmtree(run / "step-00000010.g0000")
    with pytest.raises(ckpt.NotFoundError):
        ckpt.load(fresh(), recipe)
    ckpt.save(fresh(), run, step=10)
    with pytest.raises(ckpt.MismatchError, match="not the checkpoint that recipe"):
        ckpt.load(fresh(), recipe)


def test_a_damaged_commit_is_not_passed_over(made: tuple[Path, Snapshots], tmp_path: Path) -> None:
    run = shutil.copytree(made[0], tmp_path / "run")
    commit = run / "step-00000040.g0000/commit.json"
    commit.write_bytes(commit.read_bytes().replace(b"40", b"41", 1))
    for how in ({}, {"last": 2}, {"steps": "10:40"}):
        with pytest.raises(ckpt.IntegrityError, match="step-00000040"):
            ckpt.average(run, **how)
    assert steps_of(ckpt.average(run, steps="10,20,50")) == [10, 20, 50]
    with pytest.raises(ckpt.NotFoundError, match="no committed checkpoint"):
        ckpt.average(tmp_path / "nothing")


def test_a_step_that_exists_is_a_conflict(made: tuple[Path, Snapshots], tmp_path: Path) -> None:
    run = shutil.copytree(made[0], tmp_path / "run")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(ckpt.ConflictError):
        ckpt.materialise(ckpt.average(run, moments="latest"), run, group=Solo())
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    with pytest.raises(ckpt.UsageError, match="names a step"):
        ckpt.materialise(ckpt.average(run, moments="latest"), f"{run}@50", group=Solo())


def test_memory_does_not_grow_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt.merge.stream._AHEAD", 4 << 20)
    monkeypatch.setenv("CKPT_BUFFER_MIB", "1")
    n = 16 << 20
    for step in range(3):
        ckpt.save({"x": torch.full((n,), float(step))}, tmp_path / "run", step=step)
    recipe = ckpt.average(tmp_path / "run")
    tracemalloc.start()
    ckpt.materialise(recipe, tmp_path / "dst", group=Solo())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20  # windows and scratch; half of one of the four checkpoints that are read and written


# Post-hoc EMA from averages that were saved.


def test_posthoc_ema_of_saved_averages(tmp_path: Path) -> None:
    widths = {"ema5": 0.05, "ema10": 0.10}
    torch.manual_seed(3)
    x = torch.zeros(40, dtype=torch.float64)
    emas = {name: x.clone() for name in widths}
    wanted = x.clone()
    for t in range(1, 401):
        x = x + torch.randn(40, dtype=torch.float64)
        for e, sigma in [*((emas[n], s) for n, s in widths.items()), (wanted, 0.08)]:
            beta = (1 - 1 / t) ** (maths.gamma_of(sigma) + 1)
            e += (1 - beta) * (x - e)
        if t % 50 == 0:
            ckpt.save({"model": {"w": x}, **{n: {"w": e} for n, e in emas.items()}}, tmp_path / "run", step=t - 1)
    target = {"model": {"w": torch.zeros(40, dtype=torch.float64)}}
    ckpt.load(target, posthoc(tmp_path / "run", 0.08, widths))
    off = (target["model"]["w"] - wanted).norm() / wanted.norm()
    apart = (emas["ema10"] - wanted).norm() / wanted.norm()
    assert off < 0.02 < 10 * apart
    ckpt.load(target, posthoc(tmp_path / "run", 0.10, widths))
    torch.testing.assert_close(target["model"]["w"], emas["ema10"], rtol=1e-6, atol=1e-6)
    report = ckpt.materialise(posthoc(tmp_path / "run", 0.08, widths), tmp_path / "dst", group=Solo())
    assert (report.averaged, report.copied) == (1, 2)
    with pytest.raises(ckpt.MismatchError, match=r"missing from step .*: ema7.w"):
        ckpt.load(target, posthoc(tmp_path / "run", 0.08, {"ema7": 0.07}))


# The shell.


def told(*args: object, code: int = 0) -> dict[str, Any]:
    result = CliRunner().invoke(cli, [str(a) for a in (*args, "--json")])
    assert result.exit_code == code, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def test_the_verb(made: tuple[Path, Snapshots], tmp_path: Path) -> None:
    run, states = made
    plan = told("average", run, "--weights", "wsm:1-sqrt", "--last", 3, "--moments", "latest", "--dry-run")
    assert plan["dry_run"]
    assert [t["step"] for t in plan["recipe"]["terms"]] == [20, 40, 50]
    assert "model.up.weight" in plan["averaged"]
    assert {"model.norm.num_batches_tracked", "optimizer.state.up.weight.exp_avg"} <= set(plan["copied"])
    assert not (tmp_path / "dst").exists()
    done = told("average", run, "--weights", "wsm:1-sqrt", "--last", 3, "--moments", "latest", "--to", tmp_path / "dst")
    assert done["recipe"] == plan["recipe"]
    target = fresh()
    ckpt.load(target, tmp_path / "dst")
    check_model(target["model"].state_dict(), states[1:], maths.wsm(STEPS[1:], maths.DECAYS["1-sqrt"]))
    shown = CliRunner().invoke(cli, ["average", str(run), "--dry-run", "--moments", "reset", "--posthoc-ema", "0.1"])
    assert shown.exit_code == 0
    assert "copied from the last: 1 tensor" not in shown.output.splitlines()[0]
    assert len(shown.output.splitlines()) == 7


@pytest.mark.parametrize(
    ("args", "code", "kind"),
    [
        (["--moments", "latest"], 2, "usage"),  # where to?
        (["--to", "{dst}"], 2, "usage"),  # moments?
        (["--to", "{run}", "--moments", "latest"], 4, "conflict"),
        (["--to", "{dst}", "--moments", "latest", "--last", "9"], 3, "not-found"),
        (["--to", "{dst}", "--moments", "latest", "--weights", "ema:x"], 2, "usage"),
        (["--dry-run", "--weights", "uniform", "--posthoc-ema", "0.1"], 2, "usage"),
        (["--dry-run", "--tracked", "ema=0.1"], 2, "usage"),
        (["--dry-run", "--tracked", "ema", "--posthoc-ema", "0.1"], 2, "usage"),
        (["--dry-run", "--posthoc-ema", "0.5"], 2, "usage"),
    ],
)
def test_its_errors(made: tuple[Path, Snapshots], tmp_path: Path, args: list[str], code: int, kind: str) -> None:
    filled = [a.format(run=made[0], dst=tmp_path / "dst") for a in args]
    assert told("average", made[0], *filled, code=code)["error"]["kind"] == kind
    assert not list((tmp_path / "dst").rglob("*.*"))
