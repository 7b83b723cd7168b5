"""A tensor, however it is distributed, as boxes of its global shape and views of local memory."""

from __future__ import annotations

import hashlib
import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ckpt.errors import LayoutError
from ckpt.format.dtypes import DTYPES
from ckpt.format.fragment import Box, flat_boxes, whole
from ckpt.format.layout import Layout, local_shape, pieces
from ckpt.plan import MESH, PLAIN, SHARD

__all__ = ["ByLayout", "Held", "Shard", "dtype_name", "hold", "is_tensor", "is_wrapped", "like", "parts"]


@dataclass(frozen=True)
class Shard:
    """A piece of a tensor, declared by hand: what this rank holds of `global_shape`.

    tensor        the local data; loaded in place. Any dtype, strides and device.
    global_shape  shape of the whole tensor
    offset        where `tensor` begins in it, one number a dimension; its extent is `tensor.shape`
    replica       0 for the piece itself; 1, 2, ... where other ranks hold copies of the same piece
    flat_range    (start, stop) in row-major elements instead of `offset`: `tensor` is 1-D and holds that range
                  (FSDP1, ZeRO, distributed optimizers)
    layout        ckpt.format.layout JSON that says how the training program cut the tensor, kept as data
    """

    tensor: torch.Tensor
    global_shape: Sequence[int]
    offset: Sequence[int] | None = None
    replica: int = 0
    flat_range: tuple[int, int] | None = None
    layout: str = ""


@dataclass(frozen=True)
class ByLayout:
    """A local tensor that was cut as a `ckpt.format.layout.Layout` says: fused projections, gate and up, padded
    vocabularies, experts, stacked layers.

    tensor  what this rank holds, of shape `local_shape(layout, at)`; loaded in place, padding is left as it is
    layout  how the whole tensor was cut; kept with the checkpoint as data
    at      this rank's index on every mesh axis that the layout speaks about
    """

    tensor: torch.Tensor
    layout: Layout
    at: Mapping[str, int]


@dataclass(frozen=True)
class Held:
    """A tensor as this rank holds it: `pieces` pairs boxes of the global `shape` with views of that shape."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[tuple[Box, torch.Tensor], ...]
    kind: str
    scope: str = ""
    replica: int = 0
    layout: str = ""


@lru_cache(maxsize=64)
def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_tensor(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, Shard, ByLayout))


_PLAIN_TYPES = (torch.Tensor, nn.Parameter, nn.Buffer)


def _is_dtensor(value: Any) -> bool:
    """Nothing is one in a process that never imported it; importing it just to ask would take two seconds."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, getattr(module, "DTensor", ()))


def is_wrapped(value: Any) -> bool:
    """Whether a tensor is a wrapper around others (see `parts`)."""
    return type(value) not in _PLAIN_TYPES and not _is_dtensor(value) and is_traceable_wrapper_subclass(value)


def parts(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of a value: itself, or the inner tensors of a wrapper subclass, loaded in place as they are.

    Raises LayoutError for a tensor that has no plain memory to store.
    """
    if is_wrapped(value):
        for inner in value.__tensor_flatten__()[0]:
            yield from parts(f"{name}.{inner}", getattr(value, inner))
    else:
        yield name, value


def hold(name: str, value: Any) -> Held:
    """What this rank holds of a tensor. Raises LayoutError, naming it, if that cannot be told."""
    if type(value) not in _PLAIN_TYPES:
        if _is_dtensor(value):
            return _dtensor(name, value)
        if isinstance(value, Shard):
            return _declared(name, value)
        if isinstance(value, ByLayout):
            return _by_layout(name, value)
        if hasattr(value, "local_shards"):
            return _sharded_tensor(name, value)
    local = _local(name, value)
    shape = tuple(local.shape)
    return Held(dtype_name(local.dtype), shape, ((whole(shape), local),), PLAIN)


def like(held: Held, name: str, value: Any) -> Held:
    """`value` held as another tensor of the same local elements is (optimizer state of a flat parameter)."""
    local = _local(name, value).reshape(-1)
    cuts = list(itertools.accumulate((b.numel for b, _ in held.pieces), initial=0))
    views = [local[a : a + b.numel].view(b.shape) for a, (b, _) in zip(cuts, held.pieces, strict=False)]
    cut = tuple((b, v) for (b, _), v in zip(held.pieces, views, strict=True))
    return Held(dtype_name(local.dtype), held.shape, cut, held.kind, held.scope, held.replica, held.layout)


def _local(name: str, value: torch.Tensor) -> torch.Tensor:
    """The plain strided memory of a local tensor, with nothing pending on it."""
    if type(value) not in _PLAIN_TYPES:
        if not isinstance(value, nn.Parameter):
            raise LayoutError(
                f"tensor {name!r}: {type(value).__name__} has no __tensor_flatten__; declare it with ckpt.Shard"
            )
        if nn.parameter.is_lazy(value):
            raise LayoutError(f"tensor {name!r} is not initialised yet; run one forward pass first")
    if value.is_meta:
        raise LayoutError(f"tensor {name!r} is on the meta device and holds no values; initialise or load it first")
    if value.layout is not torch.strided or value.is_quantized or value.is_nested:
        what = "quantized" if value.is_quantized else "nested" if value.is_nested else f"layout {value.layout}"
        raise LayoutError(f"tensor {name!r}: {what} cannot be stored; convert it to a dense tensor")
    if dtype_name(value.dtype) not in DTYPES:
        raise LayoutError(f"tensor {name!r}: dtype {value.dtype} cannot be stored; view it as an integer type")
    local = value.detach()
    return local.resolve_conj().resolve_neg() if local.is_conj() or local.is_neg() else local


def _declared(name: str, shard: Shard) -> Held:
    local = _local(name, shard.tensor)
    shape = tuple(int(n) for n in shard.global_shape)
    if (shard.offset is None) == (shard.flat_range is None):
        raise LayoutError(f"shard of {name!r}: give either offset or flat_range")
    held: tuple[tuple[Box, torch.Tensor], ...]
    if shard.flat_range is not None:
        start, stop = shard.flat_range
        if local.dim() != 1 or local.numel() != stop - start or not 0 <= start <= stop <= math.prod(shape):
            raise LayoutError(
                f"shard of {name!r}: flat range {start}:{stop} does not fit {tuple(local.shape)} of {shape}"
            )
        boxes = list(flat_boxes(shape, start, stop))
        cuts = itertools.accumulate((b.numel for b in boxes), initial=0)
        held = tuple((b, local[a : a + b.numel].view(b.shape)) for a, b in zip(cuts, boxes, strict=False))
    else:
        box = Box(tuple(int(o) for o in shard.offset or ()), tuple(local.shape))
        if not box.within(shape):
            raise LayoutError(f"shard of {name!r}: box {box} lies outside the global shape {shape}")
        held = ((box, local),)
    return Held(dtype_name(local.dtype), shape, held, SHARD, "", shard.replica, shard.layout)


def _by_layout(name: str, value: ByLayout) -> Held:
    """Equal boxes of one layout are copies, because the layout says so."""
    local, text = _local(name, value.tensor), value.layout.to_json()
    if value.layout.averaged and any(value.at.get(axis, 0) for axis in value.layout.averaged):
        raise LayoutError(f"tensor {name!r} is to be averaged over {value.layout.averaged}; average it before saving")
    if tuple(local.shape) != local_shape(value.layout, value.at):
        raise LayoutError(
            f"tensor {name!r}: its layout gives {local_shape(value.layout, value.at)} here, the tensor is {tuple(local.shape)}"
        )
    held = tuple((whole, local[box.slices]) for box, whole in pieces(value.layout, value.at))
    scope = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return Held(dtype_name(local.dtype), tuple(value.layout.shape), held, MESH, scope, 0, text)


@lru_cache(maxsize=256)
def _mesh_scope(mesh: Any) -> str:
    ranks = mesh.mesh.flatten().tolist()
    return hashlib.blake2b(str(ranks).encode(), digest_size=8).hexdigest()


def _dtensor(name: str, value: Any) -> Held:
    local, spec = _local(name, value._local_tensor), value._spec
    shape, scope = tuple(value.shape), _mesh_scope(spec.mesh)
    cut = _cut(shape, spec.mesh, tuple(spec.placements))
    if isinstance(cut, str):
        raise LayoutError(f"tensor {name!r}: {cut}")
    held: tuple[tuple[Box, torch.Tensor], ...] = ()
    if cut is not None:
        if cut.local != tuple(local.shape):
            raise LayoutError(
                f"tensor {name!r}: placements {value.placements} give {cut.local}, not {tuple(local.shape)}"
            )
        if len(cut.boxes) == 1:
            held = ((cut.boxes[0][0], local),)
        else:
            held = tuple((box, local[here.slices]) for box, here in cut.boxes)
    return Held(dtype_name(local.dtype), shape, held, MESH, scope)


@dataclass(frozen=True)
class _Cut:
    """How a rank's local tensor, of shape `local`, lies in the global one: pairs of a box there and the box here."""

    local: tuple[int, ...]
    boxes: tuple[tuple[Box, Box], ...]


@lru_cache(maxsize=4096)
def _cut(shape: tuple[int, ...], mesh: Any, placements: tuple[Any, ...]) -> _Cut | str | None:
    """What this rank holds of a DTensor; None if it is not part of the mesh, or what stands against it."""
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    runs: list[list[tuple[int, int]]] = [[(0, n)] for n in shape]
    for size, index, placement in zip(mesh.shape, coordinate, placements, strict=True):
        if placement.is_replicate():
            continue
        dim = getattr(placement, "dim", None)
        if placement.is_partial() or dim is None:
            return f"placement {placement} is not a stored value; reduce or redistribute it first"
        runs[dim] = _chunk(runs[dim], size, index, int(getattr(placement, "split_factor", 1)))
    local = tuple(sum(b - a for a, b in along) for along in runs)
    return _Cut(local, tuple(_grid(runs)) if 0 not in local else ())


def _chunk(runs: list[tuple[int, int]], count: int, index: int, split: int) -> list[tuple[int, int]]:
    """Chunk `index` of `count` of the positions in `runs`, as torch.chunk cuts them.

    With `split` > 1 (FSDP2 over tensor parallel) the positions are first cut into that many parts, and each of
    them is chunked.
    """
    total = sum(b - a for a, b in runs)
    out: list[tuple[int, int]] = []
    for part_lo, part_hi in [_nth(0, total, split, k) for k in range(split)]:
        lo, hi = _nth(part_lo, part_hi, count, index)
        at = 0
        for a, b in runs:
            x, y = max(lo, at), min(hi, at + b - a)
            if x < y:
                start = a + x - at
                if out and out[-1][1] == start:
                    out[-1] = (out[-1][0], start + y - x)
                else:
                    out.append((start, start + y - x))
            at += b - a
    return out


def _nth(lo: int, hi: int, count: int, index: int) -> tuple[int, int]:
    step = -(-(hi - lo) // count)
    return min(lo + index * step, hi), min(lo + (index + 1) * step, hi)


def _grid(runs: Sequence[Sequence[tuple[int, int]]]) -> Iterator[tuple[Box, Box]]:
    """The boxes that runs of indices along every dimension span, and where they lie in the local tensor."""
    starts = [list(itertools.accumulate((b - a for a, b in along), initial=0)) for along in runs]
    for pick in itertools.product(*(range(len(along)) for along in runs)):
        extent = tuple(runs[d][k][1] - runs[d][k][0] for d, k in enumerate(pick))
        there = tuple(runs[d][k][0] for d, k in enumerate(pick))
        yield Box(there, extent), Box(tuple(starts[d][k] for d, k in enumerate(pick)), extent)


def _sharded_tensor(name: str, value: Any) -> Held:
    shards = []
    meta = value.metadata()
    for shard in value.local_shards():
        box = Box(tuple(shard.metadata.shard_offsets), tuple(shard.metadata.shard_sizes))
        shards.append((box, _local(name, shard.tensor)))
    kind = dtype_name(meta.tensor_properties.dtype)
    ranks = [str(s.placement) for s in meta.shards_metadata]
    scope = hashlib.blake2b(str(ranks).encode(), digest_size=8).hexdigest()
    return Held(kind, tuple(meta.size), tuple(shards), MESH, scope)
