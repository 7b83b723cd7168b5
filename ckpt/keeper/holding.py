"""What a keeper holds: parts of steps in slots, the plan that they are parts of, and how they become a checkpoint."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ckpt import faults
from ckpt.backends import Backend, MemoryBackend
from ckpt.catalog import drop_attempt
from ckpt.collective import decode, encode
from ckpt.commit import Commit, commit_step, refuse_superseded, step_folder
from ckpt.config import Settings
from ckpt.errors import CapacityError, CkptError, IntegrityError
from ckpt.format.codec import BLOCK, Codec, choose_codec, crc32c
from ckpt.format.fragment import Box
from ckpt.format.pack import Piece, TensorSpec
from ckpt.keeper.averaged import pack_start
from ckpt.leading import codec_column
from ckpt.plan import Plan
from ckpt.scopes import merge_objects
from ckpt.write import PackReport, Ring, Stored, write_buffer, write_pack

__all__ = [
    "ATTEMPT",
    "Held",
    "Intact",
    "Memory",
    "Part",
    "as_checkpoint",
    "commit_held",
    "decode_plan",
    "encode_plan",
    "pieces_of",
    "write_packs",
]

Bytes = npt.NDArray[np.uint8]
ATTEMPT = "a0"
"""A step in memory has one attempt."""


class Memory:
    """One rank's part of one slot, as this process sees it."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd, self.size = fd, size
        self._map: mmap.mmap | None = None
        self._own: mmap.mmap | None = None

    @property
    def buffer(self) -> Bytes:
        """All of it; mapped when it is first asked for."""
        self._map = self._map or self._mapped(mmap.PROT_READ)
        return np.frombuffer(self._map, dtype=np.uint8)

    @property
    def writable(self) -> Bytes:
        """The same, for what the keeper itself puts there."""
        self._own = self._own or self._mapped(mmap.PROT_READ | mmap.PROT_WRITE)
        return np.frombuffer(self._own, dtype=np.uint8)

    def _mapped(self, prot: int) -> mmap.mmap:
        try:
            return mmap.mmap(self.fd, self.size, prot=prot)
        except OSError as e:
            raise CapacityError(
                f"the keeper cannot map {self.size >> 20} MiB of memory that it holds ({e.strerror}); raise its limits, "
                "as ulimit -v"
            ) from e

    def close(self) -> None:
        """Gives the memory back, once nobody else holds or maps it."""
        os.close(self.fd)
        self._map = self._own = None  # unmapped with the last array over it


@dataclass(frozen=True)
class Part:
    """What a rank said of its sealed pack; no report if it has nothing to write."""

    report: PackReport | None
    objects: Sequence[Sequence[str]]
    metrics: Mapping[str, float]
    averages: bool = False  # it is the pack of a rank's averages


@dataclass(frozen=True)
class Held:
    """A complete step: `memory` of the writers whose packs are on this host, parts of all. Writer r is rank r; where there
    are running averages, `world` + r is the pack of the averages of rank r (see `ckpt.keeper.averaged`)."""

    generation: int
    step: int
    slot: int
    plan: Plan
    aliases: Mapping[str, str]
    parts: Mapping[int, Part]
    memory: Mapping[int, Memory]
    hosts: Mapping[int, str] = field(default_factory=dict)  # of all writers

    @property
    def folder(self) -> str:
        return step_folder(self.step, self.generation)

    @property
    def world(self) -> int:
        """How many ranks there are."""
        return sum(not part.averages for part in self.parts.values())

    @property
    def ranks(self) -> list[int]:
        """Those whose packs are on this host."""
        return sorted(w for w in self.memory if not self.parts[w].averages)

    @property
    def nbytes(self) -> int:
        """Bytes of the packs of this host."""
        return sum(p.report.size for w, p in self.parts.items() if w in self.memory and p.report is not None)

    @property
    def packs(self) -> list[tuple[int, int, int]]:
        """(writer, bytes, where it begins in the memory of its rank) of all packs that there are."""
        return [(w, p.report.size, self.start(w)) for w, p in sorted(self.parts.items()) if p.report is not None]

    def start(self, writer: int) -> int:
        """Where the pack of a writer begins in its memory."""
        if not self.parts[writer].averages:
            return 0
        snapshot = self.parts[writer - self.world].report
        return pack_start(snapshot.size) if snapshot is not None else 0

    def pack(self, writer: int) -> Bytes:
        """The pack of a writer of this host."""
        report, at = self.parts[writer].report, self.start(writer)
        assert report is not None
        return self.memory[writer].buffer[at : at + report.size]


def encode_plan(plan: Plan, aliases: Mapping[str, str]) -> bytes:
    """A plan as it goes to the keeper."""
    tensors = [[t.name, t.dtype, list(t.shape), t.variant, t.layout] for t in plan.tensors]
    head = {"tensors": tensors, "per_rank": list(plan.per_rank), "aliases": dict(aliases)}
    return encode(head, rank=plan.rank, tensor=plan.tensor, local=plan.local, box=plan.box)


def decode_plan(message: bytes) -> tuple[Plan, dict[str, str]]:
    """(plan, aliases)."""
    head, a = decode(message)
    tensors = tuple(TensorSpec(n, d, tuple(s), v, y) for n, d, s, v, y in head["tensors"])
    return Plan(tensors, a["rank"], a["tensor"], a["local"], a["box"], tuple(head["per_rank"])), head["aliases"]


def as_checkpoint(held: Held) -> tuple[bytes, bytes]:
    """(commit, manifest): what makes a step in memory a checkpoint like any other, but for where its packs are."""
    model = MemoryBackend(f"keeper-{os.getpid()}-{time.monotonic_ns()}")
    _commit(model, held, (), [held.parts[rank].report for rank in sorted(held.parts)], ATTEMPT, "memory")
    out = [model.fetch(f"{held.folder}/{name}", 1 << 40) for name in ("commit.json", f"{ATTEMPT}/manifest.safetensors")]
    for name in ("commit.json", f"{ATTEMPT}/manifest.safetensors"):
        model.delete(f"{held.folder}/{name}")
    return out[0], out[1]


def write_packs(
    backend: Backend,
    held: Held,
    attempt: str,
    codecs: Sequence[tuple[str, Codec]],
    config: Settings,
    ring: Callable[[], Ring],
) -> dict[int, PackReport | None]:
    """The packs of this host's ranks: slots -> storage. On failure nothing of the pack under way is left."""
    out = {}
    try:
        with ThreadPoolExecutor(config.writers, "ckpt-write") as threads:
            for rank in sorted(held.memory):
                faults.point("keeper write")
                path = f"{held.folder}/{attempt}/rank-{rank:05d}.safetensors"
                out[rank] = _write(backend, path, held, rank, codecs, config, ring, threads)
    except (MemoryError, RuntimeError) as e:
        raise CapacityError(
            f"the keeper has no memory to write with ({e}); raise its limits, as ulimit -v or -u"
        ) from e
    return out


def commit_held(
    backend: Backend,
    held: Held,
    codecs: Sequence[tuple[str, Codec]],
    reports: Mapping[int, PackReport | None],
    attempt: str,
    writer: str,
    trained: int | None,
) -> Commit:
    """The commit of packs that are all in storage. On failure before it is published nothing of the attempt is left.

    `trained`: the generation that is being trained here, which may have inherited the step; ConflictError if another job has
    begun a newer one. None: nobody trains, and what is left of those who did is stored whoever trains now.
    """
    publishing: list[bool] = []
    try:
        faults.point("keeper commit")
        if trained is not None:
            refuse_superseded(backend, trained)
        ordered = [reports[rank] for rank in sorted(held.parts)]
        return _commit(backend, held, codecs, ordered, attempt, writer, lambda: publishing.append(True))
    except BaseException as e:
        if not publishing:
            drop_attempt(backend, held.folder, attempt, whole=isinstance(e, CkptError))
        raise


def _write(
    backend: Backend,
    path: str,
    held: Held,
    rank: int,
    codecs: Sequence[tuple[str, Codec]],
    config: Settings,
    ring: Callable[[], Ring],
    threads: ThreadPoolExecutor,
) -> PackReport | None:
    """One rank's pack: as it is, or laid out anew where a codec applies."""
    report = held.parts[rank].report
    if report is None:
        return None
    pieces = pieces_of(held.plan, rank, codecs)
    pack, intact = held.pack(rank), Intact(held, rank)
    if any(p.codec for p in pieces):
        intact.check(0, len(pack))
        ends = zip(report.offset.tolist(), report.length.tolist(), strict=True)
        return write_pack(backend, path, pieces, [Stored(pack[at : at + n]) for at, n in ends], ring())
    write_buffer(backend, path, pack, threads, config.buffer_mib << 20, intact.check)
    return report


class Intact:
    """Whether a pack in memory is what its trainer sealed: what is not must never be committed."""

    def __init__(self, held: Held, rank: int) -> None:
        report, self._pack = held.parts[rank].report, held.pack(rank)
        assert report is not None
        self.size = report.size
        self._where = f"the memory of rank {rank} at step {held.step}"
        header, table = self._pack[: report.data_start], self._pack[report.table_offset :]
        if crc32c(header) != report.header_crc or crc32c(table) != report.table_crc:
            raise self._damaged("its header or block table")
        length, counts = report.length.astype(np.int64), -(-report.length.astype(np.int64) // BLOCK)
        nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of its fragment's blocks
        start = np.repeat(report.offset.astype(np.int64), counts) + nth * BLOCK
        end = np.minimum(start + BLOCK, np.repeat(report.offset.astype(np.int64) + length, counts))
        row = np.repeat(report.block.astype(np.int64), counts) + nth
        order = np.argsort(start, kind="stable")
        self._start, self._end = start[order], end[order]
        self._crc = table.view("<u4")[row[order]]

    @property
    def blocks(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
        """(start, end, CRC32C) of all blocks of the pack, as sealed, in order."""
        return self._start, self._end, self._crc

    def check(self, start: int, end: int) -> None:
        """Of the blocks that begin there. Raises IntegrityError."""
        lo, hi = np.searchsorted(self._start, (start, end)).tolist()
        blocks = zip(self._start[lo:hi].tolist(), self._end[lo:hi].tolist(), self._crc[lo:hi].tolist(), strict=True)
        for first, last, crc in blocks:
            if crc32c(self._pack[first:last]) != crc:
                raise self._damaged(f"bytes {first} to {last}")

    def _damaged(self, what: str) -> IntegrityError:
        return IntegrityError(
            f"{self._where} is damaged ({what}): it is not written to storage, and a restart takes an older step; have "
            "the memory of this host tested"
        )


def pieces_of(plan: Plan, rank: int, codecs: Sequence[tuple[str, Codec]]) -> list[Piece]:
    """What a writer stores, in the order of its report."""
    rows = plan.rows(rank)
    out = []
    for t, row in zip(plan.tensor[rows].tolist(), plan.box[rows].tolist(), strict=True):
        spec = plan.tensors[t]
        n = len(spec.shape)
        out.append(Piece(spec, Box(tuple(row[0][:n]), tuple(row[1][:n])), choose_codec(spec.name, codecs)))
    return out


def _commit(
    backend: Backend,
    held: Held,
    codecs: Sequence[tuple[str, Codec]],
    reports: Sequence[PackReport | None],
    attempt: str,
    writer: str,
    publishing: Callable[[], None] = lambda: None,
) -> Commit:
    table, column = codec_column(held.plan, codecs)
    ranks = sorted(held.parts)
    objects, _ = merge_objects([held.parts[r].objects for r in ranks])
    return commit_step(
        backend,
        step=held.step,
        generation=held.generation,
        attempt=attempt,
        writer=writer,
        plan=held.plan,
        codecs=table,
        codec=column,
        objects=objects,
        aliases=held.aliases,
        reports=reports,
        world=held.world,
        metrics=held.parts[ranks[0]].metrics,
        publishing=publishing,
    )
