"""The run that is never interrupted, and the control: changes of layout without any checkpoint.

Started by torchrun on 4 processes. It trains through without touching `ckpt`. On the way, at the step that the
restarted runs will start from, it writes the hashes of the whole state and keeps a copy of it in memory. When it
is done it places that copy on each other layout, in memory, and trains on from there. How far those losses drift
from the uninterrupted run is what another order of summation costs, and nothing else: the measure for the restarts.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import layouts
import torch
import torch.distributed as dist
from demo_log import EventLog, data_hash, fingerprint, full_leaves
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from train_gpt import Job, build, train_step


@dataclass(frozen=True)
class InMemory:
    """The whole state of a job in the memory of every rank."""

    leaves: dict[str, Tensor]
    scheduler: dict[str, Any]
    loader: dict[str, Any]
    rng: Tensor

    @classmethod
    def take(cls, job: Job) -> InMemory:
        leaves = {name: leaf.clone() for name, leaf in full_leaves(job)}
        return cls(leaves, job.scheduler.state_dict(), job.loader.state_dict(), torch.get_rng_state())

    @torch.no_grad()
    def place(self, job: Job) -> None:
        """Put the state onto a freshly built job of any layout, each rank cutting out its own shards."""
        for name, parameter in job.model.named_parameters():
            keys = [key for key in ("exp_avg", "exp_avg_sq", "step") if f"{name}.{key}" in self.leaves]
            for key in keys:
                whole = self.leaves[f"{name}.{key}"].clone()
                job.optimizer.state[parameter][key] = whole if key == "step" else _like(whole, parameter)
            parameter.copy_(_like(self.leaves[name], parameter))
        job.scheduler.load_state_dict(self.scheduler)
        for group, rate in zip(job.optimizer.param_groups, job.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        job.loader.load_state_dict(self.loader)
        torch.set_rng_state(self.rng)


def _like(whole: Tensor, parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return whole.clone()
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def control_place(name: str) -> layouts.Place | None:
    """This rank's place in another layout, made of the first of the 4 running processes; None: not needed."""
    layout = layouts.LAYOUTS[name]
    rank = dist.get_rank()
    if layout.world == 1:
        return layouts.Place(layout, rank, 1, None, None) if rank == 0 else None
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    if layout.mesh == (2, 2):
        return layouts.Place(layout, rank, 4, grid, None)
    row = grid["shard"]  # ranks 0 and 1, or 2 and 3: the first row works, the second one waits
    return layouts.Place(layout, rank, 2, row, row.get_group()) if rank < 2 else None


def main() -> None:
    """Train through, then run the controls."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--compare-at", type=int, required=True, help="the step whose state is hashed and branched")
    parser.add_argument("--control", nargs="*", default=[], choices=sorted(layouts.LAYOUTS))
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    place = layouts.start("fsdp4")
    log = EventLog(args.events, place.rank)
    job = build(place, total=args.steps, seed=args.seed)
    for step in range(args.steps):
        loss = train_step(job)
        log.write("step", step=step, loss=loss, data=data_hash(job))
        if step == args.compare_at:
            log.write("fingerprint", step=step, **fingerprint(job))
            kept = InMemory.take(job)
    log.write("fingerprint", step=step, **fingerprint(job))
    del job
    for name in args.control:
        dist.barrier()
        where = control_place(name)
        if where is None:
            continue
        torch.set_num_threads(where.layout.threads)
        job = build(where, total=args.steps, seed=args.seed)
        kept.place(job)
        for step in range(args.compare_at + 1, args.steps):
            log.write("control", layout=name, step=step, loss=train_step(job))
        torch.set_num_threads(place.layout.threads)
    dist.barrier()
    layouts.stop()


if __name__ == "__main__":
    main()
