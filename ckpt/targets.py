"""State + manifest -> what to read, where to, and what to do afterwards: one rank's side of a load, before any byte
is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ckpt.collective import Group
from ckpt.errors import FormatError, MismatchError
from ckpt.format.manifest import Manifest, ObjectEntry
from ckpt.objects import decode_object
from ckpt.optim import Owner, for_owner, group_clashes, group_hyper, new_state, regroup
from ckpt.options import LoadOptions, matches
from ckpt.scopes import AUTO
from ckpt.shards import Held, hold, is_tensor, is_wrapped, parts
from ckpt.state import Stateful, module_leaves, owners_of, walk

__all__ = ["LoadOptions", "Matching", "Wanted", "matches"]


class Wanted(NamedTuple):
    """A tensor to load: where from (index in the manifest) and where to."""

    tensor: int
    held: Held


class Matching:
    """One rank's walk over a state for a load: collects what to read and what to do before and after. It changes
    nothing, except that meta tensors which the checkpoint holds get memory."""

    def __init__(self, manifest: Manifest, options: LoadOptions, group: Group) -> None:
        self.manifest, self.options, self.group = manifest, options, group
        self.tensors: dict[str, Wanted] = {}
        self.used_objects: set[str] = set()
        self.strict: set[str] = set()
        self.remarks: list[str] = []
        self.elsewhere: dict[str, list[str]] = {}  # variant taken in place of this rank's own -> names
        self.tolerated: list[str] = []
        self.problems: dict[str, list[str]] = {}
        self.begin: list[Callable[[], None]] = []  # once all ranks agreed, before anything is read
        self.finish: list[Callable[[], None]] = []
        self._made: dict[tuple[int, str], torch.Tensor] = {}
        self._new: dict[str, torch.Tensor] = {}
        self._objects: dict[str, list[ObjectEntry]] = {}
        for o in manifest.objects:
            self._objects.setdefault(o.name, []).append(o)

    def letter(self) -> bytes:
        used = np.zeros(len(self.manifest.tensors), dtype=bool)
        used[[w.tensor for w in self.tensors.values()]] = True
        head = json.dumps(
            {
                "problems": self.problems,
                "objects": sorted(self.used_objects),
                "strict": sorted(self.strict),
                "bytes": sum([view.nbytes for w in self.tensors.values() for _, view in w.held.pieces]),
            }
        ).encode()
        return len(head).to_bytes(8, "little") + head + np.packbits(used).tobytes()

    # What is stored, as this rank sees it.

    def _find(self, name: str) -> int | None:
        m = self.manifest
        found = m.by_key.get(name)
        if found is not None:
            return found
        stored = name if name in m.has_variants else m.aliases.get(name, name)
        found = m.by_key.get(stored)
        if found is None and stored in m.has_variants:
            return m.by_key[f"{stored}@{self._variant(stored, m.has_variants[stored])}"]
        return found

    def _variant(self, name: str, variants: Sequence[str]) -> str:
        """Which of several per-rank values is this rank's."""
        rank = self.group.rank % max(1, self.manifest.world)
        mine = f"rank={rank}" if f"rank={rank}" in variants else sorted(variants, key=_rank_of)[rank % len(variants)]
        if self.manifest.world != self.group.world or mine != f"rank={self.group.rank}":
            self.elsewhere.setdefault(mine, []).append(name)
        return mine

    @property
    def notes(self) -> list[str]:
        """What the user should know, a sentence each."""
        return [
            f"{', '.join(map(repr, names[:8]))}{' and more' if len(names) > 8 else ''}: stored per rank for "
            f"{self.manifest.world} ranks; rank {self.group.rank} of {self.group.world} takes the value of {mine}"
            for mine, names in self.elsewhere.items()
        ] + self.remarks

    def _object(self, name: str, policy: str = AUTO) -> ObjectEntry | None:
        entries = self._objects.get(name)
        if not entries:
            return None
        self.used_objects.add(name)
        if len(entries) == 1 and entries[0].scope == "replicated":
            return entries[0]
        by_scope = {e.scope: e for e in entries}
        if "=" in policy and not policy.startswith("rank="):
            if policy not in by_scope:
                self._problem(
                    "no value for this mesh coordinate", f"{name} at {policy} (stored: {', '.join(sorted(by_scope))})"
                )
            return by_scope.get(policy)
        return by_scope[self._variant(name, list(by_scope))]

    def _decode(self, entry: ObjectEntry, tensor: Callable[[str], Any] | None = None) -> Any:
        return decode_object(
            entry.encoding, entry.value, f"object {entry.name!r}", allow_pickle=self.options.allow_pickle, tensor=tensor
        )

    def _problem(self, kind: str, what: str) -> None:
        self.problems.setdefault(kind, []).append(what)

    def _missing(self, name: str) -> None:
        if matches(name, self.options.allow_missing):
            self.tolerated.append(name)
        else:
            self._problem("missing from the checkpoint", name)

    # The walk.

    def visit(self, state: Any) -> None:
        for key, value, _, _ in walk(state):
            if isinstance(value, nn.Module):
                self._give_memory(key, value)
        owners = owners_of(state)
        for name, value, policy, setter in walk(state):
            if isinstance(value, nn.Module):
                self._module(name, value, owners)
            elif isinstance(value, torch.optim.Optimizer):
                self._optimizer(name, value, owners)
            elif is_tensor(value):
                self._tensor(name, value)
            elif isinstance(value, Stateful):
                self._stateful(name, value, policy)
            elif setter is not None and self.options.wants(name):
                entry = self._object(self.options.stored_name(name), policy)
                if entry is None:
                    self._missing(name)
                else:
                    self._later(setter, entry)

    def _give_memory(self, key: str, module: nn.Module) -> None:
        """Gives CPU memory to what a module has on the meta device and the checkpoint holds. The tensors keep their
        identity, so optimizers that hold them still do. Buffers that are never stored are named in the error."""
        for owner in module.modules():
            for name, buffer in owner._buffers.items():
                if buffer is not None and buffer.is_meta and name in owner._non_persistent_buffers_set:
                    raise MismatchError(
                        f"buffer {name!r} is on the meta device but not part of the state; initialise it before loading"
                    )
        for name, _, _, tensor in module_leaves(module):
            full = f"{key}.{name}"
            if tensor is None or not tensor.is_meta or not self.options.wants(full):
                continue
            if self._find(self.options.stored_name(full)) is not None:
                new = torch.empty_like(tensor, device="cpu")
                new = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
                torch.utils.swap_tensors(tensor, new)  # type: ignore[no-untyped-call]

    def _later(self, setter: Callable[[Any], None], entry: ObjectEntry) -> None:
        value = self._decode(entry, self._fresh if '"$":"tensor"' in entry.value else None)
        self.finish.append(lambda: setter(value))

    def _tensor(self, name: str, value: Any) -> None:
        if isinstance(value, Held) or not is_wrapped(value):
            self._whole_tensor(name, value)
            return
        for inner_name, inner in parts(name, value):
            self._whole_tensor(inner_name, inner)

    def _whole_tensor(self, name: str, value: Any) -> None:
        if not self.options.wants(name):
            return
        stored = self.options.stored_name(name) if self.options.rename else name
        index = self._find(stored)
        if index is None:
            self._missing(name)
            return
        if isinstance(value, torch.Tensor) and (value.is_conj() or value.is_neg()):
            self._problem("not in memory as they are", f"{name} (a conjugate or negative view)")
            return
        held = value if isinstance(value, Held) else hold(name, value)
        spec = self.manifest.tensors[index]
        if spec.shape != held.shape:
            self._problem("of another shape", f"{name} (state {list(held.shape)}, checkpoint {list(spec.shape)})")
        elif spec.dtype != held.dtype and not self.options.cast:
            self._problem("of another dtype", f"{name} (state {held.dtype}, checkpoint {spec.dtype})")
        else:
            self.manifest.check_coverage(index)
            self.tensors[name] = Wanted(index, held)

    def _fresh(self, stored_name: str) -> torch.Tensor:
        """A new tensor for a stored one that the state has no place for (inside a value)."""
        if stored_name in self._new:
            return self._new[stored_name]
        index = self._find(stored_name)
        if index is None:
            raise MismatchError(f"the checkpoint speaks of tensor {stored_name!r} but does not hold it")
        spec = self.manifest.tensors[index]
        self.manifest.check_coverage(index)
        try:
            tensor = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
        except RuntimeError as e:
            raise FormatError(f"tensor {stored_name!r} of {spec.nbytes} bytes does not fit into memory ({e})") from None
        self._new[stored_name] = tensor
        self.tensors[f"{stored_name} (new)"] = Wanted(index, hold(stored_name, tensor))
        return tensor

    def _module(self, key: str, module: nn.Module, owners: Mapping[int, tuple[Owner, ...]]) -> None:
        self.strict.add(self.options.stored_name(key))
        seen: dict[int, str] = {}
        for name, owner, attribute, tensor in module_leaves(module):
            full = f"{key}.{name}"
            if tensor is None:
                self._value(full, owner.set_extra_state)
            elif id(tensor) in seen:
                self._tied(full, tensor, seen[id(tensor)])
            elif id(tensor) in owners and owners[id(tensor)][0].held is not None:
                seen[id(tensor)] = full
                for o in owners[id(tensor)]:
                    self._tensor(f"{key}.{o.name}", o.held)
            elif attribute != "_flat_param":
                seen[id(tensor)] = full
                self._tensor(full, tensor)

    def _tied(self, name: str, tensor: torch.Tensor, first: str) -> None:
        """A further name of a tensor: used up, and loaded under it if the checkpoint lacks the first one."""
        index = self._find(self.options.stored_name(name))
        if index is None:
            return
        missing = self.problems.get("missing from the checkpoint", [])
        if first in missing:
            missing.remove(first)
            if not missing:
                del self.problems["missing from the checkpoint"]
            self._tensor(name, tensor)
        elif first in self.tensors and self.tensors[first].tensor != index:
            self.remarks.append(f"{name!r} is tied to {first!r} in the state but stored apart; {first!r} was taken")
            self.tensors[f"{name} (tied)"] = Wanted(index, Held("", (), (), ""))
        elif first not in self.tensors:
            self._tensor(name, tensor)

    def _value(self, name: str, setter: Callable[[Any], None]) -> None:
        """One value of a `Stateful`, with the tensors inside it."""
        if not self.options.wants(name):
            return
        entry = self._object(self.options.stored_name(name))
        if entry is None:
            self._missing(name)
            return
        self._later(setter, entry)

    def _optimizer(self, key: str, optimizer: torch.optim.Optimizer, owners: Mapping[int, tuple[Owner, ...]]) -> None:
        """Parameters that were saved without state end without state: an optimizer before its first step, or a
        parameter that never had a gradient, resumes as it was."""
        stored = self.options.stored_name(key)
        states = self._state_names(stored)
        wanted, saved_as = [], {}
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            for owner in owners.get(id(p), ()):
                prefix = f"{key}.state.{owner.name}"
                saved = self.options.stored_name(prefix).removeprefix(f"{stored}.state.")
                names = states.get(saved, {})
                saved_as[owner.name] = saved
                all_names = (f"{prefix}.{n}" for n in (*names, *optimizer.state.get(p, ())))
                if self.options.wants(prefix) or any(self.options.wants(n) for n in all_names):
                    wanted.append((p, owner, saved, names))
        wants_groups = self.options.wants(f"{key}.groups")
        if not wanted and not wants_groups:
            return
        self.strict.add(stored)
        tables = [self._decode(e) for e in self._objects.get(f"{stored}.groups", [])]
        if not tables:
            self._missing(f"{key}.groups")
            return
        self.used_objects.add(f"{stored}.groups")
        hyper = group_hyper(tables)
        with_state = {id(p) for p, _, _, names in wanted if names}
        for p, owner, saved, names in wanted:
            if saved not in hyper:
                self._missing(f"{key}.state.{owner.name}")
            elif names:
                self._parameter_state(key, optimizer, p, owner, names)
            elif id(p) not in with_state:
                self.finish.append(lambda p=p: optimizer.state.pop(p, None) and None)  # type: ignore[misc]
        if wants_groups:
            here = {name: hyper[saved] for name, saved in saved_as.items() if saved in hyper}
            for problem in group_clashes(key, optimizer, owners, here):
                self._problem("of groups that cannot be joined", problem)
            self.finish.append(lambda: regroup(key, optimizer, owners, here))

    def _state_names(self, stored: str) -> dict[str, dict[str, str]]:
        """Parameter -> {state name: stored leaf}, for one optimizer."""
        prefix = f"{stored}.state."
        names = [t.name for t in self.manifest.tensors] + [o.name for o in self.manifest.objects]
        out: dict[str, dict[str, str]] = {}
        for name in names:
            if name.startswith(prefix):
                param, _, state = name[len(prefix) :].rpartition(".")
                out.setdefault(param, {})[state] = name
        return out

    def _parameter_state(
        self, key: str, optimizer: torch.optim.Optimizer, p: torch.Tensor, owner: Owner, names: Mapping[str, str]
    ) -> None:
        """The state of one parameter. What it lacks is made, and given to the optimizer once all ranks agreed."""
        prefix = f"{key}.state.{owner.name}"
        state = optimizer.state.get(p, {})
        if owner.held is not None and not owner.held.pieces and not state:
            return  # a flat parameter of which nothing is here
        for name in state:
            if name not in names and is_tensor(state[name]):
                self._missing(f"{prefix}.{name}")
        for name, leaf in sorted(names.items()):
            index = self._find(leaf)
            if index is None:
                entry = self._object(leaf)
                if entry is not None and self.options.wants(f"{prefix}.{name}"):
                    value = self._decode(entry)
                    self.finish.append(lambda n=name, v=value: optimizer.state[p].__setitem__(n, v))  # type: ignore[misc]
                continue
            tensor = state.get(name)
            if not isinstance(tensor, torch.Tensor):
                tensor = self._made.get((id(p), name))
            if tensor is None:
                spec = self.manifest.tensors[index]
                flat = owner.held is not None and spec.shape == owner.held.shape
                tensor = new_state(p, owner, tuple(p.shape) if flat else spec.shape, getattr(torch, spec.dtype))
                self._made[id(p), name] = tensor
                self.begin.append(lambda n=name, t=tensor: optimizer.state[p].__setitem__(n, t))  # type: ignore[misc]
            self._tensor(f"{prefix}.{name}", for_owner(owner, f"{prefix}.{name}", p, tensor))

    def _stateful(self, key: str, value: Stateful, policy: str) -> None:
        """Rebuilds the state_dict that was saved: tensors into the target's own where they fit, values decoded."""
        stored = self.options.stored_name(key)
        below = [p for p in self.options.only or () if p.startswith(f"{key}.")]
        if not self.options.wants(key) and not below:
            return
        whole = self._object(stored, policy) if self.options.wants(key) else None
        if whole is not None:
            content = self._decode(whole, self._fresh)
            self.finish.append(lambda: value.load_state_dict(content))
            return
        mine = value.state_dict()
        out: dict[str, Any] = {}
        prefix = f"{stored}."
        inner = [f"{e.name}." for e in self.manifest.objects if e.name.startswith(prefix) and '"$":"tensor"' in e.value]
        for name in sorted({e.name for e in self.manifest.objects if e.name.startswith(prefix)}):
            if not self.options.wants(f"{key}.{name[len(prefix) :]}"):
                continue
            entry = self._object(name, policy)
            if entry is not None:
                out[name[len(prefix) :]] = self._decode(entry, self._fresh)
        own = {k: v for k, v in mine.items() if is_tensor(v)}
        for name, tensor in own.items():
            self._tensor(f"{key}.{name}", tensor)
            out[name] = tensor
        stored_tensors = dict.fromkeys(t.name for t in self.manifest.tensors if t.name.startswith(prefix))
        extra = [n for n in stored_tensors if n[len(prefix) :] not in out and not any(n.startswith(i) for i in inner)]
        extra = [n for n in extra if self.options.wants(f"{key}.{n[len(prefix) :]}")]
        if own and extra:  # the tensors of other pipeline stages, or what this object no longer has
            self.remarks.append(f"{key!r} has no place for {', '.join(extra[:8])}: not loaded")
        for name in () if own else extra:
            out[name[len(prefix) :]] = self._fresh(name)
        for name in mine:
            if name not in out and name not in own:
                if self.options.wants(f"{key}.{name}"):
                    self._missing(f"{key}.{name}")
                out[name] = mine[name]
        if not out and not mine:
            return
        ordered = {k: out[k] for k in [*(k for k in mine if k in out), *(k for k in out if k not in mine)]}
        self.finish.append(lambda: value.load_state_dict(ordered))


def _rank_of(variant: str) -> int:
    digits = variant.removeprefix("rank=")
    return int(digits) if digits.isdecimal() else 0
