"""How near do `ckpt`'s erasure codes come to ISA-L itself?

One core, warm buffers, the same ones for all: `ec_encode_data` called with tables and pointers that are ready is the
limit of encoding and of decoding (as many data chunks lost as there is parity), `ec_encode_data_update` that of folding.
pyeclib, which copies, and the arithmetic in numpy, which needs no library, stand beside them.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from pyeclib.ec_iface import ECDriver

from benchmarks.harness import Rounds, Sample
from benchmarks.report import Table, finish, machine, options, ratio_cell, spread, workspace
from ckpt.keeper.erasure import Code, Isal, Tables, arithmetic

LIMIT, OURS, NUMPY, PEER = "limit: raw ISA-L", "ckpt", "ckpt without a library", "pyeclib"
ASKED = {"encode": 0.85, "decode": 0.80, "fold": None}
MIB = 1 << 20
Call = Callable[[], object]


def warm(chunks: int, size: int) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Buffers of random bytes, page-aligned, touched."""
    rng = np.random.default_rng(0)
    out = [np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8) for _ in range(chunks)]
    for chunk in out:
        chunk[:] = rng.integers(0, 256, size, dtype=np.uint8)
    return out


class Raw:
    """The library's own calls, with everything made beforehand that can be."""

    def __init__(self, path: str) -> None:
        self.library = ctypes.CDLL(path)

    def dot(self, matrix: np.ndarray[Any, Any], sources: Sequence[Any], targets: Sequence[Any]) -> Call:
        rows, columns = matrix.shape
        tables = ctypes.create_string_buffer(32 * rows * columns)
        self.library.ec_init_tables(columns, rows, np.ascontiguousarray(matrix).tobytes(), tables)
        ins, outs = _pointers(sources), _pointers(targets)
        return lambda: self.library.ec_encode_data(len(sources[0]), columns, rows, tables, ins, outs)

    def fold(self, matrix: np.ndarray[Any, Any], sources: Sequence[Any], targets: Sequence[Any], piece: int) -> Call:
        rows, columns = matrix.shape
        tables = ctypes.create_string_buffer(32 * rows * columns)
        self.library.ec_init_tables(columns, rows, np.ascontiguousarray(matrix).tobytes(), tables)
        update, size = self.library.ec_encode_data_update, len(sources[0])
        calls = [
            (min(piece, size - at), i, ctypes.c_void_p(source.ctypes.data + at), _pointers([t[at:] for t in targets]))
            for i, source in enumerate(sources)
            for at in range(0, size, piece)
        ]

        def call() -> None:
            for n, i, source, outs in calls:
                update(n, columns, rows, i, tables, source, outs)

        return call


def _pointers(arrays: Sequence[Any]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(arrays))(*[a.ctypes.data for a in arrays])


def coefficients(code: Code) -> np.ndarray[Any, Any]:
    """uint8 [parity, data], found by encoding unit vectors."""
    out = np.zeros((code.parity, code.data), dtype=np.uint8)
    code.encode(list(np.eye(code.data, dtype=np.uint8)), list(out))
    return out


def solved(code: Code, lost: Sequence[int]) -> np.ndarray[Any, Any]:
    """The rows that give the lost chunks from the data chunks that are there and the first rows of parity: found by
    decoding unit vectors, so that the limit computes the same as ckpt."""
    k = code.data
    there = [i for i in range(k) if i not in lost]
    unit = np.eye(k, dtype=np.uint8)
    present = {c: np.ascontiguousarray(unit[:, at]) for at, c in enumerate([*there, *range(k, k + len(lost))])}
    wanted = {i: np.zeros(k, dtype=np.uint8) for i in lost}
    code.decode(present, wanted)
    return np.stack([wanted[i] for i in lost])


def contestants(what: str, k: int, m: int, size: int, piece: int) -> dict[str, Call]:
    """By name, one call of each over `k * size` bytes of data."""
    library = arithmetic()
    if not isinstance(library, Isal):
        raise SystemExit("there is no ISA-L on this machine; install pyeclib")
    chunks = warm(k + m, size)
    data, parity = chunks[:k], chunks[k:]
    code, slow, raw = Code(k, m), Code(k, m, Tables()), Raw(library.path)
    matrix = coefficients(code)
    if what == "encode":
        peer = ECDriver(k=k, m=m, ec_type="isa_l_rs_cauchy" if m > 1 else "isa_l_rs_vand")
        joined = b"".join(d.tobytes() for d in data)
        return {
            LIMIT: raw.dot(matrix, data, parity),
            OURS: lambda: code.encode(data, parity),
            NUMPY: lambda: slow.encode(data, parity),
            PEER: lambda: peer.encode(joined),
        }
    if what == "fold":

        def fold(one: Code) -> None:
            for i, source in enumerate(data):
                for at in range(0, size, piece):
                    one.fold(i, source[at : at + piece], {r: p[at : at + piece] for r, p in enumerate(parity)})

        return {
            LIMIT: raw.fold(matrix, data, parity, piece),
            OURS: lambda: fold(code),
            NUMPY: lambda: fold(slow),
        }
    lost = list(range(m))
    sources = [*data[m:], *parity]
    present, wanted = dict(zip(range(m, k + m), sources, strict=True)), {i: data[i] for i in lost}
    code.encode(data, parity)
    peer = ECDriver(k=k, m=m, ec_type="isa_l_rs_cauchy" if m > 1 else "isa_l_rs_vand")
    fragments = peer.encode(b"".join(d.tobytes() for d in data))[m:]
    return {
        LIMIT: raw.dot(solved(code, lost), sources, data[:m]),
        OURS: lambda: code.decode(present, wanted),
        NUMPY: lambda: slow.decode(present, wanted),
        PEER: lambda: peer.decode(fragments),
    }


def measure(what: str, k: int, m: int, args: argparse.Namespace) -> Rounds:
    size, piece = int(args.mib * MIB), int(args.piece_kib * 1024)
    calls = contestants(what, k, m, size, piece)
    loops = {name: 1 if name in (NUMPY, PEER) else args.loops for name in calls}

    def turn(number: int, name: str) -> Sample:
        call = calls[name]
        cpu, start = time.process_time(), time.perf_counter()
        for _ in range(loops[name]):
            call()
        seconds = (time.perf_counter() - start) / loops[name]
        return Sample(seconds, (time.process_time() - cpu) / loops[name], 0)

    return Rounds(k * size, [LIMIT]).run(list(calls), args.rounds, turn)


def run(args: argparse.Namespace) -> dict[str, Any]:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with workspace(args.dir) as root:
        result: dict[str, Any] = {
            "bench": "erasure",
            "machine": machine(root),
            "library": arithmetic().name,
            "tables": [],
        }
    for what in args.what:
        for k, m in args.codes:
            rounds = measure(what, k, m, args)
            part = {"what": what, "data": k, "parity": m, "mib": args.mib, "piece_kib": args.piece_kib}
            result["tables"].append({**part, **rounds.to_json()})
    return result


def tables(result: dict[str, Any]) -> list[Table]:
    out: dict[str, Table] = {}
    titles = {"encode": "Encoding in place", "decode": "Decoding, as many lost as there is parity", "fold": "Folding"}
    for part in result["tables"]:
        what, rounds = part["what"], Rounds.from_json(part)
        table = out.setdefault(
            what,
            Table(
                f"{titles[what]}, one core, chunks of {part['mib']:g} MiB",
                ["", "GB/s of data", "of raw ISA-L", "CPU s per GB"],
            ),
        )
        gb = rounds.nbytes / 1e9
        for name in rounds.samples:
            speeds = [gb / s.seconds for s in rounds.samples[name] if s]
            ratio = "" if name == LIMIT else ratio_cell(rounds.ratios(name), ASKED[what] if name == OURS else None)
            cpu = statistics.median(s.cpu_seconds for s in rounds.samples[name] if s) / gb
            table.rows.append([f"{part['data']}+{part['parity']} {name}", spread(speeds), ratio, f"{cpu:.3f}"])
    for what, table in out.items():
        table.notes.append(
            f"Medians (min-max) of {len(next(iter(rounds.samples.values())))} rounds; {result['library']}."
        )
        if what == "fold":
            table.notes.append(f"In pieces of {result['tables'][0]['piece_kib']:g} KiB, each into all parity chunks.")
    return list(out.values())


def _codes(text: str) -> list[tuple[int, int]]:
    return [(int(k), int(m)) for k, m in (code.split("+") for code in text.split(","))]


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__ or "", ranks=False, state=False)
    parser.add_argument("--codes", type=_codes, default=_codes("4+2,6+2,8+2,4+1"), help="such as 4+2,6+2")
    parser.add_argument("--what", type=lambda s: s.split(","), default=list(ASKED), help="of encode,decode,fold")
    parser.add_argument("--mib", type=float, default=16, help="MiB of one chunk")
    parser.add_argument("--piece-kib", type=float, default=1024, help="KiB of one fold")
    parser.add_argument("--loops", type=int, default=8, help="calls of one turn of ckpt and of the limit")
    args = parser.parse_args(argv)
    result = run(args)
    finish(result, tables(result), args.json)


if __name__ == "__main__":
    main()
