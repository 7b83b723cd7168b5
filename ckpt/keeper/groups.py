"""Which hosts keep what for each other: pure placement of chunks and parity.

A group is some hosts of different failure domains, in an order. Every host keeps its own segment (its packs, one behind
the other) whole; the segment is cut into `data` chunks, one in each of as many stripes. A group of n hosts has n stripes:

    stripe s    parity rows 0 .. m-1 on hosts s .. s+m-1, data chunks 0 .. k-1 of hosts s+m .. s+m+k-1, all modulo n

so that no host has two chunks of a stripe, every host keeps m parity chunks, and any m hosts that are lost cost each
stripe m chunks at most. With n = k + m that is a rotating code, as in RAID 5; whole replicas are k = 1, in groups of any
n above m, where parity is a copy.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ckpt.config import ErasureCode, Replicas
from ckpt.errors import UsageError
from ckpt.keeper.erasure import MOST

__all__ = ["Chunk", "Group", "Host", "Parity", "Placement", "Share", "Stripe", "place"]

_GRAIN = 64  # bytes; chunks begin at multiples of it
_WHOLE = 4  # fewer hosts than this keep whole replicas


@dataclass(frozen=True)
class Host:
    """A host of the job: its name, its failure domain (what may fail at once, such as a rack), bytes of its segment."""

    name: str
    domain: str
    nbytes: int


@dataclass(frozen=True)
class Chunk:
    """Bytes `start` to `stop` of a host's segment: data chunk `number` of a stripe, whose parity `keepers` have, by row.

    Empty (start == stop) where a segment has fewer bytes than chunks; it counts as present.
    """

    stripe: int
    number: int
    start: int
    stop: int
    keepers: tuple[str, ...]


@dataclass(frozen=True)
class Parity:
    """Parity row `row` of a stripe, `nbytes` at `offset` of a host's parity area: of data chunks `sources`, by number."""

    stripe: int
    row: int
    offset: int
    nbytes: int
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Share:
    """What one host has of its group's stripes. A parity area takes `parity_bytes`, and there are two."""

    host: Host
    chunks: tuple[Chunk, ...]
    parity: tuple[Parity, ...]

    @property
    def parity_bytes(self) -> int:
        return max((p.offset + p.nbytes for p in self.parity), default=0)


@dataclass(frozen=True)
class Stripe:
    """One stripe over the hosts of a group: (host, start, stop) of its segment by data chunk, (host, offset, nbytes) of
    its parity area by row."""

    number: int
    data: tuple[tuple[str, int, int], ...]
    parity: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Group:
    """Hosts in order, `data` and `parity` chunks a stripe. Any `parity` of them may be lost. Parity 0: it is not protected."""

    hosts: tuple[Host, ...]
    data: int
    parity: int

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(h.name for h in self.hosts)

    @cached_property
    def shares(self) -> Mapping[str, Share]:
        """By the host's name."""
        chunks: dict[str, list[Chunk]] = {h.name: [] for h in self.hosts}
        kept: dict[str, list[Parity]] = {h.name: [] for h in self.hosts}
        n = len(self.hosts)
        for s in range(n if self.parity else 0):
            keepers = tuple(self.hosts[(s + r) % n].name for r in range(self.parity))
            sources = [self.hosts[(s + self.parity + i) % n] for i in range(self.data)]
            longest = 0
            for i, host in enumerate(sources):
                size = _chunk_size(host.nbytes, self.data)
                start = min(size * (self.data - 1 - i), host.nbytes)
                stop = min(start + size, host.nbytes)
                chunks[host.name].append(Chunk(s, i, start, stop, keepers))
                longest = max(longest, stop - start)
            for r, name in enumerate(keepers):
                offset = sum(_rounded(p.nbytes) for p in kept[name])
                kept[name].append(Parity(s, r, offset, longest, tuple(h.name for h in sources)))
        return {
            h.name: Share(h, tuple(sorted(chunks[h.name], key=lambda c: c.start)), tuple(kept[h.name]))
            for h in self.hosts
        }

    @cached_property
    def stripes(self) -> tuple[Stripe, ...]:
        """By number."""
        data: list[dict[int, tuple[str, int, int]]] = [{} for _ in self.hosts]
        parity: list[dict[int, tuple[str, int, int]]] = [{} for _ in self.hosts]
        for name, share in self.shares.items():
            for c in share.chunks:
                data[c.stripe][c.number] = (name, c.start, c.stop)
            for p in share.parity:
                parity[p.stripe][p.row] = (name, p.offset, p.nbytes)
        return tuple(
            Stripe(s, tuple(d[i] for i in sorted(d)), tuple(p[r] for r in sorted(p)))
            for s, (d, p) in enumerate(zip(data, parity, strict=True))
        )


def _rounded(nbytes: int) -> int:
    return -(-nbytes // _GRAIN) * _GRAIN


def _chunk_size(nbytes: int, data: int) -> int:
    return _rounded(-(-nbytes // data))


@dataclass(frozen=True)
class Placement:
    """All hosts of a job in groups; every host is in one."""

    groups: tuple[Group, ...]

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset().union(*(g.names for g in self.groups))

    def group_of(self, host: str) -> int:
        """The number of a host's group. Raises KeyError for a host that is in none."""
        return self._where[host]

    @cached_property
    def _where(self) -> dict[str, int]:
        return {h.name: i for i, g in enumerate(self.groups) for h in g.hosts}


def place(hosts: Collection[Host], redundancy: ErasureCode | Replicas, before: Placement | None = None) -> Placement:
    """Groups of `hosts`, each of hosts of different domains; the same for the same arguments, in any order of `hosts`.

    Groups have data + parity hosts where these are enough, and up to twice as many where a remainder would make a group
    with less than half of `data`; fewer hosts are one group that keeps `parity` and has less data; fewer than four keep
    whole replicas. With fewer hosts than parity + 1 there is only the parity that they allow: see `Group.parity`.

    `before`: the groups until now. Those that can stay do, with every host in its place; new hosts take the places of
    lost ones, then form groups of their own or join the smallest.

    Raises UsageError if two hosts have one name, and, naming it, if a domain has so many of the hosts that groups of
    parity + 1 different domains cannot be made.
    """
    ordered = sorted(hosts, key=lambda h: h.name)
    if not ordered:
        raise UsageError("no hosts to place anything on")
    for a, b in itertools.pairwise(ordered):
        if a.name == b.name:
            raise UsageError(f"two hosts are called {a.name!r}; give each a name of its own with CKPT_HOST")
    wanted = _Wanted.of(redundancy, len(ordered))
    wanted.check(ordered)
    known = {h.name: h for h in ordered}
    teams = _kept(before, known, wanted) if before is not None else []
    there = {h.name for team in teams for h in team}
    teams = _joined(teams, [h for h in ordered if h.name not in there], wanted) or _dealt(ordered, wanted)
    return Placement(tuple(wanted.group(team) for team in sorted(teams, key=lambda t: t[0].name)))


@dataclass(frozen=True)
class _Wanted:
    """What groups should be: `data` + `parity` hosts, not below `least` or above `most`; whole replicas or not."""

    data: int
    parity: int
    copies: bool

    @classmethod
    def of(cls, redundancy: ErasureCode | Replicas, hosts: int) -> _Wanted:
        if isinstance(redundancy, Replicas):
            return cls(1, min(redundancy.copies - 1, hosts - 1), True)
        if hosts < _WHOLE:
            return cls(1, min(redundancy.parity, hosts - 1), True)
        return cls(redundancy.data, min(redundancy.parity, hosts - 1), False)

    @property
    def size(self) -> int:
        return self.data + self.parity

    @property
    def least(self) -> int:
        """Below this a group is no longer worth its memory: parity is twice as large a part as was asked for."""
        return self.parity + -(-self.data // 2)

    @property
    def most(self) -> int:
        return min(2 * self.size - 1, MOST)

    def group(self, team: Sequence[Host]) -> Group:
        return Group(tuple(team), 1 if self.copies else len(team) - self.parity, self.parity)

    def check(self, hosts: Sequence[Host]) -> None:
        """Whether groups can be made at all: each has parity + 1 hosts or more, and one of a domain at most."""
        domain, count = _largest(hosts)
        groups = len(hosts) // (self.parity + 1)
        if count > groups:
            raise UsageError(
                f"failure domain {domain!r} has {count} of {len(hosts)} hosts; with parity {self.parity} there are "
                f"{groups} group{'s' * (groups != 1)} of {self.parity + 1} or more hosts at most, each with one host of a "
                "domain: ask for less parity, spread the job over more domains, or name smaller ones with CKPT_DOMAIN"
            )

    def count(self, hosts: Sequence[Host]) -> int:
        """How many groups to make of hosts."""
        many, rest = divmod(len(hosts), self.size)
        many += rest >= self.least
        return min(max(many, _largest(hosts)[1], -(-len(hosts) // MOST), 1), max(1, len(hosts) // (self.parity + 1)))


def _largest(hosts: Sequence[Host]) -> tuple[str, int]:
    """The domain with most hosts, and how many."""
    return min(Counter(h.domain for h in hosts).items(), key=lambda item: (-item[1], item[0]))


def _dealt(hosts: Sequence[Host], wanted: _Wanted) -> list[list[Host]]:
    """New groups, like cards: domain by domain, so that no group gets two hosts of one."""
    sizes = Counter(h.domain for h in hosts)
    cards = sorted(hosts, key=lambda h: (-sizes[h.domain], h.domain, h.name))
    many = wanted.count(hosts)
    return [cards[i::many] for i in range(many)]


def _kept(before: Placement, known: Mapping[str, Host], wanted: _Wanted) -> list[list[Host]]:
    """The groups of before as far as they can stay; lost hosts are replaced, or the places close up."""
    old = {h.name for g in before.groups for h in g.hosts}
    new = [h for name, h in sorted(known.items()) if name not in old]
    teams = []
    for group in sorted(before.groups, key=lambda g: (len([h for h in g.hosts if h.name in known]), g.hosts[0].name)):
        team = [known.get(h.name) for h in group.hosts]
        domains = [h.domain for h in team if h]
        for seat, host in enumerate(team):
            found = next((h for h in new if h.domain not in domains), None)
            if host is None and found is not None:
                new.remove(found)
                team[seat] = found
                domains.append(found.domain)
        teams.append([h for h in team if h])
    return [t for t in teams if wanted.least <= len(t) <= wanted.most and len({h.domain for h in t}) == len(t)]


def _joined(teams: list[list[Host]], new: Sequence[Host], wanted: _Wanted) -> list[list[Host]]:
    """Groups with hosts that are in none: groups of their own if there are enough, else in the smallest that have no host
    of their domain. Nothing if that cannot be had without touching other groups."""
    if not teams:
        return []
    left: Sequence[Host] = new
    if len(new) >= wanted.least and _largest(new)[1] <= len(new) // wanted.least:
        teams, left = [*teams, *_dealt(new, wanted)], ()
    for host in left:
        fit = [t for t in teams if len(t) < wanted.most and host.domain not in {h.domain for h in t}]
        if not fit:
            return []
        min(fit, key=len).append(host)
    return teams
