"""Which step to go on from: the newest that is whole, in memory or in storage, agreed on by all ranks."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ckpt import faults
from ckpt.backends import Backend
from ckpt.catalog import Step as Listed
from ckpt.catalog import lineage, list_run
from ckpt.collective import Group
from ckpt.commit import step_folder
from ckpt.errors import CkptError, DeadlineError, FormatError, IntegrityError, NotFoundError, PeerError, VersionError
from ckpt.keeper.recall import Recalled, Step
from ckpt.keeper.source import SnapshotBackend
from ckpt.kept import Kept
from ckpt.loading import LoadOptions, LoadReport, load_folder

__all__ = ["restore_newest"]

log = logging.getLogger("ckpt")
Key = tuple[int, int]
_MEMORY = "memory "


def restore_newest(
    state: Any, backend: Backend, options: LoadOptions, group: Group, kept: Kept | None
) -> tuple[str | None, LoadReport | None]:
    """Tries the steps of the present, newest first. Returns the folder of the one that was loaded, and the report."""
    recalled = kept.recall() if kept is not None else Recalled()
    for key, why in recalled.missed:
        log.warning("ckpt: step %d of generation %d cannot be had from memory: %s", key[1], key[0], why)
    faults.point("recovery chosen")
    inside = {_MEMORY + step_folder(s.key[1], s.key[0]): s for s in recalled.steps}
    keys = [s.key for s in recalled.steps]
    answer = group.round("restore", b"", lambda _: "\n".join(_candidates(backend, keys)).encode()).decode()
    candidates = [c for c in answer.split("\n") if c]
    for candidate, after in itertools.zip_longest(candidates, candidates[1:]):
        step = inside.get(candidate)
        try:
            if step is not None:
                assert kept is not None
                report = _from_memory(state, options, group, kept, step)
                return candidate.removeprefix(_MEMORY), report
            return candidate, load_folder(state, backend, candidate, options, group)
        except (IntegrityError, FormatError, NotFoundError, PeerError, DeadlineError) as e:
            gone = step is not None and not isinstance(e, (IntegrityError, FormatError))
            if not gone and (after is None or isinstance(e, (PeerError, DeadlineError, VersionError))):
                raise
            log.error(
                "ckpt: %s/%s cannot be used, falling back to %s: %s", backend.root, candidate, after or "step 0", e
            )
    return None, None


def _from_memory(state: Any, options: LoadOptions, group: Group, kept: Kept, step: Step) -> LoadReport:
    """Loads what the keepers hold. IntegrityError or NotFoundError, on all ranks, if that is not what was sealed."""
    opened: SnapshotBackend | Exception
    key = step.key
    try:
        opened = kept.open(step)
    except CkptError as e:
        opened = NotFoundError(f"step {key[1]} cannot be had from memory: {e}")
    except Exception as e:
        opened = e
    damaged = False
    try:
        group.round("open in memory", opened if isinstance(opened, Exception) else b"", lambda _: b"")
        assert not isinstance(opened, Exception)
        faults.point("recovery opened")
        return load_folder(state, opened, step_folder(key[1], key[0]), options, group)
    except (IntegrityError, FormatError):
        damaged = True
        raise
    finally:
        if not isinstance(opened, Exception):
            kept.moved = opened.moved
            opened.close()
        kept.done(key if damaged else None)


def _candidates(backend: Backend, snapshots: Sequence[Key]) -> list[str]:
    """The steps that lead to the present, newest first: folders, those of steps in memory behind "memory "."""
    listing = list_run(backend)
    for g in listing.generations:
        if g.error:
            log.error("ckpt: where generation %d came from is not known any more: %s", g.generation, g.error)
    stored = {s.folder for s in listing.steps if s.commit is not None or s.error}
    inside = {step_folder(step, generation): (generation, step) for generation, step in snapshots}
    others = tuple(s for s in listing.steps if s.folder in stored or s.folder not in inside)
    new = tuple(Listed(s, g, folder, None, "in memory") for folder, (g, s) in inside.items() if folder not in stored)
    present = lineage(replace(listing, steps=(*others, *new)), damaged=True)
    if listing.committed and not present:
        log.error(
            "ckpt: %s: its newest generation came from nowhere and saved nothing, so none of its %d checkpoints is "
            "the present; name the one to go on from with restore(ref=...)",
            backend.root,
            len(listing.committed),
        )
    out = []
    for s in present:
        out += [_MEMORY + s.folder] * (s.folder in inside) + [s.folder] * (s.folder in stored)
    return out
