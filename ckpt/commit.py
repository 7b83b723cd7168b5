"""The commit of a checkpoint: small canonical JSON objects, checksummed, created only if absent.

A checkpoint exists if and only if its `commit.json` exists. It is written last, and names the manifest by size
and checksum; the manifest names every pack likewise.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ckpt.backends import Backend
from ckpt.config import settings
from ckpt.errors import CkptError, ConflictError, FormatError, IntegrityError, NotFoundError, VersionError
from ckpt.format.codec import Codec, crc32c

if TYPE_CHECKING:  # a commit is JSON: to list a run, nothing below is loaded
    import numpy as np
    import numpy.typing as npt

    from ckpt.format.manifest import Manifest, ObjectEntry
    from ckpt.plan import Plan
    from ckpt.write import PackReport

__all__ = [
    "Commit",
    "Generation",
    "claim_attempt",
    "commit_step",
    "exists",
    "open_generation",
    "read_commit",
    "read_generation",
    "read_manifest",
    "refuse_superseded",
    "sealed",
    "step_folder",
    "unseal",
]

VERSION = 1
_MAX_COMMIT = 1 << 20
_MAX_MANIFEST = 1 << 32
_ATTEMPTS = 1000
_GENERATIONS = 10**9
_ATTEMPT = re.compile(r"a(0|[1-9][0-9]{0,8})")


@dataclass(frozen=True)
class Commit:
    """What `commit.json` says. `bytes`: stored bytes of all packs. `time`: ISO 8601, UTC."""

    step: int
    generation: int
    attempt: str
    manifest_path: str
    manifest_size: int
    manifest_crc: int
    bytes: int
    world: int
    tensors: int
    time: str
    metrics: Mapping[str, float]
    writer: str

    @property
    def folder(self) -> str:
        return step_folder(self.step, self.generation)


@dataclass(frozen=True)
class Generation:
    """One life of a run. `parent`: the step folder it came from, or None. `error`: why its file tells nothing."""

    generation: int
    parent: str | None
    time: str
    world: int
    error: str = ""


def step_folder(step: int, generation: int) -> str:
    return f"step-{step:08d}.g{generation:04d}"


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def sealed(content: Mapping[str, Any]) -> bytes:
    """Canonical JSON with its own CRC32C inside: any flipped bit shows."""
    check = crc32c(_canonical(content))
    return _canonical({**content, "crc32c": f"{check:08x}"}) + b"\n"


def unseal(data: bytes, kind: str, where: str) -> dict[str, Any]:
    """The content of a sealed object. Raises IntegrityError for damage, FormatError for another kind or version."""
    try:
        content = json.loads(data)
        check = content.pop("crc32c")
        intact = sealed(content) == data and isinstance(check, str)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise IntegrityError(f"{where}: damaged ({type(e).__name__}); use another step") from None
    if not intact:
        raise IntegrityError(f"{where}: its bytes are not what was written; use another step")
    if content.get("format") != kind:
        raise FormatError(f"{where}: holds {content.get('format')!r}, not {kind!r}")
    version = content.get("version")
    if type(version) is not int or version < 1:
        raise FormatError(f"{where}: format version {version!r:.20}")
    if version > VERSION:
        raise VersionError(
            f"{where}: format version {version}, this ckpt reads up to {VERSION}; upgrade ckpt-universal"
        )
    return dict(content)


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def read_commit(backend: Backend, folder: str) -> Commit:
    """The commit of a step folder. NotFoundError if it has none, IntegrityError or FormatError if it is damaged."""
    where = f"{backend.root}/{folder}/commit.json"
    c = unseal(backend.fetch(f"{folder}/commit.json", _MAX_COMMIT), "ckpt-commit", where)
    try:
        m = c["manifest"]
        commit = Commit(
            step=int(c["step"]),
            generation=int(c["generation"]),
            attempt=str(c["attempt"]),
            manifest_path=str(m["path"]),
            manifest_size=int(m["size"]),
            manifest_crc=int(m["crc32c"], 16),
            bytes=int(c["bytes"]),
            world=int(c["world"]),
            tensors=int(c["tensors"]),
            time=str(c["time"]),
            metrics={str(k): float(v) for k, v in c["metrics"].items()},
            writer=str(c["writer"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
        raise FormatError(f"{where}: {type(e).__name__}: {e}") from None
    belongs = commit.folder == folder and commit.manifest_path == f"{commit.attempt}/manifest.safetensors"
    if not belongs or not _ATTEMPT.fullmatch(commit.attempt):
        raise FormatError(
            f"{where}: speaks of {commit.folder[:200]}/{commit.manifest_path[:200]!r}; it does not belong here"
        )
    if not 0 <= commit.manifest_size <= _MAX_MANIFEST:
        raise FormatError(f"{where}: manifest of {commit.manifest_size} bytes")
    return commit


def read_manifest(backend: Backend, commit: Commit) -> Manifest:
    """The manifest that a commit names, checked against it. Raises IntegrityError or FormatError."""
    from ckpt.format.parse import parse_manifest

    path = f"{commit.folder}/{commit.manifest_path}"
    where = f"{backend.root}/{path}"
    data = backend.fetch(path, commit.manifest_size)
    if len(data) != commit.manifest_size or crc32c(data) != commit.manifest_crc:
        raise IntegrityError(f"{where}: not the manifest that was committed; use another step")
    manifest = parse_manifest(data, where)
    mine = (commit.step, commit.generation, commit.attempt)
    if (manifest.step, manifest.generation, manifest.attempt) != mine:
        raise FormatError(
            f"{where}: belongs to step {manifest.step} of generation {manifest.generation}, attempt {manifest.attempt}"
        )
    return manifest


def claim_attempt(backend: Backend, folder: str, world: int) -> tuple[str, str]:
    """(attempt, writer id): the right to write `<folder>/a<n>`. ConflictError if the step is committed already."""
    names = {e.name for e in backend.list(folder)}
    if "commit.json" in names:
        raise ConflictError(
            f"{backend.root}/{folder}: this step is committed already; save another step or into another run"
        )
    writer = uuid.uuid4().hex
    content = {"format": "ckpt-attempt", "version": VERSION, "writer": writer, "time": now(), "world": world}
    first = max((int(n[1:]) + 1 for n in names if _ATTEMPT.fullmatch(n)), default=0)
    for n in range(first, min(first + _ATTEMPTS, 10**9)):
        try:
            backend.create(f"{folder}/a{n}/attempt.json", sealed(content))
        except ConflictError:
            continue
        return f"a{n}", writer
    raise ConflictError(f"{backend.root}/{folder}: a{first - 1} and more attempts are there already; run `ckpt prune`")


def commit_step(
    backend: Backend,
    *,
    step: int,
    generation: int,
    attempt: str,
    writer: str,
    plan: Plan,
    codecs: Sequence[Codec],
    codec: npt.NDArray[np.uint8] | None,
    objects: Sequence[ObjectEntry],
    aliases: Mapping[str, str],
    reports: Sequence[PackReport | None],
    metrics: Mapping[str, float],
    world: int | None = None,
    publishing: Callable[[], None] = lambda: None,
) -> Commit:
    """Writes the manifest of what all writers reported (None: nothing to write), then the commit. `world`: how many ranks
    there are, if that is not the number of writers.

    `publishing` is called between the two: from then on the checkpoint may exist, whatever happens here.
    """
    import numpy as np

    from ckpt.format.manifest import Packs, build_manifest, dump_manifest

    wrote = [r for r, report in enumerate(reports) if report is not None]
    world = len(reports) if world is None else world
    done = [report for report in reports if report is not None]
    packs = Packs(
        writer=np.array(wrote, dtype=np.uint32),
        size=np.array([r.size for r in done], dtype=np.uint64),
        data_start=np.array([r.data_start for r in done], dtype=np.uint64),
        header_crc=np.array([r.header_crc for r in done], dtype=np.uint32),
        table_offset=np.array([r.table_offset for r in done], dtype=np.uint64),
        blocks=np.array([r.blocks for r in done], dtype=np.uint32),
        entry=np.array([r.entry for r in done], dtype=np.uint8),
        table_crc=np.array([r.table_crc for r in done], dtype=np.uint32),
    )
    manifest = build_manifest(
        step=step,
        generation=generation,
        attempt=attempt,
        world=world,
        tensors=plan.tensors,
        objects=objects,
        codecs=codecs,
        packs=packs,
        aliases=aliases,
        tensor=plan.tensor,
        boxes=plan.box,
        pack=np.searchsorted(np.array(wrote), plan.rank),
        offset=np.concatenate([r.offset for r in done]) if done else np.empty(0, np.uint64),
        length=np.concatenate([r.length for r in done]) if done else np.empty(0, np.uint64),
        block=np.concatenate([r.block for r in done]) if done else np.empty(0, np.uint32),
        codec=codec,
    )
    data = dump_manifest(manifest)
    folder = step_folder(step, generation)
    path = f"{attempt}/manifest.safetensors"
    backend.create(f"{folder}/{path}", data)
    commit = Commit(
        step=step,
        generation=generation,
        attempt=attempt,
        manifest_path=path,
        manifest_size=len(data),
        manifest_crc=crc32c(data),
        bytes=int(packs.size.sum()),
        world=world,
        tensors=len(plan.tensors),
        time=now(),
        metrics=dict(metrics),
        writer=writer,
    )
    publishing()
    publish(backend, commit)
    return commit


def publish(backend: Backend, commit: Commit) -> None:
    """The one conditional write. Who is refused, or gets an error, but finds his own commit there has succeeded."""
    content = asdict(commit)
    content["manifest"] = {
        "path": content.pop("manifest_path"),
        "size": content.pop("manifest_size"),
        "crc32c": f"{content.pop('manifest_crc'):08x}",
    }
    data = sealed({"format": "ckpt-commit", "version": VERSION, **content})
    try:
        backend.create(f"{commit.folder}/commit.json", data)
    except CkptError:
        # A lost answer looks like a failure or a conflict: what stands there decides.
        with suppress(CkptError):
            if read_commit(backend, commit.folder).writer == commit.writer:
                return
        raise


def read_generation(backend: Backend, number: int) -> Generation:
    """What a generation file says. NotFoundError if there is none."""
    name = f"gen-{number:04d}.json"
    where = f"{backend.root}/{name}"
    g = unseal(backend.fetch(name, _MAX_COMMIT), "ckpt-generation", where)
    try:
        out = Generation(int(g["generation"]), g["parent"], str(g["time"]), int(g["world"]))
    except (KeyError, TypeError, ValueError, OverflowError) as e:
        raise FormatError(f"{where}: {type(e).__name__}: {e}") from None
    if out.generation != number or not isinstance(out.parent, str | None):
        raise FormatError(f"{where}: speaks of generation {out.generation}, come from {str(out.parent)[:200]!r}")
    return out


def open_generation(backend: Backend, parent: str | None, world: int, known: Sequence[int]) -> int:
    """Begins the next generation after `known`, come from the step folder `parent`. Returns its number."""
    number = max(known, default=0) + 1
    while True:
        if number >= _GENERATIONS:
            raise ConflictError(
                f"{backend.root}: generation {number - 1} is the last possible; remove what bears its number"
            )
        by = f"{settings().host or socket.gethostname()}, process {os.getpid()}"
        content = {"generation": number, "parent": parent, "time": now(), "world": world, "by": by}
        data = sealed({"format": "ckpt-generation", "version": VERSION, **content})
        try:
            backend.create(f"gen-{number:04d}.json", data)
            return number
        except ConflictError:
            number += 1


def refuse_superseded(backend: Backend, generation: int) -> None:
    """Before a commit of a job that is alive: raises ConflictError if another one has begun a newer generation since.

    Jobs that cannot see each other's keepers, on other hosts, find out so: the older one commits nothing any more. Between
    this look and the commit another may begin; that commit then is the last one before it.
    """
    if not generation:
        return  # of saves without a Checkpointer, which have no lives
    name = f"gen-{generation + 1:04d}.json"
    try:
        told = unseal(backend.fetch(name, _MAX_COMMIT), "ckpt-generation", f"{backend.root}/{name}")
        who = f"by {told.get('by', 'an older version')} at {told.get('time')}"
    except NotFoundError:
        return
    except (FormatError, IntegrityError) as e:
        who = f"by whoever wrote a file that cannot be read ({e})"
    raise ConflictError(
        f"generation {generation + 1} of {backend.root} was begun {who}, while this job trains generation {generation}: one "
        "job at a time may write to a run, and the newer one is the present; end one of the two, or name another run"
    )


def exists(backend: Backend, folder: str) -> bool:
    """Whether a step folder is committed."""
    try:
        backend.size(f"{folder}/commit.json")
    except NotFoundError:
        return False
    return True
