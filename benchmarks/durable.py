"""How soon is a save in the background durable, while nothing else goes on?

From the call until all ranks' bytes are durable and the checkpoint is complete, against a direct write of the same bytes
from warm buffers in the same round. Every turn makes its contestant anew and saves once before it is timed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks import background, contestants
from benchmarks.contestants import CKPT, chosen
from benchmarks.crew import Crew, bounds
from benchmarks.harness import Rank, Rounds, Sample, settle
from benchmarks.limits import release, write_limits
from benchmarks.report import Table, finish, machine, options, ratio_cell, spread, workspace

ASKED_RATIO = 0.85


def save(rank: Rank, name: str, folder: str) -> dict[str, Any]:
    """One save that warms up and one that is timed; `call` is how long the latter held this rank."""
    if name.startswith("limit"):
        for step in range(2):
            timing = contestants.save(rank, name, folder, step)
            _settled(rank)
        del rank.kept[name]
        release()
        return timing
    saver = background.make(rank, name, folder)
    try:
        saver.begin(0).wait()
        _settled(rank)

        def timed() -> dict[str, Any]:
            saver.begin(1).wait()
            return {}

        return rank.timed(timed)
    finally:
        saver.close()


def _settled(rank: Rank) -> None:
    dist.barrier()
    if rank.rank == 0:
        settle()


def measure(crew: Crew, names: Sequence[str], rounds: int, path: Path, seconds: float) -> Rounds:
    limits = list(write_limits(crew.ranks))

    def turn(number: int, name: str) -> Sample:
        parts = crew.turn(save, name, path, number)
        seconds = max(p["end"] for p in parts) - min(p["start"] for p in parts)
        return Sample(seconds, sum(p["cpu"] for p in parts), 0)

    out = Rounds(crew.nbytes, limits, failures=background.unavailable(names))
    return out.run([*limits, *names], rounds, turn, seconds)


def run(args: argparse.Namespace) -> dict[str, Any]:
    names = chosen(background.DISK, args.only)
    with workspace(args.dir) as root:
        result: dict[str, Any] = {"bench": "durable", "machine": machine(root), "tables": []}
        for gib in args.gib:
            for ranks in args.ranks:
                with Crew(ranks, gib, args.patience) as crew, workspace(root) as path:
                    rounds = measure(crew, names, args.rounds, path, args.seconds)
                result["tables"].append({"gib": gib, "ranks": ranks, **rounds.to_json()})
    return result


def tables(result: dict[str, Any]) -> list[Table]:
    return [_table(part) for part in result["tables"]]


def _table(part: dict[str, Any]) -> Table:
    rounds = Rounds.from_json(part)
    gb = rounds.nbytes / 1e9
    table = Table(
        f"Background save until durable, {part['gib']:g} GiB, {part['ranks']} rank{'s' * (part['ranks'] > 1)}, nothing else going on",
        ["", "seconds", "GB/s", "of the disk limit"],
    )
    for name in rounds.samples:
        if name in rounds.failures:
            table.rows.append([name, "does not run", "", ""])
            continue
        seconds = [s.seconds for s in rounds.samples[name] if s]
        ratio = ratio_cell(rounds.ratios(name), ASKED_RATIO if name == CKPT else None)
        table.rows.append([name, spread(seconds), f"{gb / statistics.median(seconds):.2f}", ratio])
    table.notes.append(f"{gb:.2f} GB, medians (min-max) of {len(seconds)} rounds. {rounds.limit_note(CKPT)}")
    table.notes += background.remarks(rounds.samples, rounds.failures)
    return table


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__ or "")
    bounds(parser)
    parser.set_defaults(ranks=[2, 4])
    args = parser.parse_args(argv)
    result = run(args)
    finish(result, tables(result), args.json)


if __name__ == "__main__":
    main()
