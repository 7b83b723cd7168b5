"""Two checkpoints compared tensor by tensor, however each of them is cut, in bounded memory and without torch.

"identical" means bit for bit, so a NaN equals a NaN of the same bits. Values are compared only where bits differ.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ckpt.checkpoint import Checkpoint
from ckpt.errors import NotFoundError
from ckpt.format.dtypes import dtype
from ckpt.format.fragment import flat_boxes, whole
from ckpt.format.manifest import Manifest
from ckpt.offline.values import numbers
from ckpt.offline.window import Stream

__all__ = ["Diff", "TensorDiff", "ValueDiff", "diff"]

IDENTICAL, CLOSE, DIFFERS = "identical", "close", "differs"
DTYPE, SHAPE, ONLY_A, ONLY_B = "dtype", "shape", "only in A", "only in B"
NOTES = "__ckpt__."
"""Objects of this prefix are ckpt's own remarks about how a checkpoint came to be; they are not compared."""

_WINDOW = 8 << 20  # two of each checkpoint are held
_CHUNK = 1 << 16  # elements compared at once
Progress = Callable[[int], None]


@dataclass(frozen=True)
class TensorDiff:
    """One tensor name.

    status     "identical" (all bits), "close" (within the tolerance that was asked for), "differs", "dtype" (values
               compared all the same), "shape", "only in A", "only in B"
    a, b       dtype and shape on each side, "" where there is none
    elements   how many differ in any bit; `nonfinite` of them are NaN or infinite on one side, or overflow
    max_abs    largest |a-b| among the other ones (exact for integers), with the index `at` of its first occurrence
    max_rel    largest |a-b| / max(|a|, |b|) among them
    """

    name: str
    status: str
    a: str = ""
    b: str = ""
    elements: int = 0
    nonfinite: int = 0
    max_abs: float | int | None = None
    max_rel: float | None = None
    at: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ValueDiff:
    """One object or metric (`kind`): "identical", "differs", "only in A" or "only in B"; the values as stored text."""

    kind: str
    name: str
    status: str
    a: str = ""
    b: str = ""


@dataclass(frozen=True)
class Diff:
    """What a comparison found, by name. `a` and `b` are the two steps' URLs."""

    a: str
    b: str
    tensors: tuple[TensorDiff, ...]
    values: tuple[ValueDiff, ...]

    @property
    def same(self) -> bool:
        """Whether nothing differs by more than was allowed."""
        return all(t.status in (IDENTICAL, CLOSE) for t in self.tensors) and all(
            v.status == IDENTICAL for v in self.values
        )


def diff(
    a: Checkpoint,
    b: Checkpoint,
    *,
    only: Sequence[str] = (),
    rtol: float | None = None,
    atol: float | None = None,
    progress: Progress | None = None,
) -> Diff:
    """Compares two checkpoints. Names that are aliases stand for the tensor they name.

    only        globs of the names of tensors and objects to compare; with them metrics are left out
    rtol, atol  |a-b| <= atol + rtol * max(|a|, |b|) everywhere counts as "close"; without both, only bits count
    progress    is told the bytes of A that were compared

    Holds less than 64 MiB. Raises IntegrityError or FormatError for bytes that are not what was written, NotFoundError
    if nothing has a name of `only`.
    """
    tolerance = None if rtol is None and atol is None else (rtol or 0.0, atol or 0.0)
    out: list[TensorDiff] = []
    same_kind: list[_Pair] = []
    other_kind: list[_Pair] = []
    for name in _names(a.manifest, b.manifest, only):
        ia, ib = _index(a.manifest, name), _index(b.manifest, name)
        row = TensorDiff(name, IDENTICAL, _said(a.manifest, ia), _said(b.manifest, ib))
        if ia is None or ib is None:
            out.append(replace(row, status=ONLY_B if ia is None else ONLY_A))
        elif a.manifest.tensors[ia].shape != b.manifest.tensors[ib].shape:
            out.append(replace(row, status=SHAPE))
        else:
            pair = _Pair(row, ia, ib, a.manifest.tensors[ia].shape, tolerance)
            (same_kind if a.manifest.tensors[ia].dtype == b.manifest.tensors[ib].dtype else other_kind).append(pair)
    for pair in same_kind + other_kind:
        a.manifest.check_coverage(pair.a)
        b.manifest.check_coverage(pair.b)
    same_kind.sort(key=lambda p: _place(a.manifest, p.a))
    _compare_bits(a, b, same_kind, progress)
    for pair in other_kind:
        _compare_values(a, b, pair, progress)
    out += [p.result() for p in same_kind] + [replace(p.result(), status=DTYPE) for p in other_kind]
    values = _objects(a.manifest, b.manifest, only)
    if only and not out and not values:
        raise NotFoundError(f"no tensor or object of {a.ref} or {b.ref} is called {' or '.join(only)}")
    if not only:
        values += _values("metric", _texts(a.metrics), _texts(b.metrics))
    return Diff(a.ref, b.ref, tuple(sorted(out, key=lambda t: t.name)), tuple(values))


def _names(a: Manifest, b: Manifest, only: Sequence[str]) -> list[str]:
    """Every wanted tensor's name; an alias where it was asked for or the other side has something else under it."""
    names = set(a.by_key) | set(b.by_key)
    for here, there in ((a, b), (b, a)):
        names |= {n for n, target in here.aliases.items() if only or there.aliases.get(n) != target}
    return sorted(n for n in names if _wanted(n, only))


def _index(m: Manifest, name: str) -> int | None:
    return m.by_key.get(m.aliases.get(name, name))


def _said(m: Manifest, index: int | None) -> str:
    return "" if index is None else f"{m.tensors[index].dtype} {list(m.tensors[index].shape)}"


def _wanted(name: str, only: Sequence[str]) -> bool:
    return not only or any(fnmatch.fnmatchcase(name, p) for p in only)


def _place(m: Manifest, t: int) -> tuple[int, int]:
    """Where the first byte of a tensor is stored: reading in this order is reading files from front to back."""
    row = int(m.start[t])
    return (int(m.pack[row]), int(m.offset[row])) if row < int(m.start[t + 1]) else (-1, 0)


@dataclass
class _Pair:
    """Two tensors of one shape while they are compared."""

    row: TensorDiff
    a: int
    b: int
    shape: tuple[int, ...]
    tolerance: tuple[float, float] | None
    close: bool = True
    elements: int = 0
    nonfinite: int = 0
    max_abs: float | int | None = None
    max_rel: float | None = None
    at: int = 0

    def add(self, a: npt.NDArray[Any], b: npt.NDArray[Any], at: npt.NDArray[np.int64]) -> None:
        """Values of elements that differ in bits, (n,) or (n, 2), and the elements' flat indices (n,)."""
        self.elements += len(at)
        at = np.repeat(at, a.size // len(at))
        a, b = a.reshape(-1), b.reshape(-1)
        distance, scale, odd = _distance(a, b)
        self.nonfinite += int(odd.sum())
        self.close = self.close and not odd.any()
        if odd.any():
            distance, scale, at = distance[~odd], scale[~odd], at[~odd]
        if not len(distance):
            return
        with np.errstate(all="ignore"):
            wide = distance.astype(np.float64)
            relative = np.where(scale > 0, wide / scale, 0.0)
            if self.tolerance is not None:
                self.close = self.close and bool(
                    ((wide <= self.tolerance[1] + self.tolerance[0] * scale) | (wide == 0)).all()
                )
        k = int(np.argmax(distance))
        if self.max_abs is None or distance[k] > self.max_abs:
            self.max_abs, self.at = distance[k].item(), int(at[k])
        self.max_rel = max(self.max_rel or 0.0, float(relative.max()))

    def result(self) -> TensorDiff:
        if not self.elements:
            return self.row
        close = self.tolerance is not None and self.close
        return replace(
            self.row,
            status=CLOSE if close else DIFFERS,
            elements=self.elements,
            nonfinite=self.nonfinite,
            max_abs=self.max_abs,
            max_rel=self.max_rel,
            at=None if self.max_abs is None else tuple(int(i) for i in np.unravel_index(self.at, self.shape)),
        )


def _distance(
    a: npt.NDArray[Any], b: npt.NDArray[Any]
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """(|a-b|, max(|a|, |b|), where that is no number). Two NaNs are 0 apart."""
    if a.dtype.kind in "iu" and b.dtype == a.dtype:
        high, low = np.maximum(a, b), np.minimum(a, b)
        # In unsigned arithmetic the difference of the extremes cannot overflow.
        apart = (
            high.astype(np.uint64) - low.astype(np.uint64) if a.dtype.kind == "u" else _unsigned(high) - _unsigned(low)
        )
        scale = np.maximum(np.abs(a.astype(np.float64)), np.abs(b.astype(np.float64)))
        return apart, scale, np.zeros(len(a), dtype=bool)
    with np.errstate(all="ignore"):
        a, b = (x if x.dtype.kind == "c" else x.astype(np.float64) for x in (a, b))
        apart = np.abs(a - b).astype(np.float64)
        apart[np.isnan(a) & np.isnan(b)] = 0
        apart[a == b] = 0  # infinities
        scale = np.maximum(np.abs(a), np.abs(b)).astype(np.float64)
    return apart, scale, ~np.isfinite(apart)


def _unsigned(x: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    return x.astype(np.int64).view(np.uint64)


def _compare_bits(a: Checkpoint, b: Checkpoint, pairs: Sequence[_Pair], progress: Progress | None) -> None:
    """Pairs of one dtype: streams both, cut at the same bytes; values are computed only for what differs."""
    streams = [
        Stream(c.backend, c.commit.folder, c.manifest, [(t, whole(s)) for t, s in side], limit=_WINDOW)
        for c, side in ((a, [(p.a, p.shape) for p in pairs]), (b, [(p.b, p.shape) for p in pairs]))
    ]
    for here, there in zip(*streams, strict=True):
        for x, y in zip(here, there, strict=True):
            pair = pairs[x.index]
            kind = dtype(a.manifest.tensors[pair.a].dtype)
            step = _CHUNK * kind.itemsize
            for lo in range(0, len(x.data), step):
                p, q = x.data[lo : lo + step], y.data[lo : lo + step]
                unequal = _unequal(p, q, kind.itemsize)
                if len(unequal):
                    p, q = (_elements(v, kind.itemsize)[unequal].view(np.uint8) for v in (p, q))
                    at = unequal + (x.start + lo) // kind.itemsize
                    pair.add(numbers(p, kind.name), numbers(q, kind.name), at)
            if progress is not None:
                progress(len(x.data))


def _unequal(p: npt.NDArray[np.uint8], q: npt.NDArray[np.uint8], itemsize: int) -> npt.NDArray[np.int64]:
    """The elements that differ in any bit."""
    if np.array_equal(p, q):
        return np.empty(0, dtype=np.int64)
    return np.flatnonzero((_elements(p, itemsize) != _elements(q, itemsize)).any(axis=1))


def _elements(data: npt.NDArray[np.uint8], itemsize: int) -> npt.NDArray[Any]:
    """One row for each element: the bits as one unsigned integer, or two."""
    word = min(itemsize, 8)
    return data.view(f"<u{word}").reshape(-1, itemsize // word)


def _compare_values(a: Checkpoint, b: Checkpoint, pair: _Pair, progress: Progress | None) -> None:
    """A pair of different dtypes: by value, a chunk at a time. Types that pack two numbers are not taken apart."""
    sides = [(c.tensors[c.manifest.tensors[t].key], c.manifest.tensors[t].dtype) for c, t in ((a, pair.a), (b, pair.b))]
    if "float4_e2m1fn_x2" in (sides[0][1], sides[1][1]):
        return
    total = math.prod(pair.shape)
    for start in range(0, total, 8 * _CHUNK):
        stop = min(start + 8 * _CHUNK, total)
        raw = [
            np.concatenate([tensor.raw(box).reshape(-1).view(np.uint8) for box in flat_boxes(pair.shape, start, stop)])
            for tensor, _ in sides
        ]
        for lo in range(0, stop - start, _CHUNK):
            p, q = (
                numbers(r.reshape(stop - start, -1)[lo : lo + _CHUNK], kind)
                for r, (_, kind) in zip(raw, sides, strict=True)
            )
            with np.errstate(all="ignore"):
                unequal = np.flatnonzero((p != q) & ~(np.isnan(p) & np.isnan(q)))
            if len(unequal):
                pair.add(p[unequal], q[unequal], unequal + start + lo)
        if progress is not None:
            progress(len(raw[0]))


def _objects(a: Manifest, b: Manifest, only: Sequence[str]) -> list[ValueDiff]:
    sides = [
        {
            o.name if o.scope == "replicated" else f"{o.name}@{o.scope}": f"pickle:{o.value}"
            if o.encoding == "pickle"
            else o.value
            for o in m.objects
            if not o.name.startswith(NOTES) and _wanted(o.name, only)
        }
        for m in (a, b)
    ]
    return _values("object", *sides)


def _texts(metrics: Mapping[str, float]) -> dict[str, str]:
    return {name: repr(value) for name, value in metrics.items()}


def _values(kind: str, a: Mapping[str, str], b: Mapping[str, str]) -> list[ValueDiff]:
    out = []
    for name in sorted({*a, *b}):
        status = ONLY_B if name not in a else ONLY_A if name not in b else IDENTICAL if a[name] == b[name] else DIFFERS
        out.append(ValueDiff(kind, name, status, a.get(name, ""), b.get(name, "")))
    return out
