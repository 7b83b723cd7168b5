"""The verb that looks at memory: keepers. It needs no torch."""

from __future__ import annotations

import click

from ckpt.cli.shell import verb
from ckpt.cli.show import columns, count, emit, plain, size

__all__ = ["keepers"]


@verb("keepers")
def keepers(as_json: bool) -> int:
    """List the keepers of this host: the job of each, the steps it holds in memory, who is connected."""
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
            rows.append([str(k.pid), "", "", "", "", "", k.trouble])
            continue
        steps = ", ".join(
            f"{s.step}" if s.generation == k.steps[-1].generation else f"{s.step}.g{s.generation}" for s in k.steps
        )
        rows.append([str(k.pid), k.host, count(len(k.trainers or ()), "trainer"), steps or "none", size(sum(s.bytes for s in k.steps)), size(k.memory), k.run])  # fmt: skip
    click.echo(columns(("PID", "HOST", "CONNECTED", "STEPS", "PACKS", "MEMORY", "RUN"), rows, "><<<>><"))
    return 0
