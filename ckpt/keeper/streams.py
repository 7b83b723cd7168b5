"""Chunks on their way from one keeper to another: pieces of at most 1 MiB, straight from a slot's memory into a socket,
from a socket into one buffer, and from there into parity.

A connection is opened and authenticated like any other, and then leaves the loop: a thread at either end does nothing
but this, so that no large transfer holds up a small message. What follows is, again and again,

    magic "ckpf", generation u64, number u64 (the mark), stripe u32, chunk u32, offset in the chunk u64, bytes of the chunk
    u64, bytes of the piece u32, CRC32C of the piece u32, CRC32C of this header so far u32, all little-endian; the piece

and nothing is ever answered. The pieces of a chunk come in order. Whatever does not check ends the connection.
"""

from __future__ import annotations

import logging
import queue
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ckpt import faults
from ckpt.errors import CkptError, FormatError, IntegrityError, PeerError
from ckpt.format.codec import crc32c
from ckpt.keeper.guard import Mark
from ckpt.keeper.lead import Key
from ckpt.keeper.protocol import frame, greet, receive, send

__all__ = ["PIECE", "STEP", "Courier", "Errand", "Piece", "Throttle", "pieces", "receive_pieces", "send_all"]

log = logging.getLogger("ckpt.keeper")
Bytes = npt.NDArray[np.uint8]
PIECE = 1 << 20
"""Bytes of a piece; the last one of a chunk may be shorter."""
STEP = 1 << 19
"""Bytes of a piece that are read, summed and folded in one go: they stay in a core's cache meanwhile."""

_HEADER = struct.Struct("<4sQQIIQQII")
_CHECK = struct.Struct("<I")
_MAGIC = b"ckpf"
_GREETING = 5.0  # seconds


@dataclass(frozen=True)
class Errand:
    """A chunk that is to be brought to a keeper: bytes `start` to `stop` of this host's segment of step `key`."""

    mark: Mark
    key: Key
    slot: int
    stripe: int
    number: int
    start: int
    stop: int


@dataclass(frozen=True)
class Piece:
    """Bytes `at` and on of chunk `number` of a stripe, whose chunk has `total`."""

    mark: Mark
    stripe: int
    number: int
    at: int
    total: int
    nbytes: int
    crc: int

    @property
    def last(self) -> bool:
        return self.at + self.nbytes == self.total


class Sender(Protocol):
    """Who has the bytes."""

    def lend(self, errand: Errand, start: int, stop: int) -> tuple[list[Bytes], int] | None:
        """These bytes of the segment, where they lie, and their CRC32C, until `returned`; None if they may not be sent
        any more."""

    def returned(self, errand: Errand) -> None: ...

    def undelivered(self, errand: Errand, why: str) -> None:
        """A chunk did not arrive."""


class Folder(Protocol):
    """Who folds them."""

    def admit(self, piece: Piece) -> bool:
        """The first piece of a chunk is there: whether to fold this chunk. Waits for an order that is on its way."""

    def fold(self, piece: Piece, at: int, data: Bytes) -> bool:
        """Bytes `at` and on of a chunk, at most STEP, not checked yet; False if they are not wanted any more."""

    def folded(self, piece: Piece) -> None:
        """The last piece of a chunk is in, and all of them are what was sent."""

    def cut_off(self, piece: Piece | None, why: str) -> None:
        """A connection ended within the chunk of `piece`; None: what came was changed on its way, whatever it was."""


def pieces(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the pieces of a chunk."""
    for at in range(start, stop, PIECE):
        yield at, min(at + PIECE, stop)


class Throttle:
    """Lets `rate` bytes pass in a second, counted over all threads that share it; 0: as many as come."""

    def __init__(self, rate: float) -> None:
        self._rate, self._free, self._lock = rate, 0.0, threading.Lock()
        self._never = threading.Event()

    def take(self, n: int) -> None:
        """Waits until `n` bytes may go."""
        if not self._rate:
            return
        with self._lock:
            now = time.monotonic()
            begin = max(self._free, now)
            self._free = begin + n / self._rate
        self._never.wait(begin - now)


class Courier:
    """Brings chunks to one other keeper, one behind the other, in a thread of its own."""

    def __init__(
        self, address: tuple[str, int], secret: bytes, sender: Sender, throttle: Throttle, patience: float
    ) -> None:
        self.address, self._secret, self._sender, self._throttle = address, secret, sender, throttle
        self._patience = patience
        self._errands: queue.SimpleQueue[Errand | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None
        self._busy = self._cut = False  # in the middle of an errand; interrupted there
        threading.Thread(target=self._run, name="ckpt-courier", daemon=True).start()

    def bring(self, errand: Errand) -> None:
        self._errands.put(errand)

    def interrupt(self) -> None:
        """Whatever is being sent ends now, in the middle."""
        with self._lock:
            if self._sock is not None and self._busy:
                self._cut = True
                with suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.interrupt()
        self._errands.put(None)

    def _run(self) -> None:
        while True:
            errand = self._errands.get()
            if errand is None:
                self._hang_up()
                return
            with self._lock:
                self._busy, cut, self._cut = True, self._cut, False
            if cut:
                self._hang_up()
            try:
                self._bring(errand)
            except (CkptError, OSError) as e:
                self._hang_up()
                why = str(e) if isinstance(e, CkptError) else f"{e.strerror or e} on the way to {self.address[0]}"
                self._sender.undelivered(errand, why)
            except Exception as e:  # a courier that ends would hold up every later step
                log.error("a chunk was not brought", exc_info=e)
                self._hang_up()
                self._sender.undelivered(errand, f"{type(e).__name__}: {e}")
            with self._lock:
                self._busy = False

    def _bring(self, errand: Errand) -> None:
        total = errand.stop - errand.start
        for start, stop in pieces(errand.start, errand.stop):
            self._throttle.take(stop - start)
            sock = self._connected()  # which may take seconds, in which nothing is lent
            lent = self._sender.lend(errand, start, stop)
            if lent is None:
                if start > errand.start:
                    self._hang_up()  # the other end is in the middle of a chunk
                return
            try:
                faults.point("shield sending")
                parts, crc = lent
                head = _HEADER.pack(
                    _MAGIC, *errand.mark, errand.stripe, errand.number, start - errand.start, total, stop - start, crc
                )
                send_all(sock, [head, _CHECK.pack(crc32c(head)), *parts])
            finally:
                self._sender.returned(errand)

    def _connected(self) -> socket.socket:
        if self._sock is not None:
            return self._sock
        sock, line = greet(self.address, self._secret, _GREETING)
        try:
            send(sock, frame("fold", id=0))
            answer = receive(sock, line)
            if answer.kind != "answer":
                raise PeerError(f"the keeper at {self.address[0]} takes no chunks: {answer.head.get('error', '')}")
            sock.settimeout(None)
            seconds = struct.pack("ll", int(self._patience), int(self._patience % 1 * 1e6))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)
        except BaseException:
            sock.close()
            raise
        with self._lock:
            self._sock = sock
        return sock

    def _hang_up(self) -> None:
        with self._lock:
            sock, self._sock = self._sock, None
        if sock is not None:
            sock.close()


def send_all(sock: socket.socket, buffers: Sequence[bytes | memoryview | Bytes]) -> None:
    """Sends all of them over a blocking socket without joining them. Raises OSError."""
    left = [memoryview(b) for b in buffers if len(b)]
    while left:
        sent = sock.sendmsg(left)
        while left and sent >= len(left[0]):
            sent -= len(left.pop(0))
        if sent:
            left[0] = left[0][sent:]


def receive_pieces(sock: socket.socket, receiver: Folder) -> None:
    """Has a receiver fold what comes over an authenticated connection, until that ends; in a thread of its own.

    What does not check is in parity already: the receiver hears of it (`cut_off`), and begins anew from zero.
    """
    buffer = np.empty(STEP, dtype=np.uint8)
    within: Piece | None = None  # the last piece of a chunk that has not come in full
    wanted, why = False, "the connection ended"
    with sock:
        try:
            sock.settimeout(None)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            while (piece := _next(sock)) is not None:
                _check_order(within, piece)
                if piece.at == 0:
                    wanted = receiver.admit(piece)
                within = piece
                crc = end = 0
                for at in range(0, piece.nbytes, STEP):
                    data = buffer[: min(STEP, piece.nbytes - at)]
                    if not _fill(sock, memoryview(data)):
                        break
                    crc, end = crc32c(data, crc), at + len(data)
                    wanted = wanted and receiver.fold(piece, piece.at + at, data)
                if end < piece.nbytes:
                    break
                if crc != piece.crc:
                    raise IntegrityError(f"chunk {piece.number} of stripe {piece.stripe} was changed on its way")
                if piece.last:
                    within = None
                    if wanted:
                        receiver.folded(piece)
        except CkptError as e:
            receiver.cut_off(None, str(e))
            return
        except OSError as e:
            why = e.strerror or str(e)
        except Exception as e:
            log.error("chunks from another host", exc_info=e)
            why = f"{type(e).__name__}: {e}"
    if within is not None and wanted:
        receiver.cut_off(within, why)


def _next(sock: socket.socket) -> Piece | None:
    """The next header; None at the end. Raises FormatError for what is none."""
    head = bytearray(_HEADER.size + _CHECK.size)
    if not _fill(sock, memoryview(head)):
        return None
    magic, generation, number, stripe, chunk, at, total, nbytes, crc = _HEADER.unpack_from(head)
    if magic != _MAGIC or _CHECK.unpack_from(head, _HEADER.size)[0] != crc32c(bytes(head[: _HEADER.size])):
        raise FormatError("the head of a piece was changed on its way")
    if not 0 < nbytes <= PIECE or at % PIECE or at + nbytes > total or (nbytes < PIECE and at + nbytes != total):
        raise FormatError(f"a piece of {nbytes} bytes at {at} of {total}")
    return Piece((generation, number), stripe, chunk, at, total, nbytes, crc)


def _check_order(before: Piece | None, piece: Piece) -> None:
    """Raises FormatError unless a piece is the one to come next."""
    expected = 0 if before is None else before.at + before.nbytes
    same = before is None or (before.mark, before.stripe, before.number, before.total) == (
        piece.mark, piece.stripe, piece.number, piece.total
    )  # fmt: skip
    if piece.at != expected or not same:
        raise FormatError(f"a piece at {piece.at} where one at {expected} had to come")


def _fill(sock: socket.socket, into: memoryview) -> bool:
    """Reads so many bytes; False if the stream ends before."""
    while len(into):
        n = sock.recv_into(into, len(into), socket.MSG_WAITALL)
        if not n:
            return False
        into = into[n:]
    return True
