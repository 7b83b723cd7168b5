"""A recipe into a live state: combined while it is resharded, with nothing written in between."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ckpt.fill import Fill, fill
from ckpt.format.dtypes import dtype
from ckpt.format.fragment import flat_boxes
from ckpt.merge.rules import Sources
from ckpt.merge.stream import Blend
from ckpt.stored import ReadStats

__all__ = ["fill_blend"]


def fill_blend(blend: Blend, found: Sources, wanted: Sequence[Fill], world: int) -> ReadStats:
    """Fills all views with what a recipe comes to; what is only copied as `ckpt.fill.fill` does. Raises what that does,
    and MismatchError for a combination that is not finite.

    `world`: as for `fill`. Memory: that of `Blend.weighed`.
    """
    stats = fill(
        blend.backends[-1],
        blend.commit.folder,
        blend.manifest,
        [w for w in wanted if w.tensor not in found],
        world,
    )
    averaged = [w for w in wanted if w.tensor in found]
    for part in blend.averaged([(w.tensor, w.box) for w in averaged], found):
        tensor, box, view = averaged[part.index]
        kind = blend.manifest.tensors[tensor].dtype
        item = dtype(kind).itemsize
        values, at = torch.from_numpy(part.data).view(getattr(torch, kind)), 0
        for some in flat_boxes(box.shape, part.start // item, part.start // item + len(values)):
            view[some.slices].copy_(values[at : at + some.numel].reshape(some.shape))
            at += some.numel
    return ReadStats(stats.needed + blend.stats.needed, stats.read + blend.stats.read)
