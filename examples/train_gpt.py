"""Train a small GPT with checkpoints: `train` is the loop to copy.

On one process, or on four with FSDP2:

    python examples/train_gpt.py runs/gpt
    torchrun --standalone --nproc-per-node 4 examples/train_gpt.py runs/gpt --layout fsdp4

Stop it whenever you like, and start it again on the same or on another layout: it goes on where it was.
"""

from __future__ import annotations

import argparse
import math
import random
from dataclasses import dataclass
from typing import Any

import corpus
import gpt
import layouts
import numpy
import torch
from torch import nn

import ckpt

GLOBAL_BATCH = 8
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Job:
    """Everything that trains, on this rank."""

    place: layouts.Place
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    loader: corpus.Loader


class Watch:
    """What somebody may want to look at during `train`; the demo overrides it, to measure, compare and kill."""

    def restored(self, start: int) -> None:
        """The state is in place and `start` is the next step."""

    def stepped(self, step: int, loss: float) -> None:
        """This step is done and has been offered to the checkpointer."""

    def closed(self, report: Any) -> None:
        """The last step is stored."""


def build(place: layouts.Place, *, total: int, seed: int) -> Job:
    """Model, AdamW, cosine schedule and data of this rank, all from one seed."""
    torch.manual_seed(seed)  # the same on every rank: each builds the whole model, then keeps its shards
    random.seed(seed + place.rank)
    numpy.random.seed(seed + place.rank)
    config = gpt.GPTConfig()
    model = place.shard(gpt.GPT(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1, fused=True)
    warmup = max(1, total // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * min(1.0, step / total)))
    )
    loader = corpus.Loader(
        corpus.english_bytes(),
        context=config.context,
        global_batch=GLOBAL_BATCH,
        rank=place.rank,
        world=place.world,
        seed=seed,
    )
    return Job(place, model, optimizer, scheduler, loader)


def train_step(job: Job) -> float:
    """One optimizer step on the next global batch; returns its mean loss."""
    batch = next(job.loader)
    seeds = torch.randint(2**40, ()) + batch.rows  # of the dropout masks: one a sample
    loss = job.model(batch.tokens, batch.targets, seeds)
    loss.backward()
    job.optimizer.step()
    job.scheduler.step()
    job.optimizer.zero_grad()
    return job.place.mean(loss)


def train(job: Job, run: str, *, total: int, every: int, ref: str | None = None, watch: Watch | None = None) -> None:
    """Train to step `total`, from wherever the run (or `ref`) stands."""
    watch = watch or Watch()
    state = {
        "model": job.model,
        "optimizer": job.optimizer,
        "scheduler": job.scheduler,
        "rng": ckpt.RNG(),
        "loader": job.loader,
    }
    cp = ckpt.Checkpointer(run, state, storage=ckpt.Every(every), keep=[ckpt.KeepLast(3)])
    start = cp.restore(ref=ref)
    watch.restored(start)
    for step in range(start, total):
        loss = train_step(job)
        cp.step(step, metrics={"loss": loss})
        watch.stepped(step, loss)
    watch.closed(cp.close())


class PrintLoss(Watch):
    """Say where the run is, from the first rank."""

    def __init__(self, rank: int) -> None:
        self.first = rank == 0

    def restored(self, start: int) -> None:
        if self.first:
            print(f"starting at step {start}", flush=True)

    def stepped(self, step: int, loss: float) -> None:
        if self.first and (step + 1) % 5 == 0:
            print(f"step {step:5d}  loss {loss:.4f}", flush=True)

    def closed(self, report: Any) -> None:
        if self.first:
            print(f"{report.committed} checkpoints stored, {report.bytes / 1e6:.0f} MB", flush=True)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="train a byte-level GPT with checkpoints")
    parser.add_argument("run", help="where the run is stored: a directory or URL")
    parser.add_argument("--layout", default="single", choices=sorted(layouts.LAYOUTS))
    parser.add_argument("--from", dest="ref", help="start from this checkpoint instead of the run's latest")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=10, help="store every so many steps")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    place = layouts.start(args.layout)
    job = build(place, total=args.steps, seed=args.seed)
    train(job, args.run, total=args.steps, every=args.every, ref=args.ref, watch=PrintLoss(place.rank))
    layouts.stop()


if __name__ == "__main__":
    main()
