"""Objects in this process: the model that tests hold the other backends against. `memory://name` shares one store."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import ClassVar

from ckpt.backends.base import Buffer, Entry, check_path
from ckpt.errors import ConflictError, IntegrityError, NotFoundError

__all__ = ["MemoryBackend"]


class MemoryBackend:
    """Objects below `root` in a store that lives as long as the process."""

    _stores: ClassVar[dict[str, tuple[bytes, float]]] = {}
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")

    def _at(self, path: str) -> str:
        return f"{self.root}/{check_path(path)}"

    def create(self, path: str, data: bytes) -> None:
        with self._lock:
            if self._at(path) in self._stores:
                raise ConflictError(f"memory://{self._at(path)}: exists already")
            self._stores[self._at(path)] = (bytes(data), time.time())

    def new(self, path: str, size: int) -> _MemoryUpload:
        with self._lock:
            if self._at(path) in self._stores:
                raise ConflictError(f"memory://{self._at(path)}: exists already")
        return _MemoryUpload(self, path, size)

    def read(self, path: str, offset: int, into: Sequence[Buffer]) -> None:
        data = self._get(path)
        for view in into:
            part = data[offset : offset + len(view)]
            if len(part) != len(view):
                raise IntegrityError(f"memory://{self._at(path)}: ends at byte {offset + len(part)}")
            view[:] = part
            offset += len(view)

    def fetch(self, path: str, limit: int) -> bytes:
        data = self._get(path)
        if len(data) > limit:
            raise IntegrityError(f"memory://{self._at(path)}: larger than {limit} bytes")
        return data

    def size(self, path: str) -> int:
        return len(self._get(path))

    def list(self, prefix: str) -> list[Entry]:
        base = f"{self._at(prefix)}/" if prefix else f"{self.root}/"
        found: dict[str, Entry] = {}
        with self._lock:
            for key, (data, modified) in self._stores.items():
                if key.startswith(base):
                    name, _, below = key[len(base) :].partition("/")
                    if below:
                        found[name] = Entry(name, True, 0, modified)
                    else:
                        found[name] = Entry(name, False, len(data), modified)
        return [found[name] for name in sorted(found)]

    def delete(self, path: str) -> None:
        with self._lock:
            self._stores.pop(self._at(path), None)

    def close(self) -> None:
        pass

    def _get(self, path: str) -> bytes:
        with self._lock:
            try:
                return self._stores[self._at(path)][0]
            except KeyError:
                raise NotFoundError(f"memory://{self._at(path)}: does not exist") from None


class _MemoryUpload:
    def __init__(self, backend: MemoryBackend, path: str, size: int) -> None:
        self._backend, self._path = backend, path
        self._data = bytearray(size)

    def write(self, offset: int, data: Buffer) -> None:
        self._data[offset : offset + len(data)] = data

    def finish(self, size: int | None = None) -> None:
        self._backend.create(self._path, bytes(self._data[:size]))

    def abort(self) -> None:
        self._data.clear()
