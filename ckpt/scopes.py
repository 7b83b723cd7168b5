"""Values of all ranks -> entries of the manifest, by the scope that each was declared with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ckpt.errors import LayoutError
from ckpt.format.manifest import ObjectEntry

__all__ = ["AUTO", "RANK", "REPLICATED", "ObjectLeaf", "merge_aliases", "merge_objects"]

AUTO, REPLICATED, RANK = "auto", "replicated", "rank"


@dataclass(frozen=True)
class ObjectLeaf:
    """One value under its name. `policy`: "auto" (compared; stored once or per rank), "replicated", "rank", or the
    coordinate it belongs to ("dp=1")."""

    name: str
    policy: str
    encoding: str
    text: str


def merge_objects(rows: Sequence[Sequence[Sequence[str]]]) -> tuple[list[ObjectEntry], list[str]]:
    """Entries of the manifest, and the names that differ between ranks although nobody said they would."""
    held: dict[str, list[tuple[int, ObjectLeaf]]] = {}
    for rank, objects in enumerate(rows):
        for row in objects:
            held.setdefault(row[0], []).append((rank, ObjectLeaf(*row)))
    out: list[ObjectEntry] = []
    undeclared = []
    for name, owners in sorted(held.items()):
        first = owners[0][1]
        equal = all(_same(o, first) for _, o in owners)
        if len({o.policy for _, o in owners}) > 1 and first.policy in (AUTO, REPLICATED):
            raise LayoutError(f"object {name!r} is declared differently on ranks {[r for r, _ in owners][:8]}")
        if first.policy == REPLICATED and not equal:
            other = next(r for r, o in owners if o.text != first.text)
            raise LayoutError(
                f"object {name!r} is declared replicated, but ranks {owners[0][0]} and {other} hold different values"
            )
        if first.policy in (AUTO, REPLICATED) and equal:
            out.append(ObjectEntry(name, "replicated", first.encoding, first.text))
        elif first.policy in (AUTO, "rank"):
            if first.policy == AUTO:
                undeclared.append(name)
            out += [ObjectEntry(name, f"rank={r}", o.encoding, o.text) for r, o in owners]
        else:
            out += _by_coordinate(name, owners)
    return out, undeclared


def _same(a: ObjectLeaf, b: ObjectLeaf) -> bool:
    """Equal values; the order in which a dict was filled does not count."""
    if (a.encoding, a.text) == (b.encoding, b.text):
        return True
    return a.encoding == b.encoding == "json" and json.dumps(json.loads(a.text), sort_keys=True) == json.dumps(
        json.loads(b.text), sort_keys=True
    )


def _by_coordinate(name: str, owners: Sequence[tuple[int, ObjectLeaf]]) -> list[ObjectEntry]:
    found: dict[str, tuple[int, ObjectLeaf]] = {}
    for rank, o in owners:
        there, known = found.setdefault(o.policy, (rank, o))
        if known.text != o.text:
            raise LayoutError(f"object {name!r}: ranks {there} and {rank} share {o.policy} but hold different values")
    return [ObjectEntry(name, scope, o.encoding, o.text) for scope, (_, o) in sorted(found.items())]


def merge_aliases(rows: Sequence[Mapping[str, str]]) -> dict[str, str]:
    out: dict[str, str] = {}
    for row in rows:
        out.update(row)
    return out
