"""A small parent for jobs whose processes are taken down together: containers, batch systems.

It adopts the keepers that its job starts (as the subreaper of its descendants), passes signals on, and ends only when
they have written what they hold.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ckpt.errors import StorageError, UsageError

__all__ = ["Ended", "run_job"]

_PR_SET_CHILD_SUBREAPER = 36
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class Ended:
    """How a job ended: its exit code (128 + n for signal n), the keepers it left, the seconds they took to end."""

    code: int
    keepers: int
    seconds: float


def run_job(command: Sequence[str]) -> Ended:
    """Runs a command to its end, then has the keepers that it left behind write what they hold, and end.

    Raises UsageError if there is no such command, StorageError if this system cannot adopt processes.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise StorageError(f"cannot adopt keepers ({os.strerror(ctypes.get_errno())}); is this Linux?")
    try:
        job = subprocess.Popen(list(command))
    except OSError as e:
        raise UsageError(f"cannot run {command[0]!r}: {e.strerror}") from None

    def pass_on(number: int, _: object) -> None:
        for pid in [job.pid, *(_keepers() if number == signal.SIGTERM else [])]:
            _signal(pid, number)

    before = {s: signal.signal(s, pass_on) for s in _PASSED_ON}
    try:
        code = _wait_for(job)
        began, left = time.monotonic(), _keepers()
        for pid in left:  # nobody will start the job again under this parent: no use to wait for that
            _signal(pid, signal.SIGTERM)
        while _keepers():
            _reap()
        return Ended(code, len(left), time.monotonic() - began)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait_for(job: subprocess.Popen[bytes]) -> int:
    """Reaps whatever ends until the job does."""
    while True:
        pid, status = os.wait()
        if pid == job.pid:
            job.returncode = os.waitstatus_to_exitcode(status)
            return job.returncode if job.returncode >= 0 else 128 - job.returncode


def _reap() -> None:
    try:
        os.wait()
    except ChildProcessError:
        return


def _keepers() -> list[int]:
    """The keepers among the children of this process."""
    try:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    except OSError:
        return []
    return [int(pid) for pid in children if _is_keeper(pid)]


def _is_keeper(pid: str) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return b"ckpt.keeper" in words and state != "Z"


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
