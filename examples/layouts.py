"""The parallel layouts of the examples: how many processes, and how the weights are cut over them."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard


@dataclass(frozen=True)
class Layout:
    """One way to spread a model over processes."""

    name: str
    title: str
    world: int
    mesh: tuple[int, ...]  # (shard,) or (replicate, shard); () is one process without any sharding
    columns: bool = False  # cut the last dimension of every parameter instead of the first

    @property
    def threads(self) -> int:
        """Threads of each process: part of the layout, as it decides the order of summation."""
        return 2 if self.world == 1 else 1


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("fsdp4", "FSDP2, rows over 4", 4, (4,)),
        Layout("fsdp2", "FSDP2, columns over 2", 2, (2,), columns=True),
        Layout("hsdp2x2", "HSDP, 2 replicas x 2 shards", 4, (2, 2)),
        Layout("single", "one process, unsharded", 1, ()),
    )
}


@dataclass(frozen=True)
class Place:
    """Where this process stands in a layout."""

    layout: Layout
    rank: int
    world: int
    mesh: DeviceMesh | None
    group: dist.ProcessGroup | None  # over which losses are averaged; None: the default one, or there is none

    def shard(self, model: nn.Module) -> nn.Module:
        """Cut the model as the layout says, block by block, in place."""
        if self.mesh is None:
            return model
        cut = (lambda parameter: Shard(parameter.ndim - 1)) if self.layout.columns else None
        for part in (*model.get_submodule("blocks").children(), model):
            fully_shard(part, mesh=self.mesh, shard_placement_fn=cut, reshard_after_forward=False)
        return model

    def mean(self, value: Tensor) -> float:
        """The mean of a scalar over all ranks of the layout."""
        total = value.detach().clone()
        if self.mesh is not None:
            dist.all_reduce(total, group=self.group)
        return total.item() / self.world


def start(name: str) -> Place:
    """Join the process group, if the layout has one, and make this process compute the same bits every time."""
    layout = LAYOUTS[name]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs a sixth of a step, and nothing here reads such
    torch.set_num_threads(layout.threads)
    if layout.world == 1:
        return Place(layout, 0, 1, None, None)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != layout.world:
        raise SystemExit(f"layout {name} needs {layout.world} processes, started with torchrun; here are {launched}")
    dist.init_process_group("gloo")
    names = ("shard",) if len(layout.mesh) == 1 else ("replicate", "shard")
    mesh = init_device_mesh("cpu", layout.mesh, mesh_dim_names=names)
    return Place(layout, dist.get_rank(), dist.get_world_size(), mesh, None)


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
