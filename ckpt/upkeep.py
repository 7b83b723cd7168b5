"""What a run needs besides its steps: metrics in the ledger, a word on surprises, the deletion of what no policy keeps."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from ckpt.backends import Backend
from ckpt.catalog import KeepBest, Policy, delete_step, kept, list_run, with_ledger, write_ledger
from ckpt.errors import CkptError, ConflictError, UsageError

__all__ = ["Metrics", "numbers", "retain", "warn_per_rank", "write_rows"]

log = logging.getLogger("ckpt")
Metrics = Mapping[str, Any]


def numbers(metrics: Metrics | None) -> dict[str, float]:
    """Metrics as plain numbers; those that are not finite have no place in JSON and are left out."""
    out = {}
    for name, value in (metrics or {}).items():
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # torch's own for a tensor of many elements
            raise UsageError(f"metric {name!r}: {value!r:.200} is not a number") from None
        if number - number == 0:
            out[str(name)] = number
    return out


def write_rows(backend: Backend, generation: int, waiting: deque[dict[str, object]]) -> None:
    """Writes all rows that wait into one object of the ledger; a failure is logged, not raised."""
    rows = []
    with suppress(IndexError):
        while True:
            rows.append(waiting.popleft())
    if not rows:
        return
    name = f"g{generation:04d}-{rows[0]['step']:08d}-{time.time_ns():x}"
    try:
        write_ledger(backend, name, rows)
    except CkptError as e:
        log.error("ckpt: metrics of %d steps were not written: %s", len(rows), e)


def retain(backend: Backend, policies: Sequence[Policy]) -> None:
    """Deletes what no policy keeps; a failure is logged, not raised."""
    if not policies:
        return
    with suppress(ConflictError):
        try:
            listing = list_run(backend)
            if any(isinstance(p, KeepBest) for p in policies):
                listing = with_ledger(backend, listing)
            for folder, keep in kept(listing, policies).items():
                if not keep:
                    delete_step(backend, folder)
        except CkptError as e:
            log.error("ckpt: old steps were not deleted: %s", e)


def warn_per_rank(names: Sequence[str], rank: int) -> None:
    """Says, once a save and on one rank, which leaves were stored per rank although nobody declared it."""
    if names and rank == 0:
        log.warning(
            "ckpt: stored per rank, since the ranks hold different values: %s (declare ckpt.PerRank to say so)",
            ", ".join(names[:10]),
        )
