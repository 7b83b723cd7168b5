"""Layouts: the examples of Universal Checkpointing, and that nothing is guessed."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.errors import LayoutError
from ckpt.format.fragment import Box, tiles
from ckpt.format.layout import Cut, Layout, Part, local_shape, pieces

CHECK = settings(max_examples=100, deadline=None, derandomize=True)

QKV_2 = Layout((12, 3), (Cut(0, "tp", (Part(8, (4, 4), "q"), Part(2, (1, 1), "k"), Part(2, (1, 1), "v"))),))
QKV_3 = Layout((12, 3), (Cut(0, "tp", (Part(8, (3, 3, 2), "q"), Part(2, (1, 1, 0), "k"), Part(2, (1, 1, 0), "v"))),))
GATE_UP = Layout((8, 3), (Cut(0, "tp", (Part(4, (2, 2), "gate"), Part(4, (2, 2), "up"))),))
COLUMN = Layout((16, 8), (Cut(0, "tp", (Part(16, (8, 8)),)),))
ROW = Layout((8, 8), (Cut(1, "tp", (Part(8, (4, 4)),)),))
VOCABULARY = Layout((50257, 2), (Cut(0, "tp", (Part(50257, (25152, 25152), padding=47),)),), ("pp",))
EXPERTS = Layout((8, 2, 3), (Cut(0, "ep", (Part(8, (4, 4), starts=(0, 4)),), kind="expert"),))
NORM = Layout((5,), replicated=("tp",))
AVERAGED = Layout((2,), averaged=("tp",))
SHARED_KEYS = Layout((2, 3), (Cut(0, "tp", (Part(2, (1, 1, 1, 1), "k", starts=(0, 0, 1, 1)),)),))
INTERLEAVED = Layout(
    (8, 3),
    (Cut(0, "pp", (Part(4, (2, 2), "first", starts=(0, 2)), Part(4, (2, 2), "second", starts=(0, 2))), kind="layer"),),
)
EXPERT_GATE_UP = Layout(
    (4, 3, 8),
    (
        Cut(0, "ep", (Part(4, (2, 2), starts=(0, 2)),), kind="expert"),
        Cut(2, "tp", (Part(4, (3, 1), "gate"), Part(4, (3, 1), "up"))),
    ),
    replicated=("dp",),
)
EXAMPLES = {
    "q, k, v over 2": QKV_2,
    "q, k, v over 3": QKV_3,
    "gate and up": GATE_UP,
    "column": COLUMN,
    "row": ROW,
    "vocabulary": VOCABULARY,
    "experts": EXPERTS,
    "norm": NORM,
    "averaged": AVERAGED,
    "shared keys": SHARED_KEYS,
    "interleaved pipeline": INTERLEAVED,
    "experts with gate and up": EXPERT_GATE_UP,
}


def places(layout: Layout) -> list[dict[str, int]]:
    """Every place in the mesh; two along the axes that a layout gives no size for."""
    sizes = {c.over: len(c.parts[0].widths) for c in layout.cuts if c.over}
    axes = [(name, range(sizes.get(name, 2))) for name in layout.mesh_axes]
    return [dict(zip([n for n, _ in axes], at, strict=True)) for at in itertools.product(*(r for _, r in axes))]


def columns(layout: Layout, boxes: list[Box]) -> tuple[np.ndarray, np.ndarray]:
    n, ndim = len(boxes), len(layout.shape)
    return (
        np.array([b.offset for b in boxes], np.int64).reshape(n, ndim),
        np.array([b.shape for b in boxes], np.int64).reshape(n, ndim),
    )


def check(layout: Layout) -> None:
    """All ranks together hold every element once; every local element is held or padding."""
    once: list[Box] = []
    for at in places(layout):
        shape, found = local_shape(layout, at), pieces(layout, at)
        local = np.zeros(shape, int)
        for here, there in found:
            assert here.shape == there.shape and here.within(shape) and there.within(layout.shape) and here.numel
            local[here.slices] += 1
        assert (local <= 1).all() and int(local.sum()) == sum(b.numel for b, _ in found)
        padding = sum(p.padding for c in layout.cuts for p in c.parts)
        assert padding or (local == 1).all()
        mine = pieces(layout, at, copies=False)
        assert len(mine) <= len(found)
        if all(at[name] == 0 for name in layout.averaged):
            once += [there for _, there in mine]
    assert tiles(layout.shape, *columns(layout, once))


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_tile_and_survive_json(name: str) -> None:
    layout = EXAMPLES[name]
    check(layout)
    text = layout.to_json()
    assert Layout.from_json(text) == layout and Layout.from_json(text).to_json() == text
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def join(layout: Layout, local: list[np.ndarray], axis: str = "tp") -> np.ndarray:
    out = np.full(layout.shape, -1)
    for rank, array in enumerate(local):
        assert array.shape == local_shape(layout, {axis: rank})
        for here, there in pieces(layout, {axis: rank}):
            out[there.slices] = array[here.slices]
    return out


def rows(*heads: int) -> np.ndarray:
    return np.array([[h, h, h] for h in heads]).reshape(-1, 3)


def test_fused_attention_over_two_and_three_ranks() -> None:
    q, k, v = range(8), range(10, 12), range(20, 22)
    two = [rows(0, 1, 2, 3, 10, 20), rows(4, 5, 6, 7, 11, 21)]
    three = [rows(0, 1, 2, 10, 20), rows(3, 4, 5, 11, 21), rows(6, 7)]
    whole = rows(*q, *k, *v)
    assert np.array_equal(join(QKV_2, two), whole) and np.array_equal(join(QKV_3, three), whole)
    assert [[f"{a}->{b}" for a, b in pieces(QKV_3, {"tp": r})] for r in (1, 2)] == [
        ["[0:3,0:3]->[3:6,0:3]", "[3:4,0:3]->[9:10,0:3]", "[4:5,0:3]->[11:12,0:3]"],
        ["[0:2,0:3]->[6:8,0:3]"],
    ]


def test_gate_and_up_are_not_interleaved() -> None:
    assert np.array_equal(join(GATE_UP, [rows(0, 1, 10, 11), rows(2, 3, 12, 13)]), rows(0, 1, 2, 3, 10, 11, 12, 13))


def test_rows_and_columns() -> None:
    assert pieces(COLUMN, {"tp": 1}) == [(Box((0, 0), (8, 8)), Box((8, 0), (8, 8)))]
    assert pieces(ROW, {"tp": 1}) == [(Box((0, 0), (8, 4)), Box((0, 4), (8, 4)))]


def test_vocabulary_padding_maps_to_nothing() -> None:
    last = {"tp": 1, "pp": 0}
    assert local_shape(VOCABULARY, last) == (25152, 2)
    assert pieces(VOCABULARY, last) == [(Box((0, 0), (25105, 2)), Box((25152, 0), (25105, 2)))]
    padded = Layout((50,), (Cut(0, "tp", (Part(50, (32, 32, 32, 32), padding=78),)),))
    assert [[str(b) for _, b in pieces(padded, {"tp": r})] for r in range(4)] == [["[0:32]"], ["[32:50]"], [], []]
    unsplit = Layout((50,), (Cut(0, "", (Part(50, (64,), padding=14),)),))
    assert local_shape(unsplit, {}) == (64,) and pieces(unsplit, {}) == [(Box((0,), (50,)), Box((0,), (50,)))]


def test_padding_inside_a_fused_axis() -> None:
    layout = Layout((10,), (Cut(0, "tp", (Part(5, (3, 3), "a", padding=1), Part(5, (3, 3), "b", padding=1))),))
    check(layout)
    found = [[f"{a}->{b}" for a, b in pieces(layout, {"tp": r})] for r in range(2)]
    assert found == [["[0:3]->[0:3]", "[3:6]->[5:8]"], ["[0:2]->[3:5]", "[3:5]->[8:10]"]]


def test_stacked_experts_and_layers() -> None:
    assert pieces(EXPERTS, {"ep": 1}) == [(Box((0, 0, 0), (4, 2, 3)), Box((4, 0, 0), (4, 2, 3)))]
    found = [[f"{a.offset[0]}->{b.offset[0]}" for a, b in pieces(INTERLEAVED, {"pp": r})] for r in range(2)]
    assert found == [["0->0", "2->4"], ["0->2", "2->6"]]


def test_copies_belong_to_the_lowest_rank() -> None:
    assert [bool(pieces(SHARED_KEYS, {"tp": r}, copies=False)) for r in range(4)] == [True, False, True, False]
    assert [pieces(SHARED_KEYS, {"tp": r})[0][1].offset[0] for r in range(4)] == [0, 0, 1, 1]
    assert pieces(NORM, {"tp": 1}) and not pieces(NORM, {"tp": 1}, copies=False)


def test_averaged_values_are_all_there() -> None:
    values = [np.array([1.0, 3.0]), np.array([3.0, 5.0])]
    total = np.zeros(2)
    for rank in range(2):
        for here, there in pieces(AVERAGED, {"tp": rank}, copies=False):
            total[there.slices] += values[rank][here.slices]
    assert (total / 2).tolist() == [2.0, 4.0]


def test_what_is_whole_is_one_piece() -> None:
    fused = Layout((12,), (Cut(0, "tp", (Part(8, (8,)), Part(4, (4,)))),))
    assert pieces(fused, {"tp": 0}) == [(Box((0,), (12,)), Box((0,), (12,)))]
    assert pieces(Layout(()), {}) == [(Box((), ()), Box((), ()))] and local_shape(Layout(()), {}) == ()
    assert pieces(Layout((0, 3)), {}) == []


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: Part(4, ()), "widths are missing"),
        (lambda: Part(4, (2, 1)), "hold 3 indices, size 4"),
        (lambda: Part(4, (2, 4)), "hold 6 indices, size 4"),
        (lambda: Part(50257, (25152, 25152)), "hold 50304 indices, size 50257"),
        (lambda: Part(4, (2, 2), starts=(0,)), "2 widths but 1 starts"),
        (lambda: Part(4, (2, 2), starts=(0, 3)), "no rank holds indices 2:3"),
        (lambda: Part(4, (2, 2), starts=(0, 1)), "several ranks hold indices 1:2"),
        (lambda: Part(4, (2, 3), starts=(0, 0)), "several ranks hold indices 0:2"),
        (lambda: Part(4, (2, 2), starts=(0, 0)), "hold 2 indices"),
        (lambda: Part(-1, (1,)), "-1"),
        (lambda: Part(1, (1.0,)), "1.0"),  # type: ignore[arg-type]
        (lambda: Part(1, (True,)), "True"),
        (lambda: Part(1, 1), "not a list"),  # type: ignore[arg-type]
        (lambda: Part(1, (1,), name=3), "name"),  # type: ignore[arg-type]
        (lambda: Part(2**62, (2**62,)), "whole number"),
        (lambda: Cut(0, "tp", ()), "parts are missing"),
        (lambda: Cut(0, "tp", (Part(4, (2, 2)), Part(4, (4,)))), r"\[2, 1\] ranks"),
        (lambda: Cut(0, "", (Part(4, (2, 2)),)), "no mesh axis"),
        (lambda: Cut(0, "ep", (Part(8, (4, 4), "w1"),), kind="expert"), r"starts are missing for parts \['w1'\]"),
        (lambda: Cut(0, "pp", (Part(8, (4, 4)),), kind="layer"), "starts are missing"),
        (lambda: Cut(0, "tp", (Part(4, (4,)),), kind="row"), "'row' is none of"),
        (lambda: Cut(-1, "tp", (Part(4, (4,)),)), "axis"),
        (lambda: Cut(0, "tp", (4,)), "must be a Part"),  # type: ignore[arg-type]
        (lambda: Cut(0, None, (Part(4, (4,)),)), "mesh axis must be text"),  # type: ignore[arg-type]
        (lambda: Layout((5,), (Cut(0, "tp", (Part(4, (4,)),)),)), "hold 4 true indices, the shape says 5"),
        (lambda: Layout((4,), (Cut(1, "tp", (Part(4, (4,)),)),)), "axis 1"),
        (lambda: Layout((4,), (Cut(0, "a", (Part(4, (4,)),)), Cut(0, "b", (Part(4, (4,)),)))), "axis 0 is cut twice"),
        (lambda: Layout((4, 4), (Cut(0, "a", (Part(4, (4,)),)), Cut(1, "a", (Part(4, (4,)),)))), "'a' is named twice"),
        (lambda: Layout((4,), (Cut(0, "tp", (Part(4, (4,)),)),), ("tp",)), "'tp' is named twice"),
        (lambda: Layout((4,), (), ("tp",), ("tp",)), "'tp' is named twice"),
        (lambda: Layout((4,), (), "tp"), "not a list"),  # type: ignore[arg-type]
        (lambda: Layout((4,), (), ("",)), "must be named"),
        (lambda: Layout((1,) * 65), "64 axes"),
        (lambda: Layout(4), "shape"),  # type: ignore[arg-type]
    ],
)
def test_incomplete_layouts_are_refused(make: object, names: str) -> None:
    with pytest.raises(LayoutError, match=names):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("layout", "at", "names"),
    [
        (QKV_2, {}, r"mesh axes \['tp'\] is missing"),
        (NORM, {}, r"mesh axes \['tp'\] is missing"),
        (QKV_2, {"tp": 0, "dp": 1}, r"silent about mesh axes \['dp'\]"),
        (Layout((4,)), {"tp": 0}, r"silent about mesh axes \['tp'\]"),
        (QKV_2, {"tp": 2}, "widths are missing for tp=2, there are 2"),
        (QKV_2, {"tp": -1}, "coordinates"),
        (QKV_2, {"tp": "0"}, "coordinates"),
    ],
)
def test_incomplete_places_are_refused(layout: Layout, at: dict[str, int], names: str) -> None:
    for function in (pieces, local_shape):
        with pytest.raises(LayoutError, match=names):
            function(layout, at)


def test_pieces_are_bounded() -> None:
    cut = [Cut(d, f"m{d}", (Part(2, (1, 1)), Part(2, (1, 1)))) for d in range(20)]
    layout = Layout((4,) * 20, tuple(cut))
    with pytest.raises(LayoutError, match="more than"):
        pieces(layout, {f"m{d}": 0 for d in range(20)})


# --- any layout ------------------------------------------------------------------------------------------------


@st.composite
def runs(draw: st.DrawFn, ranks: int) -> Part:
    """A part cut at random, its runs in any order, some of them shared."""
    widths = [draw(st.integers(0, 3)) for _ in range(ranks)]
    padding = draw(st.integers(0, sum(widths)))
    size = sum(widths) - padding
    if draw(st.booleans()):
        return Part(size, tuple(widths), draw(st.text(max_size=2)), padding)
    order = draw(st.permutations(range(ranks)))
    starts, at = [0] * ranks, 0
    for r in order:
        starts[r], at = at, at + widths[r]
    source = [draw(st.integers(0, ranks - 1)) if not widths[r] else r for r in range(ranks)]
    return Part(size, tuple(widths[r] for r in source), "", padding, tuple(starts[r] for r in source))


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    cuts, shape = [], []
    for axis in range(draw(st.integers(0, 3))):
        if draw(st.booleans()):
            ranks = draw(st.integers(1, 4))
            parts = tuple(draw(runs(ranks)) for _ in range(draw(st.integers(1, 3))))
            cuts.append(Cut(axis, f"m{axis}", parts))
            shape.append(sum(p.size for p in parts))
        else:
            shape.append(draw(st.integers(0, 4)))
    extra = draw(st.sampled_from([((), ()), (("dp",), ()), ((), ("dp",)), (("dp", "cp"), ("x",))]))
    return Layout(tuple(shape), tuple(cuts), *extra)


@CHECK
@given(layouts())
def test_any_layout(layout: Layout) -> None:
    check(layout)
    assert Layout.from_json(layout.to_json()) == layout


@CHECK
@given(st.data())
def test_edited_json_never_ends_in_another_error(data: st.DataObject) -> None:
    row = json.loads(data.draw(st.sampled_from([EXPERT_GATE_UP, VOCABULARY, SHARED_KEYS])).to_json())
    spots = []

    def walk(value: object) -> None:
        for key, child in list(value.items() if isinstance(value, dict) else enumerate(value)):  # type: ignore[arg-type]
            spots.append((value, key))
            if isinstance(child, dict | list):
                walk(child)

    walk(row)
    odd = st.one_of(st.none(), st.booleans(), st.integers(-2, 2**64), st.floats(), st.text(max_size=2))
    holder, key = data.draw(st.sampled_from(spots))
    if data.draw(st.booleans()):
        holder[key] = data.draw(st.one_of(odd, st.lists(odd, max_size=3), st.dictionaries(st.text(max_size=2), odd)))
    else:
        del holder[key]
    try:
        layout = Layout.from_json(json.dumps(row))
    except LayoutError as e:
        assert str(e)
        return
    assert Layout.from_json(layout.to_json()) == layout
    assert all(math.prod(local_shape(layout, at)) >= 0 for at in places(layout)[:4])


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("1" * 10_000, "not JSON"),
        ("null", "no list of cuts"),
        ("[]", "no list of cuts"),
        ("{}", "version None"),
        ('{"version":1}', "shape missing"),
        ('{"version":2,"shape":[1],"new":1}', "version 2, not 1"),
        ('{"version":true,"shape":[1]}', "version True"),
        ('{"version":1,"shape":[1],"new":1}', r"\['new'\] unknown; a newer ckpt"),
        ('{"version":1,"shape":[1],"cuts":[{"axis":0,"over":"tp"}]}', "parts are missing"),
        ('{"version":1,"shape":[1],"cuts":[{"axis":0,"parts":[{"size":1,"widths":[1]}]}]}', "over missing"),
        ('{"version":1,"shape":[1],"cuts":[{"axis":0,"over":"tp","parts":[{"size":1}]}]}', "widths missing"),
        ('{"version":1,"shape":[1],"cuts":[3]}', "no list of parts"),
        ('{"version":1,"shape":[1],"cuts":{"a":1}}', "no list of cuts"),
    ],
    ids=lambda s: s[:40],
)
def test_bad_json_is_named(text: str, names: str) -> None:
    with pytest.raises(LayoutError, match=names):
        Layout.from_json(text)
