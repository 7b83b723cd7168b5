"""Named points at which tests make a process die or an operation fail.

`CKPT_FAULT="what@where[#n]"`: at the n-th (default 1st) passing of a point whose name starts with `where`,
do `what`: kill (SIGKILL of this process), stop (SIGSTOP), or an errno name such as EIO, ENOSPC.
`where` may be empty (every point). `CKPT_FAULT_RANK` restricts it to one RANK.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable

__all__ = ["install", "point"]

_hook: Callable[[str], None] | None = None


def point(name: str) -> None:
    """Passes a named point; does nothing unless a fault was planned for it."""
    if _hook is not None:
        _hook(name)


def install(hook: Callable[[str], None] | None) -> None:
    """Replaces the hook that every point calls; None removes it."""
    global _hook
    _hook = hook


def _planned(spec: str) -> Callable[[str], None]:
    what, _, rest = spec.partition("@")
    where, _, nth = rest.partition("#")
    left = [int(nth or 1)]
    lock = threading.Lock()

    def hook(name: str) -> None:
        if not name.startswith(where):
            return
        with lock:
            left[0] -= 1
            if left[0] != 0:
                return
        if what in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGSTOP)
        else:
            code = getattr(errno, what)
            raise OSError(code, os.strerror(code), name)

    return hook


if os.environ.get("CKPT_FAULT") and os.environ.get("CKPT_FAULT_RANK", os.environ.get("RANK", "0")) == os.environ.get(
    "RANK", "0"
):
    install(_planned(os.environ["CKPT_FAULT"]))
