"""What do running averages cost, and whom?

The fold, on one core: a keeper's own, from a sealed pack into a new pack with its checksums, against a copy of memory to
memory in the same rounds. Bytes are those touched: elements read, each accumulator read and written.

A loop on a model of an accelerator, which leaves the processor idle: what a snapshot at each step holds it up with
averages and without (the call and the fence), and what updating an average in the loop, on the processor, takes from it.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ckpt
from benchmarks.harness import Rounds, Sample
from benchmarks.report import Table, finish, machine, options, ratio_cell, spread, verdict, workspace
from ckpt.format.fragment import whole
from ckpt.format.pack import TensorSpec, layout_pack
from ckpt.keeper.averaged import with_averages
from ckpt.keeper.averaging import Base, cut_of, fold_pack
from ckpt.keeper.holding import pieces_of
from ckpt.keeper.view import keepers_here
from ckpt.merge.average import Progress
from ckpt.merge.fold import ACCUMULATORS
from ckpt.merge.native import kernels
from ckpt.plan import SHARD, Claim, Claims, merge
from ckpt.snapshot.arena import Slot
from ckpt.snapshot.copier import Snapshot
from ckpt.snapshot.device import Timed, pretend
from ckpt.write import Stored

MEMCPY = "limit: memcpy"
ASKED_FOLD, ASKED_STALL, ASKED_RATIO = 0.60, 1e-3, 20.0
RULES = {
    "ema": ckpt.EMA(half_life=2000),
    "swa": ckpt.Power(q=1),
    "edm": ckpt.PowerEMA(0.10),
    "wsm": ckpt.Power(q=0.5),
}
BARE, PLAIN, TORCH, PEER = "nothing", "memory", "AveragedModel in the loop", "ema-pytorch in the loop"
OURS = {f"memory, {n} average{'s' * (n > 1)}": dict(list(RULES.items())[:n]) for n in (1, 4)}
SIDE = 1 << 20  # numbers of one tensor
WAIT = 120.0


# --- the fold -------------------------------------------------------------------------------------------------------


class Fold:
    """Snapshots of `count` numbers of a type, folded back and forth between two packs of `many` averages."""

    def __init__(self, kind: str, count: int, many: int) -> None:
        names = [f"t{n}" for n in range(max(1, count // SIDE))]
        claims = [Claim(TensorSpec(n, kind, (SIDE,)), (whole((SIDE,)),), SHARD) for n in names]
        plan = merge([Claims.of(claims)])
        pieces = pieces_of(plan, 0, ())
        rng, layout = np.random.default_rng(0), layout_pack(pieces)
        value = torch.from_numpy(rng.standard_normal(SIDE).astype(np.float32)).to(getattr(torch, kind))
        raw = value.view(torch.uint8).numpy()
        self._snapshot = np.zeros(layout.size, dtype=np.uint8)
        self._report = Snapshot(layout, [Stored(raw)] * len(pieces), [False] * len(pieces), self._snapshot).seal()
        averages = sorted(list(RULES)[:many])
        self._cut = cut_of(with_averages(plan, 1, averages, {n: n for n in names}), 1, 0, averages, {})
        progress = {n: Progress(RULES[n].spec, folds=2, step=5, t=6.0, start=0.0) for n in averages}
        packs = [Slot(self._cut.layout.size, "ckpt-bench").buffer for _ in range(2)]
        self._bases = [Base(pack, progress) for pack in packs]
        wide = np.dtype(ACCUMULATORS[kind]).itemsize
        self.nbytes = len(names) * SIDE * (value.element_size() + 2 * wide * many)
        self._marks = {n: [10.0, 0.0] for n in averages}

    def __call__(self) -> None:
        self._bases.reverse()
        old, new = self._bases
        assert new.pack is not None
        done = fold_pack(self._snapshot, self._report, self._cut, old, 9, self._marks, new.pack, threading.Event())
        assert not done.refused


class Copy:
    """The same number of bytes, half of them read and half written."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._from, self._to = np.ones(nbytes // 2, dtype=np.uint8), np.zeros(nbytes // 2, dtype=np.uint8)

    def __call__(self) -> None:
        np.copyto(self._to, self._from)


def folds(kind: str, many: int, mib: float, rounds: int) -> Rounds:
    ours = Fold(kind, int(mib * 2**20) // 4, many)
    calls: dict[str, Callable[[], None]] = {MEMCPY: Copy(ours.nbytes), "ckpt": ours}

    def turn(_: int, name: str) -> Sample:
        cpu, began = time.thread_time(), time.perf_counter()
        calls[name]()
        return Sample(time.perf_counter() - began, time.thread_time() - cpu, 0)

    return Rounds(ours.nbytes, [MEMCPY]).run(list(calls), rounds, turn)


# --- the loop -------------------------------------------------------------------------------------------------------


class Idle(torch.optim.Optimizer):
    """Changes nothing, but is fenced like any other."""

    def step(self, closure: Any = None) -> None:
        pass


def model_of(gib: float) -> nn.Module:
    return nn.ParameterList([torch.randn(SIDE) for _ in range(max(1, int(gib * 2**30 / 4 / SIDE)))])


def loop(name: str, folder: Path, gib: float, steps: int, seconds: float) -> dict[str, Any]:
    """Seconds that a step was held up, on average; how many were whole, and how much memory the keeper has."""
    torch.manual_seed(0)
    model, device = model_of(gib), Timed(12.0)
    optimizer = Idle(model.parameters(), {})
    cp, update = None, None
    if name == TORCH:
        mine = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
        update = lambda: mine.update_parameters(model)  # noqa: E731
    elif name == PEER:
        from ema_pytorch import EMA

        theirs = EMA(model, beta=0.999, update_every=1, update_after_step=0, include_online_model=False)
        update = theirs.update
    elif name != BARE:
        state = {"model": model, "optimizer": optimizer}
        cp = ckpt.Checkpointer(folder, state, memory=ckpt.Every(1), averages=OURS.get(name))
    held, handles, memory = [], [], 0
    with pretend(device):
        for step in range(3 + steps):
            device.step(seconds)
            began = time.perf_counter()
            optimizer.step()
            if update is not None:
                update()
            elif cp is not None:
                handles.append(cp.step(step))
            if cp is None or handles[-1] is not None:
                held.append((step, time.perf_counter() - began))
        if cp is not None:
            assert cp.wait(WAIT)
            memory = sum(k.memory for k in keepers_here() if k.run == str(folder))
    whole_ = sum(h is not None and h.committed(WAIT) for h in handles[3:])
    if cp is not None:
        cp._saves.close()  # without the last save to storage
    took = [seconds for step, seconds in held if step >= 3] or [float("nan")]
    return {"held": took, "whole": whole_, "memory": memory, "numbers": sum(p.numel() for p in model.parameters())}


def loops(path: Path, gib: float, steps: int, seconds: float, rounds: int) -> Rounds:
    names = [BARE, PLAIN, *OURS, TORCH]
    out = Rounds(0, [])
    if importlib.util.find_spec("ema_pytorch") is not None:
        names.append(PEER)
    else:
        out.failures[PEER] = "not installed (pip install ema-pytorch)"

    def turn(number: int, name: str) -> Sample:
        gc.collect()
        extra = loop(name, path / f"{number}-{names.index(name)}", gib, steps, seconds)
        return Sample(statistics.fmean(extra.pop("held")), 0.0, 0, extra)

    return out.run(names, rounds, turn)


# --- tables ---------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"bench": "fold", "compiled": bool(kernels().fold), "tables": []}
    torch.set_num_threads(1)
    for kind in ("float32", "bfloat16"):
        for many in (1, 4):
            rounds = folds(kind, many, args.mib, args.rounds)
            result["tables"].append({"what": "fold", "kind": kind, "averages": many, **rounds.to_json()})
    with workspace(args.dir) as path:
        result["machine"] = machine(path)
        for gib in args.gib:
            rounds = loops(path, gib, args.steps, args.step_seconds, args.rounds)
            about = {"what": "loop", "gib": gib, "steps": args.steps, "step_seconds": args.step_seconds}
            result["tables"].append({**about, **rounds.to_json()})
    return result


def tables(result: dict[str, Any]) -> list[Table]:
    first = Table(
        "Folding snapshots into running averages, one core", ["", "GB/s touched", "of memcpy", "CPU s per GB"]
    )
    out = [first]
    for part in result["tables"]:
        rounds = Rounds.from_json(part)
        if part["what"] == "loop":
            out.append(_loop_table(part, rounds))
            continue
        gb = rounds.nbytes / 1e9
        for name in (MEMCPY, "ckpt"):
            speeds = [gb / s.seconds for s in rounds.samples[name] if s]
            cpu = rounds.median(name, lambda s: s.cpu_seconds) / gb
            label = f"{part['kind']}, {part['averages']} average{'s' * (part['averages'] > 1)}"
            ratio = ratio_cell(rounds.ratios(name), ASKED_FOLD) if name == "ckpt" else ""
            first.rows.append([label if name == "ckpt" else f"{label}: {name}", spread(speeds), ratio, f"{cpu:.3f}"])
    how = "by compiled kernels" if result.get("compiled") else "by numpy: the compiled kernels were not built"
    first.notes.append(
        f"With checksums of what is written, the guard against what is not finite, and the drift; {how}."
    )
    return out


def _loop_table(part: dict[str, Any], rounds: Rounds) -> Table:
    table = Table(
        f"A snapshot at every step of a loop of {part['step_seconds']:g} s a step, {part['gib']:g} GiB of float32",
        ["", "held up ms a step", "above memory alone ms", "whole", "extra memory B a number and slot"],
    )
    base = [s.seconds if s else 0.0 for s in rounds.samples[PLAIN]]
    in_loop = min((rounds.median(n, lambda s: s.seconds) for n in (TORCH, PEER) if n in rounds.samples), default=0.0)
    for name in rounds.samples:
        column = [s for s in rounds.samples[name] if s]
        added = [s.seconds - b for s, b in zip(column, base, strict=True)]
        row = [name, spread([s.seconds * 1e3 for s in column], ".3f"), "", "", ""]
        if name in OURS:
            middle = statistics.median(added)
            row[2] = spread([a * 1e3 for a in added], ".3f") + verdict(middle < ASKED_STALL)
            plain = rounds.median(PLAIN, lambda s: s.extra["memory"])
            numbers = column[0].extra["numbers"]
            row[4] = f"{(rounds.median(name, lambda s: s.extra['memory']) - plain) / numbers / 2:.2f}"
            ratio = in_loop / max(middle, 1e-9)
            table.notes.append(
                f"{name}: the fastest update in the loop takes {'over 1000' if ratio > 1000 else f'{ratio:.0f}'} times as much "
                f"of the training thread for one average (asked: {ASKED_RATIO:g}){verdict(ratio >= ASKED_RATIO)}"
            )
        if name == PLAIN or name in OURS:
            row[3] = f"{sum(s.extra['whole'] for s in column)} of {part['steps'] * len(column)}"
        table.rows.append(row)
    table.notes += [f"{name}: {why}" for name, why in rounds.failures.items()]
    table.notes.append("Held up: of steps that were snapshotted, one is skipped while the last is being folded.")
    table.notes.append("Two slots; a snapshot of an accelerator's model goes over a bus of 12 GB/s.")
    return table


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__ or "", ranks=False)
    parser.add_argument("--mib", type=float, default=256, help="MiB of one accumulator in the fold")
    parser.add_argument("--steps", type=int, default=30, help="steps of the loop that count")
    parser.add_argument("--step-seconds", type=float, default=0.2, help="of one step")
    args = parser.parse_args(argv)
    result = run(args)
    finish(result, tables(result), args.json)


if __name__ == "__main__":
    main()
