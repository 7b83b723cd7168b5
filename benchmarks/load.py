"""How fast is a load onto the ranks that saved, from a warm page cache and from disk?

Every contestant fills the live tensors, which are zeroed before and compared bit by bit after. The limit is a read of
as many bytes into warm buffers. Warm: the contestant's files are read once just before. Cold: caches are dropped just
before, for the limit as for the contestants.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import contestants
from benchmarks.contestants import CKPT, LOADERS
from benchmarks.harness import Failed, Rounds, Sample, World, drop_caches, settle, warm_up
from benchmarks.limits import read_limits, write_limits
from benchmarks.report import Table, finish, machine, options, ratio_cell, spread, workspace

ASKED = {"warm": 0.65, "cold": 0.90}
STEP = 1


def prepare(world: World, names: Sequence[str], path: Path) -> dict[str, str]:
    """Saves once with every contestant, each into a directory of its own; returns the reasons of those that fail."""
    failures = {}
    for name in names:
        (path / name).mkdir(parents=True)
        try:
            world.timed(contestants.save, name, str(path / name), STEP)
        except Failed as failure:
            failures[name] = str(failure)
    prepare_limit(world, path)
    return failures


def prepare_limit(world: World, path: Path) -> None:
    """The files that the limits read, as many bytes a rank as the state has there; each variant has its own, since
    what was read a moment ago may come out of a cache of the host's that nobody here can empty."""
    for name in {**read_limits(world.ranks, cold=True), **read_limits(world.ranks, cold=False)}:
        (path / name).mkdir(parents=True)
        world.timed(contestants.save, next(iter(write_limits(world.ranks))), str(path / name), STEP)
    settle()


def measure(world: World, names: Sequence[str], failures: dict[str, str], rounds: int, path: Path, mode: str) -> Rounds:
    """Rounds of loads from the files that `prepare` left."""
    limits = list(read_limits(world.ranks, cold=mode == "cold"))

    def turn(number: int, name: str) -> Sample:
        files = path / name.removesuffix(" mmap")
        if mode == "cold":
            drop_caches(files)
        else:
            warm_up(files)
        return world.timed(contestants.load, name, str(files), STEP)

    table = Rounds(world.nbytes, limits, failures={n: f for n, f in failures.items() if n in names})
    return table.run([*limits, *names], rounds, turn)


def run(args: argparse.Namespace) -> dict[str, Any]:
    names = contestants.chosen(LOADERS, args.only)
    savers = [name for name in names if not name.endswith(" mmap")]
    with workspace(args.dir) as root:
        result: dict[str, Any] = {"bench": "load", "machine": machine(root), "cold_by": drop_caches(root), "tables": []}
        for gib in args.gib:
            for ranks in args.ranks:
                with World(ranks, gib) as world, workspace(root) as path:
                    failures = prepare(world, savers, path)
                    for mode in args.mode:
                        rounds = measure(world, names, failures, args.rounds, path, mode)
                        result["tables"].append({"gib": gib, "ranks": ranks, "mode": mode, **rounds.to_json()})
    return result


def tables(result: dict[str, Any]) -> list[Table]:
    return [_table(part, result["cold_by"]) for part in result["tables"]]


def _table(part: dict[str, Any], cold_by: str) -> Table:
    mode = part["mode"]
    title = f"Load, {mode}, {part['gib']:g} GiB, {part['ranks']} rank{'s' * (part['ranks'] > 1)}"
    table = load_table(title, Rounds.from_json(part), ASKED[mode])
    if mode == "cold":
        table.notes.append(f"Cold by {cold_by}.")
    return table


def load_table(title: str, rounds: Rounds, asked: float) -> Table:
    """The rows of one table of loads, resharding or not."""
    gb = rounds.nbytes / 1e9
    table = Table(title, ["", "seconds", "GB/s", "of the read limit", "CPU s per GB"])
    for name in rounds.samples:
        if name in rounds.failures:
            table.rows.append([name, "failed", "", "", ""])
            continue
        seconds = [s.seconds for s in rounds.samples[name] if s]
        table.rows.append(
            [
                name,
                spread(seconds),
                f"{gb / statistics.median(seconds):.2f}",
                ratio_cell(rounds.ratios(name), asked if name == CKPT else None),
                f"{rounds.median(name, lambda s: s.cpu_seconds) / gb:.2f}",
            ]
        )
    table.notes.append(f"{gb:.2f} GB, medians (min-max) of {len(seconds)} rounds. {rounds.limit_note(CKPT)}")
    table.notes += contestants.notes(rounds.samples, rounds.failures)
    return table


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__ or "")
    parser.add_argument(
        "--mode", type=lambda s: s.split(","), default=["warm", "cold"], help="warm, cold, or warm,cold"
    )
    args = parser.parse_args(argv)
    result = run(args)
    finish(result, tables(result), args.json)


if __name__ == "__main__":
    main()
