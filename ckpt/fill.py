"""Stored boxes -> torch views of live memory: in place where the bytes can go there as they are, else by way of memory
of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ckpt.backends import Backend
from ckpt.backends.base import ReadsAhead
from ckpt.backends.direct import read_once
from ckpt.config import settings
from ckpt.format.dtypes import dtype
from ckpt.format.fragment import Box
from ckpt.format.manifest import Manifest
from ckpt.read import Target, read_targets
from ckpt.shards import dtype_name
from ckpt.stored import ReadStats

__all__ = ["Fill", "fill", "planned"]

_STAGE = 64 << 20
_REQUESTS = 8  # that a store is asked at once
_STREAMS = 3  # reads past the page cache: the disk has work while what came before is checked and put in its place
_MUCH = 64 << 20  # bytes for which it is worth while


class Fill(NamedTuple):
    """A box of a stored tensor (its index in the manifest) and the view of the same shape that is to hold it."""

    tensor: int
    box: Box
    view: torch.Tensor


def fill(
    backend: Backend, folder: str, manifest: Manifest, wanted: Sequence[Fill], world: int, *, apart: bool = False
) -> ReadStats:
    """Fills all views; what cannot be read in place (another device or dtype, a conjugate) goes by way of 64 MiB.

    `world`: how many ranks the job has, which share this host unless LOCAL_WORLD_SIZE says how many do. `apart`: no two of
    them need the same bytes, so that files which are not in the page cache are read past it.
    Raises what `read_targets` does.
    """
    if apart and sum([w.view.nbytes for w in wanted]) >= _MUCH:
        once = read_once(backend)
        try:
            return _fill(once, folder, manifest, wanted, world)
        finally:
            if once is not backend:
                once.close()
    return _fill(backend, folder, manifest, wanted, world)


def _fill(backend: Backend, folder: str, manifest: Manifest, wanted: Sequence[Fill], world: int) -> ReadStats:
    streams = settings().readers or _STREAMS
    threads = settings().readers or (_REQUESTS if isinstance(backend, ReadsAhead) else _threads(world))
    direct: list[Target] = []
    staged: list[Fill] = []
    for w in wanted:
        if _in_place(manifest, w):
            direct.append(Target(w.tensor, w.box, _as_numpy(w.view)))
        else:
            staged.append(w)
    stats = read_targets(backend, folder, manifest, direct, threads=threads, streams=streams, at_once=True)
    for batch in _batches(staged):
        fresh = [torch.empty(b.shape, dtype=getattr(torch, manifest.tensors[t].dtype)) for t, b, _ in batch]
        targets = [Target(t, b, _as_numpy(new)) for (t, b, _), new in zip(batch, fresh, strict=True)]
        more = read_targets(backend, folder, manifest, targets, threads=threads, streams=streams, at_once=True)
        stats = ReadStats(stats.needed + more.needed, stats.read + more.read)
        for item, new in zip(batch, fresh, strict=True):
            item.view.copy_(new)
    return stats


def planned(manifest: Manifest, wanted: Sequence[Fill]) -> list[Target]:
    """The targets of `fill`, to plan with: of what cannot be read in place the memory is never touched."""
    return [
        Target(w.tensor, w.box, _as_numpy(w.view))
        if _in_place(manifest, w)
        else Target(w.tensor, w.box, np.empty(w.box.shape, dtype(manifest.tensors[w.tensor].dtype).numpy))
        for w in wanted
    ]


def _in_place(manifest: Manifest, item: Fill) -> bool:
    view = item.view
    as_it_is = dtype_name(view.dtype) == manifest.tensors[item.tensor].dtype
    return as_it_is and view.is_cpu and not view.is_conj() and not view.is_neg()


def _threads(world: int) -> int:
    """The cores of this host over its ranks, at most 4."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or world)
    return max(1, min(4, len(os.sched_getaffinity(0)) // here))


def _batches(staged: Sequence[Fill]) -> Iterator[list[Fill]]:
    """Groups of about 64 MiB."""
    batch: list[Fill] = []
    room = _STAGE
    for item in staged:
        size = item.view.numel() * item.view.element_size()
        if batch and size > room:
            yield batch
            batch, room = [], _STAGE
        batch.append(item)
        room -= size
    if batch:
        yield batch


_MOVED_AS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}


def _as_numpy(view: torch.Tensor) -> np.ndarray[Any, Any]:
    """The memory of a CPU tensor under the numpy type that its bytes are moved as."""
    kind = dtype(dtype_name(view.dtype))
    return (view if kind.exact else view.view(_MOVED_AS[kind.itemsize])).numpy()
