"""The plan over random jobs: every element written once, by somebody who holds it; copies spread; deterministic."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.errors import LayoutError
from ckpt.format.fragment import Box, flat_boxes, whole
from ckpt.format.pack import TensorSpec
from ckpt.plan import Claim, Claims, NeedDigests, Plan, merge

KIB = 1024


@st.composite
def jobs(draw: st.DrawFn) -> list[list[Claim]]:
    """Ranks on a (replicate x shard) grid; every tensor is cut along some dimension, or flat, or held whole."""
    replicas, shards = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    ranks: list[list[Claim]] = [[] for _ in range(replicas * shards)]
    for t in range(draw(st.integers(1, 5))):
        shape = tuple(draw(st.lists(st.integers(0, 400), min_size=0, max_size=3)))
        spec = TensorSpec(f"t{t}", draw(st.sampled_from(["float32", "bfloat16", "uint8", "complex128"])), shape)
        how = draw(st.sampled_from(["dim", "flat", "whole"]))
        for r, s in itertools.product(range(replicas), range(shards)):
            ranks[r * shards + s].append(Claim(spec, _part(shape, how, s, shards), "mesh", "grid"))
    return ranks


def _part(shape: tuple[int, ...], how: str, s: int, shards: int) -> tuple[Box, ...]:
    n = math.prod(shape)
    if how == "whole" or not shape:
        return (whole(shape),)
    if how == "flat":
        return tuple(flat_boxes(shape, n * s // shards, n * (s + 1) // shards))
    lo, hi = shape[0] * s // shards, shape[0] * (s + 1) // shards
    return (Box((lo,) + (0,) * (len(shape) - 1), (hi - lo, *shape[1:])),)


def boxes(plan: Plan) -> list[tuple[int, int, int, Box]]:
    out = []
    for r, t, i, row in zip(
        plan.rank.tolist(), plan.tensor.tolist(), plan.local.tolist(), plan.box.tolist(), strict=True
    ):
        n = len(plan.tensors[t].shape)
        out.append((r, t, i, Box(tuple(row[0][:n]), tuple(row[1][:n]))))
    return out


@settings(max_examples=150, deadline=None, derandomize=True)
@given(jobs())
def test_every_element_is_written_once_by_a_rank_that_holds_it(ranks: list[list[Claim]]) -> None:
    claims = [Claims.decode(Claims.of(c).encode()) for c in ranks]
    plan = merge(claims)
    count = [np.zeros(t.shape, dtype=int) for t in plan.tensors]
    for r, t, i, box in boxes(plan):
        assert ranks[r][i].spec.name == plan.tensors[t].name
        assert any((b & box) == box for b in ranks[r][i].boxes)
        count[t][box.slices] += 1
    assert all((c == 1).all() for c in count)
    again = merge(claims)
    assert boxes(again) == boxes(plan)
    load = plan.nbytes(len(ranks))
    assert load.sum() == sum(t.nbytes for t in plan.tensors)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(2, 9), st.lists(st.tuples(st.integers(1, 60), st.integers(1, 4000)), min_size=1, max_size=12))
def test_copies_are_spread_within_a_tenth_of_the_mean(world: int, sizes: list[tuple[int, int]]) -> None:
    specs = [TensorSpec(f"t{i}", "float32", (a * 64, b)) for i, (a, b) in enumerate(sizes)]
    claims = [Claims.of([Claim(s, (whole(s.shape),), "mesh", "m") for s in specs]) for _ in range(world)]
    load = merge(claims).nbytes(world)
    assert load.max() <= 1.1 * load.mean() + 512 * KIB


def test_sets_of_holders_that_overlap_end_level() -> None:
    """Ranks 0 and 1 share a, 1 and 2 share b, 0 has bytes of its own: c, held by all, fills up the rest."""
    mib = [TensorSpec(n, "uint8", (m, 1024, 1024)) for n, m in (("a", 4), ("b", 4), ("c", 6), ("own", 6))]
    held = [["own", "a", "c"], ["a", "b", "c"], ["b", "c"]]
    claims = [Claims.of([Claim(s, (whole(s.shape),), "mesh", "m") for s in mib if s.name in names]) for names in held]
    load = merge(claims).nbytes(3)
    assert load.sum() == 20 << 20
    assert load.max() <= (20 << 20) / 3 * 1.1 + 256 * KIB


def test_a_plain_tensor_is_a_copy_only_if_its_content_agrees() -> None:
    spec = TensorSpec("x", "float32", (3,))

    def job(*digests: int) -> Plan:
        return merge([Claims.of([Claim(spec, (whole((3,)),), "plain", digest=d)]) for d in digests])

    assert [t.key for t in job(5, 5, 5).tensors] == ["x"]
    assert [t.key for t in job(5, 6, 5).tensors] == ["x@rank=0", "x@rank=1", "x@rank=2"]
    assert job(5, 6, 5).per_rank == ("x",)


def test_two_meshes_need_content_to_tell() -> None:
    spec = TensorSpec("x", "float32", (3,))

    def claims(digests: tuple[int, int]) -> list[Claims]:
        return [Claims.of([Claim(spec, (whole((3,)),), "mesh", f"mesh{r}", digest=d)]) for r, d in enumerate(digests)]

    with pytest.raises(NeedDigests):
        merge(claims((0, 0)))
    assert len(merge(claims((7, 7))).rank) == 1
    with pytest.raises(LayoutError, match="global names"):
        merge(claims((7, 8)))


def test_the_fingerprint_sees_more_than_names() -> None:
    def of(
        name: str = "x",
        dtype: str = "float32",
        shape: tuple[int, ...] = (4,),
        box: Box | None = None,
        kind: str = "mesh",
    ) -> str:
        return Claims.of([Claim(TensorSpec(name, dtype, shape), (box or whole(shape),), kind, "m")]).fingerprint

    other = [of("y"), of(dtype="int32"), of(shape=(5,)), of(box=Box((0,), (2,))), of(kind="shard")]
    assert len({of(), *other}) == 6
