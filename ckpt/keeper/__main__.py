"""`python -m ckpt.keeper NAME`: becomes the keeper of that name, detached from whoever started it.

Exits with 0 once the name is bound, by this process's child or by another keeper that was faster.
"""

from __future__ import annotations

import errno
import os
import socket
import sys

__all__ = ["main"]


def main(name: str) -> int:
    """Binds, detaches, keeps."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(f"\0{name}")
    except OSError as e:
        return 0 if e.errno == errno.EADDRINUSE else 1
    listener.listen(256)
    if os.fork():
        os._exit(0)
    listener.listen(256)  # once more: who connects is told the process that did
    os.setsid()
    os.chdir("/")
    sink = os.open(os.environ.get("CKPT_KEEPER_LOG") or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    for fd, target in ((null, 0), (sink, 1), (sink, 2)):
        os.dup2(fd, target)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # folds have threads of their own, and small sums gain nothing
    # Only now: what these load may start threads, which a fork would lose.
    import logging

    from ckpt.config import settings
    from ckpt.keeper.process import Keeper

    logging.basicConfig(format=f"%(asctime)s keeper {os.getpid()} %(levelname)s %(message)s", level=logging.INFO)
    config = settings()
    Keeper(listener, config, config.grace).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
