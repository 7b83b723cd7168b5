"""Ranks whose contestants start processes: all that they start is known, can be weighed, and is ended with them."""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import re
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import World, empty, settle

__all__ = ["Crew", "Footprint", "bounds", "family", "footprint", "may_have_children"]

PATIENCE = 10.0
ROOM = 3.5  # times the state: three copies of it, which some contestants take, and something for the page cache
MIB = 1 << 20


def bounds(parser: argparse.ArgumentParser) -> None:
    """The options that keep a table short, also where a contestant is slow or hangs."""
    parser.add_argument("--patience", type=float, default=600.0, help="seconds that one turn of a contestant may take")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further round after so long")


def may_have_children() -> None:
    """Ranks are daemons, which may have no children; those that call this may."""
    mp.current_process().daemon = False


@dataclass(frozen=True)
class Process:
    """A process for life: its number may be given to another one later, its start time not."""

    pid: int
    started: int

    def alive(self) -> bool:
        return _stat(self.pid) == self.started


class Crew(World):
    """A `World` that leaves no process behind, whatever its contestants have started and wherever that has gone."""

    @property
    def pids(self) -> list[int]:
        return [p.pid for p in self._processes if p.pid is not None]

    def close(self, patience: float = 10) -> None:
        kin = [Process(pid, started) for pid in family(self.pids) if (started := _stat(pid)) is not None]
        super().close(patience)
        until = time.monotonic() + (PATIENCE if patience else 1.0)
        while any(p.alive() for p in kin) and time.monotonic() < until:
            time.sleep(0.05)
        for process in kin:
            if process.alive():
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)

    def turn(self, function: Callable[..., Any], name: str, path: Path, number: int, *arguments: Any) -> list[Any]:
        """`function(Rank, name, folder, *arguments)` on every rank, with a fresh folder that is removed afterwards."""
        self.make_room()
        folder = path / f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{number}"
        folder.mkdir()
        settle()
        try:
            return self.call(function, name, str(folder), *arguments)
        finally:
            empty(path)
            settle()

    def make_room(self) -> None:
        """Starts the ranks again where what they keep of earlier turns leaves too little memory for the next one."""
        if _available() < ROOM * self.nbytes:
            self.close()
            self._start()


# --- what the kernel tells of processes -----------------------------------------------------------------------------


def family(pids: Iterable[int]) -> set[int]:
    """These processes, their descendants, and whoever holds a memfd of theirs: a daemon has no parent, but a share."""
    parents = {pid: parent for pid in _all() if (parent := _parent(pid)) is not None}
    found = {pid for pid in pids if pid in parents}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    shared = {inode for pid in found for inode in _memfds(pid)}
    if shared:
        found |= {pid for pid in parents if pid != os.getpid() and shared & _memfds(pid).keys()}
    return found


@dataclass(frozen=True)
class Footprint:
    """Bytes of a family: anonymous and shared memory, a shared page counted once, and memfds that none of it maps."""

    mapped: int
    unmapped: int
    processes: int


def footprint(pids: Iterable[int]) -> Footprint:
    """What a family takes now. Pages of files are left out: libraries, of which other programs bear a varying part."""
    mapped, inodes, held = 0, set[int](), dict[int, int]()
    members = family(pids)
    for pid in members:
        with suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            mapped += sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
            inodes |= {int(line.split()[4]) for line in Path(f"/proc/{pid}/maps").read_text().splitlines()}
        held |= _memfds(pid)
    return Footprint(mapped, sum(size for inode, size in held.items() if inode not in inodes), len(members))


def _all() -> list[int]:
    return [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]


def _fields(pid: int) -> list[str]:
    """The fields of `stat` after the name; empty for a process that is gone, or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
    return [] if fields[0] in "ZX" else fields


def _parent(pid: int) -> int | None:
    return int(fields[1]) if (fields := _fields(pid)) else None


def _stat(pid: int) -> int | None:
    """When the process started, in clock ticks since boot."""
    return int(fields[19]) if (fields := _fields(pid)) else None


def _memfds(pid: int) -> dict[int, int]:
    """The memfds that a process has open: allocated bytes by inode."""
    out: dict[int, int] = {}
    with suppress(OSError):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                if os.readlink(fd).startswith("/memfd:"):
                    info = fd.stat()
                    out[info.st_ino] = info.st_blocks * 512
    return out


def _available() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
