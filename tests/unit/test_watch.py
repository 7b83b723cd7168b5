"""A search beside training: rounds as checkpoints come and go, what is published, and being killed anywhere."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt
from ckpt.backends import LocalBackend
from ckpt.catalog import delete_step, list_run, resolve
from ckpt.collective import Solo
from ckpt.errors import FormatError, IntegrityError, NotFoundError, UsageError
from ckpt.merge.search import Sought, search
from ckpt.merge.watch import KEPT, Round, watch
from ckpt.merge.write import recipe_in

SIZE = 500
GOAL = torch.randn(SIZE, generator=torch.Generator().manual_seed(99))


def saved(run: Path, *steps: int) -> None:
    """A walk towards GOAL, with noise."""
    for step in steps:
        g = torch.Generator().manual_seed(step)
        ckpt.save({"w": GOAL * (1 - 0.8**step) + 0.2 * torch.randn(SIZE, generator=g), "n": step}, run, step=step)


def distance(state: Mapping[str, torch.Tensor]) -> float:
    return float((state["w"] - GOAL).norm())


def watched(run: Path, objective: Any = distance, **given: Any) -> list[Round]:
    """The rounds of a watch that ends as soon as there is nothing new."""
    rounds: list[Round] = []
    tell = given.pop("told", lambda _: None)

    def told(found: Round) -> None:
        rounds.append(found)
        tell(found)

    budget = given.pop("budget", 60)
    assert watch(run, Sought(objective, budget=budget), idle=0, every=0.01, told=told, **given) == len(rounds)
    return rounds


def published(run: Path) -> list[int]:
    return [s.step for s in list_run(LocalBackend(str(run / "lcsc"))).committed]


def test_the_best_is_published_where_nobody_takes_it_for_a_step_of_training(tmp_path: Path) -> None:
    run = tmp_path / "run"
    saved(run, 1, 2, 3, 4)
    before = list_run(LocalBackend(str(run)))
    (found,) = watched(run)
    assert found.steps == (1, 2, 3, 4) and found.published.endswith("lcsc/step-00000004.g0000")
    alone = search(run, distance, budget=60)
    assert found.report.recipe.to_json() == alone.recipe.to_json()
    with ckpt.open(f"{run}@lcsc") as c:
        assert distance({"w": c.tensors["w"][:]}) == pytest.approx(alone.best.score, rel=1e-6)
        assert c.metrics == {"search_score": alone.best.score} and recipe_in(c.objects) == alone.recipe
    state = {"w": torch.zeros(SIZE), "n": 0}
    ckpt.load(state, f"{run}@lcsc")
    assert distance(state) == pytest.approx(alone.best.score, rel=1e-6) and state["n"] == 4  # type: ignore[arg-type]
    assert list_run(LocalBackend(str(run))) == before and resolve(run)[1].step == 4


def test_training_goes_on_around_it(tmp_path: Path) -> None:
    """Retention removes what it is told to, and neither sees nor touches what is published."""
    run, x = tmp_path / "run", {"w": torch.zeros(SIZE), "n": 0}
    with ckpt.Checkpointer(run, x, storage=ckpt.Every(1), keep=[ckpt.KeepLast(3)]) as cp:
        cp.restore()

        def train(step: int) -> None:
            g = torch.Generator().manual_seed(step)
            x["w"].copy_(GOAL * (1 - 0.8**step) + 0.2 * torch.randn(SIZE, generator=g))  # type: ignore[attr-defined]
            cp.step(step)
            cp.wait(60)

        for step in range(4):
            train(step)
        seen = []

        def told(found: Round) -> None:
            seen.append(found.steps)
            if found.steps[-1] < 7:
                for step in range(found.steps[-1] + 1, found.steps[-1] + 3):
                    train(step)

        rounds = watched(run, told=told)
    assert seen == [(1, 2, 3), (3, 4, 5), (5, 6, 7)]
    assert [s.step for s in list_run(LocalBackend(str(run))).committed] == [5, 6, 7]
    assert published(run) == [5, 7][-KEPT:] and all(r.published for r in rounds)
    assert resolve(f"{run}@lcsc")[1].step == 7 and resolve(run)[1].step == 7
    with ckpt.open(f"{run}@lcsc") as c:
        assert c.verify().ok


def test_only_what_is_better_is_published(tmp_path: Path) -> None:
    run = tmp_path / "run"
    saved(run, 1, 2, 3)
    first = watched(run)
    assert watched(run)[0].published == "" and published(run) == [3]  # the same again
    g = torch.Generator().manual_seed(0)
    ckpt.save({"w": 50 * torch.randn(SIZE, generator=g), "n": 4}, run, step=4)  # it diverges
    ckpt.save({"w": 50 * torch.randn(SIZE, generator=g), "n": 5}, run, step=5)
    (again,) = watched(run, last=2)
    assert again.report.best.score > first[0].report.best.score
    assert again.published == "" and published(run) == [3]
    assert watched(run, lambda state: -distance(state), last=2)[0].published  # of another objective
    saved(run, 6)
    (longer,) = watched(run, budget=90)
    assert longer.published and published(run) == [5, 6]


def test_a_round_begins_with_the_best_of_the_one_before(tmp_path: Path) -> None:
    run = tmp_path / "run"
    saved(run, 1, 2, 3, 4)
    rounds = watched(run, told=lambda r: saved(run, 5) if r.steps[-1] == 4 else None, last=4)
    best, then = rounds[0].report.best, rounds[1].report
    before = next(t for t in then.trials if t.name == "before")
    assert before.weights[:3] == best.weights[1:] and sum(before.weights) == pytest.approx(1)
    assert [t.name for t in rounds[0].report.trials].count("before") == 0


def test_steps_that_go_while_they_are_read(tmp_path: Path) -> None:
    run, calls = tmp_path / "run", 0
    saved(run, 1, 2, 3, 4)
    backend = LocalBackend(str(run))

    def objective(state: Mapping[str, torch.Tensor]) -> float:
        nonlocal calls
        calls += 1
        if calls == 30:
            for s in list_run(backend).committed[:2]:
                delete_step(backend, s.folder)
        return distance(state)

    (found,) = watched(run, objective, journal=tmp_path / "journal")
    assert found.steps == (3, 4) and found.published
    with ckpt.open(f"{run}@lcsc") as c:
        assert c.verify().ok


def test_what_is_there_but_damaged_is_an_error_and_no_reason_to_go_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    saved(run, 1, 2, 3)
    pack = sorted(run.rglob("rank-*.safetensors"))[1]
    data = pack.read_bytes()
    pack.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    with pytest.raises(IntegrityError):
        watched(run)
    pack.unlink()
    with pytest.raises(NotFoundError):
        watched(run)
    assert not (run / "lcsc").exists()


def test_what_a_rollback_left_behind_is_withdrawn(tmp_path: Path) -> None:
    run, x = tmp_path / "run", {"w": GOAL.clone()}
    for parent, steps in ((None, (0, 1, 2, 3)), (1, (2, 3, 4))):
        with ckpt.Checkpointer(run, x, storage=ckpt.Every(1)) as cp:
            cp.restore(ref=None if parent is None else f"{run}@{parent}")
            for step in steps:
                far = 1.0 if parent is None else 5.0  # what comes after the rollback scores worse
                x["w"].copy_(GOAL + far * torch.randn(SIZE, generator=torch.Generator().manual_seed(step)))
                cp.step(step)
                cp.wait(60)
        rounds = watched(run)
        assert rounds[-1].published
    assert published(run) == [4]
    with ckpt.open(f"{run}@lcsc") as c:
        recipe = recipe_in(c.objects)
    assert recipe is not None and recipe.base.ref.endswith("step-00000004.g0002")


def test_it_waits_for_two_checkpoints_and_for_new_ones(tmp_path: Path) -> None:
    assert watched(tmp_path / "nothing") == []
    saved(tmp_path / "run", 1)
    assert watched(tmp_path / "run") == []


@pytest.mark.parametrize(("last", "ref"), [(1, ""), (65, ""), (8, "@5"), (8, "@lcsc")])
def test_bad_requests(tmp_path: Path, last: int, ref: str) -> None:
    with pytest.raises(UsageError):
        watched(Path(f"{tmp_path}/run{ref}"), last=last)


def test_a_folder_of_that_name_which_is_somebody_elses(tmp_path: Path) -> None:
    saved(tmp_path / "run", 1, 2)
    saved(tmp_path / "run/lcsc", 1)
    with pytest.raises(UsageError, match="not made by a search"):
        watched(tmp_path / "run")
    assert published(tmp_path / "run") == [1]


def test_the_journal_of_another_search_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "run", 1, 2)
    watched(tmp_path / "run", journal=tmp_path / "journal")
    for objective, where in ((lambda s: 0.0, "run"), (distance, "other")):
        saved(tmp_path / "other", 1, 2) if where == "other" else None
        with pytest.raises(FormatError, match="another search"):
            watched(tmp_path / where, objective, journal=tmp_path / "journal")


def test_the_journal_of_another_search_is_not_thrown_away_when_its_steps_are_gone(tmp_path: Path) -> None:
    saved(tmp_path / "run", 1, 2, 3)
    watched(tmp_path / "run", journal=tmp_path / "journal")
    text = (tmp_path / "journal").read_text()
    delete_step(LocalBackend(str(tmp_path / "run")), "step-00000001.g0000")
    with pytest.raises(FormatError, match="another search"):
        watched(tmp_path / "run", lambda s: 0.0, journal=tmp_path / "journal")
    assert (tmp_path / "journal").read_text() == text
    (found,) = watched(tmp_path / "run", journal=tmp_path / "journal")  # its own goes on with what is left
    assert found.steps == (2, 3)


OBJECTIVE = """
import os, signal
import torch
goal = torch.randn({size}, generator=torch.Generator().manual_seed(99))
def score(state):
    with open("calls", "a") as f:
        f.write("x\\n")
    if os.path.exists("kill") and os.path.getsize("calls") // 2 == int(open("kill").read()):
        os.kill(os.getpid(), signal.SIGKILL)
    return float((state["w"] - goal).norm())
"""


def test_killed_it_goes_on_and_comes_to_the_same_end(tmp_path: Path) -> None:
    (tmp_path / "eval_of_test.py").write_text(OBJECTIVE.format(size=SIZE))
    saved(tmp_path / "run", 1, 2, 3, 4, 5)
    shutil.copytree(tmp_path / "run", tmp_path / "straight")
    verb = ["search", "--watch", "--until-idle", "0", "--objective", "eval_of_test:score", "--budget", "70", "--json"]

    def launched(run: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ckpt.cli", *verb, run, "--journal", f"{run}.journal"]
        path = os.pathsep.join([str(Path(ckpt.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        return subprocess.run(
            command,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
            env={**os.environ, "PYTHONPATH": path},
        )

    (tmp_path / "kill").write_text("41")
    assert launched("run").returncode == -signal.SIGKILL
    assert not (tmp_path / "run/lcsc").exists()
    (tmp_path / "kill").unlink()
    ended = launched("run")
    assert ended.returncode == 0, ended.stderr
    (found,) = json.loads(ended.stdout)["rounds"]
    assert found["report"]["evaluations"] == 70 and found["published"].endswith("step-00000005.g0000")
    assert len((tmp_path / "calls").read_text().split()) == 71  # the one it died of is paid twice, no other

    straight = watched(tmp_path / "straight", budget=70)[0].report.best
    assert found["report"]["best"]["weights"] == list(straight.weights)
    once = ckpt.materialise(ckpt.average(tmp_path / "run", weights=straight.weights), tmp_path / "once", group=Solo())
    packs = [next(Path(p).rglob("rank-*.safetensors")).read_bytes() for p in (found["published"], once.ref)]
    assert packs[0] == packs[1]
