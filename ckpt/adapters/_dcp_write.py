"""The saving side of the DCP adapter: a plan of write items -> one pack a rank -> the commit."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from ckpt.backends import Backend
from ckpt.collective import decode, encode
from ckpt.commit import Commit, commit_step
from ckpt.config import settings
from ckpt.errors import LayoutError, UsageError
from ckpt.format.codec import crc32c
from ckpt.format.dtypes import dtype
from ckpt.format.fragment import Box, whole
from ckpt.format.manifest import ObjectEntry
from ckpt.format.pack import Piece, TensorSpec
from ckpt.objects import encode_object
from ckpt.offline.dcp_tree import PATHS, Path
from ckpt.offline.dcp_values import Values
from ckpt.plan import SHARD, Claim, Claims, merge
from ckpt.shards import dtype_name, hold
from ckpt.source import TensorSource
from ckpt.write import PackReport, Ring, Source, write_pack

__all__ = ["RAW", "Attempts", "check_plans", "claims_of", "commit", "full_plans", "write_local"]

log = logging.getLogger("ckpt")
RAW = "__dcp_bytes__"
"""Marks, as the only key of a dict, bytes that a planner made in a way of its own."""
_SMALL = 64 << 10
_writing = Lock()


class Attempts:
    """The attempt that a Writer has open on the coordinator. What a failed save left is removed before the writer's
    next save, or when nobody holds the writer any more: DCP does not tell a storage that a save failed."""

    def __init__(self) -> None:
        self._open: list[tuple[Backend, str]] = []
        weakref.finalize(self, _discard, self._open, os.getpid())

    def begin(self, backend: Backend, path: str) -> None:
        self._open.append((backend, path))

    def publishing(self) -> None:
        """From here on the attempt may be part of a commit, and stays."""
        self._open.clear()

    def discard(self) -> None:
        _discard(self._open, os.getpid())


def _discard(open_: list[tuple[Backend, str]], owner: int) -> None:
    """Removes the packs. The claim stays: a rank that is late may still be writing, so its name must not be used
    again. Not in a fork: what looks abandoned there may be under way in its parent."""
    while open_ and os.getpid() == owner:
        backend, path = open_.pop()
        with suppress(Exception):
            for entry in backend.list(path):
                if entry.name != "attempt.json":
                    backend.delete(f"{path}/{entry.name}")


def full_plans(plans: Sequence[SavePlan]) -> list[SavePlan]:
    """The plans, with those in place that a caching planner left out because they are the same as the last time.

    Ranks would take the plan in their cache, and with it the attempt of an older save.
    """
    if all(p.usable for p in plans):
        return list(plans)
    cached = list(getattr(SavePlanner, "_cached_global_plan", {}).values())
    if len(cached) != 1 or len(cached[0]) != len(plans):
        raise UsageError("plans cached by several planner classes; pass enable_plan_caching=False to the planners")
    return [p if p.usable else old for p, old in zip(plans, cached[0], strict=True)]


def claims_of(specs: Sequence[TensorSpec], boxes: Sequence[Box]) -> Claims:
    """What one rank writes: boxes of tensors, sorted by name, then by box."""
    held: dict[str, tuple[TensorSpec, list[Box]]] = {}
    for spec, box in sorted(zip(specs, boxes, strict=True), key=lambda pair: (pair[0].name, pair[1])):
        held.setdefault(spec.name, (spec, []))[1].append(box)
        if not box.within(spec.shape):
            raise LayoutError(f"tensor {spec.name!r}: box {box} lies outside its shape {spec.shape}")
    return Claims.of([Claim(spec, tuple(found), SHARD) for spec, found in held.values()])


def check_plans(plans: Sequence[SavePlan]) -> None:
    """Raises LayoutError, naming tensors and ranks, unless the items of all ranks hold every element once."""
    items = [[i for i in plan.items if i.type != WriteItemType.BYTE_IO] for plan in plans]
    merge([claims_of([_spec(i) for i in mine], [_box(i) for i in mine]) for mine in items])


def _spec(item: WriteItem) -> TensorSpec:
    assert item.tensor_data is not None
    name = dtype_name(item.tensor_data.properties.dtype)
    dtype(name)
    return TensorSpec(item.index.fqn, name, tuple(item.tensor_data.size))


def _box(item: WriteItem) -> Box:
    assert item.tensor_data is not None
    return Box(tuple(item.tensor_data.chunk.offsets), tuple(item.tensor_data.chunk.sizes))


class _Resolved:
    """The bytes of a write item, asked of the planner when their turn comes: it may allocate memory for them."""

    def __init__(self, planner: SavePlanner, item: WriteItem) -> None:
        self._planner, self._item = planner, item
        self.nbytes = _box(item).numel * dtype(_spec(item).dtype).itemsize
        self.flat = None
        self._source: Source | None = None

    def into(self, start: int, out: npt.NDArray[np.uint8]) -> None:
        if self._source is None:
            self._source = TensorSource(_resolve(self._planner, self._item))
        self._source.into(start, out)
        if start + len(out) == self.nbytes:
            self._source = None


def _resolve(planner: SavePlanner, item: WriteItem) -> torch.Tensor:
    """The tensor of an item, plain and as it was planned."""
    spec, box = _spec(item), _box(item)
    held = hold(spec.name, planner.resolve_data(item))
    if (held.dtype, held.shape) != (spec.dtype, box.shape):
        raise LayoutError(
            f"tensor {spec.name!r}: planned as {spec.dtype} {box.shape}, the planner gives {held.dtype} {held.shape}"
        )
    return held.pieces[0][1]


def write_local(
    backend: Backend, path: str, plan: SavePlan, local: SavePlan | None, planner: SavePlanner, world: int
) -> tuple[int, bytes]:
    """Writes this rank's pack, if it has one. Returns its bytes and the message for the coordinator.

    `local`: what this rank held before copies were dropped, if that is known.
    """
    if local is None:
        local = getattr(planner, "_cached_save_plan", {}).get(getattr(planner, "_cached_plans_key", None), plan)
    values = _values(plan, local, planner)
    work: list[tuple[TensorSpec, Box, Source]] = [
        (_spec(i), _box(i), _Resolved(planner, i)) for i in plan.items if i.type != WriteItemType.BYTE_IO
    ]
    for name, tensor in values.tensors.items():
        spec = TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape))
        work.append((spec, whole(spec.shape), TensorSource(tensor)))
    claims = claims_of([spec for spec, _, _ in work], [box for _, box, _ in work])
    work = sorted((w for w in work if w[1].numel), key=lambda w: (w[0].name, w[1]))
    report = None
    if work:
        with _writing:
            report = write_pack(
                backend, path, [Piece(s, b) for s, b, _ in work], [s for _, _, s in work], _ring(os.getpid())
            )
    plain = list(_small_copies(local, planner)) if world > 1 else []
    body = json.dumps([values.rows, plain], separators=(",", ":"), ensure_ascii=False).encode()
    head = {
        "report": None if report is None else {k: v for k, v in report.__dict__.items() if isinstance(v, int)},
        "pickled": values.pickled,
        "body": hashlib.blake2b(body, digest_size=16).hexdigest(),
    }
    columns: dict[str, npt.NDArray[Any]] = {
        "claims": np.frombuffer(claims.encode(), dtype=np.uint8),
        "body": np.frombuffer(zlib.compress(body, 1), dtype=np.uint8),
    }
    if report is not None:
        columns |= {"offset": report.offset, "length": report.length, "block": report.block}
    message = encode(head, **columns)
    return (0 if report is None else report.size), message


@cache
def _ring(process: int) -> Ring:
    """A ring for DCP alone: its saves run beside others in threads that know nothing of each other. A fork has none
    of its parent's threads, and needs its own."""
    return Ring(settings())


def _small_copies(local: SavePlan, planner: SavePlanner) -> Iterator[tuple[str, int]]:
    """(name, CRC) of this rank's small plain tensors, which DCP takes for copies of one another if they share a name.

    Only those are looked at that could be a generator's or a loader's state: to read all would cost as much as a save.
    """
    for item in local.items:
        if item.type == WriteItemType.TENSOR and _box(item).numel * dtype(_spec(item).dtype).itemsize <= _SMALL:
            source = TensorSource(_resolve(planner, item))
            data = np.empty(source.nbytes, dtype=np.uint8)
            if source.nbytes:
                source.into(0, data)
            yield item.index.fqn, crc32c(data)


def _values(plan: SavePlan, local: SavePlan, planner: SavePlanner) -> Values:
    """The values of this rank. Those of which DCP took another rank's for a copy are among them, to be compared."""
    paths = {**_paths(plan), **_paths(local)}
    items = {i.index.fqn: i for p in (local, plan) for i in p.items}
    mine = {i.index.fqn for i in plan.items}
    found = {
        name: _value(planner, item)
        for name, item in items.items()
        if item.type == WriteItemType.BYTE_IO and (name in mine or hasattr(planner, "lookup_object"))
    }
    tensors = {name for name, item in items.items() if item.type != WriteItemType.BYTE_IO}
    return Values.of(found, paths, tensors | (paths.keys() - items.keys()), mine.__contains__)


def _paths(plan: SavePlan) -> dict[str, Path]:
    """The planner's map from flat names to paths, where it has one."""
    data = plan.planner_data
    return {k: v for k, v in data.items() if isinstance(v, tuple)} if isinstance(data, Mapping) else {}


def _value(planner: SavePlanner, item: WriteItem) -> Any:
    """The object of an item: looked up as it is where the planner is known to only serialise it."""
    kind = type(planner)
    known = ("resolve_data", "transform_object")
    if isinstance(planner, DefaultSavePlanner) and all(
        getattr(kind, f) is getattr(DefaultSavePlanner, f) for f in known
    ):
        return planner.lookup_object(item.index)
    data = planner.resolve_data(item)
    assert isinstance(data, io.BytesIO)
    try:
        return torch.load(io.BytesIO(data.getvalue()), weights_only=False)  # made by this process a moment ago
    except Exception:
        return {RAW: data.getvalue()}


def commit(backend: Backend, messages: Sequence[bytes], metrics: Mapping[str, float], **which: Any) -> Commit:
    """Manifest and commit from what all ranks wrote. `which`: step, generation, attempt, writer, publishing."""
    letters = [decode(m) for m in messages]
    plan = merge([Claims.decode(arrays["claims"].tobytes()) for _, arrays in letters])
    reports = [
        None
        if head["report"] is None
        else PackReport(**head["report"], offset=a["offset"], length=a["length"], block=a["block"])
        for head, a in letters
    ]
    counts = [0 if r is None else len(r.offset) for r in reports]
    if counts != np.bincount(plan.rank, minlength=len(reports)).tolist():
        raise LayoutError("the ranks wrote other fragments than they were told to")
    pickled = sorted({name for head, _ in letters for name in head["pickled"]})
    _say("stored with pickle, and read only with allow_pickle=True; store their plain parts", pickled)
    return commit_step(
        backend,
        plan=plan,
        codecs=[],
        codec=None,
        objects=_entries(letters),
        aliases={},
        reports=reports,
        metrics=metrics,
        **which,
    )


def _entries(letters: Sequence[tuple[Any, dict[str, npt.NDArray[Any]]]]) -> list[ObjectEntry]:
    """The values of all ranks: once if they agree, else for each rank."""
    held: dict[str, dict[str, list[tuple[int, str]]]] = {}  # name -> text -> ranks with encodings
    copies: dict[str, set[int]] = {}
    bodies: dict[str, list[int]] = {}
    for rank, (head, _) in enumerate(letters):
        bodies.setdefault(head["body"], []).append(rank)
    for ranks in bodies.values():
        rows, plain = json.loads(zlib.decompress(letters[ranks[0]][1]["body"].tobytes()))
        for name, encoding, text in rows:
            held.setdefault(name, {}).setdefault(text, []).extend((r, encoding) for r in ranks)
        for name, crc in plain:
            copies.setdefault(name, set()).add(crc)
    out = []
    for name, texts in sorted(held.items()):
        if name == PATHS:
            paths = {k: v for text in texts for k, v in json.loads(text).items()}
            out.append(ObjectEntry(name, "replicated", *encode_object(dict(sorted(paths.items())), name)))
        elif len(texts) == 1:
            ((text, owners),) = texts.items()
            out.append(ObjectEntry(name, "replicated", owners[0][1], text))
        else:
            rows = sorted((r, encoding, text) for text, owners in texts.items() for r, encoding in owners)
            out += [ObjectEntry(name, f"rank={r}", encoding, text) for r, encoding, text in rows]
    _say(
        "tensors that differ between ranks under one name, of which DCP keeps one rank's; put the rank into their names, "
        "or save with ckpt.save",
        [name for name, found in sorted(copies.items()) if len(found) > 1],
    )
    return out


_said: set[tuple[str, str]] = set()


def _say(what: str, names: Sequence[str]) -> None:
    """Warns of names, each once in the life of the process."""
    new = [n for n in names if (what, n) not in _said]
    if new:
        _said.update((what, n) for n in new)
        log.warning("ckpt: %s: %s%s", what, ", ".join(new[:20]), f" and {len(new) - 20} more" if len(new) > 20 else "")
