"""The tables of earlier runs, as Markdown: `python -m benchmarks.render FILE...` prints what the README shows."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import Table, machine_line

__all__ = ["render", "tables"]

BENCHES = (
    "save",
    "load",
    "reshard",
    "memory",
    "scale",
    "stall",
    "loop",
    "durable",
    "flat",
    "restart",
    "rebuild",
    "average",
    "fold",
    "search",
    "object_storage",
    "erasure",
    "protect",
    "goodput",
)


def tables(result: dict[str, Any]) -> list[Table]:
    """The tables of one JSON file, made by the benchmark that wrote it."""
    if result["bench"] not in BENCHES:
        raise ValueError(f"unknown benchmark {result['bench']!r}")
    made: list[Table] = importlib.import_module(f"benchmarks.{result['bench']}").tables(result)
    return made


def render(results: Sequence[dict[str, Any]]) -> str:
    """Markdown of several results; each machine is named once, above the tables measured on it."""
    out, last = [], None
    for result in results:
        line = machine_line(result["machine"])
        if line != last:
            out.append(f"Measured on: {line}.\n")
            last = line
        out += [table.markdown() for table in tables(result)]
    return "\n".join(out)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("files", nargs="+", type=Path, help="JSON files of benchmarks")
    args = parser.parse_args(argv)
    print(render([json.loads(file.read_text()) for file in args.files]), end="")


if __name__ == "__main__":
    main()
