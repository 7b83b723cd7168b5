"""Many connections, one thread: frames in, frames out, nothing that waits."""

from __future__ import annotations

import heapq
import hmac
import itertools
import logging
import os
import queue
import selectors
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from ckpt.errors import CkptError, FormatError, PeerError, to_wire
from ckpt.keeper.protocol import Connection, Frame, frame, own_peer, proof

__all__ = ["Loop", "Peer", "alive"]

log = logging.getLogger("ckpt.keeper")
_SILENT = 20  # seconds after which a host that answers nothing, not even its kernel, counts as gone
_GREETING = 5.0  # seconds in which a stranger has to prove himself
_STRANGERS = 64  # at once; more are not let in


@dataclass(eq=False)
class Peer:
    """Whoever is at the other end of a connection.

    role     "trainer" (this host's, by Unix socket), "stranger" (TCP, not authenticated yet), "caller" (authenticated)
             or "host" (another keeper of the job)
    rank     of a trainer, once it has attached; `living`: it takes part in the life under way, with plan number `ready`;
             `closed`: it said that it is done
    """

    link: Connection
    role: str
    pid: int = 0
    process: int = -1  # a pidfd
    rank: int = -1
    host: str = ""
    living: bool = False
    ready: int = -1
    closed: bool = False
    nonces: tuple[str, str] = ("", "")


@dataclass
class Loop:
    """`heard` gets every frame of those that are not strangers; a CkptError that it raises ends the connection. `gone`
    is told of every end but a stranger's. `secret` is what strangers must know."""

    heard: Callable[[Peer, Frame], None]
    gone: Callable[[Peer], None]
    secret: bytes = b""
    clock: Callable[[], float] = time.monotonic
    peers: list[Peer] = field(default_factory=list)
    _actions: queue.SimpleQueue[Callable[[], None]] = field(default_factory=queue.SimpleQueue)
    _timers: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._numbers = itertools.count()
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        self._ear.setblocking(False)
        self._selector.register(self._ear, selectors.EVENT_READ)
        self._listeners: list[socket.socket] = []

    def listen(self, listener: socket.socket) -> None:
        """Accepts from a listening socket: trainers from a Unix one, strangers from TCP."""
        listener.setblocking(False)
        self._listeners.append(listener)
        self._selector.register(listener, selectors.EVENT_READ)

    def later(self, action: Callable[[], None]) -> None:
        """Has the loop do something; from any thread, or a signal handler."""
        self._actions.put(action)
        with suppress(BlockingIOError):  # it rings already
            self._bell.send(b"!")

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Has the loop do something in a while."""
        heapq.heappush(self._timers, (self.clock() + seconds, next(self._numbers), action))

    def run(self, over: Callable[[], bool]) -> None:
        """Until `over` says so; asked after whatever happens."""
        while not over():
            wait = max(0.0, self._timers[0][0] - self.clock()) if self._timers else None
            for key, mask in self._selector.select(wait):
                if key.fileobj in self._listeners:
                    self._accept(key.fileobj)
                elif key.fileobj is self._ear:
                    self._ear.recv(4096)
                elif isinstance(key.fileobj, int):
                    self._died(key.data)
                elif key.data in self.peers:
                    self._serve(key.data, mask)
            while self._timers and self._timers[0][0] <= self.clock():
                self._do(heapq.heappop(self._timers)[2])
            while not self._actions.empty():
                self._do(self._actions.get())
        for peer in list(self.peers):
            peer.link.drain()
            self.hang_up(peer)

    def _do(self, action: Callable[[], None]) -> None:
        """What fails here must not take the memory with it that this process holds."""
        try:
            action()
        except Exception as e:
            log.error("%s: %s", type(e).__name__, e, exc_info=e)

    def add(self, sock: socket.socket, link: Connection, role: str) -> Peer:
        """Takes over a connection."""
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            _mind_silence(sock)
        peer = Peer(link, role)
        self.peers.append(peer)
        self._selector.register(sock, selectors.EVENT_READ, peer)
        return peer

    def tell(self, peer: Peer, message: Frame) -> None:
        """Sends a frame as far as that goes without waiting, the rest when it does."""
        if peer in self.peers:
            peer.link.put(message)
            peer.link.drain()
            self._watch(peer)

    def hang_up(self, peer: Peer) -> None:
        """Ends a connection; `gone` is not told."""
        if peer in self.peers:
            self.peers.remove(peer)
            self._selector.unregister(peer.link.sock)
            peer.link.close()
            if peer.process >= 0:
                self._selector.unregister(peer.process)
                os.close(peer.process)

    def release(self, peer: Peer) -> socket.socket:
        """Gives a connection to somebody else, blocking; what its other end sent is read, and nothing is left to send."""
        self.peers.remove(peer)
        self._selector.unregister(peer.link.sock)
        peer.link.sock.setblocking(True)
        return peer.link.sock

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError:
            return
        if listener.family == socket.AF_UNIX:
            try:
                pid = own_peer(sock)
            except CkptError:
                sock.close()
                return
            peer = self.add(sock, Connection(sock), "trainer")
            peer.pid = pid
            with suppress(OSError, AttributeError):  # it may be dead already, which the socket tells
                peer.process = os.pidfd_open(pid)
                self._selector.register(peer.process, selectors.EVENT_READ, peer)
            return
        if sum(p.role == "stranger" for p in self.peers) >= _STRANGERS or not self.secret:
            sock.close()
            return
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer = self.add(sock, Connection(sock, trusted=False), "stranger")
        self.after(_GREETING, lambda: self.hang_up(peer) if peer.role == "stranger" else None)

    def _died(self, peer: Peer) -> None:
        """A trainer's process has ended. Its connection tells as much, unless a child of it still holds that."""
        if peer in self.peers:
            self._serve(peer, selectors.EVENT_READ)
        if peer in self.peers:
            self.hang_up(peer)
            self.gone(peer)

    def _serve(self, peer: Peer, mask: int) -> None:
        alive = True
        if mask & selectors.EVENT_READ:
            try:
                alive = peer.link.fill()
                for message in peer.link.frames():
                    if peer.role == "stranger":
                        self._greeted(peer, message)
                    else:
                        self.heard(peer, message)
                    if peer not in self.peers:
                        return
            except CkptError as e:
                if peer.role != "stranger":
                    peer.link.put(frame("refused", error=to_wire(e)))
                alive = False
            except MemoryError:  # who speaks may come again; what is held here may not
                log.error("no memory to hear a %s: its connection ends; raise the limits of this process", peer.role)
                alive = False
        alive = peer.link.drain() and alive
        if alive:
            self._watch(peer)
            return
        self.hang_up(peer)
        if peer.role != "stranger":
            self.gone(peer)

    def _greeted(self, peer: Peer, message: Frame) -> None:
        """The two steps in which a stranger and this keeper prove to each other that they know the job's secret."""
        if message.kind == "hello" and not peer.nonces[0]:
            peer.nonces = os.urandom(16).hex(), str(message["nonce"])[:64]
            mine, theirs = peer.nonces
            peer.link.put(frame("hello", nonce=mine, proof=proof(self.secret, "keeper", mine, theirs)))
        elif message.kind == "prove" and peer.nonces[0]:
            mine, theirs = peer.nonces
            if not hmac.compare_digest(str(message["proof"]), proof(self.secret, "caller", theirs, mine)):
                raise PeerError("not of this job")
            peer.role, peer.link.trusted = "caller", True
            peer.link.put(frame("welcome"))
        else:
            raise FormatError("not a greeting")

    def _watch(self, peer: Peer) -> None:
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.link.waiting else 0)
        self._selector.modify(peer.link.sock, wanted, peer)


def _mind_silence(sock: socket.socket) -> None:
    """A host that lost its power says nothing: the kernel asks, and ends the connection. One that is merely stopped answers."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _SILENT // 4)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _SILENT // 4)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _SILENT)


def alive(pid: int) -> bool:
    """Whether a process runs; one that is stopped or a zombie does not count."""
    with suppress(OSError), open(f"/proc/{pid}/stat") as f:
        return f.read().rpartition(")")[2].split()[0] not in ("T", "t", "Z", "X")
    return False
