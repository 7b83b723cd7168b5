"""Tables for the terminal and for the README, the machine they were measured on, and options that benchmarks share."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

__all__ = ["Table", "finish", "machine", "options", "ratio_cell", "spread", "verdict", "workspace"]

_PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "torch-checkpointing",
    "torchsnapshot-nightly",
    "crc32c",
    "ckpt-universal",
)


@dataclass
class Table:
    """Rows of text under a title, with remarks below."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        lines = [f"**{self.title}**", "", "| " + " | ".join(self.columns) + " |"]
        lines.append("|" + "|".join(["---"] + ["---:"] * (len(self.columns) - 1)) + "|")
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in self.rows]
        lines += ["", *(f"{note}  " for note in self.notes)]
        return "\n".join(lines).rstrip() + "\n"

    def show(self, console: Console) -> None:
        table = RichTable(title=self.title, title_justify="left", caption="\n".join(self.notes), caption_justify="left")
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="right" if number else "left", no_wrap=number > 0)
        for row in self.rows:
            table.add_row(*row)
        console.print(table)


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Median and range."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def ratio_cell(values: Sequence[float], asked: float | None = None) -> str:
    """The median ratio and its range; where something is asked of it, whether it holds."""
    if not values:
        return "-"
    return spread(values) + verdict(asked is not None and statistics.median(values) >= asked, asked is not None)


def verdict(holds: bool, asked: bool = True) -> str:
    """The mark behind a figure of which something is asked."""
    return "" if not asked else " ✓" if holds else " ✗"


def machine(path: Path) -> dict[str, Any]:
    """What the figures depend on: processor, memory, kernel, file system under `path`, versions."""
    cpu = next((v for k, v in _fields("/proc/cpuinfo") if k == "model name"), platform.processor())
    memory = next((v for k, v in _fields("/proc/meminfo") if k == "MemTotal"), "")
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cores": os.cpu_count(),
        "processor": cpu,
        "memory_gib": round(int(memory.split()[0]) / 2**20, 1) if memory else None,
        "kernel": platform.release(),
        "file_system": _file_system(path),
        "python": platform.python_version(),
        "versions": versions,
    }


def machine_line(info: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in info["versions"].items())
    return (
        f"{info['cores']} cores ({info['processor']}), {info['memory_gib']} GiB, Linux {info['kernel']}, "
        f"{info['file_system']}, Python {info['python']}, {versions}"
    )


def _fields(file: str) -> Iterator[tuple[str, str]]:
    with open(file) as f:
        for line in f:
            key, _, value = line.partition(":")
            yield key.strip(), value.strip()


def _file_system(path: Path) -> str:
    """The type of the mount that holds `path`."""
    best, kind = "", "unknown"
    with open("/proc/mounts") as f:
        for line in f:
            _, mount, this, *_ = line.split()
            if path.resolve().is_relative_to(mount) and len(mount) >= len(best):
                best, kind = mount, this
    return kind


def options(
    description: str, *, ranks: bool = True, state: bool = True, rounds: bool = True
) -> argparse.ArgumentParser:
    """The options that benchmarks share; one that chooses its ranks itself, or has no state, leaves some out."""
    parser = argparse.ArgumentParser(description=description.strip().partition("\n")[0])
    if ranks and state:
        parser.add_argument("--ranks", type=_whole, default=[1, 2, 4], help="world sizes, such as 1,2,4")
    if state:
        parser.add_argument("--gib", type=_reals, default=[1.5, 4.0], help="sizes of the state, such as 1.5,4")
        parser.add_argument("--only", type=lambda s: s.split(","), help="contestants, such as ckpt,DCP; all by default")
    if rounds:
        parser.add_argument("--rounds", type=int, default=6, help="measured rounds; one more warms up")
    parser.add_argument("--dir", type=Path, help="where to write; a fresh directory inside it is removed at the end")
    parser.add_argument("--json", type=Path, help="file for the raw numbers")
    return parser


def _whole(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _reals(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


@contextmanager
def workspace(parent: Path | None) -> Iterator[Path]:
    """A fresh directory on the disk under test, removed at the end."""
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix="ckpt-bench-", dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def finish(result: dict[str, Any], tables: Sequence[Table], file: Path | None) -> None:
    """Prints the tables and keeps the raw numbers."""
    console = Console() if Console().is_terminal else Console(width=150)
    for table in tables:
        table.show(console)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n")
