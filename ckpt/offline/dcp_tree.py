"""Nested state dicts as torch DCP names their leaves <-> as ckpt does. Pure functions; imports no torch.

Both join the keys that lead to a leaf with dots. They differ in what a leaf is: DCP walks into every list that holds
a dict, ckpt only into lists that hold a tensor somewhere; DCP drops empty dicts. So
`{"optim": {"param_groups": [{"lr": 0.1}]}}` is "optim.param_groups.0.lr" there and "optim.param_groups" here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

__all__ = [
    "PATHS",
    "Path",
    "build",
    "flatten",
    "group_leaves",
    "group_tables",
    "join",
    "optimizer_keys",
    "odd_paths",
    "param_groups",
    "path_of",
]

Path = tuple[str | int, ...]
PATHS = "__ckpt__.dcp_paths"
"""The object that holds, of a checkpoint written by DCP, what `path_of` must be told."""


def join(path: Path) -> str:
    return ".".join(map(str, path))


def flatten(value: Any, path: Path, is_tensor: Callable[[Any], bool]) -> Iterator[tuple[Path, Any]]:
    """(path, leaf) of a value that stands at `path`, cut into leaves as DCP does."""
    if isinstance(value, Mapping):
        for k, v in value.items():
            yield from flatten(v, (*path, str(k)), is_tensor)
    elif _walks_into(value, is_tensor):
        for i, v in enumerate(value):
            yield from flatten(v, (*path, i), is_tensor)
    else:
        yield path, value


def _walks_into(value: Any, is_tensor: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and any(
        is_tensor(v) or isinstance(v, Mapping) or _walks_into(v, is_tensor) for v in value
    )


def group_leaves(objects: Collection[str], paths: Mapping[str, Path]) -> dict[Path, list[tuple[str, Path]]]:
    """The leaves of a DCP state dict that are not tensors, by the path of the value that ckpt stores them in:
    [(name of the leaf, its path inside that value)]; the inner path is () for a leaf that is a value of its own.

    `paths` has all leaves, tensors too; leaves without a path are taken by their name.
    """
    with_tensor: set[Path] = set()
    for name, path in paths.items():
        if name not in objects:
            with_tensor.update(path[:i] for i in range(1, len(path)) if isinstance(path[i], int))
    out: dict[Path, list[tuple[str, Path]]] = {}
    for name in objects:
        path = paths.get(name, (name,))
        lists = (i for i in range(1, len(path)) if isinstance(path[i], int) and path[:i] not in with_tensor)
        cut = next(lists, len(path))
        out.setdefault(path[:cut], []).append((name, path[cut:]))
    return out


def build(leaves: Collection[tuple[Path, Any]]) -> Any:
    """The value whose leaves these are: lists where a path has numbers, dicts where it has names."""
    first = next(iter(leaves))
    if not first[0]:
        return first[1]
    below: dict[str | int, list[tuple[Path, Any]]] = {}
    for path, value in leaves:
        below.setdefault(path[0], []).append((path[1:], value))
    if isinstance(first[0][0], int):
        return [build(below[i]) if i in below else None for i in range(max(int(k) for k in below) + 1)]
    return {k: build(v) for k, v in below.items()}


def group_tables(values: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """`<key>.groups` for every optimizer state dict with parameters by name among the values, so that the checkpoint
    loads into the optimizer itself, too. Both of torch's forms count:

        <key>.param_groups               [{"params": [names], "lr": ...}, ...]
        <key>.param_groups.<name>.lr     (flatten_optimizer_state_dict=True)
    """
    out: dict[str, list[dict[str, Any]]] = {}
    flat: dict[str, dict[str, dict[str, Any]]] = {}
    for name, value in values.items():
        key, found, rest = name.rpartition(".param_groups")
        if found and not rest and key and isinstance(value, list):
            table = [_table_row(group) for group in value]
            if table and all(row is not None for row in table):
                out[f"{key}.groups"] = [row for row in table if row is not None]
            continue
        key, found, rest = name.partition(".param_groups.")
        param, dot, hyper = rest.rpartition(".")
        if found and dot and not param.isdecimal():
            flat.setdefault(key, {}).setdefault(param, {})[hyper] = value
    for key, params in flat.items():
        groups: list[dict[str, Any]] = []
        for param, row in params.items():
            same = next((g for g in groups if g["hyper"] == row), None)
            if same is None:
                groups.append({"params": [param], "hyper": row})
            else:
                same["params"].append(param)
        out.setdefault(f"{key}.groups", groups)
    return {name: table for name, table in out.items() if name not in values}


def _table_row(group: Any) -> dict[str, Any] | None:
    if not isinstance(group, Mapping) or not isinstance(group.get("params"), list):
        return None
    if not all(isinstance(p, str) for p in group["params"]):
        return None
    return {"params": list(group["params"]), "hyper": {k: v for k, v in group.items() if k != "params"}}


def optimizer_keys(objects: Collection[str]) -> list[str]:
    """Keys under which an optimizer was saved: those with a table of groups, or with DCP's param_groups."""
    keys = [n.removesuffix(".groups") for n in objects if n.endswith(".groups")]
    keys += [n.partition(".param_groups")[0] for n in objects if ".param_groups" in n]
    return list(dict.fromkeys(keys))


def param_groups(key: str, table: list[dict[str, Any]]) -> Iterator[tuple[str, Path, Any]]:
    """(name, path, value) of every leaf that DCP asks for where ckpt stored a table of groups: of the nested form,
    then of the flat one."""
    for i, group in enumerate(table):
        for name, value in {**group["hyper"], "params": group["params"]}.items():
            path: Path = (key, "param_groups", i, name)
            yield join(path), path, value
    for group in table:
        for param in group["params"]:
            for name, value in group["hyper"].items():
                path = (key, f"param_groups.{param}.{name}")
                yield join(path), path, value


def odd_paths(paths: Mapping[str, Path], optimizers: Collection[str]) -> dict[str, list[str | int]]:
    """What `path_of` must be told to find these paths again; mostly nothing. The entry "layers." says that all names
    that begin so are keys of the state dict itself, with the dots in them."""
    roots: dict[str, list[str]] = {}
    for name in paths:
        roots.setdefault(name.partition(".")[0], []).append(name)
    out: dict[str, list[str | int]] = {}
    for root, names in sorted(roots.items()):
        flat = all(paths[n] == (n,) for n in names)
        if flat and any("." in n for n in names):
            out[f"{root}."] = []
        elif not flat:
            out |= {n: list(paths[n]) for n in names if paths[n] != path_of(n, {}, optimizers)}
    return out


def path_of(name: str, odd: Mapping[str, list[str | int]], optimizers: Collection[str]) -> Path:
    """The path of a name. Of a checkpoint that DCP did not write only the dots are known: then it is that of
    `{"model": {"layers.0.weight": ...}}` or, for the state of an optimizer,
    `{"optim": {"state": {"layers.0.weight": {"exp_avg": ...}}}}`."""
    if name in odd:
        return tuple(odd[name])
    first, dot, rest = name.partition(".")
    if not dot or f"{first}." in odd:
        return (name,)
    for key in optimizers:
        param, found, state = name.removeprefix(f"{key}.state.").rpartition(".")
        if name.startswith(f"{key}.state.") and found:
            return key, "state", param, state
    return first, rest
