"""Placement: what is lost with some hosts is computed back from what the others keep, by the code that is used for it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.config import ErasureCode, Replicas
from ckpt.errors import UsageError
from ckpt.keeper.erasure import Code
from ckpt.keeper.groups import Group, Host, Placement, place

CHECK = settings(max_examples=150, deadline=None, derandomize=True)
REDUNDANCY = st.one_of(
    st.builds(ErasureCode, st.integers(1, 7), st.integers(1, 3)), st.builds(Replicas, st.integers(2, 4))
)


def hosts(count: int, sizes: Sequence[int] = (1000,), first: int = 0, racks: int | None = None) -> list[Host]:
    """Each its own domain, or dealt to so many racks."""
    return [
        Host(f"h{n:03}", f"rack {n % racks}" if racks else f"h{n:03}", sizes[n % len(sizes)])
        for n in range(first, first + count)
    ]


def encoded(group: Group, segments: Mapping[str, bytes]) -> dict[str, bytearray]:
    """The parity areas of a group's hosts, every host sending its own chunks where its share says."""
    areas = {name: bytearray(share.parity_bytes) for name, share in group.shares.items()}
    if not group.parity:
        return areas
    code = Code(group.data, group.parity)
    for name, share in group.shares.items():
        for chunk in share.chunks:
            block = segments[name][chunk.start : chunk.stop]
            for row, keeper in enumerate(chunk.keepers):
                [p] = [p for p in group.shares[keeper].parity if p.stripe == chunk.stripe]
                assert (p.row, p.sources[chunk.number]) == (row, name)
                code.fold(chunk.number, block, {row: memoryview(areas[keeper])[p.offset : p.offset + len(block)]})
    return areas


def rebuilt(
    group: Group, lost: Collection[str], segments: Mapping[str, bytes], areas: Mapping[str, bytearray]
) -> tuple[dict[str, bytearray], dict[str, bytearray]]:
    """(segments, parity areas) of the lost hosts, from the stripes of those that are left."""
    data = {h.name: bytearray(h.nbytes) for h in group.hosts if h.name in lost}
    parity = {name: bytearray(len(areas[name])) for name in lost}
    for stripe in group.stripes:
        present, wanted = {}, {}
        for i, (name, start, stop) in enumerate(stripe.data):
            if name in lost:
                wanted[i] = memoryview(data[name])[start:stop]
            else:
                present[i] = memoryview(segments[name])[start:stop]
        for r, (name, offset, n) in enumerate(stripe.parity):
            if name in lost:
                wanted[group.data + r] = memoryview(parity[name])[offset : offset + n]
            else:
                present[group.data + r] = memoryview(areas[name])[offset : offset + n]
        Code(group.data, group.parity).decode(present, wanted)
    return data, parity


def check(placement: Placement, given_hosts: Collection[Host]) -> None:
    """What is true of every placement."""
    assert sorted(h.name for g in placement.groups for h in g.hosts) == sorted(h.name for h in given_hosts)
    for number, group in enumerate(placement.groups):
        assert len({h.domain for h in group.hosts}) == len(group.hosts), "two hosts of a domain in one group"
        assert 0 < group.data + group.parity <= len(group.hosts) <= 255 and group.data > 0
        assert all(placement.group_of(h.name) == number for h in group.hosts)
        largest = max(h.nbytes for h in group.hosts)
        chunk = max((c.stop - c.start for share in group.shares.values() for c in share.chunks), default=0)
        for name, share in group.shares.items():
            ends = [0, *(c.stop for c in share.chunks)]
            if group.parity:
                assert [c.start for c in share.chunks] == ends[:-1] and ends[-1] == share.host.nbytes
                assert len(share.chunks) == group.data and len(share.parity) == group.parity
            assert 2 * share.parity_bytes <= 1.05 * 2 * group.parity / group.data * largest + max(
                chunk, 128 * group.parity
            )
            kept = sorted((p.offset, p.offset + p.nbytes) for p in share.parity)
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(kept)), "parity over parity"
            assert name not in {k for c in share.chunks for k in c.keepers}
        for stripe in group.stripes:
            names = [n for n, _, _ in (*stripe.data, *stripe.parity)]
            assert len(set(names)) == len(names), "two chunks of a stripe on one host"


@st.composite
def jobs(draw: st.DrawFn) -> tuple[list[Host], ErasureCode | Replicas]:
    sizes = draw(st.lists(st.sampled_from([0, 1, 63, 64, 65, 500, 1000, 1001, 4096]), min_size=1, max_size=5))
    return hosts(draw(st.integers(1, 20)), sizes), draw(REDUNDANCY)


@CHECK
@given(job=jobs(), seed=st.integers(0, 1 << 30))
def test_any_loss_of_as_many_hosts_as_a_group_has_parity(
    job: tuple[list[Host], ErasureCode | Replicas], seed: int
) -> None:
    some, redundancy = job
    rng = random.Random(seed)
    placement = place(some, redundancy)
    check(placement, some)
    asked = redundancy.parity if isinstance(redundancy, ErasureCode) else redundancy.copies - 1
    for group in placement.groups:
        assert group.parity == min(asked, len(some) - 1)
        segments = {h.name: rng.randbytes(h.nbytes) for h in group.hosts}
        areas = encoded(group, segments)
        patterns = list(itertools.combinations(sorted(segments), group.parity))
        for lost in rng.sample(patterns, min(6, len(patterns))) if group.parity else []:
            data, parity = rebuilt(group, lost, segments, areas)
            assert data == {n: segments[n] for n in lost} and parity == {n: areas[n] for n in lost}


@pytest.mark.parametrize("redundancy", [ErasureCode(4, 2), ErasureCode(4, 1), Replicas(3)])
def test_every_loss(redundancy: ErasureCode | Replicas) -> None:
    [group] = place(hosts(5, (300, 128, 0, 70)), redundancy).groups
    segments = {h.name: random.Random(h.name).randbytes(h.nbytes) for h in group.hosts}
    areas = encoded(group, segments)
    for lost in itertools.chain.from_iterable(
        itertools.combinations(sorted(segments), n) for n in range(group.parity + 1)
    ):
        assert rebuilt(group, lost, segments, areas)[0] == {n: segments[n] for n in lost}
    with pytest.raises(UsageError, match="chunks are present"):
        rebuilt(group, sorted(segments)[: group.parity + 1], segments, areas)


def shape(placement: Placement) -> list[tuple[int, int, int]]:
    """(hosts, data, parity) of the groups, the largest first."""
    return sorted(((len(g.hosts), g.data, g.parity) for g in placement.groups), reverse=True)


@pytest.mark.parametrize(
    ("count", "redundancy", "groups"),
    [
        (16, ErasureCode(6, 2), [(8, 6, 2), (8, 6, 2)]),
        (17, ErasureCode(6, 2), [(9, 7, 2), (8, 6, 2)]),
        (15, ErasureCode(6, 2), [(8, 6, 2), (7, 5, 2)]),
        (12, ErasureCode(6, 2), [(12, 10, 2)]),
        (7, ErasureCode(6, 2), [(7, 5, 2)]),
        (4, ErasureCode(6, 2), [(4, 2, 2)]),
        (3, ErasureCode(6, 2), [(3, 1, 2)]),
        (3, ErasureCode(6, 1), [(3, 1, 1)]),
        (2, ErasureCode(6, 2), [(2, 1, 1)]),
        (1, ErasureCode(6, 2), [(1, 1, 0)]),
        (6, Replicas(2), [(2, 1, 1)] * 3),
        (7, Replicas(2), [(3, 1, 1), (2, 1, 1), (2, 1, 1)]),
        (2, Replicas(3), [(2, 1, 1)]),
        (300, ErasureCode(200, 5), [(150, 145, 5), (150, 145, 5)]),
    ],
)
def test_shapes(count: int, redundancy: ErasureCode | Replicas, groups: list[tuple[int, int, int]]) -> None:
    placement = place(hosts(count), redundancy)
    check(placement, hosts(count))
    assert shape(placement) == groups


def test_replicas_are_copies() -> None:
    [group] = place(hosts(3, (100, 90)), Replicas(3)).groups
    segments = {h.name: random.Random(h.name).randbytes(h.nbytes) for h in group.hosts}
    for name, area in encoded(group, segments).items():
        kept = {p.sources[0]: bytes(area[p.offset : p.offset + p.nbytes]) for p in group.shares[name].parity}
        assert kept == {n: s for n, s in segments.items() if n != name}


@CHECK
@given(
    counts=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    redundancy=REDUNDANCY,
    seed=st.integers(0, 1 << 30),
)
def test_domains(counts: list[int], redundancy: ErasureCode | Replicas, seed: int) -> None:
    """Placed, or refused exactly where no grouping exists; in any order of the hosts the same."""
    some = [Host(f"h{d}-{n}", f"rack {d}", 640) for d, count in enumerate(counts) for n in range(count)]
    asked = redundancy.parity if isinstance(redundancy, ErasureCode) else redundancy.copies - 1
    parity = min(asked, len(some) - 1)
    if max(counts) > len(some) // (parity + 1):
        with pytest.raises(
            UsageError, match=f"rack {counts.index(max(counts))}' has {max(counts)} of {len(some)} hosts"
        ):
            place(some, redundancy)
        return
    placement = place(some, redundancy)
    check(placement, some)
    assert all(len(g.hosts) > parity == g.parity for g in placement.groups)
    random.Random(seed).shuffle(some)
    assert place(some, redundancy) == placement


@CHECK
@given(
    count=st.integers(1, 24),
    redundancy=REDUNDANCY,
    racks=st.sampled_from([None, None, 12]),
    changes=st.lists(st.tuples(st.lists(st.integers(0, 30), max_size=4), st.integers(0, 5)), min_size=1, max_size=5),
)
def test_hosts_that_come_and_go(
    count: int, redundancy: ErasureCode | Replicas, racks: int | None, changes: list[tuple[list[int], int]]
) -> None:
    some, first = hosts(count, racks=racks), count
    try:
        placement = place(some, redundancy)
        for lost, joined in changes:
            gone = {some[i % len(some)].name for i in lost}
            some = [h for h in some if h.name not in gone] + hosts(joined, first=first, racks=racks)
            first += joined
            if not some:
                return
            before, placement = placement, place(some, redundancy, placement)
            check(placement, some)
            assert placement == place(list(reversed(some)), redundancy, before), "not the same for the same hosts"
            assert place(some, redundancy, placement) == placement, "moved for nothing"
    except UsageError:
        assert racks


def members(placement: Placement) -> set[tuple[str, ...]]:
    return {tuple(h.name for h in g.hosts) for g in placement.groups}


@pytest.mark.parametrize("lost", [1, 3])
def test_a_loss_moves_nobody_else(lost: int) -> None:
    """The other groups stay as they are; the hosts of this one stay together, in their order."""
    some = hosts(64)
    before = place(some, ErasureCode(6, 2))
    team = [h.name for h in before.groups[3].hosts]
    after = place([h for h in some if h.name not in team[:lost]], ErasureCode(6, 2), before)
    assert members(after) == (members(before) - {tuple(team)}) | {tuple(team[lost:])}
    again = place(some, ErasureCode(6, 2), after)
    assert members(again) == (members(before) - {tuple(team)}) | {(*team[lost:], *team[:lost])}


def test_new_hosts_take_the_places_of_lost_ones() -> None:
    some = hosts(32)
    before = place(some, ErasureCode(6, 2))
    first, second = ([h.name for h in g.hosts] for g in before.groups[:2])
    gone = {first[2], second[5], second[6]}
    after = place([h for h in some if h.name not in gone] + hosts(3, first=50), ErasureCode(6, 2), before)
    assert shape(after) == shape(before) and len(members(after) & members(before)) == 2
    for old, new in zip(before.groups, after.groups, strict=True):
        places = zip(old.hosts, new.hosts, strict=True)
        assert all(a == b or (a.name in gone and b.name >= "h050") for a, b in places)


def test_a_group_that_is_too_small_goes_and_its_hosts_join_others() -> None:
    some = hosts(32)
    before = place(some, ErasureCode(6, 2))
    team = [h.name for h in before.groups[1].hosts]
    after = place([h for h in some if h.name not in team[:4]], ErasureCode(6, 2), before)
    assert shape(after) == [(10, 8, 2), (9, 7, 2), (9, 7, 2)]
    for group in (g for i, g in enumerate(before.groups) if i != 1):
        old = [h.name for h in group.hosts]
        assert any(m[: len(old)] == tuple(old) for m in members(after)), "others were moved"


def test_enough_new_hosts_form_groups_of_their_own() -> None:
    some = hosts(16)
    before = place(some, ErasureCode(6, 2))
    after = place(some + hosts(9, first=16), ErasureCode(6, 2), before)
    assert members(before) < members(after) and shape(after)[0] == (9, 7, 2)


def test_names_and_nothing() -> None:
    with pytest.raises(UsageError, match="two hosts are called 'h001'"):
        place([*hosts(3), Host("h001", "x", 5)], Replicas(2))
    with pytest.raises(UsageError, match="no hosts"):
        place([], Replicas(2))
    with pytest.raises(UsageError, match="CKPT_DOMAIN"):
        place([Host(n, "rack", 5) for n in "abcd"], ErasureCode(2, 2))
    with pytest.raises(KeyError):
        place(hosts(3), Replicas(2)).group_of("nobody")


def test_sixteen_thousand_hosts() -> None:
    """Placed and, with some lost and others new, placed again; each rack costs a group one host at most."""
    some = hosts(16384, racks=1024)
    before = place(some, ErasureCode(6, 2))
    assert shape(before) == [(8, 6, 2)] * 2048
    rng = np.random.default_rng(0)
    gone = set(rng.choice(16384, 40, replace=False).tolist())
    left = [h for i, h in enumerate(some) if i not in gone] + hosts(3, first=20000, racks=1024)
    after = place(left, ErasureCode(6, 2), before)
    check(Placement(after.groups[:50]), [h for g in after.groups[:50] for h in g.hosts])
    touched = {before.group_of(some[i].name) for i in gone}
    assert len(members(before) - members(after)) <= len(touched)


def test_a_new_host_does_not_break_a_group_that_has_its_domain() -> None:
    some = hosts(24, racks=12)
    before = place(some, ErasureCode(6, 2))
    team = before.groups[0].hosts
    joins = Host("new", team[1].domain, 1000)
    left = [h for h in some if h != team[0]]
    after = place([*left, joins], ErasureCode(6, 2), before)
    check(after, [*left, joins])
    assert tuple(h.name for h in team[1:]) in members(after), "the group closes up"
    assert len(members(after) & members(before)) == 1, "and one of the others takes the new host"


def test_groups_do_not_grow_for_ever() -> None:
    """Hosts that come a few at a time join, until there are enough for another group."""
    placement = place(hosts(8), ErasureCode(6, 2))
    for count, groups in ((12, [12]), (14, [14]), (17, [9, 8]), (20, [10, 10]), (32, [12, 10, 10])):
        placement = place(hosts(count), ErasureCode(6, 2), placement)
        assert [n for n, _, _ in shape(placement)] == groups
