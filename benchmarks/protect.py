"""What does it cost to protect a snapshot from the loss of hosts?

Six hosts on this machine, each with a keeper and a trainer, in one group of 4 + 2, over loopback. Time: from the moment at
which all ranks have sealed a step until it is announced, in the middle of which every byte has gone to two other processes
and been folded there; the limit is the same traffic between the same number of processes through plain sockets, from warm
memory into one buffer a connection, with nothing computed. Then a loop whose computing is done by a timed device, with a
snapshot at every step: how much longer it takes with protection than without.
"""

from __future__ import annotations

import argparse
import gc
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import ckpt
from benchmarks.crew import Crew
from benchmarks.harness import Rank, Rounds, Sample
from benchmarks.report import Table, finish, machine, options, spread, verdict, workspace
from ckpt.keeper.groups import Host, place
from ckpt.keeper.view import keepers_here
from ckpt.snapshot.device import Timed, pretend

LIMIT, OURS, PLAIN, PROTECTED = "limit: plain sockets", "ckpt", "snapshots", "snapshots, protected"
HOSTS, CODE = 6, ckpt.ErasureCode(data=4, parity=2)
ASKED_TIME, ASKED_MEMORY, ASKED_SLOWDOWN = 1.6, 1.05, 0.02
PIECE = 1 << 20
WAIT = 120.0
GBPS = 12.0  # of the timed device's bus


# --- on a rank ------------------------------------------------------------------------------------------------------


class Protected:
    """What is told of steps that are protected; waiting for it takes nothing from what is measured."""

    def __init__(self) -> None:
        self._told: list[Any] = []
        self._changed = threading.Condition()

    def hear(self, event: Any) -> None:
        if event.kind == "protect":
            with self._changed:
                self._told.append(event)
                self._changed.notify_all()

    def waited(self, step: int) -> Any:
        """The event that tells of a step, or of a later one."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._told and self._told[-1].step >= step, WAIT):
                raise RuntimeError(f"step {step} was not protected within {WAIT:.0f} s")
            return next(e for e in self._told if e.step >= step)


def checkpointer(rank: Rank, folder: str, protected: bool, heard: Callable[[Any], None]) -> ckpt.Checkpointer:
    """Of a rank that is a host of its own."""
    os.environ.update(CKPT_HOST=f"h{rank.rank}", CKPT_BIND="127.0.0.1")
    redundancy = CODE if protected else None
    out = ckpt.Checkpointer(folder, rank.state.tree(), memory=ckpt.Every(1), redundancy=redundancy, on_event=heard)
    out.restore()
    return out


def protect(rank: Rank, name: str, folder: str, saves: int) -> dict[str, Any]:
    """Some snapshots, one after the other: the seconds that each took to be protected, and what parity takes here."""
    told = Protected()
    cp = checkpointer(rank, folder, True, told.hear)
    lags, step = [], 0
    while len(lags) < saves + 1:  # the first one touches what nobody touched yet
        dist.barrier()
        handle = cp.step(step)
        taken = torch.tensor([int(handle is not None and handle.committed(WAIT))])
        dist.all_reduce(taken, op=dist.ReduceOp.MIN)
        if taken.item():
            lags.append(told.waited(step).lag)
        else:
            time.sleep(0.01)  # the next grant is on its way
        step += 1
    [keeper] = [
        k for k in keepers_here() if k.host == f"h{rank.rank}" and os.path.realpath(k.run) == os.path.realpath(folder)
    ]
    out = {"lags": lags[1:], "parity": keeper.parity, "group": list(keeper.group), "packs": keeper.steps[-1].bytes}
    dist.barrier()
    cp.close()
    return out


def plain(rank: Rank, name: str, folder: str, saves: int) -> dict[str, Any]:
    """The same bytes to the same processes: one connection and one thread for each that sends, and each that receives."""
    nbytes = rank.state.local_bytes
    sizes: list[Any] = [None] * rank.world
    dist.all_gather_object(sizes, nbytes)
    [group] = place([Host(f"h{n}", f"h{n}", size) for n, size in enumerate(sizes)], CODE).groups
    mine = group.shares[f"h{rank.rank}"]
    to: dict[str, list[tuple[int, int]]] = {}
    for chunk in mine.chunks:
        for keeper in chunk.keepers:
            to.setdefault(keeper, []).append((chunk.start, chunk.stop))
    due = {
        h.name: sum(c.stop - c.start for c in group.shares[h.name].chunks if f"h{rank.rank}" in c.keepers)
        for h in group.hosts
    }
    data = np.ones(nbytes, dtype=np.uint8)
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    ports: list[Any] = [None] * rank.world
    dist.all_gather_object(ports, listener.getsockname()[1])
    outs = {}
    for keeper in to:
        outs[keeper] = socket.create_connection(("127.0.0.1", ports[int(keeper[1:])]))
        outs[keeper].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        outs[keeper].sendall(bytes([rank.rank]))
    ins = {}
    for _ in range(sum(n > 0 for n in due.values())):
        sock = listener.accept()[0]
        ins[f"h{sock.recv(1)[0]}"] = sock
    buffers = {name: np.empty(PIECE, dtype=np.uint8) for name in ins}

    def send(keeper: str) -> None:
        for start, stop in to[keeper]:
            for at in range(start, stop, PIECE):
                outs[keeper].sendall(data[at : min(at + PIECE, stop)])

    def receive(name: str) -> None:
        left = due[name]
        while left:
            left -= ins[name].recv_into(buffers[name], min(left, PIECE), socket.MSG_WAITALL)

    spans = []
    for _ in range(saves + 1):
        threads = [threading.Thread(target=send, args=(k,)) for k in to] + [
            threading.Thread(target=receive, args=(n,)) for n in ins
        ]
        dist.barrier()
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        spans.append((began, time.perf_counter()))
    for sock in [*outs.values(), *ins.values(), listener]:
        sock.close()
    return {"spans": spans[1:]}


def train(rank: Rank, name: str, folder: str, steps: int, seconds: float) -> dict[str, Any]:
    """A loop on a timed device, with a snapshot at every step; its seconds, and what came of the snapshots."""
    device = Timed(GBPS, moves=False)
    ones = [t.view(-1)[:1] for t in rank.state.local().values() if t.numel()]
    ready = torch.ones(())
    with pretend(device):
        cp = checkpointer(rank, folder, name == PROTECTED, lambda _: None)
        gc.collect()
        for step in range(steps + 3):
            if step == 3:
                dist.barrier()
                start, before = time.perf_counter(), (cp.report.sealed, cp.report.announced)
            device.step(seconds)
            dist.all_reduce(ready, dist.ReduceOp.MIN)
            cp.fence()
            with torch.no_grad():
                torch._foreach_add_(ones, 1e-3)
            cp.step(step)
        end = time.perf_counter()
        done = cp.report.sealed - before[0], cp.report.announced - before[1]
        dist.barrier()
        cp.close()
    return {"start": start, "end": end, "sealed": done[0], "announced": done[1]}


# --- in the parent --------------------------------------------------------------------------------------------------


def measure(crew: Crew, rounds: int, saves: int, path: Path) -> Rounds:
    def turn(number: int, name: str) -> Sample:
        parts = crew.turn(protect if name == OURS else plain, name, path, number, saves)
        if name == LIMIT:
            spans = list(zip(*(part["spans"] for part in parts), strict=True))
            times = [max(end for _, end in span) - min(began for began, _ in span) for span in spans]
            return Sample(statistics.median(times), 0.0, 0)
        extra = {
            "parity": sum(p["parity"] for p in parts),
            "packs": sum(p["packs"] for p in parts),
            "group": parts[0]["group"],
        }
        return Sample(statistics.median(parts[0]["lags"]), 0.0, 0, extra)

    return Rounds(crew.nbytes, [LIMIT]).run([LIMIT, OURS], rounds, turn)


def measure_loop(crew: Crew, rounds: int, steps: int, seconds: float, path: Path) -> Rounds:
    def turn(number: int, name: str) -> Sample:
        parts = crew.turn(train, name, path, number, steps, seconds)
        took = max(p["end"] for p in parts) - min(p["start"] for p in parts)
        return Sample(took / steps, 0.0, 0, {k: parts[0][k] for k in ("sealed", "announced")})

    return Rounds(crew.nbytes, [PLAIN]).run([PLAIN, PROTECTED], rounds, turn)


def run(args: argparse.Namespace) -> dict[str, Any]:
    with workspace(args.dir) as root:
        result: dict[str, Any] = {"bench": "protect", "machine": machine(root), "tables": []}
        for gib in args.gib:
            with Crew(HOSTS, gib) as crew, workspace(root) as path:
                parts = {
                    "time": measure(crew, args.rounds, args.saves, path),
                    "loop": measure_loop(crew, args.rounds, args.steps, args.step_seconds, path),
                }
            for what, rounds in parts.items():
                about = {"what": what, "gib": gib, "steps": args.steps, "seconds": args.step_seconds}
                result["tables"].append({**about, **rounds.to_json()})
    return result


def tables(result: dict[str, Any]) -> list[Table]:
    return [_times(part) if part["what"] == "time" else _loop(part) for part in result["tables"]]


def _times(part: dict[str, Any]) -> Table:
    rounds = Rounds.from_json(part)
    table = Table(
        f"Protecting a snapshot of {part['gib']:g} GiB on {HOSTS} hosts, {CODE.data}+{CODE.parity}, loopback",
        ["", "s", "GB/s of the state", "times the limit", "memory for parity / (2 m/k of the packs)"],
    )
    gb = rounds.nbytes / 1e9
    for name in (LIMIT, OURS):
        seconds = [s.seconds for s in rounds.samples[name] if s]
        row = [name, spread(seconds), spread([gb / s for s in seconds]), "", ""]
        if name == OURS:
            ratios = [1 / r for r in rounds.ratios(name)]
            some = [s.extra for s in rounds.samples[name] if s]
            memory = [e["parity"] / (2 * CODE.parity / CODE.data * e["packs"]) for e in some]
            row[3] = spread(ratios) + verdict(statistics.median(ratios) <= ASKED_TIME)
            row[4] = spread(memory) + verdict(max(memory) <= ASKED_MEMORY)
        table.rows.append(row)
    table.notes.append(
        f"Medians (min-max) of {len(rounds.samples[OURS])} rounds. Each byte goes to {CODE.parity} other hosts; all processes "
        f"share this machine's {os.cpu_count()} cores. Asked: at most {ASKED_TIME} times the limit, {ASKED_MEMORY} of the memory."
    )
    return table


def _loop(part: dict[str, Any]) -> Table:
    rounds = Rounds.from_json(part)
    table = Table(
        f"A snapshot at every step of {part['seconds']:g} s on a timed device, {part['gib']:g} GiB, {HOSTS} hosts",
        ["", "s per step", "slower by %", "sealed", "protected"],
    )
    for name in (PLAIN, PROTECTED):
        samples = [s for s in rounds.samples[name] if s]
        row = [name, spread([s.seconds for s in samples], ".4f"), ""]
        if name == PROTECTED:
            slower = [1 / r - 1 for r in rounds.ratios(name)]
            row[2] = spread([100 * s for s in slower]) + verdict(statistics.median(slower) <= ASKED_SLOWDOWN)
        row += [str(sum(s.extra[k] for s in samples)) for k in ("sealed", "announced")]
        table.rows.append(row)
    table.notes.append(
        f"Medians (min-max) of {len(rounds.samples[PLAIN])} rounds of {part['steps']} steps. Asked: at most "
        f"{100 * ASKED_SLOWDOWN:g} % slower. The device's bus carries {GBPS:g} GB/s; copies cost the processor nothing."
    )
    return table


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__ or "", ranks=False)
    parser.set_defaults(gib=[1.5])
    parser.add_argument("--saves", type=int, default=3, help="measured snapshots of a turn; one more warms up")
    parser.add_argument("--steps", type=int, default=8, help="measured steps of a turn; three more warm up")
    parser.add_argument("--step-seconds", type=float, default=2.0, help="how long the device computes")
    args = parser.parse_args(argv)
    result = run(args)
    finish(result, tables(result), args.json)


if __name__ == "__main__":
    main()
