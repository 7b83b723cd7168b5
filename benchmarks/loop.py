"""What does a save at every step cost a loop that computes on the processor itself?

Each rank multiplies matrices for about a step's time on its own core, the ranks add up a gradient, and a fused AdamW
changes every tensor of the state; then all of it is saved. The overhead is everything: calls, fences, waiting, and the
steps that copying and writing slow down; (time with saves - time without) / (GB of state x saves), paired by round.
On disk each save is durable before the next begins, waited for where a contestant's call does not wait by itself.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import background
from benchmarks.background import BOTH, LIMIT, MEMORY, NOTHING, OURS, Pending, Saver
from benchmarks.contestants import chosen
from benchmarks.crew import Crew, bounds
from benchmarks.harness import Rank, Rounds, Sample
from benchmarks.report import Table, finish, machine, options, spread, verdict, workspace

ASKED = {MEMORY: 0.30, "disk": 0.55}  # seconds per GB
SIDE = 1024
TRIES = 5  # at sizing a step: the best one was disturbed least
GRADIENT = 1 << 20  # floats that the ranks add up


@dataclass(frozen=True)
class Plan:
    """One turn: `warm` steps that are dropped, with saves, then `steps` that count, each of `products` of matrices."""

    products: int
    steps: int
    warm: int = 3


# --- on a rank ------------------------------------------------------------------------------------------------------


class Training:
    """One rank's forward and backward pass, its gradient and its optimizer."""

    def __init__(self, rank: Rank) -> None:
        self.optimizer = rank.state.optimizer
        for group in self.optimizer.param_groups:
            group.update(fused=True, foreach=False)
        for parameter in rank.state.model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-4)
        self.a, self.b, self.out = (torch.rand(SIDE, SIDE) for _ in range(3))
        self.gradient = torch.ones(GRADIENT)

    @classmethod
    def of(cls, rank: Rank) -> Training:
        """Made at the first turn and kept."""
        if "training" not in rank.kept:
            rank.kept["training"] = cls(rank)
        training: Training = rank.kept["training"]
        return training

    def compute(self, products: int) -> None:
        for _ in range(products):
            torch.mm(self.a, self.b, out=self.out)

    def step(self, products: int, fence: Callable[[], object]) -> float:
        """One step of training; seconds that the fence held it."""
        self.compute(products)
        dist.all_reduce(self.gradient.fill_(1.0))
        began = time.perf_counter()
        fence()
        held = time.perf_counter() - began
        self.optimizer.step()
        return held


def calibrate(rank: Rank, seconds: float) -> float:
    """How many products this rank computes in that time, while the others do the same."""
    training, products = Training.of(rank), 0
    dist.barrier()
    began = time.perf_counter()
    while time.perf_counter() < began + seconds:
        training.compute(1)
        products += 1
    return products / (time.perf_counter() - began) * seconds


def train(rank: Rank, name: str, folder: str, plan: Plan) -> dict[str, Any]:
    """The loop; seconds of its steps that count, and what of them a call, a wait and a fence took on this rank."""
    training = Training.of(rank)
    saver = None if name == NOTHING else background.make(rank, name, folder)
    pending = Pending(lambda: None, None)
    held: list[tuple[float, float, float]] = []
    before: dict[str, int] = {}
    gc.collect()
    start = 0.0
    for step in range(plan.warm + plan.steps):
        if step == plan.warm:
            before = saver.counts(at_rest=False) if saver is not None else {}
            dist.barrier()
            start = time.perf_counter()
        fence = training.step(plan.products, pending.fence)
        pending, wait, call = save(saver, pending, step)
        if step >= plan.warm:
            held.append((fence, wait, call))
    dist.barrier()
    end = time.perf_counter()
    pending.wait()
    counts = background.grown(before, saver.counts(at_rest=True)) if saver is not None else {}
    if saver is not None:
        saver.close()
    return {"start": start, "end": end, "held": held, "counts": counts}


def save(saver: Saver | None, last: Pending, step: int) -> tuple[Pending, float, float]:
    """Begins a save once the last one is durable; also the seconds of that wait and of the call."""
    if saver is None:
        return last, 0.0, 0.0
    began = time.perf_counter()
    last.wait()
    waited = time.perf_counter()
    pending = saver.begin(step)
    return pending, waited - began, time.perf_counter() - waited


# --- in the parent --------------------------------------------------------------------------------------------------


def measure(crew: Crew, names: Sequence[str], rounds: int, path: Path, plan: Plan, seconds: float) -> Rounds:
    def turn(number: int, name: str) -> Sample:
        parts = crew.turn(train, name, path, number, plan)
        seconds = max(part["end"] for part in parts) - min(part["start"] for part in parts)
        held = [[max(row) for row in zip(*rows, strict=True)] for rows in zip(*(p["held"] for p in parts), strict=True)]
        fence, wait, call = (sum(column) / plan.steps for column in zip(*held, strict=True))
        counts = parts[0]["counts"]
        taken = max(0, plan.steps - counts.get("skipped", 0) - counts.get("voided", 0))
        extra = {"fence": fence, "wait": wait, "call": call, "taken": taken, "counts": counts}
        return Sample(seconds, 0.0, 0, extra)

    out = Rounds(crew.nbytes, [], failures=background.unavailable(names))
    return out.run([NOTHING, LIMIT, *names], rounds, turn, seconds)


def run(args: argparse.Namespace) -> dict[str, Any]:
    names = chosen(background.savers(), args.only)
    with workspace(args.dir) as root:
        result: dict[str, Any] = {"bench": "loop", "machine": machine(root), "tables": []}
        for gib in args.gib:
            for ranks in args.ranks:
                with Crew(ranks, gib, args.patience) as crew, workspace(root) as path:
                    products = max(min(crew.call(calibrate, args.step_seconds)) for _ in range(TRIES))
                    plan = Plan(max(1, round(products)), args.steps)
                    rounds = measure(crew, names, args.rounds, path, plan, args.seconds)
                about = {"gib": gib, "ranks": ranks, "steps": plan.steps, "products": plan.products}
                result["tables"].append({**about, **rounds.to_json()})
    return result


def overheads(rounds: Rounds, name: str) -> list[float]:
    """Seconds per GB of saved state, by round."""
    pairs = zip(rounds.samples[name], rounds.samples[NOTHING], strict=True)
    return [
        (s.seconds - bare.seconds) / (rounds.nbytes / 1e9 * s.extra["taken"])
        for s, bare in pairs
        if s and bare and s.extra["taken"]
    ]


def tables(result: dict[str, Any]) -> list[Table]:
    return [_table(part) for part in result["tables"]]


def _table(part: dict[str, Any]) -> Table:
    rounds, steps = Rounds.from_json(part), part["steps"]
    table = Table(
        f"A save at every step of a loop on the processor, {part['gib']:g} GiB, {part['ranks']} rank{'s' * (part['ranks'] > 1)}",
        ["", "s per GB", "overhead s per save", "waiting s", "call s", "fence s", "saves"],
    )
    bare = [s.seconds / steps for s in rounds.samples[NOTHING] if s]
    for name in rounds.samples:
        if name == NOTHING:
            continue
        if name in rounds.failures:
            table.rows.append([name, "does not run", *[""] * 5])
        elif costs := overheads(rounds, name):
            asked = ASKED[MEMORY if name == MEMORY else "disk"]
            row = [name, spread(costs) + verdict(statistics.median(costs) <= asked, name in OURS)]
            row.append(f"{statistics.median(costs) * rounds.nbytes / 1e9:.2f}")
            row += [f"{rounds.median(name, lambda s, k=k: s.extra[k]):.3f}" for k in ("wait", "call", "fence")]
            row.append(f"{sum(s.extra['taken'] for s in rounds.samples[name] if s)} of {steps * len(costs)}")
            table.rows.append(row)
    table.notes.append(
        f"{rounds.nbytes / 1e9:.2f} GB, medians (min-max) of {len(bare)} rounds of {steps} steps; without saves a step takes "
        f"{spread(bare)} s. Asked of ckpt: {ASKED['disk']:.2f} s per GB durable at every step, {ASKED[MEMORY]:.2f} in memory."
    )
    table.notes += _own_counts(rounds.samples)
    table.notes += background.remarks(rounds.samples, rounds.failures)
    return table


def _own_counts(samples: dict[str, list[Sample | None]]) -> list[str]:
    """What a Checkpointer says of its turns; what was under way when they began is in it."""
    out = []
    for name in (MEMORY, BOTH):
        if counts := [s.extra["counts"] for s in samples.get(name, []) if s]:
            out.append(f"{name} counts " + ", ".join(f"{sum(c[k] for c in counts)} {k}" for k in counts[0]) + ".")
    return out


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__ or "")
    bounds(parser)
    parser.set_defaults(ranks=[2])
    parser.add_argument("--step-seconds", type=float, default=1.0, help="how long a rank computes in a step")
    parser.add_argument("--steps", type=int, default=6, help="measured steps of a turn; three more warm up")
    args = parser.parse_args(argv)
    result = run(args)
    finish(result, tables(result), args.json)


if __name__ == "__main__":
    main()
