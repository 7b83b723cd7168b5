"""Folders and files outside of any checkpoint that appear whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ckpt.errors import CkptError, ConflictError, StorageError
from ckpt.faults import point

__all__ = ["appearing", "write_file"]

_libc = ctypes.CDLL(None, use_errno=True)


def write_file(path: str, data: bytes | memoryview) -> None:
    """A new file with this content, and the folders above it. `appearing` makes it durable."""
    point("export.write")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "xb") as file:
        file.write(data)


@contextmanager
def appearing(path: str, *, folder: bool) -> Iterator[str]:
    """A temporary name beside `path`; what is written there is made durable and gets its name at the end, or is
    removed. ConflictError if something is at `path`, but for an empty folder where a folder is to be."""
    path = os.path.abspath(path)
    parent, name = os.path.split(path)
    if os.path.lexists(path) and not (folder and os.path.isdir(path) and not os.listdir(path)):
        raise ConflictError(f"{path}: exists already; name another destination")
    temporary = os.path.join(parent, f".{name}.ckpt-tmp-{uuid.uuid4().hex[:12]}")
    try:
        os.makedirs(temporary if folder else parent, exist_ok=True)
        yield temporary
        if folder:
            _sync(temporary, everything=True)
            os.rename(temporary, path)  # refused by the system if something came to be there
        else:
            _sync(temporary)
            os.link(temporary, path)
            os.unlink(temporary)
        _sync(parent)
    except BaseException as e:
        with suppress(OSError):
            shutil.rmtree(temporary) if folder else os.unlink(temporary)
        if isinstance(e, OSError) and not isinstance(e, CkptError):
            if e.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise ConflictError(f"{path}: exists already; name another destination") from e
            raise StorageError(f"writing {path}: {e.strerror or e}") from e
        raise


def _sync(path: str, *, everything: bool = False) -> None:
    """Makes a file or folder durable; with `everything` the whole filesystem that it is on, which takes as long as one
    file where there are thousands."""
    fd = os.open(path, os.O_RDONLY)
    try:
        if not everything:
            os.fsync(fd)
        elif _libc.syncfs(fd) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
    finally:
        os.close(fd)
