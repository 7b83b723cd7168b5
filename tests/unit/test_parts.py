"""Pieces of an upload become parts: whatever their order, every byte is sent once and every part is large enough."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.backends.parts import PARTS, UNIT, Parts
from ckpt.errors import StorageError

SMALL_UNIT = 10


@st.composite
def pieces(draw: st.DrawFn) -> tuple[list[tuple[int, int]], list[int]]:
    """Pieces that tile an object, and the order in which they come."""
    lengths = draw(st.lists(st.integers(1, 35), min_size=1, max_size=14))
    cuts = [0, *np.cumsum(lengths).tolist()]
    found = list(itertools.pairwise(cuts))
    return found, draw(st.permutations(range(len(found))))


def test_units_and_numbers_stay_inside_the_limits() -> None:
    for size in (1, 100 << 20, 48 << 30, 49 << 30, 5 << 40):
        parts = Parts(size)
        assert parts.unit >= UNIT and 1 <= parts.number(max(0, size - 1)) <= PARTS


@settings(max_examples=400, deadline=None)
@given(pieces(), st.booleans())
def test_every_byte_once_and_no_part_too_small(found: tuple[list[tuple[int, int]], list[int]], told: bool) -> None:
    tiles, order = found
    size = tiles[-1][1]
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8).tobytes()
    parts, sent = Parts(0, SMALL_UNIT), {}
    for k in order:
        a, b = tiles[k]
        buffer = bytearray(data[a:b])
        ready = parts.put(a, memoryview(buffer))
        if ready is not None:
            assert ready[0] not in sent
            sent[ready[0]] = bytes(ready[1])
        buffer[:] = bytes(len(buffer))  # the writer uses its buffer again
    for at, rest in parts.rest(size if told else None):
        assert at not in sent
        sent[at] = bytes(rest)
    assert sorted(sent) == parts.out()
    assert b"".join(sent[at] for at in sorted(sent)) == data
    assert all(len(sent[at]) >= SMALL_UNIT for at in sorted(sent)[:-1])
    numbers = [parts.number(at) for at in sorted(sent)]
    assert numbers == sorted(set(numbers))


def test_a_pack_goes_out_from_the_writers_buffers() -> None:
    """The header comes last, the buffers lie behind it: but for the first unit, nothing is copied."""
    parts, buffer, unit = Parts(1 << 30), np.zeros(4 * UNIT, np.uint8), UNIT
    first = parts.put(4096, memoryview(buffer))
    assert first is not None and first[0] == unit and len(first[1]) == len(buffer) - (unit - 4096)
    for k in (1, 2, 3):
        ready = parts.put(4096 + k * len(buffer), memoryview(buffer))
        assert ready is not None and ready[1].obj is buffer and len(ready[1]) == len(buffer)
    head = parts.put(0, memoryview(bytes(4096)))
    assert head is not None and head[0] == 0 and len(head[1]) == unit


def test_bytes_that_were_never_written_are_missed() -> None:
    parts = Parts(1000, SMALL_UNIT)
    parts.put(0, memoryview(bytes(20)))
    parts.put(30, memoryview(bytes(20)))
    with pytest.raises(StorageError, match="never written"):
        parts.rest(50)


def test_a_part_that_is_stored_cannot_be_cut() -> None:
    parts = Parts(1000, SMALL_UNIT)
    parts.put(0, memoryview(bytes(20)))
    parts.put(20, memoryview(bytes(20)))
    with pytest.raises(StorageError, match="cannot be cut"):
        parts.rest(35)
    assert parts.rest(20) == [] and parts.out() == [0]
