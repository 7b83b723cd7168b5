"""The keeper's decisions under any order of events: ranks at their own pace, deaths, restarts, readers, failing storage."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from ckpt.config import Every
from ckpt.keeper.lead import Complete, Decision, Grant, Key, Lead, Persist, Replan, Sealed, State, Stepped, Void

CHECK = settings(max_examples=100, deadline=None, derandomize=True)


@dataclass(eq=False)
class Rank:
    """A trainer as the keeper knows it: messages in and out arrive in order, everything else happens when it likes."""

    number: int
    at: int
    alive: bool = True
    left: bool = False  # and the keeper knows
    epoch: int = -1  # of the plan it has, or is agreeing on
    heard: int = 0  # the newest plan that was asked for
    joining: bool = True
    changed: bool = False  # its leaves are other ones than planned
    reading: int | None = None  # a slot
    inbox: deque[Decision] = field(default_factory=deque)
    outbox: deque[tuple[Any, ...]] = field(default_factory=deque)
    grants: dict[int, int] = field(default_factory=dict)
    writing: dict[int, int] = field(default_factory=dict)
    may_write: dict[int, int] = field(default_factory=dict)  # granted by the keeper and not spoken of: step -> slot

    def say(self, *message: Any) -> None:
        if message[0] in ("sealed", "missed"):
            self.may_write.pop(message[1], None)
        self.outbox.append(message)


class Job:
    """Ranks and storage around a `Lead`, with what is true of them kept apart from what the lead believes."""

    def __init__(self, world: int, slots: int, memory: Every, storage: Every | None) -> None:
        self.lead = Lead(world, memory, storage)
        self.now = 0.0
        self.ranks: list[Rank] = []
        self.generation = 0
        self.drifting = False  # a tensor that was planned as copies is not the same on all ranks
        self.told = -1  # the last step of which the lead was told that a rank passed it
        self.granted: dict[int, int] = {}  # of this life: step -> slot
        self.sealed: dict[int, dict[int, str]] = {}  # of this life: step -> rank -> plan, as the lead was told
        self.copies: dict[int, set[int]] = {}
        self.voided: set[int] = set()
        self.holds: dict[int, Key] = {}  # slot -> the complete step in it
        self.newest: Key | None = None
        self.completed: list[Key] = []
        self.saving: tuple[Key, int] | None = None
        self.stored: list[Key] = []
        self.tried: set[Key] = set()
        self.promised: Key | None = None
        self.in_use: set[int] = set()
        self.live(world, range(slots), 0)

    # Lives.

    def live(self, world: int, slots: Sequence[int], start: int, another: bool = False) -> None:
        """All trainers of the life before are gone or cut off; the next life begins, led by `another` keeper or not."""
        for rank in self.ranks:
            self.cut_off(rank)
        if another:
            self.lead = Lead(world, self.lead.memory, self.lead.storage)
            self.saving, self.stored = None, []
            for slot, key in self.holds.items():
                self.lead.adopt(key, slot)
        self.generation += 1
        self.ranks = [Rank(n, start - 1) for n in range(world)]
        self.told, self.granted, self.sealed, self.copies, self.voided = start - 1, {}, {}, {}, set()
        self.in_use, self.promised = set(slots), None
        self.lead.begin(self.generation, world, slots, start, self.now)
        for rank in self.ranks:
            self.lead.use(slots)
            rank.epoch = 0
        self.check()

    def cut_off(self, rank: Rank) -> None:
        """What it has not said by now is not heard any more, and what it writes is written elsewhere."""
        rank.alive = False
        rank.may_write.clear()
        rank.outbox.clear()
        if not rank.left:
            self.gone(rank)

    def gone(self, rank: Rank) -> None:
        """The keeper sees that a trainer is gone; with the last of them the newest step is to reach storage."""
        rank.left = True
        if rank.reading is not None:
            self.close(rank)
        self.do(self.lead.leave(rank.number, "its trainer is gone", self.now))
        if all(r.left for r in self.ranks):
            self.do(self.lead.rescue())

    def die(self, rank: Rank) -> None:
        rank.alive = False
        rank.writing.clear()
        rank.may_write.clear()
        rank.outbox.append(("gone",))

    # A rank's side.

    def hear(self, rank: Rank) -> None:
        message = rank.inbox.popleft()
        if isinstance(message, Grant):
            if message.step <= rank.at:
                rank.say("missed", message.step, "too late")
            else:
                rank.grants[message.step] = message.slot
        elif isinstance(message, Replan):
            for step in rank.grants:
                rank.say("missed", step, "a new plan")
            rank.grants.clear()
            rank.heard = message.epoch

    def advance(self, rank: Rank, mentioned: bool = True) -> None:
        """The next step: the grant is found, or not."""
        rank.at += 1
        slot = rank.grants.pop(rank.at, None)
        if mentioned:
            rank.say("at", rank.at)
        if rank.heard > rank.epoch:
            assert slot is None, "granted while the ranks agree on a plan"
            rank.epoch, rank.joining, rank.changed = rank.heard, True, False
        elif slot is not None and rank.changed:
            rank.say("missed", rank.at, "its leaves changed", rank.epoch)
        elif slot is not None:
            rank.writing[rank.at] = slot

    def can_join(self, rank: Rank) -> bool:
        """Agreeing takes all ranks."""
        return rank.alive and rank.joining and all(r.alive and r.epoch >= rank.epoch for r in self.ranks)

    def join(self, rank: Rank) -> None:
        rank.joining = False
        rank.say("ready", rank.epoch)

    def finish(self, rank: Rank, step: int, well: bool = True) -> None:
        del rank.writing[step]
        if well:
            copies = {"tensor": rank.number if self.drifting and "tensor" not in self.lead.diverged else 0}
            rank.say("sealed", step, f"plan {rank.epoch}", copies)
        else:
            rank.say("missed", step, "it changed while it was copied")

    # The keeper's side.

    def deliver(self, rank: Rank) -> None:
        self.now += 0.1
        kind, *rest = rank.outbox.popleft()
        if kind == "ready":
            self.do(self.lead.join(rank.number, rest[0], self.now))
        elif kind == "at":
            self.told = max(self.told, rest[0])
            self.do(self.lead.step(Stepped(rest[0], self.now)))
        elif kind == "sealed":
            step, plan, copies = rest
            self.sealed.setdefault(step, {})[rank.number] = plan
            self.copies.setdefault(step, set()).add(copies["tensor"])
            self.do(self.lead.seal(rank.number, step, Sealed(plan, copies), self.now))
        elif kind == "missed":
            self.do(self.lead.seal(rank.number, rest[0], rest[1], self.now))
            if rest[2:] == [self.lead.epoch]:
                self.do(self.lead.replan())
        else:
            self.gone(rank)

    def save_ends(self, well: bool) -> None:
        assert self.saving is not None
        key = self.saving[0]
        self.saving = None
        if well:
            self.stored.append(key)
        self.do(self.lead.persist_ended(key, well, self.now))
        if self.promised is not None and self.saving is None:
            assert self.promised in self.tried, f"{self.promised} was asked for and never written"
            self.promised = None

    def open(self, rank: Rank, slot: int) -> None:
        rank.reading = slot
        self.lead.read(slot, f"rank {rank.number}")

    def close(self, rank: Rank) -> None:
        rank.reading = None
        self.do(self.lead.done_reading(f"rank {rank.number}", self.now))

    def want(self, step: int) -> bool:
        there, decisions = self.lead.want(step)
        key = (self.generation, step)
        assert there == (key in self.holds.values() or key in self.stored[-1:])
        if there:
            self.promised = key
            self.tried |= {key} & {*self.stored, *([self.saving[0]] if self.saving else [])}
        self.do(decisions)
        return there

    def damaged(self, slot: int) -> None:
        key = self.holds.pop(slot)
        self.completed.remove(key)
        self.newest = max(self.holds.values(), default=None)
        self.lead.damaged(key)
        self.check()

    # What must hold.

    def busy(self, slot: int) -> str:
        """Why nobody may write to a slot."""
        if self.newest is not None and self.holds.get(slot) == self.newest:
            return "it holds the newest complete step"
        if self.saving is not None and self.saving[1] == slot:
            return "it is being written to storage"
        if any(r.reading == slot for r in self.ranks):
            return "it is being read"
        if any(slot in r.may_write.values() for r in self.ranks):
            return "a rank may still write to it"
        return ""

    def do(self, decisions: Sequence[Decision]) -> None:
        for d in decisions:
            if isinstance(d, Grant):
                assert not self.busy(d.slot), f"slot {d.slot} was granted while {self.busy(d.slot)}"
                assert d.slot in self.in_use and d.step > self.told and d.step not in self.granted
                assert self.due(d.step)
                assert all(not r.joining and r.epoch == self.lead.epoch for r in self.ranks)
                self.granted[d.step] = d.slot
                self.holds.pop(d.slot, None)
                for rank in self.ranks:
                    if rank.alive:
                        rank.may_write[d.step] = d.slot
            elif isinstance(d, Complete):
                generation, step = d.key
                assert generation == self.generation and self.granted[step] == d.slot and step not in self.voided
                assert self.sealed[step].keys() == set(range(self.lead.world)), "not all ranks have sealed it"
                assert len(set(self.sealed[step].values())) == 1 == len(self.copies[step])
                assert d.key not in self.completed
                self.completed.append(d.key)
                self.holds[d.slot] = d.key
                self.newest = max(self.holds.values())
            elif isinstance(d, Void):
                assert d.step in self.granted and (self.generation, d.step) not in self.completed and d.why
                self.voided.add(d.step)
            elif isinstance(d, Persist):
                assert self.saving is None and self.holds[d.slot] == d.key and d.key not in self.stored
                self.saving = (d.key, d.slot)
                self.tried.add(d.key)
            for rank in self.ranks:
                rank.inbox.append(d)
        self.check()

    def due(self, step: int) -> bool:
        schedules = (self.lead.memory, self.lead.storage)
        if any(e is not None and e.minutes is not None for e in schedules):
            return True
        return any(e is not None and e.steps is not None and (step + 1) % e.steps == 0 for e in schedules)

    def check(self) -> None:
        slots = self.lead.slots
        read = {r.reading for r in self.ranks if r.reading is not None} | ({self.saving[1]} if self.saving else set())
        assert all(n in slots and slots[n].state is State.COMPLETE for n in read), "what is read is given away"
        self.holds = {n: key for n, key in self.holds.items() if n in slots and slots[n].state is State.COMPLETE}
        assert self.newest == max(self.holds.values(), default=None), "the newest complete step is gone"
        found = self.lead.newest()
        assert (None if found is None else (self.holds[found[0]], found[1])) == (
            None if self.newest is None else (self.newest, self.newest)
        )
        assert self.lead.complete() == set(self.holds.values())
        assert self.in_use <= slots.keys()
        for slot in slots.keys() - self.in_use:
            assert self.busy(slot), f"slot {slot} is kept for nothing"
        assert self.lead.persisting == (self.saving[0] if self.saving else None)

    # A time without trouble.

    def settle(self) -> None:
        """All that was said is heard, all that was begun ends well."""
        moved, turns = True, 0
        while moved:
            moved, turns = False, turns + 1
            assert turns < 100, "this never ends"
            for rank in self.ranks:
                while rank.outbox:
                    self.deliver(rank)
                    moved = True
                while rank.alive and rank.inbox:
                    self.hear(rank)
                    moved = True
                for step in list(rank.writing):
                    self.finish(rank, step)
                    moved = True
                if self.can_join(rank):
                    self.join(rank)
                    moved = True
                if rank.reading is not None:
                    self.close(rank)
                    moved = True
            if self.saving is not None:
                self.save_ends(True)
                moved = True

    def goes_on(self, rounds: int) -> None:
        """Ranks step by step, and everything well: the lead grants, completes and stores again."""
        if not all(r.alive for r in self.ranks):
            self.live(len(self.ranks), sorted(self.in_use), max(r.at for r in self.ranks) + 1)
        complete, stored = len(self.completed), len(self.stored)
        for _ in range(rounds):
            self.settle()
            self.now += 100.0
            ahead = max(r.at for r in self.ranks)
            for rank in self.ranks:
                while rank.at <= ahead:
                    self.advance(rank)
        self.settle()
        assert len(self.completed) >= complete + 2
        assert self.lead.storage is None or len(self.stored) > stored


class AnyOrder(RuleBasedStateMachine):
    """Everything that may happen, in any order."""

    job: Job
    takeovers = False

    @initialize(
        world=st.integers(1, 4),
        slots=st.sampled_from([2, 3]),
        memory=st.sampled_from([1, 1, 2, 3]),
        storage=st.sampled_from([None, 1, 1, 4]),
        minutes=st.sampled_from([None, None, None, 0.01]),
        steps=st.integers(0, 6),
    )
    def begin(
        self, world: int, slots: int, memory: int, storage: int | None, minutes: float | None, steps: int
    ) -> None:
        self.rounds = 12 * max(memory, storage or 1)
        every = Every(storage, minutes) if storage else None
        self.job = Job(world, slots, Every(memory), every)
        self.all_goes_well(steps)

    def pick(self, data: st.DataObject, ranks: list[Rank]) -> Rank:
        return ranks[data.draw(st.integers(0, len(ranks) - 1))]

    @property
    def alive(self) -> list[Rank]:
        return [r for r in self.job.ranks if r.alive]

    @rule(n=st.integers(1, 4))
    def all_goes_well(self, n: int) -> None:
        """So that what follows begins from a job under way."""
        for _ in range(n):
            self.job.settle()
            for rank in self.alive:
                self.job.advance(rank)

    @rule()
    def all_is_heard(self) -> None:
        for rank in self.job.ranks:
            while rank.outbox:
                self.job.deliver(rank)
        for rank in self.alive:
            while rank.inbox:
                self.job.hear(rank)

    @precondition(lambda self: any(r.outbox for r in self.job.ranks))
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        self.job.deliver(self.pick(data, [r for r in self.job.ranks if r.outbox]))

    @precondition(lambda self: any(r.inbox for r in self.alive))
    @rule(data=st.data())
    def hear(self, data: st.DataObject) -> None:
        self.job.hear(self.pick(data, [r for r in self.alive if r.inbox]))

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), mentioned=st.sampled_from([True, True, True, False]))
    def advance(self, data: st.DataObject, mentioned: bool) -> None:
        self.job.advance(self.pick(data, self.alive), mentioned)

    @precondition(lambda self: any(r.writing for r in self.alive))
    @rule(data=st.data(), well=st.sampled_from([True, True, True, False]))
    def finish(self, data: st.DataObject, well: bool) -> None:
        rank = self.pick(data, [r for r in self.alive if r.writing])
        self.job.finish(rank, data.draw(st.sampled_from(sorted(rank.writing))), well)

    @precondition(lambda self: any(map(self.job.can_join, self.job.ranks)))
    @rule(data=st.data())
    def join(self, data: st.DataObject) -> None:
        self.job.join(self.pick(data, [r for r in self.alive if self.job.can_join(r)]))

    @precondition(lambda self: self.job.saving is not None)
    @rule(well=st.sampled_from([True, True, False]))
    def save_ends(self, well: bool) -> None:
        self.job.save_ends(well)

    @precondition(lambda self: self.job.holds and any(r.reading is None for r in self.alive))
    @rule(data=st.data())
    def open(self, data: st.DataObject) -> None:
        rank = self.pick(data, [r for r in self.alive if r.reading is None])
        self.job.open(rank, data.draw(st.sampled_from(sorted(self.job.holds))))

    @precondition(lambda self: any(r.reading is not None for r in self.alive))
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        self.job.close(self.pick(data, [r for r in self.alive if r.reading is not None]))

    @precondition(lambda self: self.job.promised is None and self.job.newest is not None)
    @rule()
    def want(self) -> None:
        assert self.job.newest is not None
        generation, step = self.job.newest
        self.job.want(step if generation == self.job.generation else step + 1)

    @precondition(lambda self: self.job.promised is None and len(self.job.holds) > 0)
    @rule(data=st.data())
    def damaged(self, data: st.DataObject) -> None:
        job = self.job
        read = [r.reading for r in job.ranks] + ([job.saving[1]] if job.saving else [])
        slots = sorted(n for n in job.holds if n not in read and n in job.in_use)
        if slots:
            job.damaged(data.draw(st.sampled_from(slots)))

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def leaves_change(self, data: st.DataObject) -> None:
        self.pick(data, self.alive).changed = True

    @rule()
    def copies_drift(self) -> None:
        self.job.drifting = True

    @precondition(lambda self: self.alive and len(self.job.granted) > 2)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        self.job.die(self.pick(data, self.alive))

    @precondition(lambda self: len(self.job.granted) > 2 or not self.alive)
    @rule(
        world=st.integers(1, 4),
        kept=st.integers(0, 3),
        count=st.sampled_from([2, 3]),
        back=st.integers(-2, 3),
        heard=st.booleans(),
        another=st.booleans(),
    )
    def restart(self, world: int, kept: int, count: int, back: int, heard: bool, another: bool) -> None:
        """A new life, in the slots of the last one as far as they fit, from an earlier or a later step."""
        job = self.job
        for rank in self.alive:
            job.die(rank)
        for rank in job.ranks:
            while heard and rank.outbox:
                job.deliver(rank)
        known = sorted(job.lead.slots)
        fit = known[:kept][:count]
        first = max(known, default=-1) + 1
        start = max(0, max(r.at for r in job.ranks) + 1 - back)
        job.live(world, [*fit, *range(first, first + count - len(fit))], start, another and self.takeovers)

    def teardown(self) -> None:
        if hasattr(self, "job"):
            self.job.goes_on(self.rounds)


SCHEDULES = settings(
    max_examples=150,
    stateful_step_count=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def test_any_order_of_events() -> None:
    run_state_machine_as_test(AnyOrder, settings=SCHEDULES)


class ByAnotherLead(AnyOrder):
    """The keeper that leads may go too; the next one knows what is in memory."""

    takeovers = True


def test_any_order_of_events_and_of_leads() -> None:
    run_state_machine_as_test(ByAnotherLead, settings=SCHEDULES)


class ThenNobody(AnyOrder):
    """Everything that may happen, and then no rank is left."""

    def teardown(self) -> None:
        if hasattr(self, "job"):
            for rank in self.alive:
                self.job.die(rank)
            for rank in self.job.ranks:
                while rank.outbox:
                    self.job.deliver(rank)
            for _ in range(5):
                if self.job.saving is not None:
                    self.job.save_ends(True)
            assert self.job.newest is None or self.job.newest <= max(self.job.stored), "the newest step is lost"


def test_when_nobody_is_left_the_newest_step_is_stored() -> None:
    run_state_machine_as_test(ThenNobody, settings=SCHEDULES)


@CHECK
@given(
    world=st.integers(1, 4),
    slots=st.sampled_from([2, 3]),
    memory=st.integers(1, 5),
    storage=st.sampled_from([None, 1, 2, 3, 7]),
    start=st.integers(0, 9),
)
def test_every_step_that_is_due_is_granted_to_ranks_that_keep_up(
    world: int, slots: int, memory: int, storage: int | None, start: int
) -> None:
    job = Job(world, slots, Every(memory), Every(storage) if storage else None)
    job.live(world, range(slots), start)
    stop = start + 30
    while job.ranks[0].at < stop - 1:
        job.settle()
        for rank in job.ranks:
            job.advance(rank)
    job.settle()
    due = [n for n in range(start, stop) if (n + 1) % memory == 0 or (storage and (n + 1) % storage == 0)]
    assert [n for n in job.granted if n < stop] == due and job.completed == [(2, n) for n in due]
    assert not storage or job.stored == [(2, n) for n in due if (n + 1) % storage == 0]


# One rule at a time.


def life(world: int = 1, slots: int = 2, storage: Every | None = None, memory: int | Every = 1) -> Lead:
    """A life that begins at step 0 and has its first grant."""
    lead = Lead(world, memory if isinstance(memory, Every) else Every(memory), storage)
    lead.begin(1, world, range(slots), 0, 0.0)
    for rank in range(world):
        lead.join(rank, 0, 0.0)
    return lead


def seal(lead: Lead, step: int, now: float = 0.0, passed: bool = True) -> list[Decision]:
    """All ranks pass a step and seal it."""
    out = []
    for rank in range(lead.world):
        out += lead.step(Stepped(step, now)) if passed else []
        out += lead.seal(rank, step, Sealed("plan", {}), now)
    return out


def kinds(decisions: Sequence[Decision], kind: type) -> list[Any]:
    return [d for d in decisions if isinstance(d, kind)]


def test_a_life_from_grant_to_grant() -> None:
    lead = Lead(2, Every(1), None)
    lead.begin(1, 2, [4, 7], 10, 0.0)
    assert lead.join(1, 0, 0.0) == [] and lead.join(0, 0, 0.0) == [Grant(10, 4)]
    assert lead.step(Stepped(10, 0.0)) == [Grant(11, 7)] and lead.open_grants() == [4, 7]
    assert lead.seal(0, 10, Sealed("p", {}), 0.0) == [] and lead.newest() is None
    assert lead.seal(1, 10, Sealed("p", {}), 0.0) == [Complete((1, 10), 4)]
    assert lead.newest() == (4, (1, 10)) and lead.complete() == {(1, 10)}
    assert lead.step(Stepped(11, 0.0)) == [] and lead.seal(1, 11, Sealed("p", {}), 0.0) == []
    assert lead.seal(0, 11, Sealed("p", {}), 0.0) == [Complete((1, 11), 7), Grant(12, 4)]
    assert lead.newest() == (7, (1, 11)) and lead.complete() == {(1, 11)}


def test_what_was_not_granted_cannot_be_sealed() -> None:
    lead = life()
    assert lead.seal(0, 5, Sealed("p", {}), 0.0) == [] and lead.seal(0, -1, "late", 0.0) == []
    assert seal(lead, 0)[-1] == Complete((1, 0), 0) and lead.seal(0, 0, Sealed("p", {}), 0.0) == []


def test_a_rank_speaks_once_about_a_step() -> None:
    lead = life(2)
    lead.seal(0, 0, "late", 0.0)
    lead.seal(0, 0, Sealed("p", {}), 0.0)
    assert kinds(lead.seal(1, 0, Sealed("p", {}), 0.0), Void) == [Void(0, "rank 0: late")]


def test_a_late_rank_is_given_more_time() -> None:
    """Twice as many steps ahead after each grant that came too late, fewer again as steps are complete."""
    lead = life(slots=1)
    lead.step(Stepped(5, 0.0))
    assert lead.seal(0, 0, "late", 0.0, late=True) == [Void(0, "rank 0: late"), Grant(7, 0)]
    lead.step(Stepped(7, 0.0))
    assert lead.seal(0, 7, "late", 0.0, late=True) == [Void(7, "rank 0: late"), Grant(11, 0)]
    lead.use([0, 1])
    assert lead.step(Stepped(11, 0.0)) == [Grant(15, 1)]
    assert lead.seal(0, 11, Sealed("p", {}), 0.0) == [Complete((1, 11), 0)]
    lead.step(Stepped(15, 0.0))
    assert lead.seal(0, 15, Sealed("p", {}), 0.0) == [Complete((1, 15), 1), Grant(17, 0)]


def test_a_rank_that_fails_is_not_late() -> None:
    lead = life(slots=1)
    for step in range(5):
        assert lead.step(Stepped(step, 0.0)) == []
        assert lead.seal(0, step, "no", 0.0) == [Void(step, "rank 0: no"), Grant(step + 1, 0)]


@pytest.mark.parametrize("delay", [1, 3, 10, 40])
def test_loops_faster_than_messages_have_snapshots(delay: int) -> None:
    """What is said either way is heard `delay` steps later."""
    lead, steps = life(), 100 * delay
    to_lead: dict[int, list[tuple[int, bool]]] = {}  # by when it is heard: (step, whether it is sealed)
    to_rank: dict[int, list[int]] = {0: [0]}
    granted: set[int] = set()
    complete = 0
    for now in range(steps):
        for step in to_rank.pop(now, []):
            if step < now:
                to_lead.setdefault(now + delay, []).append((step, False))
            else:
                granted.add(step)
        out: list[Decision] = []
        for step, sealed in to_lead.pop(now, []):
            out += lead.seal(0, step, Sealed("p", {}) if sealed else "late", 0.0, late=not sealed)
        if now >= delay:
            out += lead.step(Stepped(now - delay, 0.0))
        if now in granted:
            to_lead.setdefault(now + delay, []).append((now, True))
        complete += len(kinds(out, Complete))
        to_rank.setdefault(now + delay, []).extend(d.step for d in kinds(out, Grant))
    assert complete >= steps / delay / 10


def test_a_rank_that_dies_voids_what_it_has_not_sealed() -> None:
    lead = life(2, slots=2)
    lead.step(Stepped(0, 0.0))
    lead.seal(1, 0, Sealed("p", {}), 0.0)
    assert lead.open_grants() == [0, 1]
    assert lead.leave(1, "its trainer is gone", 0.0) == []
    assert lead.seal(0, 0, Sealed("p", {}), 0.0) == [Complete((1, 0), 0)]
    assert lead.seal(0, 1, Sealed("p", {}), 0.0) == [Void(1, "rank 1: its trainer is gone")]
    assert lead.step(Stepped(1, 0.0)) == [] and lead.open_grants() == []  # not all ranks are there
    assert lead.leave(0, "its trainer is gone", 0.0) == [] and lead.complete() == {(1, 0)}


def test_parts_of_different_plans_are_no_step() -> None:
    lead = life(2)
    lead.seal(0, 0, Sealed("a", {}), 0.0)
    out = lead.seal(1, 0, Sealed("b", {}), 0.0)
    assert out == [Void(0, "the ranks sealed parts of different plans"), Replan(1)]
    assert lead.join(0, 1, 0.0) == [] and lead.join(1, 0, 0.0) == []  # of the plan before
    assert lead.join(1, 1, 0.0) == [Grant(2, 0)]


def test_copies_that_differ_are_named_and_planned_anew() -> None:
    lead = life(3)
    lead.seal(0, 0, Sealed("p", {"a": 1, "b": 2, "c": 5}), 0.0)
    lead.seal(1, 0, Sealed("p", {"a": 1, "b": 3}), 0.0)
    out = lead.seal(2, 0, Sealed("p", {"a": 1, "b": 2, "c": 6}), 0.0)
    assert out == [Void(0, "no longer the same on all ranks: b, c"), Replan(1)] and lead.diverged == {"b", "c"}
    for rank in range(3):
        lead.join(rank, 1, 0.0)
    step = min(slot.key[1] for slot in lead.slots.values() if slot.state is State.GRANTED)
    for rank in range(3):
        out = lead.seal(rank, step, Sealed("p", {"a": 1}), 0.0)
    assert [d.key for d in kinds(out, Complete)] == [(1, step)]


def test_nothing_is_granted_while_the_ranks_agree_on_a_plan() -> None:
    lead = life(2, slots=3)
    assert lead.replan() == [Replan(1)] and lead.step(Stepped(0, 0.0)) == []
    assert lead.join(0, 1, 0.0) == [] and lead.replan() == [Replan(2)]
    assert lead.join(1, 1, 0.0) == lead.join(0, 1, 0.0) == lead.join(0, 2, 0.0) == []
    assert lead.join(1, 2, 0.0) == [Grant(1, 1)]


def test_minutes() -> None:
    lead = life(memory=Every(minutes=1))
    assert lead.slots[0].state is State.FREE and lead.step(Stepped(0, 59.9)) == []
    assert lead.step(Stepped(1, 60.0)) == [Grant(2, 0)]
    assert lead.step(Stepped(2, 61.0)) == [] and seal(lead, 2, 62.0) == [Complete((1, 2), 0)]
    assert lead.step(Stepped(3, 119.0)) == [] and lead.step(Stepped(4, 120.0)) == [Grant(5, 1)]
    lead = life(slots=3, storage=Every(minutes=1))
    assert not kinds(seal(lead, 0, 10.0), Persist) and not kinds(seal(lead, 1, 59.0), Persist)
    out = seal(lead, 2, 61.0) + seal(lead, 3, 62.0)
    assert kinds(out, Persist) == [Persist((1, 3), 0)]  # granted when the minute was over
    lead.persist_ended((1, 3), True, 63.0)
    assert not kinds(seal(lead, 4, 64.0) + seal(lead, 5, 65.0), Persist)


def test_what_is_read_stays() -> None:
    lead = life(slots=3)
    seal(lead, 0)
    lead.read(0, "rank 0")
    lead.read(0, "rank 1")
    seal(lead, 1)
    assert lead.complete() == {(1, 0), (1, 1)} and seal(lead, 2)[-1] == Grant(3, 1)
    assert lead.done_reading("rank 1", 0.0) == [] and (1, 0) in lead.complete()
    assert lead.done_reading("rank 0", 0.0) == [Grant(4, 0)] and lead.complete() == {(1, 2)}


def test_one_save_at_a_time_and_the_next_takes_the_newest() -> None:
    lead = life(slots=3, storage=Every(1))
    assert kinds(seal(lead, 0), Persist) == [Persist((1, 0), 0)]
    for step in range(1, 6):
        assert not kinds(seal(lead, step), Persist)
    assert lead.complete() == {(1, 0), (1, 5)} and lead.persisting == (1, 0)
    lead.persist_ended((1, 0), True, 1.0)
    assert (1, 0) not in lead.complete() and lead.persisted == (1, 0)
    [save] = kinds(seal(lead, 6), Persist)
    assert save.key == (1, 6)


def test_a_step_that_is_complete_after_a_newer_one() -> None:
    """It is of no use any more, neither in memory nor in storage."""
    lead = life(2, slots=3, storage=Every(1))
    lead.step(Stepped(0, 0.0))
    for step, ranks in ((0, [0]), (1, [0, 1])):
        for rank in ranks:
            out = lead.seal(rank, step, Sealed("p", {}), 0.0)
    assert kinds(out, Persist) == [Persist((1, 1), 1)]
    lead.persist_ended((1, 1), True, 0.0)
    out = lead.seal(1, 0, Sealed("p", {}), 0.0)
    assert Complete((1, 0), 0) in out and not kinds(out, Persist)
    assert lead.complete() == {(1, 1)} and lead.newest() == (1, (1, 1))


def test_a_save_that_failed_is_tried_again_after_a_while() -> None:
    lead = life(slots=3, storage=Every(50))
    now, saves = 0.0, []
    for step in range(3000):
        now += 1.0
        for d in kinds(seal(lead, step, now), Persist):
            saves.append((d.key[1], now))
            lead.persist_ended(d.key, False, now)
    assert len(saves) > 12
    assert [n for n, _ in saves] == sorted({n for n, _ in saves}) and saves[0][0] == 49
    waits = [b - a for (_, a), (_, b) in itertools.pairwise(saves)]
    assert all(w >= min(300.0, 2.0**k) for k, w in enumerate(waits, 1))
    assert all(w <= min(300.0, 2.0**k) + 2 for k, w in enumerate(waits, 1))
    assert lead.persisted == (-1, -1)
    out: list[Persist] = []
    while not out and step < 4000:
        now, step = now + 1.0, step + 1
        out = kinds(seal(lead, step, now), Persist)
    lead.persist_ended(out[0].key, True, now)
    assert lead.persisted == out[0].key and lead.failures == 0
    [again] = [d.key[1] for n in range(step + 1, step + 51) for d in kinds(seal(lead, n, now), Persist)]
    assert (again + 1) % 50 == 0


def test_want() -> None:
    lead = life(slots=3)
    assert lead.want(0) == (False, [])
    seal(lead, 0)
    assert lead.want(0) == (True, [Persist((1, 0), 0)]) == (lead.want(0)[0], [Persist((1, 0), 0)])
    seal(lead, 1)
    assert lead.want(0) == (True, []) and lead.complete() == {(1, 0), (1, 1)}
    assert lead.persist_ended((1, 0), True, 0.0)[:1] != [] and lead.complete() == {(1, 1)}
    assert lead.want(0) == (True, []) and lead.persisting is None  # it is in storage
    lead.begin(2, 1, range(3), 1, 0.0)
    assert lead.want(1) == (False, []) and lead.complete() == {(1, 1)}  # of the life before


def test_a_step_that_is_wanted_while_another_is_written_comes_next() -> None:
    lead = life(slots=3)
    seal(lead, 0)
    lead.want(0)
    seal(lead, 1)
    assert lead.want(1) == (True, [])
    seal(lead, 2)
    assert lead.complete() == {(1, 0), (1, 1), (1, 2)}
    assert lead.persist_ended((1, 0), True, 0.0)[0] == Persist((1, 1), 1) and lead.persisting == (1, 1)
    lead.persist_ended((1, 1), False, 0.0)
    assert lead.complete() == {(1, 2)} and not any(s.readers for s in lead.slots.values())


def test_two_steps_that_are_wanted_while_another_is_written() -> None:
    lead = life(slots=4)
    seal(lead, 0)
    lead.want(0)
    seal(lead, 1)
    assert lead.want(1)[0]
    seal(lead, 2)
    there, _ = lead.want(2)
    saves = kinds(lead.persist_ended((1, 0), True, 0.0), Persist)
    while lead.persisting is not None and len(saves) < 9:
        saves += kinds(lead.persist_ended(lead.persisting, True, 0.0), Persist)
    assert there and saves[-1].key == (1, 2)
    assert [s.key for s in saves] == [(1, 1), (1, 2)], "it was said that step 1 will be written"


def test_a_wanted_step_that_is_older_than_what_is_stored() -> None:
    """Either it is written, or the one who asks is told that it is not."""
    lead = life(slots=3)
    seal(lead, 0)
    lead.read(0, "rank 0")
    seal(lead, 1)
    lead.want(1)
    lead.persist_ended((1, 1), True, 0.0)
    there, out = lead.want(0)
    assert not there or out == [Persist((1, 0), 0)]
    if not there:
        lead.done_reading("rank 0", 0.0)
        assert lead.complete() == {(1, 1)}, "and it is kept for nobody"


def test_rescue() -> None:
    lead = life(slots=3)
    assert lead.rescue() == []
    seal(lead, 0)
    seal(lead, 1)
    assert lead.rescue() == [Persist((1, 1), 1)] and lead.rescue() == []
    assert not kinds(lead.persist_ended((1, 1), False, 0.0), Persist) and lead.rescue() == [Persist((1, 1), 1)]
    lead.persist_ended((1, 1), True, 0.0)
    assert lead.rescue() == []


def test_rescue_while_an_older_step_is_written() -> None:
    """The newest step comes right after it: nobody is left to make another."""
    lead = life(slots=3, storage=Every(2))
    out = seal(lead, 0) + seal(lead, 1)
    assert kinds(out, Persist) == [Persist((1, 1), 1)]
    seal(lead, 2)
    lead.leave(0, "its trainer is gone", 0.0)
    out = lead.rescue() + lead.persist_ended((1, 1), True, 0.0)
    assert [d.key for d in kinds(out, Persist)] == [(1, 2)]


def test_damage() -> None:
    lead = life(slots=3)
    seal(lead, 0)
    lead.read(0, "rank 0")
    seal(lead, 1)
    lead.damaged((1, 1))
    assert lead.newest() == (0, (1, 0)) and lead.complete() == {(1, 0)}
    lead.damaged((1, 7))
    assert kinds(seal(lead, 2), Complete) == [Complete((1, 2), 2)] and lead.complete() == {(1, 0), (1, 2)}


@pytest.mark.parametrize("reader", ["another rank", "storage"])
def test_what_is_damaged_is_not_written_to_while_it_is_read(reader: str) -> None:
    lead = life(2)
    seal(lead, 0)
    lead.read(0, "rank 0")
    if reader == "storage":
        assert lead.rescue() == [Persist((1, 0), 0)]
    else:
        lead.read(0, "rank 1")
    lead.begin(2, 2, [0, 1], 0, 0.0)
    lead.damaged((1, 0))
    lead.done_reading("rank 0", 0.0)
    out = lead.join(0, 0, 0.0) + lead.join(1, 0, 0.0)
    for step in range(5):
        out += seal(lead, step)
    assert out and 0 not in [d.slot for d in kinds(out, Grant)]
    out = lead.persist_ended((1, 0), True, 0.0) if reader == "storage" else lead.done_reading("rank 1", 0.0)
    for step in range(5, 8):
        out += seal(lead, step)
    assert 0 in [d.slot for d in kinds(out, Grant)]


def test_slots_of_an_earlier_life_go_when_they_are_not_needed() -> None:
    lead = life(slots=3)
    seal(lead, 0)
    assert lead.open_grants() == [1, 2]
    lead.begin(2, 1, [0, 5], 1, 0.0)
    assert lead.slots.keys() == {0, 5}
    lead.begin(3, 1, [6, 7], 1, 0.0)
    assert lead.slots.keys() == {0, 6, 7} and lead.newest() == (0, (1, 0))
    lead.join(0, 0, 0.0)
    assert Complete((3, 1), 6) in seal(lead, 1) and lead.slots.keys() == {6, 7} and lead.newest() == (6, (3, 1))


def test_steps_that_another_lead_left() -> None:
    lead = Lead(1, Every(1), None)
    lead.adopt((3, 8), 5)
    lead.adopt((4, 2), 6)
    assert lead.newest() == (6, (4, 2)) and lead.complete() == {(3, 8), (4, 2)}
    lead.begin(5, 1, [6, 7], 3, 0.0)
    lead.adopt((4, 2), 6)
    assert lead.newest() == (6, (4, 2)) and lead.join(0, 0, 0.0) == [Grant(3, 7)]
    lead.adopt((1, 1), 7)
    assert lead.open_grants() == [7]
    assert Complete((5, 3), 7) in seal(lead, 3) and lead.complete() == {(5, 3)} and lead.slots.keys() == {6, 7}


def test_all_slots_hold_steps_that_another_lead_left() -> None:
    """As where the older one was being written to storage: only the newest is needed."""
    lead = Lead(1, Every(1), None)
    lead.adopt((1, 4), 0)
    lead.adopt((1, 5), 1)
    lead.begin(2, 1, [0, 1], 6, 0.0)
    assert lead.join(0, 0, 0.0) == [Grant(6, 0)] and lead.newest() == (1, (1, 5))


def test_slots_that_go_in_the_middle_of_a_life() -> None:
    """A slot that a rank may still write to stays until that is over, whatever comes of it."""
    lead = life(slots=2)
    lead.use([2, 3])
    assert lead.slots.keys() == {0, 2, 3}
    lead.seal(0, 0, "late", 0.0)
    assert lead.slots.keys() == {2, 3}


def test_a_retired_slot_that_is_damaged_goes() -> None:
    lead = life(slots=2)
    seal(lead, 0)
    lead.begin(2, 1, [2, 3], 1, 0.0)
    assert lead.slots.keys() == {0, 2, 3}
    lead.damaged((1, 0))
    assert lead.slots.keys() == {2, 3}


def test_ranks_of_an_earlier_larger_world_have_no_say() -> None:
    lead = life(3)
    lead.begin(2, 2, [0, 1], 0, 0.0)
    assert lead.join(0, 0, 0.0) == [] and lead.join(2, 0, 0.0) == [] and lead.join(1, 0, 0.0) == [Grant(0, 0)]
    out = lead.seal(0, 0, Sealed("p", {}), 0.0) + lead.seal(2, 0, Sealed("p", {}), 0.0)
    assert not kinds(out, Complete) and lead.newest() is None
    assert not kinds(lead.leave(2, "its trainer is gone", 0.0), Void)
    assert Complete((2, 0), 0) in lead.seal(1, 0, Sealed("p", {}), 0.0)
