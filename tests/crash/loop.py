"""A small deterministic training job for tools that kill it from outside: see docs/ckpt-chaos.md.

    python tests/crash/loop.py OUT [--steps 9] [--every 3]

Alone, or one of several ranks if RANK and WORLD_SIZE are set. Prints the step it goes on with, leaves a file
`saved-N` in OUT for every save that it was told had succeeded after N steps, and the final weights in `final.bin`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import ckpt


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--every", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Dropout(0.2), nn.Linear(10, 4))
    rank = int(os.environ.get("RANK", "0"))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    state = {"model": model, "optimizer": optimizer, "rng": ckpt.RNG()}
    cp = ckpt.Checkpointer(args.out / "run", state, storage=ckpt.Every(args.every))
    start = cp.restore()
    if rank == 0:
        print(f"goes on with step {start}", flush=True)
    for step in range(start, args.steps):
        model(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        handle = cp.step(step)
        if handle is not None and handle.committed(None) and rank == 0:
            (args.out / f"saved-{step + 1}").touch()
    report = cp.close()
    weights = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    if rank == 0:
        (args.out / "final.bin").write_bytes(b"".join(w.detach().numpy().tobytes() for w in weights))
    if dist.is_initialized():
        dist.destroy_process_group()
    raise SystemExit(1 if report.failed else 0)


if __name__ == "__main__":
    main()
