"""How the command line shows things: sizes, ages, columns, JSON, a progress bar. Plain text costs no imports."""

from __future__ import annotations

import datetime
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import click

from ckpt.errors import UsageError

__all__ = [
    "age",
    "columns",
    "count",
    "duration",
    "emit",
    "plain",
    "progress",
    "seconds_since",
    "shorten",
    "size",
    "size_of",
]

_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_BYTES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def size(nbytes: int) -> str:
    """1536 -> "1.5 KiB"."""
    if nbytes < 1024:
        return f"{nbytes} B"
    power = 1
    while nbytes / 1024**power >= 999.95 and power < len(_UNITS):
        power += 1
    return f"{nbytes / 1024**power:.1f} {_UNITS[power - 1]}"


def count(n: int, word: str) -> str:
    """1 -> "1 pack", 2 -> "2 packs"."""
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def size_of(text: str) -> int:
    """Bytes of "5GB", "512MiB", "1000". Raises UsageError."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if not found or found[2] not in _BYTES:
        raise UsageError(f"{text!r} is not a size; write it as 5GB or 512MiB")
    return int(float(found[1]) * _BYTES[found[2]])


def duration(text: str) -> float:
    """Seconds of "90s", "30m", "24h", "7d", "2w"; a bare number is seconds. Raises UsageError."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([smhdw]?)", text.strip().lower())
    if not found:
        raise UsageError(f"{text!r} is not a time; write it as 90s, 30m, 24h, 7d or 2w")
    return float(found[1]) * _SECONDS[found[2] or "s"]


def seconds_since(when: str) -> float | None:
    """Seconds from an ISO 8601 time to now; None if it is not one."""
    try:
        then = datetime.datetime.fromisoformat(when)
        return max(0.0, time.time() - then.timestamp())
    except (ValueError, OverflowError, OSError):
        return None


def age(seconds: float | None) -> str:
    """3700 -> "1 h"."""
    if seconds is None:
        return "?"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return f"{int(seconds)} s"


def shorten(text: str, width: int) -> str:
    """At most `width` characters, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: max(0, width - 1)] + "…"


def columns(head: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> str:
    """Aligned text. `right`: a letter for each column, ">" where it is to be flush right. The last one is not padded."""
    widths = [max([len(h), *(len(r[i]) for r in rows)]) for i, h in enumerate(head)]
    flush = [right[i : i + 1] == ">" for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [c.rjust(w) if f else c.ljust(w) for c, w, f in zip(row, widths, flush, strict=True)]
        return "  ".join(cells).rstrip()

    return "\n".join([click.style(line(head), bold=True), *(line(r) for r in rows)])


def plain(value: Any) -> Any:
    """A report as JSON knows it."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def emit(value: Any) -> None:
    """Prints one JSON document."""
    click.echo(json.dumps(plain(value), indent=2, ensure_ascii=False, default=str))


@contextmanager
def progress(title: str, total: int | None, *, show: bool) -> Iterator[Callable[[int], None] | None]:
    """A bar of bytes on standard error; gives what to call with each number of bytes done, None if nobody watches."""
    if not show or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    parts = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*parts, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda n: bar.update(task, advance=n)
