"""A step in the memory of keepers, as a place to read a checkpoint from: the loader sees a backend like any other."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol

from ckpt.backends.base import Buffer, Entry, Upload
from ckpt.config import settings
from ckpt.errors import IntegrityError, NotFoundError, UsageError
from ckpt.keeper.protocol import Connection, frame, greet, receive, send

__all__ = ["LocalPack", "Pack", "RemotePack", "SnapshotBackend"]

_RANGE = 8 << 20


class Pack(Protocol):
    """One pack: `read` fills the buffers from `offset` on."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, into: Sequence[Buffer]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class LocalPack:
    """In sealed memory of this host."""

    fd: int
    size: int

    def read(self, offset: int, into: Sequence[Buffer]) -> None:
        if os.preadv(self.fd, into, offset) != sum(len(b) for b in into):
            raise IntegrityError(f"memory of this host: ends before byte {offset + sum(len(b) for b in into)}")

    def close(self) -> None:
        os.close(self.fd)


class RemotePack:
    """In the care of another host's keeper; every thread that reads has a connection of its own.

    `pack`: generation, step, rank.
    """

    def __init__(self, pack: tuple[int, int, int], size: int, address: tuple[str, int], secret: bytes) -> None:
        self.size = size
        self._pack, self._address, self._secret = pack, address, secret
        self._own = threading.local()
        self._open: list[Connection] = []

    def read(self, offset: int, into: Sequence[Buffer]) -> None:
        if not hasattr(self._own, "line"):
            self._own.line = greet(self._address, self._secret, settings().deadline)
            self._open.append(self._own.line[1])
        sock, line = self._own.line
        for buffer in into:
            for at in range(0, len(buffer), _RANGE):
                part = buffer[at : at + _RANGE]
                send(sock, frame("range", id=0, pack=self._pack, offset=offset, length=len(part)))
                answer = receive(sock, line)
                if answer.kind != "answer" or len(answer.payload) != len(part):
                    raise NotFoundError(
                        f"rank {self._pack[2]} of step {self._pack[1]} cannot be had from {self._address[0]}: "
                        f"{answer.head.get('error', 'a short answer')}"
                    )
                part[:] = answer.payload
                offset += len(part)

    def close(self) -> None:
        for line in self._open:
            line.close()


class SnapshotBackend:
    """One step, read-only: small objects as they are, and packs, by path. The packs are closed with the backend."""

    def __init__(self, root: str, objects: Mapping[str, bytes], packs: Mapping[str, Pack]) -> None:
        self.root = root
        self._objects, self._packs = dict(objects), dict(packs)

    def read(self, path: str, offset: int, into: Sequence[Buffer]) -> None:
        pack = self._pack(path)
        if offset + sum(len(b) for b in into) > pack.size:
            raise IntegrityError(f"{self.root}/{path}: is only {pack.size} bytes long")
        pack.read(offset, into)

    def fetch(self, path: str, limit: int) -> bytes:
        if path not in self._objects:
            raise NotFoundError(f"{self.root}/{path}: not in memory")
        data = self._objects[path]
        if len(data) > limit:
            raise IntegrityError(f"{self.root}/{path}: {len(data)} bytes, at most {limit} were expected")
        return data

    def size(self, path: str) -> int:
        return len(self._objects[path]) if path in self._objects else self._pack(path).size

    def _pack(self, path: str) -> Pack:
        if path not in self._packs:
            raise NotFoundError(f"{self.root}/{path}: not in the memory of the keepers")
        return self._packs[path]

    def list(self, path: str) -> list[Entry]:
        return [Entry(p, False, self.size(p), 0.0) for p in [*self._objects, *self._packs] if p.startswith(path)]

    def close(self) -> None:
        for pack in self._packs.values():
            pack.close()
        self._packs = {}

    def create(self, path: str, data: bytes) -> None:
        self._refuse()

    def new(self, path: str, size: int) -> Upload:
        self._refuse()

    def delete(self, path: str) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UsageError(f"{self.root}: a step in memory can only be read")
