"""What does a search for coefficients read? Each of K checkpoints at most once a generation, however many candidates.

A run of K checkpoints is searched with several sizes of population. Bytes are those that the process took through read
calls, as the kernel counts them, over the bytes of all K packs and the number of generations. The objective reads one
element of each tensor: what is timed is the making of candidates.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import ckpt
from benchmarks.average import make, packs
from benchmarks.harness import read_bytes
from benchmarks.report import Table, finish, machine, options, spread, verdict, workspace

ASKED = 1.0
_MARGIN = 0.01  # headers, block tables and manifests


def objective(state: Mapping[str, torch.Tensor]) -> float:
    return sum(float(tensor.flatten()[0]) ** 2 for tensor in state.values())


def searched(run: Path, population: int, budget: int, scratch: Path) -> dict[str, float]:
    """One search: what it read and how long it took."""
    stored = sum(p.stat().st_size for p in packs(run))
    before, began = read_bytes(), time.perf_counter()
    found = ckpt.search(run, objective, budget=budget, population=population, scratch=str(scratch))
    seconds, read = time.perf_counter() - began, read_bytes() - before
    return {
        "generations": found.passes,
        "evaluations": found.evaluations,
        "reads": read / stored / found.passes,
        "seconds": seconds,
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    with workspace(args.dir) as root:
        make(root / "run", args.checkpoints, args.mib / 1024, torch.float32)
        samples: dict[int, list[dict[str, float]]] = {}
        for number in range(args.rounds + 1):
            for population in args.population:
                sample = searched(root / "run", population, args.budget, root)
                if number:
                    samples.setdefault(population, []).append(sample)
        about = {"checkpoints": args.checkpoints, "mib": args.mib, "budget": args.budget}
        return {"bench": "search", "machine": machine(root), "tables": [{**about, "samples": samples}]}


def tables(result: dict[str, Any]) -> list[Table]:
    return [_table(part) for part in result["tables"]]


def _table(part: dict[str, Any]) -> Table:
    title = (
        f"ckpt.search (LCSC), K={part['checkpoints']} checkpoints of {part['mib']:g} MiB, {part['budget']} evaluations"
    )
    columns = ["", "generations", "reads of each checkpoint per generation", "ms per candidate"]
    table = Table(title, columns)
    for population, samples in part["samples"].items():
        reads = max(s["reads"] for s in samples)
        per = [1000 * s["seconds"] / s["evaluations"] for s in samples]
        generations = statistics.median(s["generations"] for s in samples)
        cell = f"{reads:.3f}" + verdict(reads <= ASKED + _MARGIN)
        table.rows.append([f"population {population}", f"{generations:.0f}", cell, spread(per, ".1f")])
    table.notes.append(
        "Generations: passes over the checkpoints, those of the ladder and one for each step of the greedy soup included. Reads: "
        "bytes that read calls returned to the process, over the bytes of all packs and the generations."
    )
    return table


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__ or "", ranks=False, state=False)
    parser.set_defaults(rounds=3)
    parser.add_argument("--checkpoints", type=int, default=32)
    parser.add_argument("--mib", type=float, default=16, help="of each checkpoint")
    parser.add_argument("--budget", type=int, default=200, help="evaluations")
    parser.add_argument("--population", type=lambda s: [int(x) for x in s.split(",")], default=[16, 64])
    args = parser.parse_args(argv)
    result = run(args)
    finish(result, tables(result), args.json)


if __name__ == "__main__":
    main()
