"""What a restarting job makes of what keepers say: whom it waits for, whose secret it takes, and what it does not believe."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ckpt.collective import Solo
from ckpt.config import ErasureCode
from ckpt.errors import PeerError
from ckpt.keeper.groups import Host, place
from ckpt.keeper.guard import Area, Inventory
from ckpt.keeper.member import _introduce
from ckpt.keeper.protocol import Frame, frame
from ckpt.keeper.recall import Recalled, recall
from ckpt.keeper.wire import Holding, Layout, encode_holding

KEY = (2, 9)
NAMES = [f"h{n}#0{n}" for n in range(4)]
PLACEMENT = place([Host(n, n, 100) for n in NAMES], ErasureCode(2, 2))
LAYOUT = Layout(PLACEMENT, tuple((n, 0, 100) for n in NAMES))


def answer(n: int) -> Frame:
    """Of a keeper that has its part, and parity, of a protected step."""
    inventory = Inventory(NAMES[n], {KEY: PLACEMENT}, (Area(KEY, PLACEMENT), None))
    return frame("answer", holding=encode_holding(Holding(f"h{n}", inventory, {KEY: 0}, {KEY: LAYOUT})), held=[])


def nothing(name: str, held: list[Any] | None = None) -> Frame:
    """Of one that knows of no protected step."""
    holding = Holding(name, Inventory(f"{name}#aa", {}, (None, None)))
    return frame("answer", holding=encode_holding(holding), held=held or [])


def recalled(mine: Frame | None, others: dict[str, Callable[[float], Frame]]) -> tuple[Recalled, list[float]]:
    """What is chosen, and how long hosts were waited for, each time they were asked."""
    waited: list[float] = []

    def ask(host: str, patience: float) -> Frame:
        waited.append(patience)
        return others[host](patience)

    return recall(Solo(), lambda: mine, others, ask), waited


def gone(patience: float) -> Frame:
    raise PeerError("no keeper there")


def slow(n: int) -> Callable[[float], Frame]:
    return lambda patience: answer(n) if patience > 1 else gone(patience)


def test_hosts_without_trainers_are_asked_and_dead_ones_not_waited_for() -> None:
    found, waited = recalled(answer(0), {"h1": lambda _: answer(1), "h2": gone, "h3": gone})
    [step] = found.steps
    assert (step.key, step.parts, step.parity) == (KEY, {NAMES[0], NAMES[1]}, {NAMES[0], NAMES[1]})
    assert step.lost == {NAMES[2], NAMES[3]} and step.hosts == {NAMES[0]: "h0", NAMES[1]: "h1"}
    assert len(waited) == 3 and max(waited) < 1


def test_who_is_slow_is_waited_for_where_all_depends_on_it() -> None:
    found, waited = recalled(answer(0), {"h1": slow(1), "h2": gone, "h3": gone})
    assert [s.key for s in found.steps] == [KEY] and len(waited) == 6 and max(waited) > 1


def test_what_cannot_be_had_is_told_with_the_hosts() -> None:
    found, _ = recalled(answer(0), {"h1": gone, "h2": gone, "h3": gone})
    assert not found.steps
    [(key, why)] = found.missed
    assert key == KEY and "3 of a group of 4 hosts" in why and all(n in why for n in NAMES[1:])


def test_an_answer_that_makes_no_sense_is_none() -> None:
    odd = [
        frame("answer", holding={"host": "x"}, held=[]),
        frame("answer", holding=answer(2).head["holding"], held=[[1]]),
    ]
    for bad in odd:
        found, _ = recalled(answer(0), {"h1": lambda _: answer(1), "h2": lambda _, bad=bad: bad, "h3": gone})  # type: ignore[misc]
        assert [s.parts for s in found.steps] == [{NAMES[0], NAMES[1]}]


def test_a_step_that_nobody_protects_needs_all_of_its_hosts() -> None:
    held = [[1, 5, ["a", "b", "b"]]]
    found, _ = recalled(nothing("a", held), {"b": lambda _: nothing("b", held)})
    [step] = found.steps
    assert (step.key, step.lost) == ((1, 5), frozenset()) and [r[0] for r in step.layout.ranks] == [
        "a#aa",
        "b#aa",
        "b#aa",
    ]
    found, _ = recalled(nothing("a", held), {"b": gone})
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
