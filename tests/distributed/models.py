"""Models on every layout, with content that depends only on names: an oracle that knows no sharding."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


class Block(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """Odd sizes on purpose: 7 and 13 divide by nothing; `head` is tied to `embed`."""

    def __init__(self, dim: int = 8, hidden: int = 20) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, dim)
        self.blocks = nn.ModuleList([Block(dim, hidden) for _ in range(2)])
        self.head = nn.Linear(dim, 13, bias=False)
        self.head.weight = self.embed.weight
        self.odd = nn.Parameter(torch.zeros(7))
        self.register_buffer("scale", torch.zeros(3))

    def forward(self, i: torch.Tensor) -> torch.Tensor:
        x = self.embed(i)
        for b in self.blocks:
            x = b(x)
        return self.head(x) + self.odd.sum() * 0


def content(name: str, shape: Any, salt: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(zlib.crc32(f"{name}:{salt}".encode()))
    return torch.rand(tuple(shape), generator=g)


def build(layout: str, rank: int, world: int) -> nn.Module:
    """ "single", "fsdp", "hsdp", "tp", "fsdp_tp": the same Net, cut differently."""
    torch.manual_seed(0)
    model: nn.Module = Net()
    if layout == "single":
        return model
    if layout == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if layout == "fsdp":
        mesh = init_device_mesh("cpu", (world,))
    elif layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    elif layout == "tp":
        mesh = init_device_mesh("cpu", (world,))
    else:
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    if "tp" in layout:
        tp = mesh["tp"] if layout == "fsdp_tp" else mesh
        for block in model.blocks:  # type: ignore[union-attr]
            parallelize_module(block, tp, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if layout != "tp":
        shard = mesh["dp"] if layout == "fsdp_tp" else mesh
        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=shard)
        fully_shard(model, mesh=shard)
    return model


def train_once(model: nn.Module) -> torch.optim.Optimizer:
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=0.01
    )
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def leaves(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) with names that any wrapper agrees on."""
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    for name, p in inner.named_parameters():
        yield name, p
        for key, value in sorted(optimizer.state[p].items()):
            yield f"{name}/{key}", value
    yield from inner.named_buffers()


def fill(model: nn.Module, optimizer: torch.optim.Optimizer, salt: int) -> None:
    """Overwrites everything with its content by name."""
    with torch.no_grad():
        for name, t in leaves(model, optimizer):
            full = content(name, t.shape, salt)
            if isinstance(t, DTensor):
                placed = distribute_tensor(full, t.device_mesh, t.placements)
                t.to_local().copy_(placed.to_local())
            else:
                t.copy_(full)


def check(model: nn.Module, optimizer: torch.optim.Optimizer, salt: int) -> int:
    """Asserts that everything is its content by name, bit for bit, through torch's own gather; returns how many."""
    n = 0
    for name, t in leaves(model, optimizer):
        full = t.full_tensor() if isinstance(t, DTensor) else t
        assert torch.equal(full, content(name, t.shape, salt)), name
        n += 1
    return n
