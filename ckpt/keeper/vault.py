"""What lies in a keeper's memory: slots of its ranks, sealed parts, plans, and the steps that these make whole."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from ckpt.keeper.holding import Held, Memory, Part, decode_plan
from ckpt.keeper.lead import Complete, Key, Lead
from ckpt.plan import Plan

__all__ = ["Vault"]


class Vault:
    """Which slot is in which state is the lead's to know; this is what is in them."""

    def __init__(self) -> None:
        self.held: dict[Key, Held] = {}
        self._memory: dict[tuple[int, int], Memory] = {}  # by rank and slot
        self._parts: dict[tuple[Key, int], tuple[str, Part]] = {}  # by step and rank: (plan, part)
        self._plans: dict[str, tuple[Plan, Mapping[str, str]]] = {}

    def of(self, rank: int) -> list[tuple[int, Memory]]:
        """(slot, memory) of a rank."""
        return sorted((slot, m) for (r, slot), m in self._memory.items() if r == rank)

    def put(self, rank: int, slots: Sequence[int], fds: Sequence[int], *, replace: bool) -> None:
        """Takes memory into its care; what it has already stays or goes, as `replace` says."""
        for slot, fd in zip(slots, fds, strict=True):
            old = self._memory.get((rank, slot))
            if old is not None and not replace:
                os.close(fd)
                continue
            if old is not None:
                old.close()
            self._memory[rank, slot] = Memory(fd, os.fstat(fd).st_size)

    def take_away(self, rank: int, slots: Sequence[int]) -> None:
        """Never uses this memory again."""
        for slot in slots:
            memory = self._memory.pop((rank, slot), None)
            if memory is not None:
                memory.close()

    def plan(self, key: str, message: bytes) -> None:
        self._plans[key] = decode_plan(message)

    def seal(self, key: Key, rank: int, plan: str, part: Part) -> None:
        self._parts[key, rank] = plan, part

    def drop(self, key: Key) -> None:
        """The parts of a step that is void."""
        for k in [k for k in self._parts if k[0] == key]:
            del self._parts[k]

    def complete(self, d: Complete, world: int) -> None:
        """All parts of a step are there."""
        mine = {rank: self._parts.pop((d.key, rank)) for rank in range(world)}
        plan, aliases = self._plans[mine[0][0]]
        memory = {rank: self._memory[rank, d.slot] for rank in mine if (rank, d.slot) in self._memory}
        self.held[d.key] = Held(*d.key, d.slot, plan, aliases, {r: part for r, (_, part) in mine.items()}, memory)

    def newest(self) -> Key | None:
        return max(self.held, default=None)

    def forget(self, lead: Lead) -> None:
        """Lets go of steps and memory that no slot stands for any more."""
        whole = lead.complete()
        for key in [k for k in self.held if k not in whole]:
            del self.held[key]
        for rank, slot in [k for k in self._memory if k[1] not in lead.slots]:
            self._memory.pop((rank, slot)).close()
        used = {id(h.plan) for h in self.held.values()}
        for name in [n for n, (plan, _) in self._plans.items() if id(plan) not in used][:-2]:
            del self._plans[name]
