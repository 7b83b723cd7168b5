"""A disk that is really full: a small tmpfs, filled to every page and to every inode around what a save needs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Fresh
from kills import check_listing, check_pruned, small_disk

import ckpt
from ckpt.errors import StorageError

PAGE = 4096
SIZE = 2 << 20


def _free(folder: str) -> int:
    info = os.statvfs(folder)
    return info.f_bavail * info.f_frsize


def state(version: int) -> dict[str, Any]:
    return {"w": torch.full((30, 20), float(version)), "note": version}


class Loop:
    """A training loop that saves every step and does not mind when that fails."""

    def __init__(self, run: str) -> None:
        self.run, self.live, self.step, self.saved = run, state(-1), -1, [0]
        self.cp = ckpt.Checkpointer(run, self.live, storage=ckpt.Every(1))
        self.cp.restore()
        assert self.turn()

    def turn(self) -> bool:
        self.step += 1
        self.live["w"].fill_(self.step)
        self.live["note"] = self.step
        failed = self.cp.report.failed
        handle = self.cp.step(self.step)
        ok = handle is not None and handle.committed(None)
        assert self.cp.report.failed == failed + (not ok)
        if ok and self.step:
            self.saved.insert(0, self.step)
        elif not ok:
            assert self.cp.report.last_error.startswith("storage: ")
            assert "No space left on device; free some space" in self.cp.report.last_error
        assert check_listing(self.run) == self.saved
        target = state(-1)
        ckpt.load(target, self.run)
        assert target["note"] == self.saved[0] and target["w"].eq(self.saved[0]).all()
        return ok


def _no_room(folder: str) -> str:
    reason = small_disk(folder, f"size={SIZE}")
    if reason:
        return reason
    run, filler, outcomes = f"{folder}/run", f"{folder}/filler", []
    loop = Loop(run)
    before = _free(folder)
    with pytest.raises(StorageError, match="free some space"):
        ckpt.save({"large": torch.zeros(SIZE // 4)}, f"{folder}/run2")
    assert _free(folder) >= before - PAGE, "a failed save keeps its space"
    for pages in range(16):
        with open(filler, "wb") as f:
            os.posix_fallocate(f.fileno(), 0, _free(folder) - pages * PAGE)
        outcomes.append(loop.turn())
        os.unlink(filler)
        assert loop.turn(), "there is room again, and the save still fails"
    assert not outcomes[0] and outcomes[-1] and outcomes == sorted(outcomes)
    check_pruned(run)
    return ""


def _no_inodes(folder: str) -> str:
    reason = small_disk(folder, f"size={SIZE},nr_inodes=400")
    if reason:
        return reason
    run, outcomes = f"{folder}/run", []
    loop = Loop(run)
    for spare in range(10):
        fillers = [Path(folder, f"filler-{i}") for i in range(os.statvfs(folder).f_ffree - spare)]
        for f in fillers:
            f.touch()
        outcomes.append(loop.turn())
        for f in fillers:
            f.unlink()
        assert loop.turn(), "there is room again, and the save still fails"
    assert not outcomes[0] and outcomes[-1] and outcomes == sorted(outcomes)
    check_pruned(run)
    return ""


@pytest.mark.parametrize("scenario", [_no_room, _no_inodes])
def test_a_full_disk(fresh: Fresh, tmp_path: Path, scenario: Any) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    (tmp_path / "disk").mkdir()
    reason = fresh(scenario, str(tmp_path / "disk"))
    if reason:
        pytest.skip(reason)
