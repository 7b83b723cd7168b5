"""Sockets between the ranks of one load, over which they pass on what they read.

Opened for the load and closed with it. A rank proves with a secret of the job's own channel that it is one of them; what
it sends is checked against the manifest like any other bytes. No more than one message of each rank waits in memory
beyond what a turn of the load has room for: who is ahead waits in `send`.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
import threading
import time
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ckpt.config import settings
from ckpt.errors import CkptError, DeadlineError, PeerError, from_wire, to_wire
from ckpt.keeper.member import own_address

__all__ = ["PLACE", "Wire"]

Ints = npt.NDArray[np.int64]
PLACE = np.dtype([("pack", "<u4"), ("n", "<u4"), ("lo", "<u8")])
"""Bytes of a pack: `n` from `lo` on."""

_HEAD = struct.Struct("<cIIQ")  # what it is, the turn, how many places, bytes
_ERROR = 1 << 20


@dataclass
class Wire:
    """The sockets of one rank for one load, and what came over them."""

    rank: int
    addresses: list[tuple[str, int]] = field(default_factory=list)
    _token: bytes = b""
    _turn: int = -1
    _over: bool = False
    _failed: CkptError | None = None

    def __post_init__(self) -> None:
        self._deadline = settings().deadline
        self._changed = threading.Condition()
        self._ready = threading.Event()
        self._here: dict[int, list[tuple[int, memoryview]]] = {}
        self._to: dict[int, tuple[socket.socket | None, threading.Lock]] = {}
        self._opening = threading.Lock()
        self._open: list[socket.socket] = []
        self._left: Ints = np.zeros((0, 0), np.int64)

    def listen(self) -> tuple[str, int]:
        """Where the others reach this rank."""
        self._listener = socket.create_server((own_address(settings().bind), 0), backlog=256)
        threading.Thread(target=self._accept, name="ckpt-exchange", daemon=True).start()
        host, port = self._listener.getsockname()[:2]
        return str(host), int(port)

    def begin(self, addresses: list[tuple[str, int]], token: bytes, expected: Ints) -> None:
        """`expected`: how many ranges will come, by rank and turn."""
        self.addresses, self._token, self._left = addresses, token, expected.copy()
        self._ready.set()

    # What comes.

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                threading.Thread(target=self._hear, args=(sock,), name="ckpt-exchange", daemon=True).start()

    def _hear(self, sock: socket.socket) -> None:
        """One rank's messages. Who does not know the token is not heard."""
        sock.settimeout(self._deadline)
        with self._changed:
            self._open.append(sock)
        sender, done = -1, False
        try:
            nonce = secrets.token_bytes(16)
            sock.sendall(nonce)
            hello = _receive(sock, 36)
            if not self._ready.wait(self._deadline) or not hmac.compare_digest(
                bytes(hello[:32]), _proof(self._token, nonce, bytes(hello[32:]))
            ):
                return
            sender = int.from_bytes(hello[32:], "little")
            while not done:
                done = self._message(sock, sender)
        except Exception as e:
            if sender >= 0 and not self._over:
                self._fail(
                    PeerError(f"the exchange with rank {sender} broke off ({e}); it stopped, or is out of reach")
                )
        finally:
            sock.close()

    def _message(self, sock: socket.socket, sender: int) -> bool:
        """Whether it was the last one."""
        kind, turn, count, size = _HEAD.unpack(_receive(sock, _HEAD.size))
        if kind == b"D":
            return True
        if kind == b"E":
            name, _, text = bytes(_receive(sock, min(size, _ERROR))).decode().partition(" ")
            self._fail(from_wire(name, text))
            return True
        places = np.frombuffer(_receive(sock, count * PLACE.itemsize), PLACE)
        if size != int(places["n"].sum()):
            raise ValueError("a message that makes no sense")
        with self._changed:  # of a later turn there is no room yet
            if not self._changed.wait_for(lambda: self._turn >= turn or self._over, self._deadline) or self._over:
                return True
        views = [_receive(sock, int(n)) for n in places["n"]]
        self.put(places, views)
        with self._changed:
            self._left[sender, turn] -= 1
            self._changed.notify_all()
        return False

    def put(self, places: npt.NDArray[Any], views: Sequence[memoryview]) -> None:
        with self._changed:
            for place, view in zip(places, views, strict=True):
                self._here.setdefault(int(place["pack"]), []).append((int(place["lo"]), view))

    def pieces(self, pack: int, lo: int, hi: int) -> list[tuple[int, memoryview]]:
        """What is here of a range of a pack, once all of the turn is."""
        found = self._here.get(pack, [])
        first = bisect_left(found, hi, key=lambda p: p[0])
        out = []
        while first and found[first - 1][0] + len(found[first - 1][1]) > lo:
            first -= 1
            out.append(found[first])
        return out[::-1]

    def drop(self) -> None:
        with self._changed:
            self._here.clear()

    def turn_to(self, turn: int) -> None:
        with self._changed:
            self._turn = turn
            self._changed.notify_all()

    def all_here(self, turn: int) -> None:
        """Waits until all of a turn has come. Raises what another rank failed with."""
        until = time.monotonic() + self._deadline
        with self._changed:
            while self._left[:, turn].any():
                if self._failed is not None:
                    raise self._failed
                if not self._changed.wait(max(0.0, until - time.monotonic())) and time.monotonic() >= until:
                    late = np.flatnonzero(self._left[:, turn]).tolist()
                    raise DeadlineError(f"exchange: nothing came from rank {late[0]} within {self._deadline:.0f} s")
            for pieces in self._here.values():
                pieces.sort(key=lambda p: p[0])

    def _fail(self, e: CkptError) -> None:
        with self._changed:
            self._failed = self._failed or e
            self._changed.notify_all()

    # What goes.

    def send(self, to: int, turn: int, places: npt.NDArray[Any], views: Sequence[memoryview]) -> None:
        """Ranges for another rank. If it is gone, what it missed is for it to tell."""
        head = _HEAD.pack(b"P", turn, len(places), sum(map(len, views)))
        self._say(to, head + places.tobytes(), *views)

    def _say(self, to: int, *parts: bytes | memoryview) -> None:
        with self._opening:
            if to not in self._to:
                self._to[to] = self._connect(to), threading.Lock()
        sock, lock = self._to[to]
        if sock is None:
            return
        with lock:
            try:
                for part in parts:
                    sock.sendall(part)
            except OSError:
                self._to[to] = None, lock

    def _connect(self, to: int) -> socket.socket | None:
        host, port = self.addresses[to]
        try:
            sock = socket.create_connection((host, port), timeout=self._deadline)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            nonce, me = bytes(_receive(sock, 16)), self.rank.to_bytes(4, "little")
            sock.sendall(_proof(self._token, nonce, me) + me)
        except (OSError, ConnectionError):
            return None
        return sock

    def tell_failure(self, e: Exception) -> None:
        """All ranks hear of it, whatever they wait for."""
        kind, text = to_wire(e)
        said = f"{kind} {text if text.startswith('rank ') else f'rank {self.rank}: {text}'}".encode()
        for to in range(len(self.addresses)):
            if to != self.rank:
                self._say(to, _HEAD.pack(b"E", 0, 0, len(said)), said)

    def finish(self) -> None:
        for to in list(self._to):
            self._say(to, _HEAD.pack(b"D", 0, 0, 0))

    def close(self) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()
        listener = getattr(self, "_listener", None)
        if listener is not None:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self._ready.set()
        for sock, _ in self._to.values():
            if sock is not None:
                sock.close()
        for sock in self._open:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def _proof(token: bytes, nonce: bytes, rank: bytes) -> bytes:
    return hmac.new(token, b"ckpt exchange" + nonce + rank, "sha256").digest()


def _receive(sock: socket.socket, n: int) -> memoryview:
    """Exactly `n` bytes."""
    out = memoryview(bytearray(n))
    at = 0
    while at < n:
        got = sock.recv_into(out[at:])
        if not got:
            raise ConnectionError("the connection was closed")
        at += got
    return out
