"""Boxes and flat ranges at their edges. The general case is in tests/property."""

from __future__ import annotations

import numpy as np
import pytest

from ckpt.format.fragment import Box, contiguous_span, disjoint, flat_boxes, tiles, whole


def columns(boxes: list[Box]) -> tuple[np.ndarray, np.ndarray]:
    ndim = len(boxes[0].shape)
    return (
        np.array([b.offset for b in boxes], dtype=np.int64).reshape(len(boxes), ndim),
        np.array([b.shape for b in boxes], dtype=np.int64).reshape(len(boxes), ndim),
    )


def test_box_says_what_it_is() -> None:
    box = Box((1, 2), (3, 4))
    assert str(box) == "[1:4,2:6]" and box.stop == (4, 6) and box.numel == 12
    assert box.slices == (slice(1, 4), slice(2, 6))
    assert str(Box((), ())) == "[]" and Box((), ()).numel == 1
    assert whole((5, 0)) == Box((0, 0), (5, 0)) and whole((5, 0)).numel == 0
    assert box.relative_to(Box((1, 1), (5, 5))) == Box((0, 1), (3, 4))


def test_scalars_meet_scalars() -> None:
    assert Box((), ()) & Box((), ()) == Box((), ())
    assert list(flat_boxes((), 0, 1)) == [Box((), ())]
    assert list(flat_boxes((), 0, 0)) == []
    assert contiguous_span((), Box((), ())) == (0, 1)
    assert disjoint(*columns([Box((), ())])) is None
    assert disjoint(*columns([Box((), ()), Box((), ())])) == (0, 1)


def test_empty_boxes_meet_nothing() -> None:
    assert Box((2,), (0,)) & Box((0,), (5,)) is None
    assert Box((0, 1), (4, 0)) & Box((0, 0), (4, 4)) is None
    assert disjoint(*columns([Box((0, 0), (4, 4)), Box((1, 1), (0, 2)), Box((2, 2), (2, 0))])) is None
    assert list(flat_boxes((3, 4), 5, 5)) == [] and list(flat_boxes((3, 4), 7, 5)) == []


@pytest.mark.parametrize(
    ("box", "inside"),
    [
        (Box((0, 0), (3, 4)), True),
        (Box((3, 4), (0, 0)), True),
        (Box((0, 0), (4, 4)), False),
        (Box((-1, 0), (1, 1)), False),
        (Box((1, 1), (-1, 1)), False),
        (Box((0,), (3,)), False),
        (Box((), ()), False),
    ],
)
def test_within(box: Box, inside: bool) -> None:
    assert box.within((3, 4)) is inside


def test_boxes_of_different_rank_do_not_mix() -> None:
    with pytest.raises(ValueError, match="zip"):
        _ = Box((0,), (1,)) & Box((0, 0), (1, 1))


def test_a_flat_range_in_the_middle_of_three_axes_is_five_boxes() -> None:
    assert list(map(str, flat_boxes((4, 3, 5), 7, 58))) == [
        "[0:1,1:2,2:5]",
        "[0:1,2:3,0:5]",
        "[1:3,0:3,0:5]",
        "[3:4,0:2,0:5]",
        "[3:4,2:3,0:3]",
    ]


@pytest.mark.parametrize(
    ("shape", "box", "span"),
    [
        ((4, 6), Box((1, 0), (2, 6)), (6, 12)),
        ((4, 6), Box((1, 2), (1, 3)), (8, 3)),
        ((4, 6), Box((1, 2), (2, 3)), None),
        ((4, 6), Box((0, 0), (4, 5)), None),
        ((1, 6), Box((0, 1), (1, 4)), (1, 4)),
        ((3, 1, 2), Box((1, 0, 0), (2, 1, 2)), (2, 4)),
        ((3, 2, 2), Box((1, 0, 0), (1, 1, 2)), (4, 2)),
        ((3, 2, 2), Box((1, 0, 0), (2, 1, 2)), None),
    ],
)
def test_contiguous_span(shape: tuple[int, ...], box: Box, span: tuple[int, int] | None) -> None:
    assert contiguous_span(shape, box) == span


def test_disjoint_names_the_pair() -> None:
    boxes = [Box((0, 0), (2, 2)), Box((2, 0), (2, 2)), Box((0, 2), (2, 2)), Box((3, 1), (1, 2))]
    assert disjoint(*columns(boxes)) == (1, 3)
    assert disjoint(*columns(boxes[:3])) is None
    assert disjoint(np.empty((0, 2), np.int64), np.empty((0, 2), np.int64)) is None


def test_tiles_is_not_fooled_by_matching_totals() -> None:
    pair = columns([Box((0, 0), (2, 2)), Box((0, 0), (2, 2))])
    assert not tiles((2, 4), *pair)  # as many elements as the tensor, twice the same half
    assert tiles((2, 4), *columns([Box((0, 0), (2, 2)), Box((0, 2), (2, 2))]))
    assert not tiles((2, 4), *columns([Box((0, 0), (2, 2))]))


def test_tiles_of_scalars_and_of_nothing() -> None:
    none = np.empty((0, 0), np.int64)
    assert tiles((), *columns([Box((), ())])) and not tiles((), none, none)
    assert not tiles((), *columns([Box((), ()), Box((), ())]))
    empty = np.empty((0, 2), np.int64)
    assert tiles((0, 3), empty, empty) and not tiles((1, 3), empty, empty)


def test_tiles_at_the_largest_coordinates() -> None:
    n = 2**61
    assert tiles((n,), *columns([Box((0,), (n - 1,)), Box((n - 1,), (1,))]))
    assert not tiles((n,), *columns([Box((0,), (n - 1,)), Box((n - 2,), (1,))]))
