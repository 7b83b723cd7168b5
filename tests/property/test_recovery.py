"""Lost parts come out of what the other hosts hold, byte for byte; and what is chosen to go on from can be had.

Segments and parity are those of the real placement and the real code; hosts fail and flip bits while they are read.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import test_guard as guards
from guarded import Job, content

from ckpt.config import ErasureCode, Replicas
from ckpt.errors import IntegrityError, NotFoundError, PeerError
from ckpt.keeper.erasure import Code
from ckpt.keeper.groups import Group, Host, Placement, place
from ckpt.keeper.guard import Area, Guard, Inventory
from ckpt.keeper.lead import Key
from ckpt.keeper.rebuild import Share, Stripes
from ckpt.keeper.recovery import choose
from ckpt.keeper.source import SharedPack

KEY: Key = (3, 17)


@dataclass
class Memory:
    """What a host holds of a step, as a Store. Fails after it has given so many answers."""

    part: bytes
    parity: bytes
    answers: int = 10**9
    asked: deque[bytes] = field(default_factory=deque)
    moved: int = 0

    def ask(self, parity: bool, offset: int, length: int) -> None:
        found = (self.parity if parity else self.part)[offset : offset + length]
        assert len(found) == length, "asked for what it does not have"
        self.asked.append(found)

    def take(self, into: memoryview) -> None:
        if self.answers == 0:
            raise PeerError("it is gone")
        self.answers -= 1
        into[:] = self.asked.popleft()
        self.moved += len(into)

    def close(self) -> None:
        self.asked.clear()


def encoded(group: Group, parts: Mapping[str, bytes]) -> dict[str, bytes]:
    """The parity area of each host."""
    areas = {name: bytearray(share.parity_bytes) for name, share in group.shares.items()}
    for stripe in group.stripes:
        data = [parts[name][start:stop] for name, start, stop in stripe.data]
        parity = [memoryview(areas[name])[at : at + n] for name, at, n in stripe.parity]
        Code(group.data, group.parity).encode(data, parity)
    return {name: bytes(area) for name, area in areas.items()}


SHAPES = {
    "4 + 2": (6, ErasureCode(4, 2), 50_000),
    "6 + 2 on 9 hosts": (9, ErasureCode(6, 2), 3000),
    "3 + 1": (4, ErasureCode(3, 1), 700),
    "2 + 3": (5, ErasureCode(2, 3), 1000),
    "three copies": (5, Replicas(3), 1000),
    "pairs": (2, Replicas(2), 1000),
    "3 hosts": (3, ErasureCode(6, 2), 1000),
    "tiny": (6, ErasureCode(4, 2), 100),
}


@dataclass
class Made:
    group: Group
    parts: dict[str, bytes]
    memory: dict[str, Memory]

    def stripes(self, left: Collection[str], near: str = "") -> Stripes:
        def share(name: str) -> Share:
            return Share(lambda: self.memory[name], True, True, name == near)

        return Stripes(self.group, {name: share(name) for name in left})


def made(shape: str) -> Made:
    """One group, of hosts of unequal sizes, one of which has nothing."""
    count, redundancy, nbytes = SHAPES[shape]
    rng = random.Random(shape)
    sizes = [0 if n == 3 else rng.randrange(nbytes) for n in range(count)]
    [group] = place([Host(f"h{n}", f"h{n}", size) for n, size in enumerate(sizes)], redundancy).groups
    parts = {h.name: rng.randbytes(h.nbytes) for h in group.hosts}
    areas = encoded(group, parts)
    return Made(group, parts, {name: Memory(parts[name], areas[name]) for name in parts})


@pytest.mark.parametrize("shape", SHAPES)
def test_any_loss_of_as_many_hosts_as_there_is_parity(shape: str) -> None:
    m, rng = made(shape), random.Random(0)
    for n in range(1, m.group.parity + 1):
        for lost in itertools.combinations(sorted(m.parts), n):
            stripes = m.stripes(m.parts.keys() - set(lost), near=min(m.parts.keys() - set(lost)))
            for name in lost:
                part = m.parts[name]
                at, to = sorted((rng.randint(0, len(part)), rng.randint(0, len(part))))
                for lo, hi in ((0, len(part)), (at, to)):
                    cut = rng.randint(0, hi - lo)
                    into = [bytearray(cut), bytearray(hi - lo - cut)]
                    stripes.read(name, [(lo, [memoryview(b) for b in into])])
                    assert b"".join(into) == part[lo:hi]
    name = max(m.parts, key=lambda n: len(m.parts[n]))
    lost = m.parts.keys() if shape == "tiny" else sorted(m.parts)[m.group.data - 1 :]  # many of its chunks are empty
    with pytest.raises(NotFoundError, match=f"fewer than {m.group.data} of {len(m.parts)} hosts"):
        m.stripes(m.parts.keys() - {name, *lost}).read(name, [(0, [memoryview(bytearray(len(m.parts[name])))])])


def test_what_is_on_this_host_is_not_asked_of_others() -> None:
    m = made("4 + 2")
    lost = {"h0", "h5"}
    stripes = m.stripes(m.parts.keys() - lost, near="h1")
    into = memoryview(bytearray(len(m.parts["h0"])))
    stripes.read("h0", [(0, [into])])
    moved = sum(memory.moved for name, memory in m.memory.items() if name != "h1")
    assert bytes(into) == m.parts["h0"] and stripes.moved == moved <= 3 * len(into)


def test_large_chunks_are_decoded_in_slices() -> None:
    group = Group(tuple(Host(f"h{n}", f"h{n}", size) for n, size in enumerate((5 << 20, 4 << 20, 3 << 20))), 2, 1)
    parts = {h.name: random.Random(h.name).randbytes(h.nbytes) for h in group.hosts}
    areas = encoded(group, parts)
    m = Made(group, parts, {n: Memory(parts[n], areas[n]) for n in parts})
    for name in parts:
        into = bytearray(len(parts[name]) - 5)
        m.stripes(parts.keys() - {name}).read(name, [(5, [memoryview(into)])])
        assert bytes(into) == parts[name][5:]


@pytest.mark.parametrize("answers", [0, 1, 2, 5])
def test_a_host_that_fails_while_it_is_read_counts_as_lost(answers: int) -> None:
    m = made("4 + 2")
    for name, other in itertools.permutations(m.parts, 2):
        m.memory[other].answers = answers
        stripes, into = m.stripes(m.parts.keys() - {name}), bytearray(len(m.parts[name]))
        for _ in range(3):
            stripes.read(name, [(0, [memoryview(into)])])
            assert bytes(into) == m.parts[name]
        m.memory[other].answers = 10**9
    name, *others = sorted(m.parts)
    for other in others[:2]:
        m.memory[other].answers = 1
    with pytest.raises(NotFoundError, match="it is gone"):
        m.stripes(m.parts.keys() - {name}).read(name, [(0, [memoryview(bytearray(len(m.parts[name])))])])


@dataclass
class Choosy(Memory):
    """Finds some of its bytes damaged when they are asked for: those of each fifth KiB of a chunk, from the `nth` on."""

    nth: int = 0
    begins: frozenset[tuple[bool, int]] = frozenset()

    def ask(self, parity: bool, offset: int, length: int) -> None:
        start = max(at for what, at in self.begins if what == parity and at <= offset)
        bad = (offset - start) // 1024 % 5 == self.nth
        self.asked.append((self.parity if parity else self.part)[offset : offset + length] if not bad else b"")

    def take(self, into: memoryview) -> None:
        if not self.asked[0]:
            raise IntegrityError("it is damaged")
        super().take(into)


def test_bytes_that_a_host_finds_damaged_are_lost_but_not_the_others_that_it_holds() -> None:
    """Every host that is left has damage, no two at one place: were they given up for it, nothing could be had."""
    m = made("4 + 2")
    for name in m.parts:
        memory: dict[str, Memory] = {}
        for nth, other in enumerate(sorted(m.parts.keys() - {name})):
            share = m.group.shares[other]
            begins = {(False, c.start) for c in share.chunks} | {(True, p.offset) for p in share.parity}
            memory[other] = Choosy(m.parts[other], m.memory[other].parity, nth=nth, begins=frozenset(begins))
        stripes = Made(m.group, m.parts, memory).stripes(memory)
        for chunk in m.group.shares[name].chunks:
            for at in range(chunk.start, chunk.stop, 1024):
                into = bytearray(min(1024, chunk.stop - at))
                stripes.read(name, [(at, [memoryview(into)])])
                assert bytes(into) == m.parts[name][at : at + len(into)]
            starts = range(chunk.start, chunk.stop, 1024)
            rooms = [bytearray(min(1024, chunk.stop - at)) for at in starts]
            stripes.read(name, [(at, [memoryview(room)]) for at, room in zip(starts, rooms, strict=True)])
            assert b"".join(rooms) == m.parts[name][chunk.start : chunk.stop]


class Direct:
    """A pack that is where it was, until it fails."""

    def __init__(self, content: bytes, fails: int = 10**9) -> None:
        self.size, self.content, self.reads = len(content), content, fails

    def read(self, wanted: Sequence[tuple[int, Sequence[memoryview]]]) -> None:
        self.reads -= 1
        if self.reads < 0:
            raise PeerError("it is gone")
        for offset, [buffer] in wanted:
            buffer[:] = self.content[offset : offset + len(buffer)]

    def otherwise(self, offset: int, into: memoryview) -> list[str]:
        return []

    @property
    def moved(self) -> int:
        return 0

    def close(self) -> None:
        pass


def test_a_pack_is_read_where_it_is_and_decoded_from_when_that_fails() -> None:
    m = made("4 + 2")
    name = max(m.parts, key=lambda n: len(m.parts[n]))
    base, part = 1000, m.parts[name]
    pack = SharedPack(len(part) - base, name, base, m.stripes(m.parts), Direct(part[base:], fails=2))  # type: ignore[arg-type]
    for _ in range(4):
        into = bytearray(500)
        pack.read([(77, [memoryview(into)])])
        assert bytes(into) == part[base + 77 : base + 577]
    assert any(memory.moved for memory in m.memory.values())


def flipped(data: bytes, every: int = 50) -> bytes:
    out = bytearray(data)
    for at in range(0, len(out), every):
        out[at] ^= 1 << at % 8
    return bytes(out)


@pytest.mark.parametrize("shape", ["4 + 2", "2 + 3", "three copies", "6 + 2 on 9 hosts"])
def test_a_block_that_is_not_what_was_written_is_had_without_whoever_damaged_it(shape: str) -> None:
    """All pairs of a lost host and of damaged ones, as many in all as there is parity; the reader knows what is right."""
    m = made(shape)
    for lost in m.parts:
        if not m.parts[lost]:
            continue
        for damaged in itertools.combinations(sorted(m.parts.keys() - {lost}), m.group.parity - 1):
            memory = {n: Memory(x.part, x.parity) for n, x in m.memory.items()}
            for name in damaged:
                memory[name] = Memory(flipped(memory[name].part), flipped(memory[name].parity))
            stripes = Made(m.group, m.parts, memory).stripes(m.parts.keys() - {lost})
            into = bytearray(min(300, len(m.parts[lost])))
            pack = SharedPack(len(m.parts[lost]), lost, 0, stripes, None)
            ways = [w for w in pack.otherwise(0, memoryview(into)) if bytes(into) == m.parts[lost][: len(into)]]
            assert ways, f"{lost} cannot be had while {damaged} are damaged"


def test_more_damage_than_parity_is_not_made_up() -> None:
    m = made("3 + 1")
    memory = {n: Memory(flipped(x.part), flipped(x.parity)) if n == "h1" else x for n, x in m.memory.items()}
    stripes, into = Made(m.group, m.parts, memory).stripes(m.parts.keys() - {"h0"}), bytearray(len(m.parts["h0"]))
    pack = SharedPack(len(into), "h0", 0, stripes, None)
    assert all(bytes(into) != m.parts["h0"] for _ in pack.otherwise(0, memoryview(into)))


# The choice.


def inventories(job: Job) -> list[Inventory]:
    return [i for n in job.up() if (i := job.nodes[n].ward.inventory(job.generation + 1)) is not None]


def had(job: Job) -> Key | None:
    """The newest step that is chosen; every byte of it, and of an older one that may be chosen, is decoded and compared."""
    choice = choose(inventories(job))
    guard, _ = Guard.resume(job.generation + 1, Placement(()), inventories(job))
    assert {c.key for c in choice.steps} == guard.held(), "the next life would not hold on to what was chosen"
    for candidate in choice.steps:
        for group in candidate.placement.groups:
            stripes = Stripes(group, {n: share(job, candidate.key, candidate.placement, n) for n in job.up()})
            for host in group.hosts:
                if host.name in candidate.parts:
                    assert job.nodes[host.name].part(candidate.key) == content(candidate.key, host)
                else:
                    into = bytearray(host.nbytes)
                    stripes.read(host.name, [(0, [memoryview(into)])])
                    assert bytes(into) == content(candidate.key, host)
    assert all(why for _, why in choice.missed)
    return choice.steps[0].key if choice.steps else None


def share(job: Job, key: Key, placement: Placement, name: str) -> Share:
    part, parity = job.nodes[name].part(key), job.nodes[name].parity(key, placement)
    memory = Memory(part or b"", parity or b"")
    return Share(lambda: memory, part is not None, parity is not None)


@pytest.mark.parametrize("how", ["killed", "partitioned"])
@pytest.mark.parametrize("shape", guards.SHAPES)
def test_what_is_chosen_can_be_had_whoever_is_lost_at_any_time(shape: str, how: str) -> None:
    """After any transition of the protocol, and never an older step than the one last announced."""
    total, tried = guards.run(shape, 10**6)[1], 0
    for at in range(0, total, 3):
        for lost in guards.victims(guards.made(shape), pairs=at % 2 == 0):
            job, _ = guards.run(shape, at)
            if not job.bearable(lost):
                continue
            tried += job.announced is not None
            for name in lost:
                if how == "killed":
                    job.kill(name)
                else:
                    job.nodes[name].reachable = False
            found = had(job)
            assert job.announced is None or (found is not None and found >= job.announced)
    assert tried > total // 9


def recoveries(seeds: Collection[int]) -> int:
    """Runs some schedules; how many left a step that can be had."""
    found = 0
    for seed in seeds:
        schedule = guards.Schedule(seed)
        for _ in range(30):
            schedule.step()
        key = had(schedule.job)
        assert schedule.job.announced is None or (key is not None and key >= schedule.job.announced)
        found += key is not None
    return found


def test_random_schedules_recover() -> None:
    assert recoveries(range(150)) > 100


def four(redundancy: ErasureCode | Replicas, key: Key, hosts: int = 4) -> tuple[Placement, dict[str, Inventory]]:
    placement = place([Host(f"h{n}", f"h{n}", 10) for n in range(hosts)], redundancy)
    area = Area(key, placement)
    return placement, {f"h{n}": Inventory(f"h{n}", {key: placement}, (area, None)) for n in range(hosts)}


def test_why_a_step_cannot_be_had() -> None:
    _, inventory = four(ErasureCode(2, 2), KEY)
    left = [inventory["h3"]]
    choice = choose(left)
    assert choice.steps == ()
    [(key, why)] = choice.missed
    assert key == KEY and "3 of a group of 4 hosts, of which any 2 may be missing" in why and "gone: h0, h1, h2" in why


def test_a_spare_that_holds_nothing_is_no_hindrance() -> None:
    placement, inventory = four(ErasureCode(2, 2), KEY)
    spare = Inventory("new", {}, (None, None))
    choice = choose([inventory["h1"], inventory["h2"], spare])
    [step] = choice.steps
    assert (step.key, step.placement, step.lost) == (KEY, placement, {"h0", "h3"})
    assert step.parity == {"h1", "h2"}


def test_a_step_that_some_host_never_had_is_not_chosen_and_one_that_was_damaged_counts_as_lost() -> None:
    _, inventory = four(ErasureCode(2, 2), KEY)
    came_late = Inventory("h0", {}, (None, None))
    assert choose([came_late, *[inventory[n] for n in ("h1", "h2")]]).steps == ()
    damaged = Inventory("h0", inventory["h0"].whole, inventory["h0"].areas, frozenset({KEY}))
    [step] = choose([damaged, *[inventory[n] for n in ("h1", "h2", "h3")]]).steps
    assert step.lost == {"h0"} and "h0" not in step.parity


def test_without_redundancy_a_step_needs_all_of_its_hosts() -> None:
    placement = Placement((Group(tuple(Host(f"h{n}", f"h{n}", 10) for n in range(2)), 1, 0),))
    both = [Inventory(f"h{n}", {KEY: placement}, (None, None)) for n in range(2)]
    [step] = choose(both).steps
    assert step.key == KEY and not step.lost
    choice = choose(both[:1])
    assert not choice.steps and "none of which may be missing" in choice.missed[0][1]
