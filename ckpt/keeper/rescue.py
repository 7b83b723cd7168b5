"""The newest step of a job that is gone with some of its hosts, written to storage out of what the others hold.

    the lead's keeper is left     it does so where it would have had the keepers of lost hosts write (`of`)
    it is not                     every keeper without trainers looks at what the others hold, again and again; the first by
                                  name of those that have a part of the newest step does it, so that one that dies at it
                                  has a successor (`look`)

Which step, and how lost packs are decoded, is what a restart would do, by the same code; nothing is pinned, since a life that
begins meanwhile goes first: what it takes away does not check. One pack at a time is put together in memory, its blocks are
checked against what its trainer sealed, and it is written and committed like any other. Two that do it at once, on either side
of a cut network, disturb each other as little as two saves of one step do: one of them commits.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from ckpt import faults
from ckpt.backends import Backend
from ckpt.catalog import drop_attempt
from ckpt.collective import Solo
from ckpt.commit import Commit, claim_attempt
from ckpt.config import Settings
from ckpt.errors import CkptError, ConflictError, IntegrityError, NotFoundError
from ckpt.format.codec import Codec, crc32c
from ckpt.keeper.holding import Held, Intact, Memory, commit_held, write_packs
from ckpt.keeper.lead import Key
from ckpt.keeper.loan import Loans
from ckpt.keeper.loop import Loop
from ckpt.keeper.opening import PATIENCE, packs_of
from ckpt.keeper.protocol import Frame
from ckpt.keeper.recall import Step, recall
from ckpt.keeper.seat import Life
from ckpt.keeper.source import Line, LocalPack, Pack
from ckpt.keeper.uplink import Uplink
from ckpt.write import PackReport, Ring

__all__ = ["Rescue", "Wreck", "rescue"]

log = logging.getLogger("ckpt.keeper")
_FIRST = 2.0  # seconds in which a lead that is only restarted would be there again
_AGAIN = 5.0  # seconds until the others are looked at again
_MINE = 10.0  # seconds in which the own loop has to answer


@dataclass(frozen=True)
class Wreck:
    """What the keeper of `host` knows of a job. `reach`: where keepers listen, by host, this one among them; `held`: what it
    knows of the steps in memory."""

    host: str
    reach: Mapping[str, tuple[str, int]]
    secret: bytes
    held: Mapping[Key, Held]
    backend: Backend
    codecs: tuple[tuple[str, Codec], ...]
    config: Settings


class Rescue:
    """Of one keeper. `life` that is under way; `work` runs a function in the storage thread, and has a second one told the
    result, in the loop."""

    def __init__(
        self,
        host: str,
        config: Settings,
        loop: Loop,
        uplink: Uplink,
        held: Mapping[Key, Held],
        life: Callable[[], Life | None],
        work: Callable[[Callable[[], Any], Callable[[Any], None]], None],
    ) -> None:
        self._host, self._config, self._loop, self._uplink = host, config, loop, uplink
        self._held, self._life, self._work = held, life, work
        self._looking = False

    def of(self, held: Held) -> Callable[[], Any] | None:
        """For the lead: what writes a step, in the storage thread; None if the keepers of all of its parts are there."""
        there = {self._host, *(p.host for p in self._loop.peers if p.role == "host")}
        if there >= set(held.hosts.values()):
            return None
        wreck = self._wreck()
        return lambda: rescue(wreck, (held.generation, held.step))

    def _wreck(self) -> Wreck:
        life = self._life()
        assert life is not None
        reach, backend = dict(self._uplink.addresses), life.backend(self._config.direct)
        return Wreck(self._host, reach, self._loop.secret, dict(self._held), backend, life.codecs, self._config)

    def look(self, seconds: float = _FIRST) -> None:
        """The last trainer of this host is gone, or the lead: sees, in a while, whether it is to act."""
        if not self._looking:
            self._looking = True
            self._loop.after(seconds, self._try)

    def _try(self) -> None:
        self._looking = False
        led = self._uplink.here or self._uplink.peer is not None or any(p.rank >= 0 for p in self._loop.peers)
        if self._held and not led:
            wreck = self._wreck()
            self._work(lambda: rescue(wreck), self._tried)

    def _tried(self, done: Commit | Exception | None) -> None:
        if isinstance(done, Exception):
            log.error("the newest step was not rescued: %s", done)
        if done is None or isinstance(done, Exception):
            self.look(_AGAIN)


def rescue(wreck: Wreck, key: Key | None = None) -> Commit | None:
    """Writes a step to storage, by default the newest that can be had; None if another keeper is to, or somebody has.

    Raises NotFoundError if none can be had, and what reading and writing raise.
    """

    def ask(host: str, patience: float, wanted: Callable[[], bool] = lambda: True) -> Frame:
        line = Line(wreck.reach[host], wreck.secret, patience)
        try:
            return line.ask("inventory")
        finally:
            line.close()

    others = wreck.reach.keys() - {wreck.host}
    found = recall(
        Solo(), lambda: ask(wreck.host, _MINE), others, ask, lambda: sys.maxsize
    )  # who is silent is waited for
    steps = [s for s in found.steps if s.key in wreck.held and key in (None, s.key)]
    if not steps:
        why = "; ".join(f"step {k[1]}: {said}" for k, said in found.missed[:3])
        raise NotFoundError(f"no step can be had from the memory of the hosts that are left ({why})")
    step = steps[0]
    if key is None and min(step.hosts.values(), default=wreck.host) < wreck.host:
        return None
    held = wreck.held[step.key]
    try:
        attempt, writer = claim_attempt(wreck.backend, held.folder, held.world)
    except ConflictError:
        if key is None:
            log.info("%s is in storage already", held.folder)
            return None
        raise
    try:
        reports = _write(wreck, step, held, attempt)
        faults.point("rescue written")
    except BaseException as e:
        drop_attempt(wreck.backend, held.folder, attempt, whole=isinstance(e, CkptError))
        raise
    commit = commit_held(wreck.backend, held, wreck.codecs, reports, attempt, writer, None)
    log.warning("%s was written to storage for a job that lost hosts (%d parts decoded)", held.folder, len(step.lost))
    return commit


def _write(wreck: Wreck, step: Step, held: Held, attempt: str) -> dict[int, PackReport | None]:
    """All packs, one by one: those of this host as they are, others read or decoded, wherever they are."""
    extents = {w: (size, start) for w, size, start in held.packs}
    mine = {w: held.memory[w] for w in extents if w in held.memory}
    here: dict[int, Pack] = {w: LocalPack(os.dup(m.fd), *extents[w]) for w, m in mine.items()}
    loans = Loans(step.key, wreck.secret, PATIENCE)
    packs, stripes = packs_of(step, extents, here, wreck.reach, wreck.host, loans)
    reports: dict[int, PackReport | None] = {w: None for w in held.parts if w not in extents}
    ring = _Lazy(wreck.config)

    def write(writer: int, memory: Memory) -> None:
        part = replace(held, memory={writer: memory})
        reports.update(write_packs(wreck.backend, part, attempt, wreck.codecs, wreck.config, ring))

    try:
        for writer, (size, start) in extents.items():
            faults.point("rescue pack")
            if writer in mine:
                with suppress(IntegrityError):  # damaged: it may be had from others
                    write(writer, mine[writer])
                    continue
            fd = os.memfd_create("ckpt-rescue")
            os.ftruncate(fd, start + size)
            memory = Memory(fd, start + size)
            try:
                _read(packs[writer], held, writer, memory)
                write(writer, memory)
            finally:
                memory.close()
    finally:
        for pack in packs.values():
            pack.close()
        for s in stripes:
            s.close()
        loans.close()
    return reports


class _Lazy:
    """A ring, once it is needed."""

    def __init__(self, config: Settings) -> None:
        self._config = config
        self._ring: Ring | None = None

    def __call__(self) -> Ring:
        self._ring = self._ring or Ring(self._config)
        return self._ring


def _read(pack: Pack, held: Held, writer: int, memory: Memory) -> None:
    """Fills memory as that of the writer's rank; what is not what was sealed is looked for elsewhere. Raises IntegrityError."""
    report, view = held.parts[writer].report, memoryview(memory.writable[held.start(writer) :])
    assert report is not None
    pack.read([(0, [view])])

    def mend(start: int, end: int, crc: int) -> None:
        if crc32c(view[start:end]) == crc:
            return
        for how in pack.otherwise(start, view[start:end]):
            if crc32c(view[start:end]) == crc:
                log.warning("bytes %d to %d of pack %d were not what was written; %s", start, end, writer, how)
                return
        raise IntegrityError(f"pack {writer} of {held.folder}: bytes {start} to {end} are damaged wherever they are")

    mend(0, report.data_start, report.header_crc)
    mend(report.table_offset, report.size, report.table_crc)
    blocks = Intact(replace(held, memory={writer: memory}), writer).blocks
    for start, end, crc in zip(*(column.tolist() for column in blocks), strict=True):
        mend(start, end, crc)
