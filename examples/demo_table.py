"""The one table: as words for any medium, and on the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from demo_hosts import Story
from demo_result import Row
from rich.console import Console
from rich.table import Table

COLUMNS = (
    "run",
    "world",
    "layout",
    "steps",
    "loss",
    "difference",
    "control",
    "save s",
    "load s",
    "GB/s",
    "of disk limit",
    "verdict",
)


def cells(row: Row) -> tuple[str, ...]:
    """One row of the table, as text."""
    steps = f"{row.losses[0][0]}-{row.losses[-1][0]}" if row.losses else "none"
    return (
        row.title,
        str(row.layout.world),
        row.layout.title,
        steps,
        f"{row.losses[-1][1]:.4f}" if row.losses else "",
        "" if row.difference is None else "0 (bitwise)" if row.difference == 0 else f"{row.difference:.1e}",
        "" if row.control is None else f"{row.control:.1e}",
        _number(row.save_seconds),
        _number(row.load_seconds),
        _number(row.save_rate, 1e9),
        "" if row.disk_ratio is None else f"{row.disk_ratio:.0%}",
        "pass" if row.ok else "FAIL",
    )


def _number(value: float | None, unit: float = 1.0) -> str:
    return "" if value is None else f"{value / unit:.2f}"


def notes(facts: dict[str, Any], rows: Sequence[Row]) -> list[str]:
    """What the columns mean, in the order in which one asks."""
    size = max((row.bytes for row in rows), default=0)
    disk = [d["rate"] for d in facts["disk"]]
    limit = f"{statistics.median(disk) / 1e9:.2f} GB/s" if disk else "not measured"
    return [
        "difference: the largest |loss - loss of the uninterrupted run| at any step of this run.",
        "control: the same, where the layout was changed in memory, without any checkpoint: summation order alone.",
        f"save s: storing the last step ({size / 1e6:.0f} MB), until it is committed; GB/s and the ratio are of this save.",
        "load s: opening the run and restoring it, from the page cache; bytes are checked on the way.",
        f"disk limit: {limit} (median): as many bytes written raw, with direct I/O and fsync, by two threads, before each run.",
    ]


def print_table(rows: Sequence[Row], facts: dict[str, Any], story: Story) -> None:
    """Rows, every check that failed, what the columns mean, and the verdict."""
    console = Console(width=None if Console().is_terminal else 170)
    table = Table(title="one checkpoint, every layout")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("run", "layout", "verdict") else "right")
    for row in rows:
        table.add_row(*cells(row), style=None if row.ok else "red")
    console.print(table)
    for line in notes(facts, rows):
        console.print(f"  {line}", style="dim", highlight=False, soft_wrap=True)
    console.print(f"six hosts ({story.how}), group 4+2, two of them lost", style="bold", highlight=False)
    for seconds, text in story.timeline:
        console.print(f"  {seconds:7.2f} s  {text}", highlight=False, soft_wrap=True)
    for name, checks in [*((row.name, row.checks) for row in rows), ("hosts", story.checks)]:
        for check in checks:
            mark = "[green]ok  [/]" if check.ok else "[bold red]FAIL[/]"
            detail = f" ({check.detail})" if check.detail else ""
            console.print(f"  {mark} {name}: {check.name}{detail}", highlight=False, soft_wrap=True)
    found = [check.ok for part in (*rows, story) for check in part.checks]
    count, failed = len(found), found.count(False)
    verdict = f"all {count} checks passed" if not failed else f"{failed} of {count} checks FAILED"
    console.print(f"{verdict} in {facts['seconds']:.0f} s", style="bold green" if not failed else "bold red")
