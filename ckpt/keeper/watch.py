"""The seat's part in protecting steps: drives `Guard` beside `Lead`, and gives the orders that follow.

    fence          a life begins, or goes on: say what you hold, and obey nothing of before
    lay            so the steps to come lie on the hosts; reserve what parity takes
    start, abandon an attempt at encoding a step begins or ends, for the hosts of one group
    announced      a step is protected
    lagging        protecting a step goes on anew, and why; to be passed on to the trainers

What the hosts say: `inventory` to a fence; `encoded`, `failed` and `folding` of an attempt; `spoiled` of a step.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ckpt.config import ErasureCode, Replicas
from ckpt.errors import CkptError, UsageError, to_wire
from ckpt.keeper import lead as leads
from ckpt.keeper.groups import Host, Placement, place
from ckpt.keeper.guard import Abandon, Announce, Decision, Forget, Guard, Mark, Start
from ckpt.keeper.lead import Key, Lead
from ckpt.keeper.protocol import Frame, frame, greet, receive, send
from ckpt.keeper.shield import host_of, key_of
from ckpt.keeper.wire import Holding, Layout, decode_holding, encode_layout

__all__ = ["Near", "Protected", "Watch", "fence_others"]

log = logging.getLogger("ckpt.keeper")
_AGAIN = 0.05  # seconds until an attempt that failed begins anew; twice that with each that fails, up to _LONGEST
_LONGEST = 5.0
_OTHERS = 0.5  # seconds in which the keepers of hosts that are in no life any more have to answer
_BEGINNING = "the life that begins"

Near = Mapping[str, tuple[str, int]]
"""Where keepers listen, by host."""


@dataclass(frozen=True)
class Protected:
    """What a life is to have: `hosts` by rank, bytes of each rank's part of a segment."""

    redundancy: ErasureCode | Replicas
    hosts: Mapping[int, str]
    extents: tuple[int, ...]


@dataclass(frozen=True)
class _Told:
    """What the keeper of a host answered to a fence."""

    holding: Holding
    domain: str
    number: int

    @property
    def name(self) -> str:
        return self.holding.inventory.host


@dataclass
class Watch:
    """order     gives an order to the keepers of these hosts, None: of all
    after     calls a function in the loop, some seconds from now
    others    has those of these hosts that can be reached fenced, and the answers given to a function, in the loop
    decided   carries out what the lead decides
    patience  seconds without a sign of life after which an attempt begins anew
    """

    lead: Lead
    order: Callable[[Frame, Collection[str] | None], None]
    after: Callable[[float, Callable[[], None]], None]
    others: Callable[[int, Near, Callable[[list[Frame]], None]], None]
    decided: Callable[[list[leads.Decision]], None]
    patience: float = 30.0
    clock: Callable[[], float] = time.monotonic
    guard: Guard | None = None
    _asked: Protected | None = None
    _told: dict[str, _Told] = field(default_factory=dict)
    _near: dict[str, tuple[str, int]] = field(default_factory=dict)
    _asking: bool = False
    _since: dict[Key, float] = field(default_factory=dict)  # when steps were complete
    _sign: float = 0.0
    _still: set[Key] = field(default_factory=set)  # held until a life has begun
    _failing: set[Mark] = field(default_factory=set)
    _failures: int = 0

    @property
    def beginning(self) -> bool:
        """Whether it is not known yet what the hosts of this life hold."""
        return self._asked is not None and self.guard is None

    def held(self) -> set[Key]:
        """The steps that no host may let go of."""
        return self.guard.held() if self.guard is not None else self._still

    def lost(self) -> list[str]:
        """The hosts that a life has lost sight of."""
        return sorted(map(host_of, self.guard.lost & self.guard.placement.names)) if self.guard is not None else []

    def hold_still(self) -> None:
        """A life is about to begin: what is in memory stays as it is until all its hosts have said what they hold."""
        done = (leads.State.COMPLETE, leads.State.DAMAGED)
        self._still = self.held() | self.lead.complete()
        for number, slot in self.lead.slots.items():
            if slot.state in done:
                self.lead.read(number, _BEGINNING)

    def begin(self, asked: Protected | None) -> None:
        """It has begun, to be protected as is `asked`."""
        for key in self.held():
            self.lead.done_reading(_reader(key), self.clock())
        self.guard, self._asked, self._asking = None, asked, False
        self._told.clear()
        self._since.clear()
        self._failing.clear()
        self._failures = 0
        if asked is None:
            self._done_beginning()
        else:
            self.order(frame("fence", generation=self.lead.generation), None)

    def _done_beginning(self) -> list[leads.Decision]:
        self._still = set()
        return self.lead.done_reading(_BEGINNING, self.clock())

    def came(self, host: str) -> None:
        """The keeper of a host is there, for the first time or again."""
        if self._asked is not None:
            self.order(frame("fence", generation=self.lead.generation), {host})

    def hear(self, event: Frame) -> list[leads.Decision]:
        """What a host says."""
        if self._asked is None:
            return []
        if event.kind == "inventory":
            return self._inventory(event)
        if self.guard is None:
            return []
        if event.kind == "folding":
            self._sign = self.clock()
        elif event.kind == "encoded":
            self._sign = self.clock()
            return self._do(self.guard.encoded(str(event["name"]), key_of(event["mark"])))
        elif event.kind == "failed":
            self._failed(str(event["name"]), key_of(event["mark"]), str(event["why"]))
        elif event.kind == "spoiled":
            key = key_of(event["key"])
            log.error("step %d is not whole any more: %s", key[1], event["why"])
            self.lead.damaged(key)
            return self._do(self.guard.spoil(str(event["name"]), key))
        return []

    def extend(self, extents: tuple[int, ...]) -> None:
        """The ranks have agreed on another plan: its parts have other sizes."""
        if self._asked is None or extents == self._asked.extents:
            return
        self._asked = Protected(self._asked.redundancy, self._asked.hosts, extents)
        if self.guard is not None:
            self._lay_anew()

    def complete(self, d: leads.Complete) -> list[leads.Decision]:
        """All ranks have sealed a step."""
        if self.guard is None:
            return []
        self._since[d.key] = self.clock()
        asked = self.guard.complete(d.key)
        if d.key in self.guard.held():
            self.lead.read(d.slot, _reader(d.key))
        return self._do(asked)

    def gone(self, host: str) -> list[leads.Decision]:
        """The keeper of a host does not answer any more."""
        told = self._told.get(host)
        if self.guard is None:
            self._told.pop(host, None)
        elif told is not None:
            return self._do(self.guard.lose(told.name))
        return []

    # A life begins, or a host joins it.

    def _inventory(self, event: Frame) -> list[leads.Decision]:
        told = _told(event)
        host, before = told.holding.host, self._told.get(told.holding.host)
        self._told[host] = told
        self._near |= {str(h): (str(a), int(p)) for h, (a, p) in event["near"].items()}
        assert self._asked is not None
        if self.guard is None:
            self._ask_others()
            return []
        self.guard.number = max(self.guard.number, told.number)
        if host not in self._asked.hosts.values():
            return []
        if before is not None and before.name == told.name:
            self.guard.back(told.name)
            self._lay(self.guard.placement, {host})
            under_way = self.guard.encoding.marks if self.guard.encoding is not None else []
            failed = [d for mark in list(under_way) for d in self.guard.failed(told.name, mark)]  # it is fenced off
            return self._do(failed)
        out = self._do(self.guard.lose(before.name)) if before is not None else []
        self._lay_anew()
        return out

    def _ask_others(self) -> None:
        """Once all hosts of the life have answered: those of earlier ones may hold something, too."""
        assert self._asked is not None
        mine = set(self._asked.hosts.values())
        if self._asking or mine - self._told.keys():
            return
        self._asking = True
        generation = self.lead.generation
        near = {host: address for host, address in self._near.items() if host not in mine}

        def answered(found: list[Frame]) -> None:
            if self._asking and self.guard is None and self.lead.generation == generation:
                self._asking = False
                self.decided(self._resume([_told(f) for f in found]))

        self.others(generation, near, answered)

    def _resume(self, others: list[_Told]) -> list[leads.Decision]:
        assert self._asked is not None
        if set(self._asked.hosts.values()) - self._told.keys():
            return []  # one is gone meanwhile
        placement = self._placed(None)
        if placement is None:
            return []
        everybody = [*self._told.values(), *others]
        number = max(t.number for t in everybody)
        inventories = [t.holding.inventory for t in everybody]
        self.guard, decisions = Guard.resume(self.lead.generation, placement, inventories, number)
        slots = {key: slot for t in everybody for key, slot in t.holding.slots.items()}
        for key in sorted(self.guard.held()):
            self.lead.adopt(key, slots[key])
            self.lead.read(slots[key], _reader(key))
        if self.guard.announced is not None and self.guard.missing():
            self.lead.damaged(self.guard.announced.key)  # it has to be rebuilt before anybody can read it
        self._lay(placement, None)
        return [*self._do(decisions), *self._done_beginning()]

    def _placed(self, before: Placement | None) -> Placement | None:
        """Groups of the hosts that are there. None, said to all, if there cannot be any."""
        assert self._asked is not None
        sizes: dict[str, int] = {}
        for rank, host in self._asked.hosts.items():
            sizes[host] = sizes.get(host, 0) + self._asked.extents[rank]
        hosts = [Host(self._told[h].name, self._told[h].domain, n) for h, n in sizes.items()]
        try:
            return place(hosts, self._asked.redundancy, before)
        except UsageError as e:
            log.error("no protection: %s", e)
            self.order(frame("lay", generation=self.lead.generation, error=list(to_wire(e))), None)
            self.decided(self._done_beginning())
            return None

    def _lay_anew(self) -> None:
        assert self.guard is not None
        placement = self._placed(self.guard.placement)
        if placement is not None:
            self.guard.placement = placement
            self._lay(placement, None)

    def _lay(self, placement: Placement, hosts: Collection[str] | None) -> None:
        assert self._asked is not None
        ends: dict[str, int] = {}
        ranks = []
        for rank, n in enumerate(self._asked.extents):
            name = self._told[self._asked.hosts[rank]].name
            ranks.append((name, ends.get(name, 0), n))
            ends[name] = ends.get(name, 0) + n
        layout = encode_layout(Layout(placement, tuple(ranks)))
        self.order(frame("lay", generation=self.lead.generation, layout=layout), hosts)

    # What the guard decides.

    def _do(self, decisions: list[Decision]) -> list[leads.Decision]:
        out: list[leads.Decision] = []
        now = self.clock()
        for d in decisions:
            if isinstance(d, Start):
                self._sign = now
                hosts = {host_of(name) for name in d.placement.groups[d.group].names}
                self.order(frame("start", mark=list(d.mark), key=list(d.key), area=d.area), hosts)
                self._look_after(d.mark)
            elif isinstance(d, Abandon):
                hosts = {host_of(name) for name in d.placement.groups[d.group].names}
                self.order(frame("abandon", mark=list(d.mark)), hosts)
            elif isinstance(d, Announce):
                self._failures = 0
                self._failing.clear()
                lag = now - self._since.get(d.key, now)
                self._since = {key: at for key, at in self._since.items() if key > d.key}
                self.order(frame("announced", generation=d.key[0], step=d.key[1], lag=lag), None)
            else:
                if isinstance(d, Forget):
                    log.warning("step %d is not in memory any more: %s", d.key[1], d.why)
                    self.lead.damaged(d.key)
                out += self.lead.done_reading(_reader(d.key), now)
        return out

    def _failed(self, name: str, mark: Mark, why: str) -> None:
        """An attempt failed: it begins anew after a moment, and each time after a longer one."""
        encoding = self.guard.encoding if self.guard is not None else None
        if encoding is None or mark not in encoding.marks or mark in self._failing:
            return
        self._failing.add(mark)
        generation = self.lead.generation
        wait = min(_LONGEST, _AGAIN * 2.0 ** min(self._failures, 10))
        self._failures += 1
        log.warning("step %d is not protected yet: %s", encoding.step.key[1], why)
        self.order(frame("lagging", step=encoding.step.key[1], why=why), None)

        def again() -> None:
            if self.guard is not None and self.lead.generation == generation:
                self.decided(self._do(self.guard.failed(name, mark)))

        self.after(wait, again)

    def _look_after(self, mark: Mark) -> None:
        """An attempt of which nobody says anything any more fails."""

        def look() -> None:
            encoding = self.guard.encoding if self.guard is not None else None
            if encoding is None or mark not in encoding.marks:
                return
            if self.clock() - self._sign < 1.5 * self.patience:
                self.after(self.patience / 2, look)
                return
            group = encoding.marks.index(mark)
            silent = sorted(encoding.step.placement.groups[group].names - encoding.done[group])
            if silent:
                hosts = ", ".join(host_of(n) for n in silent[:5])
                self._failed(silent[0], mark, f"{hosts}: no word for {self.clock() - self._sign:.0f} s")

        self.after(self.patience / 2, look)


def _reader(key: Key) -> str:
    return f"guard {key}"


def _told(event: Frame) -> _Told:
    return _Told(decode_holding(event["holding"]), str(event["domain"]), int(event["fence"][1]))


def fence_others(
    generation: int,
    near: Near,
    secret: bytes,
    later: Callable[[Callable[[], None]], None],
    then: Callable[[list[Frame]], None],
) -> None:
    """Fences keepers that are in no life any more, in threads; `then` gets, in the loop, what those said that answered."""
    answers: list[Frame] = []
    left = [len(near)]
    lock = threading.Lock()
    if not near:
        later(lambda: then([]))

    def ask(address: tuple[str, int]) -> None:
        found: list[Any] = []
        try:
            sock, line = greet(address, secret, _OTHERS)
            with sock:
                send(sock, frame("fence", id=0, generation=generation))
                answer = receive(sock, line)
                if answer.kind == "answer" and "holding" in answer.head:
                    found.append(answer)
        except (CkptError, OSError) as e:
            log.info("%s:%d does not answer: %s", *address, e)
        with lock:
            answers.extend(found)
            left[0] -= 1
            last = not left[0]
        if last:
            later(lambda: then(answers))

    for address in near.values():
        threading.Thread(target=ask, args=(address,), name="ckpt-fence", daemon=True).start()
