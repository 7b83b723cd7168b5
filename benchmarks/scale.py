"""What does a checkpoint of 16,384 ranks and a million fragments cost the ranks that plan it, and a run of a thousand
steps the person who lists it?

The job is simulated: 16 pipeline stages of 8 tensor-parallel by 128 data-parallel ranks, whose claims are made up as
each rank would make them. What is timed is the library's own planning, on one core, without any I/O but the manifest's
file. The run is real: a thousand committed steps of a tiny state, listed by the command line in a fresh process.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ckpt
from benchmarks.report import Table, finish, machine, options, spread, verdict, workspace
from ckpt.format.codec import BLOCK
from ckpt.format.fragment import Box
from ckpt.format.manifest import Manifest, Packs, build_manifest, dump_manifest
from ckpt.format.parse import parse_manifest
from ckpt.plan import MESH, Claims, Plan, merge
from ckpt.read import Target, plan_reads

STAGES, TENSOR, DATA = 16, 8, 128
RANKS = STAGES * TENSOR * DATA
FRAGMENTS = 1_000_000
WIDTH, NORMS = 8192, 20
STEPS = 1000
ASKED = {"manifest": 48, "open": 0.4, "read": 0.050, "save": 5.0, "list": 0.5}


# --- the simulated job ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a rank stands in the mesh."""

    stage: int
    tensor: int
    data: int

    @classmethod
    def of(cls, rank: int) -> Place:
        return cls(rank // (TENSOR * DATA), rank // DATA % TENSOR, rank % DATA)


def weights(stage: int) -> int:
    """Tensors of a stage, each cut over all its ranks: together they make the million fragments, the last stage more."""
    total = -(-FRAGMENTS // (TENSOR * DATA))
    each = total // STAGES
    return each if stage < STAGES - 1 else total - each * (STAGES - 1)


def weight_box(number: int, place: Place, data: int = DATA) -> Box:
    """Even tensors are cut by columns over the tensor-parallel ranks, odd ones by rows; both by rows over `data`."""
    if number % 2:
        return Box((place.data * WIDTH // data, place.tensor * WIDTH // TENSOR), (WIDTH // data, WIDTH // TENSOR))
    rows = WIDTH // TENSOR // data
    return Box(((place.tensor * data + place.data) * rows, 0), (rows, WIDTH))


def claims(*, copies: bool) -> list[Claims]:
    """What every rank holds. With `copies`, 20 vectors a stage more, each the same on all tensor-parallel ranks."""
    heads = []
    for stage in range(STAGES):
        rows: list[list[Any]] = [
            [f"stages.{stage}.{n}.weight", "float32", [WIDTH, WIDTH], "", MESH, f"pp={stage}", 0]
            for n in range(weights(stage))
        ]
        if copies:
            rows += [[f"stages.{stage}.{n}.norm", "float32", [WIDTH], "", MESH, f"pp={stage}", 0] for n in range(NORMS)]
        heads.append(json.dumps(rows, separators=(",", ":")))
    out = []
    for rank in range(RANKS):
        place = Place.of(rank)
        boxes = [weight_box(n, place) for n in range(weights(place.stage))]
        rows_ = [[b.offset, b.shape] for b in boxes]
        if copies:
            rows_ += [[(place.data * WIDTH // DATA, 0), (WIDTH // DATA, 0)]] * NORMS
        count = len(rows_)
        box = np.array(rows_, dtype=np.int64)
        out.append(Claims(heads[place.stage], np.arange(count, dtype=np.int32), box, np.zeros(count, np.uint64)))
    return out


def manifest_of(plan: Plan) -> Manifest:
    """The manifest that the ranks' reports would make: every rank's fragments one after another in its pack."""
    length = plan.box[:, 1].prod(axis=1) * 4
    end = np.cumsum(length)
    before = np.concatenate(([0], end))[np.searchsorted(plan.rank, np.arange(RANKS + 1))]
    blocks = -(-length // BLOCK)
    block_end = np.cumsum(blocks)
    block_before = np.concatenate(([0], block_end))[np.searchsorted(plan.rank, np.arange(RANKS + 1))]
    data_start = 3 * 4096
    table = data_start + np.diff(before)
    packs = Packs(
        writer=np.arange(RANKS, dtype=np.uint32),
        size=(table + np.diff(block_before) * 4).astype(np.uint64),
        data_start=np.full(RANKS, data_start, np.uint64),
        header_crc=np.zeros(RANKS, np.uint32),
        table_offset=table.astype(np.uint64),
        blocks=np.diff(block_before).astype(np.uint32),
        entry=np.full(RANKS, 4, np.uint8),
        table_crc=np.zeros(RANKS, np.uint32),
    )
    return build_manifest(
        step=1,
        generation=0,
        attempt="a0",
        world=RANKS,
        tensors=plan.tensors,
        objects=(),
        codecs=(),
        packs=packs,
        aliases={},
        tensor=plan.tensor,
        boxes=plan.box,
        pack=plan.rank,
        offset=(data_start + end - length - before[plan.rank]).astype(np.uint64),
        length=length.astype(np.uint64),
        block=(block_end - blocks - block_before[plan.rank]).astype(np.uint32),
        codec=None,
    )


def targets(manifest: Manifest, rank: int) -> list[Target]:
    """What a rank of half as many data-parallel ranks wants: its part of every weight of its stage."""
    data = DATA // 2
    place = Place(rank // (TENSOR * data), rank // data % TENSOR, rank % data)
    out = []
    for number in range(weights(place.stage)):
        box = weight_box(number, place, data)
        tensor = manifest.index(f"stages.{place.stage}.{number}.weight")
        out.append(Target(tensor, box, np.empty(box.shape, dtype=np.float32)))
    return out


# --- the measurements -------------------------------------------------------------------------------------------------


def seconds(rounds: int, call: Callable[[], Any]) -> list[float]:
    """Times of `rounds` calls after one that is dropped."""
    out = []
    for _ in range(rounds + 1):
        gc.collect()
        start = time.perf_counter()
        call()
        out.append(time.perf_counter() - start)
    return out[1:]


def planning(rounds: int, path: Path) -> dict[str, Any]:
    messages = [c.encode() for c in claims(copies=False)]
    plan = merge([Claims.decode(m) for m in messages])
    manifest = manifest_of(plan)
    file = path / "manifest.safetensors"
    file.write_bytes(dump_manifest(manifest))
    result: dict[str, Any] = {
        "fragments": len(manifest.pack),
        "manifest_bytes": file.stat().st_size,
        "save": seconds(rounds, lambda: merge([Claims.decode(m) for m in messages])),
        "open": seconds(rounds, lambda: parse_manifest(file.read_bytes())),
        "read": [],
    }
    manifest = parse_manifest(file.read_bytes())
    for rank in np.linspace(0, RANKS // 2 - 1, rounds, dtype=int).tolist():
        wanted = targets(manifest, rank)
        result["read"] += seconds(1, lambda wanted=wanted: plan_reads(manifest, wanted))
    copied = [c.encode() for c in claims(copies=True)]
    result["save_copies"] = seconds(rounds, lambda: merge([Claims.decode(m) for m in copied]))
    return result


def listing(rounds: int, path: Path) -> dict[str, Any]:
    """`ckpt ls` of a run with many steps, start-up of the interpreter included."""
    run = path / "run"
    state = {"weight": torch.zeros(16)}
    for step in range(STEPS):
        ckpt.save(state, str(run), step=step, metrics={"loss": 1.0 / (step + 1)})
    command = [str(Path(sys.executable).with_name("ckpt")), "ls", str(run)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    times = seconds(rounds, lambda: subprocess.run(command, check=True, capture_output=True))
    probe = (
        "import sys\nfrom ckpt.cli import main\nsys.argv = sys.argv[:1] + ['ls', sys.argv[1]]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\nprint('torch' in sys.modules, file=sys.stderr)"
    )
    seen = subprocess.run([sys.executable, "-c", probe, str(run)], check=True, capture_output=True, text=True).stderr
    return {"seconds": times, "lines": len(output.splitlines()), "imports_torch": seen.split()[-1] == "True"}


def run(args: argparse.Namespace) -> dict[str, Any]:
    with workspace(args.dir) as path:
        return {
            "bench": "scale",
            "machine": machine(path),
            "planning": planning(args.rounds, path),
            "listing": listing(args.rounds, path),
        }


def tables(result: dict[str, Any]) -> list[Table]:
    p, ls = result["planning"], result["listing"]
    size = p["manifest_bytes"] / p["fragments"]
    table = Table(
        f"Scale: {RANKS:,} ranks, {p['fragments']:,} fragments (simulated); a run of {STEPS:,} steps",
        ["", "measured", "asked"],
        [["manifest, bytes a fragment", f"{size:.1f}{verdict(size <= ASKED['manifest'])}", f"{ASKED['manifest']}"]],
    )

    def add(name: str, values: Sequence[float], asked: float, unit: float = 1.0) -> None:
        scaled = [v * unit for v in values]
        mark = verdict(statistics.median(values) <= asked)
        table.rows.append([name, spread(scaled, ".3g") + mark, f"{asked * unit:g}"])

    add("open the manifest, s", p["open"], ASKED["open"])
    add("read plan of one rank of half as many, ms", p["read"], ASKED["read"], 1000)
    add("save plan of all ranks, s", p["save"], ASKED["save"])
    add(f"the same with {NORMS} vectors a stage replicated {TENSOR} times more, s", p["save_copies"], ASKED["save"])
    add(f"`ckpt ls` of {STEPS:,} steps, s", ls["seconds"], ASKED["list"])
    table.notes.append(f"Medians (min-max) of {len(p['open'])} rounds; one core.")
    table.notes.append(f"`ckpt ls` {'imports' if ls['imports_torch'] else 'does not import'} torch.")
    return [table]


def main(argv: Sequence[str] | None = None) -> None:
    args = options(__doc__ or "", state=False).parse_args(argv)
    result = run(args)
    finish(result, tables(result), args.json)


if __name__ == "__main__":
    main()
