"""The lead's seat: the keeper of rank 0 hears all ranks of all hosts, has `Lead` decide, and gives the orders.

An order goes to every keeper of the job, the own one included:

    grant, void, replan    to be passed on to the trainers
    complete               a step with the parts of all ranks
    keep                   the steps and slots that are still needed; the rest may go
    write                  the packs of a step are to be written under an attempt; answered with `wrote`
    stored                 how a save to storage ended

and those by which steps are protected, which `Watch` gives.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ckpt import faults
from ckpt.backends import Backend, LocalBackend
from ckpt.catalog import drop_attempt
from ckpt.commit import Commit, claim_attempt, step_folder
from ckpt.config import Every
from ckpt.errors import CkptError, ConflictError, IntegrityError, PeerError, to_wire
from ckpt.format.codec import Codec
from ckpt.keeper.averaged import refused, summary
from ckpt.keeper.holding import Held, commit_held
from ckpt.keeper.lead import Complete, Decision, Grant, Key, Lead, Persist, Replan, Sealed, Stepped, Void
from ckpt.keeper.protocol import Frame, frame
from ckpt.keeper.tier import commit_to_share
from ckpt.keeper.watch import Near, Protected, Watch
from ckpt.tiers import mark_due
from ckpt.write import PackReport, decode_report

__all__ = ["Life", "Seat"]

log = logging.getLogger("ckpt.keeper")
_AGAIN = 5.0  # seconds until a save that nobody but the keepers can do any more is tried again


@dataclass(frozen=True)
class Life:
    """What the trainers told when their life began. `local`: the folder of the local tier on this host; "": there is none."""

    generation: int
    world: int
    run: str
    codecs: tuple[tuple[str, Codec], ...]
    hosts: Mapping[int, str]
    local: str = ""

    def backend(self, direct: bool, local: bool = False) -> Backend:
        """The run's storage, or this host's tier before it."""
        from ckpt.backends import backend_for

        return LocalBackend(self.local, direct=direct) if local else backend_for(self.run, direct=direct)


@dataclass
class _Save:
    """A step on its way to storage. `waiting`: hosts that have not written yet; `backend`: where it is claimed and
    committed; `local`: that is the local tier, from which it is `due` for the remote one, or not."""

    held: Held
    life: Life
    began: float
    waiting: set[str]
    backend: Backend
    local: bool
    due: bool
    attempt: str = ""
    writer: str = ""
    written: float = 0.0
    reports: dict[int, PackReport | None] = field(default_factory=dict)


@dataclass
class Seat:
    """order   gives an order to the keepers of these hosts; None: to all
    work    runs a function in the storage thread; the second is called with its result, or its error, in the loop
    after   calls a function in the loop, some seconds from now
    others  has the keepers of these hosts fenced for a generation; their answers go to a function, in the loop
    rescue  what writes a step all by itself, in the storage thread, where hosts are gone that have parts of it; else None
    """

    order: Callable[[Frame, Collection[str] | None], None]
    work: Callable[[Callable[[], Any], Callable[[Any], None]], None]
    after: Callable[[float, Callable[[], None]], None]
    others: Callable[[int, Near, Callable[[list[Frame]], None]], None]
    rescue: Callable[[Held], Callable[[], Any] | None]
    held: Mapping[Key, Held]
    direct: bool = True
    patience: float = 30.0
    clock: Callable[[], float] = time.monotonic
    lead: Lead | None = None
    watch: Watch | None = None
    life: Life | None = None
    deserted: bool = False  # no trainer is left: what fails is tried again
    _parts: dict[tuple[Key, int], Frame] = field(default_factory=dict)
    _save: _Save | None = None
    _kept: tuple[Any, ...] = ()
    _full: bool = False  # the local tier took nothing the last time: the next step goes to the remote one itself
    _near: Key | None = None  # the last step of the local tier that is not due for the remote one
    _wanted: Key | None = None  # what was asked for in storage, whatever tier it was meant for
    _early: dict[int, Frame] = field(default_factory=dict)  # ranks that are ready before it is known what hosts hold
    _mixed: tuple[Key, list[Decision]] | None = None  # what waits until all ranks have refused to fold a step

    @property
    def busy(self) -> bool:
        """Whether a step is on its way to storage."""
        return self._save is not None

    def begin(
        self,
        life: Life,
        memory: Every | None,
        storage: Every | None,
        slots: list[int],
        start: int,
        protected: Protected | None = None,
        local: Every | None = None,
    ) -> None:
        """A life begins at step `start`."""
        if self.lead is None or self.watch is None:
            self.lead = Lead(life.world, memory or Every(1), storage)
            self.watch = Watch(self.lead, self.order, self.after, self.others, self._decided, self.patience)
        self.lead.memory, self.lead.storage, self.lead.local = memory or Every(1), storage, local
        self.life, self.deserted = life, False
        self._parts.clear()
        self._early.clear()
        if self._mixed is not None:  # nobody is left to refuse
            self.lead.damaged(self._mixed[0])
            if any(isinstance(d, Persist) for d in self._mixed[1]):
                self.lead.persist_ended(self._mixed[0], False, self.clock())
            self._mixed = None
        for key, held in self.held.items():  # of a life that another keeper led
            self.lead.adopt(key, held.slot)
        self.watch.hold_still()
        self.lead.begin(life.generation, life.world, slots, start, self.clock())
        self.watch.begin(protected)
        self._keep()

    def came(self, host: str) -> None:
        """The keeper of another host is there."""
        if self.watch is not None:
            self.watch.came(host)

    def hear(self, event: Frame) -> None:
        """What happened on some host."""
        lead, watch, now = self.lead, self.watch, self.clock()
        if lead is None or watch is None:
            return
        kind, rank = event.kind, int(event.head.get("rank", -1))
        decisions: list[Decision] = []
        if kind == "ready" and watch.beginning:  # a slot that is granted now may have what is to be held on to
            self._early[rank] = event
        elif kind == "ready":
            decisions = lead.join(rank, int(event["epoch"]), now)
        elif kind == "at":
            decisions = lead.step(Stepped(int(event["step"]), now))
        elif kind == "sealed":
            decisions = self._sealed(lead, rank, event)
        elif kind == "missed":
            if event.head.get("replan") == lead.epoch:
                decisions = lead.replan()  # first, so that nothing is granted for the old plan
            late = bool(event.head.get("late"))
            decisions += lead.seal(rank, int(event["step"]), str(event["why"]), now, late=late)
        elif kind == "slots":
            lead.use([int(n) for n in event["slots"]])
            watch.extend(tuple(int(n) for n in event["extents"]))
        elif kind == "left":
            self._early.pop(rank, None)
            decisions = lead.done_reading(f"rank {rank}", now) + lead.leave(rank, str(event["why"]), now)
        elif kind == "reading":
            lead.read(int(event["slot"]), f"rank {rank}")
        elif kind == "done":
            if event["damaged"]:
                lead.damaged((int(event["damaged"][0]), int(event["damaged"][1])))
            decisions = lead.done_reading(f"rank {rank}", now)
        elif kind == "rescue":
            self.deserted = bool(event["deserted"])
            newest = lead.newest()
            self._want(newest[1] if newest is not None else None)
            decisions = lead.rescue()
        elif kind == "wrote":
            self._wrote(event)
        elif kind in ("inventory", "encoded", "failed", "folding", "spoiled"):
            decisions = watch.hear(event)
        self._decided(decisions)

    def want(self, step: int) -> tuple[bool, bool]:
        """Somebody asks for a step to be in storage: (whether it is or will be, whether it is)."""
        if self.lead is None:
            return False, False
        there, decisions = self.lead.want(step)
        self._want((self.lead.generation, step))
        done = there and self.lead.persisted == (self.lead.generation, step)
        self._decided(decisions)
        return there, done

    def host_gone(self, host: str) -> None:
        """A keeper has ended: its ranks hold nothing any more."""
        life = self.life
        if life is None:
            return
        for rank in [r for r, h in life.hosts.items() if h == host]:
            self.hear(frame("left", rank=rank, why=f"the keeper of {host} is gone"))
        if self._save is not None and host in self._save.waiting:
            self._ended(self._save, PeerError(f"the keeper of {host} ended while it wrote"))
        if self.watch is not None:
            self._decided(self.watch.gone(host))

    def _sealed(self, lead: Lead, rank: int, event: Frame) -> list[Decision]:
        faults.point("keeper sealed")
        step = int(event["step"])
        self._parts[(lead.generation, step), rank] = event
        part = Sealed(str(event["plan"]), {str(k): int(v) for k, v in event["copies"].items()})
        if self._mixed is not None and self._mixed[0] == (lead.generation, step):
            waiting, self._mixed = self._mixed[1], None
            return waiting
        return lead.seal(rank, step, part, self.clock())

    def _decided(self, decisions: list[Decision]) -> None:
        lead = self.lead
        assert lead is not None
        storing = {d.key for d in decisions if isinstance(d, Persist)}
        for d in self._agreed(decisions):
            if isinstance(d, Grant):
                self.order(frame("grant", step=d.step, slot=d.slot), None)
            elif isinstance(d, Void):
                self._drop((lead.generation, d.step))
                self.order(frame("void", step=d.step, why=d.why), None)
            elif isinstance(d, Replan):
                self.order(frame("replan", epoch=d.epoch, diverged=sorted(lead.diverged)), None)
            elif isinstance(d, Complete):
                self.order(self._complete(d, lead.world, d.key in storing), None)
                self._decided(self.watch.complete(d) if self.watch is not None else [])
            else:
                self._persist(d)
        self._keep()
        if self._early and self.watch is not None and not self.watch.beginning:
            early, self._early = list(self._early.values()), {}
            for event in early:
                self.hear(event)

    def _drop(self, key: Key) -> None:
        for k in [k for k in self._parts if k[0] == key]:
            del self._parts[k]

    def _agreed(self, decisions: list[Decision]) -> list[Decision]:
        """Where one rank refused to fold a step and another did not: asks all to refuse, and decides when they have."""
        lead = self.lead
        assert lead is not None
        for d in decisions:
            if not isinstance(d, Complete):
                continue
            why = refused([self._parts[d.key, rank] for rank in range(lead.world)])
            if why:
                wait: list[Decision] = [w for w in decisions if isinstance(w, (Complete, Persist)) and w.key == d.key]
                self._mixed = d.key, wait
                self.order(frame("refuse", step=d.key[1], why=why), None)
                return [w for w in decisions if w not in wait]
        return decisions

    def _complete(self, d: Complete, world: int, storing: bool) -> Frame:
        parts = [self._parts.pop((d.key, rank)) for rank in range(world)]
        told = [[p["objects"], p["metrics"], len(p.payload), p.head.get("folded", 0)] for p in parts]
        payload = b"".join(p.payload for p in parts)
        return frame(
            "complete", payload, key=list(d.key), slot=d.slot, plan=parts[0]["plan"], parts=told, storing=storing,
            averages=summary(parts),
        )  # fmt: skip

    def _keep(self) -> None:
        """Tells what is needed, when that has changed, and is known."""
        assert self.lead is not None and self.watch is not None
        if self.watch.beginning:
            return
        needed = (sorted(self.lead.complete() | self.watch.held()), sorted(self.lead.slots))
        if needed != self._kept:
            self._kept = needed
            self.order(frame("keep", steps=[list(k) for k in needed[0]], slots=needed[1]), None)

    # A step on its way to storage: claim -> every host writes -> commit.

    def _persist(self, d: Persist) -> None:
        life = self.life
        assert life is not None
        held = self.held[d.key]
        rescue = self.rescue(held)
        local = bool(life.local) and not self._full and rescue is None
        backend, due = life.backend(self.direct, local), d.due or d.key == self._wanted
        save = _Save(held, life, self.clock(), {held.hosts[r] for r in held.parts}, backend, local, due)
        self._save = save
        faults.point("keeper persist")
        self.order(frame("storing", step=held.step), None)
        if rescue is not None:
            save.waiting.clear()
            save.written = save.began
            self.work(rescue, lambda done: self._ended(save, done if isinstance(done, Exception) else None, done))
            return

        def claim() -> tuple[str, str]:
            if save.local and save.due:
                mark_due(save.backend, held.folder)
            return claim_attempt(save.backend, held.folder, held.world)

        self.work(claim, lambda found: self._claimed(save, found))

    def _want(self, key: Key | None) -> None:
        """A step is to be in storage, the remote tier if there are two: one that only the local tier has is due from now on."""
        self._wanted = key or self._wanted
        if self._near is not None and self._near == self._wanted:
            self._near = None
            self.order(frame("due", key=list(self._wanted)), None)

    def _claimed(self, save: _Save, found: tuple[str, str] | Exception) -> None:
        if self._save is not save:
            return
        if isinstance(found, Exception):
            self._ended(save, found)
            return
        save.attempt, save.writer = found
        key = [save.held.generation, save.held.step]
        self.order(frame("write", key=key, attempt=save.attempt, local=save.local), None)

    def _wrote(self, event: Frame) -> None:
        save = self._save
        if save is None or event["attempt"] != save.attempt or tuple(event["key"]) != _key(save.held):
            return
        if "error" in event.head:
            from ckpt.errors import from_wire

            self._ended(save, from_wire(*event["error"]))
            return
        at = 0
        for rank, n in event["ranks"]:
            save.reports[int(rank)] = decode_report(event.payload[at : at + n])
            at += n
        save.waiting.discard(str(event["host"]))
        if save.waiting:
            return
        save.written = self.clock()
        life = save.life
        trained = life.generation if life is self.life and not self.deserted else None

        def publish() -> tuple[Commit, Frame | None]:
            done = commit_held(save.backend, save.held, life.codecs, save.reports, save.attempt, save.writer, trained)
            share = save.local and len(set(save.held.hosts.values())) > 1
            return done, commit_to_share(save.backend, done) if share else None

        self.work(
            publish,
            lambda done: self._ended(save, done) if isinstance(done, Exception) else self._ended(save, None, *done),
        )

    def _ended(
        self, save: _Save, error: Exception | None, commit: Commit | None = None, share: Frame | None = None
    ) -> None:
        """A save has ended, well or not; if not, what is left of it goes."""
        if self._save is not save:
            return
        self._save = None
        faults.point("keeper persisted")
        lead, now, key = self.lead, self.clock(), _key(save.held)
        assert lead is not None
        told: dict[str, Any] = {"step": key[1], "generation": key[0], "local": save.local, "due": save.due}
        self._full = save.local and error is not None
        if save.local and not save.due and error is None:
            self._near = key
        if error is None:
            assert commit is not None
            told |= {"write": save.written - save.began, "commit": now - save.written, "bytes": commit.bytes}
        else:
            log.error("%s was not written to storage: %s", step_folder(key[1], key[0]), error)
            told["error"] = to_wire(error)
            if save.attempt and not save.written:
                self._drop_attempt(save, error)
            if isinstance(error, IntegrityError):
                lead.damaged(key)
        self.order(Frame("stored", told | dict(share.head if share else {}), share.payload if share else b""), None)
        self._want(None)
        done = error is None or isinstance(error, ConflictError)
        self._decided(lead.persist_ended(key, done, now))
        if not done and self.deserted:
            self.after(_AGAIN, lambda: self.hear(frame("rescue", deserted=self.deserted)))

    def _drop_attempt(self, save: _Save, error: Exception) -> None:
        whole = isinstance(error, CkptError) and not isinstance(error, PeerError)
        self.work(lambda: drop_attempt(save.backend, save.held.folder, save.attempt, whole=whole), lambda _: None)


def _key(held: Held) -> Key:
    return held.generation, held.step
