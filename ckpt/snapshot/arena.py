"""Slots: memory that holds one pack each, reserved once as memfds sealed in size.

A memfd needs no `/dev/shm`, leaves nothing behind when its last holder dies, cannot raise SIGBUS once its pages are
allocated, and can be passed to another process.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from ckpt.errors import CapacityError

__all__ = ["Slot", "available_memory", "rounded"]

_GRAIN = 2 << 20
_TOUCH = 4 << 20  # bytes touched at once: some milliseconds, in which the interpreter's lock is held
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14


class Slot:
    """`size` bytes of page-aligned memory behind a sealed memfd. `buffer` is all of it, touched.

    With `fd`, memory that another process reserved so. Raises CapacityError, with the numbers, if this host has not
    that much memory to give.
    """

    def __init__(self, size: int, name: str = "ckpt-slot", fd: int = -1) -> None:
        self.size, self.fd = rounded(size), fd
        if fd < 0:
            self._reserve(name)
        self._map = self._mapped()
        self.buffer: npt.NDArray[np.uint8] = np.frombuffer(self._map, dtype=np.uint8)
        for at in range(0, self.size, _TOUCH):
            n = min(_TOUCH, self.size - at)
            try:
                self._map.madvise(_POPULATE_WRITE, at, n)
            except OSError:  # an older kernel
                if fd < 0:
                    self.buffer[at : at + n : mmap.PAGESIZE] = 0

    def _reserve(self, name: str) -> None:
        room = available_memory()
        if room is not None and self.size > room:
            raise CapacityError(
                f"a snapshot needs {self.size / 2**20:.0f} MiB of memory for its slot, and this host has "
                f"{room / 2**20:.0f} MiB left; free some, or save synchronously with ckpt.save"
            )
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(self.fd, 0, self.size)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        except OSError as e:
            self._refuse(e)

    def _mapped(self) -> mmap.mmap:
        try:
            return mmap.mmap(self.fd, self.size)
        except OSError as e:
            self._refuse(e)

    def _refuse(self, e: OSError) -> NoReturn:
        os.close(self.fd)
        raise CapacityError(
            f"cannot reserve {self.size / 2**20:.0f} MiB of memory for a snapshot ({e.strerror or e}); raise the limit "
            "of this process or container, or save synchronously with ckpt.save"
        ) from e

    def close(self) -> None:
        """Gives the memory back; it goes when nobody maps or holds it any more."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def rounded(size: int) -> int:
    """Bytes that a slot for a pack of `size` takes."""
    return -(-max(size, 1) // _GRAIN) * _GRAIN


def available_memory() -> int | None:
    """Bytes that this process may still take: of the host and of its control group; None if neither can be told."""
    rooms = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                rooms.append(int(line.split()[1]) << 10)
    except (OSError, ValueError):
        pass
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            rooms.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue
    return max(0, min(rooms)) if rooms else None
