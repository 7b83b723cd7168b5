"""How fast is `ckpt average`, and how much memory does it take?

Ten checkpoints are averaged into a new one, by a fresh process each time. The limit is what the disk needs at least: a
plain read of as many bytes into one warm buffer, through the page cache or past it, whichever was quicker in the same round,
then a direct write of the result's bytes, one after the other. Reads are cold (the files are dropped from the page cache)
unless --warm. Peak memory is that of the process, its interpreter included.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

import ckpt
from benchmarks.harness import empty, rotated, settle
from benchmarks.report import Table, finish, machine, options, ratio_cell, spread, verdict, workspace

READ, PAST, WRITE, CKPT = "limit: reads", "limit: direct reads", "limit: direct write", "ckpt average"
ASKED_RATIO, ASKED_PEAK = 0.80, 1024.0
_BLOCK = 8 << 20

# getrusage would tell the peak of the process that started it, if that was higher.
_VERB = """
import atexit
def peak():
    with open("/proc/self/status") as file:
        print("\\n" + next(line.split()[1] for line in file if line.startswith("VmHWM")))
atexit.register(peak)
from ckpt.cli import main
main()
"""


def make(run: Path, checkpoints: int, gib: float, dtype: torch.dtype) -> None:
    """Checkpoints of `gib` each: matrices of 16 Mi elements and vectors, all different."""
    left = int(gib * (1 << 30)) // dtype.itemsize
    shapes = [(4096, min(4096, left // 4096))] * max(1, left >> 24)
    state = {f"layer{i}": torch.randn(shape).to(dtype) for i, shape in enumerate(shapes)}
    state |= {f"norm{i}": torch.randn(4096).to(dtype) for i in range(len(shapes))}
    for step in range(checkpoints):
        for tensor in state.values():
            tensor.add_(0.01)
        ckpt.save(state, run, step=step)


def packs(run: Path) -> list[Path]:
    return sorted(run.rglob("rank-*.safetensors"))


def chill(files: Sequence[Path]) -> None:
    """Drops files from the page cache, and only these."""
    os.sync()
    for file in files:
        with file.open("rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(files: Sequence[Path], buffer: memoryview, flags: int = 0) -> None:
    """Reads every file into the same warm buffer, two threads at a time."""
    todo = iter([(f, at) for f in files for at in range(0, f.stat().st_size, _BLOCK)])
    lock = threading.Lock()

    def loop(mine: memoryview) -> None:
        while True:
            with lock:
                job = next(todo, None)
            if job is None:
                return
            fd = os.open(job[0], os.O_RDONLY | flags)
            try:
                os.preadv(fd, [mine], job[1])
            finally:
                os.close(fd)

    half = len(buffer) // 2
    other = threading.Thread(target=loop, args=(buffer[half:],))
    other.start()
    loop(buffer[:half])
    other.join()


def write_all(path: Path, nbytes: int, buffer: memoryview) -> None:
    """Writes as many bytes (rounded up to blocks) around the page cache, and makes them durable."""
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_DIRECT, 0o644)
    try:
        os.posix_fallocate(fd, 0, nbytes)
        for at in range(0, nbytes, _BLOCK):
            os.pwrite(fd, buffer[:_BLOCK], at)
        os.fsync(fd)
    finally:
        os.close(fd)


def average(run: Path, dst: Path, weights: str) -> dict[str, float]:
    """One process: its own seconds without the interpreter's start, and its peak in MiB."""
    command = [sys.executable, "-c", _VERB, "average", str(run), "--to", str(dst), "--weights", weights, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with closing(process.stdout):
            said, peak = (json.loads(line) for line in process.stdout.read().decode().rstrip().rsplit("\n", 1))
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(said["error"]["message"])
    return {"seconds": said["seconds"], "peak_mib": peak / 1024, "cpu": usage.ru_utime + usage.ru_stime}


def measure(run: Path, path: Path, rounds: int, warm: bool, weights: str) -> dict[str, list[dict[str, float]]]:
    files = packs(run)
    buffer = memoryview(mmap.mmap(-1, 2 * _BLOCK))
    buffer[:] = bytes(len(buffer))
    out: dict[str, list[dict[str, float]]] = {READ: [], PAST: [], WRITE: [], CKPT: []}
    for number in range(rounds + 1):
        for name in rotated(list(out), number):
            if not warm:
                chill(files)
            settle()
            began = time.perf_counter()
            if name == CKPT:
                sample = average(run, path / "dst", weights)
            elif name in (READ, PAST):
                read_all(files, buffer, os.O_DIRECT if name == PAST else 0)
                sample = {"seconds": time.perf_counter() - began}
            else:
                write_all(path / "written", files[0].stat().st_size, buffer)
                sample = {"seconds": time.perf_counter() - began}
            empty(path)
            if number:
                out[name].append(sample)
    return out


def run(args: argparse.Namespace) -> dict[str, Any]:
    with workspace(args.dir) as root:
        result: dict[str, Any] = {"bench": "average", "machine": machine(root), "tables": []}
        for gib in args.gib:
            with workspace(root) as source, workspace(root) as path:
                make(source / "run", args.checkpoints, gib, getattr(torch, args.dtype))
                samples = measure(source / "run", path, args.rounds, args.warm, args.weights)
                read = sum(f.stat().st_size for f in packs(source / "run"))
            about = {"gib": gib, "checkpoints": args.checkpoints, "dtype": args.dtype, "weights": args.weights}
            result["tables"].append({**about, "warm": args.warm, "read_bytes": read, "samples": samples})
    return result


def tables(result: dict[str, Any]) -> list[Table]:
    return [_table(part) for part in result["tables"]]


def _table(part: dict[str, Any]) -> Table:
    reads, past, writes, ours = (part["samples"][name] for name in (READ, PAST, WRITE, CKPT))
    title = f"ckpt average {part['weights']}, {part['checkpoints']} checkpoints of {part['gib']:g} GiB, {part['dtype']}"
    table = Table(
        f"{title}, {'warm' if part['warm'] else 'cold'}", ["", "seconds", "of the limit", "CPU s", "peak MiB"]
    )
    for name, samples in ((READ, reads), (PAST, past), (WRITE, writes)):
        table.rows.append([name, spread([s["seconds"] for s in samples]), "", "", ""])
    limits = [min(r["seconds"], p["seconds"]) + w["seconds"] for r, p, w in zip(reads, past, writes, strict=True)]
    ratios = [limit / s["seconds"] for limit, s in zip(limits, ours, strict=True)]
    peak = max(s["peak_mib"] for s in ours)
    table.rows.append(
        [
            CKPT,
            spread([s["seconds"] for s in ours]),
            ratio_cell(ratios, ASKED_RATIO),
            f"{statistics.median(s['cpu'] for s in ours):.1f}",
            f"{peak:.0f}" + verdict(peak < ASKED_PEAK),
        ]
    )
    table.notes.append(
        f"{part['read_bytes'] / 1e9:.2f} GB read, a {part['checkpoints']}th of it written; {len(ours)} rounds. Of the limit: seconds of "
        "the quicker plain reads plus those of the plain write, over those of ckpt average, in the same round; it reads and writes at once."
    )
    return table


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__ or "", ranks=False)
    parser.set_defaults(gib=[1.5])
    parser.add_argument("--checkpoints", type=int, default=10)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float64", "float16"])
    parser.add_argument("--weights", default="wsm:1-sqrt", help="as for ckpt average")
    parser.add_argument("--warm", action="store_true", help="from the page cache")
    args = parser.parse_args(argv)
    result = run(args)
    finish(result, tables(result), args.json)


if __name__ == "__main__":
    main()
