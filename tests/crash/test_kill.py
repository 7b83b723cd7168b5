"""SIGKILL at every file operation of a save, a job and a prune: what was committed stands, nothing half shows."""

from __future__ import annotations

from pathlib import Path

import kills
from conftest import Fresh


def test_a_save_killed_at_every_point(fresh: Fresh, quick_folder: Path) -> None:
    deaths = fresh(kills.kills_of_save, str(quick_folder))
    points = [d.point for d in deaths]
    print(len(points), points)
    # Everything that a save does to files is among them, in this order.
    commit = len(points) - 1 - points[::-1].index("local.create.link")
    assert points[0] == "local.mkdir" and points.count("local.create.link") == 3
    assert points.count("local.new.write") == 4 and "local.new.fsync" in points
    # Step 2 exists exactly from the link of its commit on.
    assert [d.newest for d in deaths] == [1] * (commit + 1) + [2] * (len(points) - commit - 1)


def test_a_job_killed_at_every_point(fresh: Fresh, quick_folder: Path) -> None:
    deaths = fresh(kills.kills_of_a_job, str(quick_folder))
    points = [d.point for d in deaths]
    print(len(points), points)
    assert "local.delete" in points and points.count("local.create.link") > 8
    newest = [d.newest for d in deaths]
    assert newest == sorted(newest) and set(newest) == {2, 3, 4}


def test_a_prune_killed_at_every_point(fresh: Fresh, quick_folder: Path) -> None:
    deaths = fresh(kills.kills_of_prune, str(quick_folder))
    print(len(deaths), [d.point for d in deaths])
    assert {d.point for d in deaths} >= {"local.delete"}
