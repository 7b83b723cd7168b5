"""The main job of this project in one command: kill a training run, restart it anywhere, and compare every bit.

    python examples/demo.py --out demo-out

A GPT of 10.9 million parameters learns Python's own documentation on 4 processes with FSDP2. One run is never
interrupted. A second one loses a rank to SIGKILL in the middle; it restarts on 4 processes and has to end bitwise
where the first one ends. Then the same checkpoint restarts on 2 processes with another sharding, on 2x2 HSDP and on
1 process: each has to load bitwise equal state, and its losses may be no further from the first run than three
times what changing the layout in memory does, without any checkpoint.

Then six hosts hold every step of another run in each other's memory, two of them are lost in the middle of training, and
the four that are left go on from that memory with the losses of an uninterrupted run (`demo_hosts.py`). The exit code is 0
if all of that is true.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import demo_disk
import demo_hosts
import torch
from demo_launch import Clock, Ended, launch
from demo_log import stored_leaves
from demo_page import page
from demo_result import Reference, Row, against_disk, killed_row, reference_row, restart_row, stored_check
from demo_table import print_table
from layouts import LAYOUTS

ELSEWHERE = ("fsdp2", "hsdp2x2", "single")


@dataclass(frozen=True)
class Plan:
    """The steps of the story; a checkpoint is stored after every `every`-th."""

    total: int = 36
    every: int = 8
    compare_at: int = 15
    kill_rank: int = 2
    kill_at: int = 20


class Demo:
    """The stages in their order, each of which ends in a row."""

    def __init__(self, out: Path, plan: Plan) -> None:
        self.out, self.plan, self.clock = out, plan, Clock()
        self.run = out / "run"
        self.disk: list[demo_disk.DiskTime] = []

    def rows(self) -> list[Row]:
        """Run everything."""
        plan, home = self.plan, LAYOUTS["fsdp4"]
        reference = Reference(self.uninterrupted(), plan.compare_at, plan.total - 1)
        rows = [reference_row(reference, home)]
        if not rows[0].ok:
            raise SystemExit("the uninterrupted run failed, so there is nothing to compare with")
        size = reference.fingerprint(plan.compare_at)["bytes"]
        killed = self.worker("killed", "fsdp4", self.run, seed=1, kill=(plan.kill_rank, plan.kill_at))
        self.clock.say(
            f"killed: rank {plan.kill_rank} got SIGKILL after step {plan.kill_at}; torchrun took down the rest"
        )
        rows.append(killed_row(reference, killed, home, plan.kill_at))
        forks = {layout: self.fork(layout) for layout in ELSEWHERE}
        for seed, (layout, run) in enumerate({home.name: self.run, **forks}.items(), 101):
            name = f"restart-{layout}"
            self.measure_disk(size)
            ended = self.worker(name, layout, run, seed=seed)
            bitwise = layout == home.name
            rows.append(restart_row(reference, ended, LAYOUTS[layout], name=name, bitwise=bitwise))
            if bitwise and rows[-1].ok:
                check = stored_check(reference, stored_leaves(f"{run}@{reference.last}"))
                rows[-1] = replace(rows[-1], checks=(*rows[-1].checks, check))
        for run in forks.values():
            shutil.rmtree(run)
        return against_disk(rows, self.disk)

    def uninterrupted(self) -> Ended:
        plan = self.plan
        steps = ["--steps", plan.total, "--compare-at", plan.compare_at]
        arguments = [*steps, "--control", *ELSEWHERE]
        return launch(self.clock, "uninterrupted", "demo_reference.py", 4, arguments, self.out / "logs")

    def fork(self, layout: str) -> Path:
        """The run as the crash left it, once more, so that every layout restarts from the same.

        Hard links will do, for what is in a run is never written again.
        """
        copy = self.out / f"run-{layout}"
        shutil.copytree(self.run, copy, copy_function=os.link)
        return copy

    def worker(self, name: str, layout: str, run: Path, *, seed: int, kill: tuple[int, int] | None = None) -> Ended:
        plan = self.plan
        arguments: list[Any] = [run, "--layout", layout, "--steps", plan.total, "--every", plan.every, "--seed", seed]
        arguments += ["--kill", *kill] if kill else []
        return launch(
            self.clock, name, "demo_worker.py", LAYOUTS[layout].world, arguments, self.out / "logs", dies=bool(kill)
        )

    def measure_disk(self, size: int) -> None:
        """Right before a run, and with nothing else going on: what the disk can do, not what is left of it."""
        found = [demo_disk.measure(self.out, size) for _ in range(5)]
        rate = statistics.median(d.rate for d in found)
        self.clock.say(f"disk limit for {size / 1e6:.0f} MB: {rate / 1e9:.2f} GB/s")
        self.disk += found


def facts(demo: Demo) -> dict[str, Any]:
    """Where and how this was measured."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": torch.multiprocessing.cpu_count(),
        "plan": asdict(demo.plan),
        "disk": [{**asdict(d), "rate": d.rate} for d in demo.disk],
        "seconds": demo.clock.seconds,
    }


def clean(out: Path) -> None:
    """Remove what an earlier demo left in its directory, and only that."""
    for name in ("run", "run-hosts", "logs", *(f"run-{layout}" for layout in ELSEWHERE)):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("demo.json", "demo.html"):
        (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)


def main() -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(description="kill a training run, restart it anywhere, compare every bit")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="directory of the results")
    out = parser.parse_args().out.resolve()
    clean(out)
    demo = Demo(out, Plan())
    rows = demo.rows()
    story = demo_hosts.tell(demo.clock, out)
    about = facts(demo)
    ok = all(row.ok for row in rows) and story.ok
    told = {"rows": [{**asdict(row), "ok": row.ok} for row in rows], "hosts": {**asdict(story), "ok": story.ok}}
    record = {"ok": ok, "facts": about, **told}
    (out / "demo.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "demo.html").write_text(page(rows, about, story))
    print_table(rows, about, story)
    for name in ("demo.html", "demo.json"):
        print(f"wrote {out / name}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
