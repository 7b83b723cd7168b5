"""How fast is what lost hosts held in memory there again?

Six hosts (keepers with loopback addresses of their own, a rank each) hold a state under a code of 4 + 2, and two of them
are lost. In every round, on the same hosts:

    restore   four ranks on the hosts that are left load the state in their new layout, every block checked: bytes moved
              between hosts, of the fewest that do; seconds, of our own load of the same state from files that are not in
              the page cache; and the seconds of all that a restart does in ckpt until training may go on
    rebuild   one process reads what one lost host held, decoded from four others; the limit takes as many bytes as that
              needs from four plain sockets and does nothing with them

The fewest bytes: what a rank needs comes once from the host that has it, unless that is its own; what was lost is solved
for where it is needed, from four chunks of which that host has one: three times. What one host decoded and another needs
the chunks of, too, is not passed on.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import ckpt
from benchmarks.crew import Crew
from benchmarks.harness import Rank, drop_caches, settle
from benchmarks.report import Table, finish, machine, options, spread, verdict, workspace
from benchmarks.state import GPT, model_size

HOSTS, CODE, LOST = 6, ckpt.ErasureCode(4, 2), (1, 4)
LEFT = tuple(n for n in range(HOSTS) if n not in LOST)
REBUILD, MOVED, SECONDS, RESTART = 0.60, 1.1, 1.5, 2.0
MIB, RANGE = 1 << 20, 8 << 20
_SENDER = """
import socket, sys
n, data = int(sys.argv[1]), bytes(1 << 20)
with socket.create_server(("127.0.0.1", 0)) as server:
    print(server.getsockname()[1], flush=True)
    peer, _ = server.accept()
    while n > 0:
        peer.sendall(memoryview(data)[:n])
        n -= len(data)
    peer.recv(1)
"""


# --- on a rank ------------------------------------------------------------------------------------------------------


def _on_host(n: int) -> None:
    os.environ.update(CKPT_HOST=f"h{n}", CKPT_BIND=f"127.0.0.{n + 2}", CKPT_GRACE="300")


def hold(rank: Rank, run: str) -> int:
    """Has a step protected, and goes without a word; the pid of the keeper."""
    _on_host(rank.rank)
    cp = ckpt.Checkpointer(run, rank.state.tree(), memory=ckpt.Every(1), redundancy=CODE)
    cp.restore()
    step, done = 0, torch.zeros(1)
    while not done.item():
        handle = cp.step(step)
        if handle is not None:
            handle.done(None)
        step += 1
        done.fill_(float(cp.report.announced > 0))
        dist.all_reduce(done, dist.ReduceOp.MIN)
    return _vanish(cp)


def _vanish(cp: ckpt.Checkpointer) -> int:
    """What a keeper sees of a trainer that was killed: the end of its connection."""
    assert cp._kept is not None
    link = cp._kept._keeping.member.link
    dist.barrier()
    link.close()
    dist.barrier()
    return link.keeper_pid


def store(rank: Rank, run: str) -> None:
    ckpt.save(rank.state.tree(), run)


def load(rank: Rank, run: str) -> dict[str, Any]:
    """From files."""
    rank.state.zero()

    def call() -> dict[str, Any]:
        ckpt.load(rank.state.tree(), run)
        return {}

    return {**rank.timed(call), "wrong": rank.state.wrong()}


def restore(rank: Rank, run: str) -> dict[str, Any]:
    """From the memory of the hosts that are left. Goes on from there, so that the step stays."""
    _on_host(LEFT[rank.rank])
    rank.state.zero()
    made: list[ckpt.Checkpointer] = []

    def call() -> dict[str, Any]:
        made.append(ckpt.Checkpointer(run, rank.state.tree(), memory=ckpt.Every(1), redundancy=CODE))
        made[0].restore()
        return {}

    timing, cp = rank.timed(call), made[0]
    assert cp._kept is not None
    reserving = time.perf_counter()
    cp._kept._keeping._reserving.result()  # beside training; what is measured next is not to share the machine with it
    reserved = time.perf_counter() - reserving
    assert cp.last_load is not None and cp._kept is not None and cp.last_load.ref.startswith("memory of ")
    rank.kept["checkpointer"] = cp
    return {
        **timing,
        "reserved": reserved,
        "load": cp.last_load.seconds,
        "moved": cp._kept.moved,
        "wrong": rank.state.wrong(),
    }


def rebuild(rank: Rank, ports: Sequence[int], nbytes: int) -> dict[str, Any]:
    """What the first lost host held, in one process; the limit; then all let go."""
    cp = rank.kept.pop("checkpointer")
    out: dict[str, Any] = {}
    for what in ("warm", "ours"):
        step = cp._kept.recall().steps[0]  # what keepers have checked until now counts no more
        if rank.rank == 0:
            opened = cp._kept.open(step)
            path = f"{opened.list('')[0].name.partition('/')[0]}/a0/rank-{LOST[0]:05d}.safetensors"
            out |= {what: _seconds(opened, path), "bytes": opened.size(path)}
            opened.close()
    if rank.rank == 0:
        out["raw"] = _raw(ports, nbytes)
    dist.barrier()
    _vanish(cp)
    return out


def _seconds(opened: Any, path: str) -> float:
    """Of reading a pack in ranges as the loader asks for, by as many threads as there are cores."""
    size = opened.size(path)
    todo = iter(range(0, size, RANGE))
    lock = threading.Lock()

    def work() -> None:
        buffer = memoryview(bytearray(RANGE))
        while True:
            with lock:
                at = next(todo, None)
            if at is None:
                return
            opened.read(path, at, [buffer[: min(RANGE, size - at)]])

    return _run([threading.Thread(target=work) for _ in os.sched_getaffinity(0)])


def _raw(ports: Sequence[int], nbytes: int) -> float:
    """Seconds of taking so many bytes from each of some sockets."""
    socks = [socket.create_connection(("127.0.0.1", port)) for port in ports]

    def work(sock: socket.socket) -> None:
        buffer, left = memoryview(bytearray(MIB)), nbytes
        while left > 0:
            left -= sock.recv_into(buffer, min(MIB, left))

    seconds = _run([threading.Thread(target=work, args=(s,)) for s in socks])
    for sock in socks:
        sock.close()
    return seconds


def _run(threads: Sequence[threading.Thread]) -> float:
    start = time.perf_counter()
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return time.perf_counter() - start


# --- in the parent --------------------------------------------------------------------------------------------------


def fewest(gib: float) -> int:
    """Bytes that must move between hosts, by the rows of FSDP2's cuts before and after."""
    with torch.device("meta"):
        shapes = [p.shape for p in GPT(*model_size(gib)).parameters()]
    total = 0
    for shape in shapes:
        row = 3 * 4 * shape.numel() // shape[0]  # of a parameter and its two moments
        for new in range(len(LEFT)):
            for old in range(HOSTS):
                (a, b), (c, d) = _rows(shape[0], old, HOSTS), _rows(shape[0], new, len(LEFT))
                times = CODE.data - 1 if old in LOST else int(old != LEFT[new])
                total += times * row * max(0, min(b, d) - max(a, c))
    return total


def _rows(n: int, rank: int, world: int) -> tuple[int, int]:
    rows = -(-n // world)
    return min(n, rank * rows), min(n, (rank + 1) * rows)


def turn(gib: float, root: Path) -> dict[str, Any]:
    """One round."""
    run, files = str(root / "run"), str(root / "files")
    pids: list[int] = []
    try:
        with Crew(HOSTS, gib) as six:
            nbytes = six.nbytes
            pids = six.call(hold, run)
            _end([pids[n] for n in LOST])
            for process in six._processes:  # before its end the crew would end their keepers, too
                process.kill()
            six._processes.clear()
        with Crew(len(LEFT), gib) as four:
            restored = four.call(restore, run)
            part = -(-nbytes // HOSTS)
            senders = [
                subprocess.Popen([sys.executable, "-c", _SENDER, str(part)], stdout=subprocess.PIPE)
                for _ in range(CODE.data)
            ]
            ports = [int(s.stdout.readline()) for s in senders if s.stdout is not None]
            rebuilt = four.call(rebuild, ports, part)[0]
            for sender in senders:
                sender.wait(60)
            _end(pids)
            four.call(store, files)
            cold = drop_caches(root)
            settle()
            loaded = four.call(load, files)
    finally:
        _end(pids)
    wrong = [name for part in (*restored, *loaded) for name in part["wrong"]]
    assert not wrong, f"not what was saved: {wrong[:5]}"
    return {
        "nbytes": nbytes,
        "cold": cold,
        "moved": sum(p["moved"] for p in restored),
        "fewest": fewest(gib),
        "restart": _span(restored),
        "load": max(p["load"] for p in restored),
        "reserved": max(p["reserved"] for p in restored),
        "files": _span(loaded),
        "rebuilt": rebuilt["bytes"],
        "rebuild": rebuilt["ours"],
        "raw": rebuilt["raw"] * rebuilt["bytes"] / part,
    }


def _span(parts: Sequence[dict[str, Any]]) -> float:
    seconds: float = max(p["end"] for p in parts) - min(p["start"] for p in parts)
    return seconds


def _end(pids: Sequence[int]) -> None:
    """Keepers are lost with all that they hold."""
    for pid in pids:
        with suppress(OSError):
            if b"ckpt.keeper" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)


def run(args: argparse.Namespace) -> dict[str, Any]:
    with workspace(args.dir) as root:
        result: dict[str, Any] = {"bench": "rebuild", "machine": machine(root), "tables": []}
    for gib in args.gib:
        rounds = []
        for number in range(args.rounds + 1):
            with workspace(args.dir) as root:
                found = turn(gib, root)
            if number:
                rounds.append(found)
        result["tables"].append({"gib": gib, "rounds": rounds})
    return result


def tables(result: dict[str, Any]) -> list[Table]:
    return [_table(part) for part in result["tables"]]


def _table(part: dict[str, Any]) -> Table:
    rounds = part["rounds"]
    table = Table(f"Two of six hosts lost, {part['gib']:g} GiB on the four that are left", ["", "", "asked"])

    def row(name: str, values: Sequence[float], asked: str = "", holds: bool | None = None) -> None:
        table.rows.append([name, spread(values) + ("" if holds is None else verdict(holds)), asked])

    moved = [r["moved"] / r["fewest"] for r in rounds]
    seconds = [r["load"] / r["files"] for r in rounds]
    restart = [r["restart"] for r in rounds]
    rebuild = [r["raw"] / r["rebuild"] for r in rounds]
    median = statistics.median
    row("bytes moved, of the fewest", moved, f"at most {MOVED}", median(moved) <= MOVED)
    row("load from memory, s", [r["load"] for r in rounds])
    row("load from cold files, s", [r["files"] for r in rounds])
    row("time, of cold files", seconds, f"at most {SECONDS}", median(seconds) <= SECONDS)
    row("whole restart in ckpt, s", restart, f"under {RESTART:g}", median(restart) < RESTART)
    row("memory reserved beside training, s more", [r["reserved"] for r in rounds])
    row("one lost host rebuilt, GB/s", [r["rebuilt"] / r["rebuild"] / 1e9 for r in rounds])
    row("rebuild, of plain sockets", rebuild, f"at least {REBUILD}", median(rebuild) >= REBUILD)
    gb = rounds[0]["nbytes"] / 1e9
    table.notes.append(
        f"{gb:.2f} GB, medians (min-max) of {len(rounds)} rounds; caches dropped by {rounds[0]['cold']}."
    )
    return table


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__ or "", ranks=False)
    parser.set_defaults(gib=[1.5], rounds=3)
    args = parser.parse_args(argv)
    result = run(args)
    finish(result, tables(result), args.json)


if __name__ == "__main__":
    main()
