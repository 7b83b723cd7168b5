"""Nothing that was announced is lost with as many hosts as a group has parity: in any order of events, by decoding."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Collection, Sequence

import pytest
from guarded import Job

from ckpt.config import ErasureCode, Replicas
from ckpt.keeper.groups import Host

Act = Callable[[], None]


def hosts(count: int, racks: int = 0) -> list[Host]:
    return [Host(f"h{n}", f"rack {n % racks}" if racks else f"h{n}", (24, 17, 30)[n % 3]) for n in range(count)]


# What may happen next.


def told(job: Job) -> list[Act]:
    """Orders that may arrive, also those of a seat that is gone."""
    return [
        lambda s=seat, n=name: job.told(s, n)
        for seat in job.seats.values()
        for name, orders in seat.orders.items()
        if orders and name in job.nodes and job.nodes[name].reachable
    ]


def heard(job: Job) -> list[Act]:
    """Reports that may arrive, at every seat whose host is alive and reachable, or alone with itself."""
    return [
        lambda s=seat, n=name: job.heard(s, n)
        for seat in job.seats.values()
        if seat.host in job.nodes
        for name, reports in seat.reports.items()
        if reports and (job.nodes[seat.host].reachable or name == seat.host)
    ]


def sends(job: Job) -> list[Act]:
    return [lambda: job.send(job.sends.popleft())] if job.sends else []


def arrives(job: Job, at: int = 0, whole: bool = True, again: bool = False) -> None:
    """A chunk arrives, or a part of it; `again`: it is sent once more."""
    message = job.flying[at]
    del job.flying[at]
    if not job.arrive(message, whole) or again:
        job.flying.append(message)


def flights(job: Job) -> list[Act]:
    return [lambda: arrives(job)] if job.flying else []


def training(job: Job) -> list[Act]:
    """The hosts of the present life go step by step, none more than two ahead."""
    nodes = [node for node in job.nodes.values() if node.life == job.generation]
    slowest = min((node.at for node in nodes), default=0)
    return [lambda n=node: job.advance(n) for node in nodes if node.at <= slowest + 1 and not node.writing]


def seals(job: Job) -> list[Act]:
    return [lambda n=node, s=step: job.seal(n, s) for node in job.nodes.values() for step in node.writing]


# A time without trouble.


def settle(job: Job, watched: Callable[[], None], until: Callable[[], bool], trains: bool = True) -> None:
    """Orders and reports at once, and all else in turn, so that training is ahead of what is encoded; until nothing more
    happens, or `until` holds."""
    for turn in range(5000):
        if until():
            return
        kinds = [flights, sends, lambda job: seals(job) or (training(job) if trains else [])]
        found = told(job) or heard(job) or next((acts for n in range(3) if (acts := kinds[(turn + n) % 3](job))), None)
        if not found:
            return
        found[0]()
        watched()
    raise AssertionError("this never ends")


def goes_on(job: Job, survivors: Sequence[str], watched: Callable[[], None]) -> None:
    """What is left of a job is restarted, and protects its steps again."""
    job.live(survivors)
    watched()
    life = job.generation
    settle(job, watched, lambda: job.announced is not None and job.announced[0] == life)
    assert job.announced is not None and job.announced[0] == life, "no step of the new life was announced"


SHAPES = {
    "4 hosts, 2 + 2": (4, ErasureCode(2, 2), 2),
    "6 hosts, two groups of 2 + 1": (6, ErasureCode(2, 1), 3),
    "3 hosts, replicas": (3, ErasureCode(6, 2), 2),
    "5 hosts, pairs": (5, Replicas(2), 2),
}


def made(shape: str) -> Job:
    count, redundancy, slots = SHAPES[shape]
    return Job(hosts(count), redundancy, slots)


def run(shape: str, transitions: int) -> tuple[Job, int]:
    """A job after so many transitions of a life without trouble, or all until three steps were announced; how many."""
    job, count = made(shape), [0]

    def watched() -> None:
        count[0] += 1

    settle(job, watched, lambda: count[0] >= transitions or len(job.history) == 3)
    return job, count[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_announced_one_after_another(shape: str) -> None:
    job = made(shape)
    settle(job, job.check, lambda: len(job.history) == 5)
    assert job.history == sorted(set(job.history)) and len(job.history) == 5
    areas = [s.area for s in job.started if s.group == 0]
    assert areas == [n % 2 for n in range(len(areas))], "the two areas take turns"


def victims(job: Job, pairs: bool) -> list[tuple[str, ...]]:
    """One host, or two: every role, the seat's among them."""
    names = sorted(job.nodes)
    return [(n,) for n in names] + (list(itertools.combinations(names, 2)) if pairs else [])


@pytest.mark.parametrize("how", ["killed", "partitioned", "killed and not noticed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_role_is_lost_after_any_transition(shape: str, how: str) -> None:
    """And then the job goes on with the hosts that are left, while late messages of the first life still arrive."""
    every = 6 if how != "killed" else 1 if shape.startswith("4") else 2
    total = run(shape, 10**6)[1]
    assert total > 100
    tried = 0
    for at in range(0, total, every):
        for lost in victims(made(shape), pairs=every == 1):
            job, _ = run(shape, at)
            job.check()
            if not job.bearable(lost):
                continue
            tried += 1
            for name in lost:
                if how == "partitioned":
                    job.nodes[name].reachable = False
                else:
                    job.kill(name)
            job.check()
            if how == "killed" and job.seat.host in job.nodes:
                for name in lost:
                    job.notice(name)
                job.check()
            goes_on(job, job.up(), job.check)
            if how == "partitioned":
                for name in lost:
                    job.nodes[name].reachable = True
                settle(job, job.check, lambda job=job: len(job.history) > 6)
                goes_on(job, job.up(), job.check)
    assert tried > total // every


@pytest.mark.parametrize("shape", SHAPES)
def test_trainers_that_restart_after_any_transition(shape: str) -> None:
    """All memory is there; a step that was complete is protected without another being made."""
    for at in range(0, run(shape, 10**6)[1], 3):
        job, _ = run(shape, at)
        whole = set.intersection(*({*n.ward.whole} for n in job.nodes.values()))
        job.live(sorted(job.nodes), seat=sorted(job.nodes)[at % len(job.nodes)])
        job.check()
        held = job.seat.guard.held()
        assert not whole or max(held) >= max(whole)
        settle(job, job.check, lambda: False, trains=False)
        assert not whole or (job.announced is not None and job.announced >= max(whole))


# Any order.


class Schedule:
    """Things that happen one after another, drawn by a seeded generator."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        shape = self.rng.choice(sorted(SHAPES))
        count, redundancy, slots = SHAPES[shape]
        self.job = Job(hosts(count), redundancy, self.rng.choice([2, slots, 3]))
        self.fresh = count
        self.trouble = self.rng.choice([0.0, 0.01, 0.03, 0.06])

    def step(self) -> None:
        rng, job = self.rng, self.job
        if rng.random() < self.trouble:
            self.misfortune()
        for _ in range(rng.choice([1, 1, 3, 10, 30])):
            kind = rng.random()
            if kind < 0.5 and job.flying:
                well = rng.random() > self.trouble
                arrives(job, rng.randrange(len(job.flying)), well, again=rng.random() < self.trouble)
            elif kind < 0.7 and job.sends:
                job.sends.rotate(-rng.randrange(len(job.sends)))
                job.send(job.sends.popleft())
            elif acts := [*told(job), *heard(job), *seals(job)] * (kind < 0.97) or training(job):
                rng.choice(acts)()

    def misfortune(self) -> None:
        rng, job = self.rng, self.job
        kind = rng.random()
        if kind < 0.35:
            name = rng.choice(sorted(job.nodes))
            if job.bearable([name]) and len(job.up()) > 2:
                if rng.random() < 0.5:
                    job.kill(name)
                else:
                    job.nodes[name].reachable = False
        elif kind < 0.5:
            for node in job.nodes.values():
                node.reachable = node.reachable or rng.random() < 0.5
            for name in sorted(job.seat.told & set(job.up())) if job.seat.host in job.up() else ():
                if job.nodes[name].ward.fence[0] == job.generation and rng.random() < 0.7:
                    job.back(name)
        elif kind < 0.75 and job.seat.host in job.up():
            for name in job.seat.names:
                if name not in job.up():
                    job.notice(name)
        else:
            self.restart()

    def restart(self) -> None:
        """On the hosts that can be reached, but for one now and then; now and then with a new one."""
        rng, job = self.rng, self.job
        names = job.up()
        if rng.random() < 0.3 and len(names) < 7:
            host = Host(f"h{self.fresh}", f"h{self.fresh}", 20)
            self.fresh += 1
            job.add(host)
            names = [*names, host.name]
        if rng.random() < 0.2 and len(names) > 2:
            names.remove(rng.choice(names))
        if rng.random() < 0.3:
            rng.shuffle(names)
        job.live(names, rng.choice(names))


def schedules(seeds: Collection[int]) -> int:
    """Runs some; how many steps were announced in all, before the last life."""
    announced = 0
    for seed in seeds:
        schedule = Schedule(seed)
        for _ in range(60):
            schedule.step()
            schedule.job.check()
        job = schedule.job
        assert job.bearable(())
        announced += len(job.history)
        goes_on(job, job.up(), job.check)
    return announced


@pytest.mark.parametrize("shape", SHAPES)
def test_a_host_that_is_out_of_reach_for_a_while(shape: str) -> None:
    """After any transition, noticed: nothing is announced without it, and with it everything goes on in the same life."""
    for at in range(0, run(shape, 10**6)[1], 4):
        job, _ = run(shape, at)
        name = sorted(job.nodes)[at // 4 % len(job.nodes)]
        if name == job.seat.host or job.nodes[name].ward.fence[0] != job.generation:
            continue
        job.nodes[name].reachable = False
        job.notice(name)
        settle(job, job.check, lambda: False, trains=False)
        before = len(job.history)
        job.nodes[name].reachable = True
        job.back(name)
        job.check()
        settle(job, job.check, lambda job=job, before=before: len(job.history) >= before + 2)
        assert len(job.history) >= before + 2 and job.generation == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_the_keeper_that_leads_is_replaced(shape: str) -> None:
    """After any transition, within the life: what was announced stays, and more is announced. Then hosts are lost."""
    tried = 0
    for at in range(0, run(shape, 10**6)[1], 3):
        job, _ = run(shape, at)
        if not job.bearable([job.seat.host]):
            continue
        tried += 1
        job.reseat()
        job.check()
        before = len(job.history)
        settle(job, job.check, lambda job=job, before=before: len(job.history) >= before + 2)
        assert len(job.history) >= before + 2 and job.generation == 1
        lost = next(n for n in sorted(job.nodes) if job.bearable([n]))
        job.kill(lost)
        goes_on(job, job.up(), job.check)
    assert tried > 30


def test_a_thousand_schedules() -> None:
    assert schedules(range(1000)) > 3000
