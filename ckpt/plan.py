"""Who writes what. Pure functions over what the ranks claim to hold; no ranks, no I/O.

Each rank claims boxes of tensors. `merge` decides which claims are copies of one another, checks that the rest
tile every tensor, and spreads the copies so that no rank writes much more than it must.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ckpt.collective import decode, encode
from ckpt.errors import LayoutError
from ckpt.format.codec import BLOCK
from ckpt.format.dtypes import dtype
from ckpt.format.fragment import Box, disjoint, flat_boxes, in_a_row, tiles
from ckpt.format.pack import TensorSpec

__all__ = ["Claim", "Claims", "NeedDigests", "Plan", "merge"]

PLAIN, MESH, SHARD = "plain", "mesh", "shard"
_MIN_SPLIT = BLOCK


class NeedDigests(Exception):
    """Whether these tensors are copies can only be told from their content."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(", ".join(names))
        self.names = tuple(names)


@dataclass(frozen=True, slots=True)
class Claim:
    """One tensor as one rank holds it.

    `kind`: "plain" (a tensor that nothing says about; copies are recognised by content), "mesh" (a DTensor:
    claims of one mesh to one box are copies), "shard" (declared by hand; `replica` > 0 marks a copy).
    `scope` names the mesh. `digest` (non-zero) identifies the content, where it is known.
    """

    spec: TensorSpec
    boxes: tuple[Box, ...]
    kind: str
    scope: str = ""
    replica: int = 0
    digest: int = 0


@dataclass(frozen=True)
class Claims:
    """All claims of one rank, as columns: what travels to the leader.

    `head`: per tensor [name, dtype, shape, layout, kind, scope, replica]. `tensor` int32 (n,): tensor of each box.
    `box` int64 (n, 2, D): offset and extent, zero-padded. `digest` uint64 (tensors,); 0 where unknown.
    """

    head: str
    tensor: npt.NDArray[np.int32]
    box: npt.NDArray[np.int64]
    digest: npt.NDArray[np.uint64]

    @staticmethod
    def of(claims: Sequence[Claim]) -> Claims:
        rows = [
            [c.spec.name, c.spec.dtype, list(c.spec.shape), c.spec.layout, c.kind, c.scope, c.replica] for c in claims
        ]
        flat = [(i, b) for i, c in enumerate(claims) for b in c.boxes if b.numel]
        width = max((len(c.spec.shape) for c in claims), default=0)
        box = np.zeros((len(flat), 2, width), dtype=np.int64)
        for row, (_, b) in enumerate(flat):
            box[row, 0, : len(b.offset)], box[row, 1, : len(b.shape)] = b.offset, b.shape
        return Claims(
            head=json.dumps(rows, separators=(",", ":")),
            tensor=np.array([i for i, _ in flat], dtype=np.int32),
            box=box,
            digest=np.array([c.digest for c in claims], dtype=np.uint64),
        )

    @property
    def fingerprint(self) -> str:
        """Of names, dtypes, shapes, placements: everything but the content."""
        h = hashlib.blake2b(self.head.encode(), digest_size=16)
        for column in (self.tensor, self.box):
            h.update(str(column.shape).encode())
            h.update(np.ascontiguousarray(column))
        return h.hexdigest()

    def encode(self) -> bytes:
        return encode(self.head, tensor=self.tensor, box=self.box, digest=self.digest)

    @staticmethod
    def decode(message: bytes) -> Claims:
        head, a = decode(message)
        return Claims(head, a["tensor"], a["box"], a["digest"])


@dataclass(frozen=True)
class Plan:
    """What every rank writes, sorted by rank.

    Columns over fragments: `rank`, `tensor` (index into `tensors`), `local` (index of the tensor in that rank's
    claims), `box` int64 (n, 2, D). `per_rank` names the plain tensors that differ between ranks.
    """

    tensors: tuple[TensorSpec, ...]
    rank: npt.NDArray[np.int64]
    tensor: npt.NDArray[np.int64]
    local: npt.NDArray[np.int64]
    box: npt.NDArray[np.int64]
    per_rank: tuple[str, ...]

    def rows(self, rank: int) -> slice:
        lo, hi = np.searchsorted(self.rank, [rank, rank + 1])
        return slice(int(lo), int(hi))

    def nbytes(self, world: int) -> npt.NDArray[np.int64]:
        """Bytes that each rank writes, before coding."""
        item = np.array([dtype(t.dtype).itemsize for t in self.tensors], dtype=np.int64)
        return np.bincount(self.rank, _numel(self.box) * item[self.tensor], minlength=world).astype(np.int64)


@dataclass
class _Table:
    """The job's tensors while they are being merged."""

    specs: list[TensorSpec]
    ids: dict[tuple[str, str], int]

    def add(self, spec: TensorSpec) -> int:
        key = (spec.name, spec.variant)
        found = self.ids.get(key)
        if found is None:
            self.ids[key] = found = len(self.specs)
            self.specs.append(spec)
        return found


def merge(claims: Sequence[Claims]) -> Plan:
    """Merges the claims of all ranks (in rank order) into a plan. The same claims give the same plan.

    Raises LayoutError, naming tensors and ranks, when claims contradict each other, overlap or leave holes;
    NeedDigests when copies can only be recognised by content that the claims do not carry.
    """
    heads = {text: json.loads(text) for text in {c.head for c in claims}}
    rows = [heads[c.head] for c in claims]
    kinds = _kinds(rows)
    table = _Table([], {})
    per_rank: list[str] = []
    wanted: list[str] = []
    checked: set[int] = set()  # tensors whose equal boxes are not copies by construction
    target: dict[tuple[int, int], int] = {}  # (rank, local index) -> tensor, for the names seen below
    for name, held in kinds.items():
        first = rows[held[0][0]][held[0][1]]
        spec = TensorSpec(name, first[1], tuple(first[2]), "", first[3])
        if first[4] == PLAIN:
            agree = _plain_agrees(claims, rows, held)
            if not agree:
                per_rank.append(name)
            for r, i in held:
                row = rows[r][i]
                own = spec if agree else TensorSpec(name, row[1], tuple(row[2]), f"rank={r}", row[3])
                target[r, i] = table.add(own)
        else:
            _check_same(name, rows, held)
            meshes = {rows[r][i][5] for r, i in held}
            unknown = any(int(claims[r].digest[i]) == 0 for r, i in held)
            if first[4] == MESH and len(meshes) > 1 and unknown:
                wanted.append(name)
            t = table.add(spec)
            if first[4] == SHARD or len(meshes) > 1:
                checked.add(t)
            for r, i in held:
                target[r, i] = t
    if wanted:
        raise NeedDigests(wanted)
    return _assign(claims, rows, tuple(table.specs), target, checked, tuple(per_rank))


def _kinds(rows: Sequence[list[Any]]) -> dict[str, list[tuple[int, int]]]:
    """Tensor name -> (rank, local index) of every claim to it, names sorted."""
    held: dict[str, list[tuple[int, int]]] = {}
    for r, row in enumerate(rows):
        for i, entry in enumerate(row):
            held.setdefault(entry[0], []).append((r, i))
    return dict(sorted(held.items()))


def _plain_agrees(claims: Sequence[Claims], rows: Sequence[list[Any]], held: Sequence[tuple[int, int]]) -> bool:
    r0, i0 = held[0]
    first, digest = rows[r0][i0], claims[r0].digest[i0]
    return len(held) == 1 or all(rows[r][i][1:5] == first[1:5] and claims[r].digest[i] == digest for r, i in held[1:])


def _check_same(name: str, rows: Sequence[list[Any]], held: Sequence[tuple[int, int]]) -> None:
    first = rows[held[0][0]][held[0][1]]
    for r, i in held[1:]:
        if rows[r][i][1:5] != first[1:5]:
            raise LayoutError(
                f"tensor {name!r}: rank {held[0][0]} declares {first[1]} {first[2]} ({first[4]}), rank {r} declares "
                f"{rows[r][i][1]} {rows[r][i][2]} ({rows[r][i][4]}); give different tensors different names"
            )


def _assign(
    claims: Sequence[Claims],
    rows: Sequence[list[Any]],
    tensors: tuple[TensorSpec, ...],
    target: dict[tuple[int, int], int],
    checked: set[int],
    per_rank: tuple[str, ...],
) -> Plan:
    world = len(claims)
    width = max([c.box.shape[2] for c in claims], default=0)
    ids = [np.array([target[r, i] for i in range(len(rows[r]))], dtype=np.int64) for r in range(world)]
    rank = np.repeat(np.arange(world), [len(c.tensor) for c in claims])
    local = np.concatenate([c.tensor for c in claims]).astype(np.int64)
    tensor = np.concatenate([ids[r][c.tensor] for r, c in enumerate(claims)])
    box = np.concatenate([_widened(c.box, width) for c in claims])
    order = np.lexsort([rank, *_box_keys(box), tensor])
    rank, local, tensor, box = rank[order], local[order], tensor[order], box[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (tensor[1:] != tensor[:-1]) | (box[1:] != box[:-1]).any(axis=(1, 2))
    first = np.flatnonzero(new)
    copies = np.diff(np.append(first, len(order)))
    doubtful = first[(copies > 1) & np.isin(tensor[first], list(checked))]
    _check_copies(claims, rows, tensors, rank, local, tensor, doubtful, copies[np.isin(first, doubtful)])
    _check_coverage(tensors, tensor[first], box[first])
    item = np.array([dtype(t.dtype).itemsize for t in tensors], dtype=np.int64)
    single = first[copies == 1]
    nbytes = _numel(box[first]) * item[tensor[first]]
    load = np.bincount(rank[single], nbytes[copies == 1], minlength=world).astype(np.float64)
    shared = np.flatnonzero(copies > 1)
    parts = [(rank[single], tensor[single], local[single], box[single])]
    if len(shared):
        parts += _spread(tensors, item, rank, local, tensor, box, first[shared], copies[shared], nbytes[shared], load)
    rank, tensor, local, box = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort([*_box_keys(box), tensor, rank])
    return Plan(tensors, rank[order], tensor[order], local[order], box[order], per_rank)


def _widened(box: npt.NDArray[np.int64], width: int) -> npt.NDArray[np.int64]:
    return box if box.shape[2] == width else np.pad(box, ((0, 0), (0, 0), (0, width - box.shape[2])))


def _box_keys(box: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """Sort keys, least significant first: extents, then offsets, outermost dimension last."""
    return [box[:, part, d] for part in (1, 0) for d in reversed(range(box.shape[2]))]


def _numel(box: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Elements of each box. Padding dimensions have extent 0 and do not count; claimed boxes are never empty."""
    out: npt.NDArray[np.int64] = np.where(box[:, 1] == 0, 1, box[:, 1]).prod(axis=1)
    return out


def _check_copies(
    claims: Sequence[Claims],
    rows: Sequence[list[Any]],
    tensors: Sequence[TensorSpec],
    rank: npt.NDArray[np.int64],
    local: npt.NDArray[np.int64],
    tensor: npt.NDArray[np.int64],
    first: npt.NDArray[np.int64],
    copies: npt.NDArray[np.int64],
) -> None:
    """Every box that several ranks claim must be a copy by mesh, by declaration or by content."""
    for at, n in zip(first.tolist(), copies.tolist(), strict=True):
        held = [(int(rank[k]), int(local[k])) for k in range(at, at + n)]
        entries = [rows[r][i] for r, i in held]
        name = tensors[int(tensor[at])].name
        if len({r for r, _ in held}) < len(held):
            raise LayoutError(f"tensor {name!r}: rank {held[0][0]} declares one box twice")
        originals = [r for (r, _), e in zip(held, entries, strict=True) if e[6] == 0]
        if entries[0][4] == SHARD and len(originals) > 1:
            raise LayoutError(
                f"tensor {name!r}: ranks {originals[:8]} all declare the same box; mark the copies with replica=1, 2, ..."
            )
        if entries[0][4] == MESH and len({int(claims[r].digest[i]) for r, i in held}) > 1:
            raise LayoutError(
                f"tensor {name!r}: ranks {[r for r, _ in held][:8]} hold different values under this name on "
                "different meshes; give experts and pipeline stages global names"
            )


def _check_coverage(tensors: Sequence[TensorSpec], tensor: npt.NDArray[np.int64], box: npt.NDArray[np.int64]) -> None:
    held = np.bincount(tensor, _numel(box), minlength=len(tensors))
    start = np.searchsorted(tensor, np.arange(len(tensors) + 1))
    holes, overlaps = [], []
    for t, spec in enumerate(tensors):
        rows = slice(int(start[t]), int(start[t + 1]))
        offset, extent = box[rows, 0, : len(spec.shape)], box[rows, 1, : len(spec.shape)]
        if in_a_row(spec.shape, offset, extent) or tiles(spec.shape, offset, extent):
            continue
        clash = disjoint(offset, extent)
        if clash is not None:
            a, b = (_to_box(box[rows][k], len(spec.shape)) for k in clash)
            overlaps.append(f"{spec.key!r} {a} and {b}")
        elif held[t] != math.prod(spec.shape):
            holes.append(f"{spec.key!r} ({int(held[t])} of {math.prod(spec.shape)} elements)")
    if holes or overlaps:
        text = [f"overlapping pieces: {'; '.join(overlaps[:20])}"] if overlaps else []
        text += [f"incomplete: {'; '.join(holes[:20])}"] if holes else []
        raise LayoutError(
            ". ".join(text) + f" ({len(holes) + len(overlaps)} tensors); every element must be declared once"
        )


def _to_box(row: npt.NDArray[np.int64], ndim: int) -> Box:
    return Box(tuple(row[0, :ndim].tolist()), tuple(row[1, :ndim].tolist()))


Part = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]


def _spread(
    tensors: Sequence[TensorSpec],
    item: npt.NDArray[np.int64],
    rank: npt.NDArray[np.int64],
    local: npt.NDArray[np.int64],
    tensor: npt.NDArray[np.int64],
    box: npt.NDArray[np.int64],
    first: npt.NDArray[np.int64],
    copies: npt.NDArray[np.int64],
    nbytes: npt.NDArray[np.int64],
    load: npt.NDArray[np.float64],
) -> list[Part]:
    """Gives every shared fragment to its holders, cutting large ones.

    Holders form sets; the bytes shared by one set are one line, cut where `_water_fill` says. Repeating over the
    sets is coordinate descent on the sum of squared loads, so sets that overlap in any way end balanced, too.
    """
    sets = _holder_sets(rank, first, copies)
    holders = [members for members, _ in sets]
    total = [float(nbytes[groups].sum()) for _, groups in sets]
    share = [np.zeros(len(members)) for members in holders]
    for _ in range(1 if len(sets) == 1 else 8):
        moved = 0.0
        for k, members in enumerate(holders):
            load[members] -= share[k]
            new = _water_fill(load[members], total[k])
            moved = max(moved, float(np.abs(new - share[k]).max()))
            share[k] = new
            load[members] += new
        if moved < _MIN_SPLIT:
            break
    parts: list[Part] = []
    cut: list[tuple[int, int, int, Box]] = []
    for (members, groups), shares in zip(sets, share, strict=True):
        cuts, size = np.cumsum(shares), nbytes[groups]
        at = np.cumsum(size) - size
        member = np.minimum(np.searchsorted(cuts, at + np.minimum(size, _MIN_SPLIT) / 2, side="right"), len(cuts) - 1)
        fits = (at + size - cuts[member] < _MIN_SPLIT) | (member == len(cuts) - 1)
        row = first[groups]
        whole_row = row[fits]
        parts.append((members[member[fits]], tensor[whole_row], local[whole_row + member[fits]], box[whole_row]))
        for k in np.flatnonzero(~fits).tolist():
            t = int(tensor[row[k]])
            piece = _to_box(box[row[k]], len(tensors[t].shape))
            for m, part in _cut(piece, int(item[t]), float(at[k]), int(size[k]), cuts):
                cut.append((int(members[m]), t, int(local[row[k] + m]), part))
    columns = np.zeros((len(cut), 2, box.shape[2]), dtype=np.int64)
    for k, (_, _, _, part) in enumerate(cut):
        columns[k, 0, : len(part.offset)], columns[k, 1, : len(part.shape)] = part.offset, part.shape
    meta = np.array([[r, t, i] for r, t, i, _ in cut], dtype=np.int64).reshape(-1, 3)
    return [*parts, (meta[:, 0], meta[:, 1], meta[:, 2], columns)]


def _holder_sets(
    rank: npt.NDArray[np.int64], first: npt.NDArray[np.int64], copies: npt.NDArray[np.int64]
) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """(ranks, shared fragments) for every set of ranks that hold the same fragments, the smallest sets first."""
    out: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
    for n in np.unique(copies).tolist():
        here = np.flatnonzero(copies == n)
        members = rank[first[here][:, None] + np.arange(n)]
        unique, which = np.unique(members, axis=0, return_inverse=True)
        order = np.argsort(which, kind="stable")
        bounds = np.searchsorted(which.reshape(-1)[order], np.arange(len(unique) + 1))
        out += [(unique[k], here[order[bounds[k] : bounds[k + 1]]]) for k in range(len(unique))]
    return out


def _water_fill(load: npt.NDArray[np.float64], amount: float) -> npt.NDArray[np.float64]:
    """Adds `amount` to the lowest loads until they are level; returns what each gets."""
    order = np.argsort(load, kind="stable")
    sorted_load = load[order]
    n = np.arange(1, len(load) + 1)
    level = (amount + np.cumsum(sorted_load)) / n
    k = int(np.flatnonzero(np.append(sorted_load[1:], np.inf) >= level)[0])
    out = np.zeros(len(load))
    out[order[: k + 1]] = level[k] - sorted_load[: k + 1]
    return out


def _cut(box: Box, itemsize: int, at: float, nbytes: int, cuts: npt.NDArray[np.float64]) -> list[tuple[int, Box]]:
    """The parts of a box that lies at [at, at+nbytes) of a line cut at `cuts`: (index of the holder, part).

    Cuts fall on whole rows unless a row is larger than a block; parts smaller than a block are not made.
    """
    row = 1
    for n in reversed(box.shape[1:]):
        if row * n * itemsize > _MIN_SPLIT:
            break
        row *= n
    edges, owners = [0], []
    lo = int(np.searchsorted(cuts, at + min(nbytes, _MIN_SPLIT) / 2, side="right"))
    for k in range(min(lo, len(cuts) - 1), len(cuts)):
        owners.append(k)
        edge = round((float(cuts[k]) - at) / itemsize / row) * row
        if k == len(cuts) - 1 or (box.numel - edge) * itemsize < _MIN_SPLIT:
            edges.append(box.numel)
            break
        if (edge - edges[-1]) * itemsize < _MIN_SPLIT:
            owners.pop()
            continue
        edges.append(edge)
    out = []
    for k, a, b in zip(owners, edges[:-1], edges[1:], strict=True):
        if (a, b) == (0, box.numel):
            return [(k, box)]
        for part in flat_boxes(box.shape, a, b):
            shifted = tuple(o + p for o, p in zip(box.offset, part.offset, strict=True))
            out.append((k, replace(part, offset=shifted)))
    return out
