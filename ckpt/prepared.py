"""What every snapshot of a life is made with: the plan, and where its bytes are in the state.

Planning reads no tensor: plain tensors of one name are taken for copies of one another, and every sealed part carries
their digests. A step whose copies differ is void, and what differed is stored per rank from then on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ckpt.averaging import Averages
from ckpt.collective import Group
from ckpt.keeper.holding import encode_plan
from ckpt.leading import Planning
from ckpt.plan import PLAIN
from ckpt.roll import Called, Roll
from ckpt.saving import Planner, Work, agree_on_plan, prepare
from ckpt.shards import Held
from ckpt.snapshot.fence import fence_here, owned_storages
from ckpt.source import source_of
from ckpt.state import Leaves, walk
from ckpt.write import Source

__all__ = ["Prepared", "Preparing", "copy_of"]

log = logging.getLogger("ckpt")


def copy_of(name: str, held: Held) -> str:
    """Under which name the keepers compare this rank's copy of a tensor with those of others: a shard only with the same
    shard on another mesh."""
    return name if held.kind == PLAIN else f"{name} at {' '.join(str(box) for box, _ in held.pieces)}"


@dataclass
class Prepared:
    """`sources` and `lazy` by the pieces of the work; `hashed`: name, tensor, whether it may wait until the fence falls;
    `index`: tensor name -> its pieces."""

    work: Work
    key: str
    sources: list[Source]
    lazy: npt.NDArray[np.bool_]
    hashed: list[tuple[str, Held, bool]]
    index: dict[str, list[int]]
    optimizers: Sequence[torch.optim.Optimizer]

    def refresh(self, called: Called) -> None:
        """Takes the tensors that are other ones in this step."""
        fresh = [(n, called.leaves.tensors[name].held) for name in called.fresh for n in self.index.get(name, ())]
        owned = owned_storages(self.optimizers) if any(self.lazy[n] for n, _ in fresh) else set()
        for n, held in fresh:
            _, k, box = self.work.places[n]
            view = held.pieces[k][1]
            self.sources[n] = source_of(view, box)
            self.lazy[n] = self.lazy[n] and view.untyped_storage().data_ptr() in owned
        if called.fresh and self.hashed:
            tensors = called.leaves.tensors
            self.hashed = [(m, tensors[m].held, False) if m in called.fresh else (m, h, w) for m, h, w in self.hashed]


class Preparing:
    """One rank's side of planning; `diverged`: tensors that turned out to be no copies."""

    def __init__(self, rank: int, world: int, averages: Averages) -> None:
        self._rank, self._world, self._averages = rank, world, averages
        self._planner = Planner()
        self.roll = Roll()
        self.diverged: frozenset[str] = frozenset()
        self.encoded: bytes | None = None  # on rank 0: the plan, for the keeper
        self._names: list[str] = []

    def agree(self, leaves: Leaves | Exception, name: str, group: Group) -> None:
        """The round in which all ranks agree on a plan."""
        planning = Planning(group.world, self._planner.memory)

        def digest(tensor: str, _: Held) -> int:
            return group.rank + 2 if tensor in self.diverged else 1

        found, assignment, told = agree_on_plan(name, planning.plan, leaves, group, self._planner, digest)
        prepare(self._planner, assignment, found, ())
        self._names = [leaf.name for leaf in found]
        if group.rank == 0:
            assert planning.made is not None
            self.encoded = encode_plan(*self._averages.plan(planning.made, planning.aliases))
            if told["per_rank"]:
                log.warning(
                    "ckpt: stored per rank, since the ranks hold different values: %s (declare ckpt.PerRank to say so)",
                    ", ".join(told["per_rank"][:10]),
                )

    @property
    def _work(self) -> Work:
        assert self._planner.work is not None
        return self._planner.work

    @property
    def slot_size(self) -> int:
        """Bytes of a slot for this rank's part."""
        return self._averages.slot_size(self._work)

    def prepare(self, state: Any, called: Called) -> Prepared:
        """What was agreed on, over the tensors of now; puts the fence before their optimizers."""
        work, held = self._work, called.leaves.tensors
        optimizers = [v for _, v, _, _ in walk(state) if isinstance(v, torch.optim.Optimizer)]
        fence = fence_here()
        for optimizer in optimizers:
            fence.guard(optimizer)
        owned = owned_storages(optimizers)
        views = [held[self._names[i]].held.pieces[k][1] for i, k, _ in work.places]
        index: dict[str, list[int]] = {}
        for n, (i, _, _) in enumerate(work.places):
            index.setdefault(self._names[i], []).append(n)
        hashed = []
        if self._world > 1:
            for name, leaf in held.items():
                if (leaf.held.kind == PLAIN or name in self._planner.digests) and name not in self.diverged:
                    waits = all(v.untyped_storage().data_ptr() in owned for _, v in leaf.held.pieces)
                    hashed.append((name, leaf.held, waits))
        return Prepared(
            work=work,
            key=self._averages.key(work.key),
            sources=[source_of(view, box) for view, (_, _, box) in zip(views, work.places, strict=True)],
            lazy=np.array([view.untyped_storage().data_ptr() in owned for view in views], dtype=np.bool_),
            hashed=hashed,
            index=index,
            optimizers=optimizers,
        )
