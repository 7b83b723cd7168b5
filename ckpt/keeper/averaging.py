"""Running averages in a keeper: between a rank's "sealed" and the seat that is to hear it.

A step is folded when every earlier one that was granted is decided, so all ranks fold from the same step: the newest
complete one, or what the trainers handed over when the life began. The fold reads the snapshot's pack and the averages of
that step, and writes new ones behind the snapshot, in the same slot: nothing is ever updated in place, so a fold that is
cut short, or done twice, is as if it had not been. Rank 0 says of each step how it counts, and its keeper tells the others.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ckpt import faults
from ckpt.errors import CkptError, IntegrityError
from ckpt.format.codec import BLOCK, crc32c
from ckpt.format.dtypes import dtype
from ckpt.format.pack import PackLayout, Piece, layout_pack
from ckpt.keeper.averaged import decode_progress, encode_progress, pack_start
from ckpt.keeper.holding import Memory, pieces_of
from ckpt.keeper.protocol import Frame, frame
from ckpt.merge.average import AVERAGES, NOTES, Progress, advance
from ckpt.merge.fold import Folds, NotFinite, norm
from ckpt.merge.native import address
from ckpt.plan import Plan
from ckpt.write import PackReport, decode_report, encode_report, pack_report

__all__ = ["Averaging", "Base", "cut_of", "fold_pack"]

log = logging.getLogger("ckpt.keeper")
Bytes = npt.NDArray[np.uint8]
_THREADS = 4
_SAMPLE = 16  # the drift is measured on every so many blocks


@dataclass(frozen=True)
class Base:
    """Averages of one rank as of some step: a pack, of which only the data is looked at, and what they remember. No pack:
    averages that have not begun. `table`: checksums of the pack's blocks, where they are known."""

    pack: Bytes | None
    progress: Mapping[str, Progress]
    table: npt.NDArray[np.uint32] | None = None


@dataclass(frozen=True)
class _Cut:
    """The averages' pack of one rank under one plan. `work`: index of a piece of the snapshot, its type, and where its
    accumulators lie in the pack, one for each average: (piece in layout order, first byte)."""

    averages: tuple[str, ...]
    layout: PackLayout
    header: bytes
    work: tuple[tuple[int, str, tuple[tuple[int, int], ...]], ...]


def cut_of(plan: Plan, world: int, rank: int, averages: Sequence[str], masters: Mapping[str, str]) -> _Cut:
    """How a plan lays out the averages of a rank. `masters`: see `_Rank`."""
    hidden = set(masters.values())
    own = {
        (masters.get(p.tensor.name, p.tensor.name), p.box): k
        for k, p in enumerate(pieces_of(plan, rank, ()))
        if not p.tensor.variant and p.tensor.name not in hidden
    }
    pieces = pieces_of(plan, world + rank, ())
    layout = layout_pack(pieces)
    at: dict[int, dict[str, tuple[int, int]]] = {}
    for k, piece in enumerate(layout.pieces):
        average, leaf = _split(piece, averages)
        at.setdefault(own[leaf, piece.box], {})[average] = k, int(layout.offset[k])
    kinds = [plan.tensors[t].dtype for t in plan.tensor[plan.rows(rank)].tolist()]
    work = tuple((n, kinds[n], tuple(places[a] for a in averages)) for n, places in sorted(at.items()))
    return _Cut(tuple(averages), layout, layout.header, work)


def _split(piece: Piece, averages: Sequence[str]) -> tuple[str, str]:
    name = piece.tensor.name.removeprefix(f"{AVERAGES}.")
    average = name.partition(".")[0]
    return average, name.removeprefix(f"{average}.")


@dataclass(frozen=True)
class _Folded:
    """What came of one fold of one rank."""

    report: PackReport | None
    base: Base
    refused: str
    drift: Mapping[str, tuple[float, float]]
    digest: int  # of what it was folded into


def fold_pack(
    snapshot: Bytes, report: PackReport | None, cut: _Cut, base: Base, step: int, marks: Mapping[str, Any], into: Bytes,
    stop: threading.Event, refuse: str = "",
) -> _Folded:  # fmt: skip
    """Folds a sealed snapshot of one rank into the averages of `base`; the pack of the new ones goes into `into`.

    A snapshot that is not finite, or `refuse`, leaves the averages as they are, which is counted.
    """
    rates, progress = {}, {}
    for name, p in base.progress.items():
        mark = marks.get(name)
        rates[name], progress[name] = advance(p, step, (mark[0], mark[1]) if isinstance(mark, list) else None)
    drift = dict.fromkeys(progress, (0.0, 0.0))
    digest = crc32c(encode_progress(base.progress).encode())
    if refuse:
        due = [name for name in progress if progress[name].folds > base.progress[name].folds]
        rates = {name: 1.0 if not p.folds else 0.0 for name, p in base.progress.items()}
        progress = {
            name: replace(p, refused=p.refused + 1) if name in due else progress[name]
            for name, p in base.progress.items()
        }
    if report is None or not cut.work:
        return _Folded(None, Base(None, progress), refuse, drift, digest)
    layout, order = cut.layout, cut.averages
    table = np.empty(layout.n_blocks, dtype="<u4")
    sums, squares, rows = np.zeros((len(order), 2)), [0.0] * len(order), layout.block.tolist()
    r = [rates[name] for name in order]
    old, now = base.pack, address(into)
    here, then = address(snapshot), 0 if old is None else address(old)
    folds = Folds(r, guarded=not refuse)
    for number, kind, places in cut.work:
        at, n = int(report.offset[number]), int(report.length[number])
        item, wide = dtype(kind).itemsize, dtype(layout.pieces[places[0][0]].tensor.dtype).itemsize
        count = BLOCK // wide
        for first in range(0, n // item, count):
            if stop.is_set():
                raise InterruptedError("the life that this fold belongs to is over")
            theta = snapshot[at + first * item : at + min((first + count) * item, n)]
            lo, size = first * wide, len(theta) // item * wide
            before = [None if old is None else old[p + lo : p + lo + size] for _, p in places]
            after = [into[p + lo : p + lo + size] for _, p in places]
            block = first * wide // BLOCK
            where = here + at + first * item, [then + p + lo for _, p in places], [now + p + lo for _, p in places]
            found = folds(theta, kind, before, after, where)
            for m, (k, _) in enumerate(places):
                try:
                    squares[m], made = next(found)
                except NotFinite:
                    leaf = _split(layout.pieces[k], order)[1]
                    return fold_pack(snapshot, report, cut, base, step, marks, into, stop, f"not finite: {leaf}")
                row, read = rows[k] + block, before[m]  # while they are in the cache
                if base.table is not None and read is not None and crc32c(read) != base.table[row]:
                    raise IntegrityError(f"{layout.pieces[k].tensor.name}: in memory it is not what was folded")
                table[row] = crc32c(made)
            if block % _SAMPLE == 0 and not refuse:
                sums[:, 0] += squares
                sums[:, 1] += norm(theta, kind)
    into[: len(cut.header)] = np.frombuffer(cut.header, dtype=np.uint8)
    end = table.view(np.uint8)
    into[layout.table_offset : layout.size] = end
    for k, name in enumerate(order):
        drift[name] = float(sums[k, 0]) * (1 - r[k]) ** 2, float(sums[k, 1])
    done = pack_report(layout, cut.header, end)
    return _Folded(done, Base(into[: layout.size], progress, table), refuse, drift, digest)


@dataclass
class _Rank:
    """A rank whose steps of one plan are folded. `kept`: memory that the base lies in, if no slot."""

    plan: str
    base: Base
    kept: Memory | None
    lock: threading.Lock
    masters: Mapping[str, str]  # leaf that is folded -> leaf whose average that is, where they differ


class Averaging:
    """Lives in the keeper's loop; the folds themselves are done by threads.

    later    has the loop do something
    memory   of a rank and slot
    plan     by its key
    tell     tells the seat
    """

    def __init__(
        self,
        later: Callable[[Callable[[], None]], None],
        memory: Callable[[int, int], Memory],
        plan: Callable[[str], Plan],
        tell: Callable[[Frame], None],
    ) -> None:
        self._later, self._memory, self._plan, self._tell = later, memory, plan, tell
        self._threads: ThreadPoolExecutor | None = None
        self._world = 0
        self._ranks: dict[int, _Rank] = {}
        self._locks: dict[int, threading.Lock] = {}  # what is left of a fold of a life before ends first
        self._stop = threading.Event()
        self._open: dict[int, int] = {}  # steps granted and not decided -> slot
        self._marks: dict[int, Mapping[str, Any]] = {}
        self._waiting: dict[tuple[int, int], Frame] = {}  # by step and rank
        self._running: set[tuple[int, int]] = set()
        self._made: dict[tuple[int, int], tuple[Frame, _Folded]] = {}
        self._cuts: dict[tuple[str, int], _Cut] = {}
        self._then: list[tuple[int, Callable[[], None]]] = []
        self.busy = 0

    def begin(self, world: int) -> None:
        """A life of so many ranks begins: folds of the one before come to nothing."""
        self._world = world
        self._stop.set()
        self._stop = threading.Event()
        for rank in list(self._ranks):
            self._let_go(rank)
        for known in (self._ranks, self._open, self._marks, self._waiting, self._made, self._cuts):
            known.clear()
        self._running.clear()
        self._settle()

    def seed(self, rank: int, message: Frame) -> None:
        """A rank's averages as of where it begins, or of its new plan; none of its steps is under way."""
        self._let_go(rank)
        if self._threads is None:
            self._threads = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), "ckpt-fold", _behind)
            self._threads.submit(lambda: None).result()
        self._cuts.clear()
        memory = Memory(message.fds[0], os.fstat(message.fds[0]).st_size) if message.fds else None
        base = Base(memory.buffer if memory else None, decode_progress(str(message["progress"]), "a trainer"))
        lock = self._locks.setdefault(rank, threading.Lock())
        self._ranks[rank] = _Rank(str(message["plan"]), base, memory, lock, json.loads(message.payload or b"{}"))

    def _let_go(self, rank: int) -> None:
        known = self._ranks.pop(rank, None)
        if known is not None and known.kept is not None:
            known.kept.close()

    def obey(self, order: Frame) -> None:
        """What the seat orders, as far as it concerns folds."""
        kind = order.kind
        if kind == "grant":
            self._open[int(order["step"])] = int(order["slot"])
        elif kind == "weigh":
            self._marks[int(order["step"])] = order["marks"]
        elif kind == "refuse":
            self._refuse(int(order["step"]), str(order["why"]))
        elif kind == "rejoin":
            self._open.clear()
        elif kind == "void":
            self._decided(int(order["step"]))
        elif kind == "complete":
            self._complete(int(order["key"][1]))
        self._go()

    def sealed(self, rank: int, message: Frame) -> None:
        """A rank has sealed its part of a step. The seat hears it when that is folded; at once if nothing is to be."""
        part = Frame("sealed", {**message.head, "rank": rank}, message.payload)
        if rank not in self._ranks:
            self._tell(part)
            return
        self._waiting[int(message["step"]), rank] = part
        self._go()

    def settled(self, rank: int, action: Callable[[], None]) -> None:
        """Does something once nothing of a rank (-1: of any) is being folded."""
        self._then.append((rank, action))
        self._settle()

    def _settle(self) -> None:
        under_way = {rank for _, rank in self._running}
        ready = [t for t in self._then if not under_way or (t[0] >= 0 and t[0] not in under_way)]
        self._then = [t for t in self._then if t not in ready]
        for _, action in ready:
            action()

    def _decided(self, step: int) -> None:
        for s in [s for s in self._open if s <= step]:
            del self._open[s]
        for s in [s for s in self._marks if s <= step]:
            del self._marks[s]
        for key in [k for k in self._made if k[0] <= step]:
            del self._made[key]

    def _complete(self, step: int) -> None:
        """From now on this is what is folded into."""
        for (s, rank), (part, folded) in self._made.items():
            known = self._ranks.get(rank)
            if s == step and known is not None and known.plan == part["plan"]:
                if known.kept is not None:
                    known.kept.close()
                known.base, known.kept = folded.base, None
        self._decided(step)

    def _go(self) -> None:
        """Begins what can begin."""
        for (step, rank), part in sorted(self._waiting.items(), key=lambda item: item[0]):
            why = self._cannot(step, rank, part)
            if why:
                del self._waiting[step, rank]
                self._tell(frame("missed", rank=rank, step=step, why=why))
            elif step in self._marks and not any(s < step for s in self._open):
                del self._waiting[step, rank]
                self._begin(step, rank, part, "")
        self._settle()

    def _cannot(self, step: int, rank: int, part: Frame) -> str:
        """Why a part will never be folded, if so."""
        if step not in self._open:
            return "the keepers had lost touch"
        if part["plan"] != self._ranks[rank].plan:
            return "its averages are cut in another way by now"
        try:
            self._memory(rank, self._open[step])
        except KeyError:
            return "its memory was taken away"
        return ""

    def _begin(self, step: int, rank: int, part: Frame, refuse: str) -> None:
        known, stop, marks = self._ranks[rank], self._stop, self._marks.get(step, {})
        slot, base = self._open[step], known.base
        if base.pack is not None and np.may_share_memory(base.pack, self._memory(rank, slot).writable):
            base = known.base = replace(
                base, pack=base.pack.copy()
            )  # of a step that counts no more: nothing is in place
        self._running.add((step, rank))
        self.busy += 1

        def work() -> None:
            found: _Folded | Exception
            try:
                with known.lock:
                    faults.point("fold begins")
                    found = self._folded(step, rank, part, base, slot, marks, stop, refuse, known.masters)
                    faults.point("fold done")
            except Exception as e:
                found = e
            self._later(lambda: self._done(step, rank, part, found, stop))

        assert self._threads is not None
        self._threads.submit(work)

    def _folded(
        self, step: int, rank: int, part: Frame, base: Base, slot: int, marks: Mapping[str, Any],
        stop: threading.Event, refuse: str, masters: Mapping[str, str],
    ) -> _Folded:  # fmt: skip
        key, report = str(part["plan"]), decode_report(part.payload)
        cut = self._cuts.get((key, rank))
        if cut is None:
            cut = cut_of(self._plan(key), self._world, rank, sorted(base.progress), masters)
            self._cuts[key, rank] = cut
        memory = self._memory(rank, slot)
        into = memory.writable[pack_start(report.size) :] if report is not None else memory.writable[:0]
        return fold_pack(memory.buffer, report, cut, base, step, marks, into, stop, refuse)

    def _done(self, step: int, rank: int, part: Frame, found: _Folded | Exception, stop: threading.Event) -> None:
        self.busy -= 1
        if stop is not self._stop:
            return
        self._running.discard((step, rank))
        if isinstance(found, Exception):
            trace = None if isinstance(found, CkptError) else found
            log.error("step %d of rank %d was not folded: %s", step, rank, found, exc_info=trace)
            why = f"its averages: {type(found).__name__}: {found}"
            again = {"replan": part["epoch"]} if isinstance(found, IntegrityError) else {}  # they go on from elsewhere
            self._tell(frame("missed", rank=rank, step=step, why=why, **again))
        elif step in self._open:
            self._made[step, rank] = part, found
            self._tell(_told(part, found))
        self._settle()

    def _refuse(self, step: int, why: str) -> None:
        """Some rank could not fold this step: none of them does."""
        for (s, rank), (part, folded) in list(self._made.items()):
            if s == step and not folded.refused and (s, rank) not in self._running:
                self._begin(step, rank, part, why)


def _behind() -> None:
    """This thread comes after those that train."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)


def _told(part: Frame, found: _Folded) -> Frame:
    """A sealed part with what was made of it."""
    text = encode_progress(found.base.progress)
    report = encode_report(found.report)
    note = [NOTES, "auto", "json", json.dumps(text)]
    head = {
        **part.head,
        "objects": [*part["objects"], note],
        "folded": len(report),
        "refused": found.refused,
        "drift": {name: list(sums) for name, sums in found.drift.items()},
    }
    # ranks that fold into different averages would go apart: the step is void, and they agree on where to go on from
    head["copies"] = {**part["copies"], NOTES: found.digest}
    return Frame("sealed", head, part.payload + report)
