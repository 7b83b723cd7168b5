"""Optimizer state by parameter name, so that groups and their order may differ between save and load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ckpt.errors import UsageError
from ckpt.objects import encode_object
from ckpt.shards import Held, like

__all__ = [
    "Owner",
    "for_owner",
    "group_clashes",
    "group_hyper",
    "group_names",
    "group_table",
    "named_state",
    "new_state",
    "regroup",
]


@dataclass(frozen=True)
class Owner:
    """A parameter that a model owns, by name.

    `held`: how this rank holds it, where the tensor itself does not say (FSDP1); `start` and `stop` locate it in the
    flat parameter that the optimizer sees instead.
    """

    name: str
    held: Held | None = None
    start: int | None = None
    stop: int | None = None


_NAMES = ("params", "param_names")  # who is in a group, not how it is stepped

Owners = Mapping[int, tuple[Owner, ...]]
"""id(parameter) -> the named parameters in it."""


def named_state(key: str, optimizer: torch.optim.Optimizer, owners: Owners) -> Iterator[tuple[str, Any]]:
    """(`<key>.state.<fqn>.<name>`, value) of all state there is; tensors of a flat parameter come as `Held`."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            for owner in _owners(key, p, owners):
                for name, value in optimizer.state.get(p, {}).items():
                    yield f"{key}.state.{owner.name}.{name}", for_owner(owner, name, p, value)


def for_owner(owner: Owner, name: str, p: torch.Tensor, value: Any) -> Any:
    """A state value as its owner holds it: the slice of a flat state that belongs to one parameter, else as it is."""
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return value
    if owner.held is None:
        return value
    if owner.start is not None and value.numel() == p.numel():
        return like(owner.held, name, value.reshape(-1)[owner.start : owner.stop])
    if owner.start is None and value.shape == p.shape:
        return like(owner.held, name, value)
    return value


def _owners(key: str, p: torch.Tensor, owners: Owners) -> tuple[Owner, ...]:
    try:
        return owners[id(p)]
    except KeyError:
        raise UsageError(
            f"optimizer {key!r} steps a parameter of shape {tuple(p.shape)} that no module in the state owns; "
            "pass the module in the same state, so that its state can be stored by name"
        ) from None


def group_names(key: str, optimizer: torch.optim.Optimizer, owners: Owners) -> list[str]:
    """The names of each group's parameters, as JSON."""
    return [
        encode_object([o.name for p in group["params"] for o in _owners(key, p, owners)], f"{key}.groups")[1]
        for group in optimizer.param_groups
    ]


def group_table(key: str, optimizer: torch.optim.Optimizer, names: Sequence[str]) -> str:
    """The groups as JSON, [{"params": [names], "hyper": {...}}]; `names` are those of `group_names`."""
    rows = []
    for i, (group, params) in enumerate(zip(optimizer.param_groups, names, strict=True)):
        hyper = {k: _plain(key, k, v) for k, v in group.items() if k not in _NAMES}
        rows.append(f'{{"params":{params},"hyper":{encode_object(hyper, f"{key}.groups.{i}.hyper")[1]}}}')
    return f"[{','.join(rows)}]"


def _plain(key: str, name: str, value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if value.numel() != 1:
        raise UsageError(
            f"optimizer {key!r}: hyper-parameter {name!r} is a tensor of shape {tuple(value.shape)}; use a scalar"
        )
    return value.item()


def group_hyper(tables: list[list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Parameter name -> its hyper-parameters, from the group tables of all ranks that stored one."""
    out = {}
    for group in (group for table in tables for group in table):
        hyper = {k: v for k, v in group["hyper"].items() if k not in _NAMES}
        out.update(dict.fromkeys(group["params"], hyper))
    return out


def group_clashes(
    key: str, optimizer: torch.optim.Optimizer, owners: Owners, saved: Mapping[str, dict[str, Any]]
) -> Iterator[str]:
    """Groups whose parameters were saved with different hyper-parameters, in words."""
    for i, group in enumerate(optimizer.param_groups):
        found = _saved_in(key, group, owners, saved)
        for name, hyper in found[1:]:
            first, other = found[0]
            if hyper != other:
                diff = ", ".join(sorted(k for k in {*hyper, *other} if hyper.get(k) != other.get(k)))
                yield f"group {i} of {key!r} holds {first!r} and {name!r}, which were saved with different {diff}"
                break


def regroup(key: str, optimizer: torch.optim.Optimizer, owners: Owners, saved: Mapping[str, dict[str, Any]]) -> None:
    """Gives every group the hyper-parameters its parameters were saved with."""
    for group in optimizer.param_groups:
        for k, v in next(iter(_saved_in(key, group, owners, saved)), ("", {}))[1].items():
            if isinstance(group.get(k), torch.Tensor):
                group[k].fill_(v)
            else:
                group[k] = v


def _saved_in(
    key: str, group: Mapping[str, Any], owners: Owners, saved: Mapping[str, dict[str, Any]]
) -> list[tuple[str, dict[str, Any]]]:
    names = [o.name for p in group["params"] for o in _owners(key, p, owners)]
    return [(n, saved[n]) for n in names if n in saved]


def new_state(p: torch.Tensor, owner: Owner, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An empty state tensor for a parameter that has none yet: placed like the parameter if it has its shape."""
    if owner.held is None and shape == tuple(p.shape):
        return torch.empty_like(p, dtype=dtype, requires_grad=False).detach()
    return torch.empty(shape, dtype=dtype)
