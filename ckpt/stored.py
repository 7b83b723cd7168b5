"""One pack in storage as a reader meets it: its header and block table are checked before any of its data is used,
and every block before any of it is."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ckpt.backends import Backend
from ckpt.backends.base import ReadsAhead, Redundant
from ckpt.errors import FormatError, IntegrityError
from ckpt.format.codec import BLOCK, Codec, crc32c, n_blocks
from ckpt.format.dtypes import dtype
from ckpt.format.manifest import Manifest

__all__ = ["Pack", "ReadStats", "StoredFragment", "check_sizes"]

log = logging.getLogger("ckpt")
Bytes = npt.NDArray[np.uint8]


@dataclass
class ReadStats:
    """Bytes asked for and bytes read from storage (headers and block tables included)."""

    needed: int = 0
    read: int = 0


class StoredFragment(NamedTuple):
    """A stored fragment as a reader needs it."""

    tensor: int
    shape: tuple[int, ...]
    offset: int
    length: int
    block: int
    nbytes: int
    codec: Codec | None


_PLAIN = 1 << 20  # bytes that are taken for a block table before it is known that the pack is that long


class Pack:
    """One pack being read: its header and block table are checked before any of its data is used.

    `lean`: where each object that is asked for is a request over a network, and every rank asks for it of every pack, the
    length and the header, of which nothing is used, are not.
    """

    def __init__(
        self, backend: Backend, folder: str, manifest: Manifest, index: int, stats: ReadStats, lean: bool = False
    ) -> None:
        self.backend, self.manifest, self.index = backend, manifest, index
        self.path = f"{folder}/{manifest.pack_path(index)}"
        packs = manifest.packs
        size, table_offset = int(packs.size[index]), int(packs.table_offset[index])
        if lean and isinstance(backend, ReadsAhead) and size - table_offset <= _PLAIN:
            table = np.empty(size - table_offset, np.uint8)
            backend.read_just(self.path, table_offset, [memoryview(table)])
        else:
            actual = backend.size(self.path)
            if actual != size:
                raise self._damaged(f"{actual} bytes long, its checkpoint says {size}")
            header = np.empty(int(packs.data_start[index]), np.uint8)
            backend.read(self.path, 0, [memoryview(header)])
            if crc32c(header) != int(packs.header_crc[index]) and not self._mended(
                0, memoryview(header), int(packs.header_crc[index])
            ):
                raise self._damaged(f"its header (bytes 0 to {len(header)}) was changed after it was written")
            stats.read += len(header)
            table = np.empty(size - table_offset, np.uint8)
            backend.read(self.path, table_offset, [memoryview(table)])
        if crc32c(table) != int(packs.table_crc[index]) and not self._mended(
            table_offset, memoryview(table), int(packs.table_crc[index])
        ):
            raise self._damaged(f"its block table (bytes {table_offset} to {size}) was changed after it was written")
        entry = int(packs.entry[index]) // 4
        rows = table.view("<u4").reshape(-1, entry)
        self.crc: list[int] = rows[:, 0].tolist()
        self.stored = rows[:, 1].astype(np.int64) if entry == 2 else None
        stats.read += len(table)

    @property
    def where(self) -> str:
        return f"{self.backend.root}/{self.path}"

    def fragment(self, row: int, tensor: int, shape: tuple[int, ...]) -> StoredFragment:
        m = self.manifest
        code = 0 if m.codec is None else int(m.codec[row])
        nbytes = math.prod(shape) * dtype(m.tensors[tensor].dtype).itemsize
        return StoredFragment(
            tensor,
            shape,
            int(m.offset[row]),
            int(m.length[row]),
            int(m.block[row]),
            nbytes,
            m.codecs[code - 1] if code else None,
        )

    def mend(self, fragment: StoredFragment, block: int, pieces: Sequence[memoryview]) -> None:
        """Brings a block of a raw fragment that is not what was written to where its bytes lie, where the backend has another
        way to it. Raises IntegrityError if it has none."""
        raw = pieces[0] if len(pieces) == 1 else memoryview(bytearray(b"".join(pieces)))
        if not self._mended(fragment.offset + block * BLOCK, raw, self.crc[fragment.block + block]):
            raise self.bad_block(fragment, block)
        at = 0
        for piece in pieces if len(pieces) > 1 else ():
            piece[:] = raw[at : at + len(piece)]
            at += len(piece)

    def _mended(self, offset: int, raw: memoryview, crc: int) -> bool:
        """Whether the backend had another way to these bytes, which are what was written now."""
        if isinstance(self.backend, Redundant):
            for way in self.backend.otherwise(self.path, offset, raw):
                if crc32c(raw) == crc:
                    log.error(
                        "ckpt: %s: bytes %d to %d were not what was written; %s they are. Have that memory tested",
                        self.where, offset, offset + len(raw), way,
                    )  # fmt: skip
                    return True
        return False

    def block_sizes(self, fragment: StoredFragment) -> list[int]:
        """Stored bytes of each block of a fragment."""
        starts = self.starts(fragment)
        if starts is not None:
            return [int(n) for n in np.diff(starts)]
        return [min(BLOCK, fragment.nbytes - at) for at in range(0, fragment.nbytes, BLOCK)]

    def _damaged(self, what: str) -> IntegrityError:
        """With the tensors that are in this pack."""
        m = self.manifest
        inside = np.unique(np.searchsorted(m.start, np.flatnonzero(m.pack == self.index), side="right") - 1)
        names = ", ".join(repr(m.tensors[t].key) for t in inside[:5].tolist())
        more = f" and {len(inside) - 5} more" if len(inside) > 5 else ""
        return IntegrityError(f"{self.where}: {what}; it holds {names or 'no tensor'}{more}; load an older step")

    def bad_block(self, fragment: StoredFragment, block: int) -> IntegrityError:
        spec = self.manifest.tensors[fragment.tensor]
        starts = self.starts(fragment)
        at = fragment.offset + (block * BLOCK if starts is None else int(starts[block]))
        return IntegrityError(
            f"{self.where}: block {fragment.block + block} (from byte {at}) of tensor {spec.key!r} differs from what was written; load an older step, and check the storage"
        )

    def starts(self, fragment: StoredFragment) -> npt.NDArray[np.int64] | None:
        """Where the stored blocks of a coded fragment begin, relative to it; None for a raw one."""
        if fragment.codec is None or self.stored is None:
            return None
        sizes = self.stored[fragment.block : fragment.block + n_blocks(fragment.nbytes)]
        starts = np.concatenate(([0], np.cumsum(sizes)))
        if int(starts[-1]) != fragment.length or (sizes < 0).any():
            raise IntegrityError(
                f"{self.where}: the block table does not add up for {self.manifest.tensors[fragment.tensor].key!r}"
            )
        return starts

    def decode(self, fragment: StoredFragment, first: int, count: int, nbytes: int, stored: Bytes) -> Bytes:
        """The raw bytes of `count` coded blocks of a fragment from its block `first` on, each checked."""
        base = fragment.block + first
        assert fragment.codec is not None and self.stored is not None
        codec = fragment.codec.make()
        raw = np.zeros(nbytes, dtype=np.uint8)  # a hostile block that decodes to less must not show old memory
        at = 0
        for k in range(count):
            n = int(self.stored[base + k])
            block = stored[at : at + n]
            at += n
            if crc32c(block) != self.crc[base + k]:
                raise self.bad_block(fragment, first + k)
            out = raw[k * BLOCK : (k + 1) * BLOCK]
            try:
                codec.decode(block, out=out)  # never allocates what the block claims to hold
            except Exception as e:
                raise FormatError(f"{self.where}: block {base + k} cannot be decoded ({type(e).__name__}: {e})") from e
        return raw


def check_sizes(backend: Backend, folder: str, manifest: Manifest, tensor: int) -> None:
    """Raises IntegrityError unless the packs that hold a tensor are as long as they should be: asked before much
    memory is taken for what a manifest merely says."""
    for p in np.unique(manifest.pack[int(manifest.start[tensor]) : int(manifest.start[tensor + 1])]).tolist():
        path, size = f"{folder}/{manifest.pack_path(p)}", int(manifest.packs.size[p])
        actual = backend.size(path)
        if actual != size:
            name = manifest.tensors[tensor].key
            raise IntegrityError(
                f"{backend.root}/{path}: {actual} bytes long, its checkpoint says {size}; it holds {name!r}"
            )
