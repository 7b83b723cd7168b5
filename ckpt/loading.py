"""A checkpoint into a live state: manifest + state -> targets -> ranges -> tensors in place.

No collective is needed to read. With a group, three cheap rounds make the ranks act as one: they load the same
step, they refuse together before any tensor is touched, and they fail together.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckpt.backends import Backend, backend_for
from ckpt.catalog import parse_ref, resolve
from ckpt.collective import Group
from ckpt.commit import exists, read_commit, read_manifest
from ckpt.config import undisturbed
from ckpt.errors import FormatError, IntegrityError, MismatchError, NotFoundError
from ckpt.exchange import fill_together
from ckpt.fill import Fill, fill
from ckpt.merge.load import fill_blend
from ckpt.merge.recipe import Recipe
from ckpt.merge.stream import Blend
from ckpt.snapshot.fence import fence_here
from ckpt.stored import ReadStats
from ckpt.targets import LoadOptions, Matching, matches
from ckpt.tiers import Nearest

__all__ = ["LoadOptions", "LoadReport", "load_folder", "load_ref"]

log = logging.getLogger("ckpt")
_SHOWN = 20
_APART = b"apart"
_COPIED = 0.05  # of the bytes may be needed twice: biases and norms are copies where all the rest is cut


@dataclass(frozen=True)
class LoadReport:
    """What a load did, on this rank. Bytes asked for, bytes read (checksummed blocks, headers and tables included); of a
    recipe those of all its checkpoints, and `ref` is the one that it is based on."""

    ref: str
    step: int
    generation: int
    tensors: int
    objects: int
    bytes_needed: int
    bytes_read: int
    seconds: float
    missing: tuple[str, ...]
    notes: tuple[str, ...]


def load_ref(state: Any, ref: str | os.PathLike[str] | Recipe, options: LoadOptions, group: Group) -> LoadReport:
    """Loads what a ref names, or what a recipe comes to, into a state; collective over `group`."""
    if isinstance(ref, Recipe):
        text = group.round("recipe", b"", lambda _: ref.to_json().encode()).decode()
        return _load(state, lambda: Blend(Recipe.from_json(text)), ref.base.ref, options, group)

    def decide(_: list[bytes]) -> bytes:
        backend, commit = resolve(ref)
        return json.dumps([backend.root, type(backend).__name__ == "MemoryBackend", commit.folder]).encode()

    while True:
        root, memory, folder = json.loads(group.round("load", b"", decide))
        backend = backend_for(f"memory://{root}" if memory else root)
        try:
            return load_folder(state, backend, folder, options, group)
        except (NotFoundError, IntegrityError) as e:
            if not _gone(backend, folder, group):
                raise
            if parse_ref(ref).which == folder:
                raise NotFoundError(f"{backend.root}/{folder}: was deleted while it was read; load another step") from e
            log.warning("ckpt: %s/%s was deleted while it was read; loading what the ref names now", root, folder)


def _gone(backend: Backend, folder: str, group: Group) -> bool:
    """Whether a step is committed no longer; collective."""
    return group.round("gone", b"", lambda _: b"" if exists(backend, folder) else b"gone") == b"gone"


class _Stored:
    """One committed step as what a load reads from; `ckpt.merge.stream.Blend` is the other."""

    def __init__(self, backend: Backend, folder: str) -> None:
        self.backend, self.commit = backend, read_commit(backend, folder)
        self.manifest = read_manifest(backend, self.commit)

    def close(self) -> None:
        self.backend.close()


def load_folder(state: Any, backend: Backend, folder: str, options: LoadOptions, group: Group) -> LoadReport:
    """Loads one committed step into a state, in place; collective over `group`.

    Raises, on every rank: MismatchError with all differences before anything is touched; IntegrityError or
    FormatError for bytes that are not what was written (the state's content is then undefined).
    """
    ref = f"{backend.root}/{folder}"
    if not isinstance(backend, Nearest):
        return _load(state, lambda: _Stored(backend, folder), ref, options, group)
    try:
        return _load(state, lambda: _Stored(backend, folder), ref, options, group)
    except (IntegrityError, FormatError, NotFoundError) as e:
        log.error("ckpt: %s: what is in the local tier cannot be used, trying the remote alone: %s", ref, e)
    return _load(state, lambda: _Stored(backend.remote, folder), ref, options, group)


@undisturbed()
def _load(
    state: Any, opened: Callable[[], _Stored | Blend], ref: str, options: LoadOptions, group: Group
) -> LoadReport:
    began = time.monotonic()
    source: _Stored | Blend | None = None
    plan: Matching | None = None
    payload: bytes | Exception
    try:
        source = opened()
        plan = Matching(source.manifest, options, group)
        plan.visit(state)
        found = source.match([w.tensor for w in plan.tensors.values()]) if isinstance(source, Blend) else None
        payload = plan.letter()
    except Exception as e:
        payload = e
    folder = ref.rpartition("/")[2]
    apart = group.round(f"match {folder}", payload, lambda letters: _compare(letters, plan, options)) == _APART
    assert source is not None and plan is not None
    stats = ReadStats()
    try:
        wanted = _begin(plan)
        if isinstance(source, Blend) and found is not None:
            stats = fill_blend(source, found, wanted, group.world)
        elif isinstance(source, _Stored):
            place = source.backend, source.commit.folder, plan.manifest
            if options.exchange and group.world > 1:
                stats = fill_together(*place, wanted, group)
            else:
                stats = fill(*place, wanted, group.world, apart=apart)
        for action in plan.finish:
            action()
        source.close()  # an open file would keep a pack that retention deletes
        payload = b""
    except Exception as e:
        payload = e
    group.round(f"loaded {folder}", payload, lambda _: b"")
    for note in plan.notes:
        log.warning("ckpt: %s", note)
    commit = source.commit
    return LoadReport(
        ref=ref,
        step=commit.step,
        generation=commit.generation,
        tensors=len(plan.tensors),
        objects=len(plan.used_objects),
        bytes_needed=stats.needed,
        bytes_read=stats.read,
        seconds=time.monotonic() - began,
        missing=tuple(plan.tolerated),
        notes=tuple(plan.notes),
    )


def _compare(letters: Sequence[bytes], plan: Matching | None, options: LoadOptions) -> bytes:
    """All differences of all ranks, at once; if there are none, whether no two ranks need the same bytes."""
    assert plan is not None
    problems: dict[str, list[str]] = {}
    used_tensors = np.zeros(len(plan.manifest.tensors), dtype=bool)
    used_objects: set[str] = set()
    strict: set[str] = set()
    needed = 0
    for letter in letters:
        head_size = int.from_bytes(letter[:8], "little")
        head = json.loads(letter[8 : 8 + head_size])
        for kind, names in head["problems"].items():
            known = problems.setdefault(kind, [])
            known += [n for n in names if n not in known]
        bits = np.unpackbits(np.frombuffer(letter[8 + head_size :], dtype=np.uint8), count=len(used_tensors))
        used_tensors |= bits.astype(bool)
        used_objects |= set(head["objects"])
        needed += head["bytes"]
        strict |= set(head["strict"])
    seen = {plan.manifest.tensors[i].name for i in np.flatnonzero(used_tensors).tolist()}
    stored = [t.name for t in plan.manifest.tensors if t.name not in seen]
    stored += [o.name for o in plan.manifest.objects if o.name not in used_objects]
    unexpected = sorted(
        n
        for n in set(stored)
        if any(n.startswith(s + ".") for s in strict)
        and options.wants(n)
        and not matches(n, options.allow_unexpected)
        and not n.endswith((".groups", ".param_groups"))
        and ".param_groups." not in n
    )
    if unexpected:
        problems["unexpected in the checkpoint"] = unexpected
    if problems:
        text = []
        for kind, names in problems.items():
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            text.append(f"{kind} ({len(names)}): {', '.join(names[:_SHOWN])}{more}")
        raise MismatchError(
            "state and checkpoint do not fit; nothing was loaded. " + "; ".join(text) + ". Mend the state, or see "
            "only=, rename=, allow_missing=, allow_unexpected= and cast="
        )
    held = sum(plan.manifest.tensors[i].nbytes for i in np.flatnonzero(used_tensors).tolist())
    return _APART if needed <= held * (1 + _COPIED) else b""


def _begin(plan: Matching) -> list[Fill]:
    """What is to be read, and where to, once all ranks agreed."""
    fence_here().wait()  # an unfinished snapshot must not see what is loaded
    for action in plan.begin:
        action()
    return [
        Fill(target.tensor, box, view)
        for target in plan.tensors.values()
        for box, view in target.held.pieces
        if view.numel()
    ]
