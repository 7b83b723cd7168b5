"""The training state that every benchmark saves and loads: a GPT in fp32 and its AdamW, cut by FSDP2.

All values are a function of the tensor's name and the global index, so a state saved on one number of ranks and
loaded on another can be checked to the bit without ever gathering it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import crc32c
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

__all__ = ["GPT", "TrainingState", "build_state", "model_size"]

VOCABULARY, CONTEXT = 32_000, 1024
_CHUNK = 1 << 20


def model_size(gib: float) -> tuple[int, int]:
    """(layers, width) of the GPT whose fp32 weights and two moments come nearest to `gib`."""
    layers = 12 if gib < 3 else 24
    target = gib * 2**30 / 12

    def count(width: int) -> int:
        return layers * (12 * width**2 + 13 * width) + (2 * VOCABULARY + CONTEXT + 2) * width

    return layers, min(range(64, 8193, 64), key=lambda width: abs(count(width) - target))


class Block(nn.Module):
    """The parameters of one transformer block; it is never run."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class GPT(nn.Module):
    """The parameters of a GPT; it is never run."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.ln, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)


@dataclass
class TrainingState:
    """One rank's live state. `expected` holds the CRC32C of every local tensor as filled."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    expected: dict[str, int]

    def tree(self) -> dict[str, object]:
        """What `ckpt` takes: the live objects."""
        return {"model": self.model, "optimizer": self.optimizer}

    def dicts(self) -> dict[str, dict[str, torch.Tensor]]:
        """What DCP and its like take: state dicts by FQN, DTensors where sharded, sharing the live memory."""
        moments: dict[str, torch.Tensor] = {}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                moments[f"{name}.{key}"] = value
        return {"model": self.model.state_dict(), "optimizer": moments}

    def local(self) -> dict[str, torch.Tensor]:
        """What torch.save and safetensors take: this rank's own shards, sharing the live memory."""
        return {
            f"{key}.{name}": value.to_local() if isinstance(value, DTensor) else value.detach()
            for key, part in self.dicts().items()
            for name, value in part.items()
        }

    @property
    def local_bytes(self) -> int:
        return sum(t.nbytes for t in self.local().values())

    def zero(self) -> None:
        """Overwrites everything, so that a load that does nothing cannot pass the check."""
        with torch.no_grad():
            for tensor in self.local().values():
                tensor.zero_()

    def wrong(self) -> list[str]:
        """Names of the tensors whose bytes are not those that were filled in."""
        return [name for name, crc in _checksums(self.local()) if self.expected.get(name) != crc]


def build_state(gib: float, world: int) -> TrainingState:
    """Builds and fills this rank's part. Collective: all ranks of the default group call it."""
    layers, width = model_size(gib)
    with torch.device("meta"):
        model = GPT(layers, width)
    mesh = init_device_mesh("cpu", (world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    state = TrainingState(model, optimizer, {})
    rank = mesh.get_local_rank()
    with torch.no_grad():
        for key, part in state.dicts().items():
            for name, value in part.items():
                _fill(value, zlib.crc32(f"{key}.{name}".encode()), world, rank)
    state.expected = dict(_checksums(state.local()))
    return state


def _fill(value: torch.Tensor, seed: int, world: int, rank: int) -> None:
    """Pseudo-random floats in [0.5, 1) by global index; the shard of a dimension-0 cut is one flat range."""
    if isinstance(value, DTensor):
        local = value.to_local()
        rows = -(-value.shape[0] // world)
        first = min(rank * rows, value.shape[0]) * (value.numel() // value.shape[0])
    else:
        local, first = value, 0
    out = local.view(-1).view(torch.int32)
    for at in range(0, len(out), _CHUNK):
        end = min(at + _CHUNK, len(out))
        mixed = torch.arange(first + at, first + end, dtype=torch.int64).mul_(0x9E3779B97F4A7C1).add_(seed)
        mixed ^= mixed >> 29
        mixed.mul_(0x3F58476D1CE4E5B9)
        out[at:end] = ((mixed >> 37) & 0x007FFFFF | 0x3F000000).to(torch.int32)


def _checksums(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, int]]:
    for name, tensor in tensors.items():
        yield name, crc32c.crc32c(tensor.contiguous().view(-1).view(torch.uint8).numpy())
