"""Runs every benchmark, or those named: `python -m benchmarks [save load ...] [--out DIR] [options]`."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from benchmarks.render import BENCHES

_SIZED = (
    "save",
    "load",
    "reshard",
    "memory",
    "stall",
    "loop",
    "durable",
    "restart",
    "rebuild",
    "average",
    "fold",
    "object_storage",
    "protect",
)
_STATEFUL = (*(b for b in _SIZED if b != "fold"), "flat")
_ON_RANKS = ("save", "load", "memory", "stall", "loop", "durable", "flat", "restart", "object_storage")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("benches", nargs="*", metavar="bench", help=f"of {', '.join(BENCHES)}; all by default")
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="directory for the JSON files")
    parser.add_argument("--dir", help="where to write; a fresh directory inside it is removed at the end")
    parser.add_argument("--rounds", help="measured rounds; one more warms up")
    parser.add_argument("--ranks", help="world sizes, such as 1,2,4")
    parser.add_argument("--gib", help="sizes of the state, such as 1.5,4")
    parser.add_argument("--only", help="contestants, such as ckpt,DCP; all by default")
    args = parser.parse_args()
    if unknown := set(args.benches) - set(BENCHES):
        parser.error(f"no benchmark called {', '.join(sorted(unknown))}; there are {', '.join(BENCHES)}")
    for bench in args.benches or BENCHES:
        options = ["--json", str(args.out / f"{bench}.json")]
        for name, applies in (
            ("dir", bench != "goodput"),
            ("rounds", bench not in ("flat", "goodput")),
            ("ranks", bench in _ON_RANKS),
            ("gib", bench in _SIZED),
            ("only", bench in _STATEFUL),
        ):
            if applies and getattr(args, name) is not None:
                options += [f"--{name}", getattr(args, name)]
        importlib.import_module(f"benchmarks.{bench}").main(options)


if __name__ == "__main__":
    main()
