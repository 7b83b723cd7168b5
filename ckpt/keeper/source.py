"""A step in the memory of keepers, as a place to read a checkpoint from: the loader sees a backend like any other."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from ckpt.backends.base import Buffer, Entry, Upload
from ckpt.errors import DeadlineError, IntegrityError, NotFoundError, PeerError, UsageError, from_wire
from ckpt.keeper.loan import Loans
from ckpt.keeper.protocol import Frame, frame, greet, receive, send
from ckpt.keeper.rebuild import Stripes

__all__ = ["Line", "LocalPack", "Pack", "RemotePack", "SharedPack", "SnapshotBackend"]

log = logging.getLogger("ckpt")
_RANGE = 8 << 20


Range = tuple[int, Sequence[Buffer]]
"""Where bytes begin, and the buffers that they go to, one after the other."""


class Pack(Protocol):
    """One pack. `read` fills the buffers of several ranges, which are asked for at once where that takes a network."""

    @property
    def size(self) -> int: ...

    def read(self, wanted: Sequence[Range]) -> None: ...

    def otherwise(self, offset: int, into: Buffer) -> Iterator[str]:
        """See `ckpt.backends.base.Redundant`."""
        ...

    @property
    def moved(self) -> int:
        """Bytes that came from other hosts until now."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class LocalPack:
    """In sealed memory of this host, from byte `start` on; `mapped` is all of it, where this process has that mapped and
    touched: a copy from there takes about two thirds of the time of a read."""

    fd: int
    size: int
    start: int = 0
    mapped: npt.NDArray[np.uint8] | None = None

    def read(self, wanted: Sequence[Range]) -> None:
        for offset, into in wanted:
            at, end = self.start + offset, self.start + offset + sum(len(b) for b in into)
            if self.mapped is not None and end <= len(self.mapped):
                for buffer in into:
                    np.copyto(np.frombuffer(buffer, dtype=np.uint8), self.mapped[at : at + len(buffer)])
                    at += len(buffer)
            elif os.preadv(self.fd, into, at) != end - at:
                raise IntegrityError(f"memory of this host: ends before byte {end - self.start}")

    def otherwise(self, offset: int, into: Buffer) -> Iterator[str]:
        yield from ()

    @property
    def moved(self) -> int:
        return 0

    def close(self) -> None:
        os.close(self.fd)


class Line:
    """A connection to the keeper of another host, for questions. `patience`: seconds that may pass without a byte. Every
    method raises PeerError, DeadlineError or what the keeper refused with; the line is of no use then."""

    def __init__(self, address: tuple[str, int], secret: bytes, patience: float) -> None:
        self._sock, self._line = greet(address, secret, patience)

    def ask(self, kind: str, **head: Any) -> Frame:
        """The answer to a question."""
        send(self._sock, frame(kind, id=0, **head))
        answer = receive(self._sock, self._line)
        if answer.kind == "refused":
            raise from_wire(*answer["error"])
        return answer

    def close(self) -> None:
        self._line.close()


class RemotePack:
    """The pack of a writer in the care of another host's keeper."""

    def __init__(self, writer: int, size: int, address: tuple[str, int], loans: Loans) -> None:
        self.size, self.moved = size, 0
        self._writer, self._address, self._loans = writer, address, loans
        self._counting = threading.Lock()

    def read(self, wanted: Sequence[Range]) -> None:
        loan, parts = self._loans.at(self._address), list[Buffer]()
        for offset, into in wanted:
            for buffer in into:
                for at in range(0, len(buffer), _RANGE):
                    part = buffer[at : at + _RANGE]
                    loan.ask(self._writer, offset + at, len(part))
                    parts.append(part)
                offset += len(buffer)
        for part in parts:
            loan.take(part)
        with self._counting:
            self.moved += sum(map(len, parts))

    def otherwise(self, offset: int, into: Buffer) -> Iterator[str]:
        self.read([(offset, [into])])
        yield "sent once more"

    def close(self) -> None:
        """Its loans are closed by who made them."""


class SharedPack:
    """A pack of a host whose group has parity of it: read where it is, if it is anywhere (`direct`), else decoded.

    It begins at byte `base` of the host's segment.
    """

    def __init__(self, size: int, host: str, base: int, stripes: Stripes, direct: Pack | None) -> None:
        self.size, self._host, self._base = size, host, base
        self._stripes, self._direct = stripes, direct
        self._lost = direct is None

    def read(self, wanted: Sequence[Range]) -> None:
        if self._direct is not None and not self._lost:
            try:
                return self._direct.read(wanted)
            except (PeerError, DeadlineError, NotFoundError, IntegrityError) as e:
                log.error("ckpt: what %s holds is decoded from the memory of others: %s", self._host, e)
                self._stripes.fail(self._host, e)
                self._lost = True
        self._stripes.read(self._host, [(self._base + offset, into) for offset, into in wanted])

    def otherwise(self, offset: int, into: Buffer) -> Iterator[str]:
        if self._direct is not None and not self._lost:
            with suppress(PeerError, DeadlineError, NotFoundError, IntegrityError):
                yield from self._direct.otherwise(offset, into)
        yield from self._stripes.otherwise(self._host, self._base + offset, into)

    @property
    def moved(self) -> int:
        return 0 if self._direct is None else self._direct.moved

    def close(self) -> None:
        if self._direct is not None:
            self._direct.close()


class SnapshotBackend:
    """One step, read-only: small objects as they are, and packs, by path. The packs, the stripes that some of them are
    decoded from, and what both are lent over are closed with the backend."""

    def __init__(
        self,
        root: str,
        objects: Mapping[str, bytes],
        packs: Mapping[str, Pack],
        stripes: Sequence[Stripes],
        loans: Loans,
    ) -> None:
        self.root = root
        self._objects, self._packs, self._stripes, self._loans = dict(objects), dict(packs), stripes, loans
        self._moved = 0

    def read(self, path: str, offset: int, into: Sequence[Buffer]) -> None:
        self.read_many([(path, offset, into)])

    def read_many(self, wanted: Sequence[tuple[str, int, Sequence[Buffer]]]) -> None:
        """See `ckpt.backends.base.ReadsMany`."""
        by_path: dict[str, list[Range]] = {}
        for path, offset, into in wanted:
            size = self._pack(path).size
            if offset + sum(len(b) for b in into) > size:
                raise IntegrityError(f"{self.root}/{path}: is only {size} bytes long")
            by_path.setdefault(path, []).append((offset, into))
        for path, ranges in by_path.items():
            self._pack(path).read(ranges)

    def otherwise(self, path: str, offset: int, into: Buffer) -> Iterator[str]:
        yield from self._pack(path).otherwise(offset, into)

    @property
    def moved(self) -> int:
        """Bytes that came from other hosts until now."""
        return self._moved + sum(p.moved for p in self._packs.values()) + sum(s.moved for s in self._stripes)

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
        self._moved = self.moved
        for pack in self._packs.values():
            pack.close()
        self._loans.close()
        self._packs, self._stripes = {}, ()

    def create(self, path: str, data: bytes) -> None:
        self._refuse()

    def new(self, path: str, size: int) -> Upload:
        self._refuse()

    def delete(self, path: str) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UsageError(f"{self.root}: a step in memory can only be read")
