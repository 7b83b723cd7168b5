"""The verb inspect: what one checkpoint holds. Needs no torch; values are shown as they are stored, never unpickled."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ckpt.cli.shell import verb
from ckpt.cli.show import age, columns, count, emit, seconds_since, shorten, size

if TYPE_CHECKING:
    from ckpt.format.manifest import Manifest

__all__ = ["inspect"]

_ROWS = 40  # of tensors and of objects that are shown unless all are asked for


@verb("inspect")
@click.argument("ref")
@click.option("--tensors", "globs", multiple=True, metavar="GLOB", help="Only tensors of these names, all of them.")
@click.option("--objects", is_flag=True, help="All values that are not tensors.")
@click.option("--packs", is_flag=True, help="The files.")
@click.option("--layout", is_flag=True, help="Where each tensor's fragments lie, and how it was cut in training.")
def inspect(ref: str, globs: tuple[str, ...], objects: bool, packs: bool, layout: bool, as_json: bool) -> int:
    """Show what a checkpoint holds.

    Where it comes from, its tensors, values and files. Pickled values are not unpickled.
    """
    from ckpt.catalog import list_run
    from ckpt.checkpoint import open_checkpoint

    with open_checkpoint(ref) as c:
        m = c.manifest
        parents = _parents(list_run(c.backend, commits=False).generations, c.commit.generation)
        tensors = [_tensor(m, t, layout) for t, s in enumerate(m.tensors) if not globs or _any(s.key, globs)]
        about: dict[str, Any] = {
            "ref": c.ref,
            "step": c.step,
            "generation": c.commit.generation,
            "parents": parents,
            "time": c.commit.time,
            "metrics": dict(c.metrics),
            "world": c.commit.world,
            "bytes": c.commit.bytes,
            "tensor_bytes": m.nbytes,
            "writer": c.commit.writer,
        }
        values = [{"name": o.name, "scope": o.scope, "encoding": o.encoding, "value": o.value} for o in m.objects]
        files = [_pack(m, p) for p in range(len(m.packs))]
        aliases = dict(m.aliases)
        codecs = [k.config for k in m.codecs]
    if as_json:
        emit(about | {"tensors": tensors, "aliases": aliases, "objects": values, "packs": files, "codecs": codecs})
        return 0
    came = "".join(f", from {p}" for p in parents)
    metrics = "  ".join(f"{k}={v:.6g}" for k, v in about["metrics"].items())
    lines = [
        ("ref", about["ref"]),
        ("step", f"{about['step']}, generation {about['generation']}{came}"),
        ("time", f"{about['time']} ({age(seconds_since(about['time']))} ago)"),
        ("metrics", metrics or "none"),
        ("world", f"{count(about['world'], 'rank')}, {count(len(files), 'pack')}, {size(about['bytes'])} stored"),
        ("tensors", f"{len(m.tensors)}, {size(about['tensor_bytes'])}, {count(len(m.pack), 'fragment')}"),
        ("objects", str(len(values))),
        *[("alias", f"{name} is {target}") for name, target in aliases.items()],
        *[("codec", text) for text in codecs],
    ]
    click.echo("\n".join(f"{click.style(k.ljust(8), bold=True)} {v}" for k, v in lines))
    asked = bool(globs or objects or packs or layout)
    if globs or layout or not asked:
        _show_tensors(tensors if asked else tensors[:_ROWS], len(tensors), layout)
    if objects or not asked:
        shown = values if objects else values[:_ROWS]
        rows = [[str(o["name"]), str(o["scope"]), shorten(_readable(o), 90)] for o in shown]
        _section(("OBJECT", "SCOPE", "VALUE"), rows, "", len(values) - len(rows), "--objects")
    if packs:
        keys = ("path", "bytes", "fragments", "blocks", "data_start")
        rows = [[str(f["path"]), size(f["bytes"]), *(str(f[k]) for k in keys[2:])] for f in files]
        _section(("PACK", "BYTES", "FRAGMENTS", "BLOCKS", "DATA AT"), rows, "<>>>>", 0, "")
    return 0


def _any(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, g) for g in globs)


def _parents(generations: Sequence[Any], number: int) -> list[str]:
    """The step folders that a generation came from, the nearest first."""
    known = {g.generation: g.parent for g in generations}
    out: list[str] = []
    while known.get(number):
        out.append(str(known[number]))
        above = int(out[-1].rpartition(".g")[2])
        if above >= number:
            break
        number = above
    return out


def _tensor(m: Manifest, t: int, layout: bool) -> dict[str, Any]:
    spec = m.tensors[t]
    rows = range(int(m.start[t]), int(m.start[t + 1]))
    stored = int(m.length[rows.start : rows.stop].sum())
    out: dict[str, Any] = {"name": spec.key, "dtype": spec.dtype, "shape": list(spec.shape)}
    out |= {"fragments": len(rows), "bytes": spec.nbytes, "stored_bytes": stored}
    if layout:
        boxes = m.boxes(t).tolist()
        out["layout"] = spec.layout
        out["pieces"] = [
            {
                "pack": m.pack_path(int(m.pack[r])),
                "offset": int(m.offset[r]),
                "length": int(m.length[r]),
                "box": [[a, a + n] for a, n in zip(*box, strict=True)],
                "codec": None if m.codec is None or not m.codec[r] else m.codecs[int(m.codec[r]) - 1].config,
            }
            for r, box in zip(rows, boxes, strict=True)
        ]
    return out


def _pack(m: Manifest, p: int) -> dict[str, Any]:
    return {
        "path": m.pack_path(p),
        "bytes": int(m.packs.size[p]),
        "fragments": int((m.pack == p).sum()),
        "blocks": int(m.packs.blocks[p]),
        "data_start": int(m.packs.data_start[p]),
    }


def _readable(o: dict[str, Any]) -> str:
    return str(o["value"]) if o["encoding"] == "json" else f"(pickle, {len(o['value'])} characters)"


def _show_tensors(tensors: Sequence[dict[str, Any]], total: int, layout: bool) -> None:
    rows = []
    for t in tensors:
        rows.append([t["name"], t["dtype"], str(t["shape"]), str(t["fragments"]), size(t["bytes"])])
        for p in t.get("pieces", ()):
            box = "[" + ",".join(f"{a}:{b}" for a, b in p["box"]) + "]"
            where = f"{p['pack']} at {p['offset']}" + (f", {p['codec']}" if p["codec"] else "")
            rows.append([f"  {where}", "", box, "", size(p["length"])])
        if layout and t["layout"]:
            rows.append([f"  layout {t['layout']}", "", "", "", ""])
    _section(("TENSOR", "DTYPE", "SHAPE", "FRAGMENTS", "BYTES"), rows, "<<<>>", total - len(tensors), "--tensors '*'")


def _section(head: Sequence[str], rows: Sequence[Sequence[str]], right: str, hidden: int, option: str) -> None:
    if rows:
        click.echo("\n" + columns(head, rows, right))
    if hidden:
        click.echo(f"and {hidden} more: {option}")
