"""How much memory does a synchronous save take on top of the state, and does it grow?

Each contestant has fresh processes, so that its first save finds no heap that another has grown. Before every save the
kernel's record of the peak is reset (`clear_refs`); after it, the peak above the resident size before is what the save
took. Growth is what stays: anonymous resident memory after the last save, above that after the first.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import contestants
from benchmarks.contestants import CKPT, SAVERS
from benchmarks.harness import Failed, Rank, World, empty, settle
from benchmarks.report import Table, finish, machine, options, verdict, workspace

ASKED_PEAK, ASKED_GROWTH = 300.0, 1.0
MIB = 1024  # /proc counts in KiB


def measured_save(rank: Rank, name: str, folder: str, step: int) -> dict[str, float]:
    """One save; MiB of this rank."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status()
    contestants.save(rank, name, folder, step)
    after = _status()
    return {
        "extra": (after["VmHWM"] - before["VmRSS"]) / MIB,
        "resident": after["VmRSS"] / MIB,
        "anonymous": after["RssAnon"] / MIB,
        "shared": after["RssShmem"] / MIB,
    }


def _status() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split(":", 1) for line in lines)
    return {key: int(value.split()[0]) for key, value in pairs if key.startswith(("Vm", "Rss"))}


def measure(world: World, name: str, saves: int, path: Path) -> list[list[dict[str, float]]]:
    """By save, then by rank."""
    out = []
    for number in range(saves):
        settle()
        try:
            out.append(world.call(measured_save, name, str(path), number))
        finally:
            empty(path)
    return out


def run(args: argparse.Namespace) -> dict[str, Any]:
    names = contestants.chosen(SAVERS, args.only)
    with workspace(args.dir) as root:
        result: dict[str, Any] = {"bench": "memory", "machine": machine(root), "tables": []}
        for gib in args.gib:
            for ranks in args.ranks:
                part: dict[str, Any] = {"gib": gib, "ranks": ranks, "saves": {}, "failures": {}}
                for name in names:
                    with World(ranks, gib) as world, workspace(root) as path:
                        try:
                            part["saves"][name] = measure(world, name, args.rounds, path)
                        except Failed as failure:
                            part["failures"][name] = str(failure)
                result["tables"].append(part)
    return result


def tables(result: dict[str, Any]) -> list[Table]:
    return [_table(part) for part in result["tables"]]


def _table(part: dict[str, Any]) -> Table:
    table = Table(
        f"Memory of a synchronous save, {part['gib']:g} GiB, {part['ranks']} rank{'s' * (part['ranks'] > 1)}",
        ["", "first save, peak extra MiB", "later saves, peak extra MiB", "growth from the second save on, MiB"],
    )
    for name in sorted({**part["saves"], **part["failures"]}, key=list(SAVERS).index):
        if name in part["failures"]:
            table.rows.append([name, "failed", "", ""])
            continue
        saves = part["saves"][name]
        first = max(rank["extra"] for rank in saves[0])
        later = max((rank["extra"] for save in saves[1:] for rank in save), default=0.0)
        growth = max(b["resident"] - a["resident"] for a, b in zip(saves[0], saves[-1], strict=True))
        asked = name == CKPT
        table.rows.append(
            [
                name,
                f"{first:.0f}" + verdict(first <= ASKED_PEAK, asked),
                f"{later:.0f}" + verdict(later <= ASKED_PEAK, asked),
                f"{growth:.1f}" + verdict(growth < ASKED_GROWTH, asked),
            ]
        )
    count = max((len(saves) for saves in part["saves"].values()), default=0)
    table.notes.append(f"Of the rank with the most; {count} saves in fresh processes for each contestant.")
    table.notes += contestants.notes(part["saves"], part["failures"])
    return table


def main(argv: Sequence[str] | None = None) -> None:
    args = options(__doc__ or "").parse_args(argv)
    result = run(args)
    finish(result, tables(result), args.json)


if __name__ == "__main__":
    main()
