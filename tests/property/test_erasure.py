"""The code against two that were made elsewhere: pyeclib, and the field's arithmetic done bit by bit."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import random
import threading
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyeclib.ec_iface import ECDriver

from ckpt.errors import UsageError
from ckpt.keeper import erasure
from ckpt.keeper.erasure import Arithmetic, Code, Isal, Tables, arithmetic

CHECK = settings(max_examples=150, deadline=None, derandomize=True)
BOTH = pytest.mark.parametrize("by", [arithmetic(), Tables()], ids=lambda a: type(a).__name__)


def times(a: int, b: int) -> int:
    """The product of two polynomials over GF(2), reduced."""
    out = 0
    for bit in range(8):
        out ^= (a << bit) if b >> bit & 1 else 0
    for bit in range(14, 7, -1):
        out ^= (0x11D << (bit - 8)) if out >> bit & 1 else 0
    return out


RECIPROCAL = {a: b for a in range(1, 256) for b in range(1, 256) if times(a, b) == 1}


def slow_parity(data: Sequence[bytes], m: int) -> list[bytes]:
    """As the docstring of the module says it."""
    k, length = len(data), max(map(len, data))
    out = []
    for r in range(m):
        factors = [1 if k == 1 or m == 1 else RECIPROCAL[(k + r) ^ i] for i in range(k)]
        row = bytearray(length)
        for factor, chunk in zip(factors, data, strict=True):
            for at, byte in enumerate(chunk):
                row[at] ^= times(factor, byte)
        out.append(bytes(row))
    return out


def noise(seed: int, lengths: Sequence[int]) -> list[bytes]:
    rng = random.Random(seed)
    return [rng.randbytes(n) for n in lengths]


def encoded(code: Code, data: Sequence[bytes], length: int) -> list[bytearray]:
    """Parity in memory that held something else before."""
    parity = [bytearray(b"\xa5" * length) for _ in range(code.parity)]
    code.encode(data, parity)
    return parity


@st.composite
def stripes(draw: st.DrawFn) -> tuple[int, list[bytes]]:
    """(m, data chunks), short and long, of equal lengths and not."""
    k, m = draw(st.integers(1, 14)), draw(st.integers(1, 5))
    longest = draw(st.sampled_from([0, 1, 15, 16, 17, 63, 64, 65, 200, 1000]))
    lengths = [draw(st.sampled_from([longest, longest, longest // 2, max(0, longest - 1), 0])) for _ in range(k)]
    return m, noise(draw(st.integers(0, 1 << 30)), lengths)


def test_a_library_was_found() -> None:
    """Where pyeclib is installed there is one; it is used, and it is not pyeclib."""
    assert isinstance(arithmetic(), Isal)
    [path] = erasure._vendored()
    assert Path(path).is_file() and erasure._agrees(Isal(path))


@BOTH
@CHECK
@given(stripe=stripes())
def test_parity_is_what_the_formula_says(by: Arithmetic, stripe: tuple[int, list[bytes]]) -> None:
    m, data = stripe
    assert encoded(Code(len(data), m, by), data, max(map(len, data))) == slow_parity(data, m)


@pytest.mark.parametrize(("k", "m"), [(2, 2), (4, 2), (6, 2), (8, 3), (10, 4), (14, 2), (3, 1), (7, 1)])
def test_parity_is_that_of_pyeclib(k: int, m: int) -> None:
    """Its fragments begin with a header of 80 bytes."""
    data = noise(k, [4096] * k)
    theirs = ECDriver(k=k, m=m, ec_type="isa_l_rs_cauchy" if m > 1 else "isa_l_rs_vand").encode(b"".join(data))
    assert [f[80:] for f in theirs[:k]] == data
    assert encoded(Code(k, m), data, 4096) == [f[80:] for f in theirs[k:]]


@BOTH
@CHECK
@given(stripe=stripes(), data=st.data())
def test_any_chunks_that_are_lost_come_back(
    by: Arithmetic, stripe: tuple[int, list[bytes]], data: st.DataObject
) -> None:
    m, chunks = stripe
    k, length = len(chunks), max(map(len, chunks))
    whole: list[bytes | bytearray] = [*chunks, *slow_parity(chunks, m)]
    order = data.draw(st.permutations(range(k + m)))
    lost = data.draw(st.lists(st.sampled_from(order[k:]), unique=True))
    present = (
        {i: whole[i] for i in order if i not in lost} if data.draw(st.booleans()) else {i: whole[i] for i in order[:k]}
    )
    wanted = {i: bytearray(b"\x5a" * len(whole[i])) for i in lost}
    Code(k, m, by).decode(present, wanted)
    assert wanted == {i: whole[i] for i in lost}
    at = data.draw(st.integers(0, length))
    pieces = {i: bytearray(len(whole[i][at:])) for i in lost}
    Code(k, m, by).decode({i: memoryview(c)[at:] for i, c in present.items()}, pieces)
    assert pieces == {i: whole[i][at:] for i in lost}, "a piece of a stripe is decoded like a whole one"


@pytest.mark.parametrize(("k", "m"), [(4, 2), (6, 2), (5, 3), (3, 3), (1, 3), (6, 1)])
def test_every_pattern_of_losses(k: int, m: int) -> None:
    data = noise(k * m, [97 - i for i in range(k)])
    whole = [*data, *slow_parity(data, m)]
    for lost in itertools.chain.from_iterable(itertools.combinations(range(k + m), n) for n in range(m + 1)):
        wanted = {i: bytearray(len(whole[i])) for i in lost}
        Code(k, m).decode({i: c for i, c in enumerate(whole) if i not in lost}, wanted)
        assert wanted == {i: whole[i] for i in lost}


def test_the_widest_code() -> None:
    data = noise(0, [70] * 245)
    for by in (arithmetic(), Tables()):
        code = Code(245, 10, by)
        parity = encoded(code, data, 70)
        wanted = {i: bytearray(70) for i in range(0, 50, 5)}
        present = {i: c for i, c in enumerate([*data, *parity]) if i not in wanted}
        code.decode(present, wanted)
        assert wanted == {i: data[i] for i in wanted}


@BOTH
@CHECK
@given(stripe=stripes(), seed=st.integers(0, 1000), piece=st.integers(1, 300), single=st.booleans())
def test_folding_in_any_order_gives_the_same_parity(
    by: Arithmetic, stripe: tuple[int, list[bytes]], seed: int, piece: int, single: bool
) -> None:
    m, data = stripe
    code, length = Code(len(data), m, by), max(map(len, data))
    parity = [bytearray(length) for _ in range(m)]
    todo = [
        (i, at, r) for i, c in enumerate(data) for at in range(0, len(c), piece) for r in (range(m) if single else [-1])
    ]
    random.Random(seed).shuffle(todo)
    for i, at, r in todo:
        rows = range(m) if r < 0 else [r]
        code.fold(i, memoryview(data[i])[at : at + piece], {r: memoryview(parity[r])[at : at + piece] for r in rows})
    assert parity == slow_parity(data, m)
    i = seed % len(data)
    code.fold(i, data[i], dict(enumerate(parity)))
    others = [c if j != i else b"" for j, c in enumerate(data)]
    assert [bytes(p) for p in parity] == [p.ljust(length, b"\0") for p in slow_parity(others, m)], "twice is not at all"


def test_buffers_of_every_kind_are_used_where_they_are() -> None:
    """Among them memory that this process may not write, and memory behind a file descriptor."""
    fd = ctypes.CDLL(None).memfd_create(b"ckpt-test", 0)
    with open(fd, "r+b") as file:
        file.truncate(8192)
        file.write(noise(1, [8192])[0])
        file.flush()
        seen = mmap.mmap(fd, 8192, prot=mmap.PROT_READ)
        shared = mmap.mmap(fd, 8192)
        data = [seen, np.arange(2048, dtype=np.float32), b"\1" * 8192, memoryview(bytearray(8192))]
        parity = [mmap.mmap(-1, 8192), np.zeros(8192, dtype=np.uint8)]
        Code(4, 2).encode(data, parity)
        assert [bytes(p) for p in parity] == slow_parity([bytes(memoryview(d).cast("B")) for d in data], 2)
        with pytest.raises(UsageError, match="read-only"):
            Code(4, 2).decode({1: data[1], 2: data[2], 3: data[3], 4: parity[0]}, {0: seen})
        was = bytes(shared)
        shared[:] = bytes(8192)
        Code(4, 2).decode({1: data[1], 2: data[2], 3: data[3], 4: parity[0]}, {0: shared})
        assert bytes(seen) == was
        seen.close()  # nobody holds on to what was passed
        shared.close()


@pytest.mark.parametrize("call", [4, 64, 100])
def test_long_chunks_take_several_calls(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(erasure, "_CALL", call)
    data = noise(2, [300, 299, 5])
    parity = encoded(Code(3, 2), data, 301)
    assert [bytes(p) for p in parity] == [p + b"\0" for p in slow_parity(data, 2)]
    folded = [bytearray(301) for _ in range(2)]
    for i, c in enumerate(data):
        Code(3, 2).fold(i, c, dict(enumerate(folded)))
    assert folded == parity
    wanted = {0: bytearray(300), 2: bytearray(5)}
    Code(3, 2).decode({1: data[1], 3: parity[0], 4: parity[1]}, wanted)
    assert wanted == {0: data[0], 2: data[2]}


def test_threads_share_a_code() -> None:
    code, failures = Code(4, 2), []

    def work(seed: int) -> None:
        for turn in range(50):
            data = noise(seed * 100 + turn, [500 + turn] * 4)
            parity = encoded(code, data, 500 + turn)
            wanted = {i: bytearray(500 + turn) for i in (turn % 4, (turn + 1) % 4)}
            code.decode({i: c for i, c in enumerate([*data, *parity]) if i not in wanted}, wanted)
            if wanted != {i: data[i] for i in wanted}:
                failures.append((seed, turn))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def refused(match: str, call: str, *arguments: object, k: int = 2, m: int = 2) -> None:
    with pytest.raises(UsageError, match=match):
        getattr(Code(k, m), call)(*arguments)


def test_what_is_refused() -> None:
    a, b, p, q = bytes(8), bytes(8), bytearray(b"p" * 8), bytearray(b"q" * 8)
    for k, m in ((0, 1), (1, 0), (254, 2), (-1, 3)):
        with pytest.raises(UsageError, match="1 or more of each"):
            Code(k, m)
    refused("1 data and 2 parity", "encode", [a], [p, q])
    refused("different lengths", "encode", [a, b], [p, bytearray(9)])
    refused("9 bytes with parity of 8", "encode", [a, bytes(9)], [p, q])
    refused("read-only", "encode", [a, b], [p, bytes(8)])
    refused("overlaps", "encode", [a, b], [p, p])
    refused("overlaps", "encode", [a, memoryview(q)[2:4]], [p, q])
    refused("overlaps", "fold", 0, memoryview(p)[:4], {0: memoryview(p)[3:]})
    refused("contiguous", "encode", [a, np.zeros(16, dtype=np.uint8)[::2]], [p, q])
    refused("chunk 2 into", "fold", 2, a, {0: p})
    refused(r"parity \[2\]", "fold", 0, a, {2: p})
    refused(r"parity \[\]", "fold", 0, a, {})
    refused("8 bytes into parity of 7", "fold", 0, a, {0: p, 1: bytearray(7)})
    refused("1 chunks are present", "decode", {0: a}, {1: p})
    refused("chunk 4", "decode", {0: a, 1: b}, {4: p})
    refused("wanted, and present", "decode", {0: a, 1: b}, {1: p})
    refused("9 bytes with parity of 8", "decode", {0: bytes(9), 2: p}, {1: q})
    refused("9 bytes with parity of 8", "decode", {0: a, 2: p}, {1: bytearray(9)})
    refused("different lengths", "decode", {0: a, 2: p}, {3: bytearray(9)})
    refused("overlaps", "decode", {0: a, 2: p}, {1: p})
    assert (bytes(p), bytes(q)) == (b"p" * 8, b"q" * 8), "and nothing was written"


def test_a_library_that_computes_something_else_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Isal):
        def add(self, *arguments: object) -> None:
            pass

    [path] = erasure._vendored()
    assert not erasure._agrees(Wrong(path))
    monkeypatch.setattr(erasure, "Isal", Wrong)
    assert isinstance(erasure.arithmetic.__wrapped__(), Tables)


def test_where_there_is_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for spec in (None, ModuleSpec("pyeclib", None)):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, spec=spec: spec)
        assert erasure._vendored() == []
    looked_for = []

    def absent(path: str) -> Isal:
        looked_for.append(path)
        return Isal("/nowhere/" + path) if len(looked_for) == 1 else Isal("libc.so.6")

    monkeypatch.setattr(erasure, "_vendored", lambda: ["vendored"])
    monkeypatch.setattr(erasure, "Isal", absent)
    assert isinstance(erasure.arithmetic.__wrapped__(), Tables) and looked_for == ["libisal.so.2", "vendored"]
