"""The values of a DCP state dict (not its tensors) as ckpt stores them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ckpt.errors import LayoutError, UsageError
from ckpt.objects import Pickled, encode_object
from ckpt.offline.dcp_tree import PATHS, Path, build, group_leaves, group_tables, join, odd_paths, optimizer_keys
from ckpt.shards import hold

__all__ = ["Values"]


@dataclass
class Values:
    """`rows`: (name, encoding, text). `tensors`: those that were inside the values, plain and contiguous.
    `pickled`: names of values that JSON cannot hold."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    pickled: list[str] = field(default_factory=list)

    @staticmethod
    def of(
        values: Mapping[str, Any],
        paths: Mapping[str, Path],
        tensors: Collection[str],
        mine: Callable[[str], bool] = lambda name: True,
    ) -> Values:
        """`values`: DCP's name -> value; `tensors`: the other leaves of the state dict; `paths` of both, where known.

        A value with tensors inside is left out if it is not `mine` to write.
        """
        out = Values()
        stored: dict[str, Any] = {}
        where: dict[str, Path] = {name: paths.get(name, (name,)) for name in tensors}
        for path, leaves in group_leaves(values, {**where, **paths}).items():
            value = build([(inner, values[leaf]) for leaf, inner in leaves])
            single = len(leaves) == 1 and not leaves[0][1]
            if out._add(join(path), value, mine(leaves[0][0]), last=single):
                stored[join(path)], where[join(path)] = value, path
                continue
            for leaf, inner in leaves:  # a list of which some part must be pickled: only that part is
                out._add(leaf, values[leaf], mine(leaf), last=True)
                stored[leaf], where[leaf] = values[leaf], (*path, *inner)
        for name, table in group_tables(stored).items():
            if out._add(name, table, False, last=False):
                stored[name] = table
        odd = odd_paths(where, optimizer_keys(stored))
        if odd:
            out._add(PATHS, odd, True, last=False)
        return out

    def _add(self, name: str, value: Any, mine: bool, *, last: bool) -> bool:
        """As JSON, or with `last` as a pickle if that is the only way. False if neither."""
        inside: dict[str, torch.Tensor] = {}

        def take(path: str, leaf: Any) -> bool:
            if type(leaf) not in (torch.Tensor, torch.nn.Parameter):
                return False
            inside[path] = hold(path, leaf).pieces[0][1].contiguous()
            return True

        try:
            row = (name, *encode_object(value, name, take))
        except (UsageError, LayoutError):
            if not last:
                return False
            row = (name, *encode_object(Pickled(value), name))
            inside.clear()
            self.pickled.append(name)
        if mine or not inside:
            self.rows.append(row)
            self.tensors |= inside
        return True
