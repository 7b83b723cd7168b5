"""A trainer's line to the keeper of its host: found or started, then one socket, one reading thread."""

from __future__ import annotations

import errno
import hashlib
import itertools
import logging
import os
import select
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

from ckpt.errors import CkptError, DeadlineError, PeerError, from_wire
from ckpt.keeper.protocol import Connection, Frame, frame, own_peer, receive, send

__all__ = ["Link", "keeper_name"]

log = logging.getLogger("ckpt")
_SEND = 30.0  # seconds after which a keeper that reads nothing counts as gone
_LAST_WORDS = 5.0  # seconds in which what it said before it hung up is read


def keeper_name(run: str, job: str, host: str) -> str:
    """The name of a job's keeper on a host: an abstract socket, which the kernel removes with its last holder."""
    what = job or (os.path.realpath(run) if "://" not in run else run)
    digest = hashlib.blake2b(what.encode(), digest_size=8).hexdigest()
    return f"ckpt-{os.getuid()}-{digest}-{host or socket.gethostname()}"[:100]


class Link:
    """Connected on construction; starts the keeper if there is none, as a process or, where that fails, as a thread.

    heard   called in the reading thread with every frame that answers nothing
    ended   called in the reading thread, once, when the keeper is gone

    Raises PeerError if there is no keeper and none can be started.
    """

    def __init__(self, name: str, heard: Callable[[Frame], None], ended: Callable[[CkptError], None]) -> None:
        self._heard, self._ended = heard, ended
        self._sock = _connect(name)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(_SEND), 0))
        self.keeper_pid = own_peer(self._sock)
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._asked: dict[int, Future[Frame]] = {}
        self._closing = False
        self.in_use = False  # from the first answer on the loss of the keeper is news
        self.lost: CkptError | None = None
        threading.Thread(target=self._read, name="ckpt-keeper-link", daemon=True).start()

    def ask(self, kind: str, payload: bytes = b"", fds: Sequence[int] = (), *, timeout: float, **head: Any) -> Frame:
        """Sends a frame and waits for its answer. Raises what the keeper refused with; PeerError, DeadlineError."""
        number, answer = next(self._numbers), Future[Frame]()
        self._asked[number] = answer
        try:
            try:
                self.tell(kind, payload, fds, id=number, **head)
            except PeerError as e:
                raise self._last_words(answer) or e from None
            return answer.result(timeout)
        except TimeoutError as e:
            if isinstance(e, CkptError):
                raise
            raise DeadlineError(f"the keeper did not answer {kind!r} within {timeout:.0f} s; is it stopped?") from None
        finally:
            self._asked.pop(number, None)

    def _last_words(self, answer: Future[Frame]) -> BaseException | None:
        """What a keeper that hung up in the middle of a question had to say before, if anything."""
        if self.lost is not None:
            return self.lost
        with suppress(TimeoutError):
            return answer.exception(_LAST_WORDS)
        return None

    def tell(self, kind: str, payload: bytes = b"", fds: Sequence[int] = (), **head: Any) -> None:
        """Sends a frame. Raises PeerError if the keeper is gone."""
        with self._lock:
            if self.lost is not None:
                raise self.lost
            try:
                send(self._sock, frame(kind, payload, fds, **head))
            except CkptError as e:
                with suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)  # half a frame may be out
                raise PeerError(f"lost the keeper, process {self.keeper_pid}: {e}") from None

    def try_to_tell(self, kind: str) -> None:
        """Sends a frame if the keeper is there."""
        with suppress(CkptError):
            self.tell(kind)

    def mention(self, kind: str, **head: Any) -> bool:
        """Sends a small frame if that takes no waiting; says whether it did."""
        if self.lost is not None or not self._lock.acquire(blocking=False):
            return False
        try:
            if not select.select((), (self._sock,), (), 0)[1]:
                return False
            send(self._sock, frame(kind, **head))
            return True
        except (CkptError, OSError, ValueError):  # a socket that was closed just now
            return False
        finally:
            self._lock.release()

    def close(self) -> None:
        """Hangs up."""
        self._closing = True
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _read(self) -> None:
        connection = Connection(self._sock)
        error: CkptError
        try:
            while True:
                message = receive(self._sock, connection)
                if message.kind == "answer":
                    waiting = self._asked.get(message["id"])
                    if waiting is not None:
                        waiting.set_result(message)
                elif message.kind == "refused":
                    error = from_wire(*message["error"])
                    break
                else:
                    self._heard(message)
        except CkptError as e:
            error = PeerError(f"lost the keeper, process {self.keeper_pid}: {e}")
        self.lost = error
        connection.close()
        for waiting in list(self._asked.values()):
            if not waiting.done():
                waiting.set_exception(error)
        if self.in_use and not self._closing:
            self._ended(error)


def _connect(name: str) -> socket.socket:
    for attempt in range(3):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(f"\0{name}")
            return sock
        except OSError as e:
            sock.close()
            if attempt == 2:
                raise PeerError(f"the keeper {name!r} does not answer ({e.strerror or e})") from None
        try:
            _start(name)
        except PeerError as e:
            _keep_here(name, e)
    raise AssertionError("unreachable")


def _keep_here(name: str, why: PeerError) -> None:
    """What a keeper does, in a thread of this trainer, for all trainers of this host. Raises PeerError if that cannot be,
    either; returns once the name is bound, here or by who was faster."""
    from ckpt.config import settings
    from ckpt.keeper.process import Keeper

    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(f"\0{name}")
        listener.listen(256)
        config = settings()
        keeper = Keeper(listener, config, config.grace)
        threading.Thread(target=keeper.run, name="ckpt-keeper", daemon=True).start()
    except (OSError, RuntimeError) as e:
        listener.close()
        if isinstance(e, OSError) and e.errno == errno.EADDRINUSE:
            return
        raise PeerError(f"{why}; nor can a thread of this process do its work: {e}") from None
    log.warning(
        "ckpt: %s; a thread of this process (%d) does its work: snapshots in memory last no longer than this process",
        why, os.getpid(),
    )  # fmt: skip


def _start(name: str) -> None:
    """Starts a keeper in a session of its own; returns once its name is bound."""
    home = str(Path(__file__).parents[2])
    path = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "ckpt.keeper", name],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise PeerError(f"no keeper could be started: {e}") from None
    if done.returncode:
        raise PeerError(f"no keeper could be started: {done.stderr.decode(errors='replace')[-500:]}")
