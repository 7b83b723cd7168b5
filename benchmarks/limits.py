"""The physical limits: the same bytes, from and into buffers that are ready, by the shortest way the machine has.

Each limit is a contestant like any other, in the same rounds: a contestant's ratio is always to a number of its own
round. Buffers are page-aligned, hold as many bytes as the rank's state, and have been touched before anything is timed.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Rank

__all__ = ["MEMCPY", "limits", "read_limits", "release", "write_limits"]

PAGE = 4096
MIB = 1 << 20
MEMCPY = "limit: memcpy"


@cache
def _buffer(nbytes: int) -> memoryview:
    """A warm anonymous buffer of random bytes, rounded up to whole pages; one for the life of the process."""
    size = -(-nbytes // PAGE) * PAGE
    view = memoryview(mmap.mmap(-1, size))
    array = np.frombuffer(view, dtype=np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, min(size, 8 << 20), dtype=np.uint8)
    for at in range(0, size, len(noise)):
        piece = array[at : at + len(noise)]
        piece[:] = noise[: len(piece)]
    return view


def release() -> None:
    """Gives the buffers back, once no contestant holds them."""
    _buffer.cache_clear()


def _in_threads(threads: int, blocks: int, work: Callable[[int], None]) -> None:
    """`work(block)` for every block; each thread takes the next one that is free."""
    todo = iter(range(blocks))
    lock = threading.Lock()
    failures: list[BaseException] = []

    def loop() -> None:
        try:
            while True:
                with lock:
                    block = next(todo, None)
                if block is None:
                    return
                work(block)
        except BaseException as error:
            failures.append(error)

    others = [threading.Thread(target=loop) for _ in range(threads - 1)]
    for thread in others:
        thread.start()
    loop()
    for thread in others:
        thread.join()
    if failures:
        raise failures[0]


class WriteLimit:
    """Direct writes into an allocated file, then fsync of it: nothing copied, nothing computed."""

    def __init__(self, rank: Rank, threads: int, block: int) -> None:
        self.rank, self.threads, self.block = rank, threads, block
        self.buffer = _buffer(rank.state.local_bytes)

    def save(self, path: Path) -> None:
        size = len(self.buffer)
        fd = os.open(path / f"rank-{self.rank.rank}", os.O_CREAT | os.O_WRONLY | os.O_DIRECT, 0o644)
        try:
            os.posix_fallocate(fd, 0, size)

            def write(number: int) -> None:
                at, end = number * self.block, min((number + 1) * self.block, size)
                while at < end:
                    at += os.pwrite(fd, self.buffer[at:end], at)

            _in_threads(self.threads, -(-size // self.block), write)
            os.fsync(fd)
        finally:
            os.close(fd)


class ReadLimit:
    """Reads of the files of `WriteLimit` into the warm buffer, through the page cache or around it."""

    def __init__(self, rank: Rank, threads: int, block: int, *, direct: bool) -> None:
        self.rank, self.threads, self.block, self.direct = rank, threads, block, direct
        self.buffer = _buffer(rank.state.local_bytes)

    def load(self, path: Path) -> None:
        size = len(self.buffer)
        fd = os.open(path / f"rank-{self.rank.rank}", os.O_RDONLY | (os.O_DIRECT if self.direct else 0))
        try:

            def read(number: int) -> None:
                at, end = number * self.block, min((number + 1) * self.block, size)
                while at < end:
                    at += os.preadv(fd, [self.buffer[at:end]], at)

            _in_threads(self.threads, -(-size // self.block), read)
        finally:
            os.close(fd)


class Memcpy:
    """Copies the state into a warm buffer, with torch's own threads: the least that any snapshot costs."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self.buffer = _buffer(rank.state.local_bytes)

    def save(self, path: Path) -> dict[str, Any] | None:
        out = torch.frombuffer(self.buffer, dtype=torch.uint8)
        at = 0
        for tensor in self.rank.state.local().values():
            out[at : at + tensor.nbytes].copy_(tensor.contiguous().view(-1).view(torch.uint8))
            at += tensor.nbytes
        return None


def write_limits(ranks: int) -> dict[str, Callable[[Rank], Any]]:
    """Two threads for one rank; one or two a rank for more."""
    ways = [(2, 4), (2, 8)] if ranks == 1 else [(1, 8), (2, 4)]
    return {
        f"limit: direct write, {_threads(t, ranks)}, {b} MiB": lambda rank, t=t, b=b: WriteLimit(rank, t, b * MIB)
        for t, b in ways
    }


def read_limits(ranks: int, *, cold: bool) -> dict[str, Callable[[Rank], Any]]:
    """Two threads for one rank, else one a rank; from the page cache, and when cold also around it."""
    t = 2 if ranks == 1 else 1
    ways = [(False, 8), (True, 8)] if cold else [(False, 1), (False, 8)]
    return {
        f"limit: {'direct' if d else 'buffered'} read, {_threads(t, ranks)}, {b} MiB": (
            lambda rank, d=d, b=b: ReadLimit(rank, t, b * MIB, direct=d)
        )
        for d, b in ways
    }


def limits(ranks: int) -> dict[str, Callable[[Rank], Any]]:
    """Every limit of a world of that many ranks."""
    return {
        MEMCPY: Memcpy,
        **write_limits(ranks),
        **read_limits(ranks, cold=False),
        **read_limits(ranks, cold=True),
    }


def _threads(threads: int, ranks: int) -> str:
    count = f"{threads} thread" + "s" * (threads > 1)
    return count if ranks == 1 else f"{count} a rank"
