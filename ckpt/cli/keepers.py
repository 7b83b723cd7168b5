"""The verb that looks at memory: keepers. It needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from ckpt.cli.shell import verb
from ckpt.cli.show import columns, count, emit, plain, size

if TYPE_CHECKING:
    from ckpt.keeper.view import KeeperView

__all__ = ["keepers"]


@verb("keepers")
def keepers(as_json: bool) -> int:
    """List the keepers of this host: the job of each, the steps it holds in memory, who is connected, what protects them."""
    from ckpt.keeper.view import keepers_here

    found = keepers_here()
    if as_json:
        emit({"keepers": plain(found)})
        return 0
    if not found:
        click.echo("no keeper runs on this host")
        return 0
    rows = []
    for k in found:
        if k.trouble:
            rows.append([str(k.pid), "", "", "", "", "", "", "", k.trouble])
            continue
        steps = ", ".join(map(_step(k), [(s.generation, s.step) for s in k.steps]))
        protected = _step(k)(k.announced) if k.announced is not None else ""
        memory = size(k.memory + k.parity)
        rows.append([str(k.pid), k.host, count(len(k.trainers or ()), "trainer"), steps or "none", size(sum(s.bytes for s in k.steps)), memory, protected, _group(k), k.run])  # fmt: skip
    head = ("PID", "HOST", "CONNECTED", "STEPS", "PACKS", "MEMORY", "PROTECTED", "GROUP", "RUN")
    click.echo(columns(head, rows, "><<<>><<<"))
    for k in found:
        if k.lost:
            click.echo(f"{k.run}: the keepers of {', '.join(k.lost)} do not answer", err=True)
    return 0


def _step(k: KeeperView) -> Callable[[tuple[int, int]], str]:
    """A step, with its generation where that is not the newest one's."""
    newest = max([s.generation for s in k.steps], default=0)
    return lambda key: str(key[1]) if key[0] == newest else f"{key[1]}.g{key[0]}"


def _group(k: KeeperView) -> str:
    """Its hosts, and how many of them may be lost."""
    if not k.group:
        return ""
    hosts = ",".join(k.group[:8]) + (f",... {len(k.group)} in all" if len(k.group) > 8 else "")
    return f"{hosts} ({k.code[0]}+{k.code[1]})"
