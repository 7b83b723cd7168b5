"""A load in which each byte that any rank needs is read once a job: who reads it passes it on to the others that need it.

The ranks agree on it in one round: each says which blocks it needs, the leader cuts them into ranges of up to 8 MiB and
gives each to one rank. That rank asks the store for it, and sends it over sockets of its own: no collective, nothing
over the job's process group. What arrives is read as if from a file, and checked like that. Tensors come in turns of
some 256 MiB, for which every rank holds what it needs of them in memory, twice for a moment.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ckpt.backends import Backend, Entry, Upload
from ckpt.backends.base import Buffer, ReadsAhead
from ckpt.collective import Group, decode, encode
from ckpt.fill import Fill, fill, planned
from ckpt.format.codec import BLOCK
from ckpt.format.manifest import Manifest
from ckpt.read import plan_reads
from ckpt.stored import ReadStats
from ckpt.wire import PLACE, Wire

__all__ = ["Units", "divide", "fill_together"]

Ints = npt.NDArray[np.int64]
Bits = npt.NDArray[np.bool_]
RANGE = 8 << 20
TURN = 256 << 20
_GAP = 64 << 10
_THREADS = 4


@dataclass(frozen=True)
class Units:
    """What is read as a whole: blocks of raw fragments, coded fragments. In the order of `turn`, `pack` and `lo`, the byte
    at which one begins; `n` bytes long. `first`: of each row of the manifest, its first unit."""

    turn: Ints
    pack: Ints
    lo: Ints
    n: Ints
    first: Ints
    turns: tuple[range, ...]
    """The tensors of each turn."""

    @staticmethod
    def of(manifest: Manifest, size: int = TURN) -> Units:
        length, starts = manifest.length.astype(np.int64), manifest.start.astype(np.int64)
        ends = np.concatenate(([0], np.cumsum(length)))[starts]
        turns, at = [], 0
        while at < len(starts) - 1:
            stop = max(at + 1, int(np.searchsorted(ends, ends[at] + size, side="right")) - 1)
            turns.append(range(at, stop))
            at = stop
        owner = np.searchsorted(starts, np.arange(len(length)), side="right") - 1
        turn = np.repeat(np.arange(len(turns)), [len(t) for t in turns])[owner] if turns else np.empty(0, np.int64)
        coded = np.zeros(len(length), bool) if manifest.codec is None else manifest.codec > 0
        count = np.where(coded, np.minimum(length, 1), -(-length // BLOCK))
        row = np.lexsort((manifest.offset, manifest.pack, turn))
        rows = np.repeat(row, count[row])
        first = np.empty(len(length), np.int64)
        first[row] = np.cumsum(count[row]) - count[row]
        nth = np.arange(len(rows)) - first[rows]
        lo = manifest.offset.astype(np.int64)[rows] + nth * BLOCK
        n = np.where(coded[rows], length[rows], np.minimum(BLOCK, length[rows] - nth * BLOCK))
        return Units(turn[rows], manifest.pack.astype(np.int64)[rows], lo, n, first, tuple(turns))

    def needed(self, manifest: Manifest, wanted: Sequence[Fill]) -> Bits:
        """Which of them it takes to fill all views."""
        out = np.zeros(len(self.n), bool)
        for segments in plan_reads(manifest, planned(manifest, wanted)).values():
            for s in segments:
                first = int(self.first[s.row])
                if manifest.codec is not None and manifest.codec[s.row]:
                    out[first] = True
                else:
                    out[first + s.first : first + s.first + s.blocks] = True
        return out


def divide(units: Units, need: Bits) -> tuple[Ints, Ints, Ints]:
    """Who reads what, given who needs what (ranks x units): (units that anybody needs; where among these each range
    begins; the rank that reads it). A range lies in one pack and one turn, and is 8 MiB long at most.

    Of the ranks that need some of a range, the one that has the least to read gets it.
    """
    used = np.flatnonzero(need.any(axis=0))
    if not len(used):
        return used, used, used
    lo, end = units.lo[used], units.lo[used] + units.n[used]
    new = np.ones(len(used), bool)
    new[1:] = (np.diff(units.turn[used]) != 0) | (np.diff(units.pack[used]) != 0) | (lo[1:] - end[:-1] > _GAP)
    run = lo[np.flatnonzero(new)][np.cumsum(new) - 1]
    part = (end - 1 - run) // RANGE  # a unit that ends in the next part begins it
    new[1:] |= np.diff(part) != 0
    begin = np.flatnonzero(new)
    size = np.add.reduceat(units.n[used], begin)
    some = np.stack([np.add.reduceat(row[used] * units.n[used], begin) for row in need]) > 0
    load = np.zeros(len(need), np.int64)
    owner = np.empty(len(begin), np.int64)
    for k in range(len(begin)):
        ranks = np.flatnonzero(some[:, k])
        owner[k] = ranks[np.argmin(load[ranks])]
        load[owner[k]] += size[k]
    return used, begin, owner


def _ends(begin: Ints, n: int) -> Ints:
    """Where each of some runs ends, given where they begin and that they are `n` long in all."""
    return np.append(begin[1:], n)[: len(begin)]


def fill_together(backend: Backend, folder: str, manifest: Manifest, wanted: Sequence[Fill], group: Group) -> ReadStats:
    """Fills all views of all ranks; collective. Raises what `fill` does, PeerError if another rank stopped."""
    wire = Wire(group.rank)
    try:
        letter: bytes | Exception
        try:
            units = Units.of(manifest)
            need = units.needed(manifest, wanted)
            letter = encode({"address": wire.listen()}, need=np.packbits(need))
        except Exception as e:
            letter = e
        head, told = decode(group.round("exchange", letter, lambda letters: _answers(units, letters)))
        wire.begin(head["addresses"], bytes.fromhex(head["token"]), told["expected"])
        spool = _Spool(backend, folder, manifest, wire)
        shares = _Shares(units, told["units"], told["begin"], told["who"])
        stats = ReadStats()
        try:
            for turn, tensors in enumerate(units.turns):
                wire.turn_to(turn)
                _read(spool, shares, turn, group.rank)
                wire.all_here(turn)
                here = [w for w in wanted if w.tensor in tensors]
                stats.needed += fill(spool, folder, manifest, here, group.world).needed
                spool.drop()
        except Exception as e:
            wire.tell_failure(e)
            raise
        wire.finish()
        stats.read = spool.fetched
        return stats
    finally:
        wire.close()


def _answers(units: Units, letters: Sequence[bytes]) -> list[bytes]:
    """The leader's part: what each rank is to read, for whom, and how many ranges it gets from whom in which turn."""
    told = [decode(letter) for letter in letters]
    need = np.stack([np.unpackbits(a["need"], count=len(units.n)).astype(bool) for _, a in told])
    used, begin, owner = divide(units, need)
    world, turns = len(letters), max(1, len(units.turns))
    expected = np.zeros((world, world, turns), np.int64)  # to, from
    stop = _ends(begin, len(used))
    for k, (a, b) in enumerate(zip(begin.tolist(), stop.tolist(), strict=True)):
        for rank in np.flatnonzero(need[:, used[a:b]].any(axis=1)).tolist():
            if rank != owner[k]:
                expected[rank, owner[k], units.turn[used[a]]] += 1
    common = {"addresses": [h["address"] for h, _ in told], "token": secrets.token_hex(32)}
    out = []
    for rank in range(world):
        mine = np.flatnonzero(owner == rank)
        which = [used[begin[k] : stop[k]] for k in mine.tolist()]
        ids = np.concatenate(which) if which else np.empty(0, np.int64)
        sizes = np.array([len(w) for w in which], np.int64)
        who = np.packbits(need[:, ids], axis=0)
        out.append(encode(common, units=ids, begin=np.cumsum(sizes) - sizes, who=who, expected=expected[rank]))
    return out


@dataclass(frozen=True)
class _Shares:
    """What this rank reads: ranges of units, and which ranks need which of these (bits, by rank)."""

    all: Units
    ids: Ints
    begin: Ints
    who: npt.NDArray[np.uint8]

    def of(self, turn: int) -> list[range]:
        """The ranges of a turn, as positions among `ids`."""
        stop = _ends(self.begin, len(self.ids))
        return [
            range(a, b)
            for a, b in zip(self.begin.tolist(), stop.tolist(), strict=True)
            if self.all.turn[self.ids[a]] == turn
        ]

    def needed_by(self, rank: int, part: range) -> Ints:
        bits = self.who[rank // 8, part.start : part.stop] >> (7 - rank % 8) & 1
        found: Ints = self.ids[part.start : part.stop][bits.astype(bool)]
        return found


def _read(spool: _Spool, shares: _Shares, turn: int, rank: int) -> None:
    """Reads this rank's ranges of a turn, keeps what it needs of them itself and sends the others what they need."""
    units, wire = shares.all, spool.wire

    def one(part: range) -> None:
        ids = shares.ids[part.start : part.stop]
        pack, lo = int(units.pack[ids[0]]), int(units.lo[ids[0]])
        buffer = memoryview(bytearray(int(units.lo[ids[-1]] + units.n[ids[-1]]) - lo))
        spool.ask(pack, lo, buffer)
        for to in range(len(wire.addresses)):
            places = _places(units, shares.needed_by(to, part))
            if len(places):
                views = [buffer[int(p["lo"]) - lo : int(p["lo"]) - lo + int(p["n"])] for p in places]
                if to == rank:
                    wire.put(places, views)
                else:
                    wire.send(to, turn, places, views)

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="ckpt-fetch") as pool:
        for done in [pool.submit(one, part) for part in shares.of(turn)]:
            done.result()


def _places(units: Units, ids: Ints) -> npt.NDArray[Any]:
    """Runs of units that lie next to one another: pack, bytes, where they begin."""
    lo, end, pack = units.lo[ids], units.lo[ids] + units.n[ids], units.pack[ids]
    new = np.ones(len(ids), bool)
    new[1:] = (lo[1:] != end[:-1]) | (np.diff(pack) != 0)
    begin = np.flatnonzero(new)
    out = np.empty(len(begin), PLACE)
    if len(begin):
        out["pack"], out["lo"] = pack[begin], lo[begin]
        out["n"] = end[np.append(begin[1:], len(ids)) - 1] - lo[begin]
    return out


class _Spool:
    """A run to read from, of which the data of one turn is in memory. Headers and tables are read from the run."""

    def __init__(self, backend: Backend, folder: str, manifest: Manifest, wire: Wire) -> None:
        self.root, self.wire, self.fetched = backend.root, wire, 0
        self._backend = backend
        self._paths = [f"{folder}/{manifest.pack_path(p)}" for p in range(len(manifest.packs))]
        self._index = {path: p for p, path in enumerate(self._paths)}
        self._kept: dict[tuple[str, int], bytes] = {}
        self._lock = threading.Lock()

    def ask(self, pack: int, lo: int, into: Buffer) -> None:
        """A range from the run itself."""
        if isinstance(self._backend, ReadsAhead):
            self._backend.read_just(self._paths[pack], lo, [into])
        else:
            self._backend.read(self._paths[pack], lo, [into])
        with self._lock:
            self.fetched += len(into)

    def read(self, path: str, offset: int, into: Sequence[Buffer]) -> None:
        n = sum(len(b) for b in into)
        pieces = self.wire.pieces(self._index[path], offset, offset + n)
        if not pieces:
            data = self._edge(path, offset, n)
            pieces = [(offset, memoryview(data))]
        for buffer in into:
            for lo, view in pieces:
                a, b = max(lo, offset), min(lo + len(view), offset + len(buffer))
                if a < b:  # what is between two pieces nobody needs
                    buffer[a - offset : b - offset] = view[a - lo : b - lo]
            offset += len(buffer)

    def _edge(self, path: str, offset: int, n: int) -> bytes:
        """A header or a table; asked for once a load."""
        if (path, offset) not in self._kept:
            data = bytearray(n)
            self.ask(self._index[path], offset, memoryview(data))
            self._kept[path, offset] = bytes(data)
        return self._kept[path, offset]

    def drop(self) -> None:
        self.wire.drop()

    def size(self, path: str) -> int:
        return self._backend.size(path)

    def fetch(self, path: str, limit: int) -> bytes:
        return self._backend.fetch(path, limit)

    def list(self, prefix: str) -> list[Entry]:
        return self._backend.list(prefix)

    def create(self, path: str, data: bytes) -> None:
        self._backend.create(path, data)

    def new(self, path: str, size: int) -> Upload:
        return self._backend.new(path, size)

    def delete(self, path: str) -> None:
        self._backend.delete(path)

    def close(self) -> None:
        self._backend.close()
