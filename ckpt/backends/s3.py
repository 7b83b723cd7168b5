"""Objects in an S3-compatible store. Nothing is renamed, nothing is copied, and no answer is taken for granted.

Create-only-if-absent is one PUT with `If-None-Match: *` that carries a write id: where the answer is lost, or says that
the name is taken, the object is asked whose it is. The completion of a multipart upload is not conditional: some stores
ignore the condition without a word. So what must be exclusive goes through `create`.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from ckpt.backends.ahead import Ahead
from ckpt.backends.base import Buffer, Entry, Unfinished, Upload, check_path
from ckpt.backends.parts import Parts
from ckpt.backends.s3_client import Client, Unserved, client_for, skew
from ckpt.errors import CkptError, ConflictError, IntegrityError, NotFoundError, StorageError, UsageError

__all__ = ["SMALL", "S3Backend"]

Uploads = list[Unfinished]  # the class below has a `list` of its own

log = logging.getLogger("ckpt")
SMALL = 8 << 20
"""Objects up to this size are one request, and wait in memory for it."""

_WRITE = "ckpt-write"
_ABORT = 10.0
_one_at_a_time = threading.Lock()


class S3Backend:
    """Objects whose keys begin with the path of `url` ("s3://bucket/path"). `options`: see `s3_client.Client`."""

    def __init__(self, url: str, options: Mapping[str, Any] | None = None, client: Client | None = None) -> None:
        bucket, _, prefix = url.partition("://")[2].partition("/")
        if not bucket:
            raise UsageError(f"{url!r}: name a bucket, as in s3://bucket/run")
        self._bucket, self._prefix = bucket, prefix.strip("/")
        self.root = f"s3://{bucket}/{self._prefix}".rstrip("/")
        self._client = client or client_for(options or {})
        self._ahead = Ahead(lambda path, offset, into: self._client.read(self._bucket, self._key(path), offset, [into]))

    def _key(self, path: str) -> str:
        return f"{self._prefix}/{check_path(path)}".lstrip("/")

    def _call(self, operation: str, path: str, **more: Any) -> dict[str, Any]:
        return self._client.call(operation, self._bucket, self._key(path), **more)

    def create(self, path: str, data: bytes) -> None:
        write = uuid.uuid4().hex
        known = self._client.exclusive.get(self._bucket)
        if known:
            self.put(path, data, write)
            return
        with _one_at_a_time:
            if self._head(path) is not None:
                raise ConflictError(f"{self.root}/{path}: exists already")
            if known is None:
                known = self._try_out(path, data, write)
                if known:
                    return
            self._put(path, data, write)

    def _try_out(self, path: str, data: bytes, write: str) -> bool:
        """The first create in a bucket, twice over: does the store refuse the second? If so, the first was good."""
        refused = False
        try:
            self.put(path, data, write)
            self._put(path, data, write, IfNoneMatch="*")
        except ConflictError:
            if self.written_by(path) != write:
                self._client.exclusive[self._bucket] = True
                raise
            refused = True
        except Unserved:
            pass
        self._client.exclusive[self._bucket] = refused
        if not refused:
            log.warning(
                "ckpt: the store of bucket %r cannot create an object only if there is none: let no two jobs write to one "
                "run at the same time",
                self._bucket,
            )
        return refused

    def put(self, path: str, data: bytes | Buffer, write: str) -> None:
        """Creates an object only if there is none, as the write `write`. ConflictError if there is one of another."""
        try:
            self._put(path, data, write, IfNoneMatch="*")
        except Unserved:
            raise
        except ConflictError:  # perhaps with ourselves: the answer to a first request was lost, and it was repeated
            if self.written_by(path) != write:
                raise
        except StorageError:
            with suppress(CkptError):
                if self.written_by(path) == write:
                    return
            raise

    def _put(self, path: str, data: bytes | Buffer, write: str, **more: Any) -> None:
        body = {"body": data} if isinstance(data, memoryview) else {"Body": data}
        self._call("put_object", path, Metadata={_WRITE: write}, **body, **more)

    def _head(self, path: str) -> dict[str, Any] | None:
        try:
            return self._call("head_object", path)
        except NotFoundError:
            return None

    def written_by(self, path: str) -> str | None:
        """The id of the write that made an object; None if there is no object, or it has none."""
        found = self._head(path)
        return None if found is None else found.get("Metadata", {}).get(_WRITE)

    def new(self, path: str, size: int) -> Upload:
        if self._head(path) is not None:
            raise ConflictError(f"{self.root}/{path}: exists already")
        return _Small(self, path, size) if size <= SMALL else _Multipart(self, path, size)

    def read(self, path: str, offset: int, into: Sequence[Buffer]) -> None:
        check_path(path)
        n = sum(len(b) for b in into)
        got = self._ahead.read(path, offset, into)
        if got < n:
            raise self._short(path, offset + got)

    def read_just(self, path: str, offset: int, into: Sequence[Buffer]) -> None:
        got = self._client.read(self._bucket, self._key(path), offset, into)
        if got < sum(len(b) for b in into):
            raise self._short(path, offset + got)

    def _short(self, path: str, end: int) -> IntegrityError:
        return IntegrityError(f"{self.root}/{path}: ends at byte {end}, before its checkpoint says; it was cut short")

    def fetch(self, path: str, limit: int) -> bytes:
        data = self._client.fetch(self._bucket, self._key(path), limit)
        if data is None:
            raise IntegrityError(f"{self.root}/{path}: larger than {limit} bytes; not what its name says")
        return data

    def size(self, path: str) -> int:
        return self._ahead.told(path, int(self._call("head_object", path)["ContentLength"]))

    def list(self, prefix: str) -> list[Entry]:
        base = f"{self._key(prefix)}/" if prefix else f"{self._prefix}/".lstrip("/")
        out: list[Entry] = []
        more: dict[str, Any] = {}
        while True:
            page = self._client.call("list_objects_v2", self._bucket, base, Prefix=base, Delimiter="/", **more)
            ahead = skew(page)
            out += [Entry(p["Prefix"][len(base) : -1], True, 0, 0.0) for p in page.get("CommonPrefixes", ())]
            for o in page.get("Contents", ()):
                if len(o["Key"]) > len(base):
                    modified = o["LastModified"].timestamp() + ahead
                    out.append(Entry(o["Key"][len(base) :], False, int(o["Size"]), modified))
            if not page.get("IsTruncated"):
                return sorted(out, key=lambda e: e.name)
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, path: str) -> None:
        self._call("delete_object", path)
        self._ahead.forget(path)

    def close(self) -> None:
        self._ahead.close()

    def unfinished(self) -> Uploads:
        base = f"{self._prefix}/".lstrip("/")
        out = []
        more: dict[str, Any] = {}
        while True:
            page = self._client.call("list_multipart_uploads", self._bucket, base, Prefix=base, **more)
            for u in page.get("Uploads", ()):
                out.append(Unfinished(u["Key"][len(base) :], u["UploadId"], u["Initiated"].timestamp() + skew(page)))
            if not page.get("IsTruncated"):
                return out
            more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def discard(self, found: Unfinished) -> None:
        with suppress(NotFoundError):
            self._call("abort_multipart_upload", found.path, UploadId=found.upload)


class _Small:
    """An object of one request, put together in memory."""

    def __init__(self, backend: S3Backend, path: str, size: int) -> None:
        self._backend, self._path, self._data = backend, path, bytearray(size)

    def write(self, offset: int, data: Buffer) -> None:
        self._data[offset : offset + len(data)] = data

    def finish(self, size: int | None = None) -> None:
        self._backend.create(self._path, bytes(self._data[:size]))

    def abort(self) -> None:
        self._data = bytearray()


class _Multipart:
    """An object of many parts, each sent by the thread that wrote it, from the buffer it was in."""

    def __init__(self, backend: S3Backend, path: str, size: int) -> None:
        self._backend, self._path, self._size = backend, path, size
        self._write = uuid.uuid4().hex
        self._parts, self._lock = Parts(size), threading.Lock()
        self._done: dict[int, str] = {}
        self._state = "open"
        self._id = str(self._call("create_multipart_upload", Metadata={_WRITE: self._write})["UploadId"])

    def _call(self, operation: str, **more: Any) -> dict[str, Any]:
        return self._backend._call(operation, self._path, **more)

    def write(self, offset: int, data: Buffer) -> None:
        with self._lock:
            ready = self._parts.put(offset, data)
        if ready is not None:
            self._send(*ready)

    def _send(self, offset: int, data: Buffer) -> None:
        number = self._parts.number(offset)
        answer = self._call("upload_part", UploadId=self._id, PartNumber=number, body=data)
        self._done[number] = answer["ETag"]

    def finish(self, size: int | None = None) -> None:
        size = self._size if size is None else size
        for offset, data in self._parts.rest(size):
            self._send(offset, data)
        kept = {self._parts.number(a) for a in self._parts.out()}
        parts = [{"PartNumber": n, "ETag": tag} for n, tag in sorted(self._done.items()) if n in kept]
        self._state = "completing"
        try:
            self._call("complete_multipart_upload", UploadId=self._id, MultipartUpload={"Parts": parts})
        except CkptError as e:
            if self._mine(size):  # it was done, and the answer lost: the upload that is asked for again is gone
                pass
            elif isinstance(e, NotFoundError):
                raise StorageError(f"{self._backend.root}/{self._path}: somebody removed the upload; save again") from e
            else:
                raise
        self._state = "done"

    def _mine(self, size: int) -> bool:
        with suppress(CkptError):
            found = self._backend._head(self._path)
            return (
                found is not None
                and found.get("Metadata", {}).get(_WRITE) == self._write
                and found["ContentLength"] == size
            )
        return False

    def abort(self) -> None:
        state, self._state = self._state, "done"
        if state == "done":
            return
        with suppress(CkptError):
            self._call("abort_multipart_upload", UploadId=self._id, patience=_ABORT)
        if state == "completing" and self._mine(self._size):
            with suppress(CkptError):
                self._call("delete_object", patience=_ABORT)
