"""A committed checkpoint opened for reading: lazy, without a process group."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from ckpt.backends import Backend
from ckpt.catalog import resolve
from ckpt.commit import Commit, read_manifest
from ckpt.errors import CkptError, NotFoundError, UsageError
from ckpt.format.codec import BLOCK, crc32c
from ckpt.format.dtypes import dtype
from ckpt.format.fragment import Box, whole
from ckpt.format.manifest import Manifest
from ckpt.objects import decode_object
from ckpt.read import Target, read_targets
from ckpt.stored import Pack, ReadStats, check_sizes

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "LazyTensor", "Verification", "open_checkpoint"]

_MUCH = 64 << 20


class LazyTensor:
    """A stored tensor. Indexing reads just the blocks that it touches and returns a torch tensor."""

    def __init__(self, checkpoint: Checkpoint, index: int) -> None:
        self._checkpoint, self._index = checkpoint, index
        spec = checkpoint.manifest.tensors[index]
        self.name, self.dtype, self.shape = spec.key, spec.dtype, spec.shape

    def __getitem__(self, key: Any) -> torch.Tensor:
        """Integers, slices (any step), `...`: as for a torch tensor. Only the bounding box is read."""
        box, rest = _box_of(key, self.shape, self.name)
        return self.read(box)[rest]

    def read(self, box: Box | None = None) -> torch.Tensor:
        """The elements of a box (all by default), in a new torch tensor of the stored dtype."""
        import torch

        array = self.raw(box)
        flat = torch.from_numpy(array.reshape(-1).view(np.uint8))
        return flat.view(getattr(torch, self.dtype)).reshape(array.shape)

    def raw(self, box: Box | None = None) -> np.ndarray[Any, Any]:
        """The elements of a box as numpy holds them: for dtypes numpy lacks, unsigned integers of their width."""
        box, kind, c = box or whole(self.shape), dtype(self.dtype), self._checkpoint
        c.manifest.check_coverage(self._index)
        if box.numel * kind.itemsize > _MUCH:
            check_sizes(c.backend, c.commit.folder, c.manifest, self._index)
        out = np.empty(box.shape, dtype=kind.numpy)
        if out.size:
            read_targets(c.backend, c.commit.folder, c.manifest, [Target(self._index, box, out)])
        return out

    def __repr__(self) -> str:
        return f"LazyTensor({self.name!r}, {self.dtype}, {list(self.shape)})"


def _box_of(key: Any, shape: tuple[int, ...], name: str) -> tuple[Box, tuple[Any, ...]]:
    """The bounding box of an index, and the index that remains within it."""
    keys = list(key) if isinstance(key, tuple) else [key]
    if Ellipsis in [k for k in keys if k is Ellipsis]:
        at = next(i for i, k in enumerate(keys) if k is Ellipsis)
        keys[at : at + 1] = [slice(None)] * (len(shape) - len(keys) + 1)
    keys += [slice(None)] * (len(shape) - len(keys))
    if len(keys) > len(shape):
        raise UsageError(f"tensor {name!r} has {len(shape)} dimensions, {len(keys)} indices were given")
    offset, extent = [], []
    rest: list[Any] = []
    for k, n in zip(keys, shape, strict=True):
        if isinstance(k, slice):
            picked = range(*k.indices(n))
            lo, hi = (min(picked[0], picked[-1]), max(picked[0], picked[-1]) + 1) if len(picked) else (0, 0)
            offset.append(lo)
            extent.append(hi - lo)
            rest.append(slice(None) if abs(picked.step) == 1 and picked.step > 0 else slice(None, None, picked.step))
            if picked.step < 0:
                raise UsageError(f"tensor {name!r}: torch has no negative steps")
        elif isinstance(k, (int, np.integer)):
            i = int(k) + n if k < 0 else int(k)
            if not 0 <= i < n:
                raise UsageError(f"tensor {name!r}: index {k} is outside a dimension of {n}")
            offset.append(i)
            extent.append(1)
            rest.append(0)
        else:
            raise UsageError(f"tensor {name!r}: index with whole numbers, slices and ..., not {type(k).__name__}")
    return Box(tuple(offset), tuple(extent)), tuple(rest)


class _Tensors(Mapping[str, LazyTensor]):
    def __init__(self, checkpoint: Checkpoint) -> None:
        self._c = checkpoint

    def __getitem__(self, key: str) -> LazyTensor:
        try:
            return LazyTensor(self._c, self._c.manifest.index(key))
        except NotFoundError as e:
            raise KeyError(str(e)) from None

    def __iter__(self) -> Iterator[str]:
        yield from self._c.manifest.by_key
        yield from self._c.manifest.aliases

    def __len__(self) -> int:
        return len(self._c.manifest.by_key) + len(self._c.manifest.aliases)


class _Objects(Mapping[str, Any]):
    """Values by name; those stored per rank by "name@rank=3". Reading a pickled one needs open(..., allow_pickle=True)."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._c = checkpoint
        self._by_key = {
            o.name if o.scope == "replicated" else f"{o.name}@{o.scope}": o for o in checkpoint.manifest.objects
        }

    def __getitem__(self, key: str) -> Any:
        o = self._by_key[key]
        return decode_object(
            o.encoding,
            o.value,
            f"object {key!r}",
            allow_pickle=self._c.allow_pickle,
            tensor=lambda name: self._c.tensors[name],
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_key)

    def __len__(self) -> int:
        return len(self._by_key)


@dataclass(frozen=True)
class Verification:
    """What `verify` found. `problems` names file, block and tensor of everything that is not what was written."""

    ref: str
    bytes: int
    blocks: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


class Checkpoint:
    """One committed step. Use as a context manager; see `ckpt.open`."""

    def __init__(self, backend: Backend, commit: Commit, *, allow_pickle: bool = False) -> None:
        self.backend, self.commit, self.allow_pickle = backend, commit, allow_pickle
        self.manifest: Manifest = read_manifest(backend, commit)
        self.tensors: Mapping[str, LazyTensor] = _Tensors(self)
        self.objects: Mapping[str, Any] = _Objects(self)

    @property
    def ref(self) -> str:
        return f"{self.backend.root}/{self.commit.folder}"

    @property
    def step(self) -> int:
        return self.commit.step

    @property
    def metrics(self) -> Mapping[str, float]:
        return self.commit.metrics

    def verify(self, progress: Callable[[int], None] | None = None) -> Verification:
        """Reads every byte and checks it; needs no torch. `progress` is told the bytes of each step it makes."""
        m, problems, blocks = self.manifest, [], 0
        for t in range(len(m.tensors)):
            try:
                m.check_coverage(t)
            except CkptError as e:
                problems.append(f"{e.kind}: {e}")
        for p in range(len(m.packs)):
            try:
                blocks += self.verify_pack(p, problems, progress)
            except CkptError as e:
                problems.append(f"{e.kind}: {e}")
        return Verification(self.ref, int(m.packs.size.sum()), blocks, tuple(problems))

    def verify_pack(self, p: int, problems: list[str], progress: Callable[[int], None] | None) -> int:
        """Reads one pack and checks every block; adds to `problems` in words. Returns how many blocks it has."""
        m = self.manifest
        pack = Pack(self.backend, self.commit.folder, m, p, ReadStats())
        rows = np.flatnonzero(m.pack == p)
        owner = np.searchsorted(m.start, rows, side="right") - 1
        buffer = np.empty(max(16 * BLOCK, 2 * BLOCK), dtype=np.uint8)
        checked = 0
        for row, t in zip(rows.tolist(), owner.tolist(), strict=True):
            box = m.boxes(t)[row - int(m.start[t])]
            fragment = pack.fragment(row, t, tuple(box[1].tolist()))
            sizes = pack.block_sizes(fragment)
            at = fragment.offset
            for k, n in enumerate(sizes):
                view = buffer[:n] if n <= len(buffer) else np.empty(n, np.uint8)
                self.backend.read(pack.path, at, [memoryview(view)])
                if crc32c(view) != pack.crc[fragment.block + k]:
                    problems.append(f"integrity: {pack.bad_block(fragment, k)}")
                at += n
                checked += 1
            if progress is not None:
                progress(fragment.length)
        return checked

    def zarr_store(self) -> Any:
        """A read-only zarr store: `zarr.open_group(c.zarr_store(), mode="r")` gives every tensor as an array."""
        from ckpt.format.zarr_store import CheckpointStore

        return CheckpointStore(self)

    def close(self) -> None:
        self.backend.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def open_checkpoint(ref: str | os.PathLike[str], *, allow_pickle: bool = False) -> Checkpoint:
    """Opens what a ref names. Raises NotFoundError, IntegrityError or FormatError."""
    backend, commit = resolve(ref)
    return Checkpoint(backend, commit, allow_pickle=allow_pickle)
