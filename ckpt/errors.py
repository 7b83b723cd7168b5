"""Every error of ckpt, grouped by what the caller can do about it.

    CkptError
    ├── UsageError        kind "usage"      (ValueError)         mend the call
    ├── NotFoundError     kind "not-found"  (LookupError)        name another run, step or tensor
    ├── ConflictError     kind "conflict"                        the name is taken; choose another step or run
    ├── MismatchError     kind "mismatch"                        state and checkpoint differ; see its lists
    ├── LayoutError       kind "layout"     (ValueError)         pieces of a tensor are missing, overlap or clash
    ├── FormatError       kind "format"     (ValueError)         not a checkpoint, or damaged
    │   └── VersionError  kind "version"                         from a newer version of ckpt; upgrade
    ├── IntegrityError    kind "integrity"                       bytes differ from what was written; use an older step
    ├── UnsafeError       kind "unsafe"                          pickled content; pass allow_pickle=True if you trust it
    ├── StorageError      kind "storage"    (OSError)            the storage failed; a retry may help
    ├── CapacityError     kind "capacity"   (MemoryError)        this host has not the memory that was asked for
    ├── DeadlineError     kind "deadline"   (TimeoutError)       somebody did not answer in time
    └── PeerError         kind "peer"       (RuntimeError)       another rank failed for a reason of its own

`kind` is stable and may be matched on; messages may change. Each message names what it is about
(tensor, rank, file) and the next step.
"""

from __future__ import annotations

__all__ = [
    "CapacityError",
    "CkptError",
    "ConflictError",
    "DeadlineError",
    "FormatError",
    "IntegrityError",
    "LayoutError",
    "MismatchError",
    "NotFoundError",
    "PeerError",
    "StorageError",
    "UnsafeError",
    "UsageError",
    "VersionError",
    "from_wire",
    "to_wire",
]


class CkptError(Exception):
    """Base of every error that ckpt raises on purpose. `kind` is a stable word for it."""

    kind = "ckpt"


class UsageError(CkptError, ValueError):
    """The call is wrong; nothing was read or written."""

    kind = "usage"


class NotFoundError(CkptError, LookupError):
    """There is no such run, step, tensor or object."""

    kind = "not-found"


class ConflictError(CkptError):
    """What was to be created exists already."""

    kind = "conflict"


class MismatchError(CkptError):
    """State and checkpoint do not fit. Raised before any tensor is touched, with every difference at once."""

    kind = "mismatch"


class LayoutError(CkptError, ValueError):
    """The declared pieces of a tensor do not tile it, or several ranks claim different things under one name."""

    kind = "layout"


class FormatError(CkptError, ValueError):
    """A file is not what the format says."""

    kind = "format"


class VersionError(FormatError):
    """A file was written by a newer version of ckpt, which reads it. Nothing falls back behind it."""

    kind = "version"


class IntegrityError(CkptError):
    """Bytes read back differ from the bytes written (checksum or length)."""

    kind = "integrity"


class UnsafeError(CkptError):
    """Reading this needs pickle, which was not allowed at this call."""

    kind = "unsafe"


class StorageError(CkptError, OSError):
    """The storage refused or failed."""

    kind = "storage"


class CapacityError(CkptError, MemoryError):
    """The memory for snapshots cannot be reserved; nothing was taken."""

    kind = "capacity"


class DeadlineError(CkptError, TimeoutError):
    """A rank or a process did not answer before the deadline."""

    kind = "deadline"


class PeerError(CkptError, RuntimeError):
    """A rank failed with an error that is not one of ours; its text is in the message."""

    kind = "peer"


_BY_KIND = {
    e.kind: e
    for e in (
        UsageError,
        NotFoundError,
        ConflictError,
        MismatchError,
        LayoutError,
        FormatError,
        VersionError,
        IntegrityError,
        UnsafeError,
        StorageError,
        CapacityError,
        DeadlineError,
        PeerError,
    )
}


def to_wire(error: BaseException) -> tuple[str, str]:
    """(kind, message) of an error, for the other ranks."""
    if isinstance(error, CkptError):
        return error.kind, str(error)
    if isinstance(error, TimeoutError):
        return DeadlineError.kind, f"{type(error).__name__}: {error}"
    if isinstance(error, OSError):
        return StorageError.kind, f"{type(error).__name__}: {error}"
    return PeerError.kind, f"{type(error).__name__}: {error}"


def from_wire(kind: str, message: str) -> CkptError:
    """The error that `to_wire` described."""
    return _BY_KIND.get(kind, PeerError)(message)
