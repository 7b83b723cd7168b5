"""`ckpt run`: a job whose end takes everything down leaves its newest step in storage first."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ckpt

JOB = """
import os, signal, sys, time
import torch, ckpt
model = torch.nn.Linear(3, 3)
state = {"model": model, "step": 0}
cp = ckpt.Checkpointer(sys.argv[1], state, memory=ckpt.Every(1))
cp.restore()
cp.step(0)  # begins the life
sealed = 0
for step in range(1, 2000):
    state["step"] = step
    time.sleep(0.005)  # what a step computes
    handle = cp.step(step)
    if handle is not None and handle.committed(60):
        sealed = step
        break
assert sealed
print(sealed, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_job_is_in_storage_when_its_parent_ends(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    command = [sys.executable, "-m", "ckpt.cli", "run", "--json", "--", sys.executable, "-c", JOB, run]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 128 + 9, done.stderr
    sealed, _, report = done.stdout.partition("\n")
    told = json.loads(report)
    assert (told["code"], told["keepers"]) == (137, 1)
    with ckpt.open(run) as c:
        assert c.step == int(sealed) and c.objects["step"] == c.step and c.verify().ok


def test_the_exit_code_is_the_job_s(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ckpt.cli", "run", "--"]
    for code in (0, 7):
        job = [sys.executable, "-c", f"raise SystemExit({code})"]
        assert subprocess.run([*command, *job], timeout=60, check=False).returncode == code
    missing = subprocess.run([*command, "/no/such/program"], capture_output=True, text=True, timeout=60, check=False)
    assert missing.returncode == 2 and "/no/such/program" in missing.stderr
