"""Settings, validated at construction. The one place where environment variables are named."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from ckpt.errors import UsageError

__all__ = ["ErasureCode", "Every", "Replicas", "Settings", "check_choices", "settings", "undisturbed"]


@dataclass(frozen=True)
class Every:
    """When to save: after each `steps` iterations, or `minutes` since the last save, or both (whichever comes first).

    `Every(k)` fires at step n when (n + 1) % k == 0, so that the step number counts finished iterations from 0.
    """

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise UsageError("Every needs steps or minutes, as in Every(200) or Every(minutes=30)")
        if self.steps is not None and not _whole(self.steps):
            raise UsageError(f"Every(steps={self.steps!r}): a whole number of steps, 1 or more")
        if self.minutes is not None and not self.minutes > 0:
            raise UsageError(f"Every(minutes={self.minutes!r}): a positive number of minutes")

    def due(self, step: int, last: float) -> bool:
        """Whether to save after `step`, the last save having been at monotonic time `last` (seconds)."""
        by_step = self.steps is not None and (step + 1) % self.steps == 0
        return by_step or (self.minutes is not None and time.monotonic() - last >= 60 * self.minutes)


@dataclass(frozen=True)
class ErasureCode:
    """Snapshots in memory outlive any `parity` of `data` + `parity` hosts, for parity / data of their size in parity.

    Raises UsageError unless there are 1 or more of each and at most 255 of both.
    """

    data: int
    parity: int

    def __post_init__(self) -> None:
        for name in ("data", "parity"):
            if not _whole(getattr(self, name)):
                raise UsageError(f"ErasureCode({name}={getattr(self, name)!r}): a whole number of hosts, 1 or more")
        if self.data + self.parity > 255:
            raise UsageError(f"{self}: at most 255 hosts in all; groups of some 8 hosts, as of 6 + 2, are usual")


@dataclass(frozen=True)
class Replicas:
    """Snapshots in memory are kept whole on `copies` hosts, their own among them, and outlive any `copies` - 1 of these.

    Raises UsageError unless there are 2 to 255 copies.
    """

    copies: int

    def __post_init__(self) -> None:
        if not _whole(self.copies) or not 2 <= self.copies <= 255:
            raise UsageError(
                f"Replicas({self.copies!r}): a whole number of copies, 2 to 255, the host's own among them"
            )


def check_choices(
    storage: Every | None,
    memory: Every | None,
    redundancy: ErasureCode | Replicas | None,
    max_stale: float | None,
    *,
    averages: bool,
    local: bool,
) -> None:
    """What a Checkpointer was asked for, as far as one choice needs another; `averages`, `local`: whether there are such.

    Raises UsageError.
    """
    if storage is None and memory is None:
        raise UsageError("storage=ckpt.Every(n), memory=ckpt.Every(n) or both: say when to save")
    if redundancy is not None and memory is None:
        raise UsageError(f"redundancy={redundancy} protects what is in memory: give memory=ckpt.Every(n), too")
    if not isinstance(redundancy, ErasureCode | Replicas | None):
        raise UsageError(f"redundancy={redundancy!r}: a ckpt.ErasureCode, a ckpt.Replicas or None")
    if max_stale is not None and not max_stale > 0:
        raise UsageError(f"max_stale={max_stale!r}: a positive number of seconds")
    if local and storage is None:
        raise UsageError("local= is a tier before the storage: give storage=ckpt.Every(n), too")
    if averages and memory is None:
        raise UsageError("averages= are folded by the keeper, from snapshots in memory: give memory=ckpt.Every(n), too")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@dataclass(frozen=True)
class Settings:
    """What may be tuned from outside a training script.

    deadline      CKPT_DEADLINE      seconds that a rank waits for the others at one point of a save (600)
    buffer_mib    CKPT_BUFFER_MIB    MiB of one staging buffer (16)
    buffers       CKPT_BUFFERS       staging buffers a rank reserves at its first save (4)
    writers       CKPT_WRITERS       threads that write a pack (3)
    readers       CKPT_READERS       threads that read; 0: the cores of this host over its ranks, at most 4, or 3 past the cache (0)
    direct        CKPT_DIRECT        1: write with direct I/O where the filesystem allows it (1)
    copy_gbps     CKPT_COPY_GBPS     GB/s at which a snapshot is copied beside training; 0: as fast as it goes (0)
    check_copies  CKPT_CHECK_COPIES  1: hash samples before and after such a copy, and name what changed (0)
    grace         CKPT_GRACE         seconds that a keeper waits for a restart after its last trainer died (300)
    job           CKPT_JOB           name of the job, where the run's URL does not tell jobs apart ("")
    host          CKPT_HOST          name of this host among those of the job ("": its hostname)
    bind          CKPT_BIND          address at which this host's keeper serves other hosts ("": towards the rendezvous)
    domain        CKPT_DOMAIN        what may fail together with this host, such as its rack ("": only itself)
    protect_gbps  CKPT_PROTECT_GBPS  GB/s that a keeper sends to others for protection; 0: as fast as it goes (0)
    protect_patience  CKPT_PROTECT_PATIENCE  seconds without a byte after which protecting a step begins anew (30)
    """

    deadline: float = 600.0
    buffer_mib: int = 16
    buffers: int = 4
    writers: int = 3
    readers: int = 0
    direct: bool = True
    copy_gbps: float = 0.0
    check_copies: bool = False
    grace: float = 300.0
    job: str = ""
    host: str = ""
    bind: str = ""
    domain: str = ""
    protect_gbps: float = 0.0
    protect_patience: float = 30.0

    def __post_init__(self) -> None:
        if not self.deadline > 0:
            raise UsageError("CKPT_DEADLINE: a positive number of seconds")
        if not 1 <= self.buffer_mib <= 256 or not 2 <= self.buffers <= 64:
            raise UsageError("CKPT_BUFFER_MIB: 1 to 256; CKPT_BUFFERS: 2 to 64")
        if not 1 <= self.writers <= 64 or not 0 <= self.readers <= 64:
            raise UsageError("CKPT_WRITERS: 1 to 64; CKPT_READERS: 0 to 64")
        if not self.grace >= 0:
            raise UsageError("CKPT_GRACE: 0 or more seconds")
        if not self.copy_gbps >= 0:
            raise UsageError("CKPT_COPY_GBPS: 0 or more GB/s")
        if not self.protect_gbps >= 0 or not self.protect_patience > 0:
            raise UsageError("CKPT_PROTECT_GBPS: 0 or more GB/s; CKPT_PROTECT_PATIENCE: a positive number of seconds")


def settings(env: Mapping[str, str] | None = None) -> Settings:
    """The settings in force now, from the environment. Raises UsageError, naming the variable, for a bad value."""
    env = os.environ if env is None else env
    default = Settings()
    out: dict[str, float | int | bool | str] = {}
    for field, kind in (
        ("deadline", float),
        ("buffer_mib", int),
        ("buffers", int),
        ("writers", int),
        ("readers", int),
        ("copy_gbps", float),
        ("grace", float),
        ("job", str),
        ("host", str),
        ("bind", str),
        ("domain", str),
        ("protect_gbps", float),
        ("protect_patience", float),
    ):
        text = env.get(f"CKPT_{field.upper()}")
        if text is not None:
            try:
                out[field] = kind(text)
            except ValueError:
                raise UsageError(f"CKPT_{field.upper()}={text!r}: not a number") from None
    out["direct"] = env.get("CKPT_DIRECT", "1") not in ("0", "false", "no")
    out["check_copies"] = env.get("CKPT_CHECK_COPIES", "0") not in ("0", "false", "no")
    return Settings(**{**default.__dict__, **out})


@contextmanager
def undisturbed() -> Iterator[None]:
    """For the seconds of a save's or load's I/O: keeps the garbage collector from walking a training program's whole
    heap, and lets a thread that comes back from the disk wait for the interpreter's lock for half a millisecond
    instead of five."""
    collecting, interval = gc.isenabled(), sys.getswitchinterval()
    gc.disable()
    sys.setswitchinterval(min(interval, 0.0005))
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        if collecting:
            gc.enable()
