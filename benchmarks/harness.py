"""Ranks, rounds and ratios: what every benchmark shares.

A `World` keeps its worker processes alive over all contestants and rounds, so that nothing pays for start-up, imports
or first-touched heaps but the warm-up round. A contestant that raises or hangs takes its world with it: the reason is
recorded and printed in its row, the world starts again, and the rounds go on without it.
"""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import resource
import shutil
import socket
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist

from benchmarks.state import TrainingState, build_state

__all__ = [
    "Failed",
    "Rank",
    "Rounds",
    "Sample",
    "World",
    "drop_caches",
    "empty",
    "read_bytes",
    "rotated",
    "settle",
    "warm_up",
]

DEADLINE = 600.0


@dataclass
class Sample:
    """One timed turn of one contestant, over all ranks of its world."""

    seconds: float
    cpu_seconds: float
    read_bytes: int
    extra: dict[str, Any] = field(default_factory=dict)


class Failed(RuntimeError):
    """A contestant raised or passed its deadline on some rank."""


# --- inside a worker ------------------------------------------------------------------------------------------------


@dataclass
class Rank:
    """What a worker process keeps: its place, its live state, and one object per contestant."""

    rank: int
    world: int
    state: TrainingState
    kept: dict[str, Any] = field(default_factory=dict)

    def timed(self, call: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
        """Runs `call` once all ranks are ready; times are on the machine's one monotonic clock."""
        gc.collect()
        dist.barrier()
        cpu, read, start = _cpu_seconds(), read_bytes(), time.perf_counter()
        extra = call()
        end = time.perf_counter()
        return {
            "start": start,
            "end": end,
            "cpu": _cpu_seconds() - cpu,
            "read": read_bytes() - read,
            "extra": extra or {},
        }


def _cpu_seconds() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def read_bytes() -> int:
    """Bytes that this process took through read calls, from cache or disk. Memory-mapped reads do not show."""
    with open("/proc/self/io") as f:
        return int(f.readline().split()[1])


def _worker(rank: int, world: int, port: int, gib: float, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world)
        context = Rank(rank, world, build_state(gib, world))
        pipe.send((True, context.state.local_bytes))
        while (message := pipe.recv()) is not None:
            function, arguments = message
            pipe.send((True, function(context, *arguments)))
    except EOFError:
        pass
    except BaseException as error:
        lines = traceback.format_exception_only(error)
        with suppress(OSError):
            pipe.send((False, lines[0].strip()))
    finally:
        # Exit handlers of a broken process group can hang; the parent has all it needs.
        os._exit(0)


# --- in the parent --------------------------------------------------------------------------------------------------


class World:
    """`ranks` worker processes in one gloo group, each with its part of a state of `gib`; `patience`: seconds that one call
    may take."""

    def __init__(self, ranks: int, gib: float, patience: float = DEADLINE) -> None:
        self.ranks, self.gib, self.patience = ranks, gib, patience
        self.local_bytes: list[int] = []
        self._start()

    @property
    def nbytes(self) -> int:
        """Bytes of the whole state."""
        return sum(self.local_bytes)

    def _start(self) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        spawn = mp.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(self.ranks):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_worker, args=(rank, self.ranks, port, self.gib, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self.local_bytes = self._collect("start", DEADLINE)

    def call(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Runs `function(Rank, *arguments)` on every rank; the results by rank. Raises Failed, and starts again."""
        try:
            for pipe in self._pipes:
                pipe.send((function, arguments))
            return self._collect(function.__name__, self.patience)
        except (Failed, OSError) as error:
            self.close(patience=0)
            self._start()
            raise error if isinstance(error, Failed) else Failed(f"a rank died: {error}") from error

    def timed(self, function: Callable[..., dict[str, Any]], *arguments: Any) -> Sample:
        """As `call`, for functions that return what `Rank.timed` does."""
        parts = self.call(function, *arguments)
        extra: dict[str, Any] = {}
        for part in parts:
            for key, value in part["extra"].items():
                extra[key] = extra[key] + value if isinstance(value, int) and key in extra else value
        return Sample(
            seconds=max(p["end"] for p in parts) - min(p["start"] for p in parts),
            cpu_seconds=sum(p["cpu"] for p in parts),
            read_bytes=sum(p["read"] for p in parts),
            extra=extra,
        )

    def _collect(self, what: str, patience: float) -> list[Any]:
        until = time.monotonic() + patience
        results: dict[int, Any] = {}
        while len(results) < self.ranks:
            waiting = [p for r, p in enumerate(self._pipes) if r not in results]
            ready = mp.connection.wait(waiting, timeout=max(0.0, until - time.monotonic()))
            if not ready:
                raise Failed(f"{what} did not return within {patience:.0f} s")
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    ok, value = pipe.recv()
                except EOFError:
                    raise Failed(f"rank {rank} died in {what}") from None
                if not ok:
                    raise Failed(value)
                results[rank] = value
        return [results[r] for r in range(self.ranks)]

    def close(self, patience: float = 10) -> None:
        for pipe in self._pipes:
            with suppress(OSError):
                pipe.send(None)
            pipe.close()
        for process in self._processes:
            process.join(timeout=patience)
            if process.is_alive():
                process.kill()
                process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class Rounds:
    """The samples of one table: `samples[name]` has one entry a round, None once the contestant has failed."""

    nbytes: int
    limits: list[str]
    samples: dict[str, list[Sample | None]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def run(
        self, names: Sequence[str], rounds: int, turn: Callable[[int, str], Sample], seconds: float = float("inf")
    ) -> Rounds:
        """`rounds` measured rounds after one that is dropped, or as many whole ones as begin within `seconds` (one, if need
        be); `turn(round, name)` is one turn of one contestant."""
        began = time.monotonic()
        for name in names:
            self.samples.setdefault(name, [])
        for number in range(rounds + 1):
            if number > 1 and time.monotonic() - began > seconds:
                break
            for name in rotated(names, number):
                sample = None
                if name not in self.failures:
                    try:
                        sample = turn(number, name)
                    except Failed as failure:
                        self.failures[name] = str(failure)
                if number:
                    self.samples[name].append(sample)
        return self

    def limit_seconds(self) -> list[float]:
        """The best of the limit's variants in each round."""
        columns = zip(*(self.samples[name] for name in self.limits), strict=True)
        return [min(s.seconds for s in column if s) for column in columns]

    def steady_limit(self) -> str:
        """The variant of the limit that is fastest in the median over rounds."""
        return min(self.limits, key=lambda name: statistics.median(s.seconds for s in self.samples[name] if s))

    def ratios(self, name: str, *, steady: bool = False) -> list[float]:
        """Speed over the limit's speed, by round: against the round's best variant, or against `steady_limit`.

        The best of several noisy variants is more than any single one reaches; the two bracket the truth.
        """
        if steady:
            limit = [s.seconds for s in self.samples[self.steady_limit()] if s]
        else:
            limit = self.limit_seconds()
        return [a / s.seconds for a, s in zip(limit, self.samples[name], strict=True) if s]

    def limit_note(self, name: str) -> str:
        """What the limit is, and how `name` stands to the one variant that is best over all rounds."""
        steady = self.steady_limit().removeprefix("limit: ")
        text = f"The limit is the best variant of each round; over all rounds that is '{steady}'"
        ratios = self.ratios(name, steady=True) if name in self.samples else []
        return text + (f", of which {name} reaches {statistics.median(ratios):.2f}." if ratios else ".")

    def median(self, name: str, what: Callable[[Sample], float]) -> float:
        return statistics.median(what(s) for s in self.samples[name] if s)

    def to_json(self) -> dict[str, Any]:
        samples = {name: [s and asdict(s) for s in column] for name, column in self.samples.items()}
        return {"nbytes": self.nbytes, "limits": self.limits, "failures": self.failures, "samples": samples}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Rounds:
        samples = {name: [Sample(**s) if s else None for s in column] for name, column in data["samples"].items()}
        return cls(data["nbytes"], data["limits"], samples, data["failures"])


def rotated(names: Sequence[str], number: int) -> list[str]:
    """The order of round `number`: every contestant has every place in turn."""
    shift = number % len(names)
    return [*names[shift:], *names[:shift]]


def settle() -> None:
    """Lets the disk finish what is none of the next contestant's business."""
    os.sync()


def empty(folder: Path) -> None:
    """Removes what is in a folder."""
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def warm_up(path: Path) -> None:
    """Reads every file under `path`, so that all of it is in the page cache."""
    buffer = bytearray(8 << 20)
    for file in _files(path):
        with open(file, "rb", buffering=0) as f:
            while f.readinto(buffer):
                pass


def drop_caches(path: Path) -> str:
    """Makes the files under `path` cold; says by what means."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return "drop_caches"
    except OSError:
        for file in _files(path):
            with open(file, "rb") as f:
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return "posix_fadvise(DONTNEED)"


def _files(path: Path) -> list[Path]:
    return [p for p in sorted(path.rglob("*")) if p.is_file()]
