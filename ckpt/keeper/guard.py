"""When a step is protected, and what may be reused then, as pure state machines: events in, decisions out; no clock, no
sockets. `Guard` decides for the job, in the keeper of rank 0, beside `Lead`; `Ward` obeys on every host.

    a step        complete -> waiting -> being encoded -> announced -> released, when a newer one is announced
                                  \\-> released, when a newer one is complete; forgotten, when a host that has a part is lost
    a parity area empty -> folding(mark) -> encoded, or empty again: what was interrupted begins anew, under another mark

A step is announced when every host of every group has its parity in full. Only then its predecessor is released, so
that the slot may be granted and the parity area be folded into: of two areas one always holds the announced step. While
one step is encoded the newest complete one waits; those between are skipped.

Every life of the job begins with `Guard.resume`: all keepers that can be reached raise their fence, so that nothing of an
earlier life is obeyed or folded any more, and say what they hold. No step is announced but by what they say: the newest
that all of them have encoded, with no more hosts missing than its groups have parity, is the one to hold on to.

At every instant, while no group, of the announced step or of the lives since, has lost more hosts than it has parity
since then, some complete step at least as new as the last announced one can be rebuilt.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum

from ckpt.keeper.groups import Placement
from ckpt.keeper.lead import Key

__all__ = [
    "Abandon",
    "Announce",
    "Area",
    "Decision",
    "Fold",
    "Forget",
    "Guard",
    "Inventory",
    "Mark",
    "Release",
    "Start",
    "Ward",
]

Mark = tuple[int, int]
"""(generation, number): one attempt at encoding a step in one group. A later one is larger, also over lives."""


@dataclass(frozen=True)
class Start:
    """All hosts of a group zero parity area `area` and encode a step into it, as the placement says."""

    mark: Mark
    key: Key
    area: int
    placement: Placement
    group: int


@dataclass(frozen=True)
class Abandon:
    """All hosts of a group stop what they do under this mark."""

    mark: Mark
    placement: Placement
    group: int


@dataclass(frozen=True)
class Announce:
    """A step is protected: each group of the placement may lose as many hosts as it has parity."""

    key: Key
    placement: Placement


@dataclass(frozen=True)
class Release:
    """A complete step is no longer needed here; whoever else reads it may go on. Its slot may be granted."""

    key: Key


@dataclass(frozen=True)
class Forget:
    """A step is not whole any more, and not protected: nothing of it may be relied on. `why` names what is lost."""

    key: Key
    why: str


Decision = Start | Abandon | Announce | Release | Forget


@dataclass(frozen=True)
class Area:
    """A parity area that is encoded in full: of which step, and as part of which placement."""

    key: Key
    placement: Placement


@dataclass(frozen=True)
class Inventory:
    """What a host holds, and that it obeys no earlier life any more.

    whole    the steps it knows to be complete and has its own part of, with the placement of their life
    areas    what is encoded in its two parity areas
    spoiled  steps of which its part or its parity turned out not to be what it was: it counts as lost for them
    """

    host: str
    whole: Mapping[Key, Placement]
    areas: tuple[Area | None, Area | None]
    spoiled: frozenset[Key] = frozenset()

    def covers(self, key: Key, placement: Placement, area: int) -> bool:
        """Whether it has all that it should have of an encoded step."""
        return key in self.whole and self.areas[area] == Area(key, placement)


@dataclass(frozen=True)
class _Step:
    key: Key
    placement: Placement


@dataclass
class _Encoding:
    step: _Step
    area: int
    marks: list[Mark]  # by group
    done: list[set[str]]  # by group


@dataclass
class Guard:
    """One life of the job, whose snapshots are laid out as `placement` says."""

    generation: int
    placement: Placement
    announced: _Step | None = None
    area: int = 1  # of the announced step
    encoding: _Encoding | None = None
    waiting: _Step | None = None
    lost: set[str] = field(default_factory=set)
    number: int = 0

    @classmethod
    def resume(
        cls, generation: int, placement: Placement, inventories: Collection[Inventory], number: int = 0
    ) -> tuple[Guard, list[Decision]]:
        """A life begins, with what all hosts hold that can be reached, of this life or not, once they are fenced.

        `number`: above it the attempts are counted; the highest of a fence of this life, where it was led before.
        """
        guard = cls(generation, placement, number=number)
        by_host = {i.host: i for i in inventories}
        guard.lost = set(placement.names - by_host.keys())
        found = {(a.key, n): a.placement for i in inventories for n, a in enumerate(i.areas) if a is not None}
        for (key, area), placed in sorted(found.items(), key=lambda item: item[0], reverse=True):
            if _covered(key, placed, area, by_host):
                guard.announced, guard.area = _Step(key, placed), area
                guard.lost |= placed.names - by_host.keys()
                break
        steps = {key: placed for i in inventories for key, placed in i.whole.items()}
        known = steps | {key: placed for (key, _), placed in found.items()}
        newest = guard.announced.key if guard.announced else (-1, -1)
        for key, placed in sorted(steps.items()):
            if key > newest and all(n in by_host and key in by_host[n].whole for n in placed.names):
                guard.waiting = _Step(key, placed)
        out: list[Decision] = []
        for key in sorted(known.keys() - guard.held()):
            gone = sorted(n for n in known[key].names if n not in by_host or key not in by_host[n].whole)
            out.append(Forget(key, f"gone with {', '.join(gone[:5])}") if gone else Release(key))
        return guard, out + guard._consider()

    def held(self) -> set[Key]:
        """The steps whose slots must stay as they are."""
        steps = (self.announced, self.encoding and self.encoding.step, self.waiting)
        return {s.key for s in steps if s}

    def missing(self) -> dict[int, set[str]]:
        """Of the announced step: hosts that were lost since, by the number of their group; those with none are left out."""
        if self.announced is None:
            return {}
        groups = {i: set(g.names & self.lost) for i, g in enumerate(self.announced.placement.groups)}
        return {i: names for i, names in groups.items() if names}

    def complete(self, key: Key) -> list[Decision]:
        """All hosts of this life have sealed a step. If it is in `held` then, its slot stays until it is released."""
        if key[0] != self.generation or key <= max(self.held(), default=(-1, -1)):
            return []
        if gone := self.placement.names & self.lost:
            return [Forget(key, f"gone with {', '.join(sorted(gone)[:5])}")]
        out: list[Decision] = [Release(self.waiting.key)] if self.waiting else []
        self.waiting = _Step(key, self.placement)
        return out + self._consider()

    def encoded(self, host: str, mark: Mark) -> list[Decision]:
        """A host has the parity of its group's stripes in full."""
        group = self._group(host, mark)
        if group is None or self.encoding is None:
            return []
        self.encoding.done[group].add(host)
        step = self.encoding.step
        if any(done != g.names for done, g in zip(self.encoding.done, step.placement.groups, strict=True)):
            return []
        before, self.announced, self.area, self.encoding = self.announced, step, self.encoding.area, None
        out: list[Decision] = [Announce(step.key, step.placement)]
        if before:
            out.append(Release(before.key))
        return out + self._consider()

    def failed(self, host: str, mark: Mark) -> list[Decision]:
        """A host could not finish, and is still there. Its group begins anew; or all, with a newer step that waits."""
        group = self._group(host, mark)
        if group is None or self.encoding is None:
            return []
        if self.waiting is None:
            self.encoding.done[group].clear()
            return [self._start(group)]
        return [*self._abandon(), Release(self._given_up().key), *self._consider()]

    def lose(self, host: str) -> list[Decision]:
        """A host is lost. What was not announced and has a part there goes with it; the next life protects anew."""
        self.lost.add(host)
        out: list[Decision] = []
        if self.encoding and host in self.encoding.step.placement.names:
            out += [*self._abandon(), Forget(self._given_up().key, f"gone with {host}")]
        if self.waiting and host in self.waiting.placement.names:
            out.append(Forget(self.waiting.key, f"gone with {host}"))
            self.waiting = None
        return out + self._consider()

    def back(self, host: str) -> None:
        """A host that was out of reach is there again, with its memory: the next complete step counts on it."""
        self.lost.discard(host)

    def spoil(self, host: str, key: Key) -> list[Decision]:
        """A host's part of a step is not what was sealed. Unless it is announced, and so can be rebuilt, it is of no use."""
        why = f"its part on {host} is damaged"
        if self.waiting and self.waiting.key == key:
            self.waiting = None
            return [Forget(key, why)]
        if self.encoding is None or self.encoding.step.key != key:
            return []
        return [*self._abandon(), Forget(self._given_up().key, why), *self._consider()]

    def _group(self, host: str, mark: Mark) -> int | None:
        """The group that works under a mark, if the host is in it; None for what is no longer, or never was, asked for."""
        if self.encoding is None or mark not in self.encoding.marks:
            return None
        group = self.encoding.marks.index(mark)
        return group if host in self.encoding.step.placement.groups[group].names else None

    def _consider(self) -> list[Decision]:
        """Starts with the step that waits, in the area that is not needed."""
        if self.encoding is not None or self.waiting is None:
            return []
        step, self.waiting = self.waiting, None
        groups = len(step.placement.groups)
        self.encoding = _Encoding(step, 1 - self.area, [(0, 0)] * groups, [set() for _ in range(groups)])
        return [self._start(g) for g in range(groups)]

    def _start(self, group: int) -> Start:
        assert self.encoding is not None
        self.number += 1
        mark = self.encoding.marks[group] = (self.generation, self.number)
        step = self.encoding.step
        return Start(mark, step.key, self.encoding.area, step.placement, group)

    def _abandon(self) -> list[Abandon]:
        assert self.encoding is not None
        placement = self.encoding.step.placement
        return [Abandon(mark, placement, group) for group, mark in enumerate(self.encoding.marks)]

    def _given_up(self) -> _Step:
        assert self.encoding is not None
        step, self.encoding = self.encoding.step, None
        return step


def _covered(key: Key, placement: Placement, area: int, by_host: Mapping[str, Inventory]) -> bool:
    """Whether all that could be reached have encoded a step, and no group misses more hosts than it has parity.

    A host that is there and has not is not one that lost it, but one that was never asked: then an older step was, or
    is, the one announced.
    """
    for group in placement.groups:
        there = [by_host[n] for n in group.names if n in by_host and key not in by_host[n].spoiled]
        if len(group.names) - len(there) > group.parity or not all(i.covers(key, placement, area) for i in there):
            return False
    return True


class Fold(Enum):
    """What to do with a chunk that a host offers."""

    NOW = "now"
    LATER = "later"  # the order to start has not come yet
    NEVER = "never"  # of an attempt that is over, or folded already


@dataclass
class _Folding:
    mark: Mark
    area: Area
    todo: set[tuple[int, int]]  # (stripe, number) of chunks to be folded
    begun: set[tuple[int, int]] = field(default_factory=set)

    @property
    def encoded(self) -> bool:
        return not self.todo and not self.begun


@dataclass
class Ward:
    """One host, whose name is of one life of its keeper: one that comes back without its memory is another host.

    The driver zeroes an area when `start` says so and nothing folds into it any more; folds when `fold` says so; sends a
    chunk of a step, and reads it while it sends, only while `whole` has the step; and reports `encoded(mark)` or a failure.
    """

    host: str
    fence: Mark = (0, 0)
    whole: dict[Key, Placement] = field(default_factory=dict)
    areas: list[_Folding | None] = field(default_factory=lambda: [None, None])
    spoiled: set[Key] = field(default_factory=set)

    def inventory(self, generation: int) -> Inventory | None:
        """What this host holds, for the life that begins; None if that has begun, or a later one."""
        if (generation, 0) < self.fence:
            return None
        self.fence = (generation, 0)
        return self.tell()

    def tell(self) -> Inventory:
        """What this host holds now."""
        first, second = (a.area if a is not None and a.encoded else None for a in self.areas)
        return Inventory(self.host, dict(self.whole), (first, second), frozenset(self.spoiled))

    def pin(self) -> None:
        """Nothing of an attempt that was ordered until now is begun or folded any more: what is there stays as it is."""
        self.fence = (self.fence[0], self.fence[1] + 1)

    def hold(self, key: Key, placement: Placement) -> None:
        """A step is complete, and this host's part of it is in a slot."""
        self.whole[key] = placement

    def drop(self, key: Key) -> None:
        """The slot with a step's part is about to be written to; no chunk of it is being sent any more."""
        self.whole.pop(key, None)
        self.spoiled.discard(key)

    def start(self, order: Start) -> bool:
        """Whether to zero the area and begin; not for an order of an earlier life or attempt."""
        if order.mark <= self.fence:
            return False
        self.fence = order.mark
        sources = {
            (c.stripe, c.number)
            for share in order.placement.groups[order.group].shares.values()
            for c in share.chunks
            if self.host in c.keepers and c.stop > c.start
        }
        self.areas[order.area] = _Folding(order.mark, Area(order.key, order.placement), sources)
        return True

    def abandon(self, mark: Mark) -> None:
        """Nothing is folded under this mark any more, nor begun if the order to do so comes yet."""
        self.fence = max(self.fence, mark)
        self._empty(mark)

    def fold(self, mark: Mark, stripe: int, number: int) -> Fold:
        """A host offers a chunk. After NOW the driver folds it and says `folded`, or `broken`."""
        area = self._at(mark)
        if area is None or mark < self.fence:
            return Fold.LATER if mark > self.fence else Fold.NEVER
        if (stripe, number) not in area.todo:
            return Fold.NEVER
        area.todo.remove((stripe, number))
        area.begun.add((stripe, number))
        return Fold.NOW

    def folded(self, mark: Mark, stripe: int, number: int) -> None:
        """All bytes of a chunk are in."""
        area = self._at(mark)
        if area is not None:
            area.begun.discard((stripe, number))

    def broken(self, mark: Mark) -> bool:
        """A chunk came only in part: whether that is to be reported. The area is of no use until it is started anew."""
        return self._empty(mark)

    def encoded(self, mark: Mark) -> bool:
        """Whether the parity of an attempt is there in full."""
        area = self._at(mark)
        return area is not None and area.encoded

    def spoil(self, key: Key) -> None:
        """Bytes of a step, in its slot or in its parity here, are not what they were."""
        self.spoiled.add(key)

    def area(self, mark: Mark) -> int | None:
        """The number of the area that an attempt is, or was, folded into."""
        return next((n for n, a in enumerate(self.areas) if a is not None and a.mark == mark), None)

    def _at(self, mark: Mark) -> _Folding | None:
        return next((a for a in self.areas if a is not None and a.mark == mark), None)

    def _empty(self, mark: Mark) -> bool:
        for number, area in enumerate(self.areas):
            if area is not None and area.mark == mark and not area.encoded:
                self.areas[number] = None
                return True
        return False
