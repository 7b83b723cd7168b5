"""Many more random schedules of protection and recovery than a run of the tests can afford: `make nightly`.

Others every day: seeds are drawn from the date. One that fails is named with what repeats it, and ends with status 1.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "property"))

from test_guard import schedules
from test_recovery import recoveries

DAY = 10_000_000
"""Seeds of a day, so that no two days share one; those of `make test` come before them all."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin no further schedule after so long")
    parser.add_argument("--first", type=int, help="the first seed; by default from the date")
    args = parser.parse_args()
    first = (datetime.date.today().toordinal() * DAY) if args.first is None else args.first
    began, seed, announced = time.monotonic(), first, 0
    told = began
    while time.monotonic() - began < args.seconds:
        try:
            announced += schedules([seed])
            recoveries([seed])
        except BaseException:
            print(
                f"seed {seed} fails: python -m tests.nightly --first {seed} --seconds 0.001",
                file=sys.stderr,
                flush=True,
            )
            raise
        seed += 1
        if time.monotonic() - told > 10 and sys.stderr.isatty():
            told = time.monotonic()
            print(f"{seed - first} schedules, {announced} steps announced", file=sys.stderr, flush=True)
    print(f"{seed - first} schedules from seed {first} on, {announced} steps announced, none lost")
    return 0


if __name__ == "__main__":
    sys.exit(main())
