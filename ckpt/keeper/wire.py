"""What keepers and trainers tell each other of protection: groups, where packs lie in segments, inventories; as JSON.

Placements are said once and referred to by number, since the steps of a life share them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckpt.config import ErasureCode, Replicas
from ckpt.errors import FormatError
from ckpt.keeper.groups import Group, Host, Placement
from ckpt.keeper.guard import Area, Inventory
from ckpt.keeper.lead import Key

__all__ = [
    "Holding",
    "Layout",
    "decode_holding",
    "decode_layout",
    "decode_redundancy",
    "encode_holding",
    "encode_layout",
    "encode_redundancy",
]


@dataclass(frozen=True)
class Layout:
    """How the steps of a plan lie on the hosts of a life.

    The hosts of the placement are called by their keepers' names, which are of one life of a keeper each (`h3#9f12ab07`).
    ranks    by rank: (name of its host, offset in that host's segment, bytes there, of which its pack comes first)
    """

    placement: Placement
    ranks: tuple[tuple[str, int, int], ...]

    def of(self, name: str) -> list[tuple[int, int, int]]:
        """(rank, offset, bytes) of what makes a host's segment, in order."""
        return [(rank, at, n) for rank, (host, at, n) in enumerate(self.ranks) if host == name]


@dataclass(frozen=True)
class Holding:
    """What one keeper says it holds: its inventory, and what is needed to make sense of it.

    host       as people and CKPT_HOST call it; `inventory.host` is of this life of its keeper
    slots      the slot of each step in the inventory's `whole`
    layouts    of the steps in `whole`, and of those that its areas encode as far as it knows them
    """

    host: str
    inventory: Inventory
    slots: Mapping[Key, int] = field(default_factory=dict)
    layouts: Mapping[Key, Layout] = field(default_factory=dict)


def encode_redundancy(redundancy: ErasureCode | Replicas | None) -> list[int] | None:
    if redundancy is None:
        return None
    return [redundancy.copies] if isinstance(redundancy, Replicas) else [redundancy.data, redundancy.parity]


def decode_redundancy(told: Sequence[int] | None) -> ErasureCode | Replicas | None:
    if told is None:
        return None
    return Replicas(told[0]) if len(told) == 1 else ErasureCode(*told)


def _placement(p: Placement) -> Any:
    return [[[[h.name, h.domain, h.nbytes] for h in g.hosts], g.data, g.parity] for g in p.groups]


def _placed(told: Any) -> Placement:
    groups = []
    for hosts, data, parity in told:
        team = tuple(Host(str(name), str(domain), int(n)) for name, domain, n in hosts)
        data, parity = int(data), int(parity)
        if (
            not team
            or data < 1
            or parity < 0
            or (parity and data + parity > len(team))
            or min(h.nbytes for h in team) < 0
        ):
            raise FormatError(f"a group of {len(team)} hosts cannot have {data} + {parity} chunks a stripe")
        groups.append(Group(team, data, parity))
    return Placement(tuple(groups))


def encode_layout(layout: Layout) -> dict[str, Any]:
    return {"groups": _placement(layout.placement), "ranks": [list(r) for r in layout.ranks]}


def decode_layout(told: Mapping[str, Any]) -> Layout:
    """Raises FormatError for what is none."""
    try:
        ranks = tuple((str(name), int(at), int(n)) for name, at, n in told["ranks"])
        return Layout(_placed(told["groups"]), ranks)
    except (KeyError, TypeError, ValueError) as e:
        raise FormatError(f"not a layout of segments ({type(e).__name__}: {e})") from None


def _keys(told: Iterable[Sequence[Any]]) -> list[Key]:
    return [(int(g), int(s)) for g, s in told]


def encode_holding(holding: Holding) -> dict[str, Any]:
    """As JSON knows it."""
    placements: dict[Placement, int] = {}
    layouts: dict[Layout, int] = {}
    i = holding.inventory

    def number(placement: Placement) -> int:
        return placements.setdefault(placement, len(placements))

    whole = [[*key, number(p)] for key, p in sorted(i.whole.items())]
    areas = [None if a is None else [*a.key, number(a.placement)] for a in i.areas]
    laid = [[*key, layouts.setdefault(at, len(layouts))] for key, at in sorted(holding.layouts.items())]
    ranks = [[number(at.placement), [list(r) for r in at.ranks]] for at in layouts]
    return {
        "host": holding.host,
        "name": i.host,
        "whole": whole,
        "areas": areas,
        "spoiled": [list(k) for k in sorted(i.spoiled)],
        "slots": [[*key, slot] for key, slot in sorted(holding.slots.items())],
        "layouts": laid,
        "ranks": ranks,
        "placements": [_placement(p) for p in placements],
    }


def decode_holding(told: Mapping[str, Any]) -> Holding:
    """Raises FormatError for what is none."""
    try:
        placements = [_placed(p) for p in told["placements"]]
        layouts = [
            Layout(placements[int(n)], tuple((str(name), int(at), int(size)) for name, at, size in ranks))
            for n, ranks in told["ranks"]
        ]
        first, second = (
            None if a is None else Area((int(a[0]), int(a[1])), placements[int(a[2])]) for a in told["areas"]
        )
        whole = {(int(g), int(s)): placements[int(n)] for g, s, n in told["whole"]}
        inventory = Inventory(str(told["name"]), whole, (first, second), frozenset(_keys(told["spoiled"])))
        slots = {(int(g), int(s)): int(n) for g, s, n in told["slots"]}
        laid = {(int(g), int(s)): layouts[int(n)] for g, s, n in told["layouts"]}
        return Holding(str(told["host"]), inventory, slots, laid)
    except FormatError:
        raise
    except (KeyError, TypeError, ValueError, IndexError) as e:
        raise FormatError(f"not an inventory ({type(e).__name__}: {e})") from None
