"""A step in the memory of keepers, as a place to read a checkpoint from: the loader sees a backend like any other."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import NoReturn

from ckpt.backends.base import Buffer, Entry, Upload
from ckpt.errors import IntegrityError, NotFoundError, UsageError

__all__ = ["SnapshotBackend"]


class SnapshotBackend:
    """One step, read-only: small objects as they are, packs in sealed memory, by path.

    `packs`: (descriptor, bytes) of each; they are closed with the backend.
    """

    def __init__(self, root: str, objects: Mapping[str, bytes], packs: Mapping[str, tuple[int, int]]) -> None:
        self.root = root
        self._objects, self._packs = dict(objects), dict(packs)

    def read(self, path: str, offset: int, into: Sequence[Buffer]) -> None:
        fd, size = self._pack(path)
        wanted = sum(len(b) for b in into)
        if offset + wanted > size or os.preadv(fd, into, offset) != wanted:
            raise IntegrityError(f"{self.root}/{path}: ends before byte {offset + wanted}")

    def fetch(self, path: str, limit: int) -> bytes:
        if path not in self._objects:
            raise NotFoundError(f"{self.root}/{path}: not in memory")
        data = self._objects[path]
        if len(data) > limit:
            raise IntegrityError(f"{self.root}/{path}: {len(data)} bytes, at most {limit} were expected")
        return data

    def size(self, path: str) -> int:
        return len(self._objects[path]) if path in self._objects else self._pack(path)[1]

    def _pack(self, path: str) -> tuple[int, int]:
        if path not in self._packs:
            raise NotFoundError(f"{self.root}/{path}: not in the memory of this host")
        return self._packs[path]

    def list(self, path: str) -> list[Entry]:
        return [Entry(p, False, self.size(p), 0.0) for p in [*self._objects, *self._packs] if p.startswith(path)]

    def close(self) -> None:
        for fd, _ in self._packs.values():
            os.close(fd)
        self._packs = {}

    def create(self, path: str, data: bytes) -> None:
        self._refuse()

    def new(self, path: str, size: int) -> Upload:
        self._refuse()

    def delete(self, path: str) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UsageError(f"{self.root}: a step in memory can only be read")
