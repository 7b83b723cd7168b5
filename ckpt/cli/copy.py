"""The verb that copies: cp."""

from __future__ import annotations

import click

from ckpt.cli.shell import verb
from ckpt.cli.show import columns, count, emit, plain, progress, size
from ckpt.errors import UsageError

__all__ = ["cp"]


@verb("cp")
@click.argument("src")
@click.argument("dst")
@click.option("--mirror", is_flag=True, help="Also delete committed steps of DST that the run SRC does not have.")
@click.option("--dry-run", is_flag=True, help="Only say what would be copied and deleted.")
@click.option("--yes", is_flag=True, help="Delete without asking.")
def cp(src: str, dst: str, mirror: bool, dry_run: bool, yes: bool, as_json: bool) -> int:
    """Copy a run, or one step of it, to another store.

    SRC is a ref: a run is copied whole, with its generations and metrics; anything else is one step. DST is a run. What
    is there already and intact is not sent again, so a copy that was interrupted goes on. Every byte is read back before
    a step is committed in DST.
    """
    from ckpt.offline.copy import copy, plan_copy

    plan = plan_copy(src, dst, mirror=mirror)
    if plan.removed and not (dry_run or yes):
        raise UsageError(
            f"{count(len(plan.removed), 'step')} of {plan.target} would be deleted, {plan.removed[0]} the first; to do so "
            "say --yes, to see them --dry-run"
        )
    done = plan
    if not dry_run:
        with progress("copying", plan.bytes, show=not as_json) as tell:
            done = copy(src, dst, mirror=mirror, progress=tell)
    if as_json:
        emit({"dry_run": dry_run, **plain(done)})
        return 0
    rows = [[f, "copied"] for f in done.copied] + [[f, "deleted"] for f in done.removed]
    if rows:
        click.echo(columns(("STEP", "WOULD BE" if dry_run else "WAS"), rows, "<<"))
    text = f"{done.source} -> {done.target}: {count(len(done.copied), 'step')}, {size(done.bytes)}"
    click.echo(f"{text}; {len(done.present)} were there" + ("" if dry_run else f"; {done.seconds:.1f} s"))
    return 0
