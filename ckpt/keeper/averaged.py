"""The second pack of a rank: accumulators of running averages, cut as the snapshot is, behind it in the same slot.

    slot of rank r    0                      the snapshot's pack, written by rank r
                      pack_start(its size)   the averages' pack, of writer world + r
    leaf              averages.<average>.<leaf of the state>, in the type of `ACCUMULATORS`; cut as that leaf is, or as the
                      leaf that it is folded from, its float32 master
    value             __ckpt__.averages: JSON text, what each average remembers (`Progress`)

A plan with averages holds both kinds of packs, so whoever stores, reads, encodes or commits packs by their writer's number
need not know of averages. All of this follows from the snapshot's plan, the names of the averages, and which leaves are
averaged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ckpt.errors import FormatError
from ckpt.format.pack import ALIGN, Piece, TensorSpec
from ckpt.keeper.protocol import Frame
from ckpt.merge.average import AVERAGES, NOTES, Progress
from ckpt.merge.fold import ACCUMULATORS
from ckpt.plan import Plan

__all__ = [
    "decode_progress",
    "encode_progress",
    "pack_start",
    "refused",
    "summary",
    "with_averages",
    "averaged_aliases",
    "averaged_pieces",
]


def pack_start(size: int) -> int:
    """Where the averages' pack begins in a slot, behind a snapshot's pack of `size` bytes."""
    return -(-size // ALIGN) * ALIGN


Leaves = Mapping[str, str]
"""Leaves that are folded -> the leaf whose average that is: itself, or the parameter that it is the master of."""


def _spec(average: str, spec: TensorSpec, leaves: Leaves) -> TensorSpec:
    return TensorSpec(
        f"{AVERAGES}.{average}.{leaves[spec.name]}", ACCUMULATORS[spec.dtype], spec.shape, "", spec.layout
    )


def _counts(spec: TensorSpec, leaves: Leaves) -> bool:
    """Whether a stored tensor is averaged: what is stored per rank belongs to a rank, not to the model."""
    return not spec.variant and spec.dtype in ACCUMULATORS and spec.name in leaves


def averaged_pieces(
    pieces: Sequence[Piece], averages: Sequence[str], leaves: Leaves
) -> list[tuple[Piece, list[Piece]]]:
    """Of the pieces of a snapshot, those that are averaged, each with the pieces of its accumulators."""
    return [
        (p, [Piece(_spec(name, p.tensor, leaves), p.box) for name in averages])
        for p in pieces
        if _counts(p.tensor, leaves)
    ]


def with_averages(plan: Plan, world: int, averages: Sequence[str], leaves: Leaves) -> Plan:
    """The plan with the packs of the averages: what rank r writes of a leaf, writer `world` + r writes of its averages."""
    counted = [t for t, spec in enumerate(plan.tensors) if _counts(spec, leaves)]
    place = np.full(len(plan.tensors), -1, dtype=np.int64)
    place[counted] = np.arange(len(counted))
    rows = np.flatnonzero(place[plan.tensor] >= 0)
    tensors, rank, tensor, local, box = list(plan.tensors), [], [], [], []
    for name in averages:
        first = len(tensors)
        tensors += [_spec(name, plan.tensors[t], leaves) for t in counted]
        rank.append(plan.rank[rows] + world)
        tensor.append(first + place[plan.tensor[rows]])
        local.append(plan.local[rows])
        box.append(plan.box[rows])
    new = np.concatenate(rank) if rank else np.empty(0, dtype=np.int64)
    order = np.argsort(new, kind="stable")
    return replace(
        plan,
        tensors=tuple(tensors),
        rank=np.concatenate([plan.rank, new[order]]),
        tensor=np.concatenate([plan.tensor, np.concatenate(tensor)[order]]),
        local=np.concatenate([plan.local, np.concatenate(local)[order]]),
        box=np.concatenate([plan.box, np.concatenate(box)[order]]),
    )


def averaged_aliases(aliases: Mapping[str, str], averages: Sequence[str], leaves: Leaves) -> dict[str, str]:
    """The aliases of a snapshot, and those of its averages: what is tied has one average under all of its names."""
    averaged = set(leaves.values())
    new = {
        f"{AVERAGES}.{name}.{other}": f"{AVERAGES}.{name}.{stored}"
        for name in averages
        for other, stored in aliases.items()
        if stored in averaged
    }
    return {**aliases, **new}


def encode_progress(progress: Mapping[str, Progress]) -> str:
    """As it stands in a manifest and goes from process to process; the same text for the same progress."""
    return json.dumps({name: p.to_json() for name, p in sorted(progress.items())}, sort_keys=True)


def decode_progress(text: str, where: str) -> dict[str, Progress]:
    """Raises FormatError."""
    try:
        return {str(name): Progress.from_json(content) for name, content in json.loads(text).items()}
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise FormatError(f"{where}: what its averages remember cannot be read ({type(e).__name__}: {e})") from None


def refused(parts: Sequence[Frame]) -> str:
    """Why a rank refused to fold a step that another rank folded; "" if they are of one mind."""
    whys = [str(p.head.get("refused", "")) for p in parts if "folded" in p.head]
    return next((w for w in whys if w), "") if not all(whys) else ""


def summary(parts: Sequence[Frame]) -> dict[str, Any] | None:
    """What trainers are told about the averages of a step that is whole: what they remember, why it was not folded if it
    was not, and how far each is from the step: |A - theta| / |theta| over a sample of all elements."""
    told = [p for p in parts if "folded" in p.head]
    if not told:
        return None
    drift = {}
    for name in told[0]["drift"]:
        above, below = (sum(float(p["drift"][name][k]) for p in told) for k in (0, 1))
        drift[name] = (above / below) ** 0.5 if below > 0 else 0.0
    text = next(text for name, _, _, text in told[0]["objects"] if name == NOTES)
    return {"progress": json.loads(text), "drift": drift, "refused": told[0]["refused"]}
