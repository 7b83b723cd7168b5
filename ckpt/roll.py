"""The leaves of a state called over again, step after step: walked in full only when something in it was replaced.

A walk over a large model takes longer than a training step may be held up. From one step to the next its tensors are
the same objects at the same addresses; that is cheap to see. What is not a module, an optimizer or a tensor is
collected anew each time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from ckpt.optim import group_names
from ckpt.shards import ByLayout, Held, Shard, is_tensor
from ckpt.state import Leaves, collect, collect_groups, collect_value, owners_of, walk

__all__ = ["Called", "Roll"]


_WARY = 64  # calls that look at everything at once, after one that learned too late that something had changed


@dataclass(frozen=True)
class Called:
    """Leaves, and how they differ from those of the call before: all of them may (`whole`), or those named in `fresh`,
    which are other tensors of the same kind, shape and placement.

    `confirm`, if there is one, says whether all this is so: to be called before an optimizer may take its next step.
    """

    leaves: Leaves
    whole: bool
    fresh: frozenset[str] = frozenset()
    confirm: Callable[[], bool] | None = None


class Roll:
    """The leaves of one state."""

    def __init__(self) -> None:
        self._leaves: Leaves | None = None
        self._names: dict[str, list[str]] = {}  # of the parameters in the groups of each optimizer
        self._modules = _Modules((), frozenset())
        self._seen: list[Any] = []
        self._deep: list[Any] = []  # of the optimizers
        self._kept: list[Any] = []  # so that no identity is given to another object
        self._changing: tuple[frozenset[str], frozenset[str]] = frozenset(), frozenset()
        self._steady = False  # the optimizers' state is tensors alone
        self._wary = 0

    def call(self, state: Any, *, later: bool = False) -> Called:
        """The leaves of the state now. Raises what `ckpt.state.collect` does.

        `later`: what only an optimizer's own step changes need not be looked at before `confirm`; most tensors are of
        that kind. One that was replaced meanwhile is found then, and the next calls look at everything at once.
        """
        parts = [(name, value, policy) for name, value, policy, _ in walk(state)]
        optimizers = [value for _, value, _ in parts if isinstance(value, torch.optim.Optimizer)]
        known, seen = self._leaves, _seen(parts)
        if known is not None and seen == self._seen and None not in seen and self._modules.same():
            waits = later and self._steady and not self._wary
            if waits or self._still(optimizers):
                again = self._again(known, parts)
                if again is not None:
                    self._wary = max(0, self._wary - 1)
                    self._leaves = again.leaves
                    return replace(again, confirm=lambda: self._confirm(optimizers)) if waits else again
        return self._whole(state, parts, optimizers)

    def _whole(self, state: Any, parts: list[tuple[str, Any, str]], optimizers: list[Any]) -> Called:
        """Walks over everything."""
        known = self._leaves
        self._leaves, owners = collect(state), owners_of(state)
        owned = frozenset(id(p) for o in optimizers for group in o.param_groups for p in group["params"])
        self._kept = []
        self._seen, self._deep = _seen(parts, self._kept), _deep(optimizers, self._kept)
        self._modules = _Modules([value for _, value, _ in parts if isinstance(value, nn.Module)], owned)
        self._names = {n: group_names(n, v, owners) for n, v, _ in parts if isinstance(v, torch.optim.Optimizer)}
        states = [value for o in optimizers for state_of in o.state.values() for value in state_of.values()]
        self._steady = bool(states) and None not in self._deep and all(isinstance(v, torch.Tensor) for v in states)
        self._changing = _names(self._anew(parts))
        if known is not None and _alike(known, self._leaves):
            return Called(self._leaves, False, frozenset(self._leaves.tensors))
        return Called(self._leaves, whole=True)

    def _still(self, optimizers: list[Any]) -> bool:
        """Whether the optimizers hold what they did."""
        deep = _deep(optimizers)
        return deep == self._deep and None not in deep

    def _confirm(self, optimizers: list[Any]) -> bool:
        with suppress(RuntimeError):  # changed while it is looked at
            if self._still(optimizers):
                return True
        self._wary = _WARY
        return False

    def _anew(self, parts: list[tuple[str, Any, str]]) -> Leaves:
        """What changes from step to step."""
        new = Leaves()
        for name, value, policy in parts:
            if isinstance(value, torch.optim.Optimizer):
                collect_groups(new, name, value, self._names[name])
            elif not isinstance(value, nn.Module) and not is_tensor(value):
                collect_value(new, name, value, policy)
        return new

    def _again(self, known: Leaves, parts: list[tuple[str, Any, str]]) -> Called | None:
        """The known leaves with what changes from step to step; None if that has got other names or shapes."""
        new = self._anew(parts)
        if _names(new) != self._changing:
            return None
        if any(_kind(known.tensors[name].held) != _kind(leaf.held) for name, leaf in new.tensors.items()):
            return None
        leaves = Leaves({**known.tensors, **new.tensors}, {**known.objects, **new.objects}, known.aliases)
        return Called(leaves, False, frozenset(new.tensors))


def _names(leaves: Leaves) -> tuple[frozenset[str], frozenset[str]]:
    return frozenset(leaves.tensors), frozenset(leaves.objects)


def _alike(a: Leaves, b: Leaves) -> bool:
    """Whether two sets of leaves differ only in what is in them."""
    return (
        a.tensors.keys() == b.tensors.keys()
        and a.aliases == b.aliases
        and all(_kind(leaf.held) == _kind(b.tensors[name].held) for name, leaf in a.tensors.items())
    )


def _kind(held: Held) -> tuple[object, ...]:
    return held.dtype, held.shape, held.kind, held.scope, held.replica, [b for b, _ in held.pieces]


def _seen(parts: list[tuple[str, Any, str]], kept: list[Any] | None = None) -> list[Any]:
    """What identifies the parts of a state, tensors also by where they are; None in it if that cannot be told. What modules
    hold is looked at by `_Modules`; of the tensors that an optimizer owns this has only which they are, `_deep` the rest.
    What it names goes into `kept`."""
    seen: list[Any] = []
    for name, value, _ in parts:
        seen.append(name)
        if isinstance(value, nn.Module):
            seen.append(id(value))
        elif isinstance(value, torch.optim.Optimizer):
            seen.append(id(value))
            for group in value.param_groups:
                seen.append(tuple(group))
                seen += map(id, group["params"])
            if kept is not None:
                kept.append(value)
        elif is_tensor(value):
            _mark(value, seen, kept)
        else:
            seen.append("value")
    return seen


_tables = attrgetter("_parameters", "_buffers", "_modules")


class _Modules:
    """All modules below `roots`, and what was in them. Of parameters that are `owned` only which they are; of other tensors
    also where.

    Looking again makes a few passes over all of it that run in C: this is the greater part of what a step pays.
    """

    def __init__(self, roots: Sequence[nn.Module], owned: frozenset[int]) -> None:
        self._all = list(dict.fromkeys(m for root in roots for m in root.modules()))  # kept, with all that is in them,
        self._held = [part for table in self._look() for part in table.values()]  # so that no identity is given again
        self._keys, self._ids = self._of(self._look())
        tensors = [t for m in self._all for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        self._loose = [t for t in tensors if id(t) not in owned]
        self._marks = _marks(self._loose)
        self._buffered = [m for m in self._all if m._buffers]
        self._passing = [m._non_persistent_buffers_set.copy() for m in self._buffered]
        # FSDP1 moves its flat parameter about; extra state may be anything.
        self._known = not any(
            "_handle" in m.__dict__ or type(m).get_extra_state is not nn.Module.get_extra_state for m in self._all
        )

    def _look(self) -> list[dict[str, Any]]:
        return list(chain.from_iterable(map(_tables, self._all)))

    def _of(self, tables: list[dict[str, Any]]) -> tuple[list[Any], list[int]]:
        full = [table for table in tables if table]
        parts = chain.from_iterable([table.values() for table in full])
        return [*map(len, tables), *chain.from_iterable(full)], [*map(id, parts)]

    def same(self) -> bool:
        """Whether all is as it was."""
        if not self._known or (self._keys, self._ids) != self._of(self._look()):
            return False
        marks = _marks(self._loose)
        return (
            marks == self._marks
            and None not in marks
            and [m._non_persistent_buffers_set for m in self._buffered] == self._passing
        )


def _marks(tensors: list[torch.Tensor]) -> list[Any]:
    seen: list[Any] = []
    for t in tensors:
        _mark(t, seen, None)
    return seen


def _deep(optimizers: list[Any], kept: list[Any] | None = None) -> list[Any]:
    """The like of what optimizers own: parameters and the state that they have of them."""
    seen: list[Any] = []
    for optimizer in optimizers:
        states = optimizer.state
        for group in optimizer.param_groups:
            for p in group["params"]:
                _mark(p, seen, kept)
                for key, part in states.get(p, _NOTHING).items():
                    seen.append(key)
                    _mark(part, seen, kept)
    return seen


_PLAIN = (torch.Tensor, nn.Parameter)
_NOTHING: dict[str, Any] = {}


def _mark(value: Any, seen: list[Any], kept: list[Any] | None) -> None:
    kind = type(value)
    if kind in (Shard, ByLayout):
        seen.append(id(value))
        if kept is not None:
            kept.append(value)
        value = value.tensor
        kind = type(value)
    local = value if kind in _PLAIN else getattr(value, "_local_tensor", value)
    if isinstance(local, torch.Tensor):
        try:
            seen += id(value), local.data_ptr(), local.shape, local.stride(), local.dtype
            if kept is not None:
                kept.append(value)
        except RuntimeError:  # a subclass without storage of its own
            seen.append(None)
    else:
        seen.append((kind, repr(value)) if kind in _VALUES else None)


_VALUES = (int, float, str, bool, type(None))
