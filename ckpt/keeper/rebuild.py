"""Parts of a step that were lost with their hosts, decoded from what the others of their group hold: range by range, as
they are read.

A range of a lost chunk is solved for from the same ranges of `data` other chunks of its stripe, parity or data, which come
from as many hosts at once while the ones before are decoded. Nothing is kept: a thread that reads needs some MiB.

A host that fails while it is read counts as lost from then on. A block that is not what was written is an erasure:
`otherwise` goes through the ways to have the same bytes without one host or another, until the reader is content.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol

import numpy as np

from ckpt.errors import CkptError, IntegrityError, NotFoundError
from ckpt.keeper.erasure import Code
from ckpt.keeper.groups import Group

__all__ = ["Share", "Store", "Stripes"]

_SLICE = 1 << 20  # bytes of one chunk that are decoded at once; smaller ones cost more switches between processes
_SCRATCH = 8 << 20  # of a thread, for a slice of each chunk that one is decoded from
_AHEAD = 8 << 20  # bytes to decode that are asked for ahead, half of them at once
_WAYS = 64  # of a damaged block, at most

_code = cache(Code)


class Store(Protocol):
    """One host's share of a step, as one thread reads it: what is asked for comes in that order.

    Raises PeerError, NotFoundError or DeadlineError where it cannot be had, IntegrityError where these bytes are not what
    they were; the store is of no use then.
    """

    def ask(self, parity: bool, offset: int, length: int) -> None:
        """Bytes of the host's segment of the step, or of its parity area."""
        ...

    def take(self, into: memoryview) -> None:
        """The bytes that were asked for first and have not been taken."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Share:
    """What a host has of a step, its part, its parity or both; `open` is called once by each thread. `near`: on this
    host, so that reading it is cheaper than reading another."""

    open: Callable[[], Store]
    part: bool
    parity: bool
    near: bool = False


@dataclass(frozen=True)
class _Piece:
    """Where a slice of a chunk is to be had: `length` bytes at `offset` of a host's segment or parity area."""

    number: int
    host: str
    parity: bool
    offset: int
    length: int


@dataclass(frozen=True)
class _Slice:
    """Bytes of one data chunk, `wanted` in its stripe, and the pieces to solve for it."""

    wanted: int
    into: memoryview
    pieces: tuple[_Piece, ...]


class _Part(NamedTuple):
    """Bytes `lo` to `hi` of data chunk `number` of a stripe, and where they go."""

    stripe: int
    number: int
    lo: int
    hi: int
    into: memoryview


class _Failed(Exception):
    def __init__(self, host: str, why: CkptError) -> None:
        super().__init__(host)
        self.host, self.why = host, why


class Stripes:
    """What is left of a group's stripes: `shares` by host. Any thread may read; all of them close with `close`."""

    def __init__(self, group: Group, shares: Mapping[str, Share]) -> None:
        self._group, self._shares = group, dict(shares)
        self._failed: dict[str, CkptError] = {}
        self._own = threading.local()
        self._open: list[Store] = []
        self._counting = threading.Lock()
        self.moved = 0  # bytes that came from other hosts
        most = _SCRATCH // max(1, group.data)
        self._slice = max(4096, min(_SLICE, most // 4096 * 4096))

    def fail(self, host: str, why: CkptError) -> None:
        """Does without a host from now on."""
        self._failed.setdefault(host, why)

    def read(self, host: str, wanted: Sequence[tuple[int, Sequence[memoryview]]]) -> None:
        """Fills the buffers of several ranges with bytes of a host's segment, decoded. NotFoundError if too few hosts are
        left for that."""
        parts = [part for offset, into in wanted for part in self._cut(host, offset, into)]
        while True:
            try:
                return self._fetch(self._slices(parts, {host, *self._failed}))
            except _Failed as e:
                if isinstance(e.why, IntegrityError):
                    break
                self.fail(e.host, e.why)
        for part in parts:  # what is damaged is so in one place; elsewhere it may be what others are decoded from
            self._read_one(host, part)

    def _read_one(self, host: str, part: _Part) -> None:
        damaged = set[str]()
        while True:
            try:
                return self._fetch(self._slices([part], {host, *self._failed, *damaged}))
            except _Failed as e:
                if isinstance(e.why, IntegrityError):
                    damaged.add(e.host)
                else:
                    self.fail(e.host, e.why)

    def otherwise(self, host: str, offset: int, into: memoryview) -> Iterator[str]:
        """Fills the buffer by one way after the other: without one host or more than one, where others make up for them.
        Says which, as "decoded without h1"."""
        parts, seen = list(self._cut(host, offset, [into])), set()
        for without in itertools.islice(self._subsets(host), _WAYS):
            left_out = {host, *without, *self._failed}
            with suppress(NotFoundError):
                plan = tuple(self._slices(parts, left_out))
                used = tuple(s.pieces for s in plan)
                if used in seen:
                    continue
                seen.add(used)
                try:
                    self._fetch(iter(plan))
                except _Failed as e:
                    if not isinstance(e.why, IntegrityError):
                        self.fail(e.host, e.why)
                    continue
                yield f"decoded without {', '.join(sorted({host, *without}))}"

    def close(self) -> None:
        for store in self._open:
            store.close()
        self._open.clear()

    def _subsets(self, host: str) -> Iterator[tuple[str, ...]]:
        """Of the other hosts, those that may be left out at once: few first."""
        others = sorted(self._shares.keys() - {host} - self._failed.keys())
        for n in range(self._group.parity + 1):
            yield from itertools.combinations(others, n)

    # A range is cut where its chunks end, and into slices.

    def _cut(self, host: str, offset: int, into: Sequence[memoryview]) -> Iterator[_Part]:
        chunks = [c for c in self._group.shares[host].chunks if c.stop > c.start]
        for buffer in into:
            buffer, end = buffer.cast("B"), offset + buffer.nbytes
            covered = 0
            for c in chunks:
                first, last = max(offset, c.start), min(end, c.stop)
                covered += max(0, last - first)
                for at in range(first, last, self._slice):
                    n = min(self._slice, last - at)
                    yield _Part(c.stripe, c.number, at - c.start, at - c.start + n, buffer[at - offset :][:n])
            if covered != end - offset:
                raise NotFoundError(f"{host} is not protected: no other host has parity of what it held")
            offset = end

    def _slices(self, parts: Sequence[_Part], without: Collection[str]) -> Iterator[_Slice]:
        for p in parts:
            yield _Slice(p.number, p.into, self._pieces(p.stripe, p.number, p.lo, p.hi, without))

    def _pieces(self, stripe: int, wanted: int, lo: int, hi: int, without: Collection[str]) -> tuple[_Piece, ...]:
        """The cheapest pieces that are enough: those without bytes, of this host, data, parity."""
        found: list[tuple[tuple[bool, bool, bool], _Piece]] = []
        of = self._group.stripes[stripe]
        for number, (host, start, stop) in enumerate(of.data):
            nbytes = max(0, min(hi, stop - start) - lo)
            share = self._shares.get(host)
            if number != wanted and (not nbytes or (share and share.part and host not in without)):
                near = share is not None and share.near
                found.append(((nbytes > 0, not near, False), _Piece(number, host, False, start + lo, nbytes)))
        for row, (host, offset, _) in enumerate(of.parity):
            share = self._shares.get(host)
            if share and share.parity and host not in without:
                piece = _Piece(self._group.data + row, host, True, offset + lo, hi - lo)
                found.append(((True, not share.near, True), piece))
        if len(found) < self._group.data:
            raise NotFoundError(self._too_few(without))
        return tuple(piece for _, piece in sorted(found, key=lambda f: (f[0], f[1].number))[: self._group.data])

    def _too_few(self, without: Collection[str]) -> str:
        gone = {h.name: "gone" for h in self._group.hosts if h.name not in self._shares}
        gone |= {h: str(e) for h, e in self._failed.items()}
        gone |= {h: "left out" for h in without if h not in gone}
        said = "; ".join(f"{h}: {why}" for h, why in sorted(gone.items())[:5])
        return f"fewer than {self._group.data} of {len(self._group.hosts)} hosts of a group are left to decode from ({said})"

    # Slices are asked for ahead, taken in order.

    def _fetch(self, slices: Iterator[_Slice]) -> None:
        code, asked, ahead = _code(self._group.data, self._group.parity), deque[_Slice](), 0
        scratch = self._scratch()
        try:
            for s in slices:
                for piece in s.pieces:
                    if piece.length:
                        self._at(piece.host, lambda store, p=piece: store.ask(p.parity, p.offset, p.length))  # type: ignore[misc]
                asked.append(s)
                ahead += len(s.into)
                if ahead >= _AHEAD:
                    while ahead > _AHEAD // 2:
                        ahead -= len(asked[0].into)
                        self._take(asked.popleft(), code, scratch)
            while asked:
                self._take(asked.popleft(), code, scratch)
        except BaseException:
            self._hang_up()  # answers may be on their way that nobody waits for
            raise

    def _take(self, s: _Slice, code: Code, scratch: Sequence[memoryview]) -> None:
        present: dict[int, memoryview] = {}
        moved = 0
        for piece, room in zip(s.pieces, scratch, strict=True):
            present[piece.number] = room[: piece.length]
            if piece.length:
                self._at(piece.host, lambda store, p=piece: store.take(present[p.number]))  # type: ignore[misc]
                moved += 0 if self._shares[piece.host].near else piece.length
        with self._counting:
            self.moved += moved
        code.decode(present, {s.wanted: s.into})

    def _at(self, host: str, act: Callable[[Store], None]) -> None:
        """Something with this thread's own line to a host."""
        lines: dict[str, Store] = self._lines()
        try:
            if host not in lines:
                lines[host] = self._shares[host].open()
                self._open.append(lines[host])
            act(lines[host])
        except CkptError as e:
            raise _Failed(host, e) from e

    def _lines(self) -> dict[str, Store]:
        if not hasattr(self._own, "lines"):
            self._own.lines = {}
        lines: dict[str, Store] = self._own.lines
        return lines

    def _hang_up(self) -> None:
        lines = self._lines()
        for store in lines.values():
            store.close()
        lines.clear()

    def _scratch(self) -> list[memoryview]:
        """This thread's memory for the pieces of one slice."""
        if not hasattr(self._own, "scratch"):
            memory = memoryview(np.empty(self._group.data * self._slice, dtype=np.uint8))
            self._own.scratch = [memory[i * self._slice :][: self._slice] for i in range(self._group.data)]
        scratch: list[memoryview] = self._own.scratch
        return scratch
