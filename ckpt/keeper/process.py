"""The keeper: one process per host and job. Holds what the trainers of its host sealed, says which steps are next,
writes steps to storage, and outlives the trainers.

    WAITING    no trainer has begun a life yet; ends after the grace time
    SERVING    a life is under way
    ORPHANED   the last trainer went without `close`: the newest complete step is written to storage at once; a new life
               may begin until the grace time is over, then it ends
    CLOSING    every trainer said `close`: ends when nothing is being written

Started by a trainer through `ckpt.keeper.link`, in a session of its own. A thread for storage apart, everything happens
in one loop over sockets that never block.
"""

from __future__ import annotations

import logging
import queue
import selectors
import signal
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ckpt import faults
from ckpt.backends import Backend, backend_for
from ckpt.config import Every, Settings
from ckpt.errors import CkptError, ConflictError, to_wire
from ckpt.format.codec import Codec
from ckpt.keeper.holding import ATTEMPT, Held, Part, Stage, as_checkpoint, persist
from ckpt.keeper.lead import Complete, Decision, Grant, Lead, Persist, Replan, Sealed, Stepped, Void
from ckpt.keeper.protocol import Connection, Frame, frame, own_peer
from ckpt.keeper.vault import Vault
from ckpt.write import Ring

__all__ = ["Keeper"]

log = logging.getLogger("ckpt.keeper")


@dataclass(eq=False)
class _Trainer:
    """One connection. `rank` is -1 until it has attached."""

    link: Connection
    pid: int
    rank: int = -1
    closed: bool = False
    living: bool = False  # takes part in the life under way


@dataclass(frozen=True)
class _Life:
    """What the trainers told when their life began."""

    generation: int
    world: int
    run: str
    codecs: tuple[tuple[str, Codec], ...]


@dataclass
class Keeper:
    """The main loop and all that is held. `listener`: a listening Unix socket; `grace`: seconds."""

    listener: socket.socket
    config: Settings
    grace: float
    clock: Callable[[], float] = time.monotonic
    lead: Lead | None = None
    life: _Life | None = None
    vault: Vault = field(default_factory=Vault)
    _trainers: list[_Trainer] = field(default_factory=list)
    _ended: queue.SimpleQueue[Callable[[], None]] = field(default_factory=queue.SimpleQueue)
    _ring: Ring | None = None
    _ending: bool = False

    def __post_init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._storage = ThreadPoolExecutor(1, "ckpt-keeper")
        self._bell, self._ear = socket.socketpair()
        self._ear.setblocking(False)
        self.listener.setblocking(False)
        self._selector.register(self.listener, selectors.EVENT_READ, None)
        self._selector.register(self._ear, selectors.EVENT_READ, None)
        self._until: float | None = self.clock() + self.grace

    # The loop.

    def run(self) -> None:
        """Until the life cycle is over."""
        signal.signal(signal.SIGTERM, lambda *_: self._later(self._terminate))
        while not self._over():
            timeout = None if self._until is None else max(0.0, self._until - self.clock())
            for key, mask in self._selector.select(timeout):
                if key.fileobj is self.listener:
                    self._accept()
                elif key.fileobj is self._ear:
                    self._ear.recv(4096)
                else:
                    self._serve(key.data, mask)
            while not self._ended.empty():
                self._ended.get()()
        for trainer in list(self._trainers):
            self._hang_up(trainer)
        self._storage.shutdown()

    def _over(self) -> bool:
        if self.lead is not None and self.lead.persisting is not None:
            return False
        if self._ending:
            return True
        return self._until is not None and self.clock() >= self._until

    def _later(self, action: Callable[[], None]) -> None:
        """Has the loop do something; from any thread, or a signal handler."""
        self._ended.put(action)
        self._bell.send(b"!")

    def _accept(self) -> None:
        try:
            sock, _ = self.listener.accept()
        except OSError:
            return
        sock.setblocking(False)
        try:
            pid = own_peer(sock)
        except CkptError:
            sock.close()
            return
        trainer = _Trainer(Connection(sock), pid)
        self._trainers.append(trainer)
        self._selector.register(sock, selectors.EVENT_READ, trainer)

    def _serve(self, trainer: _Trainer, mask: int) -> None:
        alive = True
        if mask & selectors.EVENT_READ:
            try:
                alive = trainer.link.fill()
                for message in trainer.link.frames():
                    self._hear(trainer, message)
            except CkptError as e:
                self._tell(trainer, frame("refused", error=to_wire(e)))
                alive = False
        if mask & selectors.EVENT_WRITE:
            alive = trainer.link.drain() and alive
        if not alive:
            trainer.link.drain()
            self._gone(trainer)
        else:
            self._watch(trainer)

    def _watch(self, trainer: _Trainer) -> None:
        if trainer in self._trainers:
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if trainer.link.waiting else 0)
            self._selector.modify(trainer.link.sock, wanted, trainer)

    def _tell(self, trainer: _Trainer, message: Frame) -> None:
        trainer.link.put(message)
        trainer.link.drain()
        self._watch(trainer)

    def _tell_all(self, message: Frame) -> None:
        for trainer in self._trainers:
            if trainer.living:
                self._tell(trainer, message)

    # Trainers come and go.

    def _hear(self, trainer: _Trainer, message: Frame) -> None:
        """One message. An error is the trainer's, and ends its connection."""
        answer = getattr(self, f"_on_{message.kind}", None)
        if answer is None or (trainer.rank < 0 and message.kind not in ("attach", "inventory")):
            raise ConflictError(f"a trainer said {message.kind!r}, which this keeper does not expect here")
        found = answer(trainer, message)
        if isinstance(found, Frame):
            self._tell(trainer, Frame("answer", {**found.head, "id": message["id"]}, found.payload, found.fds))

    def _on_attach(self, trainer: _Trainer, message: Frame) -> Frame:
        """A trainer says who it is; it is told what there is, and gets the memory of its rank."""
        rank = int(message["rank"])
        for other in self._trainers:
            if other.rank == rank and other is not trainer:
                if _alive(other.pid):
                    raise ConflictError(
                        f"rank {rank} of this run is being trained by process {other.pid}; one job at a time may write to "
                        "a run: end that one, or name another run"
                    )
                self._fence(other)
        trainer.rank = rank
        self._until = None
        self.vault.put(rank, message["bring"], message.fds, replace=False)  # if this keeper is new: its predecessor's
        faults.point("keeper attached")
        own = self.vault.of(rank)
        slots = [[slot, m.size] for slot, m in own]
        return frame("answer", fds=[m.fd for _, m in own], slots=slots, newest=self.vault.newest())

    def _on_begin(self, trainer: _Trainer, message: Frame) -> Frame:
        """A life begins, or a trainer joins the one that has begun."""
        from ckpt.format.codec import parse_codecs

        generation, world, start = int(message["generation"]), int(message["world"]), int(message["start"])
        known = self.life
        if known is not None and generation < known.generation:
            raise ConflictError(f"generation {generation} is over: generation {known.generation} of this run has begun")
        if self.lead is None:
            memory, storage = (None if e is None else Every(*e) for e in (message["memory"], message["storage"]))
            self.lead = Lead(world, memory or Every(1), storage)
        if known is None or generation > known.generation or not any(t.living for t in self._trainers):
            memory, storage = (None if e is None else Every(*e) for e in (message["memory"], message["storage"]))
            self.lead.memory, self.lead.storage = memory or Every(1), storage
            self.life = _Life(generation, world, str(message["run"]), parse_codecs(message["codecs"]))
            self.lead.begin(generation, world, message["slots"], start, self.clock())
        self.vault.put(trainer.rank, message["new"], message.fds, replace=True)
        self.lead.use(message["slots"])
        trainer.living = True
        self.vault.forget(self.lead)
        return frame("answer")

    def _on_plan(self, trainer: _Trainer, message: Frame) -> None:
        self.vault.plan(str(message["key"]), message.payload)

    def _on_ready(self, trainer: _Trainer, message: Frame) -> None:
        assert self.lead is not None
        self._do(self.lead.join(trainer.rank, int(message["epoch"]), self.clock()))

    def _on_at(self, trainer: _Trainer, message: Frame) -> None:
        assert self.lead is not None
        self._do(self.lead.step(Stepped(int(message["step"]), self.clock())))

    def _on_sealed(self, trainer: _Trainer, message: Frame) -> None:
        assert self.lead is not None
        step, plan = int(message["step"]), str(message["plan"])
        faults.point("keeper sealed")
        self.vault.seal((self.lead.generation, step), trainer.rank, plan, Part.of(message.head, message.payload))
        part = Sealed(plan, {str(k): int(v) for k, v in message["copies"].items()})
        self._do(self.lead.seal(trainer.rank, step, part, self.clock()))

    def _on_missed(self, trainer: _Trainer, message: Frame) -> None:
        assert self.lead is not None
        self._do(self.lead.seal(trainer.rank, int(message["step"]), str(message["why"]), self.clock()))
        if message.head.get("replan") == self.lead.epoch:
            self._do(self.lead.replan())

    def _on_want(self, trainer: _Trainer, message: Frame) -> Frame:
        assert self.lead is not None
        there, decisions = self.lead.want(int(message["step"]))
        done = there and self.lead.persisted == (self.lead.generation, int(message["step"]))
        self._do(decisions)
        return frame("answer", there=there, done=done)

    def _on_open(self, trainer: _Trainer, message: Frame) -> Frame:
        """A step for reading: its commit and manifest, and the memory of the packs that are here."""
        held = self.vault.held.get(tuple(message["key"]))
        if held is None or self.lead is None:
            return frame("answer", there=False)
        self.lead.read(held.slot, f"rank {trainer.rank}")
        commit, manifest = as_checkpoint(held)
        ranks = sorted(r for r in held.memory if held.parts[r].report is not None)
        fds = [held.memory[r].fd for r in ranks]
        names = [f"{held.folder}/{ATTEMPT}/rank-{r:05d}.safetensors" for r in ranks]
        packs = [[name, len(held.pack(r))] for name, r in zip(names, ranks, strict=True)]
        return frame("answer", commit + manifest, fds, there=True, folder=held.folder, cut=len(commit), packs=packs)

    def _on_done(self, trainer: _Trainer, message: Frame) -> None:
        assert self.lead is not None
        if message.head.get("damaged"):
            key = (int(message["damaged"][0]), int(message["damaged"][1]))
            self.lead.damaged(key)
            self.vault.held.pop(key, None)
        self._do(self.lead.done_reading(f"rank {trainer.rank}", self.clock()))

    def _on_flush(self, trainer: _Trainer, message: Frame) -> None:
        self._terminate()

    def _on_close(self, trainer: _Trainer, message: Frame) -> None:
        trainer.closed = True

    def _gone(self, trainer: _Trainer) -> None:
        """A connection has ended. The last one decides what becomes of the job."""
        self._hang_up(trainer)
        if self.lead is not None and trainer.living:
            self._do(self.lead.done_reading(f"rank {trainer.rank}", self.clock()))
            self._do(self.lead.leave(trainer.rank, "its trainer is gone", self.clock()))
        if any(t.rank >= 0 for t in self._trainers):
            return
        if trainer.closed:
            self._ending = True
        elif trainer.rank >= 0:
            self._until = self.clock() + self.grace
            faults.point("keeper orphaned")
            if self.lead is not None:
                self._do(self.lead.rescue())

    def _fence(self, trainer: _Trainer) -> None:
        """Cuts off a trainer that was replaced. If it still exists it may go on writing into a slot that was granted to
        it: that memory is not used again."""
        if trainer.living and self.lead is not None:
            self.vault.take_away(trainer.rank, self.lead.open_grants())
        trainer.closed = False
        self._hang_up(trainer)
        if trainer.living and self.lead is not None:
            self._do(self.lead.leave(trainer.rank, "its trainer was replaced", self.clock()))

    def _hang_up(self, trainer: _Trainer) -> None:
        if trainer in self._trainers:
            self._trainers.remove(trainer)
            self._selector.unregister(trainer.link.sock)
            trainer.link.close()

    def _terminate(self) -> None:
        """SIGTERM: whatever else happens, the newest complete step is to reach storage."""
        if self.lead is not None:
            self._do(self.lead.rescue())
        if not any(t.living for t in self._trainers):
            self._ending = True

    # What was decided.

    def _do(self, decisions: Sequence[Decision]) -> None:
        for d in decisions:
            if isinstance(d, Grant):
                self._tell_all(frame("grant", step=d.step, slot=d.slot))
            elif isinstance(d, Void):
                assert self.lead is not None
                self.vault.drop((self.lead.generation, d.step))
                self._tell_all(frame("void", step=d.step, why=d.why))
            elif isinstance(d, Replan):
                assert self.lead is not None
                self._tell_all(frame("replan", epoch=d.epoch, diverged=sorted(self.lead.diverged)))
            elif isinstance(d, Complete):
                assert self.lead is not None
                self.vault.complete(d, self.lead.world)
                faults.point("keeper complete")
                self._tell_all(frame("complete", step=d.key[1]))
            elif isinstance(d, Persist):
                self._persist(d)
        if self.lead is not None:
            self.vault.forget(self.lead)

    def _persist(self, d: Persist) -> None:
        """Writes a step in the storage thread; the loop hears how it ended."""
        held, life = self.vault.held[d.key], self.life
        assert life is not None
        faults.point("keeper persist")
        self._tell_all(frame("storing", step=held.step))

        def work() -> None:
            outcome: Stage | BaseException
            try:
                backend: Backend = backend_for(life.run, direct=self.config.direct)
                outcome = persist(backend, held, life.codecs, self.config, self._ring_made)
            except BaseException as e:
                outcome = e
            self._later(lambda: self._persisted(held, outcome))

        self._storage.submit(work)

    def _ring_made(self) -> Ring:
        self._ring = self._ring or Ring(self.config)
        return self._ring

    def _persisted(self, held: Held, outcome: Stage | BaseException) -> None:
        assert self.lead is not None
        key = (held.generation, held.step)
        faults.point("keeper persisted")
        done = isinstance(outcome, (Stage, ConflictError))
        told: dict[str, Any]
        if isinstance(outcome, Stage):
            told = {"write": outcome.write, "commit": outcome.commit, "bytes": outcome.bytes}
        else:
            log.error("step %d was not written to storage: %s", held.step, outcome)
            told = {"error": to_wire(outcome)}
        self._tell_all(frame("stored", step=held.step, generation=held.generation, **told))
        self._do(self.lead.persist_ended(key, done, self.clock()))
        if not any(t.rank >= 0 for t in self._trainers) and not done:
            delay = min(5.0, self.grace / 4)
            self._rescue_again(delay)

    def _rescue_again(self, delay: float) -> None:
        """Nobody but this process can still save the step: tries again until the grace time is over."""

        def wait() -> None:
            time.sleep(delay)
            self._later(lambda: self._do(self.lead.rescue()) if self.lead is not None else None)

        self._storage.submit(wait)


def _alive(pid: int) -> bool:
    """Whether a process runs; one that is stopped or a zombie does not count."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] not in ("T", "t", "Z", "X")
    except OSError:
        return False
