"""A job on several hosts, each with a keeper and a trainer of its own, which are lost whole, cut off and brought back.

In network namespaces where those are permitted; else hosts have loopback addresses, and what cuts them off is skipped.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from keepers import Trainer, gone, keeper_pids, slots_of, together, until

import ckpt
from ckpt.keeper.link import keeper_name
from examples.hosts import Hosts


class Cluster:
    """`hosts` and the lives of one run on them. The trainers of a life are ranks in the order in which it names hosts."""

    def __init__(
        self, hosts: Hosts, run: str, redundancy: ckpt.ErasureCode | ckpt.Replicas | None, **options: Any
    ) -> None:
        self.hosts, self.run, self.redundancy, self.options = hosts, run, redundancy, options
        self._lives = itertools.count()
        self.trainers: dict[int, Trainer] = {}

    def life(self, on: Sequence[int], storage: int | None = None) -> list[Trainer]:
        """Trainers on these hosts, with their Checkpointers; nobody trains any more elsewhere."""
        self.stop()
        store = f"{self.run}.life{next(self._lives)}"
        for rank, n in enumerate(on):
            self.trainers[n] = Trainer(
                self.run, store=store, rank=rank, world=len(on), env=self.hosts.environment(n),
                enter=partial(self.hosts.enter, n), redundancy=self.redundancy, **self.options,
            )  # fmt: skip
        together(self.ranks, "open", 1, storage)
        return self.ranks

    @property
    def ranks(self) -> list[Trainer]:
        return list(self.trainers.values())

    def stop(self) -> None:
        """Every trainer that is left dies, as torchrun has it when one is lost; keepers stay."""
        for trainer in self.trainers.values():
            trainer.kill()
        self.trainers.clear()

    def restore(self) -> tuple[int, str]:
        """(the step to go on with, where it came from), the same on all ranks."""
        first, *others = together(self.ranks, "restore")
        assert all(o == first for o in others)
        step, source = first
        return step, source

    def protected(self, steps: int = 1) -> int:
        """Trains on until so many more steps are announced on all ranks; the last of these."""
        before = max(together(self.ranks, "announced"))
        seen: list[int] = []

        def more() -> bool:
            sealed = together(self.ranks, "lockstep", 1)
            assert all(s == sealed[0] for s in sealed)
            newest = min(together(self.ranks, "announced"))
            if newest > max([before, *seen]):
                seen.append(newest)
            return len(seen) >= steps

        until(more, f"{steps} steps are protected")
        return seen[-1]

    def keeper(self, n: int) -> int:
        """The pid of the keeper of a host."""
        [pid] = keeper_pids(keeper_name(self.run, "", f"h{n}"))
        return pid

    def lose(self, *lost: int) -> None:
        """Hosts are gone with everything on them, all at once."""
        pids = [self.keeper(n) for n in lost]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for n in lost:
            if n in self.trainers:
                self.trainers.pop(n).kill()
            self.hosts.cut(n)
        for pid in pids:
            gone(pid)

    def said(self) -> list[str]:
        """What ckpt logged on rank 0."""
        heard: list[str] = self.ranks[0]("heard")
        return heard

    def finish(self) -> dict[str, Any]:
        """All close, and end."""
        reports = together(self.ranks, "close")
        for trainer in self.ranks:
            trainer.leave()
        self.trainers.clear()
        report: dict[str, Any] = reports[0]
        return report


def flip(pid: int, name: str, every: int = 4096) -> int:
    """Flips a bit in each so many bytes of a process's memory files whose name contains `name`; how many files."""
    files = [f for f in slots_of(pid) if name in os.readlink(f)]
    for path in files:
        with Path(path).open("r+b", buffering=0) as f:
            for at in range(every // 2, os.fstat(f.fileno()).st_size, every):
                byte = os.pread(f.fileno(), 1, at)
                os.pwrite(f.fileno(), bytes([byte[0] ^ 4]), at)
    return len(files)
