"""What each rank of another layout is to hold: a pure function of a manifest. No I/O, no ranks, no torch."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ckpt.errors import LayoutError, UsageError
from ckpt.format.dtypes import dtype
from ckpt.format.layout import Layout
from ckpt.format.manifest import Manifest
from ckpt.format.pack import TensorSpec
from ckpt.plan import Plan

__all__ = ["TpRule", "plan_ranks"]

_TP_NAMES = ("tp", "tensor", "tensor_parallel", "mp")
_Runs = list[tuple[int, int]]
_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TpRule:
    """Tensors whose name matches `pattern` (a glob) are cut over the tensor-parallel ranks along `dim`."""

    pattern: str
    dim: int


def plan_ranks(manifest: Manifest, ranks: int, tp: int = 1, rules: Sequence[TpRule] = ()) -> Plan:
    """What each of `ranks` is to hold; see `reshard`. Pure: no I/O, the same for the same arguments.

    What several tensor-parallel ranks could hold alike goes to the one with the fewest bytes. Raises UsageError for
    numbers that do not fit and for a rule that matches no tensor.
    """
    if ranks < 1 or tp < 1 or ranks % tp:
        raise UsageError(
            f"--ranks {ranks} --tp {tp}: the number of ranks must be a multiple of the tensor-parallel ones"
        )
    for rule in rules:
        if not any(_fits(rule, spec) for spec in manifest.tensors):
            raise UsageError(f"--tp-rule {rule.pattern}={rule.dim}: no tensor of that name has that dimension")
    width = max((len(t.shape) for t in manifest.tensors), default=0)
    fixed: list[tuple[_Ints, _Ints, _Ints]] = []
    free: list[tuple[_Ints, _Ints, _Ints]] = []
    for t, spec in enumerate(manifest.tensors):
        if 0 in spec.shape:
            continue
        parts = _tp_parts(spec, tp, rules)
        for k, (axis, runs) in enumerate(parts):
            d, box = _data_parts(spec.shape, axis, runs, ranks // tp, width)
            (fixed if len(parts) > 1 else free).append((d * tp + k, np.full(len(d), t, dtype=np.int64), box))
    none = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, 2, width), np.int64))
    rank, tensor, box = (np.concatenate(column) for column in zip(none, *fixed, strict=True))
    rank2, tensor2, box2 = (np.concatenate(column) for column in zip(none, *free, strict=True))
    item = np.array([dtype(t.dtype).itemsize for t in manifest.tensors], dtype=np.int64)
    scalar = np.array([not t.shape for t in manifest.tensors], dtype=bool)
    load = np.bincount(rank, _numel(box) * item[tensor], minlength=ranks).astype(np.float64)
    rank2 = _place(rank2, _numel(box2) * item[tensor2], scalar[tensor2], tp, load)
    rank, tensor, box = np.concatenate([rank, rank2]), np.concatenate([tensor, tensor2]), np.concatenate([box, box2])
    keys = [box[:, part, d] for part in (1, 0) for d in reversed(range(width))]
    order = np.lexsort([*keys, tensor, rank])
    return Plan(manifest.tensors, rank[order], tensor[order], tensor[order], box[order], ())


def _fits(rule: TpRule, spec: TensorSpec) -> bool:
    return 0 <= rule.dim < len(spec.shape) and fnmatch.fnmatchcase(spec.name, rule.pattern)


def _tp_parts(spec: TensorSpec, tp: int, rules: Sequence[TpRule]) -> list[tuple[int, _Runs]]:
    """For each tensor-parallel rank the axis and the runs of indices it holds there; one entry if all hold all.

    Each sub-parameter of a recorded layout (query, key, value) is cut by itself.
    """
    axis, sizes = 0, list(spec.shape[:1])
    found = _recorded(spec) if tp > 1 else None
    if found is not None:
        axis, sizes = found
    else:
        rule = next((r for r in rules if _fits(r, spec)), None) if tp > 1 else None
        if rule is None:
            return [(0, [(0, n) for n in spec.shape[:1]])]
        axis, sizes = rule.dim, [spec.shape[rule.dim]]
    out = []
    for k in range(tp):
        runs: _Runs = []
        base = 0
        for size in sizes:
            step = -(-size // tp)
            lo, hi = base + min(k * step, size), base + min((k + 1) * step, size)
            if lo < hi and runs and runs[-1][1] == lo:
                runs[-1] = (runs[-1][0], hi)
            elif lo < hi:
                runs.append((lo, hi))
            base += size
        out.append((axis, runs))
    return out


def _recorded(spec: TensorSpec) -> tuple[int, list[int]] | None:
    """The tensor-parallel axis of a recorded layout and the sizes of its sub-parameters, if it speaks of one."""
    if not spec.layout:
        return None
    try:
        layout = Layout.from_json(spec.layout)
    except LayoutError:
        return None  # another program's notes
    cut = next((c for c in layout.cuts if c.over in _TP_NAMES), None)
    if cut is None or layout.shape != spec.shape:
        return None
    return cut.axis, [p.size for p in cut.parts]


def _data_parts(shape: tuple[int, ...], axis: int, runs: _Runs, parts: int, width: int) -> tuple[_Ints, _Ints]:
    """Chunks along dimension 0 of what `runs` along `axis` leave of a tensor: (data rank (n,), box (n, 2, width))."""
    if not shape:
        return np.zeros(1, np.int64), np.zeros((1, 2, width), np.int64)
    rows = runs if axis == 0 else [(0, shape[0])]
    total = sum(b - a for a, b in rows)
    edge = np.minimum(np.arange(parts + 1, dtype=np.int64) * -(-total // parts), total)
    ranks, boxes = [np.empty(0, np.int64)], [np.empty((0, 2, width), np.int64)]
    at = 0
    for a, b in rows:
        lo, hi = np.maximum(edge[:-1], at), np.minimum(edge[1:], at + b - a)
        has = np.flatnonzero(lo < hi)
        for other in [None] if axis == 0 else runs:
            box = np.zeros((len(has), 2, width), dtype=np.int64)
            box[:, 1, : len(shape)] = shape
            box[:, 0, 0], box[:, 1, 0] = a + lo[has] - at, hi[has] - lo[has]
            if other is not None:
                box[:, 0, axis], box[:, 1, axis] = other[0], other[1] - other[0]
            ranks.append(has)
            boxes.append(box)
        at += b - a
    return np.concatenate(ranks), np.concatenate(boxes)


def _numel(box: _Ints) -> _Ints:
    """Elements of each box; dimensions that are padding have extent 0."""
    out: _Ints = np.where(box[:, 1] == 0, 1, box[:, 1]).prod(axis=1)
    return out


def _place(rank: _Ints, nbytes: _Ints, scalar: npt.NDArray[np.bool_], tp: int, load: npt.NDArray[np.float64]) -> _Ints:
    """Which of the ranks that may hold a fragment does: any for a scalar, else any of its tensor-parallel ones.

    `rank`: the first of them. The largest come first, then those of lower ranks; each goes where `load`, the bytes
    of each rank so far (changed in place), is least.
    """
    if tp == 1 and not scalar.any():
        return rank
    out = rank.copy()
    for i in np.lexsort([np.arange(len(rank)), -nbytes]).tolist():
        lo, hi = (0, len(load)) if scalar[i] else (int(rank[i]), int(rank[i]) + tp)
        out[i] = lo + int(np.argmin(load[lo:hi]))
        load[out[i]] += nbytes[i]
    return out
