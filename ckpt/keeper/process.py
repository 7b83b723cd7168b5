"""The keeper: one process per host and job. Holds what the trainers of its host sealed, passes on which steps are next,
writes their packs to storage, and outlives the trainers.

    WAITING    no trainer has begun a life yet; ends after the grace time
    SERVING    a life is under way
    ORPHANED   the last trainer went without `close`: the newest complete step is written to storage at once; a new life
               may begin until the grace time is over, then it ends
    CLOSING    every trainer said `close`: ends when nothing is being written

Started by a trainer through `ckpt.keeper.link`, in a session of its own; where no process can be started, it is a thread of
that trainer. What happens on this host is told to the seat of the lead, which is here or at the keeper of another host; what
that orders is done here.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Collection

from ckpt import faults
from ckpt.backends import Backend
from ckpt.config import Every, Settings
from ckpt.errors import CkptError, ConflictError
from ckpt.format.codec import parse_codecs
from ckpt.keeper.averaging import Averaging
from ckpt.keeper.loop import Loop, Peer, alive
from ckpt.keeper.protocol import Frame, frame
from ckpt.keeper.rescue import Rescue
from ckpt.keeper.seat import Life, Seat
from ckpt.keeper.service import Service
from ckpt.keeper.shield import Shield
from ckpt.keeper.tier import Tier
from ckpt.keeper.uplink import Uplink
from ckpt.keeper.vault import Vault
from ckpt.keeper.watch import Near, Protected, fence_others
from ckpt.keeper.wire import decode_redundancy
from ckpt.keeper.writing import Writing

__all__ = ["Keeper"]

log = logging.getLogger("ckpt.keeper")
_START = 60.0  # seconds in which the first trainer has to come


class Keeper:
    """`listener`: a listening Unix socket; `grace`: seconds."""

    def __init__(self, listener: socket.socket, config: Settings, grace: float) -> None:
        self.config, self.grace, self.clock = config, grace, time.monotonic
        self.loop = Loop(self._hear, self._gone)
        self.loop.listen(listener)
        self._listener = listener
        self.vault = Vault()
        self.life: Life | None = None
        self.host = config.host or socket.gethostname()
        self.uplink = Uplink(self.loop, self.host, lambda event: self.seat.hear(event))
        self.shield = Shield(self.host, config, self.loop, self.uplink.tell, self.uplink.addresses)
        self._service = Service(self.loop, self.vault, self.shield, self.uplink.tell)
        self.averaging = Averaging(self.loop.later, self.vault.memory, self.vault.plan_of, self.uplink.tell)
        self._writing = Writing(self.host, config, self.loop.later, self.uplink.tell)
        work = self._writing.work
        self.tier = Tier(self.loop, config, work, self._tell_trainers)
        self._rescue = Rescue(self.host, config, self.loop, self.uplink, self.vault.held, lambda: self.life, work)
        self.seat = self._new_seat()
        self._tcp: socket.socket | None = None
        self._untold: deque[str] = deque(maxlen=8)  # what failed while no trainer was there to hear it
        self._granted: set[int] = set()  # slots that trainers may be writing to
        self._ending = False
        self._until: float | None = self.clock() + max(grace, _START)  # whoever started it is on his way
        self.loop.after(max(grace, _START), lambda: None)

    def _new_seat(self) -> Seat:
        loop, config, made = self.loop, self.config, list[Seat]()

        def order(order: Frame, hosts: Collection[str] | None) -> None:
            if self.seat is made[0]:  # and not one that has the seat no more, but something under way
                self._order(order, hosts)

        def others(generation: int, near: Near, then: Callable[[list[Frame]], None]) -> None:
            fence_others(generation, near, loop.secret, loop.later, then)

        held, patience = self.vault.held, config.protect_patience
        made.append(Seat(order, self._writing.work, loop.after, others, self._rescue.of, held, config.direct, patience))
        return made[0]

    def run(self) -> None:
        """Until the life cycle is over."""
        if threading.current_thread() is threading.main_thread():  # and not a guest in a trainer
            signal.signal(signal.SIGTERM, lambda *_: self.loop.later(self._terminate))
        self.loop.run(self._over)
        self.uplink.close()
        self.shield.close()
        self.tier.close()
        self._writing.close()
        self.vault.close()
        for sock in (self._tcp, self._listener):  # a guest's process goes on: its name is free for another one
            if sock is not None:
                sock.close()

    def _over(self) -> bool:
        if self._writing.busy or self.seat.busy or self.averaging.busy:
            return False
        over = self._ending or (self._until is not None and self.clock() >= self._until)
        return over and not self.tier.holds()

    # What others say.

    def _hear(self, peer: Peer, message: Frame) -> None:
        """One message. An error is the sender's, and ends its connection."""
        try:
            asked = self._service.of(peer.role, message.kind)
            if peer.role == "trainer":
                if peer.rank < 0 and message.kind not in ("attach", "look"):
                    raise ConflictError(f"{message.kind!r} from somebody who has not attached")
                answer = asked or getattr(self, f"_on_{message.kind}", None)
                if message.kind in ("pin", "inventory"):  # what is being folded will be whole, or not, by then
                    self.averaging.settled(-1, lambda: self._answer(peer, message, answer))
                else:
                    self._answer(peer, message, answer)
            elif peer.role == "caller":
                self._answer(peer, message, asked or getattr(self, f"_call_{message.kind}", None))
            elif peer is self.uplink.peer:
                self._obey(message)
            elif message.kind == "sync":
                self.loop.tell(peer, frame("synced", to=message["to"]))
            else:
                self.seat.hear(message)
        except (CkptError, MemoryError):
            raise
        except Exception as e:  # one bad message is no reason to end
            log.error("%r from rank %d", message.kind, peer.rank, exc_info=e)
            raise ConflictError(f"{message.kind!r} makes no sense here ({type(e).__name__}: {e})") from e

    def _answer(self, peer: Peer, message: Frame, answer: Callable[[Peer, Frame], Frame | None] | None) -> None:
        if answer is None:
            raise ConflictError(f"{message.kind!r}, which this keeper does not know")
        found = answer(peer, message)
        if found is not None:
            self.loop.tell(peer, Frame("answer", {**found.head, "id": message["id"]}, found.payload, found.fds))

    # Trainers.

    def _on_attach(self, peer: Peer, message: Frame) -> Frame:
        """A trainer says who it is; it is told what there is, and gets the memory of its rank."""
        rank = int(message["rank"])
        for other in [p for p in self.loop.peers if p.rank == rank and p is not peer]:
            if other.pid != peer.pid and not other.closed and alive(other.pid):
                raise ConflictError(
                    f"rank {rank} of this run is being trained by process {other.pid}; one job at a time may write to "
                    "a run: end that one, or name another run"
                )
            self._fence(other)
        peer.rank = rank
        self._until, self._ending = None, False
        brought = len(message["bring"])  # if this keeper is new: its predecessor's
        self.vault.put(rank, message["bring"], message.fds[:brought], replace=False)
        self._writing.listen(rank, message.fds[brought:])
        faults.point("keeper attached")
        own, untold = self.vault.of(rank), list(self._untold)
        self._untold.clear()
        slots = [[slot, m.size] for slot, m in own]
        return frame(
            "answer",
            fds=[m.fd for _, m in own],
            slots=slots,
            host=self.host,
            used=self.vault.slots,
            secret=self.loop.secret.hex(),
            untold=untold,
            known=self.uplink.addresses,
            newest=max(self.vault.held, default=(-1, -1)),
            generation=self.life.generation if self.life else -1,
        )

    def _on_listen(self, peer: Peer, message: Frame) -> Frame:
        """The job has several hosts: opens the door for their keepers and trainers, who have to know the secret."""
        if self._tcp is None:
            sock = socket.create_server((str(message["address"]), int(message["port"])), backlog=256)
            self._tcp = sock
            self.loop.listen(sock)
        return frame("answer", port=self._tcp.getsockname()[1])

    def _on_peers(self, peer: Peer, message: Frame) -> Frame:
        """The keepers of the job, by host: where they listen, which of them has the seat, what they have to know."""
        needed = {host for held in self.vault.held.values() for host in held.hosts.values()}
        for host in self.uplink.addresses.keys() - needed:  # nothing of what is held here is there
            del self.uplink.addresses[host]
        self.uplink.addresses |= {str(h): (str(a), int(p)) for h, (a, p) in message["hosts"].items()}
        self.loop.secret = bytes.fromhex(message["secret"])
        newest = int(message.head.get("generation", -1))
        behind = self.life is not None and self.life.generation < newest  # it was out of reach
        if self.uplink.lead(str(message["lead"])) or behind:
            self.seat = self._new_seat()
        self.uplink.reach()
        return frame("answer")

    def _on_begin(self, peer: Peer, message: Frame) -> Frame:
        """A life begins, or a trainer joins the one that has begun."""
        generation = int(message["generation"])
        known = self.life
        if known is not None and generation < known.generation:
            raise ConflictError(f"generation {generation} is over: generation {known.generation} of this run has begun")
        first = known is None or generation > known.generation or not any(p.living for p in self.loop.peers)
        slots = [int(n) for n in message["slots"]]
        if first:
            hosts = {int(rank): str(host) for rank, host in message["ranks"].items()}
            codecs = parse_codecs(message["codecs"])
            local = self.tier.begin(message.head.get("local"), str(message["run"]), generation, first)
            self.life = Life(generation, int(message["world"]), str(message["run"]), codecs, hosts, local)
            self._granted.clear()
            if message["redundancy"] is None:  # nobody will say that the life has begun
                self.shield.pinned = False
            self.averaging.begin(self.life.world)
            if self.uplink.here:
                schedules = message["memory"], message["storage"], message.head.get("near")
                memory, storage, near = (None if e is None else Every(*e) for e in schedules)
                extents = tuple(int(n) for n in message["extents"])
                redundancy = decode_redundancy(message["redundancy"])
                protected = Protected(redundancy, hosts, extents) if redundancy is not None else None
                self.seat.begin(self.life, memory, storage, slots, int(message["start"]), protected, near)
        self.vault.put(peer.rank, message["new"], message.fds, replace=True)
        peer.living, peer.ready = True, -1
        if not first:
            self.tier.begin(message.head.get("local"), str(message["run"]), generation, first)
            self.uplink.tell(frame("slots", slots=slots, extents=message["extents"]))
        return frame("answer")

    def _on_plan(self, peer: Peer, message: Frame) -> None:
        self._order(frame("plan", message.payload, key=message["key"]))

    def _on_averages(self, peer: Peer, message: Frame) -> Frame:
        """What a rank's running averages are, as of where it begins."""
        self.averaging.seed(peer.rank, message)
        return frame("answer")

    def _on_ready(self, peer: Peer, message: Frame) -> None:
        peer.ready = int(message["epoch"])
        self.uplink.tell(frame("ready", rank=peer.rank, epoch=peer.ready))

    def _on_sync(self, peer: Peer, message: Frame) -> Frame | None:
        """Answered when the seat has heard everything that was said before, and its orders until then have come."""
        return frame("answer") if self.uplink.sync(peer.rank, int(message["id"])) else None

    def _on_at(self, peer: Peer, message: Frame) -> None:
        if peer.living:
            self.uplink.tell(frame("at", step=message["step"]))

    def _on_sealed(self, peer: Peer, message: Frame) -> None:
        if "marks" in message.head and peer.rank == 0:
            self._order(frame("weigh", step=message["step"], marks=message["marks"]))
        self.averaging.sealed(peer.rank, message)

    def _on_missed(self, peer: Peer, message: Frame) -> None:
        self.uplink.tell(Frame("missed", {**message.head, "rank": peer.rank}))

    def _on_want(self, peer: Peer, message: Frame) -> Frame:
        there, done = self.seat.want(int(message["step"]))
        return frame("answer", there=there, done=done)

    def _on_brought(self, peer: Peer, message: Frame) -> Frame:
        return frame("answer", quiet=self.tier.quiet())

    def _on_done(self, peer: Peer, message: Frame) -> None:
        self.uplink.tell(frame("done", rank=peer.rank, damaged=message["damaged"]))

    def _on_flush(self, peer: Peer, message: Frame) -> None:
        self.uplink.tell(frame("rescue", deserted=False))

    def _on_close(self, peer: Peer, message: Frame) -> None:
        peer.closed = True

    def _on_look(self, peer: Peer, message: Frame) -> Frame:
        """What this keeper holds, for people."""
        trainers = [{"rank": p.rank, "pid": p.pid} for p in self.loop.peers if p.rank >= 0]
        address = "{}:{}".format(*self._tcp.getsockname()) if self._tcp is not None else ""
        return frame(
            "answer", host=self.host, pid=os.getpid(), run=self.life.run if self.life else "", lead=self.uplink.lead_host,
            trainers=trainers, address=address, **self._service.look(),
            lost=self.seat.watch.lost() if self.seat.watch else [],
        )  # fmt: skip

    def _fence(self, peer: Peer) -> None:
        """Cuts off a trainer that was replaced. What it may still write into, if it exists, is not used again."""
        self.vault.take_away(peer.rank, sorted(self._granted))
        self.loop.hang_up(peer)
        self._writing.bury(peer.rank, self.life)
        if peer.living:
            self.uplink.tell(frame("left", rank=peer.rank, why="its trainer was replaced"))

    def _gone(self, peer: Peer) -> None:
        """A connection has ended. The last trainer's decides what becomes of the job."""
        if peer is self.uplink.peer:
            log.error("lost the keeper of %s, which leads; no snapshots until it is back", self.uplink.lead_host)
            self.uplink.lost()
            self._rescue.look()
        elif peer.role == "host":
            self.seat.host_gone(peer.host)
        elif peer.role == "trainer":
            if peer.living:
                left = frame("left", rank=peer.rank, why="its trainer is gone")
                self.averaging.settled(peer.rank, lambda: self.uplink.tell(left))
            if peer.rank >= 0:
                self._writing.bury(peer.rank, self.life)
                self.averaging.settled(-1, lambda: self._deserted(peer.closed))

    def _deserted(self, closed: bool) -> None:
        """If no trainer is left."""
        if any(p.rank >= 0 for p in self.loop.peers):
            return
        if not closed:
            self.tier.orphaned()
        if closed or not self.vault.held:
            self._ending = True
            return
        self._until = self.clock() + self.grace
        self.loop.after(self.grace, lambda: None)
        faults.point("keeper orphaned")
        self.uplink.tell(frame("rescue", deserted=True))
        self._rescue.look()

    def _terminate(self) -> None:
        """SIGTERM: whatever else happens, the newest complete step is to reach storage."""
        self.uplink.tell(frame("rescue", deserted=False))
        self._ending |= not any(p.living for p in self.loop.peers)

    # Orders.

    def _order(self, order: Frame, hosts: Collection[str] | None = None) -> None:
        """To the keepers of these hosts, None: of all of the job; from this one."""
        for peer in [p for p in self.loop.peers if p.role == "host" and (hosts is None or p.host in hosts)]:
            self.loop.tell(peer, order)
        if hosts is None or self.host in hosts:
            self._obey(order)

    def _obey(self, order: Frame) -> None:
        kind = order.kind
        if kind in ("weigh", "refuse"):
            self.averaging.obey(order)
            return
        if kind == "plan":
            self.vault.plan(str(order["key"]), order.payload)
        elif kind == "keep":
            steps = {(int(g), int(s)) for g, s in order["steps"]}
            if not self.shield.pinned:
                self.shield.keep(steps)
                self.vault.forget(steps, {int(n) for n in order["slots"]})
        elif kind == "write":
            self._write((int(order["key"][0]), int(order["key"][1])), str(order["attempt"]), bool(order["local"]))
        elif kind == "complete":
            assert self.life is not None
            self.vault.complete(order, self.life.hosts, self.host)
            self._granted.discard(int(order["slot"]))
            key = int(order["key"][0]), int(order["key"][1])
            self.shield.hold(key, self.vault.held[key])
            faults.point("keeper complete")
            told = {"storing": order["storing"], "averages": order["averages"]}
            self._tell_trainers(frame("complete", step=order["key"][1], **told))
            self.averaging.obey(order)
        elif kind == "synced":
            self.uplink.synced(order)
        elif kind == "due":
            self.tier.obey(order)
        elif kind in ("fence", "lay", "start", "abandon"):
            self.shield.obey(order)
        else:
            self.averaging.obey(order)
            if kind in ("announced", "void"):
                self.shield.obey(order)
            if kind == "grant":
                self._granted.add(int(order["slot"]))
                self.shield.granted(order, lambda free: self._grant(order, free))
                return
            if kind == "stored" and self.life is not None and not any(p.living for p in self.loop.peers):
                self._writing.stored(order, self.life)
                why = order.head.get("error")
                text = f"step {order['step']} was not written to storage: {why[1]}" if why else ""
                if text and text not in self._untold:  # it is tried again and again
                    self._untold.append(text)
            if kind == "stored":
                self.tier.obey(order)
                order = frame(kind, **order.head)
            self._tell_trainers(order)
            if kind == "rejoin":  # what was said while there was no seat was not heard
                self.uplink.rejoin(int(order["epoch"]))

    def _grant(self, order: Frame, free: bool) -> None:
        """A slot may be written to, or is still being read."""
        if free:
            return self._tell_trainers(order)
        for rank in [p.rank for p in self.loop.peers if p.living]:
            why = f"the keeper of {self.host} still reads its slot"
            self.uplink.tell(frame("missed", rank=rank, step=order["step"], why=why))

    def _tell_trainers(self, message: Frame) -> None:
        for peer in [p for p in self.loop.peers if p.living]:
            self.loop.tell(peer, message)

    def _write(self, key: tuple[int, int], attempt: str, local: bool) -> None:
        """Writes the packs of this host."""
        held, life = self.vault.held[key], self.life
        assert life is not None

        def backend() -> Backend:
            return self.tier.backend(held, attempt) if local else life.backend(self.config.direct)

        self._writing.packs(key, held, life.codecs, attempt, backend, lambda why: self.shield.spoil(key, why))

    # Other hosts.

    def _call_host(self, peer: Peer, message: Frame) -> None:
        """An authenticated caller is the keeper of another host; what it had before is over."""
        for other in [p for p in self.loop.peers if p.role == "host" and p.host == str(message["host"])]:
            self.loop.hang_up(other)
        peer.role, peer.host = "host", str(message["host"])
        for key, text in self.vault.encoded_plans():
            self.loop.tell(peer, frame("plan", text, key=key))
        self.loop.tell(peer, frame("rejoin", epoch=self.seat.lead.epoch if self.seat.lead else 0))
        self.seat.came(peer.host)
