"""How fast does a restarted trainer get its state back from memory?

The trainers of the host have gone without a word, as after `kill -9`; their keeper is there. New ones attach and restore
in place. Two times are taken: of the load itself, every block checked, and of all that a restart does in ckpt until
training may go on (attaching, the choice of a step, the load, a new generation, the plan). The limit reads the same
bytes from a memfd into the same warm tensors and checks nothing; a warm load from files stands beside it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import ckpt
from benchmarks.crew import Crew, bounds
from benchmarks.harness import Rank, Rounds, Sample, warm_up
from benchmarks.report import Table, finish, machine, options, ratio_cell, spread, workspace

LIMIT = "limit: reads of a memfd"
LOAD, WHOLE, FILES = "ckpt, load from memory", "ckpt, whole restart", "ckpt.load, warm files"
ASKED_RATIO = 0.70
_READ = 8 << 20


def restart(rank: Rank, name: str, folder: str) -> dict[str, Any]:
    """One turn of one contestant."""
    if name == LIMIT:
        return _limit(rank)
    if name == FILES:
        return _files(rank, folder)
    state, run = rank.state.tree(), f"{folder}/{name[-7:].strip()}"
    first = ckpt.Checkpointer(run, state, memory=ckpt.Every(1))
    first.restore()
    step = 0
    while (handle := first.step(step)) is None or not handle.committed(None):
        step += 1
    _vanish(first)
    return _restored(rank, run, state, whole=name == WHOLE)


def _vanish(checkpointer: ckpt.Checkpointer) -> None:
    """What a keeper sees of a trainer that was killed: the end of its connection."""
    assert checkpointer._kept is not None
    checkpointer._kept._keeping.member.link.close()
    dist.barrier()


def _restored(rank: Rank, run: str, state: Any, whole: bool) -> dict[str, Any]:
    second: list[ckpt.Checkpointer] = []

    def call() -> dict[str, Any]:
        second.append(ckpt.Checkpointer(run, state, memory=ckpt.Every(1)))
        second[0].restore()
        return {}

    timing = rank.timed(call)
    load = second[0].last_load
    assert load is not None and load.ref.startswith("memory of ")
    if not whole:
        timing["end"] = timing["start"] + load.seconds
    _vanish(second[0])
    last = ckpt.Checkpointer(run, state, memory=ckpt.Every(1))
    last.close()
    return timing


def _limit(rank: Rank) -> dict[str, Any]:
    tensors = [t.reshape(-1).view(torch.uint8).numpy() for t in rank.state.local().values() if t.numel()]
    if "memfd" not in rank.kept:
        fd = rank.kept["memfd"] = os.memfd_create("limit")
        for t in tensors:
            for at in range(0, len(t), _READ):
                os.write(fd, t[at : at + _READ])
    fd = rank.kept["memfd"]

    def call() -> dict[str, Any]:
        offset = 0
        for t in tensors:
            for at in range(0, len(t), _READ):
                os.preadv(fd, [memoryview(t[at : at + _READ])], offset + at)
            offset += len(t)
        return {}

    return rank.timed(call)


def _files(rank: Rank, folder: str) -> dict[str, Any]:
    run, state = f"{folder}/files", rank.state.tree()
    ckpt.save(state, run)
    warm_up(Path(run))  # loads of cold files leave them cold
    ckpt.load(state, run)

    def call() -> dict[str, Any]:
        ckpt.load(state, run)
        return {}

    timing = rank.timed(call)
    dist.barrier()
    if rank.rank == 0:
        shutil.rmtree(run)
    return timing


def measure(crew: Crew, rounds: int, path: Path, seconds: float) -> Rounds:
    def turn(number: int, name: str) -> Sample:
        parts = crew.turn(restart, name, path, number)
        seconds = max(p["end"] for p in parts) - min(p["start"] for p in parts)
        return Sample(seconds, sum(p["cpu"] for p in parts), 0)

    return Rounds(crew.nbytes, [LIMIT]).run([LIMIT, LOAD, WHOLE, FILES], rounds, turn, seconds)


def run(args: argparse.Namespace) -> dict[str, Any]:
    os.environ["CKPT_GRACE"] = "30"
    with workspace(args.dir) as root:
        result: dict[str, Any] = {"bench": "restart", "machine": machine(root), "tables": []}
        for gib in args.gib:
            for ranks in args.ranks:
                with Crew(ranks, gib, args.patience) as crew, workspace(root) as path:
                    rounds = measure(crew, args.rounds, path, args.seconds)
                result["tables"].append({"gib": gib, "ranks": ranks, **rounds.to_json()})
    return result


def tables(result: dict[str, Any]) -> list[Table]:
    return [_table(part) for part in result["tables"]]


def _table(part: dict[str, Any]) -> Table:
    rounds = Rounds.from_json(part)
    gb = rounds.nbytes / 1e9
    table = Table(
        f"Restart from memory, {part['gib']:g} GiB, {part['ranks']} rank{'s' * (part['ranks'] > 1)}",
        ["", "seconds", "GB/s", "of plain reads"],
    )
    seconds: list[float] = []
    for name in rounds.samples:
        seconds = [s.seconds for s in rounds.samples[name] if s]
        ratio = ratio_cell(rounds.ratios(name), ASKED_RATIO if name == LOAD else None)
        table.rows.append([name, spread(seconds), f"{gb / statistics.median(seconds):.2f}", ratio])
    table.notes.append(f"{gb:.2f} GB, medians (min-max) of {len(seconds)} rounds.")
    return table


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__ or "")
    bounds(parser)
    parser.set_defaults(ranks=[2])
    args = parser.parse_args(argv)
    result = run(args)
    finish(result, tables(result), args.json)


if __name__ == "__main__":
    main()
