"""Whoever reaches a keeper's port and does not know the job's secret gets nothing and stops nothing."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import pytest

from ckpt.errors import PeerError
from ckpt.keeper import loop as loops
from ckpt.keeper.loop import Loop, Peer
from ckpt.keeper.protocol import Connection, Frame, frame, greet, proof, receive, send

SECRET = b"of this job"
WAIT = 20.0


class Door:
    """A loop that serves TCP in a thread and answers every frame of a caller with an echo."""

    def __init__(self) -> None:
        self.heard: list[Frame] = []
        self.loop = Loop(self._hear, lambda _: None, SECRET)
        listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.address: tuple[str, int] = listener.getsockname()
        self.loop.listen(listener)
        self._over = False
        self._thread = threading.Thread(target=self.loop.run, args=(lambda: self._over,))
        self._thread.start()
        self._listener = listener

    def _hear(self, peer: Peer, message: Frame) -> None:
        self.heard.append(message)
        self.loop.tell(peer, frame("answer", message.payload, id=0))

    def stranger(self) -> socket.socket:
        return socket.create_connection(self.address, WAIT)

    def serves(self) -> None:
        """A caller who knows the secret is served."""
        sock, line = greet(self.address, SECRET, WAIT)
        send(sock, frame("range", b"x" * 100_000, id=0))
        assert receive(sock, line).payload == b"x" * 100_000
        line.close()

    def close(self) -> None:
        self._over = True
        self.loop.later(lambda: None)
        self._thread.join(WAIT)
        self._listener.close()
        assert not self._thread.is_alive()


@pytest.fixture
def door() -> Iterator[Door]:
    it = Door()
    yield it
    it.close()


def _is_cut_off(sock: socket.socket) -> bool:
    """Whether the other end hangs up, whatever it says before."""
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


def _answered(sock: socket.socket) -> tuple[Frame, Connection]:
    line = Connection(sock)
    return receive(sock, line), line


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x00" * 64,
        os.urandom(64).replace(b"ck", b"xx"),
        b"ck\x01\x00" + (1 << 30).to_bytes(4, "little") + bytes(8),  # a head of 1 GiB
        b"ck\x01\x00" + (10).to_bytes(4, "little") + (1 << 40).to_bytes(8, "little"),  # a payload of 1 TiB
        b"ck\x63\x00" + (2).to_bytes(4, "little") + bytes(8) + b"{}",  # version 99
        b"ck\x01\x00" + (4).to_bytes(4, "little") + bytes(8) + b"nope",
        b"ck\x01\x00" + (2).to_bytes(4, "little") + bytes(8) + b"{}",
        b"ck\x01\x00" + (2).to_bytes(4, "little") + bytes(8) + b"[]",
    ],
    ids=["http", "zeros", "noise", "huge head", "huge payload", "version", "no json", "no kind", "no object"],
)
def test_garbage(door: Door, said: bytes) -> None:
    with door.stranger() as sock:
        sock.sendall(said)
        assert _is_cut_off(sock)
    door.serves()


@pytest.mark.parametrize("kind", ["range", "host", "attach", "prove"])
def test_nothing_before_the_greeting(door: Door, kind: str) -> None:
    with door.stranger() as sock:
        send(sock, frame(kind, id=0, pack=[1, 1, 0], offset=0, length=10, host="h", proof=""))
        assert _is_cut_off(sock)
    assert not door.heard
    door.serves()


def test_another_secret(door: Door) -> None:
    with pytest.raises(PeerError, match="not a keeper of this job"):
        greet(door.address, b"of another job", WAIT)
    with door.stranger() as sock:  # one that does not mind who answers
        send(sock, frame("hello", nonce="11"))
        hello, _ = _answered(sock)
        send(sock, frame("prove", proof=proof(b"of another job", "caller", "11", hello["nonce"])))
        send(sock, frame("range", id=0))
        assert _is_cut_off(sock)
    assert not door.heard
    door.serves()


def test_a_replay(door: Door) -> None:
    """What a caller said once proves nothing to a keeper that asks anew; nor does a keeper's own answer."""
    with door.stranger() as sock:
        send(sock, frame("hello", nonce="11"))
        hello, line = _answered(sock)
        once = proof(SECRET, "caller", "11", hello["nonce"])
        send(sock, frame("prove", proof=once))
        assert receive(sock, line).kind == "welcome"
        send(sock, frame("range", id=0))
        assert receive(sock, line).kind == "answer"
    for said in (once, hello["proof"]):
        with door.stranger() as sock:
            send(sock, frame("hello", nonce="11"))
            _answered(sock)
            send(sock, frame("prove", proof=said))
            send(sock, frame("range", id=0))
            assert _is_cut_off(sock)
    assert len(door.heard) == 1
    door.serves()


def test_two_hellos(door: Door) -> None:
    """A second nonce would let somebody have the keeper sign what he likes, over and over."""
    with door.stranger() as sock:
        send(sock, frame("hello", nonce="11"))
        send(sock, frame("hello", nonce="22"))
        assert _is_cut_off(sock)
    door.serves()


def test_who_says_nothing_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "_GREETING", 0.05)
    door = Door()
    try:
        with door.stranger() as sock:
            assert _is_cut_off(sock)
        with door.stranger() as sock:
            sock.sendall(b"c")
            assert _is_cut_off(sock)
        door.serves()
    finally:
        door.close()


def test_a_flood(door: Door) -> None:
    """More strangers than are let in: those who are not are cut off at once, and none keeps a caller out for good."""
    crowd = [door.stranger() for _ in range(loops._STRANGERS + 40)]
    with door.stranger() as late:
        assert _is_cut_off(late)
    for sock in crowd:
        sock.close()
    sock = door.stranger()  # until the loop has heard that they are gone
    while True:
        send(sock, frame("hello", nonce="11"))
        try:
            _answered(sock)
            break
        except PeerError:
            sock.close()
            sock = door.stranger()
    sock.close()
    door.serves()


def test_a_truncated_frame_holds_nobody_up(door: Door) -> None:
    sock, line = greet(door.address, SECRET, WAIT)
    sock.sendall(b"ck\x01\x00" + (100).to_bytes(4, "little"))
    door.serves()
    line.close()
    door.serves()
    assert [m.kind for m in door.heard] == ["range", "range"]
