"""A job in small, around the machines that decide for it: hosts with real bytes, which fold with the real code.

What is true is kept apart from what the machines believe: a step of a host has the bytes that `content` gives, and can be
rebuilt if, from what the surviving hosts hold, exactly these bytes come out.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

from ckpt.config import ErasureCode, Every, Replicas
from ckpt.errors import UsageError
from ckpt.keeper import lead as leads
from ckpt.keeper.erasure import Code
from ckpt.keeper.groups import Chunk, Host, Placement, place
from ckpt.keeper.guard import Abandon, Announce, Decision, Fold, Forget, Guard, Inventory, Mark, Release, Start, Ward
from ckpt.keeper.lead import Key, Lead

code = cache(Code)


@cache
def content(key: Key, host: Host) -> bytes:
    """A host's part of a step."""
    return random.Random(f"{key} {host.name}").randbytes(host.nbytes)


@dataclass(eq=False)
class Node:
    """A host: its keeper, its memory, and its trainer as far as it matters here."""

    host: Host
    ward: Ward
    slots: list[bytearray]
    keys: list[Key | None]  # what is sealed in them
    areas: list[bytearray] = field(default_factory=lambda: [bytearray(), bytearray()])
    reachable: bool = True
    life: int = -1
    at: int = -1
    grants: dict[int, int] = field(default_factory=dict)
    writing: dict[int, int] = field(default_factory=dict)

    def part(self, key: Key) -> bytes | None:
        return bytes(self.slots[self.keys.index(key)]) if key in self.keys and key in self.ward.whole else None

    def parity(self, key: Key, placement: Placement) -> bytes | None:
        for number, held in enumerate(self.ward.areas):
            if held is not None and held.encoded and (held.area.key, held.area.placement) == (key, placement):
                return bytes(self.areas[number])
        return None


@dataclass(eq=False)
class Seat:
    """The keeper that leads a life. It goes on after a later one began, for as long as its host lives."""

    host: str
    names: list[str]  # by rank
    lead: Lead
    guard: Guard
    orders: dict[str, deque[Any]] = field(default_factory=dict)
    reports: dict[str, deque[Any]] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)  # hosts that it knows to be lost

    @property
    def generation(self) -> int:
        return self.guard.generation


@dataclass(frozen=True)
class Message:
    """A chunk on its way into one parity area."""

    mark: Mark
    chunk: Chunk
    row: int
    keeper: str
    sender: str
    key: Key
    block: bytes = b""


class Job:
    """`hosts` take part in the first life, in slots of their size."""

    def __init__(self, hosts: Sequence[Host], redundancy: ErasureCode | Replicas, slots: int = 2) -> None:
        self.redundancy, self.count = redundancy, slots
        self.nodes: dict[str, Node] = {}
        self.seats: dict[int, Seat] = {}
        self.generation = 0
        self.sends: deque[Message] = deque()
        self.flying: deque[Message] = deque()
        self.announced: Key | None = None
        self.where: dict[Key, Placement] = {}
        self.counted: list[Placement] = []  # in whose groups losses count
        self.history: list[Key] = []
        self.started: list[Start] = []
        self.seen: Any = None
        for host in hosts:
            self.add(host)
        self.live([h.name for h in hosts])

    def add(self, host: Host) -> None:
        memory = [bytearray(host.nbytes) for _ in range(self.count)]
        self.nodes[host.name] = Node(host, Ward(host.name), memory, [None] * self.count)

    @property
    def seat(self) -> Seat:
        return self.seats[self.generation]

    def up(self) -> list[str]:
        return sorted(n for n, node in self.nodes.items() if node.reachable)

    # Lives.

    def live(self, names: Sequence[str], seat: str = "") -> None:
        """All trainers that can be reached are gone; a life begins on these hosts."""
        before = self.seats[self.generation].guard.placement if self.generation else None
        self.generation += 1
        placement = place([self.nodes[n].host for n in names], self.redundancy, before)
        inventories = [i for n in self.up() if (i := self.nodes[n].ward.inventory(self.generation)) is not None]
        assert len(inventories) == len(self.up())
        self.begin(names, seat or names[0], placement, inventories)

    def begin(
        self,
        names: Sequence[str],
        host: str,
        placement: Placement,
        inventories: list[Inventory],
        number: int = 0,
        start: int = 0,
    ) -> None:
        guard, decisions = Guard.resume(self.generation, placement, inventories, number)
        start = max([start, *(k[1] + 1 for k in guard.held())])
        lead = Lead(len(names), Every(1), None)
        seat = self.seats[self.generation] = Seat(host, list(names), lead, guard)
        slots = {k: i for n in self.up() for i, k in enumerate(self.nodes[n].keys) if k is not None}
        for key in sorted(guard.held()):
            lead.adopt(key, slots[key])
            lead.read(slots[key], f"guard {key}")
        lead.begin(self.generation, len(names), range(self.count), start, 0.0)
        for n in self.up():
            node = self.nodes[n]
            node.life, node.at = (self.generation if n in names else -1), start - 1
            node.grants.clear()
            node.writing.clear()
        self.counted = [p for p in self.counted if self.announced] + [placement]
        self.obey(seat, decisions)
        for rank in range(len(names)):
            self.lead(seat, lead.join(rank, 0, 0.0))

    def reseat(self) -> None:
        """The keeper that leads dies under its trainer, and another one takes its place, in the same life: it knows nothing,
        and is another host. What is on the way between the hosts and the seat is lost; chunks still arrive."""
        old = self.seat
        before = self.nodes.pop(old.host)
        host = Host(f"{before.host.name}'", before.host.domain, before.host.nbytes)
        self.add(host)
        self.nodes[host.name].ward.inventory(self.generation)
        names = [host.name if n == old.host else n for n in old.names]
        inventories = []
        for n in self.up():
            ward = self.nodes[n].ward
            if ward.inventory(self.generation) is None:
                ward.pin()
            inventories.append(ward.tell())
        number = max(self.nodes[n].ward.fence[1] for n in self.up())
        placement = place([self.nodes[n].host for n in names], self.redundancy, old.guard.placement)
        start = max(node.at for node in self.nodes.values()) + 1
        self.begin(names, host.name, placement, inventories, number, start)

    def kill(self, name: str) -> None:
        """A host with everything on it."""
        del self.nodes[name]

    def notice(self, name: str) -> None:
        """The seat sees that a host does not answer any more."""
        seat = self.seat
        if name not in seat.told:
            seat.told.add(name)
            if name in seat.names:
                self.lead(seat, seat.lead.leave(seat.names.index(name), "its host is lost", 0.0))
            self.obey(seat, seat.guard.lose(name))

    def back(self, name: str) -> None:
        """A host that the seat took for lost is there again, with its memory and its trainer: what was on the way between
        them is not, and it obeys nothing of before."""
        seat, ward = self.seat, self.nodes[name].ward
        seat.told.discard(name)
        for queue in (seat.orders, seat.reports):
            queue.pop(name, None)
        ward.pin()
        seat.guard.number = max(seat.guard.number, ward.fence[1])
        seat.guard.back(name)
        for mark in list(seat.guard.encoding.marks if seat.guard.encoding else []):
            self.obey(seat, seat.guard.failed(name, mark))
        if name in seat.names:
            self.lead(seat, seat.lead.join(seat.names.index(name), 0, 0.0))

    # The seat's side.

    def order(self, seat: Seat, names: Collection[str], order: Any) -> None:
        for name in sorted(names):
            seat.orders.setdefault(name, deque()).append(order)

    def lead(self, seat: Seat, decisions: Sequence[leads.Decision]) -> None:
        for d in decisions:
            if isinstance(d, leads.Grant):
                self.order(seat, seat.names, d)
            elif isinstance(d, leads.Complete):
                self.order(seat, seat.names, d)
                asked = seat.guard.complete(d.key)
                if d.key in seat.guard.held():
                    seat.lead.read(d.slot, f"guard {d.key}")
                self.obey(seat, asked)

    def obey(self, seat: Seat, decisions: Sequence[Decision]) -> None:
        for d in decisions:
            if isinstance(d, Start | Abandon):
                if isinstance(d, Start):
                    self.started.append(d)
                self.order(seat, d.placement.groups[d.group].names, d)
            elif isinstance(d, Announce):
                self.history.append(d.key)
                if self.announced is None or d.key > self.announced:
                    self.announced = d.key
                    self.counted = [d.placement, *(p for p in self.counted[-1:] if p != d.placement)]
                    self.where[d.key] = d.placement
            elif isinstance(d, Release | Forget):
                if isinstance(d, Forget):
                    assert d.why
                    seat.lead.damaged(d.key)
                self.lead(seat, seat.lead.done_reading(f"guard {d.key}", 0.0))

    def heard(self, seat: Seat, name: str) -> None:
        """A report arrives, in the order in which the host sent them."""
        kind, *rest = seat.reports[name].popleft()
        rank = seat.names.index(name) if name in seat.names else -1
        if kind == "at":
            self.lead(seat, seat.lead.step(leads.Stepped(rest[0], 0.0)))
        elif kind == "sealed":
            self.lead(seat, seat.lead.seal(rank, rest[0], leads.Sealed("plan", {}), 0.0))
        elif kind == "missed":
            self.lead(seat, seat.lead.seal(rank, rest[0], "too late", 0.0))
        elif kind == "encoded":
            self.obey(seat, seat.guard.encoded(name, rest[0]))
        else:
            self.obey(seat, seat.guard.failed(name, rest[0]))

    # A host's side.

    def report(self, generation: int, name: str, *report: Any) -> None:
        self.seats[generation].reports.setdefault(name, deque()).append(report)

    def told(self, seat: Seat, name: str) -> None:
        """An order arrives."""
        order, node = seat.orders[name].popleft(), self.nodes[name]
        if isinstance(order, Start):
            self.start(node, order)
        elif isinstance(order, Abandon):
            node.ward.abandon(order.mark)
        elif isinstance(order, leads.Complete):
            if node.keys[order.slot] == order.key:
                node.ward.hold(order.key, seat.guard.placement)
        elif node.life != seat.generation:
            pass  # its trainer is one of another life
        elif order.step <= node.at:
            self.report(node.life, name, "missed", order.step)
        else:
            node.grants[order.step] = order.slot

    def start(self, node: Node, order: Start) -> None:
        if not node.ward.start(order):
            return
        share = order.placement.groups[order.group].shares[node.host.name]
        node.areas[order.area] = bytearray(share.parity_bytes)
        for chunk in share.chunks:
            for row, keeper in enumerate(chunk.keepers):
                if chunk.stop > chunk.start:
                    self.sends.append(Message(order.mark, chunk, row, keeper, node.host.name, order.key))
        if node.ward.encoded(order.mark):
            self.report(order.mark[0], node.host.name, "encoded", order.mark)

    def advance(self, node: Node) -> None:
        """A training step is over: if it was granted, the slot is written to."""
        node.at += 1
        self.report(node.life, node.host.name, "at", node.at)
        slot = node.grants.pop(node.at, None)
        if slot is not None:
            key = node.keys[slot]
            if key is not None:
                node.ward.drop(key)
            node.keys[slot] = None
            node.slots[slot][:] = b"\xee" * len(node.slots[slot])
            node.writing[node.at] = slot

    def seal(self, node: Node, step: int) -> None:
        slot, key = node.writing.pop(step), (node.life, step)
        node.slots[slot][:] = content(key, node.host)
        node.keys[slot] = key
        self.report(node.life, node.host.name, "sealed", step)

    def send(self, message: Message) -> None:
        """The bytes are read, if they are still there."""
        node = self.nodes.get(message.sender)
        if node is not None and message.key in node.ward.whole:
            part = node.slots[node.keys.index(message.key)]
            block = bytes(part[message.chunk.start : message.chunk.stop])
            self.flying.append(Message(**{**message.__dict__, "block": block}))

    def arrive(self, message: Message, whole: bool = True) -> bool:
        """A chunk arrives, or only its first half; whether it is off the wire."""
        node = self.nodes.get(message.keeper)
        if node is None or not node.reachable:
            return True
        fold = node.ward.fold(message.mark, message.chunk.stripe, message.chunk.number)
        if fold is not Fold.NOW:
            return fold is Fold.NEVER
        area, held = next((i, a) for i, a in enumerate(node.ward.areas) if a is not None and a.mark == message.mark)
        group = held.area.placement.groups[held.area.placement.group_of(message.keeper)]
        [parity] = [p for p in group.shares[message.keeper].parity if p.stripe == message.chunk.stripe]
        block = message.block if whole else message.block[: len(message.block) // 2]
        view = memoryview(node.areas[area])[parity.offset : parity.offset + len(block)]
        code(group.data, group.parity).fold(message.chunk.number, block, {message.row: view})
        if not whole:
            assert node.ward.broken(message.mark)
            self.report(message.mark[0], message.keeper, "failed", message.mark)
            return True
        node.ward.folded(message.mark, message.chunk.stripe, message.chunk.number)
        if node.ward.encoded(message.mark):
            self.report(message.mark[0], message.keeper, "encoded", message.mark)
        return True

    # What must hold.

    def bearable(self, more: Collection[str]) -> bool:
        """Whether no group has lost more than its parity, these hosts counted."""
        there = self.nodes.keys() - set(more)
        return all(
            len(g.names - {n for n in there if self.nodes[n].reachable}) <= g.parity
            for p in self.counted
            for g in p.groups
        )

    def check(self) -> None:
        """Invariant 6 of the design, by decoding, for all that may be lost yet."""
        if self.announced is None:
            return
        up = self.up()
        there = self.there(self.announced, self.where[self.announced], up)
        now = (self.announced, there, tuple(map(id, self.counted)))
        if now == self.seen or not self.bearable(()):
            return
        self.seen = now
        for lost in worst(tuple(up), tuple(self.counted)):
            if not rebuilt(self.announced, self.where[self.announced], tuple(h for h in there if h[0] not in lost)):
                self.seen = None
                newer = {k: p for n in up for k, p in self.nodes[n].ward.whole.items() if k > self.announced}
                left = [n for n in up if n not in lost]
                assert any(rebuilt(k, p, self.there(k, p, left)) for k, p in newer.items()), (
                    f"after the loss of {sorted(lost)} nothing as new as {self.announced} can be rebuilt"
                )

    def there(self, key: Key, placement: Placement, names: Sequence[str]) -> tuple[Held, ...]:
        """What hosts hold of a step."""
        return tuple((n, self.nodes[n].part(key), self.nodes[n].parity(key, placement)) for n in names)


Held = tuple[str, bytes | None, bytes | None]
"""(host, its part of a step, its parity area)."""


@lru_cache(5000)
def worst(up: tuple[str, ...], placements: tuple[Placement, ...]) -> list[frozenset[str]]:
    """The largest sets of hosts that may be lost, of those that are up, so that no group has lost more than its parity."""
    found: list[frozenset[str]] = []
    for n in range(len(up), -1, -1):
        for lost in map(frozenset, itertools.combinations(up, n)):
            left = set(up) - lost
            if not any(lost < f for f in found) and all(
                len(g.names - left) <= g.parity for p in placements for g in p.groups
            ):
                found.append(lost)
    return found


@cache
def rebuilt(key: Key, placement: Placement, there: tuple[Held, ...]) -> bool:
    """Whether every byte of a step comes out of what hosts hold of it."""
    parts = {name: part for name, part, _ in there if part is not None}
    areas = {name: area for name, _, area in there if area is not None}
    for group in placement.groups:
        out = {h.name: bytearray(parts.get(h.name, bytes(h.nbytes))) for h in group.hosts}
        for stripe in group.stripes if group.parity else ():
            present, wanted = {}, {}
            for i, (name, start, stop) in enumerate(stripe.data):
                if name in parts:
                    present[i] = parts[name][start:stop]
                else:
                    wanted[i] = memoryview(out[name])[start:stop]
            for r, (name, offset, n) in enumerate(stripe.parity):
                if name in areas:
                    present[group.data + r] = areas[name][offset : offset + n]
            try:
                code(group.data, group.parity).decode(present, wanted)
            except UsageError:
                return False
        if any(out[h.name] != content(key, h) for h in group.hosts):
            return False
    return True
