"""A checkpoint -> files that other tools read: Hugging Face safetensors, a native Zarr v3 directory.

Tensors are streamed: at no time is more than a fixed number of bytes of them in memory. All files are written under
a temporary name beside the destination, which appears whole at the end or not at all.
"""

from __future__ import annotations

import fnmatch
import itertools
import json
import os
import re
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ckpt.checkpoint import Checkpoint, open_checkpoint
from ckpt.errors import NotFoundError, UsageError
from ckpt.faults import point
from ckpt.format.dtypes import dtype
from ckpt.format.fragment import Box, whole
from ckpt.format.pack import TensorSpec
from ckpt.offline.appearing import appearing, write_file
from ckpt.offline.dcp_tree import optimizer_keys
from ckpt.offline.window import Stream
from ckpt.read import Target, read_targets

__all__ = ["ExportReport", "export_safetensors", "export_zarr"]

_WINDOW = 32 << 20
_BATCH = 64 << 20
_ZARR_CHUNK = 32 << 20
_CAST = ("float64", "float32", "float16", "bfloat16")
Progress = Callable[[int], None] | None
PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    `path`: what now exists; `files`: the files in it that hold data, relative to it. `bytes`: of all tensors as
    written. `tied`: (left out, kept) names of tensors that are one. `per_rank`: tensors that the checkpoint holds
    once a rank, of which the lowest rank's was taken.
    """

    ref: str
    path: str
    files: tuple[str, ...]
    tensors: int
    bytes: int
    seconds: float
    tied: tuple[tuple[str, str], ...] = ()
    per_rank: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Chosen:
    """A tensor to export: its index in the manifest, its name and dtype there, the further names that are tied to it."""

    index: int
    spec: TensorSpec
    name: str
    dtype: str
    tied: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes // dtype(self.spec.dtype).itemsize * dtype(self.dtype).itemsize


def export_safetensors(
    ref: PathLike,
    dst: PathLike,
    *,
    only: Sequence[str] | None = None,
    prefix_strip: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    dtype: str | None = None,
    progress: Progress = None,
) -> ExportReport:
    """Writes the tensors of a model as Hugging Face safetensors.

    ref              what to export: a run (its latest step), run@1000, or one step's URL
    dst              a folder, which must not exist or be empty; it gets `model.safetensors`, or, where that would
                     exceed `max_shard_bytes`, `model-00001-of-00003.safetensors` ... and
                     `model.safetensors.index.json`. A name that ends in ".safetensors" is one file of any size.
    only             names or globs of the tensors, as they are called in the checkpoint; without it all below the key
                     "model". State of optimizers is never exported.
    prefix_strip     what to take away from the beginning of their names; without it "model." if they all have it
    dtype            convert floating point tensors to this, as "bfloat16"
    progress         told the bytes of each part that is written

    Tied tensors are written once, under their first name; `__metadata__` of that file names the others
    ({left out: kept}), as safetensors.torch.save_model does, and loaders that tie them find them.

    Raises NotFoundError, UsageError for a selection that is empty or has a dtype that safetensors lacks, ConflictError
    if dst exists, IntegrityError for damage, StorageError. Nothing is at dst then.
    """
    began = time.monotonic()
    out = os.fspath(dst)
    if max_shard_bytes < 1:
        raise UsageError(f"max_shard_bytes={max_shard_bytes!r}: a number of bytes, 1 or more")
    if dtype is not None and dtype not in _CAST:
        raise UsageError(f"dtype={dtype!r}: one of {', '.join(_CAST)}")
    with open_checkpoint(ref) as c:
        chosen, per_rank = _select_model(c, only, prefix_strip, dtype)
        _check_dtypes(chosen)
        if out.endswith(".safetensors"):
            files = [os.path.basename(out)]
            with appearing(out, folder=False) as temporary:
                _write_safetensors(c, temporary, chosen, progress)
        else:
            shards = _shards(chosen, max_shard_bytes)
            n = len(shards)
            numbered = [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
            files = ["model.safetensors"] if n == 1 else numbered
            with appearing(out, folder=True) as temporary:
                for file, shard in zip(files, shards, strict=True):
                    _write_safetensors(c, f"{temporary}/{file}", shard, progress)
                if n > 1:
                    _write_index(f"{temporary}/model.safetensors.index.json", files, shards)
        return ExportReport(
            ref=c.ref,
            path=out,
            files=tuple(files),
            tensors=len(chosen),
            bytes=sum(t.nbytes for t in chosen),
            seconds=time.monotonic() - began,
            tied=tuple((alias, t.name) for t in chosen for alias in t.tied),
            per_rank=per_rank,
        )


def export_zarr(
    ref: PathLike, dst: PathLike, *, only: Sequence[str] | None = None, progress: Progress = None
) -> ExportReport:
    """Writes tensors as a Zarr v3 directory that stock zarr opens; laid out as `Checkpoint.zarr_store()` shows it.

    ref, dst, progress  as for `export_safetensors`; dst is a folder
    only                names or globs of the tensors; without it all, those of optimizers too

    Tied tensors are written once; the attribute "ckpt" of the root names the others.
    """
    from ckpt.format.zarr_store import CheckpointStore, array_name

    began = time.monotonic()
    out = os.fspath(dst)
    with open_checkpoint(ref) as c:
        specs = {
            i: t
            for i, t in enumerate(c.manifest.tensors)
            if only is None or _wanted(t.name, only) or _wanted(t.key, only)
        }
        if not specs:
            raise NotFoundError(f"{c.ref}: no tensor to export" + (f" matches {list(only)}" if only else ""))
        store = CheckpointStore(c, chunk_bytes=_ZARR_CHUNK, aliases=False)
        names = {array_name(t.key): i for i, t in specs.items()}
        root = json.loads(bytes(store.read_key("zarr.json") or b""))
        arrays = root["consolidated_metadata"]["metadata"]
        root["consolidated_metadata"]["metadata"] = {name: arrays[name] for name in names}
        with appearing(out, folder=True) as temporary:
            for name in names:
                write_file(f"{temporary}/{name}/zarr.json", json.dumps(arrays[name]).encode())
            requests = ((names[name], box, key, shape) for name in names for key, box, shape in store.chunks(name))
            for key, array in _read_chunks(c, requests):
                write_file(f"{temporary}/{key}", memoryview(array.reshape(-1).view(np.uint8)))
                if progress is not None:
                    progress(array.nbytes)
            write_file(f"{temporary}/zarr.json", json.dumps(root).encode())
        return ExportReport(
            ref=c.ref,
            path=out,
            files=tuple(names),
            tensors=len(specs),
            bytes=sum(t.nbytes for t in specs.values()),
            seconds=time.monotonic() - began,
            tied=tuple((alias, kept) for alias, kept in c.manifest.aliases.items() if c.manifest.index(kept) in specs),
        )


# What to export.


def _wanted(name: str, patterns: Sequence[str]) -> bool:
    """Whether a tensor is named by a glob, its name, or the name of something above it."""
    return any(fnmatch.fnmatchcase(name, p) or name.startswith(f"{p}.") for p in patterns)


def _select_model(
    c: Checkpoint, only: Sequence[str] | None, prefix: str | None, cast: str | None
) -> tuple[list[_Chosen], tuple[str, ...]]:
    """The tensors to export, in natural order, and those that are stored per rank."""
    m = c.manifest
    optimizers = tuple(f"{key}.state." for key in optimizer_keys([o.name for o in m.objects]))
    names = [t.name for t in m.tensors if not t.name.startswith(optimizers)]
    if only is None and not any(n.startswith("model.") for n in names):
        keys = ", ".join(sorted({n.partition(".")[0] for n in names})[:20])
        raise UsageError(f"{c.ref}: nothing below the key 'model'; say what to export with only=; there is: {keys}")
    patterns = ["model"] if only is None else list(only)
    first: dict[str, tuple[int, TensorSpec]] = {}
    per_rank = []
    for i, spec in enumerate(m.tensors):
        if spec.name in first and _rank_of(spec) > _rank_of(first[spec.name][1]):
            continue
        if _wanted(spec.name, patterns) and not spec.name.startswith(optimizers):
            first[spec.name] = i, spec
            if spec.variant:
                per_rank.append(spec.name)
    tied: dict[str, list[str]] = {}
    for alias, kept in m.aliases.items():
        if _wanted(alias, patterns) and kept in first:
            tied.setdefault(kept, []).append(alias)
        elif _wanted(alias, patterns):
            first[alias] = m.index(alias), m.tensors[m.index(alias)]
    if not first:
        state = any(_wanted(t.name, patterns) for t in m.tensors)
        why = "; state of optimizers is not exported" if state else "; `ckpt inspect` lists them"
        raise NotFoundError(f"{c.ref}: no tensor of a model matches {patterns}{why}")
    if prefix is None:
        prefix = "model" if all(n.startswith("model.") for n in first) else ""
    strip = f"{prefix.rstrip('.')}." if prefix else ""
    chosen = [
        _Chosen(
            i,
            spec,
            name.removeprefix(strip),
            cast if cast and spec.dtype in _CAST else spec.dtype,
            tuple(alias.removeprefix(strip) for alias in tied.get(name, ())),
        )
        for name, (i, spec) in first.items()
    ]
    chosen.sort(key=lambda t: _natural(t.name))
    for a, b in itertools.pairwise(chosen):
        if a.name == b.name:
            raise UsageError(f"two tensors would both be called {a.name!r}; choose another prefix_strip")
    return chosen, tuple(dict.fromkeys(per_rank))


def _rank_of(spec: TensorSpec) -> int:
    digits = spec.variant.removeprefix("rank=")
    return int(digits) if digits.isdecimal() else 0


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key by which layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _check_dtypes(chosen: Sequence[_Chosen]) -> None:
    lacking = [f"{t.name} ({t.dtype})" for t in chosen if dtype(t.dtype).safetensors is None]
    if lacking:
        more = f" and {len(lacking) - 20} more" if len(lacking) > 20 else ""
        raise UsageError(f"safetensors has no dtype for {', '.join(lacking[:20])}{more}; see export_zarr, or only=")


def _shards(chosen: Sequence[_Chosen], limit: int) -> list[list[_Chosen]]:
    """The tensors in files of at most `limit` bytes, in order; one that is larger has a file of its own."""
    out: list[list[_Chosen]] = [[]]
    room = limit
    for t in chosen:
        if out[-1] and t.nbytes > room:
            out.append([])
            room = limit
        out[-1].append(t)
        room -= t.nbytes
    return out


# Reading.


def _batches(sizes: Iterable[tuple[Any, int]]) -> Iterator[list[Any]]:
    """Groups of items, about `_BATCH` bytes each: one read call each, which looks at every pack it touches once."""
    batch: list[Any] = []
    total = 0
    for item, size in sizes:
        if batch and total + size > _BATCH:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size
    if batch:
        yield batch


def _fill(c: Checkpoint, targets: Sequence[Target]) -> None:
    for t in {target.tensor for target in targets}:
        c.manifest.check_coverage(t)
    read_targets(c.backend, c.commit.folder, c.manifest, [t for t in targets if t.array.size])


def _read_chunks(
    c: Checkpoint, requests: Iterable[tuple[int, Box, str, tuple[int, ...]]]
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """(key, content) of chunks, zeros where they reach over the edge of their tensor."""
    kinds = [dtype(t.dtype) for t in c.manifest.tensors]
    sized = ((r, int(np.prod(r[3], dtype=np.int64)) * kinds[r[0]].itemsize) for r in requests)
    for batch in _batches(sized):
        arrays = [(key, np.zeros(shape, dtype=kinds[i].numpy)) for i, _, key, shape in batch]
        views = [_corner(array, r[1].shape) for r, (_, array) in zip(batch, arrays, strict=True)]
        _fill(c, [Target(r[0], r[1], view) for r, view in zip(batch, views, strict=True)])
        yield from arrays


def _corner(array: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """The view of its first elements that has this shape."""
    return array[tuple(slice(0, n) for n in shape)] if shape else array


# Writing.


def _write_safetensors(c: Checkpoint, path: str, tensors: Sequence[_Chosen], progress: Progress) -> None:
    ordered = sorted(tensors, key=lambda t: -dtype(t.dtype).itemsize)  # each is then aligned, without holes
    meta = {"format": "pt", **{alias: t.name for t in ordered for alias in t.tied}}
    header: dict[str, Any] = {"__metadata__": meta}
    at = 0
    for t in ordered:
        code = dtype(t.dtype).safetensors
        header[t.name] = {"dtype": code, "shape": list(t.spec.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for t in ordered:
            c.manifest.check_coverage(t.index)
        boxes = [(t.index, whole(t.spec.shape)) for t in ordered]
        for part in itertools.chain.from_iterable(Stream(c.backend, c.commit.folder, c.manifest, boxes, limit=_WINDOW)):
            point("export.write")
            t = ordered[part.index]
            data = part.data if t.dtype == t.spec.dtype else _converted(part.data, t.spec.dtype, t.dtype)
            file.write(memoryview(data))
            if progress is not None:
                progress(len(data))


def _converted(run: npt.NDArray[np.uint8], old: str, new: str) -> npt.NDArray[np.uint8]:
    import torch

    values = torch.from_numpy(run).view(getattr(torch, old)).to(getattr(torch, new))
    out: npt.NDArray[np.uint8] = values.view(torch.uint8).numpy()
    return out


def _write_index(path: str, files: Sequence[str], shards: Sequence[Sequence[_Chosen]]) -> None:
    where = {t.name: file for file, shard in zip(files, shards, strict=True) for t in shard}
    total = sum(t.nbytes for shard in shards for t in shard)
    write_file(path, json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2).encode())
