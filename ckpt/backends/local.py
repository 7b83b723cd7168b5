"""Files on a POSIX filesystem: direct I/O, fsync of file and folder, link for create-only."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from ckpt.backends.base import TEMPORARY, Buffer, Entry, check_path
from ckpt.errors import CkptError, ConflictError, IntegrityError, NotFoundError, StorageError
from ckpt.faults import point

__all__ = ["LocalBackend"]

_PAGE = 4096
_IOV_MAX = 1024
_OPEN_FILES = 64
_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def _storage(doing: str, path: str) -> Iterator[None]:
    """Turns OSError into ours, naming the file."""
    try:
        yield
    except CkptError:
        raise
    except FileNotFoundError as e:
        raise NotFoundError(f"{path}: does not exist") from e
    except NotADirectoryError as e:
        raise NotFoundError(f"{path}: one of the folders above it is a file") from e
    except FileExistsError as e:
        raise ConflictError(f"{path}: exists already") from e
    except OSError as e:
        hint = "; free some space or choose another folder" if e.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise StorageError(f"{doing} {path}: {e.strerror or e}{hint}") from e


class LocalBackend:
    """Files below `root` (a path). `direct`: whether page cache is gone past where that is quicker."""

    _flags = 0  # with which files are opened for reading, besides the usual ones

    def __init__(self, root: str, *, direct: bool = True) -> None:
        self.root = os.path.abspath(os.path.expanduser(root))
        self.direct = direct
        self._lock = threading.Lock()
        self._files: dict[str, _Handle] = {}

    def _at(self, path: str) -> str:
        return os.path.join(self.root, check_path(path))

    def _make_parent(self, full: str) -> str:
        """Creates the missing folders above `full`, each made durable in the folder that holds it."""
        parent = os.path.dirname(full)
        missing = []
        at = parent
        while not os.path.isdir(at):
            missing.append(at)
            at = os.path.dirname(at)
        for folder in reversed(missing):
            point("local.mkdir")
            with suppress(FileExistsError):
                os.mkdir(folder)
            point("local.mkdir.fsync")
            _sync_folder(os.path.dirname(folder))
        return parent

    def create(self, path: str, data: bytes) -> None:
        full = self._at(path)
        with _storage("writing", full):
            parent = self._make_parent(full)
            temporary = os.path.join(parent, f"{TEMPORARY}{uuid.uuid4().hex}")
            point("local.create.open")
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                try:
                    point("local.create.write")
                    _write_all(fd, memoryview(data), 0)
                    point("local.create.fsync")
                    os.fsync(fd)
                finally:
                    os.close(fd)
                point("local.create.link")
                os.link(temporary, full)
            finally:
                point("local.create.unlink")
                os.unlink(temporary)
            point("local.create.fsync-folder")
            _sync_folder(parent)

    def new(self, path: str, size: int) -> _FileUpload:
        full = self._at(path)
        with _storage("creating", full):
            self._make_parent(full)
            return _FileUpload(full, size, self.direct)

    def read(self, path: str, offset: int, into: Sequence[Buffer]) -> None:
        file = self._files.get(path)
        if file is not None and 0 < len(into) <= _IOV_MAX:  # the rest of a large file: most calls
            with suppress(OSError):
                if os.preadv(file.fd, into, offset) == sum(map(len, into)):
                    return
        full = self._at(path)
        with _storage("reading", full):
            file = self._open(path, full)
            views = [v for v in into if len(v)]
            for at in range(0, len(views), _IOV_MAX):
                offset = _read_all(file.fd, views[at : at + _IOV_MAX], offset, full)

    def fetch(self, path: str, limit: int) -> bytes:
        full = self._at(path)
        with _storage("reading", full), open(_open_file(full), "rb") as f:
            size = os.fstat(f.fileno()).st_size  # a read of `limit` bytes would allocate them
            data = f.read(min(size, limit) + 1)
        if len(data) > limit:
            raise IntegrityError(f"{full}: larger than {limit} bytes; not what its name says")
        return data

    def size(self, path: str) -> int:
        full = self._at(path)
        with _storage("looking at", full):
            info = os.stat(full)
            if stat.S_ISDIR(info.st_mode):
                raise NotFoundError(f"{full}: is a folder")
            return info.st_size

    def list(self, prefix: str) -> list[Entry]:
        full = self._at(prefix) if prefix else self.root
        if prefix and os.path.islink(full):
            return []  # it leads out of the root: nothing below it is ours to show, or to delete
        out = []
        with _storage("listing", full):
            try:
                with os.scandir(full) as entries:
                    for e in entries:
                        with suppress(FileNotFoundError):
                            info = e.stat(follow_symlinks=False)
                            out.append(Entry(e.name, e.is_dir(follow_symlinks=False), info.st_size, info.st_mtime))
            except (FileNotFoundError, NotADirectoryError):
                return []
        return sorted(out, key=lambda e: e.name)

    def delete(self, path: str) -> None:
        full = self._at(path)
        with _storage("deleting", full):
            point("local.delete")
            with self._lock:
                self._files.pop(path, None)
            folder = os.path.dirname(full)
            try:
                os.unlink(full)
            except (FileNotFoundError, NotADirectoryError):
                pass
            except IsADirectoryError:
                folder = full
            else:
                point("local.delete.fsync")
                _sync_folder(folder)  # or a commit, deleted first, could come back after a power loss without its packs
            while len(folder) > len(self.root):
                try:
                    point("local.delete.folder")
                    os.rmdir(folder)
                except OSError:
                    break
                folder = os.path.dirname(folder)

    def close(self) -> None:
        with self._lock:
            self._files.clear()

    def _open(self, path: str, full: str) -> _Handle:
        """A descriptor for reading, kept for the next range; of many, the one opened first is let go."""
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = _Handle(_open_file(full, self._flags))
                if len(self._files) > _OPEN_FILES:
                    self._files.pop(next(iter(self._files)))
            return file


class _Handle:
    """A descriptor that is closed when the last reader lets it go, and not while one is in the middle of a read."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


class _FileUpload:
    """A file being written in parts: direct I/O for whole pages, the page cache for the odd end."""

    def __init__(self, full: str, size: int, direct: bool) -> None:
        self._path = full
        self._direct_fd = -1
        point("local.new.open")
        self._fd = os.open(full, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._made = _identity(os.fstat(self._fd))
        try:
            point("local.new.allocate")
            _allocate(self._fd, size)
            if direct:
                with suppress(OSError):  # not every filesystem has it (EINVAL)
                    self._direct_fd = os.open(full, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
        except BaseException:
            self.abort()
            raise

    def write(self, offset: int, data: Buffer) -> None:
        with _storage("writing", self._path):
            point("local.new.write")
            whole = len(data) // _PAGE * _PAGE if self._direct_fd >= 0 else 0
            if whole:
                try:
                    _write_all(self._direct_fd, data[:whole], offset)
                except OSError as e:
                    if e.errno != errno.EINVAL:
                        raise
                    whole = 0
            if whole < len(data):
                _write_all(self._fd, data[whole:], offset + whole)

    def finish(self, size: int | None = None) -> None:
        with _storage("syncing", self._path):
            if size is not None:
                point("local.new.truncate")
                os.ftruncate(self._fd, size)
            point("local.new.fsync")
            os.fsync(self._fd)
            self._close()
            point("local.new.fsync-folder")
            _sync_folder(os.path.dirname(self._path))

    def abort(self) -> None:
        with suppress(OSError):
            point("local.new.abort")
            if self._made == _identity(os.stat(self._path)):  # somebody else may have cleared it away and begun anew
                os.unlink(self._path)
        self._close()

    def _close(self) -> None:
        for fd in (self._fd, self._direct_fd):
            if fd >= 0:
                with suppress(OSError):
                    os.close(fd)
        self._fd = self._direct_fd = -1


def _identity(info: os.stat_result) -> tuple[int, int]:
    return info.st_dev, info.st_ino


def _open_file(full: str, flags: int = 0) -> int:
    """A descriptor for reading a plain file: anything else (a pipe would block) is not what its name says."""
    fd = os.open(full, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags)
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    if stat.S_ISDIR(mode):
        raise NotFoundError(f"{full}: is a folder")
    raise IntegrityError(f"{full}: is not a plain file")


def _allocate(fd: int, size: int) -> None:
    """Reserves `size` bytes, so that a full disk is known before the first byte is written.

    The system call itself: the C library's posix_fallocate would write zeros where a filesystem cannot reserve.
    """
    if size == 0:
        return
    if _libc.fallocate(fd, 0, ctypes.c_long(0), ctypes.c_long(size)) != 0:
        code = ctypes.get_errno()
        if code not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(code, os.strerror(code))
        os.ftruncate(fd, size)


def _write_all(fd: int, data: Buffer, offset: int) -> None:
    while len(data):
        n = os.pwrite(fd, data, offset)
        data, offset = data[n:], offset + n


def _read_all(fd: int, into: list[Buffer], offset: int, path: str) -> int:
    """Fills all of `into`; returns the offset after it."""
    while into:
        n = os.preadv(fd, into, offset)
        if n == 0:
            raise IntegrityError(f"{path}: ends at byte {offset}, before its checkpoint says; it was cut short")
        offset += n
        while into and n >= len(into[0]):
            n -= len(into[0])
            into.pop(0)
        if n:
            into[0] = into[0][n:]
    return offset


def _sync_folder(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
