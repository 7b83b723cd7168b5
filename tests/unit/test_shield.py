"""What a host lets be done to its slots and its parity areas, and when."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from ckpt.config import ErasureCode, settings
from ckpt.errors import CapacityError, IntegrityError
from ckpt.format.codec import BLOCK, crc32c
from ckpt.format.fragment import Box
from ckpt.format.pack import Piece as Fragment
from ckpt.format.pack import TensorSpec, layout_pack
from ckpt.keeper.areas import Areas
from ckpt.keeper.groups import Host, place
from ckpt.keeper.holding import Held, Memory, Part
from ckpt.keeper.loop import Loop
from ckpt.keeper.protocol import Frame, frame
from ckpt.keeper.segment import Segment
from ckpt.keeper.shield import Shield
from ckpt.keeper.streams import PIECE, STEP, Errand, Piece, pieces
from ckpt.keeper.sums import sum_of
from ckpt.keeper.wire import Layout, encode_layout
from ckpt.plan import SHARD, Claim, Claims, merge
from ckpt.snapshot.arena import Slot, rounded
from ckpt.write import pack_report

WAIT = 20.0
SIZE = (2 << 20) + 999


class Here:
    """A shield whose loop is turned by hand, on one of four hosts, which holds step 5 in slot 1."""

    def __init__(self) -> None:
        self.told: list[Frame] = []
        self.loop = Loop(lambda peer, message: None, lambda peer: None)
        self.door = socket.create_server(("127.0.0.1", 0))  # where nobody answers
        addresses = {f"h{n}": self.door.getsockname() for n in range(1, 4)}
        self.shield = Shield("h0", settings({}), self.loop, self.told.append, addresses)
        spec = TensorSpec("w", "uint8", (SIZE,))
        laid = layout_pack([Fragment(spec, Box((0,), (SIZE,)), None)])
        self.slot = Slot(laid.size)
        data = np.random.default_rng(1).integers(0, 256, SIZE, dtype=np.uint8)
        header = laid.header
        table = np.array([crc32c(data[i : i + BLOCK]) for i in range(0, SIZE, BLOCK)], dtype="<u4").view(np.uint8)
        self.at = int(laid.offset[0])
        self.slot.buffer[: len(header)] = np.frombuffer(header, dtype=np.uint8)
        self.slot.buffer[self.at : self.at + SIZE] = data
        self.slot.buffer[laid.table_offset : laid.table_offset + len(table)] = table
        plan = merge([Claims.of([Claim(spec, (Box((0,), (SIZE,)),), SHARD)])])
        part = Part(pack_report(laid, header, table), [], {})
        self.memory = Memory(os.dup(self.slot.fd), self.slot.size)
        self.held = Held(2, 5, 1, plan, {}, {0: part}, {0: self.memory}, {0: "h0"})
        n = rounded(laid.size)
        names = [self.shield.name, *(f"h{i}#x" for i in range(1, 4))]
        self.layout = Layout(
            place([Host(name, name, n) for name in names], ErasureCode(3, 1)), ((self.shield.name, 0, n),)
        )

    def turn(self, until: Callable[[], Any]) -> None:
        """Has the loop do what waits, until something is so."""
        end = time.monotonic() + WAIT

        def tick() -> None:
            assert time.monotonic() < end
            self.loop.after(0.01, tick)

        tick()
        self.loop.run(lambda: bool(until()) or time.monotonic() > end)
        assert until()

    def begin(self) -> None:
        self.shield.obey(frame("fence", generation=2))
        self.shield.obey(frame("lay", generation=2, layout=encode_layout(self.layout)))
        self.turn(lambda: self.shield.ready is not None)
        assert self.shield.ready == (2, frame("answer"))
        self.shield.hold((2, 5), self.held)

    def start(self, number: int = 1) -> None:
        self.shield.obey(frame("start", mark=[2, number], key=[2, 5], area=0))

    def errand(self, number: int = 1) -> Errand:
        chunk = self.shield.segment_of((2, 5)).share.chunks[0]  # type: ignore[union-attr]
        return Errand((2, number), (2, 5), 1, chunk.stripe, chunk.number, chunk.start, chunk.stop)

    def said(self, kind: str) -> list[Frame]:
        return [f for f in self.told if f.kind == kind]


@pytest.fixture
def here() -> Iterator[Here]:
    it = Here()
    yield it
    it.shield.close()
    it.door.close()
    it.memory.close()
    it.slot.close()


def test_a_slot_that_is_being_read_is_not_given_away(here: Here) -> None:
    """Its step is no longer there for anybody; and as soon as it is read no more, it may be written to. The loop goes on."""
    here.begin()
    here.start()
    errand = here.errand()
    assert here.shield.lend(errand, errand.start, errand.stop) is not None
    told: list[bool] = []
    here.shield.granted(frame("grant", slot=1, step=6), told.append)
    assert not told
    assert here.shield.lend(errand, errand.start, errand.stop) is None and here.shield.segment_of((2, 5)) is None
    assert here.shield.holding().inventory.whole == {}
    here.turn(lambda: told)
    assert told == [False], "it is read for too long"
    here.shield.granted(frame("grant", slot=1, step=7), told.append)
    here.shield.granted(frame("grant", slot=0, step=7), told.append)
    assert told == [False, True], "the other slot"
    here.shield.returned(errand)
    here.turn(lambda: len(told) == 3)
    assert told == [False, True, True]


@pytest.mark.parametrize("end", ["void", "fence", "pin"])
def test_a_grant_that_is_over_before_its_slot_is_free(here: Here, end: str) -> None:
    """The trainers never hear of it: they would write where another step is to go."""
    here.begin()
    here.start()
    errand = here.errand()
    assert here.shield.lend(errand, errand.start, errand.stop) is not None
    told: list[int] = []
    here.shield.granted(frame("grant", slot=1, step=6), lambda free: told.append(6))
    if end == "pin":
        here.shield.pin()
    else:
        here.shield.obey(frame("void", step=6) if end == "void" else frame("fence", generation=3))
    here.shield.granted(frame("grant", slot=2, step=9), lambda free: told.append(9))
    here.shield.returned(errand)
    passed: list[int] = []
    here.loop.after(1.2, lambda: passed.append(1))
    here.turn(lambda: passed)
    assert told == [9]


def test_nothing_is_sent_but_for_the_attempt_that_runs(here: Here) -> None:
    here.begin()
    first = Errand((2, 1), (2, 5), 1, 0, 0, 0, 10)
    assert here.shield.lend(first, 0, 10) is None, "before it begins"
    here.start()
    assert here.shield.lend(first, 0, 10) is not None
    here.shield.returned(first)
    here.start(2)
    assert here.shield.lend(first, 0, 10) is None and here.shield.lend(here.errand(2), 0, 10) is not None
    here.shield.returned(here.errand(2))
    here.shield.obey(frame("abandon", mark=[2, 2]))
    assert here.shield.lend(here.errand(2), 0, 10) is None


def test_an_order_that_comes_after_its_end_is_not_obeyed(here: Here) -> None:
    here.begin()
    here.shield.obey(frame("abandon", mark=[2, 3]))
    here.start(3)
    assert here.shield.ward.area((2, 3)) is None and not here.said("failed")
    here.start(4)
    assert here.shield.ward.area((2, 4)) == 0


def test_a_pin_holds_everything_until_the_next_life(here: Here) -> None:
    here.begin()
    here.start()
    here.turn(lambda: here.shield.areas.ready(0, (2, 1)))
    [parity] = here.layout.placement.groups[0].shares[here.shield.name].parity
    piece = Piece((2, 1), parity.stripe, 2, 0, parity.nbytes, PIECE, 0)
    assert here.shield.receiver.admit(piece) and here.shield.receiver.fold(piece, 0, np.zeros(STEP, np.uint8))
    holding = here.shield.pin()
    assert not here.shield.receiver.fold(piece, STEP, np.zeros(STEP, np.uint8))
    assert here.shield.pinned and holding.slots == {(2, 5): 1} and holding.layouts == {(2, 5): here.layout}
    assert here.shield.lend(here.errand(), 0, 10) is None
    here.start(9)
    assert "restart" in here.said("failed")[0]["why"] and here.shield.ward.area((2, 9)) is None
    here.shield.obey(frame("fence", generation=3))
    assert not here.shield.pinned and here.said("inventory")[-1]["fence"] == [3, 0]
    here.shield.obey(frame("fence", generation=2))
    assert len(here.said("inventory")) == 2, "a life that is over"


def test_a_step_that_is_not_here_cannot_be_encoded(here: Here) -> None:
    here.begin()
    here.shield.obey(frame("start", mark=[2, 1], key=[2, 6], area=0))
    assert "not in the memory of h0" in here.said("failed")[0]["why"]


def test_chunks_of_another_length_or_of_no_attempt_are_not_taken(here: Here) -> None:
    here.begin()
    here.start()
    here.turn(lambda: here.shield.areas.ready(0, (2, 1)))
    [parity] = here.layout.placement.groups[0].shares[here.shield.name].parity
    size = parity.nbytes
    piece = Piece((2, 1), parity.stripe, 2, 0, size, min(PIECE, size), 0)
    assert not here.shield.receiver.admit(Piece((2, 1), parity.stripe, 2, 0, size - 1, PIECE, 0))
    assert not here.shield.receiver.admit(Piece((1, 9), parity.stripe, 2, 0, size, PIECE, 0))
    assert here.shield.receiver.admit(piece) and not here.shield.receiver.admit(piece), "once"
    here.shield.obey(frame("abandon", mark=[2, 1]))
    assert not here.shield.receiver.fold(piece, 0, np.zeros(STEP, np.uint8))


def test_packs_are_checked_after_an_attempt_that_failed(here: Here) -> None:
    """Who gets what is damaged finds that it is, by its trainer's sums; then it is found out that it was so here."""
    here.begin()
    here.slot.buffer[here.at + 70_000] ^= 1
    segment = here.shield.segment_of((2, 5))
    assert segment is not None
    parts, crc = segment.piece(0, segment.share.chunks[0].stop)
    assert sum_of(parts) != crc
    here.start()
    assert not here.said("spoiled")
    here.start(2)
    here.turn(lambda: here.said("spoiled"))
    assert "is damaged" in here.said("spoiled")[0]["why"] and (2, 5) in here.shield.ward.spoiled


def test_a_segment_notices_what_changed_since_it_was_sent(here: Here) -> None:
    segment = Segment(here.held, here.layout, here.shield.name)
    chunk = segment.share.chunks[1]
    for a, b in pieces(chunk.start, chunk.stop):
        segment.piece(a, b)
    segment.check(0, segment.nbytes, set())
    here.slot.buffer[chunk.start] ^= 1
    segment.check(0, chunk.start, set())
    sound: set[int] = set()
    with pytest.raises(IntegrityError, match="is damaged"):
        segment.check(chunk.start + 5, chunk.start + 6, sound)
    assert not sound
    here.slot.buffer[chunk.start] ^= 1
    segment.check(chunk.start + 5, chunk.start + 6, sound)
    assert sound == {chunk.start}


def test_an_area_is_zeroed_only_when_nobody_folds_into_it() -> None:
    lock = threading.Condition()
    areas = Areas("h0", lock)
    areas.reserve(100, lambda number: True)
    areas.zero(0, 100, (1, 1), lambda: True)
    with lock:
        view = areas.enter(0)
        assert view is not None and areas.ready(0, (1, 1))
        areas.begin(0)
    thread = threading.Thread(target=areas.zero, args=(0, 100, (1, 2), lambda: True))
    thread.start()
    with lock:
        assert not lock.wait_for(lambda: areas.ready(0, (1, 2)), 0.2)
        areas.leave(0)
        assert lock.wait_for(lambda: areas.ready(0, (1, 2)), WAIT)
    thread.join(WAIT)


def test_what_comes_first_to_a_place_is_not_added_to_what_was_there() -> None:
    """Also where a shorter chunk comes first; and in each attempt anew."""
    lock = threading.Condition()
    areas, data = Areas("h0", lock), np.random.default_rng(5).integers(0, 256, 900, dtype=np.uint8)
    areas.reserve(700, lambda number: True)
    for mark in ((1, 1), (1, 2)):
        areas.zero(1, 700, mark, lambda: True)
        with lock:
            entered = areas.enter(1)
        assert entered is not None
        area, begun = entered
        area[:] = 0xEE
        areas.fold((2, 1), 0, 0, (4, 0), begun, area[:500], data[:300])
        areas.fold((2, 1), 1, 0, (4, 0), begun, area[:500], data[300:800])
        areas.fold((2, 1), 1, 0, (4, 1), begun, area[500:600], data[800:])
        expected = data[300:800].copy()
        expected[:300] ^= data[:300]
        assert np.array_equal(area[:500], expected) and np.array_equal(area[500:600], data[800:])
        assert (area[600:] == 0xEE).all()
        with lock:
            areas.leave(1)


def test_an_area_that_is_needed_stays_beside_a_larger_one() -> None:
    lock = threading.Condition()
    areas = Areas("h0", lock)
    areas.reserve(3 << 20, lambda number: True)
    assert areas.nbytes == 8 << 20
    for number in (0, 1):
        areas.zero(number, 3 << 20, (1, number), lambda: True)
    areas.seal(1, areas.sums(1, 3 << 20))
    areas.reserve(5 << 20, lambda number: number == 0)
    assert areas.nbytes == (6 + 4 + 6) << 20 and areas.sealed(1)
    areas.read(1, 0, 3 << 20, set())
    areas.begin(1)
    areas.zero(1, 5 << 20, (2, 1), lambda: True)
    assert areas.nbytes == 12 << 20
    areas.reserve(1 << 20, lambda number: True)
    assert areas.nbytes == 12 << 20, "large enough"
    with pytest.raises(CapacityError, match="no memory for"):
        areas.zero(0, 7 << 20, (3, 1), lambda: True)
    with pytest.raises(CapacityError, match="h0 is to keep parity"):
        areas.reserve(1 << 50, lambda number: False)
    assert areas.nbytes == 12 << 20
