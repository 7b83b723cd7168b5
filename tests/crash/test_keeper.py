"""Trainers and keepers that are killed, stopped, starved and lied to: what comes back is one step, whole, and not an old one.

What may be restored: nothing older than the newest step that a trainer saw sealed, nothing newer than the last one it
passed; with the keeper dead too, nothing older than what it saw stored.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import keepers
import pytest
from forks import Fresh
from keepers import (
    WIDE,
    Died,
    Raised,
    Trainer,
    check_stored,
    goes_on,
    held_steps,
    nothing_left,
    scene,
    seen,
    together,
    until,
)
from kills import check_listing, small_disk

from ckpt.backends import LocalBackend
from ckpt.commit import open_generation
from ckpt.errors import PeerError
from ckpt.events import Event, read_events
from ckpt.keeper import seat
from ckpt.keeper.link import _keep_here
from ckpt.keeper.view import keepers_here

NEVER = 1000
WHILE_TRAINING = [p for p in keepers.KEEPER if p not in ("keeper attached", "keeper orphaned")]
BEFORE_SEALED = [p for p in keepers.TRAINER if p != "trainer sealed"]


def test_the_points_are_found() -> None:
    assert {"trainer granted", "trainer sealed"} <= set(keepers.TRAINER)
    assert {"keeper attached", "keeper sealed", "keeper orphaned", "keeper commit"} <= set(keepers.KEEPER)


# 1. The trainer is killed.


def _trainer_killed(folder: str, point: str, nth: int) -> None:
    with scene(folder) as run:
        t = Trainer(run)
        t("fault", "kill", point, nth)
        t.dies("train", 20_000)
        t = Trainer(run)
        t("restore")
        slots = t("seal", 1) and len(keepers.slots_of(keepers.keeper(run)))
        t("fault", "kill", point, nth)
        t.dies("train", 20_000)
        sealed = seen(run, "sealed")
        assert nth == 1 or sealed >= 0
        t = Trainer(run)
        start, source = t("restore")
        assert sealed <= start - 1 <= seen(run, "at") and source == "memory"
        t("seal", 1)
        assert len(keepers.slots_of(keepers.keeper(run))) == slots, "the keeper holds more after each death"
        t.kill()
        goes_on(run, seen(run, "sealed"), seen(run, "at"))


def _last_events(folder: str, written: bool) -> None:
    with scene(folder) as run:
        t = Trainer(run, storage=NEVER)
        t("seal", 2)
        if written:
            t("write_events")
        t("seal", 3)
        sealed = seen(run, "sealed")
        assert sum(e.outcome == "sealed" for e in events_of(run)) == 2 * written, "the others are in no storage yet"
        t.kill()
        until(lambda: any(e.kind == "save" for e in events_of(run)), "the keeper tells what it stored")
        found = events_of(run)
        steps = [e.step for e in found if e.outcome == "sealed"]
        assert len(steps) == len(set(steps)) == 5 and steps[-1] == sealed, "each snapshot once"
        assert all(e.stall > 0 and e.bytes > 0 for e in found if e.outcome == "sealed")
        assert [(e.step, e.rank) for e in found if (e.kind, e.outcome) == ("save", "committed")] == [(sealed, 0)]
        goes_on(run, sealed, sealed)


def _kept_by_a_thread(folder: str) -> None:
    with scene(folder) as run:
        t = Trainer(run, opened=False)
        t("no_process")
        t("open", 1, 4)
        assert t("restore") == (0, "nothing")
        t("seal", 6)
        assert keepers.bound(run) and not keepers.keepers(run), "it is a thread"
        said = [line for line in t("heard") if "a thread of this process" in line]
        assert len(said) == 1 and f"({t.pid})" in said[0] and "no longer than this process" in said[0]
        stored = t("quiet")
        t("seal", 1)
        assert t("restore") == (seen(run, "sealed") + 1, "memory"), "as long as the process lives"
        t("seal", 1)
        stored = max(stored, t("quiet"))
        t.kill()
        until(lambda: not keepers.bound(run), "with the process all of it is gone")
        t = Trainer(run)
        assert t("restore") == (stored + 1, "storage")
        t("seal", 1)
        t.finish()
        nothing_left(run)
        t = Trainer(run, opened=False)
        t("no_process")
        t("open", 1, 4)
        t("restore")
        t("seal", 2)
        last = t("train", 1)
        assert t("close")["last_step"] == last
        until(lambda: t("mapped") == 0, "all memory is given back, also what the thread held")
        t.leave()
        nothing_left(run)
        check_stored(run, last)


def test_where_no_process_can_be_started_a_thread_keeps(fresh: Fresh, tmp_path: Path) -> None:
    """Snapshots go on, and saves from them; they end with the trainer."""
    fresh(_kept_by_a_thread, str(tmp_path))


def events_of(run: str) -> list[Event]:
    return sorted(read_events(LocalBackend(run)), key=lambda e: e.time)


@pytest.mark.parametrize("written", [False, True])
def test_the_last_events_of_a_trainer_outlive_it(fresh: Fresh, tmp_path: Path, written: bool) -> None:
    """Nothing of them was written, or what was before; the keeper adds what it stored when nobody was there."""
    fresh(_last_events, str(tmp_path), written)


@pytest.mark.parametrize("nth", [1, 3])
@pytest.mark.parametrize("point", keepers.TRAINER)
def test_a_trainer_is_killed(fresh: Fresh, tmp_path: Path, point: str, nth: int) -> None:
    fresh(_trainer_killed, str(tmp_path), point, nth)


def _lives_in_one_process(folder: str) -> None:
    with scene(folder) as run:
        t = Trainer(run, opened=False)
        t("life", 2)
        before = t("life", 2)
        for _ in range(4):
            t("life", 1)
        assert t("life", 1) <= before, "descriptors are lost from life to life"
        t.leave()
        nothing_left(run)


def _memory_after_close(folder: str) -> None:
    with scene(folder) as run:
        t = Trainer(run)
        t("seal", 3)
        t("close")
        assert t("mapped") == 0, "slots are still held after close"
        t.leave()
        nothing_left(run)


def test_close_gives_the_memory_back(fresh: Fresh, tmp_path: Path) -> None:
    fresh(_memory_after_close, str(tmp_path))


def test_lives_in_one_process_leave_no_descriptor(fresh: Fresh, tmp_path: Path) -> None:
    """Each begins right after the keeper of the one before was told to end, and has snapshots all the same."""
    fresh(_lives_in_one_process, str(tmp_path))


def _restored_in_the_same_process(folder: str) -> None:
    with scene(folder) as run:
        t = Trainer(run, storage=NEVER)
        t("seal", 4)
        t("train", 1)
        sealed = t("seal", 1)[-1]
        start, source = t("restore")
        assert (start - 1, source) == (sealed, "memory"), (start - 1, source, sealed)
        t("seal", 2)
        t.finish()
        nothing_left(run)


def test_a_loop_that_restores_again_gets_its_newest_snapshot(fresh: Fresh, tmp_path: Path) -> None:
    fresh(_restored_in_the_same_process, str(tmp_path))


# 2. The keeper is killed.


def _keeper_killed(folder: str, point: str, nth: int, both: bool) -> None:
    with scene(folder) as run:
        t = Trainer(run, env={"CKPT_FAULT": f"kill@{point}#{nth}"}, storage=2)
        t("set", "CKPT_FAULT", None)
        first = keepers.keeper(run)
        until(lambda: t("train", 1) >= 0 and keepers.state_of(first) in "Z", f"the keeper passes {point!r}")
        assert os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) == -signal.SIGKILL
        if both:
            t.kill()
            goes_on(run, seen(run, "stored"), seen(run, "at"))
            return
        t("seal", 3)
        assert keepers.keeper(run) != first
        sealed = seen(run, "sealed")
        assert sealed >= seen(run, "at") - 1
        last = t("train", 1)
        report = t.finish()
        assert report["last_step"] == last
        nothing_left(run)
        check_stored(run, last)


@pytest.mark.parametrize("point", WHILE_TRAINING)
def test_a_keeper_is_killed_while_training_goes_on(fresh: Fresh, tmp_path: Path, point: str) -> None:
    fresh(_keeper_killed, str(tmp_path), point, 1, False)


@pytest.mark.parametrize("point", WHILE_TRAINING)
def test_a_keeper_is_killed_and_its_trainer_too(fresh: Fresh, tmp_path: Path, point: str) -> None:
    fresh(_keeper_killed, str(tmp_path), point, 2, True)


def _keeper_killed_as_the_last(folder: str, point: str) -> None:
    with scene(folder) as run:
        t = Trainer(run, env={"CKPT_FAULT": f"kill@{point}"}, storage=NEVER)
        first = keepers.keeper(run)
        t("seal", 3)
        t.kill()
        assert keepers.gone(first) == -signal.SIGKILL
        # What it had committed when it died at the last of these is there; before that, the snapshot died with it.
        expected = (seen(run, "sealed"), "storage") if point == "keeper persisted" else (-1, "nothing")
        found = goes_on(run, -1, seen(run, "at"))
        assert found == expected, (found, expected)


@pytest.mark.parametrize(
    "point", [p for p in keepers.KEEPER if p not in ("keeper attached", "keeper sealed", "keeper complete")]
)
def test_a_keeper_is_killed_while_it_rescues(fresh: Fresh, tmp_path: Path, point: str) -> None:
    fresh(_keeper_killed_as_the_last, str(tmp_path), point)


def _keeper_killed_at_attach(folder: str, nth: int) -> None:
    with scene(folder) as run:
        if nth == 2:
            t = Trainer(run, env={"CKPT_FAULT": "kill@keeper attached#2"}, storage=2)
            t("seal", 5)
            t.kill()
        t = Trainer(run, env={} if nth == 2 else {"CKPT_FAULT": "kill@keeper attached"}, storage=2)
        t("set", "CKPT_FAULT", None)
        start, _ = t("restore")
        assert seen(run, "stored") <= start - 1 <= seen(run, "at")
        t("seal", 2)
        last = t("train", 1)
        report = t.finish()
        assert report["failed"] == 0 and report["last_step"] == last
        nothing_left(run)
        check_stored(run, last)


@pytest.mark.parametrize("nth", [1, 2])
def test_a_keeper_is_killed_as_a_trainer_attaches(fresh: Fresh, tmp_path: Path, nth: int) -> None:
    fresh(_keeper_killed_at_attach, str(tmp_path), nth)


def _keeper_killed_between(folder: str, life: bool) -> None:
    with scene(folder) as run:
        if life:
            t = Trainer(run, storage=2)
            t("seal", 5)
            t.kill()
        t = Trainer(run, storage=2)
        first = keepers.keeper(run)
        os.kill(first, signal.SIGKILL)
        keepers.gone(first)
        if life:
            start, source = t("restore")
            assert seen(run, "stored") <= start - 1 <= seen(run, "at") and source == "storage"
        t("seal", 2)
        last = t("train", 1)
        report = t.finish()
        assert report["last_step"] == last
        nothing_left(run)
        check_stored(run, last)


@pytest.mark.parametrize("life", [False, True])
def test_a_keeper_is_killed_before_a_life_begins(fresh: Fresh, tmp_path: Path, life: bool) -> None:
    """Between the constructor and `restore`, or the first step."""
    fresh(_keeper_killed_between, str(tmp_path), life)


# 3. Somebody is stopped.


def _keeper_stopped(folder: str) -> None:
    with scene(folder) as run:
        t = Trainer(run, wide=1000)
        t("seal", 3)
        before = t("report")
        pid = keepers.keeper(run)
        os.kill(pid, signal.SIGSTOP)
        until(lambda: keepers.state_of(pid) == "T", "stopped")
        at = seen(run, "at")
        assert t("train", 2000) == at + 2000
        assert keepers.state_of(pid) == "T"
        after = t("report")
        assert after["sealed"] <= before["sealed"] + 1 and after["failed"] == before["failed"]
        os.kill(pid, signal.SIGCONT)
        t("seal", 3)
        t.kill()
        goes_on(run, seen(run, "sealed"), seen(run, "at"), wide=1000)


def test_a_keeper_is_stopped_for_a_while(fresh: Fresh, tmp_path: Path) -> None:
    fresh(_keeper_stopped, str(tmp_path))


def _trainer_stopped(folder: str, point: str) -> None:
    with scene(folder) as run:
        old = Trainer(run, storage=NEVER)
        old("seal", 3)
        sealed = seen(run, "sealed")
        old("fault", "stop", point, 1)
        old.tell("train", 500)
        old.stopped()
        passed = seen(run, "at")
        t = Trainer(run, storage=NEVER)
        start, source = t("restore", 7)
        assert sealed <= start - 1 <= passed and source == "memory"
        first = t("seal", 2)[-1]
        t.tell("train", 300)  # while the old one comes back to life
        old.resume()
        assert old.answer() > passed
        t.answer()
        last = t("seal", 2)[-1]
        assert last > first
        t.kill()
        lives = Trainer(run, storage=NEVER)
        start, source = lives("restore")
        assert (start - 1, source) == (last, "memory"), (start - 1, source, last)
        old.kill()
        lives("seal", 2)
        last = lives("train", 1)
        assert lives.finish()["last_step"] == last
        nothing_left(run)
        check_stored(run, last)


@pytest.mark.parametrize("point", keepers.TRAINER)
def test_a_stopped_trainer_is_replaced_and_comes_back(fresh: Fresh, tmp_path: Path, point: str) -> None:
    fresh(_trainer_stopped, str(tmp_path), point)


def _second_trainer(folder: str) -> None:
    with scene(folder) as run:
        t = Trainer(run)
        t("seal", 3)
        second = Trainer(run, opened=False)
        with pytest.raises(Raised) as e:
            second("open")
        assert e.value.kind == "ConflictError" and f"process {t.pid};" in e.value.text
        second.leave()
        t("seal", 3)
        t.kill()
        goes_on(run, seen(run, "sealed"), seen(run, "at"))


def test_a_second_trainer_is_refused(fresh: Fresh, tmp_path: Path) -> None:
    fresh(_second_trainer, str(tmp_path))


def _two_jobs_that_cannot_meet(folder: str) -> None:
    with scene(folder, grace=2.0) as run:
        t = Trainer(run, storage=2)
        t("seal", 3)
        first = t("quiet")
        other = Trainer(run, env={"CKPT_HOST": "elsewhere"}, storage=2)
        assert other("restore") == (first + 1, "storage")
        other("seal", 3)
        before = t("report")
        t("seal", 3)
        t("quiet")
        report = t("report")
        assert report["failed"] > before["failed"] and report["committed"] == before["committed"]
        assert report["last_error"].startswith("conflict: generation 2 of ")
        assert f"begun by elsewhere, process {other.pid} at " in report["last_error"]
        t.kill()
        last = other("train", 1)
        assert other.finish()["last_step"] == last
        nothing_left(run)
        check_stored(run, last)


def test_the_older_of_two_jobs_that_cannot_meet_commits_nothing(fresh: Fresh, tmp_path: Path) -> None:
    """On one host the second is refused; on two, the first is told, by the generation that the second has begun."""
    fresh(_two_jobs_that_cannot_meet, str(tmp_path))


# 4. Nobody comes back.


def _rescued_late(folder: str) -> None:
    with scene(folder, grace=2.0) as run:
        t = Trainer(run, env={"CKPT_FAULT": "stop@keeper commit#1"}, storage=NEVER)
        t("set", "CKPT_FAULT", None)
        sealed = t("seal", 2)[-1]
        keeper = keepers.keeper(run)
        t.kill()
        until(lambda: keepers.state_of(keeper) == "T", "the keeper is about to commit")
        open_generation(LocalBackend(run), f"step-{sealed:08d}.g0001", 1, [1])
        os.kill(keeper, signal.SIGCONT)
        nothing_left(run)
        check_stored(run, sealed)


def test_what_dead_trainers_left_is_committed_after_others_have_begun(fresh: Fresh, tmp_path: Path) -> None:
    """They may go on from just that."""
    fresh(_rescued_late, str(tmp_path))


def _never_restarted(folder: str) -> None:
    with scene(folder, grace=2.0) as run:
        t = Trainer(run, storage=NEVER)
        t("train", 20)
        sealed = t("seal", 2)[-1]
        t("fault", "kill", "trainer copied eagerly", 1)
        t.dies("train", 20_000)
        nothing_left(run)
        check_stored(run, sealed)


def test_a_job_that_is_never_restarted_is_in_storage(fresh: Fresh, tmp_path: Path) -> None:
    fresh(_never_restarted, str(tmp_path))


def _no_grace(folder: str) -> None:
    with scene(folder, grace=0.0) as run:
        t = Trainer(run, storage=NEVER)
        sealed = t("seal", 2)[-1]
        assert keepers.keeper(run)
        t.kill()
        nothing_left(run)
        check_stored(run, sealed)


def test_a_keeper_without_grace_stores_and_ends(fresh: Fresh, tmp_path: Path) -> None:
    fresh(_no_grace, str(tmp_path))


def _a_child_outlives_the_trainer(folder: str) -> None:
    with scene(folder, grace=2.0) as run:
        read, write = os.pipe()
        t = Trainer(run, storage=NEVER)
        sealed = t("seal", 2)[-1]
        child = t("child", read)
        t.kill()
        try:
            for pid in keepers.keepers(run):
                assert keepers.gone(pid, 20) == 0
            check_stored(run, sealed)
        finally:
            os.close(write)
            os.kill(child, signal.SIGKILL)
            keepers.gone(child)
        nothing_left(run)


def test_a_child_of_a_dead_trainer_does_not_keep_it_alive(fresh: Fresh, tmp_path: Path) -> None:
    """A forked worker holds copies of the trainer's descriptors, and may outlive it."""
    fresh(_a_child_outlives_the_trainer, str(tmp_path))


# 5. SIGTERM.


def _keeper_terminated(folder: str) -> None:
    with scene(folder) as run:
        t = Trainer(run, storage=NEVER)
        sealed = t("seal", 3)[-1]
        pid = keepers.keeper(run)
        os.kill(pid, signal.SIGTERM)
        until(lambda: os.path.exists(f"{run}/step-{sealed:08d}.g0001/commit.json"), "the newest step is committed")
        check_stored(run, sealed)
        t("seal", 2)
        assert keepers.keeper(run) == pid
        sealed = t("seal", 1)[-1]
        t.kill()
        os.kill(pid, signal.SIGTERM)
        nothing_left(run)
        check_stored(run, sealed)


def test_a_keeper_is_terminated(fresh: Fresh, tmp_path: Path) -> None:
    fresh(_keeper_terminated, str(tmp_path))


def _trainer_terminated(folder: str) -> None:
    with scene(folder) as run:
        t = Trainer(run, storage=NEVER, opened=False)
        t("handle_sigterm", f"{folder}/handled")
        t("open", 1, NEVER)
        sealed = t("seal", 3)[-1]
        os.kill(t.pid, signal.SIGTERM)
        until(lambda: os.path.exists(f"{folder}/handled"), "its own handler ran")
        until(lambda: os.path.exists(f"{run}/step-{sealed:08d}.g0001/commit.json"), "the newest step is committed")
        check_stored(run, sealed)
        t("seal", 2)
        sealed = t("seal", 1)[-1]
        os.unlink(f"{folder}/handled")
        t.tell("train", 500)
        os.kill(t.pid, signal.SIGTERM)  # in the middle of whatever it does
        until(lambda: os.path.exists(f"{folder}/handled"), "its own handler ran again")
        t.answer()
        until(lambda: check_listing(run)[0] >= sealed, "a newer step is committed")
        t.kill()
        goes_on(run, seen(run, "sealed"), seen(run, "at"))


def test_a_trainer_that_handles_sigterm_has_its_newest_step_stored(fresh: Fresh, tmp_path: Path) -> None:
    fresh(_trainer_terminated, str(tmp_path))


# 6. Memory that lies.


def _flip(run: str) -> None:
    """One bit in the middle of each slot's pack."""
    for at in keepers.slots_of(keepers.keeper(run)):
        with open(at, "r+b") as f:
            f.seek(keepers.WIDE * 6)
            byte = f.read(1)
            f.seek(-1, 1)
            f.write(bytes([byte[0] ^ 1]))


def _damaged_memory(folder: str, stored: bool) -> None:
    with scene(folder) as run:
        t = Trainer(run, storage=4)
        t("seal", 4)
        until(lambda: t("seal", 1)[0] > t("quiet") >= 0, "a snapshot that is newer than what is in storage")
        older, sealed = t("quiet"), seen(run, "sealed")
        if not stored:
            _flip(run)
        t.kill()
        rescued = f"{run}/step-{sealed:08d}.g0001/commit.json"
        if stored:
            until(lambda: os.path.exists(rescued), "the rescue")
            _flip(run)
        else:
            until(lambda: not held_steps(run), "the keeper finds the damage")
        t = Trainer(run, storage=4)
        start, source = t("restore")
        expected = (sealed if stored else older, "storage")
        assert (start - 1, source) == expected, (start - 1, source, expected)
        assert stored or not os.path.exists(rescued)
        what = "cannot be used, falling back" if stored else "is damaged"
        said = [text for text in t("logged") if what in text and text.startswith("ERROR")]
        assert said and "memory" in said[0], t("logged")
        t("seal", 2)
        last = t("train", 1)
        assert t.finish()["last_step"] == last
        nothing_left(run)
        if stored:
            check_stored(run, last)


@pytest.mark.parametrize("stored", [True, False])
def test_damaged_memory_is_told_and_not_loaded(fresh: Fresh, tmp_path: Path, stored: bool) -> None:
    """After the keeper wrote the step to storage, or before."""
    fresh(_damaged_memory, str(tmp_path), stored)


# 7. Two jobs.


def _two_jobs(folder: str) -> None:
    with scene(folder) as run:
        other = f"{run}-2"
        a, b = Trainer(run, salt=1), Trainer(other, salt=2)
        together([a, b], "seal", 3)
        a.tell("train", 100)
        b.kill()
        a.answer()
        b = Trainer(other, salt=2)
        start, source = b("restore")
        assert source == "memory" and seen(other, "sealed") <= start - 1 <= seen(other, "at")
        together([a, b], "seal", 2)
        os.kill(keepers.keeper(other), signal.SIGKILL)
        together([a, b], "seal", 2)
        a.kill()
        b("seal", 1)
        assert b.finish()["failed"] == 0
        until(lambda: not keepers.bound(other), "the other keeper ends")
        t = Trainer(run)
        start, source = t("restore")
        assert source == "memory" and seen(run, "sealed") <= start - 1 <= seen(run, "at")
        last = t("seal", 1)[-1]
        t.finish()
        nothing_left(run)
        nothing_left(other)
        check_stored(run, last)
        check_stored(other, seen(other, "at"))


def test_two_jobs_on_one_host(fresh: Fresh, tmp_path: Path) -> None:
    fresh(_two_jobs, str(tmp_path))


# 8. Storage that fails.


def _storage_fails_once(folder: str) -> None:
    with scene(folder) as run:
        t = Trainer(run, env={"CKPT_FAULT": "ENOSPC@keeper write"}, storage=4)
        until(lambda: t("seal", 1) and t("report")["failed"], "a save that failed")
        report = t("report")
        assert report["failed"] == 1 and "keeper write" in report["last_error"], report
        until(lambda: t("seal", 1) and t("report")["committed"], "a save that did not")
        t.kill()
        step, _ = goes_on(run, seen(run, "sealed"), seen(run, "at"))
        assert step >= 4


def test_storage_that_fails_once(fresh: Fresh, tmp_path: Path) -> None:
    fresh(_storage_fails_once, str(tmp_path))


def _storage_gone(folder: str, back: bool) -> None:
    with scene(folder, grace=8.0) as run:
        t = Trainer(run, storage=4)
        t("seal", 8)
        until(lambda: t("report")["committed"], "a step in storage")
        os.rename(run, f"{run}.away")
        Path(run).write_text("not a folder")
        until(lambda: t("seal", 1) and t("report")["failed"], "a save that failed")
        sealed = t("seal", 4)[-1]
        if back:
            os.unlink(run)
            os.rename(f"{run}.away", run)
            committed = t("report")["committed"]
            until(lambda: t("seal", 1) and t("report")["committed"] > committed, "storage is used again")
            t.kill()
            goes_on(run, seen(run, "sealed"), seen(run, "at"))
            return
        t.kill()
        os.unlink(run)
        os.rename(f"{run}.away", run)
        nothing_left(run)  # it tried again
        check_stored(run, sealed)


@pytest.mark.parametrize("back", [True, False])
def test_storage_that_is_gone_for_a_while(fresh: Fresh, tmp_path: Path, back: bool) -> None:
    fresh(_storage_gone, str(tmp_path), back)


def _told_once(folder: str) -> None:
    with scene(folder) as run:
        first, second = (Trainer(run, storage=4, opened=False) for _ in range(2))
        failed: list[str] = []

        class Ear(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                failed.extend([record.getMessage()] * ("was not written to storage" in record.getMessage()))

        logging.getLogger("ckpt.keeper").addHandler(Ear())
        seat._AGAIN = 0.05
        _keep_here(keepers._name(run), PeerError("here it can be watched"))
        first("open", 1, 4)
        first("seal", 4)
        first("quiet")
        sealed = first("seal")[-1]
        os.rename(run, f"{run}.away")
        Path(run).write_text("not a folder")
        first.kill()
        until(lambda: len(failed) >= 4, "it is tried again and again")
        second("open", 1, 4)
        said = [text for text in second("heard") if "while no trainer was here" in text]
        assert len(said) == 1 and f"step {sealed} was not written to storage" in said[0], said
        os.unlink(run)
        os.rename(f"{run}.away", run)
        assert second("restore")[0] == sealed + 1
        second("seal", 1)
        assert second.finish()["failed"] == 0
        nothing_left(run)


def test_what_failed_again_and_again_is_told_once(fresh: Fresh, tmp_path: Path) -> None:
    """To the next trainer, by a keeper whose storage was gone meanwhile; here one in a thread, with less patience."""
    fresh(_told_once, str(tmp_path))


# 9. No room.


def _no_room(folder: str, restored: bool, limited: bool) -> None:
    with scene(folder, grace=1.0) as run:
        if restored:
            t = Trainer(run, storage=NEVER)
            t("seal", 1)
            t.finish()
            nothing_left(run)
        t = Trainer(run)
        if limited:
            t("limit", 3)
        else:
            t("room", 3, 3, 3)
        with pytest.raises(Raised) as e:
            t("restore") if restored else t("train", 1)
        assert e.value.kind == "CapacityError" and "MiB" in e.value.text, e.value
        t.leave()
        nothing_left(run)


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("restored", [False, True])
def test_no_room_is_said_with_numbers(fresh: Fresh, tmp_path: Path, restored: bool, limited: bool) -> None:
    fresh(_no_room, str(tmp_path), restored, limited)


def _room_for_one(folder: str) -> None:
    with scene(folder) as run:
        t = Trainer(run)
        t("room", 1000, 3)
        with pytest.raises(Raised) as e:
            t("train", 1)
        assert e.value.kind == "CapacityError"
        t("seal", 9)
        until(lambda: t("seal", 1) and t("report")["committed"], "a step in storage")
        t.kill()
        goes_on(run, seen(run, "sealed"), seen(run, "at"))


def test_a_loop_may_try_again_when_there_is_room(fresh: Fresh, tmp_path: Path) -> None:
    """The first slot was there, the second was not."""
    fresh(_room_for_one, str(tmp_path))


def _keeper_without_room(folder: str) -> None:
    with scene(folder) as run:
        t = Trainer(run, storage=4, wide=1 << 22)
        keeper = keepers.keeper(run)
        pages = int(Path(f"/proc/{keeper}/statm").read_text().split()[0])
        resource.prlimit(keeper, resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + (1 << 20), -1))
        until(lambda: t("seal", 1) and t("report")["failed"], "a save that failed")
        report = t("report")
        assert "memory" in report["last_error"].lower(), report
        t("seal", 2)
        resource.prlimit(keeper, resource.RLIMIT_AS, (-1, -1))
        until(lambda: t("seal", 1) and t("report")["committed"], "a save that did not")
        assert keepers.keeper(run) == keeper
        t.kill()
        goes_on(run, seen(run, "sealed"), seen(run, "at"), wide=1 << 22)


def test_a_keeper_short_of_memory_holds_snapshots_and_saves_later(fresh: Fresh, tmp_path: Path) -> None:
    """Under `ulimit -v`, say."""
    fresh(_keeper_without_room, str(tmp_path))


def _small_shm(folder: str) -> str:
    refused = small_disk("/dev/shm", "size=64m")
    if refused:
        return refused
    with scene(folder) as run:
        t = Trainer(run, storage=4, wide=6 << 20)
        sealed = t("seal", 3)[-1]
        assert sum(os.path.getsize(at) for at in keepers.slots_of(keepers.keeper(run))) > 3 * (64 << 20)
        t.kill()
        goes_on(run, max(sealed, seen(run, "sealed")), seen(run, "at"), wide=6 << 20)
    return ""


def test_slots_need_no_shared_memory_filesystem(fresh: Fresh, tmp_path: Path) -> None:
    """As in a container with the usual /dev/shm of 64 MiB."""
    refused = fresh(_small_shm, str(tmp_path))
    if refused:
        pytest.skip(refused)


def _seen_from_the_shell(folder: str) -> None:
    def look() -> list[dict[str, Any]]:
        command = [sys.executable, "-m", "ckpt.cli", "keepers", "--json"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return [k for k in json.loads(said)["keepers"] if k["run"] == run]

    with scene(folder) as run:
        t = Trainer(run)
        sealed = t("seal", 2)[-1]
        (found,) = look()
        assert found["pid"] == keepers.keeper(run), found
        assert found["trainers"] == {"0": t.pid}, found
        newest = found["steps"][-1]
        assert (newest["step"], newest["ranks"]) == (sealed, [0]) and newest["bytes"] > 12 * WIDE
        assert found["memory"] >= 2 * newest["bytes"] and found["host"] == found["lead"] and not found["address"]
        os.kill(found["pid"], signal.SIGSTOP)
        try:
            (view,) = [k for k in keepers_here() if k.pid == found["pid"]]
            assert "stopped" in view.trouble
        finally:
            os.kill(found["pid"], signal.SIGCONT)
        t.finish()
        nothing_left(run)
        assert look() == []


def test_keepers_are_seen_from_the_shell(fresh: Fresh, tmp_path: Path) -> None:
    fresh(_seen_from_the_shell, str(tmp_path))


# 10. Two ranks.


def _pair(
    run: str, name: str, env: dict[str, str] | None = None, storage: int | None = 4, **options: Any
) -> list[Trainer]:
    pair = [Trainer(run, store=f"{run}.{name}", rank=r, world=2, env=env, **options) for r in range(2)]
    together(pair, "open", 1, storage)
    return pair


def _in_step(pair: list[Trainer], seals: int) -> list[int]:
    """Both train, step by step, until so many steps are sealed, and both saw that."""
    out: list[int] = []

    def more() -> bool:
        a, b = together(pair, "lockstep", 1)
        assert a == b
        out.extend(a)
        return len(out) >= seals

    until(more, "snapshots of both")
    return out


def _one_of_two_killed(folder: str, point: str, victim: int) -> None:
    with scene(folder) as run:
        pair = _pair(run, "first")
        _in_step(pair, 5)
        pair[victim]("fault", "kill", point, 1)
        for t in pair:
            t.tell("train", 20_000 if t is pair[victim] else 400)
        with pytest.raises(Died):
            pair[victim].answer()
        other = pair[1 - victim]
        other.answer()
        at = seen(run, "at")
        assert other("train", 50) <= at + 50
        other.kill()
        pair = _pair(run, "second")
        (start, source), theirs = together(pair, "restore")
        assert (start, source) == theirs and source == "memory"
        assert seen(run, "sealed") <= start - 1 <= seen(run, "at")
        _in_step(pair, 3)
        (last, _) = together(pair, "train", 1)
        reports = together(pair, "close")
        assert [r["failed"] for r in reports] == [0, 0]
        for t in pair:
            t.leave()
        nothing_left(run)
        check_stored(run, last)


@pytest.mark.parametrize("point, victim", [(p, k % 2) for k, p in enumerate(BEFORE_SEALED)])
def test_one_of_two_ranks_is_killed(fresh: Fresh, tmp_path: Path, point: str, victim: int) -> None:
    fresh(_one_of_two_killed, str(tmp_path), point, victim)


def _ranks_differ(folder: str, storage: int | None) -> None:
    with scene(folder) as run:
        pair = _pair(run, "first", storage=storage, diverge=3)
        sealed = _in_step(pair, 8)
        reports = together(pair, "report")
        assert 3 not in sealed and sealed[-1] >= 8
        for whys in together(pair, "voids"):
            differ = [why for why in whys if "no longer the same" in why]
            assert differ == ["no longer the same on all ranks: model.seen"], whys
        assert [r["failed"] for r in reports] == [0, 0], reports
        for t in pair:
            t.kill()
        pair = _pair(run, "second", storage=storage, diverge=3)
        (start, source), theirs = together(pair, "restore")
        assert (start, source) == theirs == (sealed[-1] + 1, "memory")
        _in_step(pair, 3)
        for t in pair:
            t.kill()
        until(lambda: check_listing(run) and check_listing(run)[0] == seen(run, "sealed"), "the rescue")
        pair = _pair(run, "third", storage=storage, diverge=3)
        os.kill(keepers.keeper(run), signal.SIGKILL)
        for t in pair:
            t.kill()
        pair = _pair(run, "fourth", storage=storage, diverge=3)
        for start, source in together(pair, "restore"):
            assert (start - 1, source) == (seen(run, "sealed"), "storage")
        _in_step(pair, 2)
        together(pair, "close")
        for t in pair:
            t.leave()
        nothing_left(run)


@pytest.mark.parametrize("storage", [4, None])
def test_a_tensor_that_stops_being_the_same_is_stored_per_rank(
    fresh: Fresh, tmp_path: Path, storage: int | None
) -> None:
    fresh(_ranks_differ, str(tmp_path), storage)


def _fewer_ranks(folder: str, cut: bool) -> None:
    with scene(folder) as run:
        pair = _pair(run, "first", storage=NEVER, cut=cut)
        sealed = _in_step(pair, 4)[-1]
        for t in pair:
            t.kill()
        assert goes_on(run, sealed, sealed, cut=cut) == (sealed, "memory")


@pytest.mark.parametrize("cut", [False, True])
def test_two_ranks_come_back_as_one(fresh: Fresh, tmp_path: Path, cut: bool) -> None:
    fresh(_fewer_ranks, str(tmp_path), cut)


def _keeper_of_two_killed(folder: str) -> None:
    with scene(folder) as run:
        pair = _pair(run, "first")
        _in_step(pair, 5)
        first = keepers.keeper(run)
        os.kill(first, signal.SIGKILL)
        keepers.gone(first)
        sealed = _in_step(pair, 4)[-1]
        for t in pair:
            t.kill()
        pair = _pair(run, "second")
        for start, source in together(pair, "restore"):
            assert (start - 1, source) == (sealed, "memory"), (start - 1, source, sealed)
        (last, _) = together(pair, "train", 3)
        reports = together(pair, "close")
        assert [r["failed"] for r in reports] == [0, 0]
        for t in pair:
            t.leave()
        nothing_left(run)
        check_stored(run, last)


def test_the_keeper_of_two_ranks_is_killed(fresh: Fresh, tmp_path: Path) -> None:
    fresh(_keeper_of_two_killed, str(tmp_path))


# Leaves that change, and leaves that do not.


def _declared_pieces(folder: str) -> None:
    with scene(folder) as run:
        t = Trainer(run, cut=True)
        t("seal", 3)
        t.kill()
        goes_on(run, seen(run, "sealed"), seen(run, "at"), cut=True)


def test_declared_pieces_are_in_snapshots(fresh: Fresh, tmp_path: Path) -> None:
    fresh(_declared_pieces, str(tmp_path))


def _leaves_change(folder: str, storage: int | None, size: int, times: int) -> None:
    with scene(folder) as run:
        t = Trainer(run, storage=storage)
        t("seal", 3)
        for _ in range(times):
            t("grow", size)
            t("seal", 3)
            t("shrink")
            t("seal", 3)
        t.kill()
        assert goes_on(run, seen(run, "sealed"), seen(run, "at"))[1] == "memory"


@pytest.mark.parametrize("storage", [4, None])
def test_snapshots_go_on_when_leaves_change(fresh: Fresh, tmp_path: Path, storage: int | None) -> None:
    fresh(_leaves_change, str(tmp_path), storage, 1000, 3)


def _killed_after_growth(folder: str) -> None:
    with scene(folder) as run:
        t = Trainer(run, storage=NEVER)
        sealed = t("seal", 3)[-1]
        t("grow", 3 << 20)
        t("fault", "kill", "trainer granted", 2)  # with the old plan, then with the new one
        t.dies("train", 20_000)
        assert seen(run, "sealed") == sealed
        step, source = goes_on(run, sealed, sealed)
        assert (step, source) == (sealed, "memory")


def test_a_trainer_is_killed_when_its_slots_have_grown(fresh: Fresh, tmp_path: Path) -> None:
    """Its newest snapshot has other leaves, and was made in a smaller slot."""
    fresh(_killed_after_growth, str(tmp_path))


def _changes_under_two_keepers(folder: str) -> None:
    with scene(folder) as run:
        t = Trainer(run)
        t("seal", 3)
        t("grow", 1000)
        t("seal", 3)
        first = keepers.keeper(run)
        os.kill(first, signal.SIGKILL)
        keepers.gone(first)
        t("seal", 3)
        t("shrink")
        t("seal", 3)
        t.kill()
        goes_on(run, seen(run, "sealed"), seen(run, "at"))


def test_leaves_change_before_and_after_the_keeper_is_killed(fresh: Fresh, tmp_path: Path) -> None:
    fresh(_changes_under_two_keepers, str(tmp_path))
