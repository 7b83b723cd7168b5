"""The sockets of an exchange: who does not know the job's secret is not heard, who is ahead waits, who stops is named."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import pytest

from ckpt.errors import DeadlineError, IntegrityError, PeerError
from ckpt.wire import PLACE, Wire

TOKEN = bytes(range(32))


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Wire, Wire]]:
    """Two ranks; the first is to get one range of each of two turns from the second."""
    monkeypatch.setenv("CKPT_DEADLINE", "20")
    monkeypatch.setenv("CKPT_BIND", "127.0.0.1")
    a, b = Wire(0), Wire(1)
    addresses = [a.listen(), b.listen()]
    a.begin(addresses, TOKEN, np.array([[0, 0], [1, 1]]))
    b.begin(addresses, TOKEN, np.zeros((2, 2), np.int64))
    yield a, b
    a.close()
    b.close()


def places(*rows: tuple[int, int, int]) -> np.ndarray:
    return np.array(list(rows), PLACE)


def send(wire: Wire, turn: int, text: bytes) -> None:
    wire.send(0, turn, places((3, len(text), 100)), [memoryview(text)])


def test_what_arrives_is_what_was_sent(pair: tuple[Wire, Wire]) -> None:
    a, b = pair
    a.turn_to(0)
    b.send(
        0, 0, places((3, 4, 100), (5, 2, 0), (3, 2, 50)), [memoryview(b"abcd"), memoryview(b"ef"), memoryview(b"gh")]
    )
    a.all_here(0)
    assert [(at, bytes(v)) for at, v in a.pieces(3, 0, 1000)] == [(50, b"gh"), (100, b"abcd")]
    assert [(at, bytes(v)) for at, v in a.pieces(3, 51, 100)] == [(50, b"gh")]
    assert a.pieces(3, 52, 100) == [] == a.pieces(4, 0, 9) and bytes(a.pieces(5, 1, 2)[0][1]) == b"ef"
    a.drop()
    assert a.pieces(3, 0, 1000) == []


def test_who_is_ahead_waits(pair: tuple[Wire, Wire]) -> None:
    """Of a later turn nothing is taken into memory until that has begun."""
    a, b = pair
    a.turn_to(0)
    send(b, 0, b"now")
    big = bytes(32 << 20)  # more than sockets hold
    sender = threading.Thread(target=send, args=(b, 1, big))
    sender.start()
    a.all_here(0)
    sender.join(0.3)
    assert sender.is_alive() and len(a.pieces(3, 0, 1 << 40)) == 1
    a.drop()
    a.turn_to(1)
    a.all_here(1)
    sender.join(20)
    assert not sender.is_alive() and len(a.pieces(3, 100, 101)[0][1]) == len(big)


@pytest.mark.parametrize("proof", [bytes(32), b""])
def test_a_stranger_is_not_heard(pair: tuple[Wire, Wire], proof: bytes) -> None:
    a, b = pair
    a.turn_to(0)
    with socket.create_connection(a.addresses[0], timeout=20) as s, suppress(OSError):
        s.recv(16)
        said = b"integrity all is lost"
        s.sendall(proof + (1).to_bytes(4, "little") + struct.pack("<cIIQ", b"E", 0, 0, len(said)) + said)
        s.shutdown(socket.SHUT_WR)
        while s.recv(1):  # until it is shown the door
            pass
    send(b, 0, b"well")
    a.all_here(0)
    assert bytes(a.pieces(3, 100, 104)[0][1]) == b"well"


def test_what_one_fails_with_the_others_fail_with(pair: tuple[Wire, Wire]) -> None:
    a, b = pair
    a.turn_to(0)
    b.tell_failure(IntegrityError("block 7 differs"))
    with pytest.raises(IntegrityError, match="rank 1: block 7 differs"):
        a.all_here(0)


def test_who_stops_is_named(pair: tuple[Wire, Wire]) -> None:
    a, b = pair
    a.turn_to(0)
    send(b, 0, b"one")
    a.all_here(0)
    b.close()
    a.turn_to(1)
    with pytest.raises(PeerError, match="exchange with rank 1 broke off"):
        a.all_here(1)


def test_who_never_comes_is_named(pair: tuple[Wire, Wire], monkeypatch: pytest.MonkeyPatch) -> None:
    a, _ = pair
    a.turn_to(0)
    monkeypatch.setattr(a, "_deadline", 0.2)
    with pytest.raises(DeadlineError, match="nothing came from rank 1"):
        a.all_here(0)
