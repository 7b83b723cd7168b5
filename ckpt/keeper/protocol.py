"""Frames: what trainers and keepers say to each other, over a Unix socket of one host or over TCP between hosts.

    magic "ck", version u16, length of the head u32, length of the payload u64, all little-endian; the head, a JSON object
    with "kind"; the payload, raw bytes. File descriptors (Unix sockets only) come with the frame; "fds" says how many.

Both lengths are checked against a limit before anything is allocated for them. Before a TCP connection is
authenticated, frames are small, few and in a hurry; `greet` is the caller's side of that.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import socket
import struct
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckpt.errors import DeadlineError, FormatError, PeerError

__all__ = ["Connection", "Frame", "fill", "frame", "greet", "heading", "own_peer", "proof", "receive", "send"]

VERSION = 1
_HEADER = struct.Struct("<2sHIQ")
_MAX_HEAD = 64 << 20
_MAX_PAYLOAD = 4 << 30
_SMALL = 4096
_MAX_FDS = 250  # a little less than the kernel passes at once


@dataclass(frozen=True)
class Frame:
    """One message. `fds` belong to whoever received it."""

    kind: str
    head: Mapping[str, Any]
    payload: bytes = b""
    fds: Sequence[int] = ()

    def __getitem__(self, name: str) -> Any:
        try:
            return self.head[name]
        except KeyError:
            raise FormatError(
                f"a frame {self.kind!r} without {name!r}; is the other side of another version?"
            ) from None


def frame(kind: str, payload: bytes = b"", fds: Sequence[int] = (), **head: Any) -> Frame:
    return Frame(kind, head, payload, fds)


def heading(message: Frame, payload: int) -> bytes:
    """What goes before a payload of so many bytes, wherever these are."""
    content = {**message.head, "kind": message.kind}
    if message.fds:
        content["fds"] = len(message.fds)
    head = json.dumps(content, separators=(",", ":")).encode()
    return _HEADER.pack(b"ck", VERSION, len(head), payload) + head


def _encode(message: Frame) -> bytes:
    return heading(message, len(message.payload))


@dataclass
class Connection:
    """One end of a stream: bytes in -> frames, frames -> bytes out. Never blocks; the socket must not either.

    trusted  whether large frames are accepted yet
    """

    sock: socket.socket
    trusted: bool = True
    born: float = field(default_factory=time.monotonic)
    _in: bytearray = field(default_factory=bytearray)
    _fds: deque[int] = field(default_factory=deque)
    _out: deque[tuple[memoryview, Sequence[int]]] = field(default_factory=deque)

    def fill(self) -> bool:
        """Reads what has come. False at the end of the stream."""
        unix = self.sock.family == socket.AF_UNIX
        while True:
            try:
                if unix:
                    data, fds, flags, _ = socket.recv_fds(self.sock, 1 << 20, _MAX_FDS)
                    self.take(fds)
                    if flags & socket.MSG_CTRUNC:
                        raise FormatError("file descriptors were lost on the way; raise the limit of open files")
                else:
                    data = self.sock.recv(1 << 20)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False
            self._in += data
            if not self.trusted and len(self._in) > 4 * _SMALL:
                raise FormatError("a stranger sent more than a greeting")
            if len(data) < 1 << 16:
                return True

    def take(self, fds: Sequence[int]) -> None:
        """Descriptors that came; no program that this process starts gets them."""
        for fd in fds:
            os.set_inheritable(fd, False)
        self._fds.extend(fds)

    def frames(self) -> Iterable[Frame]:
        """The frames that are complete. Raises FormatError for what is none."""
        while True:
            size = _frame_size(self._in, self.trusted)
            if size is None or len(self._in) < size[0] + size[1]:
                return
            head_end, payload = size
            message = _parse(bytes(self._in[_HEADER.size : head_end]), bytes(self._in[head_end : head_end + payload]))
            del self._in[: head_end + payload]
            n = message.head.get("fds", 0)
            if not isinstance(n, int) or not 0 <= n <= len(self._fds):
                raise FormatError("a frame speaks of file descriptors that did not come with it")
            yield Frame(message.kind, message.head, message.payload, [self._fds.popleft() for _ in range(n)])

    def put(self, message: Frame) -> None:
        """Queues a frame; `drain` sends it. Its descriptors are duplicated and closed once they are sent."""
        own: list[int] = []
        try:
            for fd in message.fds:
                own.append(os.dup(fd))
        except OSError:
            for fd in own:
                os.close(fd)
            raise
        self._out.append((memoryview(_encode(message)), own))
        if message.payload:
            self._out.append((memoryview(message.payload), ()))

    @property
    def waiting(self) -> bool:
        return bool(self._out)

    def drain(self) -> bool:
        """Sends what the socket takes. False if the other side is gone."""
        while self._out:
            data, fds = self._out[0]
            try:
                if fds:
                    sent = socket.send_fds(self.sock, [data], fds)
                    for fd in fds:
                        os.close(fd)
                else:
                    sent = self.sock.send(data)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if sent == len(data):
                self._out.popleft()
            else:
                self._out[0] = (data[sent:], ())
        return True

    def close(self) -> None:
        """Closes the socket and every descriptor that nobody took."""
        for fd in [*self._fds, *(fd for _, fds in self._out for fd in fds)]:
            os.close(fd)
        self._fds.clear()
        self._out.clear()
        self.sock.close()


def _frame_size(data: bytes | bytearray, trusted: bool) -> tuple[int, int] | None:
    """(end of the head, bytes of the payload) of the frame that begins here, None if that is not to be seen yet."""
    if len(data) < _HEADER.size:
        if data[:2] != b"ck"[: len(data)]:
            raise FormatError("not a frame of ckpt")
        return None
    magic, version, head, payload = _HEADER.unpack_from(data)
    if magic != b"ck":
        raise FormatError("not a frame of ckpt")
    if version != VERSION:
        raise FormatError(f"frame version {version}, this ckpt speaks {VERSION}; use one version on all hosts")
    if head > (_MAX_HEAD if trusted else _SMALL) or payload > (_MAX_PAYLOAD if trusted else 0):
        raise FormatError(f"a frame of {head} + {payload} bytes: more than is allowed here")
    return _HEADER.size + head, payload


def _parse(head: bytes, payload: bytes) -> Frame:
    try:
        content = json.loads(head)
        return Frame(str(content.pop("kind")), content, payload)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as e:
        raise FormatError(f"the head of a frame cannot be read ({type(e).__name__})") from None


def send(sock: socket.socket, message: Frame) -> None:
    """Sends one frame over a blocking socket. Raises PeerError if the other side is gone, DeadlineError at a timeout."""
    data = memoryview(_encode(message))
    try:
        if message.fds:
            data = data[socket.send_fds(sock, [data], list(message.fds)) :]
        sock.sendall(data)
        if message.payload:
            sock.sendall(message.payload)
    except TimeoutError:
        raise DeadlineError(f"the keeper does not take {message.kind!r}; is it stopped?") from None
    except OSError as e:
        raise PeerError(f"the keeper is gone ({e.strerror or e})") from None


def receive(sock: socket.socket, connection: Connection, begun: bytes | bytearray = b"") -> Frame:
    """Waits for one frame on a blocking socket, of which `begun` was read already. PeerError at its end, DeadlineError at a
    timeout."""
    connection._in += begun
    while True:
        for message in connection.frames():
            return message
        try:
            if sock.family == socket.AF_UNIX:
                data, fds, _, _ = socket.recv_fds(sock, 1 << 20, _MAX_FDS)
                connection.take(fds)
            else:
                data = sock.recv(1 << 20)
        except TimeoutError:
            raise DeadlineError("the keeper gave no answer in time; is it stopped?") from None
        except OSError as e:
            raise PeerError(f"the keeper is gone ({e.strerror or e})") from None
        if not data:
            raise PeerError("the keeper closed the connection")
        connection._in += data


def fill(sock: socket.socket, into: memoryview) -> None:
    """Waits for as many bytes as there is room for. PeerError at the end of the stream, DeadlineError at a timeout, of
    Python's or of the kernel's."""
    while into:
        try:
            n = sock.recv_into(into)
        except (TimeoutError, BlockingIOError):
            raise DeadlineError("the keeper gave no answer in time; is it stopped?") from None
        except OSError as e:
            raise PeerError(f"the keeper is gone ({e.strerror or e})") from None
        if not n:
            raise PeerError("the keeper closed the connection")
        into = into[n:]


def own_peer(sock: socket.socket) -> int:
    """The pid at the other end of a Unix socket. Raises PeerError unless it is this user's (or root's)."""
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if uid not in (os.getuid(), 0) and os.getuid() != 0:
        raise PeerError(
            f"process {pid} of user {uid} holds the name of this job's keeper; set CKPT_JOB to another name"
        )
    return int(pid)


def proof(secret: bytes, role: str, mine: str, theirs: str) -> str:
    """What shows that somebody knows the job's secret: an HMAC over both sides' nonces and his part."""
    return hmac.new(secret, f"ckpt {VERSION} {role} {mine} {theirs}".encode(), hashlib.sha256).hexdigest()


def greet(address: tuple[str, int], secret: bytes, timeout: float) -> tuple[socket.socket, Connection]:
    """Connects to a keeper of another host and proves to it, as it does to us, that both belong to the job.

    Raises PeerError if it is not there or not of this job, DeadlineError if it does not answer.
    """
    try:
        sock = socket.create_connection(address, timeout)
    except OSError as e:
        raise PeerError(f"no keeper at {address[0]}:{address[1]} ({e.strerror or e})") from None
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection = Connection(sock, trusted=False)
    try:
        nonce = os.urandom(16).hex()
        send(sock, frame("hello", nonce=nonce))
        answer = receive(sock, connection)
        theirs = str(answer["nonce"])
        if answer.kind != "hello" or not hmac.compare_digest(
            str(answer["proof"]), proof(secret, "keeper", theirs, nonce)
        ):
            raise PeerError(f"{address[0]}:{address[1]} is not a keeper of this job")
        send(sock, frame("prove", proof=proof(secret, "caller", nonce, theirs)))
        if receive(sock, connection).kind != "welcome":  # until then, no more than a greeting is read
            raise PeerError(f"{address[0]}:{address[1]} does not take this process for one of its job")
        connection.trusted = True
    except BaseException:
        connection.close()
        raise
    return sock, connection
