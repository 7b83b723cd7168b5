"""Saves that go on while training does: snapshot in a slot of this process -> storage -> commit, in two threads.

One save at a time: it holds the process's one slot from its first copied byte to its commit. The main thread agrees
with the other ranks and copies what may change at any moment; a second thread copies the rest, behind the fence; a
third writes what is copied already, and agrees on the commit over a channel of its own, never over the user's process group.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ckpt.collective import Group
from ckpt.config import Settings, settings
from ckpt.errors import CkptError, DeadlineError
from ckpt.format.codec import Codec, choose_codec
from ckpt.saving import Agreed, Planner, Request, SaveReport, Work, agree, commit, prepare, ring, sources_of
from ckpt.snapshot.arena import Slot
from ckpt.snapshot.copier import Snapshot, give_way
from ckpt.snapshot.fence import fence_here, owned_storages
from ckpt.state import walk
from ckpt.write import PackReport, Source, Stored, encode_report, write_buffer, write_pack

__all__ = ["SaveHandle", "begin_save", "pace"]

log = logging.getLogger("ckpt")


class SaveHandle:
    """A save under way. Nothing about it is collective."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.stalled = 0.0
        """Seconds that its beginning held up this rank."""
        self._staged, self._done = threading.Event(), threading.Event()
        self._report: SaveReport | None = None
        self._error: Exception | None = None

    def staged(self, timeout: float | None = 0.0) -> bool:
        """Whether the state is copied, so that anything may change it; waits up to `timeout` seconds for that.

        A step of an optimizer in the state waits by itself.
        """
        return self._staged.wait(timeout)

    def done(self, timeout: float | None = 0.0) -> bool:
        """Whether it has ended, well or not; waits up to `timeout` seconds for that."""
        return self._done.wait(timeout)

    def committed(self, timeout: float | None = 0.0) -> bool:
        """Whether the checkpoint exists; waits up to `timeout` seconds for the save to end. False if it failed."""
        return self._done.wait(timeout) and self._error is None

    def result(self, timeout: float | None = None) -> SaveReport:
        """The report, once it is committed. Raises what `ckpt.save` would have; DeadlineError after `timeout`."""
        if not self._done.wait(timeout):
            raise DeadlineError(f"the save of step {self.step} is not done after {timeout} s; it goes on")
        if self._error is not None:
            raise self._error
        assert self._report is not None
        return self._report

    def follow(self, copied: threading.Event) -> None:
        """`copied` says when the state is."""
        self._staged = copied

    def end(self, outcome: SaveReport | Exception) -> None:
        if isinstance(outcome, Exception):
            self._error = outcome
        else:
            self._report = outcome
        self._staged.set()
        self._done.set()


@dataclass
class _Process:
    """What a process keeps for its background saves. A fork has none of its parent's threads, and makes its own."""

    copying: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, "ckpt-copy", initializer=give_way)
    )
    saving: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "ckpt-save"))
    slot: Slot | None = None
    last: SaveHandle | None = None

    def slot_of(self, size: int) -> Slot:
        """The slot, made larger if the pack has grown. Raises CapacityError."""
        if self.slot is None or self.slot.size < size:
            if self.slot is not None:
                self.slot.close()
                self.slot = None
            self.slot = Slot(size)
        return self.slot


_processes: dict[int, _Process] = {}


def _process() -> _Process:
    if os.getpid() not in _processes:
        _processes[os.getpid()] = _Process()
    return _processes[os.getpid()]


def begin_save(
    request: Request,
    state: Any,
    group: Group,
    planner: Planner,
    after: Callable[[SaveReport | Exception], None] | None = None,
) -> SaveHandle:
    """Begins a save and returns; collective over `group`. `after` is called with its outcome, in the saving thread.

    Waits for the previous save of this process, whose slot it takes. Raises, on every rank, what agreeing raises:
    UsageError, LayoutError, ConflictError, PeerError; all that fails later is told by the handle.
    """
    began = time.monotonic()
    here, own = _process(), group.beside()
    if here.last is not None and not here.last.done(settings().deadline):
        raise DeadlineError(f"step {here.last.step} is still being saved after {settings().deadline:.0f} s")
    agreed = agree(request, state, group, planner)
    handle = here.last = SaveHandle(request.step)
    taken: _Taken | Exception | None
    try:
        taken = _take(here, state, agreed, prepare(planner, agreed.assignment, agreed.leaves, ()))
    except Exception as e:
        taken = e  # the others wait for this rank's part in the commit
    if isinstance(taken, _Taken):
        handle.follow(taken.snapshot.copied)
    try:
        here.saving.submit(_finish, handle, agreed, taken, request.codecs, own, after)
    except RuntimeError:  # no thread to be had: the others wait for this rank all the same
        _finish(handle, agreed, taken, request.codecs, own, after)
    handle.stalled = time.monotonic() - began
    return handle


@dataclass(frozen=True)
class _Taken:
    """A snapshot under way, the work it is made from, and what it will be once it is sealed."""

    work: Work
    snapshot: Snapshot
    progress: _Progress
    sealed: Future[PackReport]

    def await_bytes(self, end: int) -> None:
        """See `write_buffer`."""
        if not self.progress.wait(end):
            self.sealed.result()  # raises why


def _take(here: _Process, state: Any, agreed: Agreed, work: Work) -> _Taken | None:
    """Copies what has no fence, and starts copying the rest. None on a rank that has nothing to write."""
    if not work.pieces:
        return None
    config = settings()
    optimizers = [v for _, v, _, _ in walk(state) if isinstance(v, torch.optim.Optimizer)]
    fence = fence_here()
    for optimizer in optimizers:
        fence.guard(optimizer)
    owned = owned_storages(optimizers)
    views = [agreed.leaves[i].held.pieces[k][1] for i, k, _ in work.places]
    lazy = [view.untyped_storage().data_ptr() in owned for view in views]
    slot = here.slot_of(work.layout.size)
    snapshot = Snapshot(work.layout, sources_of(agreed.leaves, work), lazy, slot.buffer, checked=config.check_copies)
    progress = _Progress()
    sealed = here.copying.submit(_copy, snapshot, pace(config), progress)
    fence.put(snapshot.copied, snapshot.give_up)  # only now: without a thread nobody would ever lift it
    return _Taken(work, snapshot, progress, sealed)


class _Progress:
    """How far the copying thread is, for the one that writes what is copied."""

    def __init__(self) -> None:
        self._moved = threading.Condition()
        self._at = self._wanted = 0
        self._over = False

    def reach(self, at: int) -> None:
        self._at = at
        if at >= self._wanted:  # the other one is woken for a chunk of the file, not for each that is copied
            with self._moved:
                self._moved.notify()

    def end(self) -> None:
        with self._moved:
            self._over = True
            self._moved.notify()

    def wait(self, at: int) -> bool:
        """Whether it got there, once it has or it went no further."""
        with self._moved:
            self._wanted = at
            self._moved.wait_for(lambda: self._at >= at or self._over)
            return self._at >= at


def _copy(snapshot: Snapshot, paced: Callable[[int], None], progress: _Progress) -> PackReport:
    """The lazy copies and the seal, in the copying thread."""

    def told(n: int) -> None:
        progress.reach(snapshot.final)
        paced(n)

    try:
        snapshot.copy_rest(told)
        report = snapshot.seal()
        progress.reach(snapshot.final)
        return report
    finally:
        progress.end()


def pace(config: Settings) -> Callable[[int], None]:
    """Called with the bytes of each chunk that was copied: waits where that was faster than the cap."""
    rate, began, done = config.copy_gbps * 1e9, time.monotonic(), 0
    never = threading.Event()

    def paced(n: int) -> None:
        nonlocal done
        done += n
        if rate:
            never.wait(max(0.0, began + done / rate - time.monotonic()))

    return paced


def _finish(
    handle: SaveHandle,
    agreed: Agreed,
    taken: _Taken | Exception | None,
    codecs: Sequence[tuple[str, Codec]],
    group: Group,
    after: Callable[[SaveReport | Exception], None] | None,
) -> None:
    """The rest of a save, in the saving thread: until it is committed, or known on all ranks to have failed."""
    outcome: SaveReport | Exception
    try:
        report: PackReport | None = None
        payload: bytes | Exception
        try:
            if isinstance(taken, Exception):
                raise taken
            if taken is not None:
                try:
                    report = _persist(agreed, taken, codecs, group)
                finally:
                    wait([taken.sealed])  # the slot is the next save's only when nobody copies into it any more
            payload = encode_report(report)
        except Exception as e:
            payload = e
        outcome = commit(agreed, group, payload, report)
    except Exception as e:
        outcome = e
    if after is not None:
        try:
            after(outcome)
        except Exception as e:
            log.error("ckpt: after the save of step %d: %s", handle.step, e, exc_info=e)
    elif isinstance(outcome, Exception):
        log.error(
            "ckpt: the save of step %d failed: %s", handle.step, outcome,
            exc_info=None if isinstance(outcome, CkptError) else outcome,
        )  # fmt: skip
    handle.end(outcome)


def _persist(agreed: Agreed, taken: _Taken, codecs: Sequence[tuple[str, Codec]], group: Group) -> PackReport:
    """Slot -> storage: as it is, while it is being copied; or laid out anew, after that, where a codec applies."""
    backend, path, config = agreed.lead.backend, agreed.path(group.rank), settings()
    pieces = [replace(p, codec=choose_codec(p.tensor.name, codecs)) for p in taken.work.pieces]
    if any(p.codec for p in pieces):
        taken.sealed.result()
        return write_pack(backend, path, pieces, list(_stored(taken.snapshot, len(pieces))), ring(config))
    with ThreadPoolExecutor(config.writers, "ckpt-write") as threads:  # the slot is its buffer: it needs no ring
        chunk, pack = config.buffer_mib << 20, taken.snapshot.buffer
        write_buffer(backend, path, pack, threads, chunk, await_bytes=taken.await_bytes)
    return taken.sealed.result()


def _stored(snapshot: Snapshot, n: int) -> Iterator[Source]:
    return (Stored(snapshot.fragment(k)) for k in range(n))
