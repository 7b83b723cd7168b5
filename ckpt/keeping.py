"""Snapshots in the hands of a keeper: one rank's side of them.

A life begins with one plan that all ranks agreed on; from then on no rank waits for another. Each step the keeper has
granted is copied into a slot, beside training, and sealed; the keeper does the rest. Where the state's leaves change,
the ranks agree anew in the background.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from ckpt import faults
from ckpt.averaging import Averages, Origin
from ckpt.background import pace
from ckpt.collective import Group
from ckpt.config import Settings, settings
from ckpt.errors import CkptError, DeadlineError, PeerError, UsageError
from ckpt.keeper.member import Member
from ckpt.keeper.protocol import Frame
from ckpt.outcomes import Outcome, Storing, Taken
from ckpt.prepared import Prepared, Preparing, copy_of
from ckpt.protecting import Slots, agree_on_slots, ask_protection
from ckpt.roll import Called
from ckpt.saving import content_digest
from ckpt.schedule import Schedule
from ckpt.slots import drop, missing, refuse, reserve
from ckpt.snapshot.copier import Snapshot, give_way
from ckpt.snapshot.device import begin_copies
from ckpt.snapshot.fence import fence_here
from ckpt.state import Leaves
from ckpt.write import encode_report

__all__ = ["Keeping"]

log = logging.getLogger("ckpt")
Key = tuple[int, int]
_MEETING = 20.0  # seconds in which the keepers of a job should have reached one another


class Keeping:
    """Attached to the keeper of this host on construction. `heard` is told outcomes, in a thread of its own.

    Raises PeerError if there is no keeper to be had, ConflictError if somebody else trains this run.
    """

    def __init__(
        self, run: str, group: Group, schedule: Schedule, heard: Callable[[Outcome], None], tail: int = -1
    ) -> None:
        self._run, self._group, self._schedule, self._told = run, group, schedule, heard
        self.averages = Averages(schedule.averages, group.rank, group.world)
        self._plans = Preparing(group.rank, group.world, self.averages)
        self._lock = threading.Lock()
        self._grants: dict[int, int] = {}
        self._at = -1
        self._generation = 0
        self._epoch = -1
        self._wanted_epoch = 0
        self._prepared: Prepared | None = None
        self._slots = Slots((), ())
        self._began = False
        self._config = settings()  # of this life
        self._reserving = Future[None]()
        self._reserving.set_result(None)
        self._copying = ThreadPoolExecutor(1, "ckpt-copy", initializer=give_way)
        self._planning = ThreadPoolExecutor(1, "ckpt-plan")
        self._storing = Storing()
        self.member = Member(run, group.rank, self._heard, self._lost, tail)

    # The keeper: found, lost, found again.

    def _lost(self, error: CkptError) -> None:
        """The keeper died, or threw this trainer out. In the link's thread, which ends with it."""
        log.error("ckpt: %s; snapshots stop until there is one again, training goes on", error)
        with self._lock:
            self._grants.clear()
        self._storing.lose(error)
        self._told(Outcome("lost", self._at, str(error)))
        if self._began:
            self._lost_meanwhile(error)

    def _lost_meanwhile(self, error: CkptError) -> None:
        if error.kind == "peer":
            self._planning.submit(self._again)

    def _again(self) -> None:
        """Starts another keeper and hands it what this rank has: its memory, the plan."""
        try:
            if self.member.link.lost is None:
                return
            self.member.attach_again()
            self._storing.found()
            self._begin_here(self._slots, [], self._at + 1)
            self._epoch = self._wanted_epoch = 0
            if self._prepared is not None:
                self.averages.hand_over(self.member, self.averages.take_own(self._prepared.work, self.member.slots))
            self._join()
        except Exception as e:
            log.error("ckpt: no new keeper: %s; this run has no snapshots in memory any more", e)

    def _heard(self, message: Frame) -> None:
        """What the keeper says without having been asked. In the link's thread."""
        if message.kind == "grant":
            step, late = int(message["step"]), False
            with self._lock:
                late = step <= self._at
                self.averages.granted(step, int(message["slot"]))
                if not late:
                    self._grants[step] = int(message["slot"])
            if late:
                self._miss(step, f"was at step {self._at} when it heard of it", late=True)
        elif message.kind == "replan":
            with self._lock:
                dropped = list(self._grants)
                self._grants.clear()
                self._wanted_epoch = int(message["epoch"])
                self._plans.diverged |= {name.partition(" at ")[0] for name in message["diverged"]}
            for step in dropped:
                self._miss(step, "the ranks agree on a new plan")
        elif message.kind == "rejoin":
            with self._lock:
                self._grants.clear()
                self._epoch = self._wanted_epoch = int(message["epoch"])
            if self._began:  # what became of steps meanwhile nobody will say
                self._told(Outcome("lost", self._at, "the keeper that leads was out of reach"))
                self._planning.submit(self._join)
        elif message.kind == "storing":
            self._storing.begin(int(message["step"]))
        elif message.kind in ("complete", "void"):
            if message.head.get("storing"):
                self._storing.begin(int(message["step"]))
            self.averages.whole(int(message["step"]), message.head.get("averages"))
            self._told(Outcome(message.kind, int(message["step"]), message.head.get("why", "")))
        elif message.kind == "announced":
            self._told(Outcome("announced", int(message["step"]), lag=float(message["lag"])))
        elif message.kind == "lagging":
            if self._group.rank == 0:
                log.warning("ckpt: step %d is not protected yet: %s", message["step"], message["why"])
        elif message.kind in ("arrived", "detained"):
            self._told(Outcome.brought(message.kind, message.head))
        elif message.kind == "stored":
            out = Outcome.stored(message.head)
            self._storing.end(out)
            self._told(out)

    def _miss(self, step: int, why: str, **more: Any) -> None:
        try:
            self.member.link.tell("missed", step=step, why=why, **more)
        except CkptError as e:
            log.debug("ckpt: %s", e)

    # A life.

    def begin(self, state: Any, generation: int, start: int, origin: Origin, *, beside: bool = False) -> None:
        """Collective: a life begins. Agrees on the plan, reserves the slots; those that are not there yet `beside` training,
        whose first snapshots wait for them, where it is to go on at once. `origin`: of averages that go on. Raises on every
        rank what any of them has against it: LayoutError and the like, CapacityError."""
        self._reserving.result()
        self._generation, self._at, self._began, self._config = generation, start - 1, False, settings()
        self._grants.clear()
        called: Called | None = None
        leaves: Leaves | Exception
        try:
            if self.member.link.lost is not None:
                self.member.attach_again()
                self._storing.found()
            called = self._plans.roll.call(state)
            leaves = called.leaves
        except Exception as e:
            leaves = e
        self.averages.forget()
        self.averages.agree(self.averages.names(state), self._group)
        self._plans.agree(leaves, f"plan of memory {generation}", self._group)
        assert called is not None
        self._slots = self._agree_on_slots(self._group)
        wanting = missing(self.member.slots, self._slots.numbers)  # the same on all ranks
        beside = beside and bool(wanting)
        failure: bytes | Exception = b""
        new: list[int] = []
        try:
            if beside:
                refuse(len(wanting), self._plans.slot_size)
            else:
                new = self._reserve()
            self._prepared = self._plans.prepare(state, called)
            self._begin_here(self._slots, new, start)
            failure = self.averages.read(self._prepared.work, self._prepared.sources, origin)
        except Exception as e:
            drop(self.member.slots, new)
            failure = e
        unread = self._group.round("begun", failure, lambda all_: max(all_))
        self._epoch = self._wanted_epoch = 0
        try:
            if not beside:
                self._ask_protection()
            self.averages.hand_over(self.member, unread)
            if beside:
                self._reserving = self._planning.submit(self._reserve_beside)
            else:
                self._join()
        except Exception as e:
            failure = e
        if not beside:
            self._sync()
        self._group.round("joined", failure, lambda _: b"")
        self._began = True
        if not beside:
            self._sync()  # all ranks have joined: the first grant has come

    def _reserve(self) -> list[int]:
        return reserve(self.member.slots, self._slots.numbers, self._plans.slot_size, self._group.rank)

    def _ask_protection(self) -> None:
        if self._slots.redundancy is not None:
            ask_protection(self.member, self._generation)

    def _reserve_beside(self) -> None:
        """Makes the slots of the life that has begun, and joins it: until all ranks have, nothing is granted."""
        try:
            faults.point("recovery reserves")
            self._begin_here(self._slots, self._reserve(), self._at + 1)
            self._ask_protection()
            self._join()
        except PeerError as e:
            log.info("ckpt: %s", e)  # the next keeper is handed these slots when it is found
        except Exception as e:
            log.error("ckpt: there will be no snapshots in memory until the next restart: %s", e)

    def _sync(self) -> None:
        """Waits, but not for long, until the seat has heard this rank, and this rank what the seat has to say."""
        try:
            self.member.link.ask("sync", timeout=min(_MEETING, self.member.deadline))
        except DeadlineError as e:
            log.error("ckpt: no snapshots yet: %s Is the host of rank 0 within reach of this one?", e)
        except CkptError as e:
            if self._began:
                self._lost_meanwhile(e)

    def _agree_on_slots(self, group: Group) -> Slots:
        s = self._schedule
        return agree_on_slots(group, self.member, self._plans.slot_size, s.storage is not None, s.redundancy)

    def _begin_here(self, slots: Slots, new: Sequence[int], start: int) -> None:
        self.member.link.ask(
            "begin", fds=[self.member.slots[n].fd for n in new], timeout=self.member.deadline, generation=self._generation,
            world=self._group.world, run=self._run, new=list(new), start=start, ranks=self.member.ranks,
            **self._schedule.told(), **slots.told(),
        )  # fmt: skip

    def _join(self) -> None:
        if self._plans.encoded is not None and self._prepared is not None:
            self.member.link.tell("plan", self._plans.encoded, key=self._prepared.key)
        self.member.link.tell("ready", epoch=self._epoch)

    # A step.

    def step(self, state: Any, step: int, metrics: Mapping[str, float]) -> Taken | str:
        """Right after a step: begins its snapshot if it was granted. Else says why not: "" if it was not due. Waits for
        nobody; raises what collecting the state raises."""
        with self._lock:
            self._at = step
            slot = self._grants.pop(step, None)
            passed = [s for s in self._grants if s < step]
            for s in passed:
                del self._grants[s]
            replan = self._wanted_epoch > self._epoch and self.member.link.lost is None and self._began
        for s in passed:
            self._miss(s, f"went from another step to {step}")
        if slot is None:  # of a step that was granted the seal tells as much
            self.member.link.mention("at", step=step)
        if replan:
            if slot is not None:
                self._miss(step, "the ranks agree on a new plan")
            self._replan(state)
            return "the ranks agree on a new plan"
        if slot is None:
            if not self._schedule.due(step):
                return ""
            if self.member.link.lost is not None:
                return str(self.member.link.lost)
            return "no slot was free" if self._reserving.done() else "its memory is being reserved"
        faults.point("trainer granted")
        try:
            return self._take(state, step, slot, metrics)
        except BaseException as e:
            self._miss(step, f"{type(e).__name__}: {e}")
            raise

    def _take(self, state: Any, step: int, slot: int, metrics: Mapping[str, float]) -> Taken | str:
        began = time.monotonic()
        called = self._plans.roll.call(state, later=True)
        prepared = self._prepared
        if called.whole or prepared is None:
            self._prepared = None  # of the old leaves: not one more snapshot is made of them
            self._miss(step, "its leaves changed", replan=self._epoch)
            return "the leaves of the state changed"
        prepared.refresh(called)
        begin_copies()
        copies = {copy_of(name, held): content_digest(held) for name, held, waits in prepared.hashed if not waits}
        later = [(name, held) for name, held, waits in prepared.hashed if waits]

        def before_changes() -> None:
            if called.confirm is not None and not called.confirm():
                raise UsageError("tensors of an optimizer were replaced since the last step")
            copies.update((copy_of(name, held), content_digest(held)) for name, held in later)

        config = self._config
        snapshot = Snapshot(
            prepared.work.layout, prepared.sources, prepared.lazy, self.member.slots[slot].buffer,
            checked=config.check_copies, and_then=before_changes if later or called.confirm else None,
        )  # fmt: skip
        marks = {"marks": self.averages.marks(step, metrics), "epoch": self._epoch} if self.averages.rules else {}
        objects = [[o.name, o.policy, o.encoding, o.text] for o in called.leaves.objects.values()]
        faults.point("trainer copied eagerly")
        head = {"step": step, "plan": prepared.key, "objects": objects, "metrics": dict(metrics), **marks}
        taken = Taken(snapshot.copied, time.monotonic() - began, prepared.work.layout.size)
        self._copying.submit(self._rest, taken, snapshot, head, copies, config)
        fence_here().put(snapshot.copied, snapshot.give_up)
        return taken

    def _rest(
        self, taken: Taken, snapshot: Snapshot, head: dict[str, Any], copies: dict[str, int], config: Settings
    ) -> None:
        """The lazy copies, then the seal. In the copying thread."""
        step, began = int(head["step"]), time.monotonic()
        try:
            snapshot.copy_rest(pace(config))
            taken.lazy = time.monotonic() - began
            faults.point("trainer copied")
            report = snapshot.seal() if snapshot.layout.pieces else None
            self.member.link.tell("sealed", encode_report(report), copies=copies, **head)
            faults.point("trainer sealed")
        except Exception as e:
            log.error("ckpt: step %d was not sealed, training goes on: %s", step, e)
            self._miss(step, f"{type(e).__name__}: {e}")

    def _replan(self, state: Any) -> None:
        """Agrees on a new plan in the background; the leaves are those of now."""
        epoch = self._wanted_epoch
        self._epoch = epoch
        leaves: Leaves | Exception
        called: Called | None = None
        names = self.averages.names(state)
        try:
            called = self._plans.roll.call(state)
            leaves = called.leaves
        except Exception as e:
            leaves = e

        def work() -> None:
            try:
                self.averages.agree(names, self._group.beside())
                self._plans.agree(leaves, f"plan of memory {self._generation}.{epoch}", self._group.beside())
                assert called is not None
                self._slots = self._agree_on_slots(self._group.beside())
                new = self._reserve()
                self._prepared = self._plans.prepare(state, called)
                self._begin_here(self._slots, new, self._at + 1)
                self.averages.read_held(self._prepared.work, self._prepared.sources, self.member, self._group.beside())
                self._join()
            except Exception as e:
                log.error("ckpt: no new plan for snapshots, there will be none until the next restart: %s", e)

        self._planning.submit(work)

    # The end.

    def want(self, step: int) -> bool:
        """Asks for a step to be written to storage; False if memory does not hold it."""
        self._storing.forget(step)
        answer = self.member.link.ask("want", timeout=self.member.deadline, step=step)
        if answer["done"]:
            self._storing.end(Outcome("stored", step))
        return bool(answer["there"])

    def stored(self, step: int, timeout: float) -> Outcome:
        """Waits until a step that was asked for is in storage, or failed to get there."""
        return self._storing.wait(step, timeout)

    def quiet(self, timeout: float | None) -> bool:
        """Waits until nothing is being written to storage."""
        return self._storing.quiet(timeout)

    def brought(self, timeout: float | None) -> bool:
        """Waits until nothing is left to bring from the local tier to the run, or trying failed."""
        return self._schedule.tier is None or not self._began or self.member.brought(timeout)

    def flush(self) -> None:
        """Has the newest complete step written to storage; from a signal handler too."""
        if not self.member.link.mention("flush"):  # the interrupted thread may be the one that is sending
            threading.Thread(target=self.member.link.try_to_tell, args=("flush",), daemon=True).start()

    def close(self) -> None:
        """Lets go: with the last trainer of the host the keeper ends, and the memory with it."""
        self._copying.shutdown()
        self._planning.shutdown()
        try:
            self.member.link.tell("close")
        except CkptError as e:
            log.debug("ckpt: %s", e)
        self.member.link.close()
        for slot in self.member.slots.values():
            slot.close()
        self.member.slots.clear()
