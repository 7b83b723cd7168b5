"""What this disk can do at best: the same number of bytes from warm memory, past the page cache, made durable."""

from __future__ import annotations

import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

BLOCK = 8 << 20
THREADS = 2


@dataclass(frozen=True)
class DiskTime:
    """One raw write."""

    bytes: int
    seconds: float
    direct: bool

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.bytes / self.seconds


def measure(directory: Path, size: int) -> DiskTime:
    """Write `size` bytes with two threads, each into a file of its own, and fsync; the files are removed."""
    directory.mkdir(parents=True, exist_ok=True)
    share = -(-size // THREADS // mmap.PAGESIZE) * mmap.PAGESIZE
    buffers = [mmap.mmap(-1, BLOCK) for _ in range(THREADS)]
    for buffer in buffers:  # touch every page before the clock starts; zeros could be left out by a clever disk
        buffer.write(os.urandom(BLOCK))
    paths = [directory / f"disk-limit-{i}.tmp" for i in range(THREADS)]
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            begin = time.perf_counter()
            direct = list(pool.map(_write, paths, buffers, [share] * THREADS))
            seconds = time.perf_counter() - begin
    finally:
        for path in paths:
            path.unlink(missing_ok=True)
    return DiskTime(share * THREADS, seconds, all(direct))


def _write(path: Path, buffer: mmap.mmap, size: int) -> bool:
    """Returns whether the filesystem took direct I/O."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        file, direct = os.open(path, flags | os.O_DIRECT, 0o644), True
    except OSError:
        file, direct = os.open(path, flags, 0o644), False
    try:
        with memoryview(buffer) as view:
            for at in range(0, size, BLOCK):
                os.pwrite(file, view[: min(BLOCK, size - at)], at)
        os.fsync(file)
    finally:
        os.close(file)
    return direct
