"""Two tiers: saves commit on a disk and trickle to the run; what is nearest is read; nothing that was committed is lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt
from ckpt import Every, KeepEvery, KeepLast, Local
from ckpt.backends import LocalBackend
from ckpt.backends.base import Buffer
from ckpt.backends.faulty import Fault, FaultyBackend
from ckpt.catalog import list_run
from ckpt.errors import StorageError, UsageError
from ckpt.tiers import DUE
from ckpt.trickle import Trickle


def state(version: int = 0) -> dict[str, Any]:
    return {"w": torch.arange(200_000) + version, "n": version}


def steps(run: Path) -> list[int]:
    return [s.step for s in list_run(LocalBackend(str(run))).committed]


def job(tmp_path: Path, **more: Any) -> ckpt.Checkpointer:
    options = {"storage": Every(2), "local": Local(tmp_path / "disk", Every(1), [KeepLast(2)]), **more}
    return ckpt.Checkpointer(tmp_path / "run", state(), **options)


def train(cp: ckpt.Checkpointer, start: int, stop: int) -> None:
    for n in range(start, stop):
        cp._state["w"].copy_(state(n)["w"])
        cp._state["n"] = n
        cp.step(n)
        assert cp.wait(60)


def same(cp: ckpt.Checkpointer, version: int) -> bool:
    return cp._state["n"] == version and torch.equal(cp._state["w"], state(version)["w"])


def away(cp: ckpt.Checkpointer, *faults: Fault) -> FaultyBackend:
    """The remote of the trickle with faults: by default every upload fails."""
    assert cp._tiers is not None
    cp._tiers.way.remote = FaultyBackend(cp._tiers.way.remote, faults or [Fault("new", "error", nth=0)])
    return cp._tiers.way.remote


def test_each_tier_has_its_own_every_and_keep(tmp_path: Path) -> None:
    with job(tmp_path, keep=[KeepEvery(4)]) as cp:
        assert cp.restore() == 0
        train(cp, 0, 7)
        assert steps(tmp_path / "disk") == [5, 6]
        assert steps(tmp_path / "run") == [3, 5]  # due were 1, 3, 5; the newest stays
    assert cp.report.committed == 7 and cp.report.arrived == 4 and cp.report.failed == cp.report.detained == 0
    assert steps(tmp_path / "run") == [3, 6]  # the last step is due everywhere
    assert not list((tmp_path / "disk").rglob(DUE))
    for ref in (tmp_path / "run", tmp_path / "disk"):
        with ckpt.open(ref) as c:
            assert c.verify().ok and c.step == 6


def test_the_same_bytes_in_both_tiers(tmp_path: Path) -> None:
    with ckpt.Checkpointer(tmp_path / "run", state(), storage=Every(1), local=tmp_path / "disk") as cp:
        cp.restore()
        train(cp, 0, 1)
    found = {p.relative_to(tmp_path / "run"): p.read_bytes() for p in (tmp_path / "run").rglob("step-*/**/*.*")}
    here = {p.relative_to(tmp_path / "disk"): p.read_bytes() for p in (tmp_path / "disk").rglob("step-*/**/*.*")}
    assert found == here and len(found) == 4  # a pack, a claim, a manifest, a commit


def test_restore_takes_the_nearest_copy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The newest step, though it is local only; from the disk, though the remote has it; without the disk; with a damaged
    disk."""
    cp = job(tmp_path)
    cp.restore()
    train(cp, 0, 5)  # and then it dies
    assert steps(tmp_path / "disk") == [3, 4] and steps(tmp_path / "run") == [1, 3]
    cp = job(tmp_path)
    assert cp.restore() == 5 and same(cp, 4)
    shutil.rmtree(tmp_path / "disk" / "step-00000004.g0001")
    hidden = next((tmp_path / "run").glob("step-00000003*/a0/rank*"))
    hidden.rename(tmp_path / "hidden")
    cp = job(tmp_path)
    assert cp.restore() == 4 and same(cp, 3)
    (tmp_path / "hidden").rename(hidden)
    pack = next((tmp_path / "disk").glob("step-00000003*/a0/rank*"))
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 1
    pack.write_bytes(data)
    cp = job(tmp_path)
    assert cp.restore() == 4 and same(cp, 3) and "trying the remote alone" in caplog.text
    shutil.rmtree(tmp_path / "disk")
    cp = job(tmp_path)
    assert cp.restore() == 4 and same(cp, 3)


def test_a_remote_that_is_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Counted, said once, tried again with later steps; local retention waits for it; nothing is lost."""
    cp = job(tmp_path)
    cp.restore()
    store = away(cp)
    train(cp, 0, 7)
    assert steps(tmp_path / "disk") == [1, 3, 5, 6] and steps(tmp_path / "run") == []
    assert cp.report.committed == 7 and cp.report.detained >= 3 and cp.report.failed == 0
    assert caplog.text.count("did not reach") == 1 and "a fault was planned" in cp.report.last_error
    store.faults.clear()
    train(cp, 7, 8)
    assert steps(tmp_path / "run") == [1, 3, 5, 7] and steps(tmp_path / "disk") == [6, 7]
    assert caplog.text.count("can be reached again") == 1
    assert cp.close().arrived == 4


def test_the_older_of_two_jobs_brings_nothing_to_the_remote(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One look before each commit; once it found a newer generation none, until this job begins one."""
    older = job(tmp_path)
    older.restore()
    store = away(older)
    store.faults.clear()
    train(older, 0, 4)
    assert steps(tmp_path / "run") == [1, 3]
    looks = [call for call in store.calls if "gen-" in call[1]]
    assert looks == [("fetch", "gen-0002.json")] * 2
    newer = job(tmp_path, local=tmp_path / "other")
    assert newer.restore() == 4
    train(older, 4, 8)
    assert older.report.detained == 2 and older.report.arrived == 2 and older.report.failed == 0
    assert caplog.text.count("stays there, from step-00000005.g0001 on: generation 2 of") == 1
    assert steps(tmp_path / "run") == [1, 3] and steps(tmp_path / "disk") == [5, 6, 7]
    assert len([call for call in store.calls if "gen-" in call[1]]) == 3, "it is not asked again"
    train(newer, 4, 6)
    assert steps(tmp_path / "run") == [1, 3, 5]
    assert older.restore() == 6 and same(older, 5)
    train(older, 6, 8)
    assert older.report.arrived >= 3 and (tmp_path / "run" / "step-00000007.g0003" / "commit.json").exists()


def test_what_the_remote_would_not_keep_is_not_brought_after_something_newer(tmp_path: Path) -> None:
    cp = job(tmp_path, keep=[KeepLast(2)])
    cp.restore()
    store = away(cp)
    train(cp, 0, 6)
    store.faults.clear()
    train(cp, 6, 8)
    assert steps(tmp_path / "run") == [5, 7]
    assert not any(path.startswith("step-00000001") for verb, path in store.calls[-60:] if verb == "write")
    cp.close()


def test_a_slow_remote_delays_nobody(tmp_path: Path) -> None:
    cp = job(tmp_path)
    cp.restore()
    gate = threading.Event()
    store = away(cp, Fault("write", "delay", nth=0, until=gate))
    for n in range(6):
        cp._state["n"] = n
        handle = cp.step(n)
        assert handle is not None and handle.result(60).step == n
    assert cp.report.committed == 6 and cp.report.skipped == 0 and steps(tmp_path / "run") == []
    tries = iter(range(1200))
    while not any(verb == "write" for verb, _ in store.calls):  # it comes last for a core
        assert next(tries, None) is not None and not cp.wait(0.05), "nothing is brought"
    assert not cp.wait(0.05)
    gate.set()
    assert cp.wait(60) and steps(tmp_path / "run") == [1, 3, 5]
    cp.close()


def test_a_local_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That save fails and is said; the next one goes to the remote itself; then the disk is tried again."""
    cp = job(tmp_path, storage=Every(1))
    cp.restore()
    assert cp._tiers is not None
    local = cp._tiers.local
    full = FaultyBackend(local, [Fault("new", "error", nth=1, error=StorageError("No space left on device"))])
    cp._tiers.local = full  # type: ignore[assignment]
    train(cp, 0, 1)
    assert cp.report.failed == 1 and "No space left" in cp.report.last_error
    train(cp, 1, 2)
    assert steps(tmp_path / "disk") == [] and steps(tmp_path / "run") == [1]
    train(cp, 2, 3)
    assert steps(tmp_path / "disk") == [2] and steps(tmp_path / "run") == [1, 2]
    assert cp.close().committed == 2
    cp = job(tmp_path)
    assert cp.restore() == 3 and same(cp, 2)


def test_damage_on_the_way_is_seen_and_does_not_stop_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of two steps that wait for the remote, one has lost a bit on the disk meanwhile."""
    cp = job(tmp_path)
    cp.restore()
    store = away(cp)
    train(cp, 0, 4)
    pack = next((tmp_path / "disk").glob("step-00000003*/a0/rank*"))
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 1
    pack.write_bytes(data)
    store.faults.clear()
    train(cp, 4, 5)
    assert steps(tmp_path / "run") == [1] and "step-00000003.g0001 stays on the local disk" in caplog.text
    cp.close()


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    job(tmp_path).close()
    with pytest.raises(UsageError, match=r"is the local tier of .*/run"):
        ckpt.Checkpointer(tmp_path / "other", state(), storage=Every(1), local=tmp_path / "disk")
    shutil.rmtree(tmp_path / "run")  # a run that begins anew under the same name is another one
    with pytest.raises(UsageError, match="name another folder, or remove it"):
        job(tmp_path)
    for wrong in ({"local": "s3://b/x"}, {"storage": None}):
        with pytest.raises(UsageError):
            job(tmp_path, **wrong)


CHILD = """
import sys, torch, ckpt
from pathlib import Path
sys.path.append({here!r})
from test_tiers import job, train
cp = job(Path(sys.argv[1]), storage=ckpt.Every(1))
cp.restore()
train(cp, 0, 1)
"""


@pytest.mark.parametrize("point", ["local.new.write", "local.new.fsync", "local.create.link"])
def test_killed_in_the_middle_of_the_trickle(tmp_path: Path, point: str) -> None:
    """kill -9 while the step is on its way; the next life brings it, whole, from where it is."""
    # Passed by the save to the disk first: what is killed is the second time, on the way to the remote.
    again = {"local.new.write": 2, "local.new.fsync": 3, "local.create.link": 10}[point]
    code = CHILD.format(here=str(Path(__file__).parent))
    env = {**os.environ, "CKPT_FAULT": f"kill@{point}#{again}"}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert steps(tmp_path / "disk") == [0] and steps(tmp_path / "run") == []
    cp = job(tmp_path)
    assert cp.restore() == 1 and same(cp, 0)
    assert cp.wait(60) and steps(tmp_path / "run") == [0] and cp.report.arrived == 1
    with ckpt.open(tmp_path / "run") as c:
        assert c.verify().ok
    cp.close()


@pytest.mark.parametrize("nth", [6, 7])
def test_killed_around_the_commit_on_the_disk(tmp_path: Path, nth: int) -> None:
    """The step is due from before it exists: there is no moment in which it is committed here, and nobody would bring it."""
    code = CHILD.format(here=str(Path(__file__).parent))
    env = {**os.environ, "CKPT_FAULT": f"kill@local.create.unlink#{nth}"}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    there = steps(tmp_path / "disk")
    assert there == [0] * (nth == 7) and steps(tmp_path / "run") == [], "the seventh small file is the commit"
    cp = job(tmp_path)
    assert cp.restore() == len(there) and cp.wait(60) and steps(tmp_path / "run") == there
    cp.close()


def test_a_process_that_ends_without_close_leaves_what_is_due(tmp_path: Path) -> None:
    cp = job(tmp_path)
    cp.restore()
    away(cp)
    train(cp, 0, 2)
    cp = job(tmp_path)
    assert cp.restore() == 2 and cp.wait(60) and steps(tmp_path / "run") == [1]
    cp.close()


def test_stopping_in_the_middle_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`close` does not wait for a remote that takes for ever once its deadline is over; nothing half is published."""
    monkeypatch.setenv("CKPT_DEADLINE", "0.5")
    cp = job(tmp_path)
    cp.restore()
    assert cp._tiers is not None

    class Slow(FaultyBackend):
        def read(self, path: str, offset: int, into: Any) -> None:
            gate.wait(60)
            self.inner.read(path, offset, into)

    gate = threading.Event()
    cp._tiers.way.remote = Slow(cp._tiers.way.remote)
    cp.step(0)
    cp.step(1)
    cp.close()
    assert steps(tmp_path / "run") == [] and steps(tmp_path / "disk")[-1] == 1
    gate.set()
    monkeypatch.setenv("CKPT_DEADLINE", "60")
    cp = job(tmp_path)
    cp.restore()
    cp.wait(60)
    assert steps(tmp_path / "run") == [1]
    cp.close()


def test_the_trickle_is_out_of_the_way(tmp_path: Path) -> None:
    """It, and the threads that it starts, run at the lowest priority; the process does not."""
    seen: list[int] = []

    class Watching(FaultyBackend):
        def new(self, path: str, size: int) -> Any:
            seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
            upload = self.inner.new(path, size)
            write = upload.write

            def watched(offset: int, data: Buffer) -> None:
                seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
                write(offset, data)

            upload.write = watched  # type: ignore[method-assign]
            return upload

    before = os.getpriority(os.PRIO_PROCESS, 0)
    cp = job(tmp_path)
    assert cp._tiers is not None
    cp._tiers.way.remote = Watching(cp._tiers.way.remote)
    cp.restore()
    train(cp, 0, 2)
    assert seen and set(seen) == {19} and os.getpriority(os.PRIO_PROCESS, 0) == before
    cp.close()


def test_nothing_to_do_needs_no_thread(tmp_path: Path) -> None:
    cp = job(tmp_path)
    assert isinstance(cp._saves._trickle, Trickle) and cp._saves._trickle.quiet(0)  # type: ignore[union-attr]
    cp.close()
