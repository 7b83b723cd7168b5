"""Chunks on their way between keepers: in pieces, in order, checked; and what is none ends the connection."""

from __future__ import annotations

import os
import random
import socket
import threading
from contextlib import suppress

import numpy as np
import numpy.typing as npt
import pytest

from ckpt.format.codec import crc32c
from ckpt.keeper import streams
from ckpt.keeper.loop import Loop, Peer
from ckpt.keeper.protocol import Frame
from ckpt.keeper.streams import STEP, Courier, Errand, Piece, Throttle, pieces, receive_pieces, send_all
from ckpt.keeper.sums import sum_of

Bytes = npt.NDArray[np.uint8]
WAIT = 20.0
MARK = (3, 7)


class Ear:
    """A receiver that keeps what it gets."""

    def __init__(self, wanted: bool = True) -> None:
        self.wanted = wanted
        self.chunks: dict[tuple[int, int], bytearray] = {}
        self.done: list[tuple[int, int]] = []
        self.last = threading.Event()
        self.ends: list[tuple[Piece | None, str]] = []

    def admit(self, piece: Piece) -> bool:
        if self.wanted:
            self.chunks[piece.stripe, piece.number] = bytearray()
        return self.wanted

    def fold(self, piece: Piece, at: int, data: Bytes) -> bool:
        assert len(self.chunks[piece.stripe, piece.number]) == at and 0 < len(data) <= STEP
        self.chunks[piece.stripe, piece.number] += data.tobytes()
        return True

    def folded(self, piece: Piece) -> None:
        assert piece.last and len(self.chunks[piece.stripe, piece.number]) == piece.total
        self.done.append((piece.stripe, piece.number))
        if piece.stripe:
            self.last.set()

    def cut_off(self, piece: Piece | None, why: str) -> None:
        self.ends.append((piece, why))


def packed(chunk: bytes, stripe: int = 1, number: int = 2) -> list[bytes]:
    """A chunk as it goes over the wire, by piece."""
    out = []
    for a, b in pieces(0, len(chunk)):
        data = chunk[a:b]
        head = streams._HEADER.pack(b"ckpf", *MARK, stripe, number, a, len(chunk), b - a, crc32c(data))
        out.append(head + streams._CHECK.pack(crc32c(head)) + data)
    return out


def received(ear: Ear, data: bytes) -> Ear:
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=receive_pieces, args=(theirs, ear))
    thread.start()
    with suppress(OSError):  # it hung up
        ours.sendall(data)
    ours.close()
    thread.join(WAIT)
    assert not thread.is_alive()
    return ear


LONG = random.Random(0).randbytes((2 << 20) + 4321)


def test_chunks_arrive_as_they_were() -> None:
    ear = received(Ear(), b"".join(packed(LONG) + packed(b"x", 5, 0) + packed(LONG[: 1 << 20], 6, 1)))
    assert {k: bytes(v) for k, v in ear.chunks.items()} == {(1, 2): LONG, (5, 0): b"x", (6, 1): LONG[: 1 << 20]}
    assert ear.ends == [] and ear.done == [(1, 2), (5, 0), (6, 1)]


def test_what_nobody_wants_is_read_and_dropped() -> None:
    ear = received(Ear(False), b"".join(packed(LONG)) * 2)
    assert ear.chunks == {} and ear.ends == []


@pytest.mark.parametrize("where", [0, 5, 13, 21, 25, 29, 37, 45, 49, 53, 60, 5000])
def test_a_bit_that_flips_is_noticed(where: int) -> None:
    """In any field of the head, and in the bytes: of which attempt they are is not believed either, and no chunk is done."""
    data = bytearray(b"".join(packed(LONG)))
    data[where] ^= 8
    ear = received(Ear(), bytes(data))
    assert ear.done == [] and all(where > 56 or bytes(v) == b"" for v in ear.chunks.values())
    [(piece, why)] = ear.ends
    assert piece is None and "changed on its way" in why


def test_a_stream_that_ends_within_a_chunk() -> None:
    whole = b"".join(packed(LONG))
    for cut in (len(packed(LONG)[0]), len(packed(LONG)[0]) + 10, len(whole) - 1):
        [(piece, _)] = received(Ear(), whole[:cut]).ends
        assert piece is not None and piece.mark == MARK
    assert received(Ear(), whole + packed(LONG)[0][:20]).ends == [], "no chunk has begun"


def test_pieces_that_are_out_of_turn() -> None:
    first, second, third = packed(LONG)
    for data in (second, first + third, first + first, first + packed(LONG, 9)[1]):
        [(piece, why)] = received(Ear(), data).ends
        assert piece is None and "had to come" in why


def test_buffers_are_sent_without_joining_them() -> None:
    """Also where the socket takes a part of one at a time."""
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    parts = [os.urandom(n) for n in (0, 1, 70_000, 0, 300_000, 5)]
    got = bytearray()

    def read() -> None:
        while data := theirs.recv(10_000):
            got.extend(data)

    thread = threading.Thread(target=read)
    thread.start()
    send_all(ours, parts)
    ours.close()
    thread.join(WAIT)
    theirs.close()
    assert bytes(got) == b"".join(parts) and sum_of([np.frombuffer(p, np.uint8) for p in parts if p]) == crc32c(got)


class Memory:
    """A sender; `stop_at`: the piece from which on nothing may be sent any more."""

    def __init__(self, data: bytes, stop_at: int = -1) -> None:
        self.data, self.stop_at = np.frombuffer(data, dtype=np.uint8), stop_at
        self.lent = 0
        self.failures: list[str] = []
        self.told = threading.Event()

    def lend(self, errand: Errand, start: int, stop: int) -> tuple[list[Bytes], int] | None:
        if start == self.stop_at:
            self.told.set()
            return None
        self.lent += 1
        parts = [self.data[start : (start + stop) // 2], self.data[(start + stop) // 2 : stop]]
        return parts, sum_of(parts)

    def returned(self, errand: Errand) -> None:
        self.lent -= 1

    def undelivered(self, errand: Errand, why: str) -> None:
        self.failures.append(why)
        self.told.set()


class Door:
    """A keeper's loop that hands over connections as the real one does."""

    def __init__(self, ear: Ear) -> None:
        self.loop = Loop(self._hear, lambda _: None, b"secret")
        listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = listener.getsockname()
        self.loop.listen(listener)
        self.ear, self.over, self.done = ear, False, threading.Event()
        self.listener = listener
        self.thread = threading.Thread(target=self.loop.run, args=(lambda: self.over,))
        self.thread.start()

    def _hear(self, peer: Peer, message: Frame) -> None:
        assert message.kind == "fold"
        sock = self.loop.release(peer)

        def work() -> None:
            streams.send(sock, Frame("answer", {"id": 0}))
            receive_pieces(sock, self.ear)
            self.done.set()

        threading.Thread(target=work, daemon=True).start()

    def close(self) -> None:
        self.over = True
        self.loop.later(lambda: None)
        self.thread.join(WAIT)
        self.listener.close()


@pytest.mark.parametrize("stop_at", [-1, 1 << 20])
def test_a_courier_brings_chunks_one_behind_the_other(stop_at: int) -> None:
    """Or stops in the middle, which the other end hears; what was lent is given back."""
    ear = Ear()
    door, memory = Door(ear), Memory(LONG * 2, stop_at)
    courier = Courier(door.address, b"secret", memory, Throttle(0.0), WAIT)
    for n in range(2 if stop_at < 0 else 1):
        courier.bring(Errand(MARK, (1, 1), 0, n, 0, len(LONG) * n, len(LONG) * (n + 1)))
    assert (ear.last if stop_at < 0 else door.done).wait(WAIT)
    courier.close()
    assert door.done.wait(WAIT)
    door.close()
    assert memory.lent == 0 and memory.failures == []
    if stop_at < 0:
        assert {k: bytes(v) for k, v in ear.chunks.items()} == {(0, 0): LONG, (1, 0): LONG} and ear.ends == []
    else:
        assert ear.ends[0][0] is not None and ear.ends[0][0].mark == MARK


@pytest.mark.parametrize("secret", [b"secret", b"of another job"])
def test_a_courier_that_cannot_deliver_says_so(secret: bytes) -> None:
    door, memory = Door(Ear()), Memory(LONG)
    if secret == b"secret":
        door.close()  # nobody is there
    courier = Courier(door.address, secret, memory, Throttle(0.0), WAIT)
    courier.bring(Errand(MARK, (1, 1), 0, 0, 0, 0, len(LONG)))
    assert memory.told.wait(WAIT) and len(memory.failures) == 1 and memory.lent == 0
    courier.close()
    if secret != b"secret":
        door.close()
