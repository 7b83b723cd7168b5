"""A few ranks that train next to nothing and keep their checkpoints where the first argument says."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ckpt

STEPS, EVERY = 200, 20


def main(url: str) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(512, 2048), torch.nn.GELU(), torch.nn.Linear(2048, 512))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters())
    cp = ckpt.Checkpointer(
        url, {"model": model, "optimizer": optimizer}, storage=ckpt.Every(EVERY), keep=[ckpt.KeepLast(3)]
    )
    start = cp.restore()
    for step in range(start, STEPS):
        x = torch.randn(16, 512, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cp.step(step, {"loss": loss.item()})
    report = cp.close()
    if dist.get_rank() == 0:
        print(f"steps {start} to {STEPS - 1}: {report.committed} checkpoints committed, {report.failed} failed")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
