"""What may be deleted from a run, and the deleting. Nothing that a committed checkpoint needs ever is."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Sequence
from contextlib import suppress
from dataclasses import dataclass

from ckpt.backends import Backend
from ckpt.backends.base import KeepsUploads, Unfinished
from ckpt.catalog import (
    Listing,
    Step,
    delete_step,
    delete_tree,
    leftovers,
    lineage,
    list_run,
    with_ledger,
)
from ckpt.commit import read_commit
from ckpt.errors import CkptError, FormatError, IntegrityError, NotFoundError
from ckpt.retention import Policy, kept, metrics_of

__all__ = ["Doomed", "Pruning", "carry_out", "measure", "plan_prune", "retain"]

log = logging.getLogger("ckpt")


@dataclass(frozen=True)
class Doomed:
    """Something to delete: `path` below the run; `kind` "step", "damaged", "leftover", or "upload" (one that was never
    finished, with its id after a "?"; how much it has stored is not known); its stored bytes."""

    path: str
    kind: str
    bytes: int


@dataclass(frozen=True)
class Pruning:
    """A plan. `keep`: the folders of the committed steps that stay; `latest` is one of them ("" if there is none)."""

    run: str
    latest: str
    keep: tuple[str, ...]
    delete: tuple[Doomed, ...]

    @property
    def bytes(self) -> int:
        return sum(d.bytes for d in self.delete)


def plan_prune(backend: Backend, policies: Sequence[Policy], older_than: float, *, damaged: bool = False) -> Pruning:
    """What to delete: committed steps that no policy keeps (none without policies), and what is older than
    `older_than` seconds of uncommitted leftovers and, if asked for, of steps whose commit is damaged.

    Raises StorageError where what is there cannot be told, FormatError where a damaged generation file hides what
    leads to the present, NotFoundError for a policy that speaks of a metric no step has.
    """
    listing = list_run(backend)
    _check(backend, listing, policies)
    keep = kept(listing, policies)
    present = lineage(listing)
    out = [Doomed(s.folder, "step", s.commit.bytes) for s in listing.committed if s.commit and not keep[s.folder]]
    for s in listing.steps:
        if damaged and s.error and _broken(backend, s):
            nbytes, newest = measure(backend, s.folder)
            if time.time() - newest >= older_than:
                out.append(Doomed(s.folder, "damaged", nbytes))
    out += [Doomed(p, "leftover", measure(backend, p)[0]) for p in leftovers(backend, listing, older_than)]
    out += [Doomed(f"{path}?{upload}", "upload", 0) for path, upload in _uploads(backend, older_than)]
    latest = present[0].folder if present else ""
    return Pruning(listing.run, latest, tuple(f for f, k in keep.items() if k), tuple(out))


def _check(backend: Backend, listing: Listing, policies: Sequence[Policy]) -> None:
    for s in listing.steps:
        if s.error:
            try:
                read_commit(backend, s.folder)
            except (IntegrityError, FormatError, NotFoundError):
                continue  # damaged for good
            # Any other error is raised: whether this step stands decides what else may go.
    if not policies:
        return
    for g in listing.generations:
        if g.error:
            raise FormatError(f"which steps lead to the present is not certain, so no step is pruned: {g.error}")
    for p in metrics_of(policies):
        if not any(p(listing.committed)):
            raise NotFoundError(f"{listing.run}: no committed step has the metric {p.metric!r}; nothing is pruned")


def _broken(backend: Backend, step: Step) -> bool:
    """Whether a commit's bytes are wrong: one that a newer version wrote, or that cannot be read now, is not."""
    try:
        read_commit(backend, step.folder)
    except IntegrityError:
        return True
    except CkptError:
        return False
    return False


def carry_out(
    backend: Backend,
    plan: Pruning,
    policies: Sequence[Policy],
    older_than: float,
    *,
    progress: Callable[[int], None] | None = None,
) -> Pruning:
    """Deletes what `plan` and a fresh look agree on, and returns just that: the run may have gone on meanwhile.

    Raises StorageError; what was deleted until then is gone, and the rest can be pruned later.
    """
    again = plan_prune(backend, policies, older_than, damaged=any(d.kind == "damaged" for d in plan.delete))
    still = {(d.path, d.kind) for d in again.delete}
    done = []
    for d in plan.delete:
        if (d.path, d.kind) not in still or (d.kind == "leftover" and _needed(backend, d.path)):
            continue
        if d.kind == "upload" and isinstance(backend, KeepsUploads):
            path, _, upload = d.path.rpartition("?")
            backend.discard(Unfinished(path, upload, 0.0))
        elif d.kind == "leftover":
            delete_tree(backend, d.path)
        else:
            delete_step(backend, d.path)
        done.append(d)
        if progress is not None:
            progress(d.bytes)
    return Pruning(plan.run, again.latest, again.keep, tuple(done))


def _uploads(backend: Backend, older_than: float) -> list[tuple[str, str]]:
    """(path, id) of the uploads that nobody has finished for so long. No checkpoint can need them: it is committed
    after all of its uploads are finished."""
    if not isinstance(backend, KeepsUploads):
        return []
    before = time.time() - older_than
    return [(u.path, u.upload) for u in backend.unfinished() if u.modified <= before]


def _needed(backend: Backend, path: str) -> bool:
    """Whether a commit has appeared since that makes a leftover part of a checkpoint."""
    folder, _, below = path.partition("/")
    try:
        attempt = read_commit(backend, folder).attempt
    except NotFoundError:
        return False
    return not below or below == attempt


def measure(backend: Backend, path: str) -> tuple[int, float]:
    """(bytes, time of the newest change) of an object, or of all that is below a folder."""
    entries = backend.list(path)
    if not entries:
        with suppress(NotFoundError):
            return backend.size(path), 0.0
    nbytes, newest = 0, 0.0
    for e in entries:
        inside = measure(backend, f"{path}/{e.name}") if e.folder else (e.size, 0.0)
        nbytes, newest = nbytes + inside[0], max(newest, e.modified, inside[1])
    return nbytes, newest


def retain(backend: Backend, policies: Sequence[Policy], needed: Container[str] = ()) -> None:
    """Deletes what no policy keeps, but for the folders in `needed`; a failure, of a policy too, is logged, not raised."""
    if not policies:
        return
    try:
        listing = list_run(backend)
        if any(metrics_of(policies)):
            listing = with_ledger(backend, listing)
        for folder, keep in kept(listing, policies).items():
            if not keep and folder not in needed:
                delete_step(backend, folder)
    except Exception as e:
        log.error("ckpt: old steps were not deleted: %s", e, exc_info=None if isinstance(e, CkptError) else e)
