"""The leaves of a state called over again, step after step: walked in full only when something in it was replaced.

A walk over a large model takes longer than a training step may be held up. From one step to the next its tensors are
the same objects at the same addresses; that is cheap to see. What is not a module, an optimizer or a tensor is
collected anew each time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ckpt.optim import Owners
from ckpt.shards import ByLayout, Held, Shard, is_tensor
from ckpt.state import Leaves, collect, collect_groups, collect_value, owners_of, walk

__all__ = ["Called", "Roll"]


@dataclass(frozen=True)
class Called:
    """Leaves, and how they differ from those of the call before: all of them may (`whole`), or those named in `fresh`,
    which are other tensors of the same kind, shape and placement."""

    leaves: Leaves
    whole: bool
    fresh: frozenset[str] = frozenset()


class Roll:
    """The leaves of one state."""

    def __init__(self) -> None:
        self._leaves: Leaves | None = None
        self._owners: Owners = {}
        self._seen: list[Any] = []
        self._kept: list[Any] = []  # so that no identity is given to another object
        self._changing: tuple[frozenset[str], frozenset[str]] = frozenset(), frozenset()

    def call(self, state: Any) -> Called:
        """The leaves of the state now. Raises what `ckpt.state.collect` does."""
        parts = [(name, value, policy) for name, value, policy, _ in walk(state)]
        kept: list[Any] = []
        seen: list[Any] = []
        for name, value, _ in parts:
            seen.append(name)
            _marks(value, seen, kept)
        known = self._leaves
        if known is not None and seen == self._seen and None not in seen:
            again = self._again(known, parts)
            if again is not None:
                self._leaves = again.leaves
                return again
        self._leaves, self._owners = collect(state), owners_of(state)
        self._seen, self._kept = seen, kept
        self._changing = _names(self._anew(parts))
        if known is not None and _alike(known, self._leaves):
            return Called(self._leaves, False, frozenset(self._leaves.tensors))
        return Called(self._leaves, whole=True)

    def _anew(self, parts: list[tuple[str, Any, str]]) -> Leaves:
        """What changes from step to step."""
        new = Leaves()
        for name, value, policy in parts:
            if isinstance(value, torch.optim.Optimizer):
                collect_groups(new, name, value, self._owners)
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


def _marks(value: Any, seen: list[Any], kept: list[Any]) -> None:
    """Adds to `seen` what identifies the tensors of a part and where they are; None if that cannot be told."""
    if isinstance(value, nn.Module):
        stack = [value]
        while stack:
            module = stack.pop()
            if "_handle" in module.__dict__ or type(module).get_extra_state is not nn.Module.get_extra_state:
                seen.append(None)  # FSDP1 moves its flat parameter about; extra state may be anything
            for tensors in (module._parameters, module._buffers):
                for key, tensor in tensors.items():
                    seen.append(key)
                    _mark(tensor, seen, kept)
            if module._non_persistent_buffers_set:
                seen.append(frozenset(module._non_persistent_buffers_set))
            for key, child in module._modules.items():
                seen.append(key)
                if child is not None:
                    stack.append(child)
            seen.append("")
    elif isinstance(value, torch.optim.Optimizer):
        states = value.state
        for group in value.param_groups:
            seen.append(tuple(group))
            for p in group["params"]:
                _mark(p, seen, kept)
                for key, part in states.get(p, _NOTHING).items():
                    seen.append(key)
                    _mark(part, seen, kept)
    elif is_tensor(value):
        _mark(value, seen, kept)
    else:
        seen.append("value")


_PLAIN = (torch.Tensor, nn.Parameter)
_NOTHING: dict[str, Any] = {}


def _mark(value: Any, seen: list[Any], kept: list[Any]) -> None:
    kind = type(value)
    if kind in (Shard, ByLayout):
        seen.append(id(value))
        kept.append(value)
        value = value.tensor
        kind = type(value)
    local = value if kind in _PLAIN else getattr(value, "_local_tensor", value)
    if isinstance(local, torch.Tensor):
        try:
            seen += id(value), local.data_ptr(), local.shape, local.stride(), local.dtype
            kept.append(value)
        except RuntimeError:  # a subclass without storage of its own
            seen.append(None)
    else:
        seen.append((kind, repr(value)) if kind in _VALUES else None)


_VALUES = (int, float, str, bool, type(None))
