"""What a restarting job makes of what keepers say: whom it waits for, whose secret it takes, and what it does not believe."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from ckpt.collective import Solo
from ckpt.config import ErasureCode
from ckpt.errors import DeadlineError, PeerError
from ckpt.keeper.groups import Host, place
from ckpt.keeper.guard import Area, Inventory
from ckpt.keeper.lead import Key
from ckpt.keeper.member import _introduce
from ckpt.keeper.protocol import Frame, frame
from ckpt.keeper.recall import Recalled, _Asking, recall
from ckpt.keeper.wire import Holding, Layout, encode_holding

KEY, NEWER = (2, 9), (2, 10)
NAMES = [f"h{n}#0{n}" for n in range(4)]
PLACEMENTS = {n: place([Host(name, name, 100) for name in NAMES], ErasureCode(n, 4 - n)) for n in (1, 2, 3)}


def answer(n: int, key: Key = KEY, *, whole: Sequence[Key] = (), needed: int = 2) -> Frame:
    """Of a keeper that has its part, and parity, of a protected step, and its part of `whole`; of which all hosts but
    `needed` may be lost."""
    placement = PLACEMENTS[needed]
    layout = Layout(placement, tuple((n, 0, 100) for n in NAMES))
    inventory = Inventory(NAMES[n], dict.fromkeys([key, *whole], placement), (Area(key, placement), None))
    layouts = dict.fromkeys([key, *whole], layout)
    return frame(
        "answer", holding=encode_holding(Holding(f"h{n}", inventory, dict.fromkeys(layouts, 0), layouts)), held=[]
    )


def nothing(name: str, held: list[Any] | None = None) -> Frame:
    """Of one that knows of no protected step."""
    holding = Holding(name, Inventory(f"{name}#aa", {}, (None, None)))
    return frame("answer", holding=encode_holding(holding), held=held or [])


class Other:
    """One without trainers. `answers` nothing: it is gone, and refuses; `when`: it is silent until then."""

    def __init__(self, answers: Frame | None = None, when: threading.Event | None = None) -> None:
        self.answers, self.when, self.asked = answers, when, 0

    def ask(self, patience: float, wanted: Callable[[], bool]) -> Frame:
        self.asked += 1
        if self.when is not None and not self.when.wait(patience):
            raise DeadlineError("it says nothing")
        if self.answers is None or not wanted():
            raise PeerError("no keeper there")
        return self.answers


def recalled(mine: Frame | None, newest: int = KEY[0], **others: Other) -> Recalled:
    return recall(Solo(), lambda: mine, others, lambda host, *told: others[host].ask(*told), lambda: newest)


@pytest.fixture
def never() -> Iterator[threading.Event]:
    """What a dead host waits for: its packets are lost."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """So long that whoever waits for dead hosts fails by the test's own deadline."""
    monkeypatch.setattr("ckpt.keeper.recall._SOON", 1e4)
    monkeypatch.setattr("ckpt.keeper.recall._LATE", 1e4)


@pytest.mark.usefixtures("patience")
def test_dead_hosts_are_not_waited_for_where_no_newer_step_can_have_been_announced(never: threading.Event) -> None:
    [step] = recalled(answer(0, needed=1), h1=Other(when=never), h2=Other(when=never), h3=Other(when=never)).steps
    assert (step.key, step.parts, step.parity, step.lost) == (KEY, {NAMES[0]}, {NAMES[0]}, set(NAMES[1:]))


def test_hosts_without_trainers_are_asked() -> None:
    [step] = recalled(answer(0), h1=Other(answer(1)), h2=Other(), h3=Other()).steps
    assert (step.key, step.parts, step.parity) == (KEY, {NAMES[0], NAMES[1]}, {NAMES[0], NAMES[1]})
    assert step.lost == {NAMES[2], NAMES[3]} and step.hosts == {NAMES[0]: "h0", NAMES[1]: "h1"}


@pytest.mark.usefixtures("patience")
def test_a_newer_step_that_one_of_them_has_not_encoded_was_not_announced(never: threading.Event) -> None:
    silent = {name: Other(when=never) for name in ("h1", "h2", "h3")}
    found = recalled(answer(0, needed=1, whole=[NEWER]), **silent)
    assert [s.key for s in found.steps] == [KEY] and [key for key, _ in found.missed] == [NEWER]


def _late(mine: Frame, newest: int, others: dict[str, Frame]) -> Recalled:
    """What is chosen where hosts answer only once the rank has begun to wait for them longer."""
    when, waited = threading.Event(), list[float]()
    wait = _Asking.wait

    def waits(asking: _Asking, patience: float) -> tuple[list[Frame], bool]:
        waited.append(patience)
        if len(waited) > 1:
            when.set()
        return wait(asking, patience)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Asking, "wait", waits)
        found = recalled(mine, newest, **{host: Other(told, when) for host, told in others.items()})
    assert len(waited) > 1, "nobody waited"
    return found


def test_a_step_that_may_have_been_announced_is_waited_for() -> None:
    """Both that answer have it encoded, and so may those that do not; it cannot be had without one of them."""
    found = _late(
        answer(0, NEWER, needed=3), KEY[0], {"h1": answer(1, NEWER, needed=3), "h2": answer(2, NEWER, needed=3)}
    )
    assert [s.key for s in found.steps] == [NEWER]


def test_it_is_waited_for_also_where_an_older_step_can_be_had() -> None:
    def both(n: int) -> Frame:
        areas = Area(KEY, PLACEMENTS[1]), Area(NEWER, PLACEMENTS[3])
        whole = {a.key: a.placement for a in areas}
        layouts = {key: Layout(placed, tuple((name, 0, 100) for name in NAMES)) for key, placed in whole.items()}
        holding = Holding(f"h{n}", Inventory(NAMES[n], whole, areas), {KEY: 0, NEWER: 1}, layouts)
        return frame("answer", holding=encode_holding(holding), held=[])

    assert [s.key for s in recalled(both(0), h1=Other(), h2=Other()).steps] == [KEY]
    found = _late(both(0), KEY[0], {"h1": both(1), "h2": both(2)})
    assert found.steps[0].key == NEWER


def test_who_may_have_been_in_a_newer_life_is_waited_for() -> None:
    """A host that was cut off goes on from its own life, which it knows no newer one than; the others went on without it."""
    mine = frame("answer", holding=nothing("h0").head["holding"], held=[[1, 5, ["h0"]]])
    found = _late(mine, KEY[0], {"h1": answer(1), "h2": answer(2)})
    assert found.steps[0].key == KEY


def test_where_there_is_nothing_without_them_hosts_are_waited_for() -> None:
    found = _late(answer(0), KEY[0], {"h1": answer(1)})
    assert [s.key for s in found.steps] == [KEY]


def test_who_refuses_is_asked_again() -> None:
    hosts = {"h1": Other(), "h2": Other(), "h3": Other()}
    assert not recalled(answer(0), **hosts).steps and [h.asked for h in hosts.values()] == [3, 3, 3]


def test_who_is_reached_too_late_is_asked_for_nothing(never: threading.Event) -> None:
    """Pinned in a life that has begun it would stay as it is for ever."""
    host = Other(answer(2), never)
    asking = _Asking(["h2"], lambda _, *told: host.ask(*told))
    asking.wait(0.0)
    asking.over = True
    never.set()
    assert asking.wait(60.0) == ([], True)


def test_what_cannot_be_had_is_told_with_the_hosts() -> None:
    found = recalled(answer(0), h1=Other(), h2=Other(), h3=Other())
    assert not found.steps
    [(key, why)] = found.missed
    assert key == KEY and "3 of a group of 4 hosts" in why and all(n in why for n in NAMES[1:])


def test_an_answer_that_makes_no_sense_is_none() -> None:
    odd = [
        frame("answer", holding={"host": "x"}, held=[]),
        frame("answer", holding=answer(2).head["holding"], held=[[1]]),
    ]
    for bad in odd:
        found = recalled(answer(0), h1=Other(answer(1)), h2=Other(bad), h3=Other())
        assert [s.parts for s in found.steps] == [{NAMES[0], NAMES[1]}]


def test_a_step_that_nobody_protects_needs_all_of_its_hosts() -> None:
    held = [[1, 5, ["a", "b", "b"]]]
    found = recalled(nothing("a", held), b=Other(nothing("b", held)))
    [step] = found.steps
    assert (step.key, step.lost) == ((1, 5), frozenset()) and [r[0] for r in step.layout.ranks] == [
        "a#aa",
        "b#aa",
        "b#aa",
    ]
    found = recalled(nothing("a", held), b=Other())
    assert not found.steps and "gone: b" in found.missed[0][1]


def introduced(*told: list[Any]) -> Any:
    return json.loads(_introduce([json.dumps(t).encode() for t in told]))


def test_the_secret_is_that_of_the_keepers_with_the_newest_step() -> None:
    """A spare comes first, and one that was away: neither splits the job."""
    spare = ["s", "", [-1, -1], {}, -1]
    away = ["a", "old", [1, 7], {"a": ["x", 1], "b": ["gone", 2]}, 1]
    b, c = ["b", "new", [2, 3], {"b": ["y", 3]}, 2], ["c", "new", [2, 3], {"b": ["y", 3], "d": ["z", 4]}, 2]
    ranks, secret, known, generation = introduced(spare, away, b, c)
    assert ranks == {"0": "s", "1": "a", "2": "b", "3": "c"} and secret == "new" and generation == 2
    assert known == {"a": ["x", 1], "b": ["y", 3], "d": ["z", 4]}
    assert len(introduced(spare)[1]) == 64
