"""The smallest protocol that a place for checkpoints must serve.

Seven verbs. There is no rename (object stores have none), no append (nothing committed is ever rewritten) and
no file object (parallel ranges need none). Paths are `/`-separated strings relative to the backend's root; a
`Path` would collapse `s3://`. Failures raise StorageError, NotFoundError or ConflictError from ckpt.errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ckpt.errors import UsageError

__all__ = [
    "TEMPORARY",
    "Backend",
    "Buffer",
    "Entry",
    "KeepsUploads",
    "ReadsAhead",
    "ReadsMany",
    "Redundant",
    "Unfinished",
    "Upload",
    "check_path",
]

TEMPORARY = ".ckpt-tmp-"
"""How the names of files begin that a backend makes on the way to another; what a crash leaves of them is litter."""

Buffer = memoryview
"""A writable or readable, contiguous view of bytes."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One name below a prefix: a file or object of `size` bytes, modified at `modified` (seconds by this host's clock),
    or a folder; where folders are only parts of names, as in object stores, theirs is 0.0."""

    name: str
    folder: bool
    size: int
    modified: float


class Upload(Protocol):
    """A new object being written; invisible or plainly incomplete to readers of committed data until `finish`."""

    def write(self, offset: int, data: Buffer) -> None:
        """Stores `data` at `offset`. Called from several threads, parts in any order, no part twice.

        Every offset is a multiple of 4096, and so is every length but that of the part that ends the object.
        """
        ...

    def finish(self, size: int | None = None) -> None:
        """Makes the object durable, cut to `size` bytes if given. After it returns, it survives a power loss.

        What was written beyond `size` is dropped, as long as no part of 5 MiB or more lies on both sides of it.
        """
        ...

    def abort(self) -> None:
        """Gives up; removes what was written, as far as possible. Never raises."""
        ...


@dataclass(frozen=True, slots=True)
class Unfinished:
    """An upload to `path`, begun at `modified` (seconds by this host's clock), that was neither finished nor aborted."""

    path: str
    upload: str
    modified: float


@runtime_checkable
class KeepsUploads(Protocol):
    """What a backend serves besides, if unfinished uploads take room in its store where no listing shows them."""

    def unfinished(self) -> list[Unfinished]:
        """Every such upload below the root, whoever began it."""
        ...

    def discard(self, found: Unfinished) -> None:
        """Removes what it has stored; nothing happens if it is gone. A writer that is still at it gets an error."""
        ...


@runtime_checkable
class Redundant(Protocol):
    """What a backend serves besides, if there is more than one way to the same bytes."""

    def otherwise(self, path: str, offset: int, into: Buffer) -> Iterator[str]:
        """Fills the buffer again, by one way after the other, for as long as the caller finds that what came is not what
        was written. Each time says which way, as "decoded without host h1"."""
        ...


@runtime_checkable
class ReadsAhead(Protocol):
    """What a backend serves besides, if its `read` asks a store for more than it is asked for."""

    def read_just(self, path: str, offset: int, into: Sequence[Buffer]) -> None:
        """As `read`, as one request for just that."""
        ...


@runtime_checkable
class ReadsMany(Protocol):
    """What a backend serves besides, if many ranges cost it hardly more time than one."""

    def read_many(self, wanted: Sequence[tuple[str, int, Sequence[Buffer]]]) -> None:
        """As `read` for each (path, offset, buffers)."""
        ...


class Backend(Protocol):
    """A tree of immutable objects below one root."""

    root: str

    def create(self, path: str, data: bytes) -> None:
        """Writes a small object durably, only if the name is free: of several callers one succeeds, the others
        get ConflictError. The commit rests on this verb alone."""
        ...

    def new(self, path: str, size: int) -> Upload:
        """Begins a large object of `size` bytes, or fewer if `finish` says so. ConflictError if the name is taken.
        Fails early where the storage can tell that there is no room."""
        ...

    def read(self, path: str, offset: int, into: Sequence[Buffer]) -> None:
        """Fills the buffers, one after the other, from `offset` on. A short object is an IntegrityError."""
        ...

    def fetch(self, path: str, limit: int) -> bytes:
        """A whole small object. IntegrityError if it is larger than `limit` bytes: nothing that size is read."""
        ...

    def size(self, path: str) -> int:
        """Bytes of an object. NotFoundError if there is none."""
        ...

    def list(self, prefix: str) -> list[Entry]:
        """What is directly below `prefix` ("" for the root), sorted by name; [] if there is nothing."""
        ...

    def delete(self, path: str) -> None:
        """Removes an object, or a folder with nothing in it; nothing happens if there is none."""
        ...

    def close(self) -> None:
        """Releases what the backend keeps open."""
        ...


def check_path(path: str) -> str:
    """Returns `path` if it stays inside a root. Raises UsageError otherwise."""
    parts = path.split("/")
    if path.startswith("/") or "\x00" in path or any(p in ("", ".", "..") for p in parts):
        raise UsageError(f"path {path!r} would leave its checkpoint's folder")
    return path
