"""Sums of ranges that are made from sums of blocks are those of the bytes; and no damage within a block goes unnoticed."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.errors import IntegrityError
from ckpt.format.codec import crc32c
from ckpt.keeper.sums import Blocks, joined


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_sums_of_two_stretches_are_joined(a: bytes, b: bytes) -> None:
    assert joined(crc32c(a), crc32c(b), len(b)) == crc32c(a + b)


def test_sums_of_long_stretches_are_joined() -> None:
    data = random.Random(1).randbytes((3 << 20) + 77)
    for n in (1, 4096, 1 << 18, (1 << 20) + 3, 3 << 20):
        assert joined(crc32c(data[:-n]), crc32c(data[-n:]), n) == crc32c(data)


SIZES = [100, 1 << 18, 1 << 18, 70_001, 33_000, 5000, 1 << 15, 1 << 18, 9]


def made(data: np.ndarray) -> Blocks:  # type: ignore[type-arg]
    """Blocks of these sizes, with a gap of 64 bytes before each; sums as of now."""
    ends = np.cumsum(np.array(SIZES) + 64)
    starts = ends - np.array(SIZES)
    sums = [crc32c(data[a:b]) for a, b in zip(starts, ends, strict=True)]
    return Blocks(
        starts, ends, np.array(sums, dtype=np.uint32), lambda a, b: [data[a : (a + b) // 2], data[(a + b) // 2 : b]]
    )


def ranges(piece: int) -> list[tuple[int, int]]:
    end = sum(SIZES) + 64 * len(SIZES) + 500
    return [(at, min(at + piece, end)) for at in range(0, end, piece)]


@pytest.mark.parametrize("piece", [1 << 14, 99_991, 1 << 18, 1 << 20])
def test_ranges_are_summed(piece: int) -> None:
    """Also those that blocks go over the ends of, and a block that is longer than a range."""
    data = np.random.default_rng(2).integers(0, 256, 1_300_000, dtype=np.uint8)
    blocks = made(data)
    for a, b in ranges(piece):
        assert blocks.sum(a, b) == crc32c(data[a:b])


@pytest.mark.parametrize("piece", [1 << 14, 99_991, 1 << 18, 1 << 20])
def test_damage_in_a_block_is_noticed(piece: int) -> None:
    """Sums are taken of bytes that are damaged already: some range is refused, or has not the sum that was given."""
    data = np.random.default_rng(3).integers(0, 256, 1_300_000, dtype=np.uint8)
    blocks = made(data)
    ends = np.cumsum(np.array(SIZES) + 64)
    for size, end in zip(SIZES, ends.tolist(), strict=True):
        for at in (end - size, end - size // 2 - 1, end - 1):
            data[at] ^= 16
            try:
                found = any(blocks.sum(a, b) != crc32c(data[a:b]) for a, b in ranges(piece))
            except IntegrityError:
                found = True
            assert found, (size, at)
            data[at] ^= 16
