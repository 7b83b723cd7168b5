"""Memory, a disk of the host and the run: whoever dies on the way, what is on the disk reaches the run."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import keepers
import pytest
from forks import Fresh
from hosts import Cluster
from keepers import Trainer, check_stored, gone, nothing_left, scene, seen, until

import ckpt
from ckpt.backends import LocalBackend
from ckpt.catalog import list_run
from ckpt.tiers import DUE
from examples.hosts import Hosts


def _steps(folder: str) -> list[int]:
    return [s.step for s in list_run(LocalBackend(folder)).committed]


def _each(trainer: Trainer, steps: int) -> None:
    """So many steps, each as far as it goes before the next."""
    for _ in range(steps):
        trainer("seal", 1)
        trainer("quiet")


def _due(disk: str) -> list[str]:
    return sorted(p.parent.name for p in Path(disk).rglob(DUE))


def _each_tier_has_its_own_schedule(folder: str) -> None:
    with scene(folder) as run:
        t = Trainer(run, near=2)
        assert t("restore") == (0, "nothing")
        _each(t, 10)
        assert _steps(run) == [3, 7] and _steps(f"{run}.disk") == [7, 9] and not _due(f"{run}.disk")
        report = t.finish()
        assert report["failed"] == report["detained"] == 0 and report["committed"] == 5 and report["arrived"] == 3
        assert _steps(run) == [3, 7, 9], "the last step is due everywhere"
        nothing_left(run)
        check_stored(run, 9)
        check_stored(f"{run}.disk", 9)


def test_each_tier_has_its_own_schedule(fresh: Fresh, tmp_path: Path) -> None:
    fresh(_each_tier_has_its_own_schedule, str(tmp_path))


def _restores_from_what_is_nearest(folder: str) -> None:
    """Memory; with the keeper dead the disk, though the run has nothing; without the disk the run."""
    with scene(folder) as run:
        t = Trainer(run, near=1, opened=False)
        t("open", 1, 1000)
        t("restore")
        _each(t, 3)
        assert _steps(run) == [] and _steps(f"{run}.disk")[-1] == 2
        t.kill()
        until(lambda: _steps(run) == [2], "the keeper brings the newest step, for which nobody had asked")
        t = Trainer(run, near=1, opened=False)
        t("open", 1, 1000)
        assert t("restore") == (3, "memory")
        _each(t, 2)
        keeper = keepers.keeper(run)
        os.kill(keeper, signal.SIGSTOP)  # it brings nothing
        t.kill()
        os.kill(keeper, signal.SIGKILL)
        gone(keeper)
        assert _steps(run) == [2] and _steps(f"{run}.disk")[-1] == 4
        t = Trainer(run, near=1, opened=False)
        t("open", 1, 1000)
        assert t("restore") == (5, "storage"), "from the disk"
        t("seal", 1)
        t.finish()
        nothing_left(run)
        assert _steps(run) == [2, 5]
        shutil.rmtree(f"{run}.disk")
        t = Trainer(run, near=1)
        assert t("restore") == (6, "storage"), "from the run"
        t("seal", 1)
        t.finish()
        nothing_left(run)


def test_what_is_nearest_is_restored(fresh: Fresh, tmp_path: Path) -> None:
    fresh(_restores_from_what_is_nearest, str(tmp_path))


def _a_keeper_that_is_told_to_end(folder: str) -> None:
    """The newest step goes to the disk and to the run first."""
    with scene(folder) as run:
        t = Trainer(run, near=1, opened=False)
        t("open", 1, 1000)
        t("restore")
        _each(t, 3)
        keeper = keepers.keeper(run)
        t.kill()
        os.kill(keeper, signal.SIGTERM)
        assert gone(keeper) == 0
        assert _steps(run) == [2] and not _due(f"{run}.disk")
        nothing_left(run)


def test_a_keeper_that_is_told_to_end(fresh: Fresh, tmp_path: Path) -> None:
    fresh(_a_keeper_that_is_told_to_end, str(tmp_path))


def _a_run_that_is_away(folder: str) -> None:
    """A step of which the run cannot take a byte stays on the disk; the keeper dies, too; the next life brings it."""
    with scene(folder) as run:
        t = Trainer(run, near=2)
        t("restore")
        block = Path(run, "step-00000003.g0001", "a0", "rank-00000.safetensors", "in the way")
        block.mkdir(parents=True)
        _each(t, 4)
        assert t("report")["detained"] >= 1 and t("report")["committed"] == 2
        assert _due(f"{run}.disk") == ["step-00000003.g0001"] and _steps(run) == []
        keeper = keepers.keeper(run)
        t.kill()
        os.kill(keeper, signal.SIGKILL)
        gone(keeper)
        shutil.rmtree(block.parent)
        t = Trainer(run, near=2)
        assert t("restore") == (4, "storage")
        until(lambda: _steps(run) == [3], "the next life brings it")
        t("seal", 1)
        t.finish()
        nothing_left(run)
        assert not _due(f"{run}.disk")
        check_stored(run, seen(run, "at"))


def test_a_run_that_is_away(fresh: Fresh, tmp_path: Path) -> None:
    fresh(_a_run_that_is_away, str(tmp_path))


def _a_full_disk(folder: str) -> None:
    """The disk takes nothing: that save fails, the next goes to the run itself, then the disk is tried again."""
    with scene(folder) as run:
        t = Trainer(run, near=1, opened=False)
        t("open", 1, 1000)
        t("restore")
        Path(f"{run}.disk", "step-00000000.g0001").write_text("in the way")
        t("lockstep", 1)
        t("quiet")
        assert t("report")["failed"] == 1 and _steps(f"{run}.disk") == []
        until(lambda: t("lockstep", 1) and _steps(run), "a step goes to the run itself")
        t("quiet")
        until(lambda: t("lockstep", 1) and _steps(f"{run}.disk"), "the disk is tried again")
        last = t("train", 1)
        assert t.finish()["failed"] == 1
        nothing_left(run)
        check_stored(run, last)


def test_a_full_disk(fresh: Fresh, tmp_path: Path) -> None:
    fresh(_a_full_disk, str(tmp_path))


def _a_keeper_killed_around_its_commit(folder: str, nth: int) -> None:
    """The step is due from before it exists; if it exists, the keeper that the trainer starts next brings it."""
    with scene(folder) as run:
        t = Trainer(run, near=1, opened=False)
        t(
            "set", "CKPT_FAULT", f"kill@local.create.unlink#{nth}"
        )  # of the keeper: the mark, the claim, manifest, commit
        t("open", 1, 1)
        t("set", "CKPT_FAULT", None)
        t("restore")
        first = keepers.keeper(run)
        t("seal", 1)
        assert gone(first) == keepers.KILLED
        there = _steps(f"{run}.disk")
        assert there == [0] * (nth == 4)
        until(lambda: _steps(run) == there, "the next keeper brings it")
        t.kill()


@pytest.mark.parametrize("nth", [3, 4])
def test_a_keeper_killed_around_its_commit(fresh: Fresh, tmp_path: Path, nth: int) -> None:
    fresh(_a_keeper_killed_around_its_commit, str(tmp_path), nth)


def _two_hosts(folder: str) -> None:
    """Each host's keeper brings its packs, also when no trainer is left; then the disks alone are enough."""
    with scene(folder) as run, Hosts(2) as hosts:
        cluster = Cluster(hosts, run, None, near=1, cut=True)

        def both(steps: int) -> None:
            for _ in range(steps):
                keepers.together(cluster.ranks, "lockstep", 1)
                keepers.together(cluster.ranks, "quiet")

        cluster.life([0, 1], storage=4)
        assert cluster.restore() == (0, "nothing")
        both(4)
        assert _steps(run) == [3]
        disks = [f"{run}.diskh0", f"{run}.diskh1"]
        assert [_steps(d) for d in disks] == [[2, 3], [2, 3]]
        packs = [sorted(p.name for p in Path(d).glob("step-00000003*/a0/rank-*")) for d in disks]
        assert packs == [["rank-00000.safetensors"], ["rank-00001.safetensors"]]
        both(2)
        cluster.stop()
        until(lambda: _steps(run) == [3, 5], "the keepers bring the newest step")
        until(lambda: not list(Path(run).rglob("*.arrived")), "nothing is left of how they met")
        cluster.life([0, 1], storage=4)
        assert cluster.restore() == (6, "memory")
        both(1)
        pids = [cluster.keeper(n) for n in (0, 1)]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        cluster.stop()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            gone(pid)
        assert _steps(run) == [3, 5]
        cluster.life([0, 1], storage=4)
        assert cluster.restore() == (7, "storage"), "what is on both disks was brought to the run first"
        keepers.together(cluster.ranks, "lockstep", 1)
        reports = keepers.together(cluster.ranks, "close")
        assert all(r["failed"] == 0 for r in reports)
        for trainer in cluster.ranks:
            trainer.leave()
        assert _steps(run)[-1] == 7
        with ckpt.open(run) as c:
            assert c.verify().ok


def test_two_hosts(fresh: Fresh, tmp_path: Path) -> None:
    fresh(_two_hosts, str(tmp_path))


def _there(run: str) -> list[str]:
    """What is committed in the run, by folder."""
    return sorted(s.folder for s in list_run(LocalBackend(run)).committed)


def _two_jobs_that_cannot_meet(folder: str) -> None:
    """The older one still saves on its disk, from where nothing reaches the run, also not when its trainer is dead."""
    with scene(folder, grace=2.0) as run:
        t = Trainer(run, near=2)
        t("restore")
        _each(t, 4)
        assert _there(run) == ["step-00000003.g0001"]
        other = Trainer(run, env={"CKPT_HOST": "elsewhere"}, near=2)
        assert other("restore") == (4, "storage")
        _each(t, 8)
        report = t("report")
        assert report["failed"] == 0 and report["arrived"] == 1 and report["detained"] == 2, report
        assert report["last_error"].startswith("conflict: generation 2 of "), report
        assert _steps(f"{run}.disk")[-1] == 11 and len(_due(f"{run}.disk")) == 2
        _each(other, 4)
        t("seal", 1)  # which its keeper will save
        t.kill()
        last = other("train", 1)
        assert other.finish()["last_step"] == last
        nothing_left(run)
        assert _there(run) == ["step-00000003.g0001", "step-00000007.g0002", f"step-{last:08d}.g0002"]
        check_stored(run, last)


def test_the_older_of_two_jobs_that_cannot_meet_brings_nothing(fresh: Fresh, tmp_path: Path) -> None:
    fresh(_two_jobs_that_cannot_meet, str(tmp_path))


def _restarted_elsewhere(folder: str) -> None:
    """A job that died is restarted on another host before its keeper is done: what it had is brought all the same."""
    with scene(folder, grace=2.0) as run:
        t = Trainer(run, near=1000, storage=1000)
        t("restore")
        t("seal", 2)
        keeper = keepers.keeper(run)
        os.kill(keeper, signal.SIGSTOP)
        t.kill()
        other = Trainer(run, env={"CKPT_HOST": "elsewhere"}, near=1000, storage=1000)
        assert other("restore") == (0, "nothing")
        os.kill(keeper, signal.SIGCONT)
        until(lambda: f"step-{seen(run, 'sealed'):08d}.g0001" in _there(run), "it is brought")
        other.finish()
        nothing_left(run)


def test_what_a_job_had_that_was_restarted_elsewhere_is_brought(fresh: Fresh, tmp_path: Path) -> None:
    fresh(_restarted_elsewhere, str(tmp_path))
