"""The search for coefficients: what it finds, what it costs, and that it can be cut short anywhere."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import ckpt
from ckpt.cli import cli
from ckpt.collective import Solo
from ckpt.merge.evolve import CmaEs, Evolution, ladder_rows
from ckpt.merge.search import SearchReport, objective_of, search

N, SIZE = 6, 3000
METHODS = ["lcsc", pytest.param("cma", marks=pytest.mark.skipif(not importlib.util.find_spec("cma"), reason="extra"))]


def checkpoint(step: int) -> dict[str, Any]:
    """A walk towards GOAL, with noise: the best combination is affine, with a negative weight."""
    g = torch.Generator().manual_seed(step)
    w = GOAL * (1 - 0.8**step) + 0.2 * torch.randn(SIZE, generator=g)
    layer = torch.nn.Linear(3, 2)
    other = torch.nn.Linear(3, 2)
    other.weight = layer.weight
    return {"model": torch.nn.ModuleList([layer, other]), "w": w, "count": torch.tensor(step), "epoch": step}


GOAL = torch.randn(SIZE, generator=torch.Generator().manual_seed(99))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("search") / "run"
    for step in range(1, N + 1):
        ckpt.save(checkpoint(step), run, step=step)
    return run


def distance(state: Mapping[str, torch.Tensor]) -> float:
    return float((state["w"][: SIZE // 2] - GOAL[: SIZE // 2]).norm())


def distance_elsewhere(state: Mapping[str, torch.Tensor]) -> float:
    return float((state["w"][SIZE // 2 :] - GOAL[SIZE // 2 :]).norm())


def weights_of(report: SearchReport) -> Any:
    return report.recipe.weights


def least(run: Path) -> float:
    """The smallest distance that any affine combination has."""
    w = np.stack([checkpoint(s)["w"].double().numpy()[: SIZE // 2] for s in range(1, N + 1)])
    goal = GOAL.double().numpy()[: SIZE // 2]
    x = np.linalg.lstsq((w[:-1] - w[-1]).T, goal - w[-1], rcond=None)[0]
    return float(np.linalg.norm(w[-1] + x @ (w[:-1] - w[-1]) - goal))


@pytest.mark.parametrize("method", METHODS)
def test_it_comes_close_to_the_best_there_is(run: Path, method: str, tmp_path: Path) -> None:
    found = search(run, distance, method=method, budget=500, held_out=distance_elsewhere)
    by_name = {t.name: t for t in found.trials}
    assert found.best.name == method
    assert least(run) <= found.best.score < 1.05 * least(run)
    assert found.best.score < 0.9 * min(t.score for n, t in by_name.items() if n != method)
    assert {"last", "single", "uniform", "wsm", "ema", "greedy"} <= set(by_name)
    assert by_name["last"].weights == (0,) * (N - 1) + (1,)
    assert found.evaluations == 500
    assert sum(found.best.weights) == pytest.approx(1, abs=1e-12)
    assert min(found.best.weights) < 0
    # The report and the recipe are about the same thing, and the result is what was scored, bit by bit.
    ckpt.materialise(found.recipe, tmp_path / "dst", group=Solo())
    with ckpt.open(tmp_path / "dst") as c:
        state = {"w": c.tensors["w"][:]}
        assert (distance(state), distance_elsewhere(state)) == (found.best.score, found.best.held_out)
        said = c.objects["__ckpt__.recipe"]["said"]
        assert said["trials"][-1] == [method, found.best.score, found.best.held_out]


def test_the_ladder_alone(run: Path) -> None:
    found = search(run, distance, method="ladder", budget=500)
    names = [name for name, _ in ladder_rows(N, list(range(1, N + 1)))]
    assert found.evaluations < len(names) + N  # what comes out alike is scored once
    assert found.best.held_out is None
    assert found.best.score == min(t.score for t in found.trials)
    uniform = next(t for t in found.trials if t.name == "uniform")
    states = [checkpoint(s)["w"].double() for s in range(1, N + 1)]
    means = [distance({"w": torch.stack(states[-k:]).mean(0)}) for k in (2, 4, 6)]
    assert uniform.score == pytest.approx(min(means), rel=1e-5)


def test_the_greedy_soup_keeps_what_helps(tmp_path: Path) -> None:
    for step, v in enumerate((1.0, -0.8, 5.0, 0.4)):  # by score: 0.4, -0.8, 1, 5
        ckpt.save({"w": torch.tensor([v])}, tmp_path / "run", step=step)
    found = search(tmp_path / "run", lambda s: abs(float(s["w"])), method="ladder", budget=99)
    greedy = next(t for t in found.trials if t.name == "greedy")
    assert greedy.weights == pytest.approx((1 / 3, 1 / 3, 0, 1 / 3))  # 0.4; then -0.2; then 0.2 over 3: 0.2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop", [1, 20, 37, 75, 100])
def test_cut_short_anywhere_it_comes_to_the_same_end(run: Path, tmp_path: Path, method: str, stop: int) -> None:
    calls = 0

    def objective(state: Mapping[str, torch.Tensor]) -> float:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise KeyboardInterrupt
        return distance(state)

    options: dict[str, Any] = {"method": method, "budget": 120, "seed": 3}
    straight = search(run, distance_named(distance), **options, journal=tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        search(run, distance_named(objective), **options, journal=tmp_path / "journal")
    with (tmp_path / "journal").open("a") as f:
        f.write('[["0x1.0p+0", "0x1')  # the write itself was cut
    calls = -(10**9)
    resumed = search(run, distance_named(objective), **options, journal=tmp_path / "journal")
    assert calls + 10**9 == 120 - (stop - 1)  # nothing is paid twice
    assert resumed.recipe.to_json() == straight.recipe.to_json()
    assert [t.weights for t in resumed.trials] == [t.weights for t in straight.trials]
    assert (tmp_path / "journal").read_text() == (tmp_path / "straight").read_text()
    again = search(run, distance_named(objective), **options, journal=tmp_path / "journal")
    assert calls + 10**9 == 120 - (stop - 1)
    assert (again.recipe, again.passes) == (resumed.recipe, 0)


def distance_named(function: Callable[[Any], float]) -> Callable[[Any], float]:
    """The same objective by name, whatever it does."""

    def objective(state: Any) -> float:
        return function(state)

    return objective


def test_a_longer_budget_goes_on(run: Path, tmp_path: Path) -> None:
    short = search(run, distance, budget=60, journal=tmp_path / "j")
    longer = search(run, distance, budget=90, journal=tmp_path / "j")
    assert longer.recipe.weights.tolist() == search(run, distance, budget=90).recipe.weights.tolist()
    assert longer.best.score <= short.best.score
    assert len((tmp_path / "j").read_text().splitlines()) == 91


def test_each_checkpoint_is_read_once_a_generation(run: Path) -> None:
    stored = sum(p.stat().st_size for p in run.rglob("rank-*.safetensors"))
    few = search(run, distance, budget=200, population=16)
    many = search(run, distance, budget=200, population=40)
    for found in (few, many):
        assert found.bytes_read <= found.passes * stored * 1.01
    assert many.passes < few.passes < 60  # generations, and a step each of the greedy soup


def test_what_an_objective_sees(run: Path) -> None:
    seen: list[Any] = []

    def objective(state: Any) -> float:
        if not seen:
            seen.append({n: state[n].clone() for n in state})
            seen.append({n: v.clone() for n, v in state.under("model").items()})
            seen.append(state.objects["epoch"])
            assert len(state) == len(list(state))
            with pytest.raises(KeyError):
                state["absent"]
        return 1.0

    search(run, objective, method="ladder", budget=1)
    names, below, epoch = seen
    last = checkpoint(N)
    assert torch.equal(names["w"], last["w"])
    assert names["count"].item() == epoch == N
    assert set(below) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert torch.equal(below["0.weight"], below["1.weight"])
    torch.nn.ModuleList([torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)]).load_state_dict(below)


def test_no_number_is_worst(run: Path) -> None:
    def objective(state: Any) -> float:
        d = distance(state)
        return math.nan if d > 20 else d

    for method in ("lcsc", "cma") if importlib.util.find_spec("cma") else ("lcsc",):
        found = search(run, objective, method=method, budget=150)
        assert found.best.score == found.best.score
    nothing = search(run, lambda _: math.nan, budget=40)
    assert math.isnan(nothing.best.score)
    assert "NaN" not in nothing.recipe.to_json()


@pytest.mark.parametrize("method", METHODS)
def test_coefficients_stay_within_the_clip(run: Path, method: str) -> None:
    found = search(run, distance, method=method, budget=300, clip=0.25)
    assert all(abs(w) <= 1 + 1e-12 for t in found.trials for w in t.weights[:-1])  # the ladder's own are up to 1
    assert all(abs(w) <= 0.25 for w in next(t for t in found.trials if t.name == method).weights[:-1])


@pytest.mark.skipif(not importlib.util.find_spec("cma"), reason="extra")
def test_a_search_that_has_nothing_new_to_try_ends(tmp_path: Path) -> None:
    for step, w in enumerate(([1.0, 0.0], [0.0, 1.0], [0.0, 0.0])):
        ckpt.save({"w": torch.tensor(w, dtype=torch.float64)}, tmp_path / "run", step=step)
    goal = torch.tensor([0.3, -0.2], dtype=torch.float64)
    found = search(tmp_path / "run", lambda s: float((s["w"] - goal).norm()), method="cma", budget=10**6)
    assert found.best.score < 1e-12
    assert found.best.weights == pytest.approx((0.3, -0.2, 0.9), abs=1e-12)


@pytest.mark.parametrize("kind", [Evolution, CmaEs])
def test_a_strategy_follows_from_its_seed(kind: Any) -> None:
    def trace(seed: int) -> Any:
        plan = kind(5, [np.full(5, 0.2)], population=8, clip=2.0, seed=seed)
        out = []
        for _ in range(12):
            rows = plan.ask()
            assert np.abs(rows).max() <= 2.0
            plan.tell(rows, [float(((r - 0.4) ** 2).sum()) for r in rows])
            out.append(rows)
        return np.concatenate(out)

    state = np.random.get_state()[1].tolist()
    a, b = trace(1), trace(1)
    assert np.random.get_state()[1].tolist() == state  # the program's own generator is left alone
    assert np.array_equal(a, b)
    assert not np.array_equal(a, trace(2))
    assert ((a[-8:] - 0.4) ** 2).sum(axis=1).min() < 0.5 * ((a[:8] - 0.4) ** 2).sum(axis=1).min()


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"method": "magic"}, ckpt.UsageError, "ladder, lcsc, cma"),
        ({"budget": 0}, ckpt.UsageError, "budget"),
        ({"last": 1}, ckpt.UsageError, "2 to 64 checkpoints, not 1"),
        ({"moments": "averaged"}, ckpt.UsageError, "negative"),
        ({"last": 2, "method": "cma"}, ckpt.UsageError, "three checkpoints"),
        ({"scratch": "/nowhere/at/all"}, ckpt.StorageError, "scratch"),
    ],
)
def test_bad_requests(run: Path, given: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        search(run, distance, **given)


def test_the_journal_of_another_search_is_refused(run: Path, tmp_path: Path) -> None:
    search(run, distance, budget=3, journal=tmp_path / "j")
    for change in ({"seed": 1}, {"method": "ladder"}, {"last": 4}):
        with pytest.raises(ckpt.FormatError, match="another search"):
            search(run, distance, budget=3, journal=tmp_path / "j", **change)
    with pytest.raises(ckpt.FormatError, match="another search"):
        search(run, distance_elsewhere, budget=3, journal=tmp_path / "j")


def test_damage_is_found(run: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(run, tmp_path / "run")
    pack = copy / "step-00000003.g0000/a0/rank-00000.safetensors"
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 1
    pack.write_bytes(data)
    with pytest.raises(ckpt.IntegrityError, match="step-00000003"):
        search(copy, distance, budget=5)


def test_objectives_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "myeval_here.py").write_text("def score(state): return 1.0\nnumber = 3\n")
    monkeypatch.chdir(tmp_path)
    assert objective_of("myeval_here:score")({}) == 1.0  # type: ignore[arg-type]
    for text, error in (
        ("myeval_here", ckpt.UsageError),
        ("myeval_here:number", ckpt.UsageError),
        ("myeval_here:absent", ckpt.NotFoundError),
        ("no_such_module_x:f", ckpt.NotFoundError),
    ):
        with pytest.raises(error):
            objective_of(text)


def test_the_verb(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "myeval_verb.py").write_text(
        "def loss(state): return float(state['w'].pow(2).mean())\ndef other(state): return float(state['w'].abs().mean())\n"
    )
    monkeypatch.chdir(tmp_path)
    args = ["search", str(run), "--objective", "myeval_verb:loss", "--budget", "40", "--to", "dst", "--journal", "j"]
    done = CliRunner().invoke(cli, [*args, "--held-out", "myeval_verb:other", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["evaluations"] == 40
    with ckpt.open(tmp_path / "dst") as c:
        assert c.metrics == {"search_score": told["best"]["score"], "held_out_score": told["best"]["held_out"]}
        assert c.objects["__ckpt__.recipe"]["method"] == told["recipe"]["method"]
    again = CliRunner().invoke(cli, args)
    assert again.exit_code == 4  # the step exists
    shown = CliRunner().invoke(cli, [*args[:-4], "--method", "ladder"])
    assert shown.exit_code == 0
    assert "no --held-out" in shown.output
    assert CliRunner().invoke(cli, ["search", str(run), "--objective", "nothing"]).exit_code == 2
    assert CliRunner().invoke(cli, [*args[:-3], f"{run}@3"]).exit_code == 2


@pytest.mark.parametrize("kind", [Evolution, CmaEs])
def test_a_strategy_keeps_away_from_what_has_no_score(kind: Any) -> None:
    plan = kind(4, [np.full(4, 0.2)], population=12, clip=2.0, seed=5)
    scores = [0.0]
    for _ in range(40):
        rows = plan.ask()
        scores = [math.nan if r.max() > 0.45 else float(((r - 0.4) ** 2).sum()) for r in rows]
        plan.tell(rows, scores)
    assert np.nanmin(scores) < 0.05
