"""Delta-guided weights: against plain torch in float64, however the same checkpoints are stored and read, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import ckpt
from ckpt.cli import cli
from ckpt.collective import Solo
from ckpt.format.dtypes import dtype
from ckpt.merge import weights as maths
from ckpt.merge.arithmetic import AVERAGED, NotFinite, Room, squares
from ckpt.merge.recipe import Recipe
from ckpt.merge.write import recipe_in

State = dict[str, Any]
FLOATS = ("w", "h", "d", "s", "c", "e", "buffer", "tied.weight")


class Tied(torch.nn.Module):
    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(value)
        self.other = self.weight


def state(seed: int, moved: str = "".join(FLOATS)) -> State:
    """What training from seed 0 may have come to; `moved`: the leaves that differ from it."""

    def some(name: str, *shape: int, **kind: Any) -> torch.Tensor:
        out = torch.randn(shape, generator=torch.Generator().manual_seed(len(name)), **kind)
        if seed and name in moved:
            out = out + 0.1 * seed * torch.randn(shape, generator=torch.Generator().manual_seed(seed), **kind)
        return out

    buffer = some("buffer", 3)
    buffer[1] = -torch.inf  # a mask: no difference
    return {
        "w": some("w", 70, 33),
        "h": some("h", 13).bfloat16(),
        "d": some("d", 5, dtype=torch.float64),
        "s": some("s"),
        "c": some("c", 3, dtype=torch.complex64),
        "e": some("e", 0, 4),
        "buffer": buffer,
        "tied": Tied(some("tied.weight", 4, 2)),
        "n": torch.tensor(seed),
        "epoch": seed,
    }


def leaf(s: State, name: str) -> torch.Tensor:
    x: torch.Tensor = s["tied"].weight.detach() if name == "tied.weight" else s[name]
    return x.to(torch.complex128) if x.is_complex() else x.double()


def oracle(start: State, states: list[State], name: str) -> list[float]:
    """w_i = ||theta_i - theta_0|| / sum_j ||theta_j - theta_0||, the mask left out; the mean where nothing has moved."""
    pairs = [(leaf(s, name).flatten(), leaf(start, name).flatten()) for s in states]
    far = [float(torch.linalg.vector_norm(a[a != b] - b[a != b])) for a, b in pairs]
    return [f / sum(far) if sum(far) else 1 / len(far) for f in far]


def saved(run: Path, *states: State) -> Path:
    for step, s in enumerate(states):
        ckpt.save(s, run, step=step, metrics={"loss": 1.0 + step})
    return run


some_moved = st.lists(st.sampled_from(FLOATS), max_size=6).map(" ".join)


@given(st.lists(some_moved, min_size=1, max_size=4))
@settings(max_examples=12, deadline=None)
def test_it_is_the_formula_leaf_by_leaf(moved: list[str]) -> None:
    start, states = state(0), [state(i + 1, m) for i, m in enumerate(moved)]
    with tempfile.TemporaryDirectory() as folder:
        run = saved(Path(folder) / "run", start, *states)
        recipe = ckpt.average(run, last=len(states), weights=f"delta:{run}@0")
        got = state(9)
        ckpt.load(got, recipe)
    assert recipe.weights_of is not None and set(recipe.weights_of) == set(FLOATS)
    for name in FLOATS:
        wanted = oracle(start, states, name)
        np.testing.assert_allclose(recipe.weights_of[name], wanted, rtol=1e-12)
        mean = sum(w * leaf(s, name) for w, s in zip(wanted, states, strict=True) if w)
        kind = got["tied"].weight.dtype if name == "tied.weight" else got[name].dtype
        near = {torch.bfloat16: 2**-8, torch.float64: 1e-14}.get(kind, 1e-6)
        torch.testing.assert_close(leaf(got, name), mean, rtol=near, atol=near)
        if len(set(map(repr, [leaf(s, name).tolist() for s in (start, *states)]))) == 1:
            assert torch.equal(leaf(got, name), leaf(start, name))  # bit by bit
    assert (got["n"].item(), got["epoch"]) == (len(states), len(states))
    assert got["tied"].weight is got["tied"].other
    np.testing.assert_allclose(recipe.weights, np.mean([recipe.weights_of[n] for n in FLOATS], axis=0), rtol=1e-12)


@given(st.lists(st.floats(0, 1e300), min_size=1, max_size=9))
def test_weights_of_distances(distances: list[float]) -> None:
    w = maths.delta(distances)
    assert (w >= 0).all() and math.isclose(math.fsum(w), 1, rel_tol=1e-12)
    if not any(distances):
        assert w.tolist() == [1 / len(w)] * len(w)


@pytest.mark.parametrize("bad", [[], [-1.0], [1.0, math.nan], [math.inf], [[1.0]]])
def test_what_is_no_distance(bad: Any) -> None:
    with pytest.raises(ckpt.UsageError):
        maths.delta(bad)


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("kind", sorted(AVERAGED))
def test_squares_of_every_type(kind: str) -> None:
    g = torch.Generator().manual_seed(1)
    size = (256 << 10) // dtype(kind).itemsize
    drawn = torch.complex128 if kind.startswith("complex") else torch.float64
    made = [torch.randn(size, generator=g, dtype=drawn).to(getattr(torch, kind)) for _ in range(3)]
    raw = [x.view(torch.uint8).numpy() for x in made]
    wide = [x.to(drawn) for x in made]
    far = [float(torch.linalg.vector_norm(x - wide[2])) ** 2 for x in wide[:2]]
    np.testing.assert_allclose(squares(raw[:2], raw[2], kind, Room()), far, rtol=1e-12)
    odd = slice(0, 7 * dtype(kind).itemsize)
    far = [float(torch.linalg.vector_norm((x - wide[2])[:7])) ** 2 for x in wide[:2]]
    np.testing.assert_allclose(squares([r[odd] for r in raw[:2]], raw[2][odd], kind, Room()), far, rtol=1e-12)


def test_who_is_not_finite() -> None:
    good, bad, huge = (np.array([1.0, x]).view(np.uint8) for x in (2.0, np.inf, 1e200))
    assert squares([bad, bad], bad, "float64", Room()) == [0.0, 0.0]
    for blocks, start, who in (([good, bad], good, (1,)), ([good, bad], bad, (2,)), ([huge], good, ())):
        with pytest.raises(NotFinite) as e:
            squares(blocks, start, "float64", Room())
        assert e.value.inputs == who


# However they are stored and read.


def large(step: int) -> State:
    """Leaves of several blocks, none of them whole at the end."""
    g = torch.Generator().manual_seed(step)
    return {"w": torch.randn(700, 301, generator=g), "h": torch.randn(300_001, generator=g).bfloat16()}


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe]:
    run = saved(tmp_path_factory.mktemp("big") / "run", *(large(s) for s in range(3)))
    return run, ckpt.average(run, last=2, weights=f"delta:{run}@0")


def test_windows_and_threads_do_not_show(big: tuple[Path, Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    run, recipe = big
    monkeypatch.setattr("ckpt.merge.stream._AHEAD", 1 << 20)  # one block of each
    for ranks_here in ("1", "64"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks_here)  # so many threads less
        assert ckpt.average(run, last=2, weights=f"delta:{run}@0") == recipe


def test_codecs_do_not_show(big: tuple[Path, Recipe], tmp_path: Path) -> None:
    for step in range(3):
        ckpt.save(large(step), tmp_path / "run", step=step, codec={"*": "zstd"})
    again = ckpt.average(tmp_path / "run", last=2, weights=f"delta:{tmp_path}/run@0")
    assert again.weights_of == big[1].weights_of


def test_memory_does_not_grow_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt.merge.stream._AHEAD", 4 << 20)
    for step in range(3):
        ckpt.save({"x": torch.full((12 << 20,), float(step))}, tmp_path / "run", step=step)
    tracemalloc.start()
    recipe = ckpt.average(tmp_path / "run", last=2, weights=f"delta:{tmp_path}/run@0")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert recipe.weights.tolist() == [1 / 3, 2 / 3]
    assert peak < 24 << 20  # windows and scratch; half of one of the three checkpoints


# The recipe.


def test_the_start_is_any_ref(tmp_path: Path) -> None:
    """Of another run, with leaves of its own; a ref with colons; one of the checkpoints; the recipe does not need it any more."""
    other = saved(tmp_path / "a:b@c" / "pretrained", {**state(7), "head": torch.ones(3)})
    run = saved(tmp_path / "run", state(0), state(1), state(2))
    recipe = ckpt.average(run, weights=f"delta:{other}@best:loss")
    assert recipe.weights_of is not None
    np.testing.assert_allclose(
        recipe.weights_of["w"], oracle(state(7), [state(0), state(1), state(2)], "w"), rtol=1e-12
    )
    begun = {"ref": f"{other}/step-00000000.g0000", "step": 0}
    assert recipe.said is not None
    assert {k: recipe.said["start"][k] for k in begun} == begun
    assert recipe.method == f"delta:{begun['ref']}"
    with ckpt.open(other) as c:
        assert recipe.said["start"]["manifest"] == f"{c.commit.manifest_crc:08x}"
    shutil.rmtree(other)
    ckpt.load(state(9), recipe)
    among = ckpt.average(run, weights=f"delta:{run}@0")
    assert among.weights_of is not None
    assert (len(among.terms), among.weights_of["w"][0]) == (3, 0.0)


def test_provenance_survives_json_and_the_result(big: tuple[Path, Recipe], tmp_path: Path) -> None:
    recipe = big[1]
    assert Recipe.from_json(recipe.to_json()) == recipe
    ckpt.materialise(recipe, tmp_path / "dst", group=Solo(), ranks=3)
    with ckpt.open(tmp_path / "dst") as c:
        assert recipe_in(c.objects) == recipe
    written, loaded = large(9), large(9)
    ckpt.load(written, tmp_path / "dst")
    ckpt.load(loaded, Recipe.from_json(recipe.to_json()))
    assert all(torch.equal(written[n], loaded[n]) for n in written)


OLD = (
    '{"latest":["b"],"method":"uniform","moments":"","only":[],"said":null,"terms":['
    '{"instead":[],"manifest":"00c0ffee","ref":"/r/step-00000001.g0000","step":1,"weight":0.5},'
    '{"instead":[["model","ema"]],"manifest":"00c0ffee","ref":"/r/step-00000002.g0000","step":2,"weight":0.5}],"version":1}'
)


def test_recipes_from_before_are_read_and_written_alike() -> None:
    recipe = Recipe.from_json(OLD)
    assert recipe.weights_of is None
    assert recipe.to_json() == OLD


@pytest.mark.parametrize("own", [{"w": [1.0]}, {"w": [0.4, 0.4]}, {"w": [2.0, "nan"]}, {"w": None}, [], 1])
def test_weights_of_leaves_that_are_none(own: Any) -> None:
    with pytest.raises(ckpt.FormatError, match="not a recipe"):
        Recipe.from_json(json.dumps({**json.loads(OLD), "weights_of": own}))


def test_a_leaf_without_weights_is_never_guessed(big: tuple[Path, Recipe], tmp_path: Path) -> None:
    recipe = big[1]
    assert recipe.weights_of is not None
    less = replace(recipe, weights_of={"w": recipe.weights_of["w"]})
    with pytest.raises(ckpt.MismatchError, match=r"without weights in the recipe \(1\): h"):
        ckpt.load(large(9), less)
    ckpt.load(large(9), replace(less, latest=("h",)))


# What is refused, with nothing written: a recipe is all that is made.


def test_a_start_that_does_not_fit_is_named(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", state(1), state(2))
    for i, (change, says) in enumerate(
        (
            (lambda s: s.pop("d"), r"missing from step 0 \(1\): d"),
            (lambda s: s.update(d=torch.zeros(6, dtype=torch.float64)), r"another shape or type in step 0 \(1\): d"),
            (lambda s: s.update(d=torch.zeros(5)), r"d \(float32"),
        )
    ):
        begun = state(0)
        change(begun)
        start = saved(tmp_path / f"start{i}", begun)
        how: dict[str, Any] = {"weights": f"delta:{start}"}
        with pytest.raises(ckpt.MismatchError, match=rf"(?s)start of the deltas is {start}/step-00000000.*{says}"):
            ckpt.average(run, **how)
        for rest in ({"latest": ["d"]}, {"only": ["w"]}):
            recipe = ckpt.average(run, **how, **rest)
            assert recipe.weights_of is not None and "d" not in recipe.weights_of
            ckpt.load(state(9), recipe)


def test_checkpoints_that_do_not_fit_are_named_before_anything_is_read(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", state(0), {**state(1), "extra": torch.ones(2)}, state(2))
    with pytest.raises(ckpt.MismatchError, match=r"^the checkpoints.*in step 1 but not in step 2 \(1\): extra"):
        ckpt.average(run, last=2, weights=f"delta:{run}@0")


def damage(run: Path, step: int) -> None:
    pack = run / f"step-0000000{step}.g0000/a0/rank-00000.safetensors"
    with ckpt.open(f"{run}@{step}") as c:
        at = int(c.manifest.offset[c.manifest.start[c.manifest.by_key["w"]]]) + 100
    data = bytearray(pack.read_bytes())
    data[at] ^= 4
    pack.write_bytes(data)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_damage_of_the_start_or_a_checkpoint_is_found(big: tuple[Path, Recipe], tmp_path: Path, step: int) -> None:
    run = shutil.copytree(big[0], tmp_path / "run")
    damage(run, step)
    with pytest.raises(ckpt.IntegrityError, match=f"step-0000000{step}.*w"):
        ckpt.average(run, last=2, weights=f"delta:{run}@0")


@pytest.mark.parametrize("step", [0, 1])
def test_not_a_number_is_told_of_leaf_and_checkpoint(tmp_path: Path, step: int) -> None:
    states = [large(s) for s in range(3)]
    states[step]["h"][299_999] = torch.nan
    run = saved(tmp_path / "run", *states)
    with pytest.raises(ckpt.MismatchError, match=rf"'h' holds infinities or NaN in {run}/step-0000000{step}.g0000;"):
        ckpt.average(run, last=2, weights=f"delta:{run}@0")
    ckpt.average(run, last=2, weights=f"delta:{run}@0", latest=["h"])


def test_too_far_for_float64_is_told_of_the_leaf(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", *({"x": torch.full((65536,), x, dtype=torch.float64)} for x in (0.0, 6.3e151)))
    with pytest.raises(ckpt.MismatchError, match="'x' is too far from the start"):  # each of its blocks alone is not
        ckpt.average(run, last=1, weights=f"delta:{run}@0")


def trained(step: int) -> State:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * step)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def test_moments_have_no_weights(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", trained(0), trained(1), trained(2))
    start = saved(tmp_path / "start", {"model": trained(0)["model"]})  # a start needs no optimizer
    nothing = saved(tmp_path / "nothing", {"x": torch.ones(1)})
    with pytest.raises(ckpt.UsageError, match="say moments latest or reset"):  # before it is looked into
        ckpt.average(run, weights=f"delta:{nothing}", moments="averaged")
    undecided = ckpt.average(run, last=2, weights=f"delta:{start}")
    assert set(undecided.weights_of or ()) == {"model.weight", "model.bias"}
    with pytest.raises(ckpt.UsageError, match="say what becomes of it"):
        ckpt.load(trained(1), undecided)
    with pytest.raises(ckpt.UsageError, match="the moments have none"):
        replace(undecided, moments="averaged")
    got = trained(1)
    ckpt.load(got, replace(undecided, moments="latest"))
    kept = trained(2)["optimizer"].state_dict()["state"]
    assert all(torch.equal(s["exp_avg"], kept[i]["exp_avg"]) for i, s in got["optimizer"].state_dict()["state"].items())
    np.testing.assert_allclose(
        undecided.weights, [1 / 3, 2 / 3], rtol=1e-4
    )  # AdamW's first step is as long as its rate


@pytest.mark.parametrize(
    ("weights", "error", "says"),
    [
        ("delta", ckpt.UsageError, "delta:START"),
        ("delta:", ckpt.UsageError, "name the ref"),
        ("delta:{run}@soon", ckpt.UsageError, "soon"),
        ("delta:{run}@9", ckpt.NotFoundError, "step 9"),
    ],
)
def test_bad_requests(big: tuple[Path, Recipe], weights: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        ckpt.average(big[0], weights=weights.format(run=big[0]))


# The shell.


def shell(*args: object) -> str:
    result = CliRunner().invoke(cli, [str(a) for a in args])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_verb(big: tuple[Path, Recipe], tmp_path: Path) -> None:
    run, recipe = big
    args: tuple[object, ...] = ("average", run, "--last", 2, "--weights", f"delta:{run}@0")
    shown = shell(*args, "--dry-run")
    assert f"{recipe.weights[0]:.6f}" in shown
    assert "means over 2 tensors" in shown
    planned = json.loads(shell(*args, "--dry-run", "--json"))["recipe"]
    done = json.loads(shell(*args, "--to", tmp_path / "dst", "--json"))["recipe"]
    assert planned == done
    assert done["weights_of"] == {n: list(w) for n, w in (recipe.weights_of or {}).items()}
    assert recipe_of(tmp_path / "dst") == recipe
    shell("report", tmp_path / "dst", "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert recipe.method in page
    assert page.count(f"{recipe.weights[0]:.6f}") == 1  # the mean; nothing of each leaf
    assert f"{(recipe.weights_of or {})['w'][0]:.6f}" not in page


def recipe_of(run: Path) -> Recipe | None:
    with ckpt.open(run) as c:
        return recipe_in(c.objects)
