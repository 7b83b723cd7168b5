"""The verb that draws: report. It needs no torch."""

from __future__ import annotations

from pathlib import Path

import click

from ckpt.cli.shell import run_backend, verb
from ckpt.cli.show import count, emit, plain, size

__all__ = ["report"]


@verb("report")
@click.argument("run")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default="report.html",
    show_default=True,
    metavar="FILE",
    help="Where to write the page.",
)
@click.option(
    "--journal", multiple=True, metavar="FILE", help="Of a `ckpt search` among its steps: draw its scores too."
)
def report(run: str, out: Path, journal: tuple[str, ...], as_json: bool) -> int:
    """Draw what happened in a run, as one HTML page.

    Snapshots, saves, stalls, failures: from the events that a Checkpointer writes. Metrics, running averages, what combined
    checkpoints were made of and what searches scored: from the checkpoints. The page needs nothing but a browser.
    """
    from ckpt.catalog import list_run, with_ledger
    from ckpt.errors import NotFoundError
    from ckpt.events import read_events
    from ckpt.offline.report import gather
    from ckpt.offline.report_ledger import read_ledger
    from ckpt.offline.report_page import render
    from ckpt.offline.report_svg import clock, milliseconds, seconds

    backend = run_backend(run)
    listing = with_ledger(backend, list_run(backend))
    data = gather(read_events(backend), listing)
    ledger = read_ledger(backend, run, listing, journal)
    if not data.events and (data.passed_over or not ledger):
        spoilt = f"none of its {count(data.passed_over, 'event')} can be true" if data.passed_over else "no events here"
        raise NotFoundError(f"{listing.run}: {spoilt}; events are written by a Checkpointer while it trains")
    page = render(data, ledger).encode("utf-8", "replace")
    out.write_bytes(page)
    if as_json:
        emit({"out": str(out), **(plain(data.numbers) if data.events else {}), "averages": plain(ledger)})
        return 0
    if not data.events:
        click.echo(f"wrote {out} ({size(len(page))}): {count(len(data.commits), 'checkpoint')}, no events")
        return 0
    n = data.numbers
    lost = n.voided + n.failed_snapshots + n.failed_saves
    click.echo(f"wrote {out} ({size(len(page))})")
    click.echo(
        f"{count(n.steps, 'step')} on {count(n.ranks, 'rank')} in {clock(n.ended - n.began)}: {n.sealed} snapshots sealed,"
        f" {n.committed} saves committed, {n.skipped} skipped, {lost} voided or failed"
    )
    percent = f" ({n.stall_percent:.3g} % of the loop)" if n.stall_percent is not None else ""
    each = "" if n.stall_median_ms is None else f", {milliseconds(n.stall_median_ms / 1e3)} per snapshot"
    click.echo(f"stall {seconds(n.stall_seconds / n.ranks)} per rank{percent}{each}; {size(n.bytes_stored)} stored")
    return 0
