"""Reed-Solomon codes over memory that is there already: nothing is copied or allocated but small tables.

`Code(data, parity)`: k data chunks and m parity chunks, any k of which give back the others. A parity chunk is a linear
combination of data chunks over GF(2^8), polynomial x^8 + x^4 + x^3 + x^2 + 1: parity[r] = sum of a[r, i] * data[i], with
the Cauchy matrix a[r, i] = 1 / ((k + r) xor i) of ISA-L (`gf_gen_cauchy1_matrix`), every square part of which can be
inverted; all ones where k or m is 1, so that parity is a plain XOR or a copy.

A chunk that is shorter than the parity counts as filled up with zeros, which are neither stored nor read.

The arithmetic is ISA-L's, called in place with the interpreter's lock released: the system's `libisal.so.2`, else the copy
that the wheel of pyeclib brings, else numpy.
"""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ckpt.errors import UsageError

__all__ = ["MOST", "Arithmetic", "Buffer", "Code", "Isal", "Tables", "arithmetic"]

Bytes = npt.NDArray[np.uint8]
Buffer = bytes | bytearray | memoryview | mmap.mmap | Bytes
"""Contiguous memory of any kind; what is written to must be writable."""

MOST = 255
"""Chunks of a stripe, data and parity together."""

_CALL = 1 << 30  # bytes of one chunk in one call: the library counts them in an int
_BLOCK = 1 << 16  # of the arithmetic in numpy, so that its scratch stays in the cache


class Code:
    """A code of `data` and `parity` chunks, numbered 0 to data - 1 and data to data + parity - 1.

    Raises UsageError if there are fewer than 1 of either or more than 255 of both.
    """

    def __init__(self, data: int, parity: int, arithmetic_: Arithmetic | None = None) -> None:
        if data < 1 or parity < 1 or data + parity > MOST:
            raise UsageError(
                f"a code of {data} data and {parity} parity chunks: 1 or more of each, at most {MOST} in all"
            )
        self.data, self.parity = data, parity
        self.arithmetic = arithmetic_ or arithmetic()
        self._matrix = _matrix(data, parity)
        self._columns = [self._matrix[:, i].tobytes() for i in range(data)]

    def encode(self, data: Sequence[Buffer], parity: Sequence[Buffer]) -> None:
        """Computes all parity chunks, of one length L, from all data chunks, each of L bytes or fewer."""
        if len(data) != self.data or len(parity) != self.parity:
            raise UsageError(
                f"{len(data)} data and {len(parity)} parity chunks for a code of {self.data} + {self.parity}"
            )
        sources, targets = [_Memory(d) for d in data], [_writable(p) for p in parity]
        self._dot(self._matrix, sources, targets, _length(sources, targets))

    def fold(self, number: int, block: Buffer, parity: Mapping[int, Buffer]) -> None:
        """Adds a piece of data chunk `number` to the same piece of parity chunks, by their row: 0 to parity - 1.

        Parity that begins as zeros is complete when every piece of every data chunk was added once, in any order. A
        piece that is added twice is taken out again.
        """
        source, targets, factors = self._folded(number, block, parity)
        for at in range(0, source.size, _CALL):
            self.arithmetic.add(factors, source, targets, at, min(_CALL, source.size - at))

    def begin(self, number: int, block: Buffer, parity: Mapping[int, Buffer]) -> None:
        """The same where parity is still to be thought of as zeros, whatever is there: all of it is written."""
        source, targets, factors = self._folded(number, block, parity)
        for at in range(0, source.size, _CALL):
            self.arithmetic.dot(factors, [source], targets, at, min(_CALL, source.size - at))
        for target in targets:
            target.array[source.size :] = 0

    def _folded(self, number: int, block: Buffer, parity: Mapping[int, Buffer]) -> tuple[_Memory, list[_Memory], bytes]:
        """(the piece, parity, its factor for each of that)."""
        rows = sorted(parity)
        if not 0 <= number < self.data or not rows or not 0 <= rows[0] <= rows[-1] < self.parity:
            raise UsageError(f"data chunk {number} into parity {rows} of a code of {self.data} + {self.parity}")
        source, targets = _Memory(block), [_writable(parity[r]) for r in rows]
        if any(t.size < source.size for t in targets):
            raise UsageError(f"a piece of {source.size} bytes into parity of {min(t.size for t in targets)}")
        _apart([source], targets)
        column = self._columns[number]
        return source, targets, column if len(rows) == self.parity else bytes(column[r] for r in rows)

    def decode(self, present: Mapping[int, Buffer], wanted: Mapping[int, Buffer]) -> None:
        """Fills the chunks `wanted` from those `present`, both by number; any `data` of all chunks are enough.

        Of equal pieces of all chunks as of whole ones. A data chunk may be shorter than the parity; one without bytes
        is present as an empty buffer. Raises UsageError if too few chunks are present, or one is also wanted.
        """
        for number in (*present, *wanted):
            if not 0 <= number < self.data + self.parity:
                raise UsageError(f"chunk {number} of a code of {self.data} + {self.parity}")
        if both := sorted(present.keys() & wanted.keys()):
            raise UsageError(f"chunks {both} are wanted, and present")
        there = [i for i in range(self.data) if i in present]
        lost = [i for i in range(self.data) if i not in present]
        rows = [r for r in range(self.parity) if self.data + r in present][: len(lost)]
        if len(rows) < len(lost):
            raise UsageError(
                f"{len(present)} chunks are present; a code of {self.data} + {self.parity} needs {self.data}"
            )
        chunks = {n: _Memory(b) for n, b in present.items()} | {n: _writable(b) for n, b in wanted.items()}
        length = _length(
            [c for n, c in chunks.items() if n < self.data], [c for n, c in chunks.items() if n >= self.data]
        )
        if wanted:
            matrix = _solution(self.data, self.parity, tuple(lost), tuple(rows), tuple(wanted))
            sources = [chunks[i] for i in there] + [chunks[self.data + r] for r in rows]
            self._dot(matrix, sources, [chunks[n] for n in wanted], length)

    def _dot(self, matrix: Bytes, sources: Sequence[_Memory], targets: Sequence[_Memory], nbytes: int) -> None:
        """targets = matrix * sources, where all end at their own lengths: in pieces between one end and the next."""
        _apart(sources, targets)
        for at, n in _pieces({m.size for m in (*sources, *targets)}, nbytes):
            columns = [i for i, s in enumerate(sources) if s.size > at]
            rows = [i for i, t in enumerate(targets) if t.size > at]
            if not columns:
                for i in rows:
                    targets[i].array[at : at + n] = 0
            elif len(columns) == len(sources) and len(rows) == len(targets):
                self.arithmetic.dot(matrix.tobytes(), sources, targets, at, n)
            else:
                part = matrix[np.ix_(rows, columns)].tobytes()
                self.arithmetic.dot(part, [sources[i] for i in columns], [targets[i] for i in rows], at, n)


def _length(data: Sequence[_Memory], parity: Sequence[_Memory]) -> int:
    """Bytes of the longest chunk. Raises UsageError where lengths cannot be those of one stripe, or of pieces of one."""
    lengths = {p.size for p in parity}
    if len(lengths) > 1:
        raise UsageError(f"parity chunks of different lengths: {[p.size for p in parity]}")
    longest = max((d.size for d in data), default=0)
    if parity and longest > max(lengths):
        raise UsageError(f"a data chunk of {longest} bytes with parity of {max(lengths)}")
    return max(lengths) if parity else longest


def _pieces(ends: set[int], nbytes: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of the pieces of 0 to `nbytes` within which no chunk ends and that fit one call."""
    at = 0
    for end in sorted(e for e in ends if 0 < e <= nbytes):
        while at < end:
            n = min(_CALL, end - at)
            yield at, n
            at += n


class _Memory:
    """A buffer: where it is, and its bytes as an array."""

    __slots__ = ("address", "array", "size")

    def __init__(self, buffer: Buffer) -> None:
        try:
            self.array: Bytes = np.frombuffer(buffer, dtype=np.uint8)
        except ValueError as e:
            if memoryview(buffer).nbytes:
                raise UsageError(f"a chunk must be contiguous memory ({e})") from e
            self.array = _NOTHING
        self.address: int = self.array.__array_interface__["data"][0]
        self.size = len(self.array)


def _writable(buffer: Buffer) -> _Memory:
    out = _Memory(buffer)
    if not out.array.flags.writeable and out.size:
        raise UsageError("a chunk that is to be written is read-only memory")
    return out


def _apart(sources: Sequence[_Memory], targets: Sequence[_Memory]) -> None:
    """Raises UsageError where memory that is written overlaps other memory of the same call."""
    spans = [(m.address, m.address + m.size, False) for m in sources if m.size]
    spans += [(m.address, m.address + m.size, True) for m in targets if m.size]
    end = written_end = 0
    for first, last, written in sorted(spans):
        if first < (end if written else written_end):
            raise UsageError("a chunk that is to be written overlaps another chunk in memory")
        end = max(end, last)
        written_end = max(written_end, last) if written else written_end


# The field.


def _powers() -> tuple[Bytes, npt.NDArray[np.intp]]:
    """(2^i for i below 510, logarithms of 1 to 255)."""
    power, log, x = np.zeros(510, dtype=np.uint8), np.zeros(256, dtype=np.intp), 1
    for i in range(255):
        power[i] = power[i + 255] = x
        log[x] = i
        x = (x << 1) ^ (0x11D if x & 0x80 else 0)
    return power, log


_POWER, _LOG = _powers()
_TIMES = _POWER[_LOG[:, None] + _LOG[None, :]]
_TIMES[0, :] = _TIMES[:, 0] = 0
_NOTHING = np.empty(0, dtype=np.uint8)


def _product(a: Bytes, b: Bytes) -> Bytes:
    """The product of two matrices."""
    return np.asarray(np.bitwise_xor.reduce(_TIMES[a[:, :, None], b[None, :, :]], axis=1), dtype=np.uint8)


def _inverse(matrix: Bytes) -> Bytes:
    """By Gauss and Jordan, of a part of a Cauchy matrix: every square part has an inverse, so no pivot is ever zero."""
    n = len(matrix)
    work = np.concatenate([matrix, np.eye(n, dtype=np.uint8)], axis=1)
    for i in range(n):
        work[i] = _TIMES[_POWER[255 - _LOG[work[i, i]]], work[i]]
        for other in range(n):
            if other != i:
                work[other] ^= _TIMES[work[other, i], work[i]]
    return work[:, n:]


@cache
def _matrix(data: int, parity: int) -> Bytes:
    """uint8 [parity, data]: the coefficients of the parity chunks."""
    if data == 1 or parity == 1:
        out = np.ones((parity, data), dtype=np.uint8)
    else:
        out = _POWER[255 - _LOG[np.arange(data, data + parity)[:, None] ^ np.arange(data)[None, :]]]
    out.flags.writeable = False
    return out


@lru_cache(1024)
def _solution(data: int, parity: int, lost: tuple[int, ...], rows: tuple[int, ...], wanted: tuple[int, ...]) -> Bytes:
    """The wanted chunks as combinations of the data chunks that are not lost and of as many parity rows as are lost.

    With A the matrix: A[rows, lost] x = parity[rows] + A[rows, there] data[there], solved for the lost chunks x.
    """
    matrix = _matrix(data, parity)
    there = [i for i in range(data) if i not in lost]
    inverse = _inverse(matrix[np.ix_(rows, lost)])
    solved: Bytes = np.concatenate([_product(inverse, matrix[np.ix_(rows, there)]), inverse], axis=1)
    out = np.zeros((len(wanted), data), dtype=np.uint8)
    for at, number in enumerate(wanted):
        if number < data:
            out[at] = solved[lost.index(number)]
        else:
            row = matrix[number - data]
            out[at] = _product(row[None, list(lost)], solved)[0]
            out[at, : len(there)] ^= row[there]
    return out


# Who computes.


class Arithmetic(Protocol):
    """What a code needs, for bytes `at` to `at` + n of all buffers. `matrix`: rows * columns coefficients, row by row."""

    name: str

    def dot(self, matrix: bytes, sources: Sequence[_Memory], targets: Sequence[_Memory], at: int, n: int) -> None:
        """targets[r] = sum of matrix[r, c] * sources[c]."""

    def add(self, column: bytes, source: _Memory, targets: Sequence[_Memory], at: int, n: int) -> None:
        """targets[r] += column[r] * source."""


class Isal:
    """ISA-L in the shared library `path`. Raises OSError or AttributeError if that is not ISA-L 2."""

    def __init__(self, path: str) -> None:
        self.name, self.path = f"ISA-L ({path})", path
        library = ctypes.CDLL(path)
        self._encode, self._update, self._init = (
            library.ec_encode_data,
            library.ec_encode_data_update,
            library.ec_init_tables,
        )
        number, pointer = ctypes.c_int, ctypes.c_void_p
        self._encode.argtypes = [number, number, number, pointer, pointer, pointer]
        self._update.argtypes = [number, number, number, number, pointer, pointer, pointer]
        self._init.argtypes = [number, number, pointer, pointer]
        self._encode.restype = self._update.restype = self._init.restype = None
        self._tables = lru_cache(1024)(self._expanded)

    def _expanded(self, matrix: bytes, columns: int) -> ctypes.Array[ctypes.c_char]:
        """The library's own form of a matrix: 32 bytes a coefficient."""
        tables = ctypes.create_string_buffer(32 * len(matrix))
        self._init(columns, len(matrix) // columns, matrix, tables)
        return tables

    def dot(self, matrix: bytes, sources: Sequence[_Memory], targets: Sequence[_Memory], at: int, n: int) -> None:
        k, m = len(sources), len(targets)
        self._encode(n, k, m, self._tables(matrix, k), _pointers(sources, at), _pointers(targets, at))

    def add(self, column: bytes, source: _Memory, targets: Sequence[_Memory], at: int, n: int) -> None:
        tables = self._tables(column, 1)
        self._update(n, 1, len(targets), 0, tables, source.address + at, _pointers(targets, at))


def _pointers(buffers: Sequence[_Memory], at: int) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(buffers))(*[b.address + at for b in buffers])


class Tables:
    """Numpy's look-up in tables of products: right everywhere, and as fast as XOR where all coefficients are 1."""

    name = "numpy"

    def dot(self, matrix: bytes, sources: Sequence[_Memory], targets: Sequence[_Memory], at: int, n: int) -> None:
        k = len(sources)
        for begin in range(at, at + n, _BLOCK):
            part = slice(begin, min(begin + _BLOCK, at + n))
            for r, target in enumerate(targets):
                out = target.array[part]
                np.take(_TIMES[matrix[r * k]], sources[0].array[part], out=out, mode="clip")
                for c in range(1, k):
                    _add(matrix[r * k + c], sources[c].array[part], out)

    def add(self, column: bytes, source: _Memory, targets: Sequence[_Memory], at: int, n: int) -> None:
        for begin in range(at, at + n, _BLOCK):
            part = slice(begin, min(begin + _BLOCK, at + n))
            for factor, target in zip(column, targets, strict=True):
                _add(factor, source.array[part], target.array[part])


def _add(factor: int, source: Bytes, target: Bytes) -> None:
    np.bitwise_xor(target, source if factor == 1 else np.take(_TIMES[factor], source, mode="clip"), out=target)


@cache
def arithmetic() -> Arithmetic:
    """The fastest that this machine has, looked for once. A library that does not compute what numpy does is passed over."""
    for path in ("libisal.so.2", *_vendored()):
        try:
            library = Isal(path)
        except (OSError, AttributeError):
            continue
        if _agrees(library):
            return library
    return Tables()


def _vendored() -> list[str]:
    """ISA-L in the wheel of pyeclib: a library of its own beside the package."""
    spec = importlib.util.find_spec("pyeclib")
    if spec is None or spec.origin is None:
        return []
    return [str(p) for p in sorted((Path(spec.origin).parents[1] / "pyeclib.libs").glob("libisal*.so*"))]


def _agrees(library: Arithmetic) -> bool:
    """Compares every product of the field, and every way of calling, with numpy."""
    sources = [_Memory(np.tile(np.arange(256, dtype=np.uint8), 2)[i:]) for i in range(2)]
    for factor in range(256):
        matrix, outs = bytes([factor, 29, 1, factor]), []
        for one in (library, Tables()):
            targets = [_Memory(np.zeros(300, dtype=np.uint8)) for _ in range(2)]
            one.dot(matrix, sources, targets, 0, 299)
            one.add(matrix[:2], sources[1], targets, 1, 299)
            outs.append(np.concatenate([t.array for t in targets]))
        if not np.array_equal(outs[0], outs[1]):
            return False
    return True
