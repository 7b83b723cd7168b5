"""What lies in a keeper's memory: slots of its ranks, sealed parts, plans, and the steps that these make whole."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence

from ckpt.keeper.holding import Held, Memory, Part, decode_plan
from ckpt.keeper.lead import Key
from ckpt.keeper.protocol import Frame
from ckpt.plan import Plan
from ckpt.write import decode_report

__all__ = ["Vault"]


class Vault:
    """Which slot is in which state is the lead's to know; this is what is in them."""

    def __init__(self) -> None:
        self.held: dict[Key, Held] = {}
        self._memory: dict[tuple[int, int], Memory] = {}  # by rank and slot
        self._needed: set[int] = set()
        self._plans: dict[str, tuple[bytes, Plan, Mapping[str, str]]] = {}  # as it came, and what it says

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

    def memory(self, rank: int, slot: int) -> Memory:
        """A rank's part of a slot."""
        return self._memory[rank, slot]

    def plan_of(self, key: str) -> Plan:
        """A plan by its name."""
        return self._plans[key][1]

    def take_away(self, rank: int, slots: Sequence[int]) -> None:
        """Never uses this memory again."""
        for slot in slots:
            memory = self._memory.pop((rank, slot), None)
            if memory is not None:
                memory.close()

    def plan(self, key: str, message: bytes) -> None:
        """A plan, under the name that parts refer to it by."""
        self._plans[key] = message, *decode_plan(message)

    def encoded_plans(self) -> list[tuple[str, bytes]]:
        """(name, plan), as they came."""
        return [(key, text) for key, (text, _, _) in self._plans.items()]

    def complete(self, order: Frame, hosts: Mapping[int, str], here: str) -> None:
        """A step is whole: here are the parts of all ranks, of which this host's are in its memory."""
        key, slot = (int(order["key"][0]), int(order["key"][1])), int(order["slot"])
        _, plan, aliases = self._plans[str(order["plan"])]
        parts: dict[int, Part] = {}
        at, world = 0, len(order["parts"])
        for rank, (objects, metrics, n, folded) in enumerate(order["parts"]):
            parts[rank] = Part(decode_report(order.payload[at : at + n - folded]), objects, metrics)
            if folded:
                parts[world + rank] = Part(
                    decode_report(order.payload[at + n - folded : at + n]), [], {}, averages=True
                )
            at += n
        of = {writer: writer % world for writer in parts}  # whose memory it is in
        memory = {w: self._memory[r, slot] for w, r in of.items() if hosts.get(r) == here and (r, slot) in self._memory}
        there = {w: hosts[r] for w, r in of.items() if r in hosts}
        for old in [k for k, h in self.held.items() if h.slot == slot]:
            del self.held[old]
        self.held[key] = Held(*key, slot, plan, aliases, parts, memory, there)

    def forget(self, steps: Collection[Key], slots: Collection[int]) -> None:
        """Lets go of all steps but these, and of the slots that were needed before and are not now: one that was never
        named has only just come."""
        for key in [k for k in self.held if k not in steps]:
            del self.held[key]
        gone, self._needed = self._needed - set(slots), set(slots)
        for rank, slot in [k for k in self._memory if k[1] in gone]:
            self._memory.pop((rank, slot)).close()
        used = {id(h.plan) for h in self.held.values()}
        for name in [n for n, (_, plan, _) in self._plans.items() if id(plan) not in used][:-2]:
            del self._plans[name]

    def close(self) -> None:
        """Lets go of everything."""
        self.held.clear()
        for memory in self._memory.values():
            memory.close()
        self._memory.clear()

    @property
    def slots(self) -> int:
        """One more than the highest number of a slot."""
        return 1 + max((slot for _, slot in self._memory), default=-1)

    @property
    def nbytes(self) -> int:
        """Bytes of memory in its care."""
        return sum(m.size for m in self._memory.values())
