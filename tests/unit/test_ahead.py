"""Reads ahead give the right bytes, ask for no byte in vain here and there, and stay within their memory."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.backends import ahead
from ckpt.backends.ahead import Ahead
from ckpt.errors import StorageError

DATA = np.random.default_rng(0).integers(0, 256, 3_000_000, dtype=np.uint8).tobytes()


class Store:
    """One object, and what was asked of it."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.broken = threading.Event()

    def get(self, path: str, offset: int, into: memoryview) -> int:
        self.asked.append((offset, len(into)))
        if self.broken.is_set():
            raise StorageError("gone")
        data = DATA[offset : offset + len(into)]
        into[: len(data)] = data
        return len(data)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("WINDOW", 80_000),
        ("BUDGET", 640_000),
        ("_LARGE", 160_000),
        ("_FIRST", 10_000),
        ("_SLACK", 20_000),
    ):
        monkeypatch.setattr(ahead, name, value)


def read(a: Ahead, offset: int, *sizes: int) -> bytes:
    buffers = [bytearray(n) for n in sizes]
    got = a.read("x", offset, [memoryview(b) for b in buffers])
    return b"".join(buffers)[:got]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.one_of(st.integers(0, len(DATA) + 10), st.just(-1)),
            st.lists(st.integers(0, 200_000), min_size=1, max_size=4),
        ),
        max_size=12,
    ),
    st.booleans(),
)
def test_the_right_bytes(reads: list[tuple[int, list[int]]], told: bool) -> None:
    a, at = Ahead(Store().get), 0
    if told:
        a.told("x", len(DATA))
    for offset, sizes in reads:
        at = at if offset < 0 else offset
        assert read(a, at, *sizes) == DATA[at : at + sum(sizes)]
        at += sum(sizes)
    a.close()


def test_readers_in_order_wait_for_few_requests() -> None:
    store = Store()
    a = Ahead(store.get)
    a.told("x", len(DATA))
    for at in range(0, len(DATA), 10_000):
        assert read(a, at, 10_000) == DATA[at : at + 10_000]
    assert len(store.asked) < len(DATA) / 80_000 + 10
    assert sum(n for _, n in store.asked) <= len(DATA)
    a.close()


def test_reads_here_and_there_ask_for_just_that() -> None:
    store = Store()
    a = Ahead(store.get)
    places = [(k * 100_000, 1000 + k) for k in np.random.default_rng(3).permutation(30).tolist()]
    for at, n in places:
        assert read(a, at, n) == DATA[at : at + n]
    assert store.asked == places


def test_memory_stays_within_the_budget() -> None:
    a = Ahead(Store().get)
    for k in range(40):
        for path in ("a", "b", "c"):
            a.read(path, k * 10_000, [memoryview(bytearray(10_000))])
            held = sum(len(w.data) for streams in a._streams.values() for s in streams for w in s.windows)
            assert held <= ahead.BUDGET
    a.close()


def test_many_threads_on_one_object() -> None:
    store, jobs = Store(), iter(range(0, len(DATA), 10_000))
    a, lock = Ahead(store.get), threading.Lock()
    a.told("x", len(DATA))

    def work(_: int) -> bool:
        while True:
            with lock:
                at = next(jobs, None)
            if at is None:
                return True
            if read(a, at, 4000, 6000) != DATA[at : at + 10_000]:
                return False

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    a.close()


def test_a_store_that_is_back_is_read_again() -> None:
    store = Store()
    a = Ahead(store.get)
    read(a, 0, 10_000)
    store.broken.set()
    for _ in range(2):
        with pytest.raises(StorageError):
            read(a, 10_000, 10_000)
    store.broken.clear()
    assert read(a, 10_000, 10_000) == DATA[10_000:20_000]
    a.close()
