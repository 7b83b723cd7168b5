"""Where bytes rest. Knows neither torch nor the format."""

from __future__ import annotations

from ckpt.backends.base import Backend, Entry, Upload
from ckpt.backends.local import LocalBackend
from ckpt.backends.memory import MemoryBackend
from ckpt.errors import UsageError

__all__ = ["Backend", "Entry", "LocalBackend", "MemoryBackend", "Upload", "backend_for"]


def backend_for(url: str, *, direct: bool = True) -> Backend:
    """The backend that holds `url`, a path or a URL. Paths inside it are relative to `url`.

    Raises UsageError for a scheme that no backend serves.
    """
    scheme, sep, rest = url.partition("://")
    if not sep:
        return LocalBackend(url, direct=direct)
    if scheme == "file":
        return LocalBackend(rest, direct=direct)
    if scheme == "memory":
        return MemoryBackend(rest)
    raise UsageError(f"{url!r}: storage scheme {scheme!r} is not served yet; use a path, file:// or memory://")
