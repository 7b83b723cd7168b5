"""How long does a save in the background hold up a loop whose computing is done by a device?

The device is a timed wait, which leaves the processor idle; then the ranks meet in a small all-reduce, as gradients make
them, one element of every tensor changes, and the save is begun. A save costs what the call held the loop, what the
fence held it before the change, and what the steps until the next save were longer than in the same loop without saves.
A save that is due while the last one is under way is skipped, on all ranks, and counted.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import background
from benchmarks.background import BOTH, DEVICE, MEMORY, NOTHING, OURS, Pending, Saver
from benchmarks.contestants import chosen
from benchmarks.crew import Crew, bounds
from benchmarks.harness import Rank, Rounds, Sample
from benchmarks.report import Table, finish, machine, options, verdict, workspace

EACH_STEP = {MEMORY, DEVICE, BOTH}
ASKED_MS, ASKED_SHARE = 5.0, 0.01


@dataclass(frozen=True)
class Plan:
    """One turn: a few saves to warm up, then `saves` that count, one every `every` steps of `seconds`."""

    seconds: float
    every: int
    saves: int

    @property
    def warm(self) -> int:
        """Steps without a device before the loop, in which processes start and memory is touched: two saves."""
        return 2 * self.every

    @property
    def first(self) -> int:
        """The step of the loop with the first save that counts."""
        return self.every - 1

    @property
    def steps(self) -> int:
        return self.first + self.saves * self.every


# --- on a rank ------------------------------------------------------------------------------------------------------


def train(rank: Rank, name: str, folder: str, plan: Plan) -> dict[str, Any]:
    """The loop; for each step when it ended and what held it, on the machine's one clock."""
    saver = None if name == NOTHING else background.make(rank, name, folder, plan.every)
    before = warm_up(saver, plan) if saver is not None else {}
    ones = [t.view(-1)[:1] for t in rank.state.local().values() if t.numel()]
    pending: Pending | None = None
    saves: dict[int, tuple[float, Pending]] = {}
    rows: list[dict[str, Any]] = []
    ready = torch.ones(())
    gc.collect()
    dist.barrier()
    start = time.perf_counter()
    for step in range(plan.steps):
        time.sleep(plan.seconds)
        ready.fill_(pending is None or pending.done())
        dist.all_reduce(ready, dist.ReduceOp.MIN)
        reached = time.perf_counter()
        if pending is not None:
            pending.fence()
        fenced = time.perf_counter()
        with torch.no_grad():
            torch._foreach_add_(ones, 1e-3)
        changed = time.perf_counter()
        due = saver is not None and (step + 1) % plan.every == 0
        begun = due and bool(ready)
        if saver is not None and (begun or saver.every_step):
            pending = saver.begin(plan.warm + step)
            saves[step] = (changed, pending)
        end = time.perf_counter()
        rows.append({"end": end, "fence": fenced - reached, "call": end - changed, "due": due, "begun": begun})
    durable = {step: (began, pending.wait()) for step, (began, pending) in saves.items()}
    counts = background.grown(before, saver.counts(at_rest=True)) if saver is not None else {}
    if saver is not None:
        saver.close()
    return {"start": start, "steps": rows, "durable": durable, "counts": counts}


def warm_up(saver: Saver, plan: Plan) -> dict[str, int]:
    """The saves that do not count, each durable before the next; the saver's own counts after them."""
    for step in range(plan.warm):
        if saver.every_step or (step + 1) % plan.every == 0:
            pending = saver.begin(step)
            pending.wait()
            time.sleep(plan.seconds if saver.every_step else 0)
    return saver.counts(at_rest=True)


# --- in the parent --------------------------------------------------------------------------------------------------


def summed(parts: Sequence[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    """A step ends when its last rank does, and is held up by as much as the rank that was held up longest."""
    steps = list(zip(*(part["steps"] for part in parts), strict=True))
    ends = [max(row["end"] for row in rows) for rows in steps]
    ends.append(max(part["start"] for part in parts))  # before the first step
    lags = []
    for step in parts[0]["durable"]:
        stored = [part["durable"][step] for part in parts]
        if step >= plan.first and all(when is not None for _, when in stored):
            lags.append(max(when for _, when in stored) - min(began for began, _ in stored))
    window = range(plan.first, plan.steps)
    return {
        "length": [ends[n] - ends[n - 1] for n in window],
        "fence": [max(row["fence"] for row in steps[n]) for n in window],
        "call": [max(row["call"] for row in steps[n]) for n in window],
        "due": sum(steps[n][0]["due"] for n in window),
        "begun": [bool(steps[n][0]["begun"]) for n in window],
        "lags": lags,
        "counts": parts[0]["counts"],
    }


def measure(crew: Crew, names: Sequence[str], rounds: int, path: Path, plan: Plan, seconds: float) -> Rounds:
    def turn(number: int, name: str) -> Sample:
        return Sample(plan.seconds, 0.0, 0, summed(crew.turn(train, name, path, number, plan), plan))

    out = Rounds(crew.nbytes, [], failures=background.unavailable(names))
    return out.run([NOTHING, *names], rounds, turn, seconds)


@dataclass(frozen=True)
class Stalls:
    """What the saves of one contestant cost: seconds for each save of all rounds, in all and by cause."""

    total: list[float]
    call: list[float]
    fence: list[float]

    @classmethod
    def of(cls, samples: Sequence[Sample | None], base: Sequence[Sample | None], each_step: bool) -> Stalls:
        """A save bears its own step and those until the next one begins; the base is the median step of its round."""
        out = cls([], [], [])
        for sample, bare in zip(samples, base, strict=True):
            if sample is None or bare is None:
                continue
            usual = statistics.median(bare.extra["length"])
            got = sample.extra
            starts = [n for n, begun in enumerate(got["begun"]) if begun or each_step]
            for n, after in pairwise([*starts, len(got["length"])]):
                out.total.append(sum(length - usual for length in got["length"][n:after]))
                out.call.append(got["call"][n])
                out.fence.append(sum(got["fence"][n + 1 : after + 1]))
        return out


def run(args: argparse.Namespace) -> dict[str, Any]:
    names = chosen({**background.savers(), DEVICE: None}, args.only)
    plan = Plan(args.step_seconds, args.every, args.saves)
    with workspace(args.dir) as root:
        result: dict[str, Any] = {"bench": "stall", "machine": machine(root), "tables": []}
        for gib in args.gib:
            for ranks in args.ranks:
                with Crew(ranks, gib, args.patience) as crew, workspace(root) as path:
                    rounds = measure(crew, names, args.rounds, path, plan, args.seconds)
                about = {"gib": gib, "ranks": ranks, "seconds": plan.seconds, "every": plan.every}
                result["tables"].append({**about, **rounds.to_json()})
    return result


def tables(result: dict[str, Any]) -> list[Table]:
    return [_table(part) for part in result["tables"]]


def _table(part: dict[str, Any]) -> Table:
    rounds = Rounds.from_json(part)
    base, step = rounds.samples[NOTHING], part["seconds"]
    table = Table(
        f"Stall of a background save, {part['gib']:g} GiB, {part['ranks']} rank{'s' * (part['ranks'] > 1)}, a device's step of {step:g} s",
        [
            "",
            "stall ms",
            "p95 ms",
            "% of a step",
            "call ms",
            "fence ms",
            "begun / skipped / committed",
            "durable after s",
        ],
    )
    for name in rounds.samples:
        if name == NOTHING:
            continue
        if name in rounds.failures:
            table.rows.append([name, "does not run", *[""] * 6])
            continue
        table.rows.append([name, *_cells(name, rounds.samples[name], base, step)])
    saves = sum(len(s.extra["length"]) for s in base if s) // part["every"]
    lengths = [length - step for s in base if s for length in s.extra["length"]]
    table.notes.append(
        f"{rounds.nbytes / 1e9:.2f} GB, a save due every {part['every']} steps, at most {saves} saves; medians over saves. "
        f"The loop's own step is longer than its wait by {1e3 * statistics.median(lengths):.1f} ms "
        f"({1e3 * min(lengths):.1f}-{1e3 * max(lengths):.1f}) without saves."
    )
    if EACH_STEP & rounds.samples.keys():
        table.notes.append(
            "In memory: a snapshot at every step; begun are those that all ranks sealed, and with storage, committed those stored."
        )
    table.notes += background.remarks(rounds.samples, rounds.failures)
    return table


def _cells(name: str, samples: Sequence[Sample | None], base: Sequence[Sample | None], step: float) -> list[str]:
    got = [s.extra for s in samples if s]
    stalls = Stalls.of(samples, base, each_step=name in EACH_STEP)
    if not stalls.total:
        return ["-"] * 7
    stall = statistics.median(stalls.total)
    asked = name in OURS
    begun, skipped, committed = map(sum, zip(*(_counted(name, g) for g in got), strict=True))
    lags = [lag for g in got for lag in g["lags"]]
    return [
        f"{1e3 * stall:.1f}" + verdict(1e3 * stall <= ASKED_MS, asked),
        f"{1e3 * _percentile(stalls.total, 0.95):.1f}",
        f"{100 * stall / step:.2f}" + verdict(stall <= ASKED_SHARE * step, asked),
        f"{1e3 * statistics.median(stalls.call):.1f}",
        f"{1e3 * statistics.median(stalls.fence):.1f}",
        f"{begun} / {skipped} / {committed}" + verdict(not skipped, asked),
        f"{statistics.median(lags):.2f}" if lags else "-",
    ]


def _counted(name: str, got: dict[str, Any]) -> tuple[int, int, int]:
    """Saves begun, skipped and committed in one turn; snapshots of a Checkpointer, by its own count of all its steps."""
    if name in EACH_STEP:
        counts = got["counts"]
        lost = counts["skipped"] + counts.get("voided", 0)
        return counts["sealed"], lost, counts["committed" if name == BOTH else "sealed"]
    return sum(got["begun"]), got["due"] - sum(got["begun"]), len(got["lags"])


def _percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of them does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 100) * len(ordered) // 100) - 1)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__ or "")
    bounds(parser)
    parser.set_defaults(ranks=[2, 4])
    parser.add_argument("--step-seconds", type=float, default=1.0, help="how long the device computes")
    parser.add_argument("--every", type=int, default=4, help="steps from one save to the next")
    parser.add_argument("--saves", type=int, default=4, help="measured saves of a turn; two more warm up")
    args = parser.parse_args(argv)
    result = run(args)
    finish(result, tables(result), args.json)


if __name__ == "__main__":
    main()
