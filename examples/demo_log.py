"""What the processes of the demo tell its driver: one JSON line an event, written so that a SIGKILL loses none."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from train_gpt import Job

import ckpt


@dataclass(frozen=True)
class EventLog:
    """Appends events to a file; on every rank but the first it does nothing."""

    path: Path
    rank: int

    def write(self, event: str, **values: Any) -> None:
        if self.rank == 0:
            with self.path.open("a") as file:
                file.write(json.dumps({"event": event, **values}) + "\n")


def read_events(path: Path) -> list[dict[str, Any]]:
    """All complete events of a log; a line that is still being written is left for the next call."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def full_leaves(job: Job) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that trains, whole: weights and AdamW state, gathered from the shards. Collective."""
    for name, parameter in job.model.named_parameters():
        yield name, _whole(parameter)
        for key, value in sorted(job.optimizer.state[parameter].items()):
            yield f"{name}.{key}", _whole(value)


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fingerprint(job: Job) -> dict[str, Any]:
    """The whole state in hashes, taken from the live objects and never from a checkpoint. Collective.

    Leaves are hashed as whole tensors, so two layouts compare name by name. Every rank hashes what it gathered, and
    the ranks must agree, which is how a wrong second replica of HSDP would be found.
    """
    leaves, size = {}, 0
    for name, leaf in full_leaves(job):
        leaves[name], size = sha256(leaf), size + leaf.nbytes
    group = job.optimizer.param_groups[0]
    leaves["schedule"] = f"lr={group['lr']!r} epoch={job.scheduler.last_epoch}"
    mine: Any = {"leaves": hashlib.sha256(json.dumps(leaves).encode()).hexdigest(), "rng": rng_hash()}
    ranks = [mine]
    if job.place.mesh is not None:
        ranks = [None] * job.place.world
        dist.all_gather_object(ranks, mine, group=job.place.group)
    return {
        "leaves": leaves,
        "bytes": size,
        "ranks_agree": len({rank["leaves"] for rank in ranks}) == 1,
        "rng": [rank["rng"] for rank in ranks],
        "data": data_hash(job),
    }


def stored_leaves(ref: str) -> dict[str, str]:
    """Hashes of the weights and AdamW state of a stored checkpoint, under the names that `fingerprint` gives them.

    Opened lazily, in this one process, whatever wrote it: a second way to read, besides restoring.
    """
    found = {}
    with ckpt.open(ref) as checkpoint:
        for name in checkpoint.tensors:
            leaf = name.removeprefix("model.").removeprefix("optimizer.state.")
            if leaf != name:
                found[leaf] = sha256(checkpoint.tensors[name][...])
    return found


def sha256(tensor: Tensor) -> str:
    """The hash of one whole tensor: its dtype, shape and bytes."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + data.tobytes()).hexdigest()


def rng_hash() -> str:
    """The random state of Python, numpy and torch on this rank."""
    numbers = numpy.random.get_state(legacy=False)["state"]
    states = (random.getstate(), numbers["pos"], numbers["key"].tolist(), torch.get_rng_state().tolist())
    return hashlib.sha256(repr(states).encode()).hexdigest()


def data_hash(job: Job) -> str:
    """The windows of text that the next global batch will read."""
    return hashlib.sha256(repr(job.loader.next_starts().tolist()).encode()).hexdigest()[:16]
