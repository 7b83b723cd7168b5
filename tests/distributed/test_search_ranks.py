"""A search by several ranks: they share the work, and find what one would have found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from test_reshard_cli import Threads, environment, quick  # noqa: F401

import ckpt
from ckpt.collective import Solo
from ckpt.merge.search import SearchReport, Sought, search
from ckpt.merge.watch import Round, watch

SIZE = 700
GOAL = torch.randn(SIZE, generator=torch.Generator().manual_seed(99))
GIVEN: dict[str, Any] = {"budget": 90, "seed": 5, "population": 10}


@pytest.fixture(scope="module")
def run(quick: Path) -> Path:  # noqa: F811
    run = quick / "searched"
    for step in range(1, 6):
        g = torch.Generator().manual_seed(step)
        ckpt.save({"w": GOAL * (1 - 0.8**step) + 0.2 * torch.randn(SIZE, generator=g)}, run, step=step)
    return run


def distance(state: Mapping[str, torch.Tensor]) -> float:
    with _lock:
        _asked.append(threading.current_thread().name)
    return float((state["w"][: SIZE // 2] - GOAL[: SIZE // 2]).norm())


def elsewhere(state: Mapping[str, torch.Tensor]) -> float:
    return float((state["w"][SIZE // 2 :] - GOAL[SIZE // 2 :]).norm())


_asked: list[str] = []
_lock = threading.Lock()


@pytest.fixture(scope="module")
def alone(run: Path, quick: Path) -> tuple[SearchReport, str]:  # noqa: F811
    journal = quick / "journal-alone"
    return search(run, distance, held_out=elsewhere, journal=journal, group=Solo(), **GIVEN), journal.read_text()


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_find_the_same(run: Path, alone: Any, tmp_path: Path, world: int) -> None:
    _asked.clear()
    reports = Threads(world).run(
        lambda group: search(
            run, distance, held_out=elsewhere, journal=tmp_path / f"j{group.rank}", group=group, **GIVEN
        )
    )
    wanted, journal = alone
    assert all(isinstance(r, SearchReport) for r in reports), reports
    for found in reports:
        assert (found.recipe, found.trials, found.evaluations) == (wanted.recipe, wanted.trials, wanted.evaluations)
        assert found.passes <= wanted.passes
    assert (tmp_path / "j0").read_text() == journal and not (tmp_path / "j1").exists()
    shares = [_asked.count(name) for name in set(_asked)]
    assert sum(shares) == 90 and len(shares) == world and max(shares) < 90 / world + 16  # soups go one by one


def test_a_journal_goes_on_with_another_number_of_ranks(run: Path, alone: Any, tmp_path: Path) -> None:
    wanted, journal = alone
    (tmp_path / "j").write_text("".join(journal.splitlines(keepends=True)[:41]))
    _asked.clear()
    for found in Threads(3).run(
        lambda group: search(run, distance, held_out=elsewhere, journal=tmp_path / "j", group=group, **GIVEN)
    ):
        assert found.recipe == wanted.recipe
    assert (tmp_path / "j").read_text() == journal and len(_asked) == 50


def test_an_objective_of_all_ranks_together(run: Path, alone: Any) -> None:
    """Each rank sees every combination; what rank 0 says counts."""
    seen: list[list[float]] = [[], [], []]

    def on(group: Any) -> SearchReport:
        def objective(state: Mapping[str, torch.Tensor]) -> float:
            seen[group.rank].append(float(state["w"][0]))
            return distance(state) + 100 * group.rank

        return search(run, objective, together=True, group=group, **GIVEN)

    reports = Threads(3).run(on)
    assert len({r.recipe.to_json() for r in reports}) == 1 and reports[0].best.weights == alone[0].best.weights
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) == 90


def test_what_goes_wrong_on_one_rank_ends_all(run: Path) -> None:
    def on(group: Any) -> SearchReport:
        def objective(state: Mapping[str, torch.Tensor]) -> float:
            if group.rank == 1 and len(_asked) > 20:
                raise ckpt.StorageError("the evaluation data is gone")
            return distance(state)

        return search(run, objective, group=group, **GIVEN)

    _asked.clear()
    assert [type(r) for r in Threads(2).run(on)] == [ckpt.StorageError] * 2


def test_a_watch_of_several_ranks(run: Path, alone: Any, tmp_path: Path) -> None:
    link = tmp_path / "run"
    link.symlink_to(run)
    rounds: list[Round] = []
    sought = Sought(distance, elsewhere, budget=90, seed=5, population=10)
    done = Threads(2).run(lambda group: watch(link, sought, idle=0, group=group, told=rounds.append))
    assert done == [1, 1] and len(rounds) == 1
    assert rounds[0].report.best == alone[0].best and rounds[0].published
    with ckpt.open(f"{link}@lcsc") as c:
        assert c.verify().ok and c.metrics["held_out_score"] == alone[0].best.held_out


OBJECTIVE = """
import torch
goal = torch.randn({size}, generator=torch.Generator().manual_seed(99))
def score(state):
    return float((state["w"][: {half}] - goal[: {half}]).norm())
"""


@pytest.mark.parametrize("launcher", ["torchrun", "mpiexec"])
def test_under_a_launcher(run: Path, alone: Any, tmp_path: Path, launcher: str) -> None:
    (tmp_path / "eval_of_ranks.py").write_text(OBJECTIVE.format(size=SIZE, half=SIZE // 2))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    if launcher == "mpiexec":
        mpiexec = Path(sys.executable).with_name("mpiexec")
        if not os.access(mpiexec, os.X_OK):
            pytest.skip("needs mpiexec beside this python")
        command = [str(mpiexec), "-n", "2", sys.executable]
    options = ["--budget", "90", "--seed", "5", "--population", "10", "--to", str(tmp_path / "dst"), "--json"]
    done = subprocess.run(
        [*command, "-m", "ckpt.cli", "search", str(run), "--objective", "eval_of_ranks:score", *options],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment(),
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["best"]["weights"] == list(alone[0].best.weights)
    ckpt.materialise(alone[0].recipe, tmp_path / "once", group=Solo())
    packs = [next((tmp_path / d).rglob("rank-*.safetensors")).read_bytes() for d in ("dst", "once")]
    assert packs[0] == packs[1]
