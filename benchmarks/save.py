"""How fast, and at what CPU cost, is a durable save?

Every contestant writes the same state to local disk and returns when it is durable. The limit is a direct write of the
same bytes from warm buffers, by the best of several ways in that round; memcpy of the state stands beside it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import contestants
from benchmarks.contestants import CKPT, SAVERS
from benchmarks.harness import Rounds, Sample, World, empty, settle
from benchmarks.limits import MEMCPY, write_limits
from benchmarks.report import Table, finish, machine, options, ratio_cell, spread, workspace

ASKED_RATIO, ASKED_CPU = 0.90, 0.30


def measure(world: World, names: Sequence[str], rounds: int, path: Path) -> Rounds:
    """Rounds of fresh saves. What a turn wrote is removed before the next one, outside of the time."""
    limits = list(write_limits(world.ranks))

    def turn(number: int, name: str) -> Sample:
        folder = path / name
        folder.mkdir(exist_ok=True)
        settle()
        try:
            return world.timed(contestants.save, name, str(folder), number)
        finally:
            empty(folder)
            settle()

    return Rounds(world.nbytes, limits).run([*limits, MEMCPY, *names], rounds, turn)


def run(args: argparse.Namespace) -> dict[str, Any]:
    names = contestants.chosen(SAVERS, args.only)
    with workspace(args.dir) as root:
        result: dict[str, Any] = {"bench": "save", "machine": machine(root), "tables": []}
        for gib in args.gib:
            for ranks in args.ranks:
                with World(ranks, gib) as world, workspace(root) as path:
                    rounds = measure(world, names, args.rounds, path)
                result["tables"].append({"gib": gib, "ranks": ranks, **rounds.to_json()})
    return result


def tables(result: dict[str, Any]) -> list[Table]:
    return [_table(part) for part in result["tables"]]


def _table(part: dict[str, Any]) -> Table:
    rounds = Rounds.from_json(part)
    gb = rounds.nbytes / 1e9
    table = Table(
        f"Durable save, {part['gib']:g} GiB, {part['ranks']} rank{'s' * (part['ranks'] > 1)}",
        ["", "seconds", "GB/s", "of the disk limit", "CPU s per GB"],
    )
    for name in rounds.samples:
        if name in rounds.failures:
            table.rows.append([name, "failed", "", "", ""])
            continue
        seconds = [s.seconds for s in rounds.samples[name] if s]
        cpu = rounds.median(name, lambda s: s.cpu_seconds) / gb
        asked = name == CKPT
        verdict = "" if not asked else (" ✓" if cpu <= ASKED_CPU else " ✗")
        table.rows.append(
            [
                name,
                spread(seconds),
                f"{gb / statistics.median(seconds):.2f}",
                "" if name == MEMCPY else ratio_cell(rounds.ratios(name), ASKED_RATIO if asked else None),
                f"{cpu:.2f}{verdict}",
            ]
        )
    table.notes.append(f"{gb:.2f} GB, medians (min-max) of {len(seconds)} rounds. {rounds.limit_note(CKPT)}")
    table.notes += contestants.notes(rounds.samples, rounds.failures)
    return table


def main(argv: Sequence[str] | None = None) -> None:
    args = options(__doc__ or "").parse_args(argv)
    result = run(args)
    finish(result, tables(result), args.json)


if __name__ == "__main__":
    main()
