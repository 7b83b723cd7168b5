"""Ranges of what a keeper holds, lent to who restarts: asked for by the dozen, sent straight from memory, never copied here.

A connection that says "lend" for a step leaves the keeper's loop. From then on it carries

    asked   frames "ranges", with rows (what, offset, length) of i64, little-endian, as payload: `what` is the writer of a
            pack, or SEGMENT or PARITY
    told    for each row, in that order, a frame "answer" with so many bytes; or a frame "refused", and then the end
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ckpt.backends.base import Buffer
from ckpt.errors import CkptError, ConflictError, NotFoundError, from_wire, to_wire
from ckpt.keeper.lead import Key
from ckpt.keeper.protocol import Connection, fill, frame, greet, heading, receive, send
from ckpt.keeper.streams import send_all

__all__ = ["PARITY", "SEGMENT", "Loan", "Loans", "lend"]

SEGMENT, PARITY = -1, -2
"""Instead of a pack: this host's part of the step, and the parity of it that is kept here."""

_ANSWER = frame("answer")
_ROW = struct.Struct("<3q")
_BURST = 1 << 20  # bytes that are sent with one call, so that little waits while the next ones are checked
_BUFFERS = 512  # and buffers; the kernel takes 1,024
Address = tuple[str, int]
Bytes = npt.NDArray[np.uint8]


class Loan:
    """A connection to a keeper, for one step and one thread. Whatever was asked for comes in that order.

    `patience`: seconds that may pass without a byte. Raises PeerError, DeadlineError or what the keeper refused with;
    it is closed then.
    """

    def __init__(self, address: Address, secret: bytes, key: Key, patience: float) -> None:
        self._where, self._wanted = address[0], list[tuple[int, int, int]]()
        self._sock, self._line = greet(address, secret, patience)
        self.closed = False
        try:
            send(self._sock, frame("lend", id=0, key=list(key)))
            answer = receive(self._sock, self._line)
            if answer.kind == "refused":
                raise from_wire(*answer["error"])
        except BaseException:
            self.close()
            raise
        # A deadline of the kernel's: Python's own would wake for each packet.
        self._sock.settimeout(None)
        seconds = struct.pack("ll", int(patience), int(patience % 1 * 1e6))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._sock.setsockopt(socket.SOL_SOCKET, option, seconds)

    def ask(self, what: int, offset: int, length: int) -> None:
        """Goes out with the next `take`."""
        self._wanted.append((what, offset, length))

    def take(self, into: Buffer) -> None:
        """What was asked for first of what has not been taken, which is as long as `into`."""
        try:
            if self._wanted:
                rows, self._wanted = b"".join(_ROW.pack(*row) for row in self._wanted), []
                send(self._sock, frame("ranges", rows))
            head = bytearray(expected := heading(_ANSWER, len(into)))
            fill(self._sock, memoryview(head))
            if head != expected:
                answer = receive(self._sock, self._line, head)
                if answer.kind == "refused":
                    raise from_wire(*answer["error"])
                raise NotFoundError(f"the keeper at {self._where} gave another answer than {len(into)} bytes")
            fill(self._sock, into)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.closed = True
        self._sock.close()


class Loans:
    """Of one step; every thread has its own, one a keeper."""

    def __init__(self, key: Key, secret: bytes, patience: float) -> None:
        self._key, self._secret, self._patience = key, secret, patience
        self._own = threading.local()
        self._made: list[Loan] = []

    def at(self, address: Address) -> Loan:
        """This thread's. Raises what a `Loan` does."""
        own: dict[Address, Loan] = self._own.__dict__.setdefault("loans", {})
        if address not in own or own[address].closed:
            own[address] = Loan(address, self._secret, self._key, self._patience)
            self._made.append(own[address])
        return own[address]

    def close(self) -> None:
        """Those of all threads."""
        for loan in self._made:
            loan.close()


def lend(sock: socket.socket, number: int, find: Callable[[int, int, int], Sequence[Bytes]]) -> None:
    """The keeper's end, in a thread of its own, until the other one hangs up. `find`: (what, from, to) -> where these bytes
    lie; what it refuses ends the connection. `number`: of the question "lend"."""
    line = Connection(sock)
    sock.settimeout(None)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    send(sock, frame("answer", id=number))
    while True:
        asked = receive(sock, line)
        out: list[bytes | memoryview | Bytes] = []
        room, refused = _BURST, b""
        for what, offset, length in _rows(asked.kind, asked.payload):
            try:
                parts = find(what, offset, offset + length)
            except CkptError as e:
                refused = heading(frame("refused", error=to_wire(e)), 0)
                break
            out += [heading(_ANSWER, length), *parts]
            room -= length
            if room <= 0 or len(out) > _BUFFERS:
                send_all(sock, out)
                out, room = [], _BURST
        send_all(sock, [*out, refused])
        if refused:
            return


def _rows(kind: str, payload: bytes) -> list[tuple[int, ...]]:
    if kind != "ranges" or len(payload) % _ROW.size:
        raise ConflictError(f"{kind!r} with {len(payload)} bytes over a connection for ranges")
    return list(_ROW.iter_unpack(payload))
