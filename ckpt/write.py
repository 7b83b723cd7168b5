"""A rank's share of a snapshot -> one pack in storage, through a small ring of reserved buffers.

One thread copies fragments into the ring and takes their checksums while the bytes are in cache; a few threads
write full buffers. The ring is reserved and touched once and serves every save of the process.
"""

from __future__ import annotations

import mmap
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ckpt.backends import Backend, Upload
from ckpt.collective import decode, encode
from ckpt.config import Settings
from ckpt.format.codec import BLOCK, crc32c
from ckpt.format.pack import PackLayout, Piece, layout_pack

__all__ = [
    "PackReport",
    "Ring",
    "Source",
    "Stored",
    "decode_report",
    "encode_report",
    "pack_report",
    "write_buffer",
    "write_pack",
]

Bytes = npt.NDArray[np.uint8]
_COPY = 1 << 20


class Ring:
    """Page-aligned buffers, touched once, and the threads that write them."""

    def __init__(self, settings: Settings) -> None:
        self.size = settings.buffer_mib << 20
        self._maps = [mmap.mmap(-1, self.size) for _ in range(settings.buffers)]
        self._free: queue.SimpleQueue[Bytes] = queue.SimpleQueue()
        for m in self._maps:
            buffer = np.frombuffer(m, dtype=np.uint8)
            buffer[:: mmap.PAGESIZE] = 0
            self._free.put(buffer)
        self.threads = ThreadPoolExecutor(settings.writers, thread_name_prefix="ckpt-write")

    def take(self) -> Bytes:
        return self._free.get()

    def give(self, buffer: Bytes) -> None:
        self._free.put(buffer)


class Source(Protocol):
    """The bytes of one fragment, row-major, wherever they are. `flat`: the bytes themselves, where they lie in one
    piece; its owner keeps them alive."""

    @property
    def nbytes(self) -> int: ...

    @property
    def flat(self) -> Bytes | None: ...

    def into(self, start: int, out: Bytes) -> None:
        """Copies bytes [start, start+len(out)) of the fragment. Both ends are on elements."""
        ...


class Stored:
    """A fragment that is in memory as it is to be stored."""

    def __init__(self, flat: Bytes) -> None:
        self.nbytes, self.flat = len(flat), flat

    def into(self, start: int, out: Bytes) -> None:
        assert self.flat is not None
        np.copyto(out, self.flat[start : start + len(out)])


@dataclass(frozen=True)
class PackReport:
    """What a writer wrote. `offset`, `length`, `block` are in the order of the pieces that it was given."""

    size: int
    data_start: int
    header_crc: int
    table_offset: int
    blocks: int
    entry: int
    table_crc: int
    offset: npt.NDArray[np.uint64]
    length: npt.NDArray[np.uint64]
    block: npt.NDArray[np.uint32]


def write_pack(
    backend: Backend,
    path: str,
    pieces: Sequence[Piece],
    sources: Sequence[Source],
    ring: Ring,
    layout: PackLayout | None = None,
) -> PackReport:
    """Writes one pack durably. `layout`: what `layout_pack(pieces)` gives, if the caller has it already.

    On any failure, of any thread, nothing is left and the error is raised.
    """
    layout = layout or layout_pack(pieces)
    bound = layout.size + sum(p.nbytes // 4 + 1024 for p in layout.pieces if p.codec)
    upload = backend.new(path, bound)
    try:
        stream = _Stream(upload, ring, layout.data_start)
        try:
            lengths, table = _stream_data(layout, sources, stream)
            stream.put(table)
            stream.send()
            if layout.entry == 8:
                layout = layout_pack(pieces, lengths)
            header = layout.header  # while the last buffers are on their way
        finally:
            stream.drain()
        upload.write(0, memoryview(header))
        upload.finish(layout.size if layout.size != bound else None)
    except BaseException:
        upload.abort()
        raise
    return pack_report(layout, header, table)


def pack_report(layout: PackLayout, header: bytes, table: Bytes) -> PackReport:
    """What a writer says about a pack; by the order of the pieces that the layout was made of."""
    back = np.empty(len(layout.order), dtype=np.int64)
    back[layout.order] = np.arange(len(layout.order))
    return PackReport(
        size=layout.size,
        data_start=layout.data_start,
        header_crc=crc32c(header),
        table_offset=layout.table_offset,
        blocks=layout.n_blocks,
        entry=layout.entry,
        table_crc=crc32c(table),
        offset=layout.offset[back],
        length=layout.length[back],
        block=layout.block[back],
    )


def write_buffer(
    backend: Backend,
    path: str,
    pack: Bytes,
    threads: ThreadPoolExecutor,
    chunk: int,
    check: Callable[[int, int], None] | None = None,
    await_bytes: Callable[[int], None] | None = None,
) -> None:
    """Writes a pack in memory durably, in chunks of `chunk` bytes (whole pages), in parallel, the first one last. Of each,
    `check(start, end)` is called before it is written, and raises if the bytes are not what they should be. Where the
    pack is still being made, `await_bytes(end)` returns when it is complete up to there, but for the header, and
    with `end` = len(pack) altogether; or raises why it never will be.

    On any failure, of any thread, nothing is left and the error is raised.
    """
    upload = backend.new(path, len(pack))
    failed = threading.Event()
    parts: list[Future[None]] = []

    def write(at: int) -> None:
        if failed.is_set():
            return
        try:
            if check is not None:
                check(at, at + chunk)
            upload.write(at, memoryview(pack)[at : at + chunk])
        except BaseException:
            failed.set()
            raise

    try:
        for at in [*range(chunk, len(pack), chunk), 0]:
            if await_bytes is not None:
                await_bytes(min(at + chunk, len(pack)) if at else len(pack))
            parts.append(threads.submit(write, at))
        wait(parts)
        for part in parts:
            part.result()
        upload.finish()
    except BaseException:
        failed.set()
        wait(parts)  # nobody writes to a file that is closed
        upload.abort()
        raise


def _stream_data(layout: PackLayout, sources: Sequence[Source], stream: _Stream) -> tuple[list[int], Bytes]:
    """Sends all fragments in file order; returns their stored lengths and the block table."""
    table = np.empty((layout.n_blocks, layout.entry // 4), dtype="<u4")
    scratch = np.empty(BLOCK if layout.entry == 8 else 0, dtype=np.uint8)
    lengths: list[int] = []
    row = 0
    for piece, index in zip(layout.pieces, layout.order.tolist(), strict=True):
        source = sources[index]
        if piece.codec is None:
            crcs = stream.copy(source)
            table[row : row + len(crcs), 0] = crcs
            if layout.entry == 8:
                table[row : row + len(crcs), 1] = [
                    min(BLOCK, source.nbytes - at) for at in range(0, source.nbytes, BLOCK)
                ]
            row += len(crcs)
            lengths.append(source.nbytes)
            continue
        coder, total = piece.codec.make(), 0
        for start in range(0, source.nbytes, BLOCK):
            raw = scratch[: min(BLOCK, source.nbytes - start)]
            source.into(start, raw)
            coded = np.frombuffer(coder.encode(raw), dtype=np.uint8)
            stream.put(coded)
            table[row] = crc32c(coded), len(coded)
            total += len(coded)
            row += 1
        lengths.append(total)
    return lengths, table.reshape(-1).view(np.uint8)


class _Stream:
    """Bytes in file order -> full buffers -> writer threads. At most as many buffers as the ring has are under way."""

    def __init__(self, upload: Upload, ring: Ring, start: int) -> None:
        self._upload, self._ring = upload, ring
        self._at, self._fill = start, 0
        self._buffer: Bytes | None = None
        self._pending: list[Future[None]] = []
        self._error: list[BaseException] = []

    def copy(self, source: Source) -> list[int]:
        """Copies a source and returns the CRC32C of its blocks, taken right after each copy.

        A copy is several blocks long: while it runs, the interpreter's lock is free for long enough that a writer
        thread which waits for it gets it, and the disk its next buffer.
        """
        out: list[int] = []
        at = crc = 0
        while at < source.nbytes:
            room = self._room(min(_COPY, source.nbytes - at))
            source.into(at, room)
            done = 0
            while done < len(room):
                n = min(BLOCK - (at + done) % BLOCK, len(room) - done)
                crc = crc32c(room[done : done + n], crc)
                done += n
                if (at + done) % BLOCK == 0 or at + done == source.nbytes:
                    out.append(crc)
                    crc = 0
            at += len(room)
        return out

    def put(self, data: Bytes) -> None:
        at = 0
        while at < len(data):
            room = self._room(len(data) - at)
            np.copyto(room, data[at : at + len(room)])
            at += len(room)

    def _room(self, n: int) -> Bytes:
        """Up to n bytes of the current buffer, counted as filled. A full buffer is sent before the next is taken."""
        if self._buffer is None or self._fill == self._ring.size:
            self.send()
            self._buffer = self._ring.take()
        lo = self._fill
        self._fill = min(self._ring.size, lo + n)
        return self._buffer[lo : self._fill]

    def send(self) -> None:
        """Hands the current buffer to the writer threads."""
        if self._error:
            raise self._error[0]
        if self._buffer is None:
            return
        self._pending.append(self._ring.threads.submit(self._write, self._buffer, self._at, self._fill))
        self._at += self._fill
        self._buffer, self._fill = None, 0

    def _write(self, buffer: Bytes, at: int, n: int) -> None:
        try:
            if not self._error:
                self._upload.write(at, memoryview(buffer)[:n])
        except BaseException as e:
            self._error.append(e)
        finally:
            self._ring.give(buffer)

    def drain(self) -> None:
        """Sends the rest and waits for every write; raises the first error of any of them."""
        try:
            self.send()
        finally:
            if self._buffer is not None:
                self._ring.give(self._buffer)
                self._buffer = None
            try:
                wait(self._pending)
            except BaseException as e:  # interrupted: those under way still have to end before the file is closed
                self._error.append(e)
                wait(self._pending)
        if self._error:
            raise self._error[0]


def encode_report(report: PackReport | None) -> bytes:
    if report is None:
        return encode(None)
    head = {k: v for k, v in report.__dict__.items() if isinstance(v, int)}
    return encode(head, offset=report.offset, length=report.length, block=report.block)


def decode_report(message: bytes) -> PackReport | None:
    head, arrays = decode(message)
    return None if head is None else PackReport(**{**head, **arrays})
