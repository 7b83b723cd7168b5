"""Any filesystem of fsspec. What it promises differs from one to the next, so little is taken for granted.

Large objects are put together in a temporary file and sent as a whole: fsspec has no parts in any order. `create` is
exclusive where the filesystem can link or has a conditional write that was seen to work; elsewhere only within this
process, which is said once.
"""

from __future__ import annotations

import datetime
import logging
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import IO, Any

import fsspec
from fsspec.config import conf
from fsspec.dircache import DirCache
from fsspec.registry import known_implementations, registry

from ckpt.backends.ahead import Ahead, scatter
from ckpt.backends.base import TEMPORARY, Buffer, Entry, Upload, check_path
from ckpt.errors import CkptError, ConflictError, IntegrityError, NotFoundError, StorageError, UsageError

__all__ = ["FsspecBackend", "configured", "served"]

log = logging.getLogger("ckpt")
_SMALL = 8 << 20
_TRIES = 4
_CONDITIONAL = frozenset(("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"))
_FLAT = _CONDITIONAL | {"memory", "oss", "oci", "cos", "tos", "r2", "tosfs"}
_ONE_THREAD = frozenset(("sftp", "ssh"))  # paramiko's client waits for ever for an answer that another thread took
_SECRET = ("secret", "password", "passphrase", "token", "key", "credential", "sas")
_one_at_a_time = threading.Lock()
_exclusive: dict[str, bool] = {}


def served(scheme: str) -> bool:
    """Whether fsspec knows a filesystem of this name."""
    return scheme in known_implementations or scheme in registry


def configured(scheme: str) -> dict[str, Any]:
    """What FSSPEC_ variables, fsspec's files and `fsspec.config.conf` say about a scheme."""
    return dict(conf.get(scheme, {}))


class FsspecBackend:
    """Files or objects below `url`. `options`: those of the filesystem."""

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        self._scheme, given = url.partition("://")[0], dict(options or {})
        self._secrets = [str(v) for k, v in given.items() if v and any(s in k.lower() for s in _SECRET)]
        self._flat = self._scheme in _FLAT
        self._alone = threading.RLock() if self._scheme in _ONE_THREAD else nullcontext()
        self.root = url.rstrip("/")
        try:
            self._fs, self._base = fsspec.core.url_to_fs(url, skip_instance_cache=True, **given)
        except ImportError as e:
            raise UsageError(f"{url!r}: {str(e)[:300]}") from None
        except Exception as e:
            raise self._told("opening", self.root, e) from None
        cache = getattr(self._fs, "dircache", None)
        if isinstance(cache, DirCache):  # not as an option: not all take it
            cache.use_listings_cache = False
        self._base = self._base.rstrip("/")
        self._ahead = Ahead(self._get)

    def _at(self, path: str) -> str:
        return f"{self._base}/{check_path(path)}"

    def _told(self, doing: str, path: str, e: BaseException) -> CkptError:
        """One of our errors for one of theirs: filesystems raise what their clients do, not only OSError."""
        text = str(e)[:300]
        for secret in self._secrets:
            text = text.replace(secret, "***")
        if isinstance(e, FileNotFoundError | NotADirectoryError):
            return NotFoundError(f"{path}: does not exist")
        if isinstance(e, FileExistsError):
            return ConflictError(f"{path}: exists already")
        if isinstance(e, NotImplementedError):
            return UsageError(f"{path}: {self._scheme}:// does not serve this ({doing}); use another storage")
        hint = "; check the credentials and what they allow" if isinstance(e, PermissionError) else ""
        return StorageError(f"{doing} {path}: {type(e).__name__}: {text}{hint}")

    @contextmanager
    def _storage(self, doing: str, path: str) -> Iterator[None]:
        try:
            with self._alone:
                yield
        except CkptError:
            raise
        except Exception as e:
            raise self._told(doing, f"{self.root}/{path}", e) from e

    def create(self, path: str, data: bytes) -> None:
        full = self._at(path)
        with self._storage("writing", path):
            self._make_parent(full)
            if hasattr(self._fs, "link"):
                self._create_by_link(full, data)
            elif _exclusive.get(self._key):
                try:
                    self._fs.pipe_file(full, data, mode="create")
                except OSError:  # of s3fs, the same for a name that is taken as for others
                    self._check_free(path)
                    raise
            else:
                with _one_at_a_time:
                    self._check_free(path)
                    self._fs.pipe_file(full, data)
                    self._try_out(full, data)

    @property
    def _key(self) -> str:
        return f"{self._scheme} {self._base.partition('/')[0]}"

    def _create_by_link(self, full: str, data: bytes) -> None:
        temporary = f"{full.rpartition('/')[0]}/{TEMPORARY}{uuid.uuid4().hex}"
        try:
            self._fs.pipe_file(temporary, data)
            self._fs.link(temporary, full)
        finally:
            with suppress(FileNotFoundError):
                self._fs.rm_file(temporary)

    def _try_out(self, full: str, data: bytes) -> None:
        """After the first create: is the same, only if there is nothing, refused?"""
        if self._key in _exclusive or self._scheme == "memory":
            return
        refused = False
        if self._scheme in _CONDITIONAL:
            try:
                self._fs.pipe_file(full, data, mode="create")
            except OSError:
                refused = True
        _exclusive[self._key] = refused
        if not refused:
            log.warning(
                "ckpt: %s:// cannot create a file only if there is none: let no two jobs write to one run at the same time",
                self._scheme,
            )

    def _check_free(self, path: str) -> None:
        if self._fs.exists(self._at(path)):
            raise ConflictError(f"{self.root}/{path}: exists already")

    def _make_parent(self, full: str) -> None:
        parent = full.rpartition("/")[0]
        for left in () if self._flat else reversed(range(_TRIES)):
            try:
                self._fs.makedirs(parent, exist_ok=True)
                return
            except Exception:  # some look first and then make what somebody else has made meanwhile
                if not left and not self._fs.isdir(parent):
                    raise

    def new(self, path: str, size: int) -> Upload:
        with self._storage("looking at", path):
            self._check_free(path)
        return _Spooled(self, path, size)

    def put(self, path: str, file: IO[bytes]) -> None:
        """Sends a local file."""
        full = self._at(path)
        with self._storage("writing", path), _one_at_a_time:
            self._check_free(path)
            self._make_parent(full)
            self._fs.put_file(file.name, full)

    def _get(self, path: str, offset: int, into: Buffer) -> int:
        with self._storage("reading", path):
            full = self._at(path)
            try:
                data = self._fs.cat_file(full, start=offset, end=offset + len(into))
            except (FileNotFoundError, IsADirectoryError):
                raise FileNotFoundError(full) from None
            except Exception:
                if offset < self.size(path):  # some refuse what begins beyond the end, each in its own way
                    raise
                return 0
            into[: len(data)] = data
            return len(data)

    def read(self, path: str, offset: int, into: Sequence[Buffer]) -> None:
        check_path(path)
        n = sum(len(b) for b in into)
        got = self._ahead.read(path, offset, into)
        if got < n:
            raise self._short(path, offset + got)

    def read_just(self, path: str, offset: int, into: Sequence[Buffer]) -> None:
        n = sum(len(b) for b in into)
        data = into[0] if len(into) == 1 else memoryview(bytearray(n))
        got = self._get(check_path(path), offset, data)
        if got < n:
            raise self._short(path, offset + got)
        if len(into) != 1:
            scatter(data, into)

    def _short(self, path: str, end: int) -> IntegrityError:
        return IntegrityError(f"{self.root}/{path}: ends at byte {end}, before its checkpoint says; it was cut short")

    def fetch(self, path: str, limit: int) -> bytes:
        if self.size(path) > limit:
            raise IntegrityError(f"{self.root}/{path}: larger than {limit} bytes; not what its name says")
        with self._storage("reading", path):
            return bytes(self._fs.cat_file(self._at(path)))

    def size(self, path: str) -> int:
        with self._storage("looking at", path):
            info = self._fs.info(self._at(path))
            if info["type"] == "directory":
                raise NotFoundError(f"{self.root}/{path}: is a folder")
            return self._ahead.told(path, int(info["size"]))

    def list(self, prefix: str) -> list[Entry]:
        base = self._at(prefix) if prefix else self._base
        out = []
        with self._storage("listing", prefix):
            try:
                found = self._fs.ls(base, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []
            for info in found:
                above, _, name = info["name"].rstrip("/").rpartition("/")
                if name and above.rstrip("/").endswith(base.rstrip("/")):
                    folder = info["type"] == "directory"
                    out.append(Entry(name, folder, int(info.get("size") or 0), _modified(info)))
        return sorted(out, key=lambda e: e.name)

    def delete(self, path: str) -> None:
        full = self._at(path)
        with self._storage("deleting", path):
            self._ahead.forget(path)
            with suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
                if self._flat or not self._fs.isdir(full):
                    self._fs.rm_file(full)
                    full = full.rpartition("/")[0]
            while not self._flat and len(full) > len(self._base):
                try:
                    if self._fs.ls(full, detail=False):
                        break
                    self._fs.rmdir(full)
                except Exception:
                    break
                full = full.rpartition("/")[0]

    def close(self) -> None:
        self._ahead.close()


def _modified(info: Mapping[str, Any]) -> float:
    """When a file was changed, under whichever name a filesystem tells it; 0.0 if it does not."""
    for name in ("mtime", "LastModified", "last_modified", "updated", "modified", "created"):
        when = info.get(name)
        if isinstance(when, str):
            with suppress(ValueError):
                when = datetime.datetime.fromisoformat(when)
        if isinstance(when, datetime.datetime):
            return when.timestamp() if when.tzinfo else when.replace(tzinfo=datetime.UTC).timestamp()
        if isinstance(when, int | float):
            return float(when)
    return 0.0 if info["type"] == "directory" else time.time()


class _Spooled:
    """An object being put together: in memory while it is small, else in a file of this host."""

    def __init__(self, backend: FsspecBackend, path: str, size: int) -> None:
        self._backend, self._path, self._size = backend, path, size
        self._data = bytearray(size if size <= _SMALL else 0)
        self._file = tempfile.NamedTemporaryFile(prefix="ckpt-upload-") if size > _SMALL else None  # noqa: SIM115

    def write(self, offset: int, data: Buffer) -> None:
        if self._file is None:
            self._data[offset : offset + len(data)] = data
            return
        with self._backend._storage("writing the temporary file of", self._path):
            while len(data):
                n = os.pwrite(self._file.fileno(), data, offset)
                data, offset = data[n:], offset + n

    def finish(self, size: int | None = None) -> None:
        if self._file is None:
            self._backend.create(self._path, bytes(self._data[:size]))
            return
        with self._file:
            os.ftruncate(self._file.fileno(), self._size if size is None else size)
            self._backend.put(self._path, self._file)

    def abort(self) -> None:
        self._data = bytearray()
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
