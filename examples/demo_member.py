"""One training process of the demo's second part: a run on several hosts, whose steps are held in memory alone.

Every rank computes the gradient of the whole batch, so the loss does not depend on how many ranks there are; what a rank
holds of each step is its share of the weights and moments. With --alone it is the uninterrupted run: one process, no ckpt.
Every start gets a seed of its own, so what a restart forgot to bring back would show in the losses.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import corpus
import gpt
import torch
import torch.distributed as dist

import ckpt

CONFIG = gpt.GPTConfig(width=192, depth=4, heads=4)
BATCH = 4


def say(path: Path, event: str, **values: Any) -> None:
    """One line of the log, in one write: several ranks may share it."""
    line = json.dumps({"event": event, "time": time.time(), **values}) + "\n"
    with path.open("ab", buffering=0) as file:
        file.write(line.encode())


def main() -> None:
    """Train to the last step, from wherever the memory of the hosts stands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="the run to restore from")
    parser.add_argument("--events", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--alone", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    torch.manual_seed(1 + restarts)
    model = gpt.GPT(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    loader = corpus.Loader(
        corpus.english_bytes(), context=CONFIG.context, global_batch=BATCH, rank=0, world=1, seed=1 + restarts
    )
    state = {"model": model, "optimizer": optimizer, "rng": ckpt.RNG(), "loader": loader}

    def step() -> float:
        batch = next(loader)
        loss = model(batch.tokens, batch.targets, torch.randint(2**40, ()) + batch.rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    if args.alone:
        for n in range(args.steps):
            say(args.events, "step", step=n, loss=step())
        return
    host = os.environ["CKPT_HOST"]
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    first = dist.get_rank() == 0
    say(args.events, "begun", host=host, rank=dist.get_rank(), world=dist.get_world_size())

    def seen(event: ckpt.Event) -> None:
        if first and event.kind == "protect":
            say(args.events, "protected", step=event.step, lag=event.lag)

    cp = ckpt.Checkpointer(
        args.run, state, memory=ckpt.Every(1), redundancy=ckpt.ErasureCode(data=4, parity=2), on_event=seen
    )
    start = cp.restore()
    if first:
        source = "" if cp.last_load is None else cp.last_load.ref
        say(args.events, "restored", start=start, source=source, world=dist.get_world_size())
    try:
        for n in range(start, args.steps):
            loss = step()
            cp.step(n, metrics={"loss": loss})
            dist.all_reduce(torch.tensor(loss))  # as any job's ranks meet at each step
            if first:
                say(args.events, "step", step=n, loss=loss, host=host)
    except RuntimeError as e:
        say(args.events, "noticed", host=host, why=str(e).partition("\n")[0])
        os._exit(1)  # torchrun takes it from here
    report = cp.close()
    if first:
        say(args.events, "closed", last=report.last_step, announced=report.announced, skipped=report.skipped)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
