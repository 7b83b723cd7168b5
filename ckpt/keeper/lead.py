"""What the keepers of a job decide together, as a pure state machine: events in, decisions out; no clock, no sockets.

The keeper of rank 0 drives it, for all ranks of all hosts.

    a slot      FREE -> GRANTED(step) -> COMPLETE(step) -> FREE, or DAMAGED until nobody reads it
                          \\-> FREE, once every rank has let go of a step that was voided
    a step      granted -> sealed or missed by each rank -> complete, if all sealed the same plan; else void

A slot holds the parts of one step on all ranks, so it has one state for all. It is granted ahead of the step, and only
for a step that no rank has reached, so that all ranks find the grant or none; a rank that did not find it says so, which
voids the step on all. A complete slot is free again when a newer step is complete and nobody reads or persists it: at
every instant the newest complete step is whole in memory.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from ckpt.config import Every

__all__ = ["Complete", "Decision", "Grant", "Lead", "Persist", "Replan", "Sealed", "State", "Stepped", "Void"]

_MARGIN = 1024  # steps ahead at most: a loop of 0.1 ms a step needs some ten, more where processors are short

Key = tuple[int, int]
"""(generation, step): the order in which snapshots were taken, also over a rollback."""


@dataclass(frozen=True)
class Grant:
    """Every rank is to snapshot `step` into `slot`."""

    step: int
    slot: int


@dataclass(frozen=True)
class Complete:
    """All parts of a step are sealed: it can be restored."""

    key: Key
    slot: int


@dataclass(frozen=True)
class Void:
    """A step will not be had; `why` names the first rank that did not seal it."""

    step: int
    why: str


@dataclass(frozen=True)
class Persist:
    """The step in `slot` is to be written to storage; the slot stays until `persisted`. Not `due`: of two tiers of
    storage only the local one asked for it."""

    key: Key
    slot: int
    due: bool = True


@dataclass(frozen=True)
class Replan:
    """The ranks are to agree on plan number `epoch` before anything is granted again."""

    epoch: int


Decision = Grant | Complete | Void | Persist | Replan


@dataclass(frozen=True)
class Stepped:
    """A rank has passed `step`, at monotonic time `now`."""

    step: int
    now: float


@dataclass(frozen=True)
class Sealed:
    """A rank's part of a step. `plan`: of which it is a part; `copies`: digest by name of the tensors that other ranks
    hold copies of, which must be the same on all."""

    plan: str
    copies: Mapping[str, int]


class State(Enum):
    """Of a slot."""

    FREE = "free"
    GRANTED = "granted"
    COMPLETE = "complete"
    DAMAGED = "damaged"


@dataclass
class _Slot:
    state: State = State.FREE
    key: Key = (0, -1)
    parts: dict[int, Sealed | str] = field(default_factory=dict)  # by rank: sealed, or why not
    late: bool = False  # some rank heard of the grant when it had passed the step
    readers: set[str] = field(default_factory=set)
    retired: bool = False  # of an earlier life, of no use to this one but for what it holds


@dataclass
class Lead:
    """One job. `memory`, `storage`, `local`: when steps are due for each; `local` is a tier before the storage, if there
    is one with a schedule of its own."""

    world: int
    memory: Every
    storage: Every | None
    local: Every | None = None
    generation: int = 0
    slots: dict[int, _Slot] = field(default_factory=dict)
    ready: set[int] = field(default_factory=set)  # ranks that have the plan of `epoch` and their slots
    epoch: int = 0
    at: int = -1  # the last step that any rank has passed
    granted: int = -1
    margin: int = 1  # steps between the last one passed and the one that is granted
    persisting: Key | None = None
    persisted: Key = (-1, -1)
    stored_step: int = -1  # of this life: the step up to which storage is served
    local_step: int = -1  # the same of the local tier
    last_memory: float = 0.0
    last_storage: float = 0.0
    last_local: float = 0.0
    diverged: set[str] = field(default_factory=set)  # tensors that stopped being copies of one another
    retry_after: float = 0.0
    failures: int = 0

    def begin(self, generation: int, world: int, slots: Collection[int], start: int, now: float) -> None:
        """A life begins: ranks 0 to world-1, whose parts go into `slots`, from step `start` on. What is complete stays."""
        self.generation, self.world = generation, world
        self.ready.clear()
        self.epoch = 0
        self.at, self.granted, self.margin = start - 1, start - 1, 1
        self.stored_step = self.local_step = start - 1
        self.last_memory = self.last_storage = self.last_local = now
        for slot in self.slots.values():
            if slot.state is State.GRANTED:
                slot.state, slot.parts = State.FREE, {}
        self.use(slots)
        self._release()

    def adopt(self, key: Key, slot: int) -> None:
        """A step that is complete in memory, and of which this machine may not know. A slot that it does not know either
        is none of this life."""
        known = self.slots.setdefault(slot, _Slot(retired=True))
        if known.state is State.FREE:
            known.state, known.key = State.COMPLETE, key

    def use(self, slots: Collection[int]) -> None:
        """From now on these slots are granted; others go when what they hold is no longer needed."""
        for number in slots:
            self.slots.setdefault(number, _Slot()).retired = False
        for number, slot in list(self.slots.items()):
            if number not in slots:
                slot.retired = True
                if slot.state is State.FREE:
                    del self.slots[number]

    def join(self, rank: int, epoch: int, now: float) -> list[Decision]:
        """A rank has what it needs to take part."""
        if epoch == self.epoch and rank < self.world:
            self.ready.add(rank)
        return self._consider(now)

    def step(self, event: Stepped) -> list[Decision]:
        """A rank has passed a step."""
        self.at = max(self.at, event.step)
        return self._consider(event.now)

    def seal(self, rank: int, step: int, part: Sealed | str, now: float, *, late: bool = False) -> list[Decision]:
        """A rank has sealed its part of a step, or (`part` says why) will not; `late`: the grant came too late for it."""
        found = self._granted(step)
        if found is None or rank >= self.world:
            return []
        self.at = max(self.at, step)
        number, slot = found
        slot.parts.setdefault(rank, part)
        slot.late |= late
        return self._settle(number, slot) + self._consider(now)

    def leave(self, rank: int, why: str, now: float) -> list[Decision]:
        """A rank's trainer is gone; it has let go of all slots."""
        if rank >= self.world:
            return []
        self.ready.discard(rank)
        out: list[Decision] = []
        for number, slot in list(self.slots.items()):
            if slot.state is State.GRANTED:
                slot.parts.setdefault(rank, why)
                out += self._settle(number, slot)
        return out

    def replan(self) -> list[Decision]:
        """A rank's leaves are no longer those of the plan."""
        self.epoch += 1
        self.ready.clear()
        return [Replan(self.epoch)]

    def want(self, step: int) -> tuple[bool, list[Decision]]:
        """Somebody asks for a step of this life to be persisted. Whether it is or will be; False if memory has it not."""
        key = (self.generation, step)
        if key in (self.persisted, self.persisting):
            return True, []
        for number, slot in self.slots.items():
            if slot.state is State.COMPLETE and slot.key == key > self.persisted:
                slot.readers.add("wanted")
                return True, self._persist(number, slot)
        return False, []

    def newest(self) -> tuple[int, Key] | None:
        """The newest complete step: (slot, key)."""
        done = [(s.key, n) for n, s in self.slots.items() if s.state is State.COMPLETE]
        return (max(done)[1], max(done)[0]) if done else None

    def rescue(self) -> list[Decision]:
        """Nobody is left to go on: the newest complete step is to be persisted at once, if it is not."""
        found = self.newest()
        if found is None or found[1] <= self.persisted:
            return []
        slot = self.slots[found[0]]
        slot.readers.add("wanted")
        return self._persist(found[0], slot)

    def persist_ended(self, key: Key, committed: bool, now: float) -> list[Decision]:
        """A save to storage has ended. A failed one is tried again with a later step, after a while."""
        self.persisting = None
        if committed:
            self.persisted = max(self.persisted, key)
            self.failures, self.retry_after = 0, 0.0
        else:
            self.failures += 1
            self.retry_after = now + min(300.0, 2.0**self.failures)
        for slot in self.slots.values():
            slot.readers.discard("storage")
            if slot.key == key or slot.key <= self.persisted:
                slot.readers.discard("wanted")
        waiting = [(s.key, n) for n, s in self.slots.items() if "wanted" in s.readers and s.state is State.COMPLETE]
        out = self._persist(min(waiting)[1], self.slots[min(waiting)[1]]) if waiting else []
        self._release()
        return out + self._consider(now)

    def complete(self) -> set[Key]:
        """The steps that are whole in memory."""
        return {s.key for s in self.slots.values() if s.state is State.COMPLETE}

    def open_grants(self) -> list[int]:
        """The slots that ranks may be writing to."""
        return [n for n, s in self.slots.items() if s.state is State.GRANTED]

    def read(self, slot: int, who: str) -> None:
        """Somebody reads a slot: it stays as it is until he is done."""
        self.slots[slot].readers.add(who)

    def done_reading(self, who: str, now: float) -> list[Decision]:
        """Somebody reads no more."""
        for slot in self.slots.values():
            slot.readers.discard(who)
        self._release()
        return self._consider(now)

    def damaged(self, key: Key) -> None:
        """What is in memory of a step is not what was sealed: it is not there any more."""
        for slot in self.slots.values():
            if slot.state is State.COMPLETE and slot.key == key:
                slot.state = State.DAMAGED
        self._release()

    def _granted(self, step: int) -> tuple[int, _Slot] | None:
        key = (self.generation, step)
        return next(((n, s) for n, s in self.slots.items() if s.state is State.GRANTED and s.key == key), None)

    def _settle(self, number: int, slot: _Slot) -> list[Decision]:
        """Decides about a step once every rank has spoken."""
        if len(slot.parts) < self.world:
            return []
        missing = {rank: part for rank, part in slot.parts.items() if isinstance(part, str)}
        sealed = [part for part in slot.parts.values() if isinstance(part, Sealed)]
        if missing:
            rank = min(missing)
            slot.state, slot.parts = State.FREE, {}
            if slot.late:
                self.margin = min(2 * self.margin, _MARGIN)
            self._release()
            return [Void(slot.key[1], f"rank {rank}: {missing[rank]}")]
        why = _disagreement(sealed)
        if why:
            differing = _differing(sealed)
            self.diverged |= differing
            slot.state, slot.parts = State.FREE, {}
            self._release()
            return [Void(slot.key[1], why), *self.replan()]
        slot.state, slot.parts = State.COMPLETE, {}
        self.margin = max(1, self.margin - max(1, self.margin // 8))  # not at once back to what was too late before
        out: list[Decision] = [Complete(slot.key, number)]
        due = self._owed(slot.key[1])
        if due is not None:
            out += self._persist(number, slot, due)
        self._release()
        return out

    def _persist(self, number: int, slot: _Slot, due: bool = True) -> list[Decision]:
        if self.persisting is not None or slot.key <= self.persisted:
            return []
        self.persisting = slot.key
        slot.readers.add("storage")
        if slot.key[0] == self.generation:
            self.local_step, self.last_local = max(self.local_step, slot.key[1]), self.last_memory
            if due:
                self.stored_step, self.last_storage = max(self.stored_step, slot.key[1]), self.last_memory
        return [Persist(slot.key, number, due)]

    def _owed(self, step: int) -> bool | None:
        """Whether a step that is due for storage lies between the last one persisted and this one, and now is the time; if
        only the local tier is owed one, False; None if neither is."""
        if self.storage is None or self.last_memory < self.retry_after:
            return None
        if self.failures:
            return True
        for every, upto, last, due in (
            (self.storage, self.stored_step, self.last_storage, True),
            (self.local, self.local_step, self.last_local, False),
        ):
            if every is None:
                continue
            by_step = every.steps is not None and _next_due(every.steps, upto) <= step
            if by_step or (every.minutes is not None and self.last_memory - last >= 60 * every.minutes):
                return due
        return None

    def _release(self) -> None:
        """Frees what is complete and not needed: older than the newest complete step, and read by nobody."""
        newest = self.newest()
        for number, slot in list(self.slots.items()):
            if slot.state is State.COMPLETE and newest is not None and slot.key < newest[1] and not slot.readers:
                slot.state = State.FREE
            if slot.state is State.DAMAGED and not slot.readers:
                slot.state = State.FREE
            if slot.state is State.FREE and slot.retired:
                del self.slots[number]

    def _consider(self, now: float) -> list[Decision]:
        """Grants the next step that is due, if all ranks are there and a slot is free."""
        if len(self.ready) < self.world:
            return []
        free = next((n for n, s in sorted(self.slots.items()) if s.state is State.FREE and not s.retired), None)
        if free is None:
            return []
        step = self._next(max(self.at + self.margin - 1, self.granted), now)
        if step is None:
            return []
        self.granted = step
        self.last_memory = now
        slot = self.slots[free]
        slot.state, slot.key, slot.parts = State.GRANTED, (self.generation, step), {}
        slot.late = False
        return [Grant(step, free)]

    def _next(self, after: int, now: float) -> int | None:
        """The first step behind `after` that is due for memory or for storage."""
        found = []
        schedules = (self.memory, self.last_memory), (self.storage, self.last_storage), (self.local, self.last_local)
        for every, last in schedules:
            if every is not None and every.steps is not None:
                found.append(_next_due(every.steps, after))
            if every is not None and every.minutes is not None and now - last >= 60 * every.minutes:
                found.append(after + 1)
        return min(found, default=None)


def _next_due(steps: int, after: int) -> int:
    """The first step behind `after` at which Every(steps) fires: (n + 1) % steps == 0."""
    return -(-(after + 2) // steps) * steps - 1


def _disagreement(parts: Sequence[Sealed]) -> str:
    if len({p.plan for p in parts}) > 1:
        return "the ranks sealed parts of different plans"
    names = _differing(parts)
    return f"no longer the same on all ranks: {', '.join(sorted(names)[:5])}" if names else ""


def _differing(parts: Sequence[Sealed]) -> set[str]:
    """Names of tensors that should be copies of one another and are not."""
    seen: dict[str, int] = {}
    return {name for p in parts for name, digest in p.copies.items() if seen.setdefault(name, digest) != digest}
