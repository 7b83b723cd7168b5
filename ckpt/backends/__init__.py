"""Where bytes rest. Knows neither torch nor the format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt.backends.base import Backend, Entry, Upload
from ckpt.backends.local import LocalBackend
from ckpt.backends.memory import MemoryBackend
from ckpt.errors import UsageError

__all__ = ["Backend", "Entry", "LocalBackend", "MemoryBackend", "Upload", "backend_for"]


def backend_for(url: str, *, direct: bool = True, storage_options: Mapping[str, Any] | None = None) -> Backend:
    """The backend that holds `url`, a path or a URL. Paths inside it are relative to `url`.

    storage_options  of the filesystem, as fsspec takes them; on top of FSSPEC_ variables and `fsspec.config.conf`

    Raises UsageError for a scheme that neither we nor fsspec serve, and for a URL with a password in it.
    """
    scheme, sep, rest = url.partition("://")
    if not sep:
        return LocalBackend(url, direct=direct)
    if scheme == "file":
        return LocalBackend(rest, direct=direct)
    if scheme == "memory":
        return MemoryBackend(rest)
    user, at, _ = rest.partition("/")[0].rpartition("@")
    if at and ":" in user:  # a URL stands in logs, errors and reports
        raise UsageError(
            f"{scheme}://: a password in a URL would be shown to others; give it as FSSPEC_{scheme.upper()}_PASSWORD "
            "or another variable of the environment"
        )
    # Imported here: listing a local run needs neither fsspec nor a client.
    from ckpt.backends.fsspec import FsspecBackend, configured, served

    if not served(scheme):
        raise UsageError(f"{url!r}: storage scheme {scheme!r} is not one of fsspec's; use a path, s3://, gs://, ...")
    options = {**configured(scheme), **(storage_options or {})}
    if scheme == "s3":
        from ckpt.backends.s3 import S3Backend

        return S3Backend(url, options)
    return FsspecBackend(url, options)
