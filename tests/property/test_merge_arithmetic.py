"""The arithmetic of averages: against exact sums, torch's conversions, and itself in other pieces."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.format.dtypes import dtype
from ckpt.merge.arithmetic import AVERAGED, NotFinite, Room, combine

KINDS = sorted(AVERAGED)


def raw(x: torch.Tensor) -> npt.NDArray[np.uint8]:
    return x.contiguous().reshape(-1).view(torch.uint8).numpy().copy()


def tensor(data: npt.NDArray[np.uint8], kind: str) -> torch.Tensor:
    return torch.from_numpy(data.copy()).view(getattr(torch, kind))


def made(kind: str, n: int, count: int, seed: int) -> list[npt.NDArray[np.uint8]]:
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(n, 2, generator=g, dtype=torch.float64)
    out = []
    for _ in range(count):
        x = base + 0.1 * torch.randn(n, 2, generator=g, dtype=torch.float64)
        if kind == "complex32":
            out.append(raw(x.to(torch.float16)))
        elif kind.startswith("complex"):
            out.append(raw(torch.view_as_complex(x).to(getattr(torch, kind))))
        else:
            out.append(raw(x.reshape(-1).to(getattr(torch, kind))))
    return out


def mixed(blocks: list[npt.NDArray[np.uint8]], weights: Any, kind: str) -> list[npt.NDArray[np.uint8]]:
    rows = np.atleast_2d(np.array(weights, dtype=np.float64))
    out = [np.empty_like(blocks[0]) for _ in rows]
    combine(blocks, rows, kind, out, Room())
    return out


def numbers(data: npt.NDArray[np.uint8], kind: str) -> npt.NDArray[np.float64]:
    return tensor(data, AVERAGED[kind]).double().numpy()


def affine(free: list[float]) -> list[float]:
    return [*free, 1 - math.fsum(free)]


@given(st.sampled_from(KINDS), st.lists(st.floats(-2, 2), min_size=1, max_size=5), st.integers(0, 999))
@settings(deadline=None)
def test_it_is_the_weighted_sum_rounded_once(kind: str, free: list[float], seed: int) -> None:
    weights = affine(free)
    blocks = made(kind, 33, len(weights), seed)
    got = numbers(mixed(blocks, weights, kind)[0], kind)
    values = np.stack([numbers(b, kind) for b in blocks])
    exact = [float(sum(Fraction(w) * Fraction(v) for w, v in zip(weights, column, strict=True))) for column in values.T]
    wide, stored = (
        (2**-53, 2**-53)
        if AVERAGED[kind] == "float64"
        else (2**-24, {"float16": 2**-11, "bfloat16": 2**-8}.get(AVERAGED[kind], 2**-24))
    )
    size = np.abs(values).max(axis=0) * (1 + sum(map(abs, weights)))
    assert (
        np.abs(got - exact)
        <= 8 * len(weights) * wide * size + 1.01 * stored * np.abs(exact) + 1e-7 * (AVERAGED[kind] == "float16")
    ).all()


@given(st.sampled_from(KINDS), st.lists(st.floats(-3, 3), min_size=1, max_size=4), st.data())
@settings(deadline=None, max_examples=40)
def test_the_bits_do_not_depend_on_where_blocks_begin(kind: str, free: list[float], data: st.DataObject) -> None:
    blocks = made(kind, 70_001, len(free) + 1, 5)
    item = dtype(kind).itemsize
    n = len(blocks[0]) // item
    whole = mixed(blocks, affine(free), kind)[0]
    lo = data.draw(st.integers(0, n - 1))
    hi = data.draw(st.integers(lo + 1, n))
    part = mixed([b[lo * item : hi * item].copy() for b in blocks], affine(free), kind)[0]
    assert bytes(part) == bytes(whole[lo * item : hi * item])


@given(st.sampled_from(KINDS), st.lists(st.lists(st.floats(-3, 3), min_size=3, max_size=3), min_size=2, max_size=4))
@settings(deadline=None)
def test_many_rows_at_once_are_each_row_alone(kind: str, rows: list[list[float]]) -> None:
    blocks = made(kind, 50, 4, 1)
    together = mixed(blocks, [affine(r) for r in rows], kind)
    for r, got in zip(rows, together, strict=True):
        assert bytes(got) == bytes(mixed(blocks, affine(r), kind)[0])


@given(
    st.sampled_from(["float64", "float32", "float16", "bfloat16"]), st.lists(st.floats(-6, 6), min_size=1, max_size=5)
)
@settings(deadline=None)
def test_what_is_the_same_everywhere_stays_bit_by_bit(kind: str, free: list[float]) -> None:
    """Frozen parameters, masks of minus infinity, both zeros."""
    x = raw(
        torch.tensor([0.0, -0.0, 1.1, -3e-5, math.inf, -math.inf, 1 / 3], dtype=torch.float64).to(getattr(torch, kind))
    )
    assert bytes(mixed([x] * (len(free) + 1), affine(free), kind)[0]) == bytes(x)


def test_every_bfloat16_goes_through_and_comes_back() -> None:
    x = np.arange(65536, dtype=np.uint16)
    x = x[(x & 0x7F80) != 0x7F80]
    assert bytes(mixed([x.view(np.uint8), x.view(np.uint8)], [0.25, 0.75], "bfloat16")[0]) == bytes(x)


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=2, max_size=50))
def test_bfloat16_is_rounded_as_torch_does(values: list[float]) -> None:
    """Half the way between two stored numbers needs one bit more than bfloat16 has: ties to even are met."""
    a = torch.tensor(values, dtype=torch.float32).to(torch.bfloat16)
    b = a.roll(1)
    got = tensor(mixed([raw(a), raw(b)], [0.5, 0.5], "bfloat16")[0], "bfloat16")
    wanted = (b.float() - 0.5 * (b.float() - a.float())).to(torch.bfloat16)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("kind", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_what_is_not_finite_is_told_of_the_checkpoint(kind: str, bad: float, where: int) -> None:
    x = [torch.zeros(70_000, dtype=getattr(torch, kind)) for _ in range(3)]
    x[where][69_000] = bad
    with pytest.raises(NotFinite) as e:
        mixed([raw(v) for v in x], [0.25, 0.25, 0.5], kind)
    assert e.value.inputs == (where,)


@pytest.mark.parametrize(
    ("weight", "fits"), [(-0.25, True), (-0.49, True), (-0.5, False), (-0.75, False), (-1.0, False)]
)
def test_the_last_bfloat16_before_infinity(weight: float, fits: bool) -> None:
    """A part of a step beyond the largest: float32 holds it, bfloat16 rounds it down to that or up to infinity."""
    before, last = (np.array([v], dtype=np.uint16).view(np.uint8) for v in (0x7F7E, 0x7F7F))
    if fits:
        assert bytes(mixed([before, last], affine([weight]), "bfloat16")[0]) == bytes(last)
        return
    with pytest.raises(NotFinite) as e:
        mixed([before, last], affine([weight]), "bfloat16")
    assert e.value.inputs == ()


def test_a_checkpoint_that_counts_nothing_may_hold_anything() -> None:
    x = [torch.full((5,), v) for v in (math.nan, 1.0, 3.0)]
    got = mixed([raw(v) for v in x], [0.0, 0.5, 0.5], "float32")[0]
    assert tensor(got, "float32").tolist() == [2.0] * 5


@pytest.mark.parametrize(
    ("kind", "large"), [("float16", 60000.0), ("bfloat16", 3e38), ("float32", 3e38), ("float64", 1.7e308)]
)
def test_a_result_that_overflows_is_refused(kind: str, large: float) -> None:
    a, b = (raw(torch.full((9,), v, dtype=torch.float64).to(getattr(torch, kind))) for v in (-large, large))
    with pytest.raises(NotFinite) as e:
        mixed([a, b], [-3.0, 4.0], kind)
    assert e.value.inputs == ()
