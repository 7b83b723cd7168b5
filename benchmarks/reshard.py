"""How fast is a load onto another number of ranks than saved, and does it read only what it needs?

The state is saved by one world and loaded by another, from a warm page cache, into live tensors that are zeroed before
and compared bit by bit after. The limit is the loading world's: a plain read of as many bytes into warm buffers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import contestants
from benchmarks.contestants import CKPT, RESHARDERS
from benchmarks.harness import Failed, Rounds, World, settle
from benchmarks.load import STEP, load_table, measure, prepare_limit
from benchmarks.report import Table, finish, machine, options, workspace

ASKED_RATIO, ASKED_READ = 0.55, 1.10
WAYS = ((4, 2), (2, 4), (4, 1))


def save_all(ranks: int, gib: float, names: Sequence[str], path: Path) -> dict[str, str]:
    """Saves with every contestant from `ranks` ranks; returns the reasons of those that fail."""
    failures = {}
    with World(ranks, gib) as world:
        for name in names:
            (path / name).mkdir(parents=True)
            try:
                world.timed(contestants.save, name, str(path / name), STEP)
            except Failed as failure:
                failures[name] = str(failure)
    settle()
    return failures


def run(args: argparse.Namespace) -> dict[str, Any]:
    names = contestants.chosen(RESHARDERS, args.only)
    with workspace(args.dir) as root:
        result: dict[str, Any] = {"bench": "reshard", "machine": machine(root), "tables": []}
        for gib in args.gib:
            for source, target in args.ways:
                with workspace(root) as path:
                    failures = save_all(source, gib, names, path)
                    with World(target, gib) as world:
                        prepare_limit(world, path)
                        rounds = measure(world, names, failures, args.rounds, path, "warm")
                result["tables"].append({"gib": gib, "source": source, "target": target, **rounds.to_json()})
    return result


def tables(result: dict[str, Any]) -> list[Table]:
    return [_table(part) for part in result["tables"]]


def _table(part: dict[str, Any]) -> Table:
    rounds = Rounds.from_json(part)
    title = f"Resharding load, warm, {part['gib']:g} GiB, {part['source']} ranks to {part['target']}"
    table = load_table(title, rounds, ASKED_RATIO)
    table.columns.append("bytes read / needed")
    for row in table.rows:
        if row[0] in rounds.failures:
            row.append("")
            continue
        read = rounds.median(row[0], lambda s: s.read_bytes) / rounds.nbytes
        verdict = "" if row[0] != CKPT else (" ✓" if read <= ASKED_READ else " ✗")
        row.append(f"{read:.3f}{verdict}")
    own = [s for s in rounds.samples.get(CKPT, []) if s and "bytes_needed" in s.extra]
    if own:
        table.notes.append(
            f"Bytes read: by the kernel's count of all read calls. ckpt's own report: "
            f"{own[-1].extra['bytes_read'] / own[-1].extra['bytes_needed']:.3f}."
        )
    return table


def _ways(text: str) -> list[tuple[int, int]]:
    pairs = (part.split("-") for part in text.split(","))
    return [(int(source), int(target)) for source, target in pairs]


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__ or "", ranks=False)
    parser.add_argument("--ways", type=_ways, default=list(WAYS), help="from-to, such as 4-2,2-4,4-1")
    args = parser.parse_args(argv)
    result = run(args)
    finish(result, tables(result), args.json)


if __name__ == "__main__":
    main()
