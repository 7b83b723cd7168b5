"""Training state -> named leaves, and back.

A state is a nested dict (or list) of modules, optimizers, `Stateful`s, tensors and values. Saving and loading walk
it in the same way: the names are the same on both sides, whatever the parallelism.

    <key>.<fqn>                          parameters and persistent buffers of a module, wrapper prefixes stripped
    <key>.state.<fqn>.<name>             state of an optimizer; hyper-parameters under <key>.groups
    <key>.<path>                         everything else
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from ckpt.errors import UsageError
from ckpt.objects import PerCoordinate, PerRank, Replicated, encode_object
from ckpt.optim import Owner, group_names, group_table, named_state
from ckpt.scopes import AUTO, RANK, REPLICATED, ObjectLeaf
from ckpt.shards import Held, Shard, hold, is_tensor, parts

__all__ = [
    "Leaves",
    "Stateful",
    "TensorLeaf",
    "collect",
    "collect_groups",
    "collect_value",
    "module_leaves",
    "owners_of",
    "walk",
]


@runtime_checkable
class Stateful(Protocol):
    """Anything with `state_dict()` and `load_state_dict()`; a class attribute `ckpt_scope = "rank"` makes it per rank."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


@dataclass(frozen=True)
class TensorLeaf:
    """One tensor under its name, as this rank holds it. `source` is what the state itself contains."""

    name: str
    held: Held


@dataclass
class Leaves:
    """Everything a state holds on this rank. `aliases`: further names of tensors that are stored under another."""

    tensors: dict[str, TensorLeaf] = field(default_factory=dict)
    objects: dict[str, ObjectLeaf] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)

    def add_tensor(self, name: str, value: Any) -> None:
        for inner_name, inner in parts(name, value) if not isinstance(value, Held) else ((name, value),):
            held = inner if isinstance(inner, Held) else hold(inner_name, inner)
            self._free(inner_name)
            self.tensors[inner_name] = TensorLeaf(inner_name, held)

    def add_object(self, name: str, value: Any, policy: str, tensor: Callable[[str, Any], bool] | None = None) -> None:
        self.add_encoded(name, policy, *encode_object(value, name, tensor))

    def add_encoded(self, name: str, policy: str, encoding: str, text: str) -> None:
        self._free(name)
        self.objects[name] = ObjectLeaf(name, policy, encoding, text)

    def _free(self, name: str) -> None:
        if name in self.tensors or name in self.objects or name in self.aliases:
            raise UsageError(
                f"two leaves of the state are both called {name!r}; rename one of the keys that lead there"
            )


def collect(state: Any) -> Leaves:
    """All leaves of a state on this rank, for a save. Raises UsageError or LayoutError, naming the leaf."""
    leaves = Leaves()
    owners = owners_of(state)
    for name, value, policy, _ in walk(state):
        if isinstance(value, nn.Module):
            _collect_module(leaves, name, value)
        elif isinstance(value, torch.optim.Optimizer):
            for leaf, part in named_state(name, value, owners):
                if isinstance(part, (torch.Tensor, Held)):
                    leaves.add_tensor(leaf, part)
                else:
                    leaves.add_object(leaf, part, AUTO)
            collect_groups(leaves, name, value, group_names(name, value, owners))
        else:
            collect_value(leaves, name, value, policy)
    return leaves


def collect_groups(leaves: Leaves, name: str, optimizer: torch.optim.Optimizer, names: Sequence[str]) -> None:
    """The hyper-parameters of an optimizer; `names`: of its parameters, as `group_names` tells them."""
    leaves.add_encoded(f"{name}.groups", AUTO, "json", group_table(name, optimizer, names))


def collect_value(leaves: Leaves, name: str, value: Any, policy: str) -> None:
    """A part that is neither a module nor an optimizer."""
    if is_tensor(value):
        _check_policy(name, policy)
        leaves.add_tensor(name, value)
    elif isinstance(value, Stateful):
        _collect_stateful(leaves, name, value, policy)
    else:
        leaves.add_object(name, value, policy)


Setter = Callable[[Any], None]


def walk(
    state: Any, path: str = "", policy: str = AUTO, setter: Setter | None = None
) -> Iterator[tuple[str, Any, str, Setter | None]]:
    """(name, value, policy, setter) of every part of a state that is saved as one thing."""
    if isinstance(state, (Replicated, PerRank, PerCoordinate)):
        inner = RANK if isinstance(state, PerRank) else REPLICATED if isinstance(state, Replicated) else state.scope
        rewrap: Setter | None = None
        if setter is not None:
            outer = setter

            def rewrap(value: Any, wrapper: Any = state) -> None:
                outer(type(wrapper)(value, *[getattr(wrapper, f) for f in ("mesh", "dims") if hasattr(wrapper, f)]))

        if _has_tensor(state.value) or isinstance(state.value, (nn.Module, torch.optim.Optimizer)):
            yield from walk(state.value, path, inner, rewrap)
        else:
            yield path, state.value, inner, rewrap
    elif isinstance(state, MutableMapping) and (not path or _holds_parts(state)):
        for key, value in state.items():
            if not isinstance(key, (str, int)) or not _join(path, key):
                raise UsageError(f"key {key!r} under {path or 'the state'}: use a name or a whole number")
            yield from walk(value, _join(path, key), policy, _into(state, key))
    elif isinstance(state, (list, tuple)) and _holds_parts(state):
        parent, content = (setter, list(state)) if isinstance(state, tuple) else (None, state)
        for i, value in enumerate(state):
            yield from walk(value, _join(path, i), policy, _into(content, i, parent, type(state)))
    elif not path:
        raise UsageError("a state is a dict such as {'model': model, 'optimizer': optimizer}")
    else:
        scope = getattr(state, "ckpt_scope", None)
        yield path, state, scope if scope and policy == AUTO else policy, setter


def _into(container: Any, key: Any, parent: Setter | None = None, kind: type = dict) -> Setter:
    """Puts a value where it was found. A tuple is made anew from `container`, a list, and put into its `parent`."""

    def put(value: Any) -> None:
        container[key] = value
        if parent is not None:
            parent(kind._make(container) if hasattr(kind, "_make") else kind(container))

    return put


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _holds_parts(value: Any) -> bool:
    """Whether a container is walked into (else it is stored as one value): all dicts with plain keys are, lists and
    tuples only if something below is more than a value."""
    if isinstance(value, MutableMapping):
        return all(isinstance(k, (str, int)) for k in value) and bool(value)
    if isinstance(value, (list, tuple)):
        return any(
            is_tensor(v)
            or isinstance(v, (nn.Module, torch.optim.Optimizer, Stateful, Replicated, PerRank, PerCoordinate))
            or (isinstance(v, (MutableMapping, list, tuple)) and _has_tensor(v))
            for v in value
        )
    return False


def _has_tensor(value: Any) -> bool:
    if isinstance(value, MutableMapping):
        return any(_has_tensor(v) for v in value.values())
    return _holds_parts(value) if isinstance(value, (list, tuple)) else is_tensor(value) or isinstance(value, Stateful)


_TRANSPARENT = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_DATA_PARALLEL = ("DistributedDataParallel", "DataParallel")


def _modules(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """(what its leaves' names begin with, module) of all below a module and itself, in the order of `named_modules`, without
    the segments that wrappers add."""
    out, todo = [], [("", module)]
    while todo:
        prefix, owner = todo.pop()
        out.append((prefix, owner))
        parallel = type(owner).__name__ in _DATA_PARALLEL
        for name, child in reversed(owner._modules.items()):
            if child is not None:
                hidden = name in _TRANSPARENT or (parallel and name == "module")
                todo.append((prefix if hidden else f"{prefix}{name}.", child))
    return out


def module_leaves(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, torch.Tensor | None]]:
    """(clean name, owner, attribute, tensor) of all parameters and persistent buffers, tied ones under every name;
    tensor None and attribute "_extra_state" where a module has extra state."""
    for prefix, owner in _modules(module):
        for name, p in owner._parameters.items():
            if p is not None:
                yield prefix + name, owner, name, p
        for name, b in owner._buffers.items():
            if b is not None and name not in owner._non_persistent_buffers_set:
                yield prefix + name, owner, name, b
        if type(owner).get_extra_state is not nn.Module.get_extra_state:
            yield f"{prefix}_extra_state", owner, "_extra_state", None


def _collect_module(leaves: Leaves, key: str, module: nn.Module) -> None:
    seen: dict[int, str] = {}
    flat = {id(p): owners for p, owners in _flat_parameters(module)}
    for name, owner, attribute, tensor in module_leaves(module):
        full = f"{key}.{name}"
        if tensor is None:
            _collect_stateful_value(leaves, full, owner.get_extra_state(), AUTO)
        elif id(tensor) in seen:
            if full not in leaves.tensors and full not in leaves.aliases:
                leaves.aliases[full] = seen[id(tensor)]
        elif id(tensor) in flat:
            seen[id(tensor)] = full
            for o in flat[id(tensor)]:
                leaves.add_tensor(f"{key}.{o.name}", o.held)
        elif attribute != "_flat_param":
            seen[id(tensor)] = full
            leaves.add_tensor(full, tensor)


def _collect_stateful(leaves: Leaves, key: str, value: Stateful, policy: str) -> None:
    """A state_dict: its tensors under their own names, each other entry as one value."""
    content = value.state_dict()
    if not isinstance(content, dict) or not all(isinstance(k, str) for k in content):
        _collect_stateful_value(leaves, key, content, policy)
        return
    for name, part in content.items():
        _collect_stateful_value(leaves, f"{key}.{name}", part, policy)


def _collect_stateful_value(leaves: Leaves, name: str, value: Any, policy: str) -> None:
    if is_tensor(value):
        _check_policy(name, policy)
        leaves.add_tensor(name, value)
        return

    def take(path: str, leaf: Any) -> bool:
        if is_tensor(leaf):
            _check_policy(path, policy)
            leaves.add_tensor(path, leaf)
        return is_tensor(leaf)

    leaves.add_object(name, value, policy, take)


def _check_policy(name: str, policy: str) -> None:
    """Tensors say by their placement, or by their content, what they share; a value's scope is not for them."""
    if policy not in (AUTO, RANK):
        raise UsageError(
            f"tensor {name!r} is wrapped in ckpt.Replicated or ckpt.PerCoordinate, which are for values; "
            "declare a tensor with ckpt.Shard, or make it a DTensor"
        )


def owners_of(state: Any) -> dict[int, tuple[Owner, ...]]:
    """id(parameter) -> who owns it, over all modules of a state. Names are relative to the module; where one
    optimizer could meet two modules (several modules share a name), they carry the module's key."""
    modules = [(name, value) for name, value, _, _ in walk(state) if isinstance(value, nn.Module)]
    clash = len(modules) > 1 and _share_names([module for _, module in modules])
    out: dict[int, tuple[Owner, ...]] = {}
    for key, module in modules:
        prefix = f"{key}." if clash else ""
        for p, owners in _flat_parameters(module):
            out[id(p)] = tuple(Owner(prefix + o.name, o.held, o.start, o.stop) for o in owners)
        for name, _, _, t in module_leaves(module):
            if isinstance(t, nn.Parameter) and id(t) not in out:
                out[id(t)] = (Owner(prefix + name),)
    return out


def _share_names(modules: list[nn.Module]) -> bool:
    names = [name for module in modules for name, _, _, t in module_leaves(module) if isinstance(t, nn.Parameter)]
    return len(set(names)) < len(names)


def _flat_parameters(module: nn.Module) -> Iterator[tuple[torch.Tensor, tuple[Owner, ...]]]:
    """FSDP1's flat parameters, as the pieces of the original ones that this rank holds: flat ranges, not gathered.

    Yields the flat parameter itself and, with use_orig_params=True, the local views that stand for each.
    """
    seen = set()
    for prefix, child in _modules(module):
        handle = child.__dict__.get("_handle") if id(child) not in seen else None
        seen.add(id(child))
        flat = getattr(handle, "flat_param", None)
        if handle is None or flat is None or not hasattr(flat, "_shard_param_infos"):
            continue
        local = flat._local_shard if hasattr(flat, "_local_shard") else flat.data
        owners, views = [], getattr(flat, "_params", None) or [None] * len(flat._fqns)
        for fqn, shape, info, view in zip(flat._fqns, flat._shapes, flat._shard_param_infos, views, strict=True):
            name = prefix + ".".join(s for s in fqn.split(".") if s not in _TRANSPARENT)
            if info.in_shard:
                lo, n = info.offset_in_shard, info.numel_in_shard
                ranges = (info.intra_param_start_idx, info.intra_param_end_idx + 1)
            else:
                lo, n, ranges = 0, 0, (0, 0)
            held = hold(name, Shard(local.detach()[lo : lo + n], tuple(shape), flat_range=ranges))
            owners.append(Owner(name, held, lo, lo + n))
            if view is not None:
                yield view, (Owner(name, held),)
        yield flat, tuple(owners)
