"""SIGKILL at every file operation of a save, a job and a prune: what was committed stands, nothing half shows."""

from __future__ import annotations

from pathlib import Path

import kills
import pairs
import pytest
from forks import Fresh


def test_a_save_killed_at_every_point(fresh: Fresh, quick_folder: Path) -> None:
    deaths = fresh(kills.kills_of_save, str(quick_folder))
    points = [d.point for d in deaths]
    # Everything that a save does to files is among them, in this order.
    commit = len(points) - 1 - points[::-1].index("local.create.link")
    assert points[0] == "local.mkdir" and points.count("local.create.link") == 3
    assert points.count("local.new.write") == 4 and "local.new.fsync" in points
    # Step 2 exists exactly from the link of its commit on.
    assert [d.newest for d in deaths] == [1] * (commit + 1) + [2] * (len(points) - commit - 1)


def test_a_job_killed_at_every_point(fresh: Fresh, quick_folder: Path) -> None:
    deaths = fresh(kills.kills_of_a_job, str(quick_folder))
    points = [d.point for d in deaths]
    assert (
        "local.delete" in points and points.count("local.create.link") == 6
    )  # generation, attempt, ..., ledger, events
    newest = [d.newest for d in deaths]
    assert newest == sorted(newest) and set(newest) == {2, 3}


def test_a_prune_killed_at_every_point(fresh: Fresh, quick_folder: Path) -> None:
    deaths = fresh(kills.kills_of_prune, str(quick_folder))
    assert {d.point for d in deaths} >= {"local.delete"}


def test_a_collective_save_killed_at_every_point(fresh: Fresh, quick_folder: Path) -> None:
    outcomes = fresh(pairs.kills_of_a_pair, str(quick_folder))

    def of(victim: int, both: bool, file: bool) -> list[pairs.Outcome]:
        found = [o for o in outcomes if o.case.victim == victim and o.case.both == both and o.case.file == file]
        return sorted(found, key=lambda o: o.case.n)

    leader = [o.point for o in of(0, True, True)]
    commit = len(leader) - 1 - leader[::-1].index("local.create.link")
    assert leader[0] == "local.mkdir" and leader.count("local.create.link") == 3
    writer = [p for p in leader if p.startswith("local.new.")]
    assert [o.newest for o in of(0, True, True)] == [1] * (commit + 1) + [2] * (len(leader) - commit - 1)
    for file in (True, False):
        lone = of(0, False, file)
        assert [o.point for o in lone] == leader
        assert [o.newest for o in lone] == [1] * (commit + 1) + [2] * (len(leader) - commit - 1)
        # Who is left says who is missing, whether the store went with rank 0 or outlived it.
        assert all(o.said.startswith("deadline: " if file else "peer: lost touch") and "rank 0" in o.said for o in lone)
        left = of(1, False, file)
        assert [o.point for o in left] == writer and {o.newest for o in left} == {1}
        assert all(o.said.startswith("deadline: commit ") and "rank 1 did not come" in o.said for o in left)
    assert [o.point for o in of(1, True, True)] == writer and {o.newest for o in of(1, True, True)} == {1}


@pytest.mark.parametrize("mutant", kills.MUTANTS)
def test_the_kills_find_what_a_missing_safeguard_does(fresh: Fresh, quick_folder: Path, mutant: str) -> None:
    assert "killed at local." in fresh(kills.found_in_a_mutant, mutant, str(quick_folder))


def _forks_after_a_save(folder: str) -> None:
    kills.ckpt.save(kills.state(1), folder, step=1)
    kills.must(lambda: kills.ckpt.save(kills.state(2), folder, step=2))
    kills.ckpt.save(kills.state(3), folder, step=3)
    kills.must(lambda: kills.check_loads(f"{folder}@2", 2))
    assert kills.check_listing(folder) == [3, 2, 1]


def test_a_fork_of_a_process_that_saved_can_save(fresh: Fresh, tmp_path: Path) -> None:
    fresh(_forks_after_a_save, str(tmp_path / "run"), limit=60)
