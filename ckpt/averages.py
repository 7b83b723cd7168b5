"""Running averages as the trainer sees them: which leaves are averaged, and averages as tensors.

trained parameters         averaged, in float32 (float64 where they are), each tensor once however many names it has
floating-point buffers     averaged, if persistent: statistics of normalisation and constants alike
frozen parameters          not: their average is what they are; so training LoRA costs no more than its factors
integers, booleans, float8 not: as they are in the model (the scales of float8 live elsewhere)
wrapped tensor subclasses, what is stored per rank: not
optimizers, values, tensors outside of modules: not

Where an optimizer keeps a float32 master of a bfloat16 or float16 parameter, that is what is averaged, under the parameter's
name: a tensor of its state of the parameter's shape, called `master...`, as TransformerEngine's FusedAdam has `master_param`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ckpt.backends import Backend
from ckpt.commit import read_commit, read_manifest
from ckpt.errors import UsageError
from ckpt.fill import Fill, fill
from ckpt.format.manifest import Manifest
from ckpt.keeper.averaged import decode_progress
from ckpt.merge.average import AVERAGES, NOTES, Progress
from ckpt.merge.fold import ACCUMULATORS
from ckpt.objects import decode_object
from ckpt.optim import Owners
from ckpt.shards import Held, Shard, dtype_name, hold, is_wrapped
from ckpt.snapshot.fence import fence_here
from ckpt.state import module_leaves, owners_of, walk

__all__ = ["Weight", "read_average", "state_dict_of", "stored_progress", "swapped", "weights_of"]


@dataclass(frozen=True)
class Weight:
    """A tensor of a module's state dict: its leaf in checkpoints, its `name` there without the module's key, what it is,
    what this rank holds of it, whether it is averaged, and `source`: the leaf whose elements are folded, itself or its master."""

    leaf: str
    key: str
    name: str
    tensor: torch.Tensor
    held: Held | None
    averaged: bool
    source: str


def weights_of(state: Any) -> list[Weight]:
    """All parameters and persistent buffers of the modules of a state; a tied one under every name, with one leaf."""
    out: list[Weight] = []
    owners = owners_of(state)
    masters = _masters(state, owners)
    for key, module, _, _ in walk(state):
        if not isinstance(module, nn.Module):
            continue
        seen: dict[int, str] = {}
        for name, _, attribute, tensor in module_leaves(module):
            if tensor is None:
                continue
            flat = [o for o in owners.get(id(tensor), ()) if o.held is not None]
            trained = not isinstance(tensor, nn.Parameter) or tensor.requires_grad
            if flat and id(tensor) not in seen:
                seen[id(tensor)] = ""
                names = [o.name.removeprefix(f"{key}.") for o in flat]  # the key is there where modules share names
                leaves = [f"{key}.{n}" for n in names]
                out += [
                    Weight(leaf, key, n, tensor, o.held, trained, leaf)
                    for leaf, n, o in zip(leaves, names, flat, strict=True)
                ]
            elif not flat and attribute != "_flat_param":
                leaf = seen.setdefault(id(tensor), f"{key}.{name}")
                counts = trained and dtype_name(tensor.dtype) in ACCUMULATORS and not is_wrapped(tensor)
                out.append(Weight(leaf, key, name, tensor, None, counts, masters.get(id(tensor), leaf)))
    return out


def _masters(state: Any, owners: Owners) -> dict[int, str]:
    """id(parameter) -> the leaf of its float32 master in the state of an optimizer; not of flat parameters."""
    out: dict[int, str] = {}
    for key, optimizer, _, _ in walk(state):
        if not isinstance(optimizer, torch.optim.Optimizer):
            continue
        for p, parts in optimizer.state.items():
            owner = owners.get(id(p), ())
            if len(owner) != 1 or owner[0].held is not None or p.dtype not in (torch.bfloat16, torch.float16):
                continue
            for name, part in parts.items():
                wide = isinstance(part, torch.Tensor) and part.dtype == torch.float32 and part.shape == p.shape
                if wide and str(name).startswith("master"):
                    out[id(p)] = f"{key}.state.{owner[0].name}.{name}"
    return out


def stored_progress(manifest: Manifest, where: str) -> dict[str, Progress]:
    """What the averages of a checkpoint remember; nothing if it has none."""
    note = next((o for o in manifest.objects if o.name == NOTES), None)
    return decode_progress(decode_object(note.encoding, note.value, where), where) if note is not None else {}


# Averages as tensors.


Average = dict[str, Any]
"""Leaf -> tensor; `Shard`, a flat range of it, where the model has a flat parameter (FSDP1)."""


def read_average(state: Any, name: str, backend: Backend, folder: str, world: int) -> Average:
    """An average as a step has it, float32 (or as `ACCUMULATORS` has it), wrapped as the model's own."""
    manifest = read_manifest(backend, read_commit(backend, folder))
    made: Average = {}
    wanted: list[Fill] = []
    for _, module, _, _ in walk(state):
        if isinstance(module, nn.Module):
            reshard(module)
    for w in weights_of(state):
        index = manifest.by_key.get(f"{AVERAGES}.{name}.{w.leaf}")
        if not w.averaged or w.leaf in made or index is None:
            continue
        manifest.check_coverage(index)
        kind = getattr(torch, manifest.tensors[index].dtype)
        new = _flat(w.held, kind) if w.held is not None else torch.empty_like(w.tensor.detach(), dtype=kind)
        made[w.leaf] = new
        wanted += [Fill(index, box, view) for box, view in hold(w.leaf, new).pieces if view.numel()]
    fill(backend, folder, manifest, wanted, world)
    return made


def _flat(held: Held, kind: torch.dtype) -> Shard:
    """Memory for the same range of a flat parameter."""
    boxes = [box for box, view in held.pieces if view.numel()]
    first = int(np.ravel_multi_index(boxes[0].offset, held.shape)) if boxes and held.shape else 0
    room = torch.empty(sum(box.numel for box in boxes), dtype=kind)
    return Shard(room, held.shape, flat_range=(first, first + room.numel()))


def state_dict_of(state: Any, average: Mapping[str, Any]) -> Average:
    """The state dict of the state's module with an average in the place of what is averaged; all else as it is now, copied.
    Of several modules: of all of them, each name after its module's key."""
    weights = weights_of(state)
    several = len({w.key for w in weights}) > 1
    made = dict(average)
    for w in weights:
        if w.leaf not in made:
            made[w.leaf] = w.tensor.detach().clone()
    return {f"{w.key}.{w.name}" if several else w.name: made[w.leaf] for w in weights}


@contextmanager
def swapped(model: nn.Module, state: Any, average: Mapping[str, Any]) -> Iterator[None]:
    """Within, the weights of `model` are those of an average (leaf -> tensor), in the model's own types; after it they are
    what they were, bit by bit."""
    reshard(model)
    here = {id(t) for _, _, _, t in module_leaves(model) if t is not None}
    weights = {w.leaf: w for w in weights_of(state) if w.leaf in average and id(w.tensor) in here}
    if not weights:
        raise UsageError("swapped: no averaged parameter of this module is in the state of the Checkpointer")
    fence_here().wait()
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        with torch.no_grad():
            for leaf, w in weights.items():
                new = hold(leaf, average[leaf]).pieces
                held = w.held or hold(leaf, w.tensor)
                for (_, view), (_, value) in zip(held.pieces, new, strict=True):
                    kept.append((view, view.clone()))
                    view.copy_(value)
        yield
    finally:
        with torch.no_grad():
            for view, before in kept:
                view.copy_(before)
        reshard(model)


def reshard(model: nn.Module) -> None:
    """FSDP may hold whole parameters from the last forward: what is computed next has to see the shards of now."""
    kind: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    for module in model.modules() if kind is not None else ():
        handle = getattr(module, "_handle", None)  # FSDP1
        if isinstance(module, kind):
            module.reshard()
        elif handle is not None and getattr(handle, "uses_sharded_strategy", False) and not handle.needs_unshard():
            handle.reshard(True)
            handle.post_reshard()
