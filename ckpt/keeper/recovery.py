"""Which step to go on from, out of what the hosts that are left say they hold: a pure choice.

A step can be had if every host of its placement has its part, or if no group misses more parts than the parity that is
left of it makes up for. Those that may be chosen are the ones that the next life holds on to (`Guard.resume`, by the same
code): the newest that was encoded by all hosts which answer, and a newer one that is whole on all of its hosts. What is
encoded only here and there might be rebuilt, but is given up by the rules of the next life, and so not chosen.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ckpt.keeper.groups import Placement
from ckpt.keeper.guard import Guard, Inventory
from ckpt.keeper.lead import Key

__all__ = ["Candidate", "Choice", "choose"]

_SHOWN = 5


@dataclass(frozen=True)
class Candidate:
    """A step that can be had. `parts`: hosts whose part is where it was, `parity`: hosts with all of their parity, `lost`:
    hosts whose part has to be decoded."""

    key: Key
    placement: Placement
    parts: frozenset[str]
    parity: frozenset[str]

    @property
    def lost(self) -> frozenset[str]:
        return self.placement.names - self.parts


@dataclass(frozen=True)
class Choice:
    """The steps that can be had, newest first, and why newer ones, that some host knows of, cannot: (step, sentence)."""

    steps: tuple[Candidate, ...]
    missed: tuple[tuple[Key, str], ...]


def choose(inventories: Collection[Inventory]) -> Choice:
    """What to go on from, by what all hosts hold that could be reached."""
    guard, _ = Guard.resume(sys.maxsize, Placement(()), inventories)
    by_host = {i.host: i for i in inventories}
    held = guard.held()
    known = {key: placed for i in inventories for key, placed in i.whole.items()}
    known |= {a.key: a.placement for i in inventories for a in i.areas if a is not None}
    if guard.announced is not None:
        known[guard.announced.key] = guard.announced.placement
    area = guard.area if guard.announced is not None else None
    steps = [
        _candidate(key, known[key], area if guard.announced and key == guard.announced.key else None, by_host)
        for key in sorted(held, reverse=True)
    ]
    newest = max(held, default=(-1, -1))
    missed = [(key, _why(key, known[key], by_host)) for key in sorted(known, reverse=True) if key > newest]
    return Choice(tuple(steps), tuple(missed))


def _candidate(key: Key, placement: Placement, area: int | None, by_host: Mapping[str, Inventory]) -> Candidate:
    there = [by_host[n] for n in placement.names if n in by_host and key not in by_host[n].spoiled]
    parts = frozenset(i.host for i in there if key in i.whole)
    coded = frozenset(i.host for i in there if area is not None and i.covers(key, placement, area))
    return Candidate(key, placement, parts, coded)


def _why(key: Key, placement: Placement, by_host: Mapping[str, Inventory]) -> str:
    """What is in the way of a step."""
    out = []
    for group in placement.groups:
        gone = sorted(n for n in group.names if n not in by_host)
        spoiled = sorted(n for n in group.names if n in by_host and key in by_host[n].spoiled)
        without = sorted(n for n in group.names - {*gone, *spoiled} if key not in by_host[n].whole)
        missing = len(gone) + len(spoiled) + len(without)
        parts = [("gone", gone), ("damaged in memory", spoiled), ("there without it", without)]
        said = "; ".join(f"{what}: {_names(names)}" for what, names in parts if names)
        if missing > group.parity:
            bears = f"of which any {group.parity} may be missing" if group.parity else "none of which may be missing"
            out.append(f"{missing} of a group of {len(group.hosts)} hosts, {bears}, do not have it ({said})")
        elif missing:
            out.append(f"its parity was not complete yet when hosts were lost ({said})")
    return "; ".join(out) or "it was not complete yet on all hosts"


def _names(names: Collection[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(sorted(names)[:_SHOWN]) + more
