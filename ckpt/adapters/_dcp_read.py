"""The loading side of the DCP adapter: a manifest as DCP metadata, read items -> checked bytes in place."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlanner, ReadItem

from ckpt.adapters._dcp_write import RAW
from ckpt.catalog import resolve
from ckpt.checkpoint import Checkpoint
from ckpt.commit import read_commit
from ckpt.errors import MismatchError, NotFoundError, UnsafeError
from ckpt.fill import Fill, fill
from ckpt.format.fragment import Box
from ckpt.format.manifest import ObjectEntry
from ckpt.objects import decode_object
from ckpt.offline.dcp_tree import PATHS, Path, flatten, join, optimizer_keys, param_groups, path_of
from ckpt.shards import dtype_name

__all__ = ["Opened"]

log = logging.getLogger("ckpt")
_OURS = "__ckpt__."  # objects that say something about the checkpoint itself


class _Names(dict[str, Any]):
    """State dict metadata in which DCP finds more than it lists. `hidden`: what is found only if it is asked for,
    because it says again what is listed under other names."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: set[str] = set()

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self.hidden

    def __missing__(self, name: str) -> Any:
        if name in self.hidden:
            return BytesStorageMetadata()
        raise KeyError(name)


class _Stored:
    """Stands for a tensor inside a value until it is read."""

    def __init__(self, name: str) -> None:
        self.name = name


class Opened:
    """A checkpoint as one rank of a DCP load sees it."""

    def __init__(self, checkpoint: Checkpoint, rank: int | None = None) -> None:
        self._c = checkpoint
        self._world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.rank = rank if rank is not None else dist.get_rank() if self._world > 1 else 0
        self._values: dict[str, Any] = {}
        self._per_rank: set[str] = set()
        self._objects: dict[str, list[ObjectEntry]] = {}
        for entry in checkpoint.manifest.objects:
            self._objects.setdefault(entry.name, []).append(entry)
        self.metadata = self._metadata()
        if self._per_rank and checkpoint.manifest.world != self._world:
            log.warning(
                "ckpt: stored per rank for %d ranks; rank %d of %d takes the value of rank %d: %s",
                checkpoint.manifest.world,
                self.rank,
                self._world,
                self.rank % max(1, checkpoint.manifest.world),
                sorted(self._per_rank)[:20],
            )

    @staticmethod
    def of(ref: str, *, allow_pickle: bool) -> Opened:
        backend, commit = resolve(ref)
        return Opened(Checkpoint(backend, commit, allow_pickle=allow_pickle))

    def other(self, folder: str) -> Opened:
        """Another step of the same run."""
        c = self._c
        return Opened(Checkpoint(c.backend, read_commit(c.backend, folder), allow_pickle=c.allow_pickle), self.rank)

    def as_rank(self, rank: int) -> Opened:
        """The same as another rank sees it: DCP may save for a part of the job, with ranks of its own."""
        return self if rank == self.rank else Opened(self._c, rank)

    @property
    def folder(self) -> str:
        return self._c.commit.folder

    # What is there.

    def _metadata(self) -> Metadata:
        m = self._c.manifest
        names = _Names()
        entry = self._entry(PATHS) if PATHS in self._objects else None
        odd: Mapping[str, list[str | int]] = self._decode(entry) if entry is not None else {}
        optimizers = optimizer_keys(self._objects)
        paths: dict[str, Path] = {}
        for name in dict.fromkeys([*(t.name for t in m.tensors), *m.aliases]):
            spec = m.tensors[self._index(name)]
            size = torch.Size(spec.shape)
            chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
            names[name] = TensorStorageMetadata(TensorProperties(getattr(torch, spec.dtype)), size, [chunk])
            paths[name] = path_of(name, odd, optimizers)
        for name in self._objects:
            if not name.startswith(_OURS):
                self._add_object(name, path_of(name, odd, optimizers), names, paths)
        return Metadata(names, planner_data=paths, storage_meta=StorageMeta(checkpoint_id=self._c.ref))

    def _add_object(self, name: str, path: Path, names: _Names, paths: dict[str, Path]) -> None:
        try:
            value = self._decode(self._entry(name))
        except UnsafeError as e:  # raised when somebody asks for it
            value = e
        key = name.removesuffix(".groups")
        if key != name and isinstance(value, list) and all(isinstance(g, Mapping) and "hyper" in g for g in value):
            if not any(other.startswith(f"{key}.param_groups") for other in self._objects):
                for leaf, where, content in param_groups(key, value):
                    self._add_value(leaf, content, where if len(where) == 4 else None, names, paths)
            return
        whole = isinstance(value, (Mapping, list))
        for where, leaf in flatten(value, path, lambda v: isinstance(v, _Stored)):
            if not isinstance(leaf, _Stored):
                self._add_value(join(where), leaf, where, names, paths)
                whole = whole and where != path
        if whole:  # a planner that does not flatten asks for it so
            self._add_value(name, value, None, names, paths)

    def _add_value(self, name: str, value: Any, path: Path | None, names: _Names, paths: dict[str, Path]) -> None:
        if dict.__contains__(names, name):
            return
        self._values[name] = value
        if path is None:
            names.hidden.add(name)
        else:
            names[name], paths[name] = BytesStorageMetadata(), path

    def _entry(self, name: str) -> ObjectEntry:
        entries = {e.scope: e for e in self._objects[name]}
        return entries[self._own(name, list(entries))]

    def _index(self, name: str) -> int:
        """The tensor of that name in the manifest: this rank's, where it is stored once a rank."""
        m = self._c.manifest
        stored = m.aliases.get(name, name)
        if stored in m.by_key:
            return m.by_key[stored]
        if stored not in m.has_variants:
            raise NotFoundError(f"no tensor {name!r} in {self._c.ref}")
        return m.by_key[f"{stored}@{self._own(name, m.has_variants[stored])}"]

    def _own(self, name: str, scopes: Sequence[str]) -> str:
        """Which of the values of all ranks is this one's: in another world, that of rank r mod W."""
        if len(scopes) == 1:
            return scopes[0]
        rank = self.rank % max(1, self._c.manifest.world)
        ordered = sorted(scopes, key=lambda s: (len(s), s))
        self._per_rank.add(name)
        return f"rank={rank}" if f"rank={rank}" in scopes else ordered[rank % len(ordered)]

    def _decode(self, entry: ObjectEntry) -> Any:
        return decode_object(
            entry.encoding, entry.value, f"object {entry.name!r}", allow_pickle=self._c.allow_pickle, tensor=_Stored
        )

    # Reading.

    def read(self, items: Sequence[ReadItem], planner: LoadPlanner, *, cast: bool) -> None:
        """Fills what the planner resolves the items to. MismatchError, before anything is read, for other dtypes."""
        wanted: list[Fill] = []
        resolved: list[tuple[ReadItem, torch.Tensor]] = []
        other: dict[str, str] = {}
        for item in items:
            if item.type == LoadItemType.BYTE_IO:
                continue
            name = item.storage_index.fqn
            t = self._index(name)
            spec = self._c.manifest.tensors[t]
            base = item.storage_index.offset or (0,) * len(spec.shape)
            box = Box(tuple(a + b for a, b in zip(base, item.storage_offsets, strict=True)), tuple(item.lengths))
            view = planner.resolve_tensor(item).detach()
            resolved.append((item, view))
            if tuple(view.shape) != box.shape or not box.within(spec.shape):
                raise MismatchError(f"tensor {name!r}: {box} of {spec.shape} is to go where {tuple(view.shape)} fits")
            self._c.manifest.check_coverage(t)
            if dtype_name(view.dtype) != spec.dtype:
                other[name] = f"{name!r} (state {dtype_name(view.dtype)}, checkpoint {spec.dtype})"
            if box.numel:
                wanted.append(Fill(t, box, view))
        if other and not cast:
            shown = ", ".join(list(other.values())[:20]) + (f" and {len(other) - 20} more" if len(other) > 20 else "")
            raise MismatchError(f"of another dtype ({len(other)}): {shown}. Nothing was read; see Reader(cast=True)")
        if wanted:
            world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
            fill(self._c.backend, self._c.commit.folder, self._c.manifest, wanted, world)
        for item, view in resolved:
            planner.commit_tensor(item, view)
        for item in items:
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, self._bytes(item.storage_index.fqn))

    def _bytes(self, name: str) -> io.BytesIO:
        """A value as DCP's planners take it: as torch.save writes it."""
        if name not in self._values:
            raise NotFoundError(f"no value {name!r} in {self._c.ref}")
        value = self._values[name]
        if isinstance(value, UnsafeError):
            raise value
        if isinstance(value, dict) and set(value) == {RAW}:
            if not self._c.allow_pickle:
                raise UnsafeError(
                    f"value {name!r}: bytes that a planner made, which may run code; see allow_pickle=True"
                )
            return io.BytesIO(value[RAW])
        out = io.BytesIO()
        torch.save(self._complete(value), out)
        out.seek(0)
        return out

    def _complete(self, value: Any) -> Any:
        """A value with the tensors that were saved inside it."""
        if isinstance(value, _Stored):
            return self._c.tensors[value.name].read()
        if isinstance(value, dict):
            return {k: self._complete(v) for k, v in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._complete(v) for v in value)
        return value
