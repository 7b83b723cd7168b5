"""One training process of the demo: the loop of train_gpt.py, observed, and on request killed in the middle.

Every start gets a seed of its own. So whatever a checkpoint forgot to bring back - weights, moments, the schedule,
the random state, the place in the data - would show as a difference.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from pathlib import Path
from typing import Any

import layouts
import torch.distributed as dist
from demo_log import EventLog, data_hash, fingerprint
from train_gpt import Job, Watch, build, train


class Recorder(Watch):
    """Writes losses, times and hashes to the log; shoots its own process at a given step of a given rank."""

    def __init__(self, job: Job, log: EventLog, total: int, kill: tuple[int, int] | None) -> None:
        self.job, self.log, self.total, self.kill = job, log, total, kill
        self.since = time.perf_counter()

    def restored(self, start: int) -> None:
        seconds = time.perf_counter() - self.since
        seen = fingerprint(self.job) if start else {}
        self.log.write("restored", start=start, seconds=seconds, **seen)

    def stepped(self, step: int, loss: float) -> None:
        self.log.write("step", step=step, loss=loss, data=data_hash(self.job))
        if self.kill == (self.job.place.rank, step):
            os.kill(os.getpid(), signal.SIGKILL)

    def closed(self, report: Any) -> None:
        last = report.saves[-1]
        self.log.write("closed", seconds=last.seconds, bytes=last.bytes, committed=report.committed, ref=last.ref)
        self.log.write("fingerprint", step=self.total - 1, **fingerprint(self.job))


def main() -> None:
    """Train as told, and leave a log."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="the run to restore from and to store into")
    parser.add_argument("--events", type=Path, required=True)
    parser.add_argument("--layout", required=True, choices=sorted(layouts.LAYOUTS))
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--every", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--kill", type=int, nargs=2, metavar=("RANK", "STEP"), help="SIGKILL this rank after this step")
    args = parser.parse_args()
    place = layouts.start(args.layout)
    job = build(place, total=args.steps, seed=args.seed)
    if dist.is_initialized():
        dist.barrier()  # so that the time of the restore is not that of a process that starts late
    log = EventLog(args.events, place.rank)
    recorder = Recorder(job, log, args.steps, tuple(args.kill) if args.kill else None)
    train(job, args.run, total=args.steps, every=args.every, watch=recorder)
    layouts.stop()


if __name__ == "__main__":
    main()
