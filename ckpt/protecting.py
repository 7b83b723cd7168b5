"""What the ranks agree on before snapshots are protected: slots, what of them a step takes, and whether there is a way."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ckpt.collective import Group
from ckpt.config import ErasureCode, Replicas
from ckpt.errors import DeadlineError, PeerError, from_wire
from ckpt.keeper.member import Member
from ckpt.keeper.wire import encode_redundancy

__all__ = ["Slots", "agree_on_slots", "ask_protection"]

log = logging.getLogger("ckpt")


@dataclass(frozen=True)
class Slots:
    """`numbers` of the slots of a plan, the same on all ranks; `extents`: by rank, bytes of a slot that a step may take;
    `redundancy` None where there is nothing to protect them on."""

    numbers: tuple[int, ...]
    extents: tuple[int, ...]
    redundancy: ErasureCode | Replicas | None = None

    def told(self) -> dict[str, Any]:
        """As the keeper is told."""
        redundancy = encode_redundancy(self.redundancy)
        return {"slots": list(self.numbers), "extents": list(self.extents), "redundancy": redundancy}


def agree_on_slots(
    group: Group, member: Member, need: int, storing: bool, redundancy: ErasureCode | Replicas | None
) -> Slots:
    """Collective: those that are large enough on all ranks, then new ones.

    Two, or with saves to storage three, so that one can be written to while the newest complete step stays. With protection
    one more: the announced step stays, too, while the newest one is encoded.
    """
    hosts = len(set(member.ranks.values()))
    if redundancy is not None and hosts < 2:
        if group.rank == 0:
            log.warning("ckpt: %s protects nothing: the job has one host, and what is lost with it is lost", redundancy)
        redundancy = None
    count = 2 + storing + (redundancy is not None)
    used = max([member.used, *(n + 1 for n in member.slots)])
    mine = [used, [n for n, s in member.slots.items() if s.size >= need], need]
    told = json.loads(group.round("slots", json.dumps(mine).encode(), lambda all_: _choose(all_, count)))
    return Slots(tuple(told[0]), tuple(told[1]), redundancy)


def _choose(letters: Sequence[bytes], count: int) -> bytes:
    """The slots of a life: those that fit on all ranks, then new ones, under numbers that no keeper knows; and the needs."""
    ranks = [json.loads(text) for text in letters]
    fit = sorted(set.intersection(*(set(numbers) for _, numbers, _ in ranks)))[:count]
    first = max(used for used, _, _ in ranks)
    return json.dumps([[*fit, *range(first, first + count - len(fit))], [need for _, _, need in ranks]]).encode()


def ask_protection(member: Member, generation: int) -> None:
    """Waits until the keeper of this host has the memory that protection takes. Raises CapacityError if it cannot have it,
    UsageError if no groups of hosts can be made. If not all keepers can be reached there is no protection yet, which is
    said; training goes on."""
    try:
        answer = member.link.ask("protected", timeout=member.deadline, generation=generation)
    except (DeadlineError, PeerError) as e:
        log.error("ckpt: no protection yet: %s", e)
        return
    if "error" in answer.head:
        raise from_wire(*answer["error"])
    if "why" in answer.head:
        log.error("ckpt: no protection yet: %s", answer["why"])
