"""Fragment geometry against the obvious: arrays of indices."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.format.fragment import Box, contiguous_span, disjoint, flat_boxes, in_a_row, tiles, whole

CHECK = settings(max_examples=100, deadline=None, derandomize=True)

shapes = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)
shapes_or_empty = st.lists(st.integers(0, 5), min_size=0, max_size=4).map(tuple)


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    offset = tuple(draw(st.integers(0, n)) for n in shape)
    return Box(offset, tuple(draw(st.integers(0, n - o)) for n, o in zip(shape, offset, strict=True)))


@st.composite
def shape_and_boxes(draw: st.DrawFn, least: int = 1, most: int = 1) -> tuple[tuple[int, ...], list[Box]]:
    shape = draw(shapes_or_empty)
    return shape, draw(st.lists(boxes_in(shape), min_size=least, max_size=most))


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A tensor cut again and again at random places."""
    shape = draw(shapes.filter(bool))
    out = [whole(shape)]
    for _ in range(draw(st.integers(0, 8))):
        box = out.pop(draw(st.integers(0, len(out) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        k = draw(st.integers(0, box.shape[axis]))
        for o, s in ((0, k), (k, box.shape[axis] - k)):
            offset = tuple(a + (o if d == axis else 0) for d, a in enumerate(box.offset))
            out.append(Box(offset, tuple(s if d == axis else n for d, n in enumerate(box.shape))))
    return shape, draw(st.permutations(out))


def indices(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(math.prod(shape)).reshape(shape)


def columns(shape: tuple[int, ...], boxes: list[Box]) -> tuple[np.ndarray, np.ndarray]:
    n, ndim = len(boxes), len(shape)
    return (
        np.array([b.offset for b in boxes], dtype=np.int64).reshape(n, ndim),
        np.array([b.shape for b in boxes], dtype=np.int64).reshape(n, ndim),
    )


def counts(shape: tuple[int, ...], boxes: list[Box]) -> np.ndarray:
    held = np.zeros(shape, dtype=int)
    for box in boxes:
        held[box.slices] += 1
    return held


@CHECK
@given(shapes, st.data())
def test_flat_boxes_follow_each_other_and_are_few(shape: tuple[int, ...], data: st.DataObject) -> None:
    n = math.prod(shape)
    start = data.draw(st.integers(0, n))
    stop = data.draw(st.integers(0, n))
    boxes = list(flat_boxes(shape, start, stop))
    got = [indices(shape)[b.slices].reshape(-1) for b in boxes]
    assert np.array_equal(np.concatenate([np.empty(0, int), *got]), np.arange(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    for box in boxes:
        assert box.numel and box.within(shape) and contiguous_span(shape, box) is not None


@CHECK
@given(shape_and_boxes())
def test_contiguous_span_finds_exactly_the_runs(case: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, (box,) = case
    got = indices(shape)[box.slices].reshape(-1)
    span = contiguous_span(shape, box)
    if not box.numel:
        assert span is None or span[1] == 0
        return
    run = np.array_equal(got, np.arange(got[0], got[0] + len(got)))
    assert span == ((int(got[0]), len(got)) if run else None)


@CHECK
@given(shape_and_boxes(2, 2))
def test_intersection(case: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, (a, b) = case
    common = a & b
    both = (counts(shape, [a]) + counts(shape, [b])) == 2
    assert (common is None) == (not both.any())
    assert common == b & a
    if common is not None:
        assert np.array_equal(counts(shape, [common]) == 1, both)
        inner = indices(shape)[a.slices][common.relative_to(a).slices]
        assert np.array_equal(inner, indices(shape)[common.slices])


@CHECK
@given(shape_and_boxes(0, 7))
def test_disjoint_and_tiles(case: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, boxes = case
    held = counts(shape, boxes)
    pair = disjoint(*columns(shape, boxes))
    assert (pair is None) == (not (held > 1).any())
    if pair is not None:
        assert pair[0] != pair[1] and boxes[pair[0]] & boxes[pair[1]] is not None
    assert tiles(shape, *columns(shape, boxes)) == bool((held == 1).all())
    assert not in_a_row(shape, *columns(shape, boxes)) or bool((held == 1).all())


@CHECK
@given(shapes.filter(bool), st.data())
def test_cuts_along_one_axis_are_in_a_row(shape: tuple[int, ...], data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    cuts = sorted(data.draw(st.sets(st.integers(1, shape[axis] - 1)))) if shape[axis] > 1 else []
    edges = [0, *cuts, shape[axis]]
    boxes = []
    for a, b in itertools.pairwise(edges):
        offset = tuple(a if d == axis else 0 for d in range(len(shape)))
        boxes.append(Box(offset, tuple(b - a if d == axis else n for d, n in enumerate(shape))))
    assert in_a_row(shape, *columns(shape, boxes)) and tiles(shape, *columns(shape, boxes))
    assert len(boxes) == 1 or not in_a_row(shape, *columns(shape, boxes[::-1]))
    k = data.draw(st.integers(0, len(boxes) - 1))
    assert not in_a_row(shape, *columns(shape, boxes[:k] + boxes[k + 1 :]))
    assert not in_a_row(shape, *columns(shape, boxes[: k + 1] + boxes[k:]))


@CHECK
@given(tilings(), st.data())
def test_tilings_tile_until_they_are_damaged(case: tuple[tuple[int, ...], list[Box]], data: st.DataObject) -> None:
    shape, boxes = case
    assert tiles(shape, *columns(shape, boxes)) and disjoint(*columns(shape, boxes)) is None
    i = data.draw(st.integers(0, len(boxes) - 1))
    boxes[i] = data.draw(boxes_in(shape))
    held = counts(shape, boxes)
    assert tiles(shape, *columns(shape, boxes)) == bool((held == 1).all())
    assert (disjoint(*columns(shape, boxes)) is None) == (not (held > 1).any())
