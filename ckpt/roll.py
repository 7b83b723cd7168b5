"""The leaves of a state called over again, step after step: walked in full only when something in it was replaced.

A walk over a large model takes longer than a training step may be held up. From one step to the next its tensors are
the same objects at the same addresses; that is cheap to see. What is not a module, an optimizer or a tensor is
collected anew each time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ckpt.optim import Owners
from ckpt.shards import Held, is_tensor
from ckpt.state import Leaves, collect, collect_groups, collect_value, owners_of, walk

__all__ = ["Called", "Roll"]


_PLAIN = (torch.Tensor, nn.Parameter)


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
        self._changing: frozenset[str] = frozenset()

    def call(self, state: Any) -> Called:
        """The leaves of the state now. Raises what `ckpt.state.collect` does."""
        parts = [(name, value, policy) for name, value, policy, _ in walk(state)]
        kept: list[Any] = []
        seen = [mark for name, value, _ in parts for mark in _marks(name, value, kept)]
        if self._leaves is not None and seen == self._seen and None not in seen:
            again = self._again(self._leaves, parts)
            if again is not None:
                self._leaves = again.leaves
                return again
        self._leaves, self._owners = collect(state), owners_of(state)
        self._seen, self._kept = seen, kept
        return Called(self._leaves, whole=True)

    def _again(self, known: Leaves, parts: list[tuple[str, Any, str]]) -> Called | None:
        """The known leaves with what changes from step to step; None if that has got other names or shapes."""
        new = Leaves()
        for name, value, policy in parts:
            if isinstance(value, torch.optim.Optimizer):
                collect_groups(new, name, value, self._owners)
            elif not isinstance(value, nn.Module) and not is_tensor(value):
                collect_value(new, name, value, policy)
        for name, leaf in new.tensors.items():
            before = known.tensors.get(name)
            if before is None or _kind(before.held) != _kind(leaf.held):
                return None
        fresh = frozenset(new.tensors)
        if self._changing not in (frozenset(), fresh) or not known.objects.keys() >= new.objects.keys():
            return None
        self._changing = fresh
        leaves = Leaves({**known.tensors, **new.tensors}, {**known.objects, **new.objects}, known.aliases)
        return Called(leaves, False, fresh)


def _kind(held: Held) -> tuple[object, ...]:
    return held.dtype, held.shape, held.kind, held.scope, held.replica, [b for b, _ in held.pieces]


def _marks(name: str, value: Any, kept: list[Any]) -> Iterator[Any]:
    """What identifies the tensors of a part and where they are; None if that cannot be told."""
    if isinstance(value, nn.Module):
        yield name, "module"
        stack = [value]
        while stack:
            module = stack.pop()
            if hasattr(module, "_handle") or type(module).get_extra_state is not nn.Module.get_extra_state:
                yield None  # FSDP1 moves its flat parameter about; extra state may be anything
            yield tuple(module._modules)
            for names in (module._parameters, module._buffers):
                yield tuple(names)
                yield from (_mark(t, kept) for t in names.values())
            stack += [m for m in module._modules.values() if m is not None]
    elif isinstance(value, torch.optim.Optimizer):
        yield name, "optimizer"
        for group in value.param_groups:
            yield tuple(group)
            for p in group["params"]:
                yield _mark(p, kept)
                for key, part in value.state.get(p, {}).items():
                    yield key
                    yield _mark(part, kept)
    elif is_tensor(value):
        yield name
        yield _mark(value, kept)
    else:
        yield name, "value"


def _mark(value: Any, kept: list[Any]) -> tuple[Any, ...] | None:
    if not isinstance(value, torch.Tensor):
        return ("value", value) if isinstance(value, (int, float, str, type(None))) else None
    kept.append(value)
    local = value if type(value) in _PLAIN else getattr(value, "_local_tensor", value)
    try:
        return id(value), local.data_ptr(), local.numel()
    except RuntimeError:  # a subclass without storage of its own
        return None
