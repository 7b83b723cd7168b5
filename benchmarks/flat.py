"""Does memory stay flat over two hundred saves in the background?

All processes of all ranks, and those that a contestant starts, are weighed together: anonymous and shared memory, in
proportion where several map it (so that it counts once), and memfds that they hold without mapping them. Weighed before the
first save, after the first, after a tenth of them and after the last, with no save under way and freed heap given back.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import background
from benchmarks.background import BOTH, MEMORY, OURS
from benchmarks.contestants import CKPT, chosen
from benchmarks.crew import Crew, footprint
from benchmarks.harness import Failed, Rank
from benchmarks.report import Table, finish, machine, options, workspace

DEFAULT = (CKPT, MEMORY, BOTH, "DCP thread")
SLOTS = {CKPT: 1, MEMORY: 2, BOTH: 3}  # copies of the state that a contestant says it keeps
MIB = 1 << 20


def saves(rank: Rank, name: str, folder: str, first: int, count: int) -> None:
    """Saves one after another, the state changing a little between them; what a peer has stored is removed at once."""
    if "saver" not in rank.kept:
        rank.kept["saver"] = background.make(rank, name, folder)
    ones = [t.view(-1)[:1] for t in rank.state.local().values() if t.numel()]
    for step in range(first, first + count):
        pending = rank.kept["saver"].begin(step)
        pending.fence()
        with torch.no_grad():
            torch._foreach_add_(ones, 1e-3)
        pending.wait()
        dist.barrier()
        if rank.rank == 0 and name not in OURS:
            shutil.rmtree(Path(folder) / str(step))


def tidy(rank: Rank) -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def end(rank: Rank) -> None:
    rank.kept.pop("saver").close()


def weigh(crew: Crew) -> dict[str, int]:
    crew.call(tidy)
    return asdict(footprint(crew.pids))


def measure(crew: Crew, name: str, count: int, path: Path) -> dict[str, Any]:
    """The footprints, by how many saves had been made."""
    done, weights = 0, {0: weigh(crew)}
    for upto in sorted({1, max(1, count // 10), count}):
        crew.call(saves, name, str(path), done, upto - done)
        done, weights[upto] = upto, weigh(crew)
    crew.call(end)
    return {str(number): weight for number, weight in weights.items()}


def run(args: argparse.Namespace) -> dict[str, Any]:
    present = background.savers()
    names = chosen({n: m for n, m in present.items() if args.only or n in DEFAULT}, args.only)
    with workspace(args.dir) as root:
        result: dict[str, Any] = {"bench": "flat", "machine": machine(root), "tables": []}
        for gib in args.gib:
            for ranks in args.ranks:
                part: dict[str, Any] = {"gib": gib, "ranks": ranks, "saves": args.saves, "weights": {}}
                part["failures"] = background.unavailable(names)
                for name in [n for n in names if n not in part["failures"]]:
                    with Crew(ranks, gib) as crew, workspace(root) as path:
                        part["nbytes"] = crew.nbytes
                        try:
                            part["weights"][name] = measure(crew, name, args.saves, path)
                        except Failed as failure:
                            part["failures"][name] = str(failure)
                result["tables"].append(part)
    return result


def tables(result: dict[str, Any]) -> list[Table]:
    return [_table(part) for part in result["tables"]]


def _table(part: dict[str, Any]) -> Table:
    count, slot = part["saves"], part["nbytes"]
    tenth = max(1, count // 10)
    table = Table(
        f"Memory over {count} background saves, {part['gib']:g} GiB, {part['ranks']} rank{'s' * (part['ranks'] > 1)}",
        [
            "",
            "slots MiB",
            "beyond them after 1 MiB",
            f"after {count} MiB",
            f"growth {tenth}-{count} MiB",
            "% of a slot",
        ],
    )
    for name, weights in part["weights"].items():
        total = {int(n): w["mapped"] + w["unmapped"] for n, w in weights.items()}
        slots = SLOTS.get(name, 0) * slot
        growth = total[count] - total[tenth]
        beyond = [f"{(total[n] - total[0] - slots) / MIB:.1f}" for n in (1, count)]
        table.rows.append([name, f"{slots / MIB:.1f}", *beyond, f"{growth / MIB:.1f}", f"{100 * growth / slot:.2f}"])
    table.rows += [[name, "does not run", *[""] * 4] for name in part["failures"]]
    table.notes.append(
        f"A slot is one copy of the state, {slot / MIB:.1f} MiB over all ranks. Beyond: above what the ranks took before "
        "their first save, less the slots that a contestant declares. Fresh processes for each contestant."
    )
    table.notes += background.remarks([*part["weights"], *part["failures"]], part["failures"])
    return table


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__ or "", rounds=False)
    parser.set_defaults(ranks=[2], gib=[0.05])
    parser.add_argument("--saves", type=int, default=200, help="saves of one series")
    args = parser.parse_args(argv)
    result = run(args)
    finish(result, tables(result), args.json)


if __name__ == "__main__":
    main()
