"""Two tiers of storage: a disk of each host, where saves commit first, and the run's own place, to which they trickle.

A local tier is a run like any other, with the same names and the same bytes; several hosts have one each, of their own
packs only. See docs/design/015.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ckpt.backends import Backend, Entry, LocalBackend, Upload
from ckpt.backends.base import Buffer, ReadsAhead
from ckpt.catalog import list_run
from ckpt.collective import Group, decode, encode
from ckpt.commit import exists, read_commit, read_manifest, sealed, unseal
from ckpt.config import Every, settings
from ckpt.errors import CkptError, ConflictError, NotFoundError, StorageError, UsageError
from ckpt.offline.copy import copy_step
from ckpt.retention import KeepLast, Policy, policies_told

__all__ = ["DUE", "Local", "Nearest", "Tiers", "Way", "mark_due"]

log = logging.getLogger("ckpt")
DUE = "due.json"
"""In the local folder of a step that is to reach the remote: there before its commit, gone once the remote has it."""

_TIER = "tier.json"
_MAX = 1 << 20


@dataclass(frozen=True)
class Local:
    """A local tier: `path`, a folder for this run on a disk of the host, not shared with other runs.

    every  when to save there; None: when `storage` says. What is due for storage is saved there, too
    keep   retention policies of this tier; what is yet to reach the remote is kept in any case
    """

    path: str | os.PathLike[str]
    every: Every | None = None
    keep: Sequence[Policy] = (KeepLast(2),)

    def __post_init__(self) -> None:
        if "://" in os.fspath(self.path) and not os.fspath(self.path).startswith("file://"):
            raise UsageError(f"local={os.fspath(self.path)!r}: a folder on a disk of the host, as /nvme/run")


@dataclass
class Way:
    """From a local tier to the remote one. `keep`: the policies of the local tier, `remote_keep`: of the remote; `alone`: all
    packs of the job's steps are in this folder."""

    local: Backend
    remote: Backend
    keep: Sequence[Policy]
    remote_keep: Sequence[Policy]
    alone: bool


def mark_due(local: Backend, folder: str) -> None:
    """A step is to reach the remote tier."""
    with suppress(ConflictError):
        local.create(f"{folder}/{DUE}", b"{}\n")


class _Marking:
    """A local tier whose commits are due for the remote one: from before they are there. The mark takes a disk's time, which is
    the committing thread's and not the loop's."""

    def __init__(self, inner: Backend) -> None:
        self._inner, self.root = inner, inner.root
        self.new, self.read, self.fetch, self.size = inner.new, inner.read, inner.fetch, inner.size
        self.list, self.delete, self.close = inner.list, inner.delete, inner.close

    def create(self, path: str, data: bytes) -> None:
        folder, _, name = path.rpartition("/")
        if name == "commit.json":
            mark_due(self._inner, folder)
        self._inner.create(path, data)


class Nearest:
    """A run on two tiers, to read from: the local copy of what is committed there, else the remote one.

    `listed`: step folders of the local tier that are shown though the remote may not have them.
    """

    def __init__(self, local: Backend, remote: Backend) -> None:
        self.local, self.remote = local, remote
        self.listed: frozenset[str] = frozenset()
        self.root = remote.root
        self._whole: dict[str, bool] = {}
        self._absent: set[str] = set()

    def _here(self, path: str) -> bool:
        """Whether the local tier is asked for an object: only below a step that is committed there, and
        only for packs and manifest if that step is not whole without the remote."""
        folder, below, _ = path.partition("/")
        if not below or path in self._absent or (path == f"{folder}/commit.json" and folder not in self.listed):
            return False
        if folder not in self._whole:
            try:
                self._whole[folder] = exists(self.local, folder)
            except CkptError as e:
                log.error("ckpt: the local tier cannot be read: %s", e)
                self._whole[folder] = False
        return self._whole[folder]

    def read(self, path: str, offset: int, into: Sequence[Buffer]) -> None:
        if self._here(path):
            try:
                return self.local.read(path, offset, into)
            except (NotFoundError, StorageError) as e:
                self._pass(path, e)
        self.remote.read(path, offset, into)

    def read_just(self, path: str, offset: int, into: Sequence[Buffer]) -> None:
        if self._here(path) or not isinstance(self.remote, ReadsAhead):
            self.read(path, offset, into)
        else:
            self.remote.read_just(path, offset, into)

    def fetch(self, path: str, limit: int) -> bytes:
        if self._here(path):
            try:
                return self.local.fetch(path, limit)
            except (NotFoundError, StorageError) as e:
                self._pass(path, e)
        return self.remote.fetch(path, limit)

    def size(self, path: str) -> int:
        if self._here(path):
            try:
                return self.local.size(path)
            except (NotFoundError, StorageError) as e:
                self._pass(path, e)
        return self.remote.size(path)

    def _pass(self, path: str, e: CkptError) -> None:
        """An object is not here, or no longer; it is asked for at the remote from now on."""
        if not isinstance(e, NotFoundError):
            log.error("ckpt: the local tier cannot be read, the remote is: %s", e)
        self._absent.add(path)

    def list(self, prefix: str) -> list[Entry]:
        found = {e.name: e for e in self.remote.list(prefix)}
        self._whole.clear()
        if not prefix and self.listed:
            with suppress(StorageError):
                found |= {e.name: e for e in self.local.list("") if e.name in self.listed}
        return [found[name] for name in sorted(found)]

    def create(self, path: str, data: bytes) -> None:
        self.remote.create(path, data)

    def new(self, path: str, size: int) -> Upload:
        return self.remote.new(path, size)

    def delete(self, path: str) -> None:
        self.remote.delete(path)

    def close(self) -> None:
        self._whole.clear()
        self._absent.clear()
        self.local.close()
        self.remote.close()


class Tiers:
    """One rank's part in the two tiers of a run. Collective on construction: ranks that find the same folder share it.
    `behind`: the remote once more, for a thread whose priority is low: threads that it starts are not the loads'. `keep`: of
    the remote.

    Raises, on every rank: StorageError if a folder cannot be written, UsageError if it holds another run.
    """

    def __init__(self, remote: Backend, behind: Backend, spec: Local, keep: Sequence[Policy], group: Group) -> None:
        self.remote, self.spec, self._group = remote, spec, group
        self.local = LocalBackend(os.fspath(spec.path).removeprefix("file://"), direct=settings().direct)

        def decide(_: list[bytes]) -> bytes:
            return _identity(remote, _TIER, {"life": uuid.uuid4().hex})["life"].encode()

        life = group.round("tiers", b"", decide).decode()
        mine: bytes | Exception
        try:
            told = _identity(self.local, _TIER, {"life": life, "run": remote.root, "folder": uuid.uuid4().hex})
            if told["life"] != life:
                raise UsageError(
                    f"{self.local.root} is the local tier of {told['run']}, or of a run that was there before this one; "
                    "name another folder, or remove it"
                )
            mine = told["folder"].encode()
        except Exception as e:
            mine = e
        folders = json.loads(group.round("tier", mine, lambda all_: json.dumps([x.decode() for x in all_]).encode()))
        self.alone = len(set(folders)) == 1
        """Whether all ranks share one folder."""
        self.leads = folders.index(folders[group.rank]) == group.rank
        """Whether this rank does what is done once a folder."""
        self._leaders = {folders.index(f) for f in set(folders)}
        self.nearest = Nearest(self.local, remote)
        self.way = Way(self.local, behind, tuple(spec.keep), tuple(keep), self.alone)

    def told(self) -> dict[str, Any]:
        """What the keeper of this host has to know, as JSON. UsageError if it cannot be told."""
        way = self.way
        return {
            "path": self.local.root, "leads": self.leads, "alone": self.alone,
            "keep": policies_told(way.keep), "remote_keep": policies_told(way.remote_keep),
        }  # fmt: skip

    def place(self, due: bool) -> Backend:
        """Where a step is saved that is due for the remote tier, or is not."""
        return _Marking(self.local) if due else self.local

    def share(self, folder: str) -> None:
        """After a save, well ended or not, in the thread that did it; collective. The commit and the manifest go to the
        folders of the other hosts."""
        if self.alone:
            return

        def decide(_: list[bytes]) -> Sequence[bytes]:
            try:
                commit = read_commit(self.local, folder)
            except CkptError:
                return [b""] * self._group.world
            names = [f"{folder}/{commit.manifest_path}", f"{folder}/commit.json"]
            told = encode({"names": names, "content": [self.local.fetch(n, 1 << 40).hex() for n in names],
                           "due": exists_at(self.local, f"{folder}/{DUE}")})  # fmt: skip
            return [told if r in self._leaders else b"" for r in range(self._group.world)]

        told = self._group.beside().round(f"tier {folder}", b"", decide)
        if told and self._group.rank:
            head, _ = decode(told)
            if head["due"]:
                mark_due(self.local, folder)
            for name, content in zip(head["names"], head["content"], strict=True):
                self.local.create(name, bytes.fromhex(content))

    def settle(self, brought: Callable[[], object]) -> None:
        """Before a restore; collective. Finds out which steps of the local tier can be read from there.

        Where hosts have folders of their own, what one needs of another's goes by way of the remote: the newest step that
        they hold together, if the remote does not have it, is brought there first. What is not whole is brought nowhere.
        """
        mine: bytes | Exception
        try:
            mine = json.dumps(self._holdings() if self.leads else None).encode()
        except Exception as e:
            mine = e

        def decide(letters: list[bytes]) -> bytes:
            told = [holdings for holdings in map(json.loads, letters) if holdings is not None]
            needed = {folder: set(need) for holdings in told for folder, (_, need) in holdings.items()}
            packs = {f: [set(h[f][0]) if f in h else set() for h in told] for f in needed}
            here = sorted(f for f in needed if all(have >= needed[f] for have in packs[f]))
            whole = [f for f in needed if set().union(*packs[f]) >= needed[f]]
            newest = max(((s.generation, s.step) for s in list_run(self.remote).committed), default=(-1, -1))
            first = max((f for f in whole if _key(f) > newest), key=_key, default="")
            return json.dumps([here, first, sorted(set(needed) - set(whole))]).encode()

        here, first, torn = json.loads(self._group.round("local tiers", mine, decide))
        if torn and self._group.rank == 0:
            log.error(
                "ckpt: of %s packs are missing on the disks of the hosts that are here; it is not used", ", ".join(torn)
            )
        if self.leads:
            for folder in torn:
                self.local.delete(f"{folder}/{DUE}")
        if first and first not in here:
            log.warning("ckpt: %s is on the disks of several hosts only; bringing it to %s", first, self.remote.root)
            brought()  # another process of this host may be at it
            self._bring_now(first)
        self.nearest.listed = frozenset(here)

    def _bring_now(self, folder: str) -> None:
        payload: bytes | Exception = b""
        try:
            if self.leads and exists(self.local, folder):
                copy_step(self.local, self.remote, folder, elsewhere=True)
        except StorageError as e:
            log.error("ckpt: %s cannot be brought to the remote now: %s", folder, e)
        except Exception as e:
            payload = e
        self._group.round("settled", payload, lambda _: b"")

    def _holdings(self) -> dict[str, tuple[list[str], list[str]]]:
        """Of each step that is committed here: the packs that are here, and those that it is made of."""
        out = {}
        for s in list_run(self.local).committed:
            assert s.commit is not None
            try:
                manifest = read_manifest(self.local, s.commit)
            except NotFoundError:  # retention has just deleted it
                continue
            need = [manifest.pack_path(p) for p in range(len(manifest.packs))]
            have = [path for path in need if exists_at(self.local, f"{s.folder}/{path}")]
            out[s.folder] = (have, need)
        return out


def exists_at(backend: Backend, path: str) -> bool:
    try:
        return backend.size(path) >= 0
    except NotFoundError:
        return False


def _key(folder: str) -> tuple[int, int]:
    """(generation, step) of a step folder."""
    step, _, generation = folder.removeprefix("step-").partition(".g")
    return int(generation), int(step)


def _identity(backend: Backend, name: str, content: dict[str, str]) -> dict[str, str]:
    """What a tier says of itself, from now on or already."""
    with suppress(ConflictError):
        backend.create(name, sealed({"format": "ckpt-tier", "version": 1, **content}))
    return unseal(backend.fetch(name, _MAX), "ckpt-tier", f"{backend.root}/{name}")
