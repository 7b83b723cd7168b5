"""What keepers tell each other of protection comes out as it went in; what is none is refused."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.config import ErasureCode, Replicas
from ckpt.errors import FormatError
from ckpt.keeper.groups import Host, place
from ckpt.keeper.guard import Area, Inventory
from ckpt.keeper.wire import (
    Holding,
    Layout,
    decode_holding,
    decode_layout,
    decode_redundancy,
    encode_holding,
    encode_layout,
    encode_redundancy,
)

CHECK = settings(max_examples=60, deadline=None, derandomize=True)
keys = st.tuples(st.integers(0, 9), st.integers(0, 10**15))
redundancies = st.one_of(
    st.builds(ErasureCode, st.integers(1, 6), st.integers(1, 3)), st.builds(Replicas, st.integers(2, 4))
)


@st.composite
def layouts(draw: Any) -> Layout:
    names = draw(st.lists(st.text(max_size=6), min_size=1, max_size=9, unique=True))
    hosts = [Host(n, f"rack {n}", draw(st.integers(0, 1 << 45))) for n in names]
    ranks = draw(
        st.lists(st.tuples(st.sampled_from(names), st.integers(0, 1 << 50), st.integers(0, 1 << 50)), max_size=9)
    )
    return Layout(place(hosts, draw(redundancies)), tuple(ranks))


@st.composite
def holdings(draw: Any) -> Holding:
    some = draw(st.lists(layouts(), min_size=1, max_size=3))
    whole = draw(st.dictionaries(keys, st.sampled_from(some), max_size=4))
    areas = [draw(st.none() | st.builds(Area, keys, st.sampled_from([s.placement for s in some]))) for _ in range(2)]
    inventory = Inventory(
        draw(st.text(max_size=8)), {k: at.placement for k, at in whole.items()}, (areas[0], areas[1]),
        frozenset(draw(st.lists(keys, max_size=2))),
    )  # fmt: skip
    slots = {k: draw(st.integers(0, 1000)) for k in whole}
    return Holding(draw(st.text(max_size=8)), inventory, slots, whole)


def sent(told: Any) -> Any:
    return json.loads(json.dumps(told))


@CHECK
@given(layouts())
def test_a_layout(layout: Layout) -> None:
    assert decode_layout(sent(encode_layout(layout))) == layout


@CHECK
@given(holdings())
def test_an_inventory_with_all_that_belongs_to_it(holding: Holding) -> None:
    assert decode_holding(sent(encode_holding(holding))) == holding


@given(redundancies | st.none())
def test_redundancy(asked: ErasureCode | Replicas | None) -> None:
    assert decode_redundancy(sent(encode_redundancy(asked))) == asked


def test_steps_of_a_life_tell_their_placement_once() -> None:
    layout = Layout(place([Host(f"h{n}", f"h{n}", 100) for n in range(6)], ErasureCode(4, 2)), (("h0", 0, 100),))
    whole = {(1, s): layout.placement for s in range(5)}
    held = Holding(
        "h0", Inventory("h0", whole, (Area((1, 3), layout.placement), None)), {}, dict.fromkeys(whole, layout)
    )
    told = encode_holding(held)
    assert len(told["placements"]) == 1 and len(told["ranks"]) == 1


jsons = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@CHECK
@given(
    holdings(),
    st.sampled_from(["host", "name", "whole", "areas", "spoiled", "slots", "layouts", "ranks", "placements"]),
    jsons,
)
def test_what_is_none_is_refused_and_nothing_else_happens(holding: Holding, where: str, what: Any) -> None:
    told = sent(encode_holding(holding))
    told[where] = what
    with suppress(FormatError):
        decode_holding(told)


@pytest.mark.parametrize("told", [{}, {"groups": [[[["a", "a", 1]], 2, 1]], "ranks": []}, {"groups": 1, "ranks": []}])
def test_layouts_that_are_none(told: Any) -> None:
    with pytest.raises(FormatError):
        decode_layout(told)
