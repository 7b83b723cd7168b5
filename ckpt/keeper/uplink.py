"""A keeper's line to the seat of the lead: its own, or at the keeper of another host, reached again and again."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from ckpt.errors import CkptError
from ckpt.keeper.loop import Loop, Peer
from ckpt.keeper.protocol import Frame, frame, greet

__all__ = ["Uplink"]

_RETRY = 1.0  # seconds between two attempts to reach the lead
_GREETING = 5.0


class Uplink:
    """What a keeper has to say to the seat. `seat_here` hears it while this host leads."""

    def __init__(self, loop: Loop, host: str, seat_here: Callable[[Frame], None]) -> None:
        self._loop, self._host, self._seat_here = loop, host, seat_here
        self.lead_host = host
        self.addresses: dict[str, tuple[str, int]] = {}
        self.peer: Peer | None = None  # the keeper that has the seat, if it is not this one
        self._syncs: list[tuple[int, int]] = []  # rank and number of questions that the seat has to have heard
        self._ended = False

    @property
    def here(self) -> bool:
        """Whether this keeper has the seat."""
        return self.lead_host == self._host

    def lead(self, host: str) -> bool:
        """From now on this host leads; whether that is news."""
        if host == self.lead_host:
            return False
        self.lead_host = host
        if self.peer is not None:
            self._loop.hang_up(self.peer)
            self.peer = None
        return True

    def tell(self, event: Frame) -> None:
        """Tells the seat. While it is out of reach nobody hears; what counts is said again when it is back."""
        if self.here:
            self._seat_here(event)
        elif self.peer is not None:
            self._loop.tell(self.peer, event)

    def sync(self, rank: int, number: int) -> bool:
        """Whether the seat has heard everything that was said until now. If not, it is asked, and a trainer's question
        answered when it says so."""
        if self.here:
            return True
        self._syncs.append((rank, number))
        self.tell(frame("sync", to=[rank, number]))
        return False

    def synced(self, order: Frame) -> None:
        """The seat has heard what was said before a question."""
        asked = int(order["to"][0]), int(order["to"][1])
        if asked in self._syncs:
            self._syncs.remove(asked)
            for peer in [p for p in self._loop.peers if p.rank == asked[0]]:
                self._loop.tell(peer, frame("answer", id=asked[1]))

    def rejoin(self, epoch: int) -> None:
        """The seat is there, at plan number `epoch`: says again what it has not heard."""
        for peer in [p for p in self._loop.peers if p.living and p.ready == epoch]:
            self.tell(frame("ready", rank=peer.rank, epoch=epoch))
        for asked in self._syncs:
            self.tell(frame("sync", to=list(asked)))

    def lost(self) -> None:
        """The keeper that has the seat is gone: looks for it again."""
        self.peer = None
        self._loop.after(_RETRY, self.reach)

    def close(self) -> None:
        """Looks for nobody any more."""
        self._ended = True

    def reach(self) -> None:
        """Connects to the keeper that has the seat, in a thread, again and again until it is there."""
        if self.peer is not None or self.here or self._ended:
            return
        address, secret, found = self.addresses[self.lead_host], self._loop.secret, queue.SimpleQueue[Any]()

        def connect() -> None:
            try:
                found.put(greet(address, secret, _GREETING))
            except CkptError as e:
                found.put(e)
            self._loop.later(connected)

        def connected() -> None:
            answer = found.get()
            if isinstance(answer, CkptError):
                self._loop.after(_RETRY, self.reach)
                return
            sock, link = answer
            if self.peer is not None or self.here:
                link.close()
                return
            self.peer = self._loop.add(sock, link, "lead")
            self._loop.tell(self.peer, frame("host", host=self._host))

        threading.Thread(target=connect, daemon=True).start()
