"""One host's part in protecting steps: drives its `Ward`. Sends chunks of what is in its slots to the hosts that keep
parity of them, folds what others send into its own two parity areas, and reports.

    loop        orders come in, reports go out; what takes long is left to threads
    one thread  reserves areas, and has them begin anew
    one thread  checks the packs of a step, where an attempt to protect it has failed: damage must not be encoded
    couriers    one a host that keeps parity of this one; they read the slots
    receivers   one a host whose parity is kept here; they fold into the areas

The ward, and what stands beside it here, is behind one lock, which nobody holds while bytes are moved. A slot is given to
the trainers only when no courier reads it any more; an area is zeroed only when nobody folds into it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from ckpt import faults
from ckpt.config import Settings
from ckpt.errors import CapacityError, CkptError, IntegrityError, to_wire
from ckpt.keeper.areas import Areas
from ckpt.keeper.groups import Group, Placement
from ckpt.keeper.guard import Mark, Start, Ward
from ckpt.keeper.holding import Held
from ckpt.keeper.lead import Key
from ckpt.keeper.loop import Loop
from ckpt.keeper.protocol import Frame, frame
from ckpt.keeper.receiver import Receiver
from ckpt.keeper.segment import Segment
from ckpt.keeper.streams import Courier, Errand, Throttle
from ckpt.keeper.wire import Holding, Layout, decode_layout, encode_holding

__all__ = ["Shield", "host_of", "key_of"]

log = logging.getLogger("ckpt.keeper")
Bytes = npt.NDArray[np.uint8]
_LET_GO = 1.0  # seconds in which a courier that was interrupted lets go of a slot


def host_of(name: str) -> str:
    """The host of a ward, whose name is of one life of its keeper."""
    return name.rpartition("#")[0]


def key_of(pair: list[int]) -> tuple[int, int]:
    """A step or a mark, as it came."""
    return int(pair[0]), int(pair[1])


class Shield:
    """`tell` tells the seat; `addresses`: where the keepers of other hosts listen."""

    def __init__(
        self,
        host: str,
        config: Settings,
        loop: Loop,
        tell: Callable[[Frame], None],
        addresses: Mapping[str, tuple[str, int]],
    ) -> None:
        self.host, self.name = host, f"{host}#{os.urandom(4).hex()}"
        self._config, self._loop, self._tell, self._addresses = config, loop, tell, addresses
        self._lock = threading.Condition()
        self.ward = Ward(self.name)
        self.areas = Areas(host, self._lock)
        self.receiver = Receiver(self.ward, self.areas, self._lock, self._finish, self._failed, config.protect_patience)
        self.pinned = False  # a restart is under way: nothing may change
        self.layout: tuple[int, Layout] | None = None  # of the life under way, with its generation
        self.announced: Key | None = None
        self._segments: dict[Key, Segment] = {}
        self._layouts: dict[Key, Layout] = {}
        self._reading: dict[int, int] = {}  # couriers in a slot
        self._grants: dict[int, tuple[Frame, Callable[[bool], None]]] = {}  # of slots that are still being read
        self._sent: tuple[Mark, Key] | None = None  # what is being sent
        self._checks: dict[Key, bool] = {}  # steps that were begun with, and whether their packs are not in doubt
        self._reported: Mark = (0, 0)
        self._couriers: dict[str, Courier] = {}
        self._throttle = Throttle(config.protect_gbps * 1e9)
        self._working = ThreadPoolExecutor(1, "ckpt-parity")
        self._checking = ThreadPoolExecutor(1, "ckpt-check")
        self.ready: tuple[int, Frame] | None = None  # the life of `layout`, and whether this host can protect its steps
        self.ready_changed: Callable[[], None] = lambda: None

    # What is asked.

    def holding(self) -> Holding:
        """What is held here."""
        with self._lock:
            inventory = self.ward.tell()
            slots = {key: self._segments[key].held.slot for key in inventory.whole}
            return Holding(self.host, inventory, slots, dict(self._layouts))

    def pin(self) -> Holding:
        """From now on everything stays as it is, until the next life begins."""
        with self._lock:
            self.pinned = True
            self.ward.pin()
            self._grants.clear()
            self._stop()
            self._lock.notify_all()
        return self.holding()

    def parity_of(self, key: Key) -> int | None:
        """The area that a step is encoded in, in full."""
        with self._lock:
            found = next((n for n, a in enumerate(self.ward.areas) if a and a.encoded and a.area.key == key), None)
            return found if found is not None and self.areas.sealed(found) else None

    def segment_of(self, key: Key) -> Segment | None:
        """This host's part of a step."""
        with self._lock:
            return self._segments.get(key)

    # Orders, and what happens to the slots; in the loop.

    def obey(self, order: Frame) -> None:
        """fence, lay, start, abandon, announced, void."""
        if order.kind == "fence":
            told = self.fence(int(order["generation"]))
            if told is not None:
                self._tell(told)
        elif order.kind == "lay":
            self._lay(order)
        elif order.kind == "start":
            self._start(key_of(order["mark"]), key_of(order["key"]), int(order["area"]))
        elif order.kind == "abandon":
            with self._lock:
                self.ward.abandon(key_of(order["mark"]))
                self._stop(key_of(order["mark"]))
                self._lock.notify_all()
        elif order.kind == "announced":
            self.announced = int(order["generation"]), int(order["step"])
        elif order.kind == "void":
            self._grants = {n: g for n, g in self._grants.items() if g[0]["step"] != order["step"]}

    def fence(self, generation: int) -> Frame | None:
        """A life begins, or has another seat now: raises the fence, and says what is held. None if that life is over."""
        with self._lock:
            if generation < self.ward.fence[0]:
                return None
            if self.ward.inventory(generation) is None:
                self.ward.pin()  # what another seat of this life has ordered
            self.pinned = False
            self._grants.clear()
            self._stop()
            fence = self.ward.fence
            self._lock.notify_all()
        near = {host: list(address) for host, address in self._addresses.items()}
        return frame(
            "inventory", holding=encode_holding(self.holding()), fence=list(fence), near=near,
            domain=self._config.domain or self.host,
        )  # fmt: skip

    def _lay(self, order: Frame) -> None:
        """How the steps to come lie on the hosts; what parity takes is reserved."""
        generation, self.ready = int(order["generation"]), None
        if "error" in order.head:
            self.layout = None
            self._be_ready(generation, frame("answer", error=order["error"]))
            return
        laid = self.layout = generation, decode_layout(order["layout"])
        if self.name not in laid[1].placement.names:  # another one is on its way
            return
        size = self._group(laid[1].placement).shares[self.name].parity_bytes

        def reserve() -> None:
            told = frame("answer")
            try:
                self.areas.reserve(size, self._give_up)
            except (CkptError, OSError, MemoryError) as e:
                log.error("no protection: %s", e)
                told = frame("answer", error=list(to_wire(e)))
            self._loop.later(lambda: self._be_ready(generation, told) if self.layout is laid else None)

        self._working.submit(reserve)

    def _be_ready(self, generation: int, told: Frame) -> None:
        self.ready = generation, told
        self.ready_changed()

    def _give_up(self, number: int) -> bool:
        """Whether an area is not needed; ends what is under way in it."""
        folded = self.ward.areas[number]
        if folded is not None and folded.encoded:
            return False
        if folded is not None:
            self._failed(folded.mark, f"{self.host} reserves other memory for parity")
        return True

    def hold(self, key: Key, held: Held) -> None:
        """A step is complete."""
        if self.layout is None or self.layout[0] != key[0] or self.name not in self.layout[1].placement.names:
            return
        try:
            segment = Segment(held, self.layout[1], self.name)
        except CkptError as e:
            log.error("step %d is not protected: %s", key[1], e)
            return
        with self._lock:
            self._segments[key], self._layouts[key] = segment, segment.layout
            self.ward.hold(key, segment.layout.placement)

    def granted(self, grant: Frame, told: Callable[[bool], None]) -> None:
        """A slot is about to be written to. `told`, in the loop, once nobody reads it any more; with False if somebody does
        so for too long. Not at all if the grant is void before, or the life is over."""
        slot = int(grant["slot"])
        with self._lock:
            self._drop([key for key, segment in self._segments.items() if segment.held.slot == slot])
            self._grants.pop(slot, None)
            if self._reading.get(slot):
                self._grants[slot] = grant, told
        if slot in self._grants:
            self._loop.after(_LET_GO, lambda: self._let_go(grant, False))
        else:
            told(True)

    def _let_go(self, grant: Frame, free: bool) -> None:
        """A grant waits no longer, if it did."""
        if self._grants.get(int(grant["slot"]), (None,))[0] is grant:
            self._grants.pop(int(grant["slot"]))[1](free)

    def keep(self, steps: Collection[Key]) -> None:
        """These steps are in slots; others are not any more."""
        with self._lock:
            self._drop([key for key in self._segments if key not in steps])

    def _drop(self, keys: Collection[Key]) -> None:
        for key in keys:
            self.ward.drop(key)
            del self._segments[key]
            self._checks.pop(key, None)
            if self._sent is not None and self._sent[1] == key:
                self._stop()
        encoded = {a.area.key for a in self.ward.areas if a is not None}
        for key in [k for k in self._layouts if k not in self._segments and k not in encoded]:
            del self._layouts[key]

    def spoil(self, key: Key, why: str) -> None:
        """What this host holds of a step is not what it was."""
        log.error("%s", why)
        with self._lock:
            self.ward.spoil(key)
        self._tell(frame("spoiled", name=self.name, key=list(key), why=why))

    # An encoding.

    def _group(self, placement: Placement) -> Group:
        return placement.groups[placement.group_of(self.name)]

    def _start(self, mark: Mark, key: Key, area: int) -> None:
        why = "a restart is under way" if self.pinned else f"step {key[1]} is not in the memory of {self.host}"
        with self._lock:
            segment = self._segments.get(key)
            if segment is not None and not self.pinned:
                placement = segment.layout.placement
                start = Start(mark, key, area, placement, placement.group_of(self.name))
                if not self.ward.start(start):
                    return
                self._stop()
                check = key in self._checks or not self._group(placement).parity
                self._sent, why, self._checks[key] = (mark, key), "", not check
                moved = self.receiver.moved = time.monotonic()
                self.areas.begin(area)
        if why:
            self._tell(frame("failed", name=self.name, mark=list(mark), why=why))
            return
        assert segment is not None
        faults.point("shield started")
        self._send(mark, key, segment)
        if check:
            self._checking.submit(self._check, mark, key, segment)
        self._working.submit(self._zero, start, segment.share.parity_bytes)
        self._loop.after(self._config.protect_patience / 4, lambda: self._look_after(mark, moved, 1))

    def _send(self, mark: Mark, key: Key, segment: Segment) -> None:
        for chunk in segment.share.chunks:
            for host in map(host_of, chunk.keepers if chunk.stop > chunk.start else ()):
                courier, address = self._couriers.get(host), self._addresses.get(host)
                if address is None:
                    self._failed(mark, f"nobody knows where the keeper of {host} listens")
                    return
                if courier is None or courier.address != address:
                    if courier is not None:
                        courier.close()
                    patience = self._config.protect_patience
                    courier = Courier(address, self._loop.secret, self, self._throttle, patience)
                    self._couriers[host] = courier
                courier.bring(Errand(mark, key, segment.held.slot, chunk.stripe, chunk.number, chunk.start, chunk.stop))

    def _check(self, mark: Mark, key: Key, segment: Segment) -> None:
        """Whether the packs of a step are what was sealed: before that is known, nothing is reported.

        Of a step that an attempt has failed for, since the sums of what is sent are those that its trainers took: who folds
        it finds what is damaged, and cannot tell where that came about.
        """
        why = ""
        try:
            segment.check_packs()
        except IntegrityError as e:
            why = str(e)
        except Exception as e:
            self._failed(mark, f"{self.host}: {type(e).__name__}: {e}")
            return
        with self._lock:
            if self._segments.get(key) is not segment:
                return  # its slot may be another step's already
            if not why:
                self._checks[key] = True
        if why:
            self._loop.later(lambda: self.spoil(key, why))
        else:
            self._finish(mark)

    def _zero(self, start: Start, size: int) -> None:
        try:
            self.areas.zero(start.area, size, start.mark, lambda: self.ward.area(start.mark) == start.area)
        except CapacityError as e:
            self._failed(start.mark, str(e))
            return
        self._finish(start.mark)

    def _finish(self, mark: Mark) -> None:
        """Reports an attempt once all is folded, its sums are taken, and the step's own packs are known to be good."""
        with self._lock:
            number = self.ward.area(mark)
            if number is None or not self.ward.encoded(mark) or not self.areas.ready(number, mark):
                return
            folded = self.ward.areas[number]
            assert folded is not None
            key, placement, sealed = folded.area.key, folded.area.placement, self.areas.sealed(number)
        if not sealed:
            faults.point("shield encoded")
            sums = self.areas.sums(number, self._group(placement).shares[self.name].parity_bytes)
        with self._lock:
            if self.ward.area(mark) != number:
                return
            if not sealed:
                self.areas.seal(number, sums)
            if not self._checks.get(key) or self._reported >= mark:
                return
            self._reported = mark
        self._loop.later(lambda: self._tell(frame("encoded", name=self.name, mark=list(mark))))

    def _failed(self, mark: Mark, why: str) -> None:
        """An attempt cannot be finished here. From any thread."""
        with self._lock:
            self.ward.broken(mark)
            self._stop(mark)
            self._lock.notify_all()
        self._loop.later(lambda: self._tell(frame("failed", name=self.name, mark=list(mark), why=why)))

    def _stop(self, mark: Mark | None = None) -> None:
        """Nothing is sent any more (of this attempt), and what is being sent ends in the middle; under the lock."""
        if self._sent is None or (mark is not None and self._sent[0] != mark):
            return
        self._sent = None
        for courier in self._couriers.values():
            courier.interrupt()

    def _look_after(self, mark: Mark, moved: float, quiet: int) -> None:
        """Four times in the seconds that an attempt is given without a byte: says that it goes on, or that it does not."""
        with self._lock:
            if self.ward.area(mark) is None or self._reported >= mark:
                return
            now, done = self.receiver.moved, self.ward.encoded(mark)
        if now == moved and quiet >= 4 and not done:
            self._failed(mark, f"nothing came to {self.host} for {self._config.protect_patience:g} s")
            return
        if now != moved:
            self._tell(frame("folding", mark=list(mark)))
        again = quiet + 1 if now == moved else 1
        self._loop.after(self._config.protect_patience / 4, lambda: self._look_after(mark, now, again))

    # What couriers ask, in their threads.

    def lend(self, errand: Errand, start: int, stop: int) -> tuple[list[Bytes], int] | None:
        """Bytes of a slot and their sum, until `returned`; None if they may not be sent any more."""
        with self._lock:
            segment = self._segments.get(errand.key)
            if self._sent != (errand.mark, errand.key) or segment is None:
                return None
            self._reading[errand.slot] = self._reading.get(errand.slot, 0) + 1
        try:
            return segment.piece(start, stop)
        except IntegrityError as e:
            self.returned(errand)
            why = str(e)
            self._loop.later(lambda: self.spoil(errand.key, why))
            return None

    def returned(self, errand: Errand) -> None:
        with self._lock:
            self._reading[errand.slot] -= 1
            waiting = self._grants.get(errand.slot) if not self._reading[errand.slot] else None
        if waiting is not None:
            self._loop.later(lambda: self._let_go(waiting[0], True))

    def undelivered(self, errand: Errand, why: str) -> None:
        """A chunk did not arrive."""
        with self._lock:
            wanted = self._sent == (errand.mark, errand.key)
        if wanted:
            self._failed(errand.mark, f"{self.host}: {why}")

    def close(self) -> None:
        """Sends nothing any more."""
        with self._lock:
            self._stop()
        for courier in self._couriers.values():
            courier.close()
        for pool in (self._working, self._checking):
            pool.shutdown(wait=False, cancel_futures=True)
