"""Ranges that a keeper lends: over real sockets, after the real greeting, from memory whose every byte is known."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np
import pytest

from ckpt.errors import CkptError, DeadlineError, IntegrityError, PeerError
from ckpt.keeper import loan
from ckpt.keeper.loan import PARITY, SEGMENT, Loans, lend
from ckpt.keeper.loop import Loop, Peer
from ckpt.keeper.protocol import Frame

SECRET = b"of this job"
KEY = (3, 7)
HELD = {what: random.Random(what).randbytes(5 << 20) for what in (0, 4, SEGMENT, PARITY)}
WAIT = 20.0


class Lender:
    """A keeper's loop and its lending threads. `refuses`: from which byte of the segment on; `before` each range."""

    def __init__(self) -> None:
        self.refuses, self.lent, self.keys = 1 << 60, 0, list[tuple[int, int]]()
        self.before: Callable[[], object] = lambda: None
        self._loop, self._over = Loop(self._hear, lambda _: None, SECRET), False
        listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = listener.getsockname()
        self._loop.listen(listener)
        self._threads = [threading.Thread(target=self._loop.run, args=(lambda: self._over,))]
        self._threads[0].start()

    def _hear(self, peer: Peer, message: Frame) -> None:
        assert message.kind == "lend"
        self.keys.append(tuple(message["key"]))
        sock = self._loop.release(peer)

        def work() -> None:
            with sock, suppress(CkptError, OSError):
                lend(sock, message["id"], self._find)

        self._threads.append(threading.Thread(target=work))
        self._threads[-1].start()

    def _find(self, what: int, start: int, stop: int) -> list[np.ndarray]:  # type: ignore[type-arg]
        self.before()
        if what == SEGMENT and stop > self.refuses:
            raise IntegrityError("it is damaged")
        self.lent += 1
        data, cut = np.frombuffer(HELD[what], dtype=np.uint8), (start + stop) // 2
        return [data[start:cut], data[cut:stop]]

    def close(self) -> None:
        self._over = True
        self._loop.later(lambda: None)
        for thread in self._threads:
            thread.join(WAIT)
            assert not thread.is_alive()


@pytest.fixture
def lender() -> Iterator[Lender]:
    it = Lender()
    yield it
    it.close()


@pytest.fixture
def loans(lender: Lender) -> Iterator[Loans]:
    it = Loans(KEY, SECRET, WAIT)
    yield it
    it.close()


def ranges(seed: int, count: int) -> list[tuple[int, int, int]]:
    """(what, offset, length): many small ones and a few that are larger than what is sent at once."""
    rng = random.Random(seed)
    sizes = [
        rng.choice((0, 1, 33, 4096, 300_000, 3 << 20)) if n % 40 == 0 else rng.randrange(200) for n in range(count)
    ]
    return [(rng.choice(sorted(HELD)), rng.randrange((5 << 20) - n), n) for n in sizes]


def test_what_is_asked_for_comes_in_that_order(lender: Lender, loans: Loans) -> None:
    """Of several threads at once, which have connections of their own."""
    wrong: list[tuple[int, int, int]] = []

    def read(seed: int) -> None:
        mine = loans.at(lender.address)
        for _ in range(2):
            asked = ranges(seed, 1500)
            for row in asked:
                mine.ask(*row)
            for what, offset, n in asked:
                into = bytearray(n)
                mine.take(memoryview(into))
                if into != HELD[what][offset : offset + n]:
                    wrong.append((what, offset, n))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert not wrong and lender.lent == 3 * 2 * 1500 and lender.keys == [KEY] * 3


def test_a_refusal_comes_in_its_place_and_is_the_end(lender: Lender, loans: Loans) -> None:
    lender.refuses = 1000
    mine, into = loans.at(lender.address), bytearray(600)
    for offset in (0, 300, 900, 300):
        mine.ask(SEGMENT, offset, 600)
    for offset in (0, 300):
        mine.take(memoryview(into))
        assert into == HELD[SEGMENT][offset : offset + 600]
    with pytest.raises(IntegrityError, match="it is damaged"):
        mine.take(memoryview(into))
    assert mine.closed
    again = loans.at(lender.address)
    again.ask(0, 5, 600)
    again.take(memoryview(into))
    assert again is not mine and into == HELD[0][5:605]


def test_a_keeper_that_says_nothing_any_more(lender: Lender) -> None:
    go = threading.Event()
    lender.before = lambda: go.wait(WAIT)
    loans = Loans(KEY, SECRET, 0.3)
    mine = loans.at(lender.address)
    mine.ask(0, 0, 10)
    with pytest.raises(DeadlineError):
        mine.take(memoryview(bytearray(10)))
    go.set()
    assert mine.closed


@pytest.mark.parametrize("kind, payload", [("ranges", bytes(23)), ("piece", bytes(24))])
def test_what_makes_no_sense_ends_the_connection(
    lender: Lender, loans: Loans, monkeypatch: pytest.MonkeyPatch, kind: str, payload: bytes
) -> None:
    mine, frame = loans.at(lender.address), loan.frame
    monkeypatch.setattr(loan, "frame", lambda *_: frame(kind, payload))
    mine.ask(0, 0, 10)
    with pytest.raises(PeerError):
        mine.take(memoryview(bytearray(10)))
    assert not lender.lent


def test_another_job_is_lent_nothing(lender: Lender) -> None:
    with pytest.raises(PeerError):
        Loans(KEY, b"of another job", WAIT).at(lender.address)
    assert not lender.keys
