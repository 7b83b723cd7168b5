"""Folders and files outside of any checkpoint that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ckpt.errors import CkptError, ConflictError, StorageError
from ckpt.faults import point

__all__ = ["appearing", "write_file"]


def write_file(path: str, data: bytes | memoryview) -> None:
    """A new file with this content, durably, and the folders above it."""
    point("export.write")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def appearing(path: str, *, folder: bool) -> Iterator[str]:
    """A temporary name beside `path`; what is written there gets its name at the end, or is removed."""
    path = os.path.abspath(path)
    parent, name = os.path.split(path)
    if os.path.lexists(path) and not (folder and os.path.isdir(path) and not os.listdir(path)):
        raise ConflictError(f"{path}: exists already; name another destination")
    temporary = os.path.join(parent, f".{name}.ckpt-tmp-{uuid.uuid4().hex[:12]}")
    try:
        os.makedirs(temporary if folder else parent, exist_ok=True)
        yield temporary
        if folder:
            _sync_folder(temporary)
            os.rename(temporary, path)  # refused by the system if something came to be there
        else:
            os.link(temporary, path)
            os.unlink(temporary)
        _sync_folder(parent)
    except BaseException as e:
        with suppress(OSError):
            shutil.rmtree(temporary) if folder else os.unlink(temporary)
        if isinstance(e, OSError) and not isinstance(e, CkptError):
            if e.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise ConflictError(f"{path}: exists already; name another destination") from e
            raise StorageError(f"writing {path}: {e.strerror or e}") from e
        raise


def _sync_folder(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
