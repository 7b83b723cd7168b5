"""The text that ships with CPython, and a loader whose whole state is a seed and a position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """This rank's rows of one global batch, and the row numbers they have in it."""

    tokens: Tensor
    targets: Tensor
    rows: Tensor


def english_bytes() -> Tensor:
    """Python's language reference as one array of bytes."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


class Loader:
    """Windows of the text in a shuffled order, cut into global batches, of which a rank takes its rows.

    The order depends on the seed alone, never on how many ranks share a batch: so the state is the same on every
    rank, and a run resumed on another world reads on where the old one stopped.
    """

    def __init__(self, text: Tensor, *, context: int, global_batch: int, rank: int, world: int, seed: int) -> None:
        if global_batch % world:
            raise ValueError(f"a global batch of {global_batch} rows cannot be shared evenly by {world} ranks")
        self.text, self.context, self.global_batch = text, context, global_batch
        self.rows = torch.arange(global_batch).chunk(world)[rank]
        self.seed, self.position = seed, 0

    def __next__(self) -> Batch:
        starts = self.next_starts()[self.rows]
        self.position += self.global_batch
        windows = torch.stack([self.text[start : start + self.context + 1] for start in starts.tolist()])
        return Batch(windows[:, :-1], windows[:, 1:], self.rows)

    def next_starts(self) -> Tensor:
        """Where the windows of the next global batch start in the text: the data order, to be compared."""
        windows = (len(self.text) - 1) // self.context
        windows -= windows % self.global_batch
        epoch, offset = divmod(self.position, windows)
        order = torch.randperm(windows, generator=torch.Generator().manual_seed(self.seed + epoch))
        return order[offset : offset + self.global_batch] * self.context

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seed, self.position = state["seed"], state["position"]
