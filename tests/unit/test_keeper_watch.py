"""What the seat does with what the hosts say of protection: by hand, without keepers and clocks."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from ckpt.config import ErasureCode, Every, Replicas
from ckpt.keeper import lead as leads
from ckpt.keeper import seat as seats
from ckpt.keeper.groups import Host, place
from ckpt.keeper.guard import Area, Inventory
from ckpt.keeper.lead import Key, Lead, State
from ckpt.keeper.protocol import Frame, frame
from ckpt.keeper.watch import Near, Protected, Watch
from ckpt.keeper.wire import Holding, decode_layout, encode_holding


class Seat:
    """Hosts h0 to h3, one rank each, that answer when they are told to."""

    def __init__(self, redundancy: Any = None, hosts: int = 4) -> None:
        self.now = 100.0
        self.orders: list[tuple[Frame, Collection[str] | None]] = []
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.asked: list[tuple[int, Near, Callable[[list[Frame]], None]]] = []
        self.lead = Lead(hosts, Every(1), None)
        self.hosts = [f"h{n}" for n in range(hosts)]
        self.redundancy = redundancy or ErasureCode(3, 1)
        self.watch = Watch(
            self.lead, lambda order, some: self.orders.append((order, some)),
            lambda seconds, call: self.timers.append((self.now + seconds, call)),
            lambda generation, near, then: self.asked.append((generation, near, then)), lambda decisions: None, 10.0,
            lambda: self.now,
        )  # fmt: skip

    def begin(self, generation: int = 1) -> None:
        self.watch.hold_still()
        self.lead.begin(generation, len(self.hosts), range(3), 0, self.now)
        by_rank = dict(enumerate(self.hosts))
        self.watch.begin(Protected(self.redundancy, by_rank, tuple(1000 for _ in self.hosts)))

    def said(
        self, host: str, *, holding: Holding | None = None, life: str = "a", domain: str = "", near: Any = None
    ) -> Frame:
        told = holding or Holding(host, Inventory(f"{host}#{life}", {}, (None, None)))
        return frame(
            "inventory", holding=encode_holding(told), fence=[self.lead.generation, 0], domain=domain or host,
            near=near or {},
        )  # fmt: skip

    def meet(self) -> None:
        for host in self.hosts:
            self.watch.hear(self.said(host))
        self.asked.pop()[2]([])

    def complete(self, step: int, slot: int = 0) -> None:
        self.lead.slots[slot].state, self.lead.slots[slot].key = State.COMPLETE, (self.lead.generation, step)
        self.watch.complete(leads.Complete((self.lead.generation, step), slot))

    def kinds(self, kind: str) -> list[Frame]:
        return [order for order, _ in self.orders if order.kind == kind]

    def wait(self, seconds: float) -> None:
        """Time passes, and timers go off."""
        self.now += seconds
        while due := [t for t in self.timers if t[0] <= self.now]:
            self.timers.remove(min(due, key=lambda t: t[0]))
            min(due, key=lambda t: t[0])[1]()

    def encoded(self, host: str, mark: Any) -> None:
        self.watch.hear(frame("encoded", name=f"{host}#a", mark=mark))


def test_a_step_is_announced_with_the_time_that_it_took() -> None:
    seat = Seat()
    seat.begin()
    assert [o.kind for o, _ in seat.orders] == ["fence"] and seat.watch.beginning
    seat.complete(0)
    assert not seat.kinds("start"), "nobody has said yet what he holds"
    seat.meet()
    [lay] = seat.kinds("lay")
    layout = decode_layout(lay["layout"])
    assert layout.ranks == tuple((f"h{n}#a", 0, 1000) for n in range(4)) and not seat.watch.beginning
    seat.complete(1, 1)
    [start] = seat.kinds("start")
    assert (start["key"], start["area"]) == ([1, 1], 0) and seat.orders[-1][1] == set(seat.hosts)
    seat.now += 3.0
    for host in seat.hosts:
        assert not seat.kinds("announced")
        seat.encoded(host, start["mark"])
    [told] = seat.kinds("announced")
    assert (told["generation"], told["step"], told["lag"]) == (1, 1, 3.0) and seat.watch.held() == {(1, 1)}


def test_nothing_is_let_go_of_until_it_is_known_what_there_is() -> None:
    """Of two complete steps the older one may be the one that is protected."""
    seat = Seat()
    for number, step in enumerate((0, 1)):
        seat.lead.adopt((1, step), number)
    seat.begin(2)
    assert [seat.lead.slots[n].state for n in (0, 1)] == [State.COMPLETE] * 2 and seat.watch.held() == {(1, 0), (1, 1)}
    for host in seat.hosts[:3]:
        seat.watch.hear(seat.said(host))
    assert not seat.asked and seat.lead.slots[0].state is State.COMPLETE
    seat.watch.hear(seat.said(seat.hosts[3]))
    seat.asked.pop()[2]([])
    assert seat.watch.held() == set() and seat.lead.slots[0].state is State.FREE, "nobody has any of it"


def test_hosts_of_an_earlier_life_count_as_far_as_they_answer() -> None:
    """The announced step is held on to; with one host gone it has to be rebuilt before anybody can read it."""
    for answers in (True, False):
        seat = Seat()
        seat.begin()
        seat.meet()
        assert seat.watch.guard is not None
        placement, key = seat.watch.guard.placement, (1, 7)
        held = {
            h: Holding(h, Inventory(f"{h}#a", {key: placement}, (Area(key, placement), None)), {key: 2})
            for h in seat.hosts
        }
        later = Seat(Replicas(2), hosts=3)
        later.begin(2)
        for host in later.hosts:
            later.watch.hear(later.said(host, holding=held[host], near={"h3": ["10.0.0.3", 5], "h0": ["10.0.0.1", 5]}))
        generation, near, then = later.asked.pop()
        assert generation == 2 and near == {"h3": ("10.0.0.3", 5)}
        then([later.said("h3", holding=held["h3"])] if answers else [])
        assert later.watch.held() == {key}
        slot = later.lead.slots[2]
        assert (slot.state, slot.key) == (State.COMPLETE if answers else State.DAMAGED, key) and slot.readers
        assert key not in later.lead.complete() or answers


def test_what_fails_begins_anew_later_and_later() -> None:
    seat = Seat()
    seat.begin()
    seat.meet()
    seat.complete(0)
    waits = []
    for number in range(9):
        mark = seat.kinds("start")[-1]["mark"]
        for host in ("h1", "h2"):  # the second one says nothing new
            seat.watch.hear(frame("failed", name=f"{host}#a", mark=mark, why="a wire"))
        before = seat.now
        while len(seat.kinds("start")) == number + 1:
            seat.wait(0.05)
        waits.append(seat.now - before)
        assert len(seat.kinds("start")) == number + 2 and len(seat.kinds("lagging")) == number + 1
    assert waits == sorted(waits) and waits[0] < 0.11 and 4.9 < waits[-1] < 5.2
    assert seat.kinds("lagging")[0].head == {"step": 0, "why": "a wire"}


def test_silence_ends_an_attempt_and_a_sign_of_life_does_not() -> None:
    seat = Seat()
    seat.begin()
    seat.meet()
    seat.complete(0)
    mark = seat.kinds("start")[0]["mark"]
    for host in ("h0", "h1", "h2"):
        seat.encoded(host, mark)
    for _ in range(20):
        seat.wait(5.0)
        seat.watch.hear(frame("folding", mark=mark))
    assert not seat.kinds("lagging")
    for _ in range(5):
        seat.wait(5.0)
    assert "h3: no word" in seat.kinds("lagging")[0]["why"] and len(seat.kinds("start")) == 2


def test_a_host_that_is_back_and_one_that_is_new() -> None:
    seat = Seat()
    seat.begin()
    seat.meet()
    seat.complete(0)
    seat.watch.gone("h2")
    assert seat.kinds("abandon") and seat.watch.lost() == ["h2"] and seat.watch.held() == set()
    seat.watch.came("h2")
    assert seat.orders[-1][0].kind == "fence" and seat.orders[-1][1] == {"h2"}
    seat.watch.hear(seat.said("h2"))
    assert seat.watch.lost() == [] and seat.orders[-1][0].kind == "lay" and seat.orders[-1][1] == {"h2"}
    seat.complete(1, 1)
    assert seat.kinds("start")[-1]["key"] == [1, 1]
    seat.watch.hear(seat.said("h2", life="b"))
    assert seat.orders[-1][0].kind == "lay" and seat.orders[-1][1] is None and seat.watch.lost() == []
    names = decode_layout(seat.kinds("lay")[-1]["layout"]).placement.names
    assert "h2#b" in names and "h2#a" not in names


def test_a_reconnected_host_does_not_leave_an_attempt_hanging() -> None:
    """Its fence was raised, so that it will never report what runs."""
    seat = Seat()
    seat.begin()
    seat.meet()
    seat.complete(0)
    seat.watch.hear(seat.said("h1"))
    first, second = seat.kinds("start")
    assert first["mark"] != second["mark"] and first["key"] == second["key"]


def test_damage_and_a_new_plan() -> None:
    seat = Seat()
    seat.begin()
    seat.meet()
    seat.complete(0)
    seat.watch.hear(frame("spoiled", name="h1#a", key=[1, 0], why="a bit"))
    assert seat.watch.held() == set() and seat.lead.slots[0].state is not State.COMPLETE
    seat.watch.extend((1000,) * 4)
    assert len(seat.kinds("lay")) == 1, "the same as before"
    seat.watch.extend((2000, 1000, 1000, 1000))
    assert {h.nbytes for g in decode_layout(seat.kinds("lay")[1]["layout"]).placement.groups for h in g.hosts} == {
        1000,
        2000,
    }


def test_groups_that_cannot_be_made_are_said_to_all() -> None:
    seat = Seat()
    seat.begin()
    for host in seat.hosts:
        seat.watch.hear(seat.said(host, domain="one rack"))
    seat.asked.pop()[2]([])
    [lay] = seat.kinds("lay")
    assert lay["error"][0] == "usage" and "one rack" in lay["error"][1]


def test_without_redundancy_nothing_happens() -> None:
    seat = Seat()
    seat.lead.adopt((1, 0), 0)
    seat.watch.hold_still()
    seat.lead.begin(2, 4, range(2), 0, 0.0)
    seat.watch.begin(None)
    seat.watch.came("h1")
    assert seat.orders == [] and not seat.lead.slots[0].readers and seat.watch.held() == set()
    key: Key = (2, 1)
    assert seat.watch.complete(leads.Complete(key, 1)) == [] == seat.watch.hear(seat.said("h1"))


def test_a_slot_of_an_earlier_life_is_never_granted() -> None:
    """The keeper that leads knows of it only from others; the trainers of this life have no such slot."""
    seat = Seat()
    seat.begin()
    seat.meet()
    assert seat.watch.guard is not None
    placement, key = seat.watch.guard.placement, (1, 7)
    later = Seat()
    later.begin(2)
    for host in later.hosts:
        held = Holding(host, Inventory(f"{host}#a", {key: placement}, (Area(key, placement), None)), {key: 9})
        later.watch.hear(later.said(host, holding=held))
    later.asked.pop()[2]([])
    assert later.lead.slots[9].state is State.COMPLETE and later.lead.slots[9].retired
    later.complete(0)
    mark = later.kinds("start")[0]["mark"]
    for host in later.hosts:
        later.watch.hear(frame("encoded", name=f"{host}#a", mark=mark))
    assert 9 not in later.lead.slots


def test_nothing_is_granted_before_it_is_known_what_hosts_hold() -> None:
    """A keeper that leads in the middle of a life knows of no slot what is in it; ranks are ready before hosts have told."""
    orders: list[Frame] = []
    asked: list[Callable[[list[Frame]], None]] = []
    seat = seats.Seat(
        lambda order, _: orders.append(order), lambda *_: None, lambda *_: None, lambda *job: asked.append(job[2]),
        lambda _: None, {},
    )  # fmt: skip
    hosts = [f"h{n}" for n in range(3)]
    placement = place([Host(f"{h}#a", h, 1000) for h in hosts], ErasureCode(2, 1))
    key = (1, 5)

    def said(host: str) -> Frame:
        held = Inventory(f"{host}#a", {key: placement}, (Area(key, placement), None))
        holding = Holding(host, held, {key: 0}) if host != "h0" else Holding(host, Inventory("h0#b", {}, (None, None)))
        return frame("inventory", holding=encode_holding(holding), fence=[1, 7], domain=host, near={})

    life = seats.Life(1, 3, "run", (), dict(enumerate(hosts)))
    seat.begin(life, Every(1), None, [0, 1, 2], 9, Protected(ErasureCode(2, 1), life.hosts, (1000,) * 3))
    for rank, host in enumerate(hosts):
        seat.hear(frame("ready", rank=rank, epoch=0))
        seat.hear(said(host))
    assert not [o for o in orders if o.kind == "grant"]
    asked[0]([])
    [grant] = [o for o in orders if o.kind == "grant"]
    assert grant["slot"] != 0 and grant["step"] >= 9
    assert seat.watch is not None and seat.watch.guard is not None and seat.watch.guard.number >= 7
    assert seat.watch.held() == {key}
