"""Checkpoints from one store to another, byte for byte: resumable, verified, the commit last.

A step is copied under the names that it has. What stands at the destination already is not copied again if its bytes
are those that the manifest says, which are read back for every pack, new or old, before the commit is written.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from ckpt.backends import Backend, backend_for
from ckpt.catalog import delete_step, list_run, parse_ref, resolve
from ckpt.checkpoint import Checkpoint
from ckpt.commit import read_commit, read_manifest
from ckpt.config import settings
from ckpt.errors import ConflictError, IntegrityError, NotFoundError, StorageError, UsageError

__all__ = ["CopyReport", "copy", "copy_step", "plan_copy"]

_SMALL = 1 << 32
_BUFFER = 16 << 20
_THREADS = 4
_GENTLY = 2, 8 << 20  # threads and bytes of a buffer of what is in nobody's way
_LARGE = 32 << 30  # packs that would have too many parts of those
_ARRIVED = ".arrived"
Progress = Callable[[int], None]


@dataclass(frozen=True)
class CopyReport:
    """What a copy did, or would do. Step folders: `copied`; `present` before, with the same commit; `removed` because
    the source has them no longer. `bytes`: of the packs that were sent."""

    source: str
    target: str
    copied: tuple[str, ...]
    present: tuple[str, ...]
    removed: tuple[str, ...]
    bytes: int
    seconds: float


def plan_copy(src: str | os.PathLike[str], dst: str | os.PathLike[str], *, mirror: bool = False) -> CopyReport:
    """What `copy` would do; `bytes` is an upper bound. Raises what it raises before it writes anything."""
    source, target, folders, whole = _ends(src, dst)
    copied, present, nbytes = [], [], 0
    for folder in folders:
        if _same(source, target, folder):
            present.append(folder)
        else:
            copied.append(folder)
            nbytes += read_commit(source, folder).bytes
    removed: list[str] = []
    if mirror:
        if not whole:
            raise UsageError("a mirror is one of a whole run; name the run, not a step of it")
        removed = [s.folder for s in list_run(target).committed if s.folder not in folders]
    return CopyReport(source.root, target.root, tuple(copied), tuple(present), tuple(removed), nbytes, 0.0)


def copy(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    mirror: bool = False,
    progress: Progress | None = None,
) -> CopyReport:
    """Copies the run or the step that `src` names into the run `dst`, with its generations and metrics.

    mirror    also deletes the committed steps of `dst` that the run `src` does not have
    progress  is told the bytes of packs as they are sent, or found there

    Started again after a failure, it goes on where it stopped. Holds 64 MiB. Raises UsageError, NotFoundError,
    ConflictError (another step of the same name is there, or is being written), IntegrityError or FormatError (the
    source is damaged, or what arrived is not what was sent), StorageError. What was committed until then stays.
    """
    began = time.monotonic()
    plan = plan_copy(src, dst, mirror=mirror)
    source, target, folders, whole = _ends(src, dst)
    sent = 0
    for name in _small(source, folders, whole):
        _once(source, target, name)
    for folder in plan.copied:
        sent += copy_step(source, target, folder, progress)[0]
    for folder in plan.removed:
        delete_step(target, folder)
    source.close()
    target.close()
    return CopyReport(plan.source, plan.target, plan.copied, plan.present, plan.removed, sent, time.monotonic() - began)


def _ends(src: str | os.PathLike[str], dst: str | os.PathLike[str]) -> tuple[Backend, Backend, list[str], bool]:
    """(source, target, step folders to be there in the end, whether that is the whole run)."""
    run = parse_ref(dst).run
    if run != os.fspath(dst).rstrip("/"):
        raise UsageError(f"{os.fspath(dst)!r} names a step; copies go into a run (a folder or URL)")
    whole = parse_ref(src).run == os.fspath(src).rstrip("/")
    target = backend_for(run, direct=settings().direct)
    if not whole:
        source, commit = resolve(src)
        return source, target, [commit.folder], False
    source = backend_for(parse_ref(src).run)
    listing = list_run(source)
    for step in listing.steps:
        if step.error:
            read_commit(source, step.folder)  # raises what keeps it from being copied
    if not listing.committed:
        raise NotFoundError(f"{source.root}: no committed checkpoint")
    return source, target, [s.folder for s in listing.committed], True


def _same(source: Backend, target: Backend, folder: str) -> bool:
    """Whether a step is at the target already. ConflictError if it is another one."""
    name = f"{folder}/commit.json"
    try:
        there = target.fetch(name, 1 << 20)
    except NotFoundError:
        return False
    if there != source.fetch(name, 1 << 20):
        raise ConflictError(f"{target.root}/{folder}: another checkpoint of this name is there; copy into another run")
    return True


def _small(source: Backend, folders: Sequence[str], whole: bool) -> list[str]:
    """The objects beside the steps: the files of generations and, of a whole run, what is recorded of its steps."""
    wanted = {f"gen-{folder.rpartition('.g')[2]}.json" for folder in folders}
    names = [
        e.name
        for e in source.list("")
        if e.name.startswith("gen-") and e.name.endswith(".json") and (whole or e.name in wanted)
    ]
    for rows in ("ledger", "events") if whole else ():
        names += [f"{rows}/{e.name}" for e in source.list(rows) if e.name.endswith(".jsonl")]
    return names


def _once(source: Backend, target: Backend, name: str) -> None:
    """A small object, unless it is there. ConflictError if another one is."""
    data = source.fetch(name, _SMALL)
    try:
        target.create(name, data)
    except ConflictError:
        if target.fetch(name, _SMALL) != data:
            raise ConflictError(
                f"{target.root}/{name}: another one of this name is there; copy into another run, or, if it is what a "
                "save left that died, run `ckpt prune` on this one"
            ) from None


def copy_step(
    source: Backend,
    target: Backend,
    folder: str,
    progress: Progress | None = None,
    *,
    elsewhere: bool = False,
    gently: bool = False,
) -> tuple[int, bool]:
    """One step, its commit last. Returns the bytes of packs that were sent, and whether the target has it committed.

    elsewhere  packs that the source does not have are with others, who copy them, too: each pack that has arrived intact
               gets a receipt, and whoever finds all of them writes the commit, which is the same bytes for all
    gently     little at a time

    Raises what `copy` does, and what `progress` raises; then what was under way is given up, and the rest stands.
    """
    if elsewhere and _same(source, target, folder):
        return 0, True
    commit, sent = read_commit(source, folder), 0
    absent: list[str] = []
    with suppress(NotFoundError):
        _once(source, target, f"{folder}/{commit.attempt}/attempt.json")  # the right to write there
    read_manifest(source, commit)
    _once(source, target, f"{folder}/{commit.manifest_path}")
    there = Checkpoint(target, commit)
    for p in range(len(there.manifest.packs)):
        path, size = f"{folder}/{there.manifest.pack_path(p)}", int(there.manifest.packs.size[p])
        if elsewhere and _arrived(target, path):
            continue
        if elsewhere and not _arrived(source, path, ""):
            absent.append(path)
            continue
        if not _problems(there, p):
            if progress is not None:
                progress(size)
            if elsewhere:
                _receipt(target, path)
            continue
        if _same(source, target, folder):  # another copy has committed it meanwhile: nothing of it is touched any more
            return sent, True
        target.delete(path)
        _send(source, target, path, size, progress, *(_GENTLY if gently and size < _LARGE else (_THREADS, _BUFFER)))
        sent += size
        problems = _problems(there, p)
        if problems:
            if not _same(source, target, folder):
                target.delete(path)
            raise IntegrityError(f"{problems[0]}; check the source with `ckpt verify {source.root}/{folder}`")
        if elsewhere:
            _receipt(target, path)
    if all(_arrived(target, path) for path in absent):
        _once(source, target, f"{folder}/commit.json")
    elif not _same(source, target, folder):
        return sent, False
    if elsewhere:  # also those that were written here after somebody else had committed
        for p in range(len(there.manifest.packs)):
            with suppress(StorageError):  # what is left of them is litter
                target.delete(f"{folder}/{there.manifest.pack_path(p)}{_ARRIVED}")
    return sent, True


def _arrived(target: Backend, path: str, name: str = _ARRIVED) -> bool:
    try:
        return target.size(f"{path}{name}") >= 0
    except NotFoundError:
        return False


def _receipt(target: Backend, path: str) -> None:
    with suppress(ConflictError):
        target.create(f"{path}{_ARRIVED}", b"intact\n")


def _problems(there: Checkpoint, pack: int) -> list[str]:
    """What is wrong with a pack at the target, after reading all of it."""
    found: list[str] = []
    try:
        there.verify_pack(pack, found, None)
    except (NotFoundError, IntegrityError) as e:
        found.append(str(e))
    return found


def _send(
    source: Backend, target: Backend, path: str, size: int, progress: Progress | None, threads: int, piece: int
) -> None:
    """One pack, in buffers that a few threads fill and write."""
    upload = target.new(path, size)
    buffers = [np.empty(min(piece, size), np.uint8) for _ in range(threads)]

    def move(k: int, at: int) -> int:
        view = memoryview(buffers[k])[: min(piece, size - at)]
        source.read(path, at, [view])
        upload.write(at, view)
        if progress is not None:
            progress(len(view))
        return k

    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="ckpt-copy") as pool:
            moving: set[Future[int]] = set()
            free = list(range(threads))
            for at in range(0, size, piece):
                if not free:
                    done, moving = wait(moving, return_when=FIRST_COMPLETED)
                    free = [d.result() for d in done]
                moving.add(pool.submit(move, free.pop(), at))
            for last in moving:
                last.result()
        upload.finish()
    except BaseException:
        upload.abort()
        raise
