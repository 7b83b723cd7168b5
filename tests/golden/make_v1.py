"""Makes the files under tests/golden/v1 anew: a run in format version 1. Run it only to begin a new version:

    python tests/golden/make_v1.py

What is committed stays as it is, so that later readers are held against what earlier writers wrote. The functions
here say what the files contain; test_v1.py compares.
"""

from __future__ import annotations

import datetime
import itertools
import os
import shutil
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import ckpt
from ckpt import commit
from ckpt.format.dtypes import DTYPES

RUN = Path(__file__).parent / "v1"


def pattern(shape: tuple[int, ...], dtype: torch.dtype, first: int = 1) -> torch.Tensor:
    """A tensor whose bytes count up (for bool: 0 and 1), so that every bit of every type is seen."""
    n = int(np.prod(shape)) * dtype.itemsize
    data = (np.arange(first, first + n) % (2 if dtype == torch.bool else 251)).astype(np.uint8)
    return torch.from_numpy(data).view(dtype).reshape(shape) if n else torch.empty(shape, dtype=dtype)


class Net(nn.Module):
    """Two names for one weight, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.zeros(3))


def net(filled: bool) -> tuple[Net, torch.optim.Optimizer]:
    """A model and its optimizer; with content, or with zeros and before its first step."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.25)
    with torch.no_grad():
        for p in [*model.parameters(), model.scale]:
            p.zero_()
        if filled:
            model.embed.weight.copy_(torch.arange(35.0).reshape(7, 5))
            model.head.bias.copy_(torch.arange(7.0) / 8)
            model.scale.fill_(1.5)
            for i, p in enumerate(model.parameters()):
                optimizer.state[p] = {
                    "step": torch.tensor(3.0),
                    "exp_avg": torch.full_like(p, i + 0.5),
                    "exp_avg_sq": torch.full_like(p, i + 0.25),
                }
    return model, optimizer


def tensors(filled: bool) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for i, name in enumerate(sorted(DTYPES)):
        dtype = getattr(torch, name, None)
        if dtype is not None:
            full = pattern((3, 5), dtype, i)
            out[name] = full if filled else torch.empty_like(full)
    out["zero_dim"] = torch.tensor(-2.5 if filled else 0.0)
    out["empty"] = torch.empty(0, 3, dtype=torch.int16)
    out["coded"] = pattern((40, 30), torch.int32) if filled else torch.zeros(40, 30, dtype=torch.int32)
    # Two blocks, the second shorter.
    out["coded_long"] = (torch.arange(70_001) // 1000).to(torch.float32) if filled else torch.zeros(70_001)
    return out


def objects() -> dict[str, Any]:
    return {
        "none": None,
        "truth": True,
        "number": 2**70,
        "real": 0.1,
        "nan": float("nan"),
        "infinite": [float("inf"), -float("inf")],
        "text": 'grün "\\ \u0000 \U0001f600',
        "list": [1, [2.5, "x"], []],
        "tuple": (1, (2, 3), ()),
        "odd_keys": [{(1, 2): "pair", None: 1.5}],
        "dollar": [{"$": "tuple", "v": 1}],
        "set": {1, 2, 3},
        "bytes": b"\x00\xff bytes",
        "complex": 1 - 2j,
        "array": np.arange(6, dtype=">i2").reshape(2, 3),
        "scalar": np.float32(0.1),
        "strings": np.array(["a", "bc"]),
        "when": datetime.datetime(2024, 2, 29, 12, 30, 15, 5, datetime.UTC),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
    }


def first(filled: bool) -> dict[str, Any]:
    model, optimizer = net(filled)
    values = objects() if filled else dict.fromkeys(objects())
    return {"model": model, "optimizer": optimizer, "t": tensors(filled), "o": values}


def second(filled: bool, rank: int, world: int = 2) -> dict[str, Any]:
    """Of one of two ranks: pieces by hand, copies, and what differs between the ranks."""
    table = torch.arange(42.0).reshape(6, 7) if filled else torch.zeros(6, 7)
    flat, cut = table.reshape(-1), (0, 17, 42)
    return {
        "rows": ckpt.Shard(table[3 * rank : 3 * rank + 3].clone(), (6, 7), (3 * rank, 0)),
        "flat": ckpt.Shard(flat[cut[rank] : cut[rank + 1]].clone(), (6, 7), flat_range=(cut[rank], cut[rank + 1])),
        "copy": torch.full((4,), 4.0) if filled else torch.zeros(4),
        "own": torch.full((3,), 1.0 + rank) if filled else torch.zeros(3),
        "coded": torch.arange(900).reshape(30, 30) * int(filled),
        "mine": ckpt.PerRank({"rank": rank} if filled else None),
        "undeclared": f"rank {rank}" if filled else "",
        "shared": ckpt.Replicated("both") if filled else ckpt.Replicated(""),
    }


def third() -> dict[str, Any]:
    return {"pickled": ckpt.Pickled(frozenset({"two"})), "w": torch.ones(2)}


def _save(run: str, rank: int) -> None:
    counter = itertools.count(1)
    uuid.uuid4 = lambda: uuid.UUID(int=next(counter))  # type: ignore[assignment]
    commit.now = lambda: "2025-01-01T00:00:00+00:00"
    codec = {"*coded*": "zstd"}
    if rank < 0:
        ckpt.save(first(True), run, step=1, metrics={"loss": 2.5, "val_loss": 3.5}, codec=codec)
        return
    dist.init_process_group("gloo", store=dist.FileStore(f"{run}.store", 2), rank=rank, world_size=2)
    cp = ckpt.Checkpointer(run, second(True, rank), storage=ckpt.Every(1), codec=codec)
    cp._open_generation("step-00000001.g0000")
    cp.step(2, metrics={"loss": 1.5, "val_loss": 1.25})
    cp.wait()
    cp._state = third()
    cp.step(3, metrics={"loss": 0.5})
    assert cp.close().committed == 2, cp.report.last_error


def _fork(run: str, rank: int) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            _save(run, rank)
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = f"{folder}/v1"
        assert os.waitpid(_fork(run, -1), 0)[1] == 0
        pids = [_fork(run, 0), _fork(run, 1)]
        assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
        shutil.rmtree(f"{run}/ledger")  # its names carry the time
        shutil.rmtree(RUN, ignore_errors=True)
        shutil.copytree(run, RUN)
    print(f"{sum(p.stat().st_size for p in RUN.rglob('*'))} bytes in {RUN}")


if __name__ == "__main__":
    main()
