"""The rules by which steps are protected, one at a time."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pytest

from ckpt.config import ErasureCode
from ckpt.keeper.groups import Host, Placement, place
from ckpt.keeper.guard import (
    Abandon,
    Announce,
    Area,
    Decision,
    Fold,
    Forget,
    Guard,
    Inventory,
    Mark,
    Release,
    Start,
    Ward,
)
from ckpt.keeper.lead import Key


def placement(names: str = "abcd", parity: int = 1) -> Placement:
    """Groups of two data chunks and so many of parity."""
    return place([Host(n, n, 640) for n in names], ErasureCode(2, parity))


def life(
    generation: int = 1, names: str = "abcd", held: Collection[Inventory] | None = None
) -> tuple[Guard, list[Decision]]:
    return Guard.resume(generation, placement(names), [empty(n) for n in names] if held is None else held)


def empty(name: str) -> Inventory:
    return Inventory(name, {}, (None, None))


def holding(
    names: str,
    whole: Mapping[Key, Placement],
    first: Area | None = None,
    second: Area | None = None,
    spoiled: Collection[Key] = (),
) -> list[Inventory]:
    return [Inventory(n, whole, (first, second), frozenset(spoiled)) for n in names]


def marks(decisions: Sequence[Decision]) -> list[Mark]:
    return [d.mark for d in decisions if isinstance(d, Start)]


def encode(guard: Guard, decisions: Sequence[Decision]) -> list[Decision]:
    """All hosts do what they were told to; what is decided with the last of them."""
    out: list[Decision] = []
    for d in decisions:
        if isinstance(d, Start):
            for name in sorted(d.placement.groups[d.group].names):
                assert not out
                out = guard.encoded(name, d.mark)
    return out


ONE, TWO = placement("abcd"), placement("abcdef")


def test_a_step_from_complete_to_released() -> None:
    guard, out = life()
    assert out == [] and guard.held() == set()
    first = guard.complete((1, 0))
    assert first == [Start((1, 1), (1, 0), 0, ONE, 0)] and guard.held() == {(1, 0)}
    assert encode(guard, first) == [Announce((1, 0), ONE)]
    second = guard.complete((1, 1))
    assert second == [Start((1, 2), (1, 1), 1, ONE, 0)] and guard.held() == {(1, 0), (1, 1)}
    assert encode(guard, second) == [Announce((1, 1), ONE), Release((1, 0))] and guard.held() == {(1, 1)}
    assert guard.complete((1, 2)) == [Start((1, 3), (1, 2), 0, ONE, 0)]


def test_a_step_is_announced_when_every_host_of_every_group_has_it() -> None:
    guard, _ = life(names="abcdef")
    starts = guard.complete((1, 0))
    assert [(d.group, d.area) for d in starts if isinstance(d, Start)] == [(0, 0), (1, 0)]
    assert len(set(marks(starts))) == 2
    reports = [(n, d.mark) for d in starts if isinstance(d, Start) for n in sorted(d.placement.groups[d.group].names)]
    for name, mark in [*reports[1:], *reports[1:]]:
        assert guard.encoded(name, mark) == []
    assert guard.encoded(*reports[0]) == [Announce((1, 0), TWO)]


def test_reports_that_are_not_asked_for() -> None:
    """Of another attempt, of a host of another group, of nobody, and when nothing is encoded."""
    guard, _ = life(names="abcdef")
    assert guard.encoded("a", (1, 1)) == [] == guard.failed("a", (1, 1))
    first, second = marks(guard.complete((1, 0)))
    others = TWO.groups[1].names
    for name in [*others, "x"]:
        assert guard.encoded(name, first) == [] == guard.failed(name, first)
    for name in TWO.groups[0].names:
        assert guard.encoded(name, first) == [] and guard.encoded(name, (0, 1)) == [] == guard.encoded(name, second)
    assert guard.announced is None


def test_what_fails_begins_anew_under_another_mark() -> None:
    """What was reported before does not count, also if it arrives later; the other group goes on."""
    guard, _ = life(names="abcdef")
    first, second = marks(guard.complete((1, 0)))
    one, other = (sorted(g.names) for g in TWO.groups)
    for name in [*one[:2], *other]:
        guard.encoded(name, first if name in one else second)
    [again] = guard.failed(one[2], first)
    assert again == Start((1, 3), (1, 0), 0, TWO, 0)
    assert [guard.encoded(n, first) for n in one] == [[], [], []], "of the attempt before"
    assert [guard.encoded(n, (1, 3)) for n in one] == [[], [], [Announce((1, 0), TWO)]]


def test_a_newer_step_takes_the_place_of_one_that_fails() -> None:
    guard, _ = life()
    [mark] = marks(guard.complete((1, 0)))
    assert guard.complete((1, 1)) == [] and guard.complete((1, 2)) == [Release((1, 1))]
    assert guard.held() == {(1, 0), (1, 2)}
    assert guard.failed("b", mark) == [Abandon(mark, ONE, 0), Release((1, 0)), Start((1, 2), (1, 2), 0, ONE, 0)]
    assert guard.held() == {(1, 2)}


def test_the_newest_complete_step_comes_next() -> None:
    guard, _ = life()
    first = guard.complete((1, 0))
    for step in range(1, 5):
        guard.complete((1, step))
    assert encode(guard, first) == [Announce((1, 0), ONE), Start((1, 2), (1, 4), 1, ONE, 0)]


def test_steps_that_are_not_of_this_life_or_not_newer() -> None:
    guard, _ = life(generation=3)
    guard.complete((3, 5))
    for key in ((2, 9), (3, 5), (3, 4), (4, 0)):
        assert guard.complete(key) == [] and guard.held() == {(3, 5)}


def test_a_host_is_lost_while_a_step_is_encoded() -> None:
    """The announced step stays; what was not announced cannot be had any more."""
    guard, _ = life()
    encode(guard, guard.complete((1, 0)))
    [mark] = marks(guard.complete((1, 1)))
    guard.complete((1, 2))
    assert guard.lose("x") == [] and guard.missing() == {}
    out = guard.lose("b")
    assert out == [Abandon(mark, ONE, 0), Forget((1, 1), "gone with b"), Forget((1, 2), "gone with b")]
    assert guard.held() == {(1, 0)} and guard.missing() == {0: {"b"}}
    assert guard.encoded("a", mark) == [] and guard.complete((1, 3)) == [Forget((1, 3), "gone with b")]


def test_the_next_life_holds_the_announced_step_until_one_of_its_own_is() -> None:
    held = holding("acd", {(1, 0): ONE, (1, 1): ONE}, Area((1, 0), ONE))
    guard, out = life(2, "acd", held)
    assert out == [Forget((1, 1), "gone with b")] and guard.held() == {(1, 0)} and guard.missing() == {0: {"b"}}
    new = placement("acd")
    first = guard.complete((2, 1))
    assert first == [Start((2, 1), (2, 1), 1, new, 0)]
    assert encode(guard, first) == [Announce((2, 1), new), Release((1, 0))]


def test_a_step_that_is_encoded_only_here_and_there_is_not_held_on_to() -> None:
    """Two of three that are left have it: it might be rebuilt, but would not bear what the announced step bears."""
    whole = {(1, 0): ONE, (1, 1): ONE}
    held = holding("ac", whole, Area((1, 0), ONE), Area((1, 1), ONE)) + holding("d", whole, Area((1, 0), ONE))
    guard, out = life(2, "acd", held)
    assert guard.held() == {(1, 0)} and out == [Forget((1, 1), "gone with b")]
    guard, out = life(2, "acd", holding("acd", whole, Area((1, 0), ONE), Area((1, 1), ONE)))
    assert guard.held() == {(1, 1)} and guard.area == 1 and out == [Forget((1, 0), "gone with b")]


def test_a_complete_step_is_protected_after_a_restart_without_losses() -> None:
    whole = {(1, 0): ONE, (1, 1): ONE, (1, 2): ONE}
    guard, out = life(2, "abcd", holding("abcd", whole, Area((1, 0), ONE)))
    assert out == [Release((1, 1)), Start((2, 1), (1, 2), 1, ONE, 0)] and guard.held() == {(1, 0), (1, 2)}
    assert encode(guard, out) == [Announce((1, 2), ONE), Release((1, 0))]


def test_more_hosts_lost_than_there_is_parity() -> None:
    guard, out = life(2, "cd", holding("cd", {(1, 0): ONE}, Area((1, 0), ONE)))
    assert guard.announced is None and out == [Forget((1, 0), "gone with a, b")]


def test_a_part_that_is_spoiled_is_one_that_is_lost() -> None:
    whole, area = {(1, 0): ONE}, Area((1, 0), ONE)
    bad = holding("b", whole, area, spoiled=[(1, 0)])
    guard, _ = life(2, "abcd", holding("acd", whole, area) + bad)
    assert guard.announced is not None and guard.announced.key == (1, 0)
    two = bad + holding("a", whole, area, spoiled=[(1, 0)])
    guard, _ = life(2, "abcd", holding("cd", whole, area) + two)
    assert guard.announced is None


def test_a_host_of_the_new_life_that_does_not_answer() -> None:
    guard, _ = life(2, "abcd", [empty(n) for n in "abc"])
    assert guard.complete((2, 0)) == [Forget((2, 0), "gone with d")]


def test_a_host_that_was_out_of_reach_is_counted_on_again() -> None:
    """What was not announced went with it; what is complete from now on is protected."""
    guard, _ = life()
    guard.complete((1, 0))
    guard.lose("b")
    assert guard.held() == set() and guard.complete((1, 1)) == [Forget((1, 1), "gone with b")]
    guard.back("b")
    first = guard.complete((1, 2))
    assert first == [Start((1, 2), (1, 2), 0, ONE, 0)] and encode(guard, first) == [Announce((1, 2), ONE)]


def test_a_step_with_a_damaged_part_is_not_protected() -> None:
    """Encoding it would protect the damage; once it is announced it is one part that is lost, and can be rebuilt."""
    guard, _ = life()
    encode(guard, guard.complete((1, 0)))
    [mark] = marks(guard.complete((1, 1)))
    guard.complete((1, 2))
    assert guard.spoil("c", (1, 0)) == [] == guard.spoil("c", (1, 9))
    out = guard.spoil("c", (1, 1))
    assert out == [
        Abandon(mark, ONE, 0), Forget((1, 1), "its part on c is damaged"), Start((1, 3), (1, 2), 1, ONE, 0)
    ]  # fmt: skip
    guard.complete((1, 3))
    assert guard.spoil("c", (1, 3)) == [Forget((1, 3), "its part on c is damaged")]
    assert guard.held() == {(1, 0), (1, 2)}


def test_a_life_that_another_seat_led_before_goes_on_above_its_marks() -> None:
    ward, _ = started((1, 4))
    ward.pin()
    assert ward.fence == (1, 5) and ward.fold((1, 4), 0, 0) is Fold.NEVER
    assert not ward.start(Start((1, 5), (1, 1), 1, ONE, 0)) and ward.tell() == Inventory("a", {}, (None, None))
    guard, _ = Guard.resume(1, ONE, holding("abcd", {}, None), ward.fence[1])
    assert marks(guard.complete((1, 1))) == [(1, 6)]


def test_one_host_alone() -> None:
    alone = placement("a")
    guard, _ = life(1, "a")
    ward = Ward("a")
    [start] = guard.complete((1, 0))
    assert isinstance(start, Start) and ward.start(start) and ward.encoded(start.mark)
    assert guard.encoded("a", start.mark) == [Announce((1, 0), alone)]


# A host.


def started(
    mark: Mark = (1, 1), key: Key = (1, 0), area: int = 0, ward: Ward | None = None
) -> tuple[Ward, list[tuple[int, int]]]:
    """Host a, told to encode a step; the chunks that it waits for."""
    ward = ward or Ward("a")
    assert ward.start(Start(mark, key, area, ONE, 0))
    [parity] = ONE.groups[0].shares["a"].parity
    return ward, [(parity.stripe, number) for number in range(len(parity.sources))]


def test_every_chunk_is_folded_once() -> None:
    ward, chunks = started()
    for chunk in chunks:
        assert not ward.encoded((1, 1)) and ward.fold((1, 1), *chunk) is Fold.NOW
        assert ward.fold((1, 1), *chunk) is Fold.NEVER and not ward.encoded((1, 1))
        ward.folded((1, 1), *chunk)
        assert ward.fold((1, 1), *chunk) is Fold.NEVER
    assert ward.encoded((1, 1)) and ward.fold((1, 1), 99, 0) is Fold.NEVER


def test_chunks_before_and_after_their_time() -> None:
    ward = Ward("a")
    assert ward.fold((1, 1), 0, 0) is Fold.LATER
    ward, chunks = started(ward=ward)
    assert ward.fold((1, 2), *chunks[0]) is Fold.LATER
    started((1, 2), ward=ward)
    assert ward.fold((1, 1), *chunks[0]) is Fold.NEVER and ward.fold((1, 2), *chunks[0]) is Fold.NOW


def test_orders_and_chunks_of_an_earlier_life() -> None:
    ward, chunks = started()
    assert ward.fold((1, 1), *chunks[0]) is Fold.NOW
    assert ward.inventory(2) == Inventory("a", {}, (None, None))
    assert ward.fold((1, 1), *chunks[1]) is Fold.NEVER and not ward.start(Start((1, 7), (1, 1), 1, ONE, 0))
    assert ward.inventory(1) is None and ward.inventory(2) == Inventory("a", {}, (None, None)), "asked twice"
    ward, _ = started((2, 1), ward=ward)
    assert ward.inventory(2) is None
    assert not ward.start(Start((2, 1), (1, 0), 0, ONE, 0)), "an order that comes twice"


def test_an_inventory_tells_only_of_what_is_there_in_full() -> None:
    ward, chunks = started()
    ward.hold((1, 0), ONE)
    for chunk in chunks:
        assert ward.areas[0] is not None and not ward.areas[0].encoded
        ward.fold((1, 1), *chunk)
        ward.folded((1, 1), *chunk)
    started((1, 2), (1, 1), 1, ward)
    ward.hold((1, 1), ONE)
    ward.spoil((1, 0))
    assert ward.inventory(2) == Inventory(
        "a", {(1, 0): ONE, (1, 1): ONE}, (Area((1, 0), ONE), None), frozenset({(1, 0)})
    )
    ward.drop((1, 0))
    assert ward.inventory(3) == Inventory("a", {(1, 1): ONE}, (Area((1, 0), ONE), None))


@pytest.mark.parametrize("end", ["broken", "abandoned"])
def test_what_is_interrupted_is_of_no_use(end: str) -> None:
    ward, chunks = started()
    assert ward.fold((1, 1), *chunks[0]) is Fold.NOW
    if end == "broken":
        assert ward.broken((1, 1)) and not ward.broken((1, 1))
    else:
        ward.abandon((1, 1))
    ward.folded((1, 1), *chunks[0])
    assert ward.fold((1, 1), *chunks[1]) is Fold.NEVER and not ward.encoded((1, 1))
    ward, chunks = started((1, 2), ward=ward)
    assert all(ward.fold((1, 2), *c) is Fold.NOW for c in chunks), "from zero"


def test_what_is_encoded_is_neither_broken_nor_abandoned() -> None:
    ward, chunks = started()
    for chunk in chunks:
        ward.fold((1, 1), *chunk)
        ward.folded((1, 1), *chunk)
    ward.abandon((1, 1))
    assert not ward.broken((1, 1)) and ward.encoded((1, 1))


def test_host_without_anything_to_fold() -> None:
    nothing = place([Host(n, n, 0) for n in "abcd"], ErasureCode(2, 2))
    ward = Ward("a")
    order: dict[str, Any] = {"mark": (1, 1), "key": (1, 0), "area": 1, "placement": nothing, "group": 0}
    assert ward.start(Start(**order)) and ward.encoded((1, 1))
