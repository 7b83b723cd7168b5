"""How a parameter was cut, as data: the language of Universal Checkpointing, with recorded widths and no guesses.

A layout names the true global shape, for each cut axis the mesh axis it is cut over and what every rank of that
mesh axis holds, and over which mesh axes the tensor is a copy or is to be averaged:

    fused q, k, v (8, 2, 2 rows), TP=2  Cut(0, "tp", (Part(8, (4, 4), "q"), Part(2, (1, 1), "k"), Part(2, (1, 1), "v")))
    the same, TP=3, uneven              ... Part(8, (3, 3, 2), "q"), Part(2, (1, 1, 0), "k"), Part(2, (1, 1, 0), "v")
    gate and up, TP=2                   Cut(0, "tp", (Part(16, (8, 8), "gate"), Part(16, (8, 8), "up")))
    row-parallel output, TP=2           Cut(1, "tp", (Part(8, (4, 4)),))
    vocabulary 50257 padded to 50304    Cut(0, "tp", (Part(50257, (25152, 25152), padding=47),))
    8 experts over EP=2                 Cut(0, "ep", (Part(8, (4, 4), starts=(0, 4)),), kind="expert")
    1 key head shared by 2 of TP=4      Cut(0, "tp", (Part(2, (1, 1, 1, 1), "k", starts=(0, 0, 1, 1)),))
    a norm                              no cut, replicated=("tp",)

`pieces` turns a layout and a place in the mesh into the boxes to declare. Whatever a layout does not say is an
error: a mesh axis it is silent about, a width that is missing, an index that no rank or two ranks hold.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar

from ckpt.errors import LayoutError
from ckpt.format.fragment import Box

__all__ = ["Cut", "Layout", "Part", "local_shape", "pieces"]

VERSION = 1
_KINDS = ("shard", "expert", "layer")
_MAX_PIECES = 1 << 16
_T = TypeVar("_T")
_Run = tuple[int, int, int]  # first local index, first global index, number


@dataclass(frozen=True, slots=True)
class Part:
    """A sub-parameter along a cut axis: `size` true indices, of which rank r holds `widths[r]`.

    Without `starts` the ranks follow one another; with it, rank r begins at index `starts[r]` of the part. Ranks
    that hold the same run hold copies; runs may not overlap otherwise. `padding` more indices after the true
    ones exist only in local tensors, and map to nothing.
    """

    size: int
    widths: tuple[int, ...]
    name: str = ""
    padding: int = 0
    starts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        what = f"part {self.name!r}"
        object.__setattr__(self, "widths", _ints(self.widths, f"widths of {what}"))
        if self.starts is not None:
            object.__setattr__(self, "starts", _ints(self.starts, f"starts of {what}"))
        _need(isinstance(self.name, str), f"{what}: the name must be text")
        _ints((self.size, self.padding), f"size and padding of {what}")
        _need(self.widths, f"{what}: widths are missing; give one for each rank")
        if self.starts is not None:
            n, m = len(self.widths), len(self.starts)
            _need(n == m, f"{what}: {n} widths but {m} starts; give one of each for every rank")
        end, total = 0, self.size + self.padding
        for start, width in sorted(set(self.runs())):
            _need(start <= end or not width, f"{what}: no rank holds indices {end}:{start}")
            _need(start >= end or not width, f"{what}: several ranks hold indices {start}:{min(end, start + width)}")
            end += width
        said = f"size {self.size} and padding {self.padding} make {total}"
        _need(end == total, f"{what}: the widths hold {end} indices, {said}")

    def runs(self) -> list[tuple[int, int]]:
        """First index and number of indices that each rank holds, padding included."""
        starts = itertools.accumulate(self.widths, initial=0) if self.starts is None else self.starts
        return list(zip(starts, self.widths, strict=False))


@dataclass(frozen=True, slots=True)
class Cut:
    """One axis of a tensor, cut over one axis of the mesh (or over "": padded or fused, but held whole).

    `parts` follow each other along the axis, in the global tensor and in each local one. `kind` says what the
    indices are: "shard" (rows), "expert" or "layer" (stacked parameters of their own, which must name `starts`).
    """

    axis: int
    over: str
    parts: tuple[Part, ...]
    kind: str = "shard"

    def __post_init__(self) -> None:
        _ints((self.axis,), "axis of a cut")
        what = f"cut of axis {self.axis}"
        _need(isinstance(self.over, str), f"{what}: the mesh axis must be text")
        object.__setattr__(self, "parts", _items(self.parts, Part, f"{what}: parts"))
        _need(self.parts, f"{what}: parts are missing; an axis without sub-parameters is one part")
        _need(self.kind in _KINDS, f"{what}: kind {self.kind!r} is none of {', '.join(_KINDS)}")
        counts = [len(p.widths) for p in self.parts]
        _need(len(set(counts)) == 1, f"{what}: the parts have widths for {counts} ranks; give each one for every rank")
        _need(self.over or counts[0] == 1, f"{what}: widths for {counts[0]} ranks but no mesh axis (`over`) is named")
        unplaced = [p.name for p in self.parts if p.starts is None]
        _need(self.kind == "shard" or not unplaced, f"{what} ({self.kind}): starts are missing for parts {unplaced}")


@dataclass(frozen=True, slots=True)
class Layout:
    """How one tensor of true global `shape` lies on a mesh.

    Over the mesh axes in `replicated` every rank holds the same values; over those in `averaged`, values of its
    own whose mean is the parameter. An axis without a cut is held whole.
    """

    shape: tuple[int, ...]
    cuts: tuple[Cut, ...] = ()
    replicated: tuple[str, ...] = ()
    averaged: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", _ints(self.shape, "shape"))
        object.__setattr__(self, "cuts", _items(self.cuts, Cut, "cuts"))
        object.__setattr__(self, "replicated", _items(self.replicated, str, "replicated"))
        object.__setattr__(self, "averaged", _items(self.averaged, str, "averaged"))
        _need(len(self.shape) <= 64, "a tensor has at most 64 axes")
        for cut in self.cuts:
            _need(cut.axis < len(self.shape), f"cut of axis {cut.axis}, but the shape is {list(self.shape)}")
            size = sum(p.size for p in cut.parts)
            n = self.shape[cut.axis]
            _need(size == n, f"axis {cut.axis}: the parts hold {size} true indices, the shape says {n}")
        _once([c.axis for c in self.cuts], "axis {} is cut twice; cut it over one mesh axis that combines them")
        _need("" not in self.replicated + self.averaged, "replicated and averaged: mesh axes must be named")
        _once(self.mesh_axes, "mesh axis {!r} is named twice")

    @property
    def mesh_axes(self) -> tuple[str, ...]:
        """Every mesh axis that this layout speaks about."""
        return (*(c.over for c in self.cuts if c.over), *self.replicated, *self.averaged)

    def to_json(self) -> str:
        """Canonical JSON, for `TensorSpec.layout`: the same text for the same layout."""
        row = _plain(self) | {"version": VERSION}
        return json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> Layout:
        """Reads what `to_json` wrote. Raises LayoutError for anything else, naming what is missing."""
        try:
            row = json.loads(text)
        except (ValueError, TypeError, RecursionError) as e:
            raise LayoutError(f"layout {text!r:.200} is not JSON: {e}") from None
        cuts, rows = [], _rows(row, "cuts")
        version = row.pop("version", None)
        _need(type(version) is int and version == VERSION, f"layout: version {version!r:.20}, not {VERSION}")
        for cut in rows:
            parts = [_build(Part, part) for part in _rows(cut, "parts")]
            cuts.append(_build(Cut, cut | {"parts": parts}))
        return _build(Layout, row | {"cuts": cuts})


def local_shape(layout: Layout, at: Mapping[str, int]) -> tuple[int, ...]:
    """Shape of the local tensor, padding included, of the rank with coordinates `at` (mesh axis -> index)."""
    _check_place(layout, at)
    shape = list(layout.shape)
    for cut in layout.cuts:
        shape[cut.axis] = sum(p.widths[_rank(cut, at)] for p in cut.parts)
    return tuple(shape)


def pieces(layout: Layout, at: Mapping[str, int], *, copies: bool = True) -> list[tuple[Box, Box]]:
    """What the local tensor of the rank with coordinates `at` holds: (box of it, box of the global tensor), in order.

    `at` gives the index on every mesh axis the layout speaks about, and on no other. Padding is in no box.
    Without `copies`, what a rank of lower coordinates holds as well is left out: over all places (of one index
    on each averaged axis) the global boxes then tile the tensor exactly.
    """
    _check_place(layout, at)
    if not copies and any(at[name] for name in layout.replicated):
        return []
    runs: list[list[_Run]] = [[(0, 0, n)] if n else [] for n in layout.shape]
    for cut in layout.cuts:
        runs[cut.axis] = _runs(cut, _rank(cut, at), copies)
    _need(math.prod(map(len, runs)) <= _MAX_PIECES, f"the local tensor falls into more than {_MAX_PIECES} pieces")
    out = []
    for combination in itertools.product(*runs):
        extent = tuple(n for _, _, n in combination)
        local, whole = tuple(a for a, _, _ in combination), tuple(b for _, b, _ in combination)
        out.append((Box(local, extent), Box(whole, extent)))
    return out


def _runs(cut: Cut, rank: int, copies: bool) -> list[_Run]:
    """The true indices that a rank holds along a cut axis; runs that continue each other are one."""
    out: list[_Run] = []
    local = base = 0
    for part in cut.parts:
        held = part.runs()
        start, width = held[rank]
        n = min(start + width, part.size) - start
        if n > 0 and (copies or held.index(held[rank]) == rank):
            if out and out[-1][0] + out[-1][2] == local and out[-1][1] + out[-1][2] == base + start:
                out[-1] = (out[-1][0], out[-1][1], out[-1][2] + n)
            else:
                out.append((local, base + start, n))
        local, base = local + width, base + part.size
    return out


def _check_place(layout: Layout, at: Mapping[str, int]) -> None:
    missing = [name for name in layout.mesh_axes if name not in at]
    _need(not missing, f"the coordinate on mesh axes {missing} is missing; the layout needs it")
    silent = [name for name in at if name not in layout.mesh_axes]
    _need(not silent, f"the layout is silent about mesh axes {silent}: cut, replicated or averaged over them?")
    _ints(tuple(at.values()), "coordinates")
    for cut in layout.cuts:
        rank, ranks = _rank(cut, at), len(cut.parts[0].widths)
        _need(rank < ranks, f"axis {cut.axis}: widths are missing for {cut.over}={rank}, there are {ranks}")


def _rank(cut: Cut, at: Mapping[str, int]) -> int:
    return at[cut.over] if cut.over else 0


def _need(ok: object, message: str) -> None:
    if not ok:
        raise LayoutError(message)


def _ints(values: Any, what: str) -> tuple[int, ...]:
    _need(isinstance(values, tuple | list), f"{what}: {values!r:.200} is not a list of numbers")
    bad = [v for v in values if not isinstance(v, int) or isinstance(v, bool) or not 0 <= v < 2**62]
    _need(not bad, f"{what}: {bad[:1]!r:.200} is not a whole number from 0 on")
    return tuple(values)


def _items(values: Any, kind: type[_T], what: str) -> tuple[_T, ...]:
    _need(isinstance(values, tuple | list), f"{what}: {values!r:.200} is not a list")
    _need(all(isinstance(v, kind) for v in values), f"{what}: every item must be a {kind.__name__}")
    return tuple(values)


def _once(values: Sequence[Any], message: str) -> None:
    for value, n in Counter(values).items():
        _need(n == 1, message.format(value))


def _plain(value: Any) -> Any:
    """As JSON knows it; what has its default value is left out."""
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Part | Cut | Layout):
        said = ((f.name, getattr(value, f.name)) for f in fields(value) if getattr(value, f.name) != f.default)
        return {name: _plain(v) for name, v in said}
    return value


def _rows(row: Any, key: str) -> list[Any]:
    _need(isinstance(row, dict) and isinstance(row.get(key, []), list), f"layout: no list of {key}")
    rows: list[Any] = row.get(key, [])
    return rows


def _build(kind: type[_T], row: Any) -> _T:
    what = f"layout: {kind.__name__.lower()}"
    _need(isinstance(row, dict), f"{what} {row!r:.200} is not an object")
    known = {f.name: f.default is MISSING for f in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(row) - set(known))
    _need(not unknown, f"{what}: {unknown!r:.200} unknown; a newer ckpt may read it")
    missing = [name for name, required in known.items() if required and name not in row]
    _need(not missing, f"{what}: {', '.join(missing)} missing")
    return kind(**row)
