"""Frames between trainers and keepers: however the bytes come, whoever sends them."""

from __future__ import annotations

import gc
import json
import os
import socket
import struct
import threading
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ckpt.errors import DeadlineError, FormatError, PeerError
from ckpt.keeper.protocol import Connection, Frame, frame, greet, own_peer, proof, receive, send

CHECK = settings(max_examples=100, deadline=None, derandomize=True)
HEADER = struct.Struct("<2sHIQ")
SMALL = 4096

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
heads = st.dictionaries(text.filter(lambda k: k not in ("kind", "fds")), values, max_size=4)
frames = st.builds(Frame, text, heads, st.binary(max_size=300))


def packed(head: Any, payload: bytes = b"", version: int = 1, magic: bytes = b"ck") -> bytes:
    data = head if isinstance(head, bytes) else json.dumps(head).encode()
    return HEADER.pack(magic, version, len(data), len(payload)) + data + payload


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    gc.collect()  # what earlier tests dropped is not to go in the middle of this one
    before = descriptors()
    yield
    assert descriptors() <= before


class Pair:
    """Two ends of a Unix socket that do not block."""

    def __init__(self, trusted: bool = True) -> None:
        a, b = socket.socketpair()
        a.setblocking(False)
        b.setblocking(False)
        self.a, self.b = Connection(a, trusted), Connection(b, trusted)

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self.a.close()
        self.b.close()


def same(got: Frame, sent: Frame) -> bool:
    head = {k: v for k, v in got.head.items() if k != "fds"}
    return (got.kind, head, got.payload, len(got.fds)) == (sent.kind, dict(sent.head), sent.payload, len(sent.fds))


def taken(connection: Connection) -> list[Frame]:
    return list(connection.frames())


class File:
    """A file in memory, and whether a descriptor is of it."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("test", os.MFD_CLOEXEC)

    def is_at(self, fd: int) -> bool:
        return os.path.sameopenfile(fd, self.fd)


# What is sent arrives.


@CHECK
@given(st.lists(frames, max_size=4), st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_frames_in_pieces_of_any_size(sent: list[Frame], sizes: list[int]) -> None:
    with Pair() as source, Pair() as pair:
        for message in sent:
            source.a.put(message)
        assert source.a.drain() and not source.a.waiting
        data = b""
        while True:
            try:
                data += source.b.sock.recv(1 << 16)
            except BlockingIOError:
                break
        got, at, turn = [], 0, 0
        while at < len(data):
            n = sizes[turn % len(sizes)]
            pair.a.sock.send(data[at : at + n])
            assert pair.b.fill()
            got += taken(pair.b)
            at, turn = at + n, turn + 1
        assert len(got) == len(sent) and all(map(same, got, sent))
        pair.a.sock.close()
        assert not pair.b.fill() and taken(pair.b) == []


@CHECK
@given(
    st.lists(st.tuples(frames, st.integers(0, 3), st.booleans()), min_size=1, max_size=5),
    st.lists(st.booleans(), max_size=12),
)
def test_descriptors_come_with_their_frames(plan: list[tuple[Frame, int, bool]], looks: list[bool]) -> None:
    """Small and large frames, read whenever: each gets the descriptors it was sent with, which are of its receiver's."""
    files = [File() for _ in range(4)]
    sent: list[Frame] = []
    got: list[Frame] = []
    pair = Pair()
    try:
        ends = descriptors()
        pair.a.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        for i, (message, n, large) in enumerate(plan):
            payload = bytes([i]) * 300_000 if large else message.payload
            sent.append(Frame(message.kind, message.head, payload, [files[(i + k) % 4].fd for k in range(n)]))
            pair.a.put(sent[-1])
        turns = iter(looks)
        for _ in range(10_000):
            assert pair.a.drain()
            if next(turns, True):
                assert pair.b.fill()
                got += taken(pair.b)
            if len(got) == len(sent):
                break
        assert not pair.a.waiting and all(map(same, got, sent))
        for i, message in enumerate(got):
            assert all(files[(i + k) % 4].is_at(fd) for k, fd in enumerate(message.fds))
        assert descriptors() <= ends + sum(len(m.fds) for m in got)
    finally:
        for fd in [*(f.fd for f in files), *(fd for m in got for fd in m.fds)]:
            os.close(fd)
        pair.a.close()
        pair.b.close()


@pytest.mark.parametrize("blocking", [False, True])
def test_descriptors_do_not_go_on_to_other_programs(blocking: bool) -> None:
    file = File()
    with Pair() as pair:
        pair.a.put(frame("x", fds=[file.fd]))
        assert pair.a.drain()
        if blocking:
            [fd] = receive(pair.b.sock, pair.b).fds
        else:
            assert pair.b.fill()
            [fd] = next(iter(pair.b.frames())).fds
        inherited = os.get_inheritable(fd)
        os.close(fd)
    os.close(file.fd)
    assert not inherited


def test_blocking_ends() -> None:
    file = File()
    a, b = socket.socketpair()
    there = Connection(b)
    large = os.urandom(3_000_000)
    sender = threading.Thread(
        daemon=True, target=lambda: [send(a, frame("x", large, [file.fd], n=1)), send(a, frame("y", fds=[file.fd] * 3))]
    )
    sender.start()
    first, second = receive(b, there), receive(b, there)
    sender.join()
    assert (first.kind, first["n"], first.payload, len(first.fds)) == ("x", 1, large, 1)
    assert second.kind == "y" and all(file.is_at(fd) for fd in (*first.fds, *second.fds))
    for fd in (*first.fds, *second.fds, file.fd):
        os.close(fd)
    a.close()
    with pytest.raises(PeerError, match="closed the connection"):
        receive(b, there)
    there.close()


def test_a_frame_says_what_it_lacks() -> None:
    message = frame("grant", step=3)
    assert message["step"] == 3
    with pytest.raises(FormatError, match="a frame 'grant' without 'slot'"):
        message["slot"]


def test_any_text_can_be_sent() -> None:
    """Names of files that are no UTF-8 come as lone surrogates, in the text of an error for one."""
    why = "cannot open " + os.fsdecode(b"/data/caf\xe9")
    with Pair() as pair:
        pair.a.put(frame("missed", step=1, why=why))
        assert pair.a.drain() and pair.b.fill()
        [message] = taken(pair.b)
        assert message["step"] == 1 and message["why"].startswith("cannot open /data/caf")


# What is no frame.


def feed(data: bytes, trusted: bool = True) -> list[Frame]:
    """What a connection makes of some bytes and the end of the stream."""
    with Pair(trusted) as pair:
        pair.a.sock.setblocking(True)
        got: list[Frame] = []
        for at in range(0, len(data), 1 << 14):
            pair.a.sock.sendall(data[at : at + (1 << 14)])
            assert pair.b.fill()
            got += taken(pair.b)
        return got


BAD = {
    "another magic": packed({"kind": "x"}, magic=b"ch"),
    "half a wrong magic": b"h",
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "an older version": packed({"kind": "x"}, version=0),
    "a newer version": packed({"kind": "x"}, version=2),
    "no JSON": packed(b"{"),
    "an empty head": packed(b""),
    "a list": packed([1]),
    "a number": packed(1),
    "a string": packed("kind"),
    "null": packed(None),
    "no kind": packed({"step": 1}),
    "not UTF-8": packed(b'{"kind": "\xff"}'),
    "a deep head": packed(b'{"kind":"x","a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "a number of very many digits": packed(b'{"kind":"x","a":' + b"9" * 10_000 + b"}"),
    "descriptors that are not there": packed({"kind": "x", "fds": 1}),
    "fewer than no descriptors": packed({"kind": "x", "fds": -1}),
    "descriptors in words": packed({"kind": "x", "fds": "1"}),
    "descriptors in fractions": packed({"kind": "x", "fds": 0.5}),
    "no descriptors in particular": packed({"kind": "x", "fds": None}),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_frame_is_refused(name: str) -> None:
    with pytest.raises(FormatError):
        feed(BAD[name])


@pytest.mark.parametrize("name", BAD)
def test_what_comes_before_it_is_heard(name: str) -> None:
    with Pair() as pair:
        pair.b._in += packed({"kind": "good", "n": 1}) + BAD[name]
        heard = iter(pair.b.frames())
        assert next(heard)["n"] == 1
        with pytest.raises(FormatError):
            next(heard)


@CHECK
@given(frames, st.data())
def test_a_truncated_frame_is_none_yet(message: Frame, data: st.DataObject) -> None:
    whole = packed({**message.head, "kind": message.kind}, message.payload)
    cut = data.draw(st.integers(0, len(whole) - 1))
    assert feed(whole[:cut]) == []
    [got] = feed(whole)
    assert same(got, message)


@CHECK
@given(st.binary(max_size=200), st.booleans())
@example(b"ck\x01\x00\x00\x00\x00\x00" + b"\x00" * 8, True)
@example(packed({"kind": None, "fds": True}), True)
def test_garbage_raises_nothing_but_a_format_error(data: bytes, trusted: bool) -> None:
    with suppress(FormatError):
        feed(data, trusted)


@CHECK
@given(frames, st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes_raise_nothing_but_a_format_error(message: Frame, flips: Sequence[tuple[float, int]]) -> None:
    data = bytearray(packed({**message.head, "kind": message.kind}, message.payload) * 2)
    for where, value in flips:
        data[int(where * len(data))] = value
    try:
        for got in feed(bytes(data)):
            assert isinstance(got.kind, str) and isinstance(got.head, dict)
    except FormatError:
        pass


@CHECK
@given(st.one_of(values, st.dictionaries(st.sampled_from(["kind", "fds", "a"]), values, max_size=3)))
def test_any_head_raises_nothing_but_a_format_error(head: Any) -> None:
    try:
        for got in feed(packed(head)):
            assert isinstance(got.kind, str) and got.fds == []
    except FormatError:
        pass


# Strangers, and sizes.


@pytest.mark.parametrize(
    ("head", "payload", "trusted"),
    [
        (SMALL + 1, 0, False),
        (0, 1, False),
        (2, 1 << 40, False),
        (2**32 - 1, 2**64 - 1, False),
        ((64 << 20) + 1, 0, True),
        (2, (4 << 30) + 1, True),
        (2**32 - 1, 2**64 - 1, True),
    ],
)
def test_what_is_too_large_is_refused_before_it_is_held(head: int, payload: int, trusted: bool) -> None:
    tracemalloc.start()
    try:
        with Pair(trusted) as pair:
            pair.a.sock.send(HEADER.pack(b"ck", 1, head, payload))
            assert pair.b.fill()
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            with pytest.raises(FormatError, match="more than is allowed"):
                taken(pair.b)
            assert tracemalloc.get_traced_memory()[1] - before < 100_000
    finally:
        tracemalloc.stop()


def test_what_is_large_and_allowed_is_held_as_it_comes() -> None:
    with Pair() as pair:
        pair.a.sock.send(HEADER.pack(b"ck", 1, 60 << 20, 3 << 30))
        tracemalloc.start()
        try:
            assert pair.b.fill() and taken(pair.b) == []
            assert tracemalloc.get_traced_memory()[1] < 8 << 20
        finally:
            tracemalloc.stop()


def test_a_stranger_may_greet() -> None:
    head = {"kind": "hello", "nonce": "0" * (SMALL - 40)}
    assert [m.kind for m in feed(packed(head), trusted=False)] == ["hello"]
    assert [m.kind for m in feed(packed(b'{"kind":"x"}' + b" " * (SMALL - 12)), trusted=False)] == ["x"]
    with pytest.raises(FormatError):
        feed(packed(b'{"kind":"x"}' + b" " * (SMALL - 11)), trusted=False)


def test_a_stranger_does_not_go_on_and_on() -> None:
    with Pair(trusted=False) as pair:
        pair.a.sock.send(packed({"kind": "hello"}) * 1000)
        with pytest.raises(FormatError, match="more than a greeting"):
            pair.b.fill()


# Descriptors.


def test_descriptors_that_nobody_took_are_closed() -> None:
    file = File()
    with Pair() as pair:
        pair.a.put(frame("x", fds=[file.fd] * 5))
        assert pair.a.drain() and pair.b.fill()
        pair.a.put(frame("never sent", fds=[file.fd] * 2))
    os.close(file.fd)


def test_descriptors_that_come_with_no_frame_are_closed() -> None:
    file = File()
    for data in (b"ck", b"nonsense", packed({"kind": "x"}), packed({"kind": "x", "fds": 3})):
        with Pair() as pair:
            socket.send_fds(pair.a.sock, [data], [file.fd] * 2)
            assert pair.b.fill()
            try:
                taken(pair.b)
            except FormatError:
                assert data != b"ck"
    os.close(file.fd)


def test_more_descriptors_than_one_message_may_carry() -> None:
    file = File()
    with Pair() as pair:
        socket.send_fds(pair.a.sock, [packed({"kind": "x", "fds": 252})], [file.fd] * 252)
        with pytest.raises(FormatError, match="raise the limit of open files"):
            pair.b.fill()
    os.close(file.fd)


def test_a_descriptor_that_cannot_be_had_closes_the_others() -> None:
    file = File()
    with Pair() as pair:
        with pytest.raises(OSError):
            pair.a.put(frame("x", fds=[file.fd, file.fd, 1_000_000]))
        assert not pair.a.waiting
    left = []
    for fd in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # the one of this listing
            left += [fd] if file.is_at(fd) else []
    for fd in left:
        os.close(fd)
    assert left == [file.fd]


def test_a_connection_closes_once() -> None:
    pair = Pair()
    for _ in range(2):
        pair.a.close()
        pair.b.close()


def test_the_other_side_is_gone() -> None:
    file = File()
    with Pair() as pair:
        pair.b.sock.close()
        pair.a.put(frame("x", b"payload", [file.fd]))
        assert not pair.a.drain() and pair.a.waiting
        assert not pair.a.fill()
    a, b = socket.socketpair()
    b.close()
    with pytest.raises(PeerError, match="the keeper is gone"):
        send(a, frame("x", bytes(10_000_000), [file.fd]))
    a.close()
    os.close(file.fd)


def test_a_side_that_does_nothing() -> None:
    a, b = socket.socketpair()
    for s in (a, b):
        s.settimeout(0.001)
    with pytest.raises(DeadlineError, match="does not take 'x'"):
        send(a, frame("x", bytes(10_000_000)))
    there = Connection(a)
    with pytest.raises(DeadlineError, match="no answer in time"):
        receive(a, there)
    there.close()
    b.close()


# Who is at the other end.


def test_own_peer() -> None:
    a, b = socket.socketpair()
    assert own_peer(a) == os.getpid()
    a.close()
    b.close()


def test_a_proof_is_of_one_secret_one_role_and_two_nonces() -> None:
    known = {
        proof(secret, role, mine, theirs)
        for secret in (b"", b"a", b"b")
        for role in ("keeper", "caller")
        for mine in ("0", "1")
        for theirs in ("0", "1")
    }
    assert len(known) == 24


class Host:
    """A keeper of another host, as somebody plays it: `talk` is given the connection of the one who calls."""

    def __init__(self, talk: Any) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.settimeout(60.0)
        self.address = self._server.getsockname()
        self._talk, self.heard = talk, ""
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        sock, _ = self._server.accept()
        connection = Connection(sock, trusted=False)
        try:
            self._talk(sock, connection)
        except (FormatError, PeerError) as e:
            self.heard = type(e).__name__
        connection.close()

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        self._server.close()


SECRET = b"of the job"


def keeper(sock: socket.socket, connection: Connection, secret: bytes = SECRET) -> None:
    theirs = receive(sock, connection)["nonce"]
    send(sock, frame("hello", nonce="mine", proof=proof(secret, "keeper", "mine", theirs)))
    assert receive(sock, connection)["proof"] == proof(SECRET, "caller", theirs, "mine")
    send(sock, frame("welcome"))


def test_both_sides_know_the_secret() -> None:
    with Host(keeper) as host:
        sock, connection = greet(host.address, SECRET, 60.0)
        assert connection.trusted and connection.sock is sock
        connection.close()
    assert host.heard == ""


def mirror(sock: socket.socket, connection: Connection) -> None:
    """Sends back what it was sent, and has no secret."""
    hello = receive(sock, connection)
    send(sock, frame("hello", nonce=hello["nonce"], proof=proof(b"", "caller", hello["nonce"], hello["nonce"])))
    receive(sock, connection)


def silent(sock: socket.socket, connection: Connection) -> None:
    receive(sock, connection)


def rude(sock: socket.socket, connection: Connection) -> None:
    receive(sock, connection)
    sock.sendall(HEADER.pack(b"ck", 1, 100, 1 << 32))


def cold(sock: socket.socket, connection: Connection) -> None:
    """Knows the secret, and takes the caller for somebody else."""
    theirs = receive(sock, connection)["nonce"]
    send(sock, frame("hello", nonce="mine", proof=proof(SECRET, "keeper", "mine", theirs)))
    send(sock, frame("refused"))
    receive(sock, connection)


def large(sock: socket.socket, connection: Connection) -> None:
    """Sends more than a greeting before the caller is known to it."""
    theirs = receive(sock, connection)["nonce"]
    send(sock, frame("hello", nonce="mine", proof=proof(SECRET, "keeper", "mine", theirs)))
    send(sock, frame("welcome", bytes(10_000)))
    receive(sock, connection)


def short(sock: socket.socket, connection: Connection) -> None:
    receive(sock, connection)
    send(sock, frame("hello", nonce=1))


@pytest.mark.parametrize(
    ("talk", "error"),
    [
        (lambda s, c: keeper(s, c, b"another"), PeerError),
        (mirror, PeerError),
        (silent, PeerError),
        (cold, PeerError),
        (large, FormatError),
        (rude, FormatError),
        (short, FormatError),
    ],
)
def test_a_keeper_of_another_job(talk: Any, error: type[Exception]) -> None:
    with Host(talk) as host, pytest.raises(error):
        greet(host.address, SECRET, 60.0)


def test_nobody_is_there() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    address = server.getsockname()
    server.close()
    with pytest.raises(PeerError, match="no keeper at 127"):
        greet(address, SECRET, 60.0)
