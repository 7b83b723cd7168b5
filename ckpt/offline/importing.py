"""Checkpoints of other libraries -> ours: torch DCP directories, read without running what they pickled.

A DCP directory is a pickled index over files that hold one torch.save archive after the other. The index is read by
`dcp_index`; the archives are opened by torch's own weights-only reader, after a look at what is inside them.
"""

from __future__ import annotations

import io
import os
import pickle
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ckpt.backends import Backend, backend_for
from ckpt.catalog import delete_tree, generations_in_use, list_run, parse_ref
from ckpt.commit import claim_attempt, commit_step, step_folder
from ckpt.config import settings
from ckpt.errors import FormatError, LayoutError, UnsafeError, UsageError
from ckpt.format.fragment import Box, whole
from ckpt.format.manifest import ObjectEntry
from ckpt.format.pack import Piece, TensorSpec
from ckpt.offline.dcp_index import Chunk, Index, Place, read_index
from ckpt.offline.dcp_values import Values
from ckpt.plan import SHARD, Claim, Claims, Plan, merge
from ckpt.shards import dtype_name, hold
from ckpt.source import TensorSource
from ckpt.write import PackReport, Ring, Source, write_pack

__all__ = ["ImportReport", "import_dcp"]

_PACK_BYTES = 32 << 30
_PACK_PIECES = 100_000
_MAX_DEPTH = 200
_SHOWN = 20
PathLike = str | os.PathLike[str]
Progress = Callable[[int], None] | None


@dataclass(frozen=True)
class ImportReport:
    """What an import wrote. `bytes`: of all tensors. `pickled`: objects that could only be kept as pickles."""

    ref: str
    step: int
    tensors: int
    objects: int
    bytes: int
    seconds: float
    pickled: tuple[str, ...] = ()


def import_dcp(
    src_dir: PathLike,
    run: PathLike,
    *,
    step: int = 0,
    allow_pickle: bool = False,
    progress: Progress = None,
) -> ImportReport:
    """Copies a torch DCP directory into a run, as one step: fragment by fragment, as they are.

    src_dir       the folder with ".metadata" in it (a path or URL)
    run           where to; the step goes into its newest generation
    allow_pickle  also read values (not tensors) that torch's weights-only reader refuses, by running their pickles
    progress      told the bytes of tensors, as they are copied

    Holds one stored chunk in memory at a time, and the writer's ring. Everything that the index says is checked
    against what is there. Raises NotFoundError, FormatError for what is damaged or not DCP's, UnsafeError for what
    would have to be run (naming it), ConflictError if the step exists, StorageError. Nothing is published then.
    """
    began = time.monotonic()
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise UsageError(f"step={step!r}: a whole number, 0 or more")
    target = parse_ref(run)
    if target.which != "latest" or os.fspath(run).endswith("@latest"):
        raise UsageError(f"{os.fspath(run)!r} names a step; to import, name a run (a folder or URL) and step=")
    source = backend_for(os.fspath(src_dir).rstrip("/") or "/")
    index = read_index(source)
    values = Values.of(_values(index, source, allow_pickle), index.paths, index.specs)
    objects = sorted((ObjectEntry(name, "replicated", *rest) for name, *rest in values.rows), key=lambda e: e.name)
    work = [_Work(c.spec, c.box, _Stored(source, c, progress)) for c in index.chunks]
    work += [_Work(_spec(name, t), whole(tuple(t.shape)), TensorSource(t)) for name, t in values.tensors.items()]
    packs = list(_packs(sorted((w for w in work if w.box.numel), key=lambda w: (w.spec.name, w.box))))
    plan = _plan(packs, [s for s in index.specs.values() if not s.nbytes], source.root)
    done = _write(backend_for(target.run, direct=settings().direct), step, packs, plan, objects)
    return ImportReport(
        ref=done,
        step=step,
        tensors=len(plan.tensors),
        objects=len(objects),
        bytes=sum(t.nbytes for t in plan.tensors),
        seconds=time.monotonic() - began,
        pickled=tuple(values.pickled),
    )


# Values.


def _values(index: Index, source: Backend, allow_pickle: bool) -> dict[str, Any]:
    """Every value that is not a tensor. UnsafeError lists those that would have to be run."""
    out: dict[str, Any] = {}
    refused = []
    for name, place in index.objects.items():
        try:
            with torch.serialization.safe_globals(_numpy_names()):
                out[name] = _open(source, place, name)
            _check_bounds(out[name], max(place.length, 1 << 20), name, 0)
        except pickle.UnpicklingError:
            if allow_pickle:
                out[name] = _open(source, place, name, weights_only=False)
            else:
                refused.append(name)
    if refused:
        more = f" and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
        raise UnsafeError(
            f"{source.root}: these values can only be read by running their pickles: {', '.join(refused[:_SHOWN])}{more}; "
            "pass allow_pickle=True if you trust who wrote them"
        )
    return out


def _numpy_names() -> list[Any]:
    """What a pickle of numpy's arrays and scalars is made of; none of it does more than hold data."""
    array = (np._core if hasattr(np, "_core") else np.core).multiarray
    made = (array._reconstruct, array.scalar)
    kinds = {type(np.dtype(c)) for c in "?bhilqBHILQefdFDSUO"}
    named = [(f, f"numpy.{core}.multiarray.{f.__name__}") for f in made for core in ("core", "_core")]
    return [np.ndarray, np.dtype, *kinds, *named]


def _check_bounds(value: Any, limit: int, name: str, depth: int) -> None:
    """A value may not claim to be larger than the archive it came from: an array of a shape without its content, a
    tensor that repeats one number."""
    if depth > _MAX_DEPTH:
        raise FormatError(f"{name!r}: nested deeper than {_MAX_DEPTH}, or it contains itself")
    size = 0
    if isinstance(value, torch.Tensor):
        size = value.numel() * value.element_size()
    elif isinstance(value, (np.ndarray, np.generic)):
        size = value.nbytes
    elif isinstance(value, Mapping):
        for k, v in value.items():
            _check_bounds(k, limit, name, depth + 1)
            _check_bounds(v, limit, name, depth + 1)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for v in value:
            _check_bounds(v, limit, name, depth + 1)
    if size > limit:
        raise FormatError(f"{name!r}: {size} bytes out of an archive of {limit}")


# Archives.


class _Range(io.RawIOBase):
    """Bytes of a stored file as a file of its own."""

    def __init__(self, source: Backend, place: Place) -> None:
        size = source.size(place.path)
        if place.offset + place.length > size:
            end = place.offset + place.length
            raise FormatError(f"{source.root}/{place.path}: {size} bytes long, its index speaks of {end}")
        self._source, self._place, self._at = source, place, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._place.length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        n = max(0, min(len(view), self._place.length - self._at))
        if n:
            self._source.read(self._place.path, self._place.offset + self._at, [view[:n]])
        self._at += n
        return n


def _open(source: Backend, place: Place, name: str, *, weights_only: bool = True) -> Any:
    """What torch.save wrote there. Raises pickle.UnpicklingError for what only a pickle's own code can make."""
    file = _Range(source, place)
    magic = file.read(4)
    try:
        entries = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as e:
        raise FormatError(f"{name!r}: not an archive of torch.save ({e})") from None
    stored = magic == b"PK\x03\x04" and all(e.compress_type == zipfile.ZIP_STORED for e in entries)
    if not stored or sum(e.file_size for e in entries) > place.length:
        raise FormatError(f"{name!r}: not an archive of torch.save, or one that unpacks to more than it holds")
    file.seek(0)
    try:
        return torch.load(file, map_location="cpu", weights_only=weights_only)  # type: ignore[arg-type]
    except pickle.UnpicklingError:
        raise
    except Exception as e:
        raise FormatError(f"{name!r}: its archive cannot be read ({type(e).__name__}: {e})") from None


class _Stored:
    """A chunk to write whose bytes are in an archive; opened when its turn comes, and let go when it is over."""

    def __init__(self, source: Backend, chunk: Chunk, progress: Progress) -> None:
        self._backend, self._chunk, self._progress = source, chunk, progress
        self.nbytes, self.flat = chunk.nbytes, None
        self._source: Source | None = None

    def into(self, start: int, out: npt.NDArray[np.uint8]) -> None:
        if self._source is None:
            self._source = TensorSource(self._tensor())
        self._source.into(start, out)
        if start + len(out) == self.nbytes:
            self._source = None
        if self._progress is not None:
            self._progress(len(out))

    def _tensor(self) -> torch.Tensor:
        spec, box, place = self._chunk.spec, self._chunk.box, self._chunk.place
        try:
            found = _open(self._backend, place, spec.name)
        except pickle.UnpicklingError as e:
            raise UnsafeError(f"tensor {spec.name!r}: not stored as a plain tensor ({e})") from None
        if type(found) not in (torch.Tensor, torch.nn.Parameter):
            raise FormatError(f"tensor {spec.name!r}: its archive holds a {type(found).__name__}")
        held = hold(spec.name, found)
        if (held.dtype, held.shape) != (spec.dtype, box.shape):
            raise FormatError(
                f"tensor {spec.name!r}: the index says {spec.dtype} {list(box.shape)} at {list(box.offset)}, the archive "
                f"holds {held.dtype} {list(held.shape)}"
            )
        return held.pieces[0][1]


# Writing.


@dataclass(frozen=True)
class _Work:
    """A fragment to write."""

    spec: TensorSpec
    box: Box
    source: Source


def _spec(name: str, tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape))


def _packs(work: Sequence[_Work]) -> Iterator[list[_Work]]:
    """Fragments in order, in packs of bounded size: several processes may read them, and each has one header."""
    pack: list[_Work] = []
    room = _PACK_BYTES
    for w in work:
        if pack and (w.source.nbytes > room or len(pack) >= _PACK_PIECES):
            yield pack
            pack, room = [], _PACK_BYTES
        pack.append(w)
        room -= w.source.nbytes
    if pack:
        yield pack


def _plan(packs: Sequence[Sequence[_Work]], empty: Sequence[TensorSpec], where: str) -> Plan:
    """Which pack holds what. FormatError unless the fragments hold every element once."""
    claims: list[Claims] = []
    for pack in packs or [[]]:
        held: dict[str, tuple[TensorSpec, list[Box]]] = {}
        for w in pack:
            held.setdefault(w.spec.name, (w.spec, []))[1].append(w.box)
        if not claims:
            held |= {spec.name: (spec, []) for spec in empty}
        claims.append(Claims.of([Claim(spec, tuple(boxes), SHARD) for spec, boxes in held.values()]))
    try:
        return merge(claims)
    except LayoutError as e:
        raise FormatError(f"{where}: {e}") from None


def _write(
    backend: Backend, step: int, packs: Sequence[Sequence[_Work]], plan: Plan, objects: Sequence[ObjectEntry]
) -> str:
    """Packs, manifest, commit; the reference of what then exists."""
    generation = max(generations_in_use(list_run(backend, commits=False)), default=0)
    folder = step_folder(step, generation)
    attempt, writer = claim_attempt(backend, folder, max(1, len(packs)))
    ring = Ring(settings())
    published: list[bool] = []
    try:
        reports: list[PackReport | None] = []
        for n, pack in enumerate(packs):
            path = f"{folder}/{attempt}/rank-{n:05d}.safetensors"
            pieces = [Piece(w.spec, w.box) for w in pack]
            reports.append(write_pack(backend, path, pieces, [w.source for w in pack], ring))
        commit_step(
            backend,
            step=step,
            generation=generation,
            attempt=attempt,
            writer=writer,
            plan=plan,
            codecs=[],
            codec=None,
            objects=objects,
            aliases={},
            reports=reports or [None],
            metrics={},
            publishing=lambda: published.append(True),
        )
    except BaseException:
        if not published:
            with suppress(Exception):
                delete_tree(backend, f"{folder}/{attempt}")
        raise
    finally:
        ring.threads.shutdown()
    return f"{backend.root}/{folder}"
