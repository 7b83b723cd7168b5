"""What brings steps from the local tier to the remote one: one thread a folder, behind everything else; the trainer's, or
where there is one the keeper's.

It is in nobody's way: it runs at the lowest priority, waits for no save, and holds nothing that a save needs. What it
could not do it tries again with the next step, and after a while; a process that comes after this one goes on where it
stopped, since what is due stands in the local tier.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from ckpt.backends import Backend, Upload
from ckpt.backends.base import Buffer, ReadsAhead
from ckpt.catalog import Step, delete_tree, leftovers, list_run
from ckpt.commit import exists, refuse_superseded
from ckpt.config import settings
from ckpt.errors import (
    CkptError,
    ConflictError,
    DeadlineError,
    FormatError,
    IntegrityError,
    NotFoundError,
    StorageError,
)
from ckpt.offline.copy import copy_step
from ckpt.offline.prune import retain
from ckpt.retention import kept
from ckpt.tiers import DUE, Way, exists_at

__all__ = ["Trickle"]

log = logging.getLogger("ckpt")
_AGAIN = 60.0
_OTHERS = 0.5  # seconds until the first look at whether other hosts are done; more and more later
_HELD_UP = 5.0  # seconds that a piece waits for a snapshot that is being copied, at most
_POLL = 0.1  # seconds between two looks at that
_WINDOW = 4 << 20  # bytes of a step in the store that are asked for at a time, to check it


class _Stopped(Exception):
    """The process is about to end."""


class _Superseded(Exception):
    """Another job has begun a newer generation of the run: `why`, as is told to people."""

    def __init__(self, generation: int, why: ConflictError) -> None:
        super().__init__(str(why))
        self.generation, self.why = generation, why


class _Polite:
    """A backend whose every piece waits for its turn; what is read in order is asked for a window at a time, and not ahead of
    that; a commit asks `may_commit` first, which raises if it may not be. The rest is as it is."""

    def __init__(self, inner: Backend, turn: Callable[[], None], may_commit: Callable[[], None]) -> None:
        self._inner, self._turn, self._may_commit, self.root = inner, turn, may_commit, inner.root
        self._window, self._held, self._size = ("", 0), bytearray(), 0
        self.fetch, self.size = inner.fetch, inner.size
        self.list, self.delete, self.close = inner.list, inner.delete, inner.close

    def create(self, path: str, data: bytes) -> None:
        if path.endswith("/commit.json"):
            self._may_commit()
        self._inner.create(path, data)

    def read(self, path: str, offset: int, into: Sequence[Buffer]) -> None:
        n = sum(len(b) for b in into)
        if n > _WINDOW // 4 or not isinstance(self._inner, ReadsAhead):
            self._turn()
            return self._inner.read(path, offset, into)
        name, start = self._window
        if name != path or not start <= offset <= offset + n <= start + len(self._held):
            self._turn()
            self._size = self._size if name == path else self._inner.size(path)
            held = bytearray(max(n, min(_WINDOW, self._size - offset)))
            self._inner.read_just(path, offset, [memoryview(held)])
            self._window, self._held, start = (path, offset), held, offset
        at = offset - start
        for buffer in into:
            buffer[:] = memoryview(self._held)[at : at + len(buffer)]
            at += len(buffer)

    def new(self, path: str, size: int) -> Upload:
        self._window = "", 0
        return _PoliteUpload(self._inner.new(path, size), self._turn)


class _PoliteUpload:
    def __init__(self, inner: Upload, turn: Callable[[], None]) -> None:
        self._inner, self._turn, self.finish, self.abort = inner, turn, inner.finish, inner.abort

    def write(self, offset: int, data: Buffer) -> None:
        self._turn()
        self._inner.write(offset, data)


class Trickle:
    """What the policies of the remote would not keep there is not brought there, if something newer is. Nothing is committed
    there once another job has begun a newer generation than that which is trained here.

    arrived  told of every step that reached the remote, and the bytes that were sent
    failed   told of every failure
    life     the generation that is being trained; 0: none, what is left of those that were is brought whoever trains now
    ended    told whenever it has nothing left to do for now
    """

    def __init__(
        self,
        way: Way,
        arrived: Callable[[Step, int], None],
        failed: Callable[[Step, Exception], None],
        life: Callable[[], int],
        ended: Callable[[], None] = lambda: None,
        again: float = _AGAIN,
    ) -> None:
        self._way, self._arrived, self._failed, self._ended, self._again = way, arrived, failed, ended, again
        self._life = life
        self._superseded: _Superseded | None = None
        self._refused: set[str] = set()  # steps that stay here for that
        self._changed = threading.Condition()
        self._asked = self._busy = self._over = False
        self._waiting = 0.0  # seconds until the next look at whether other hosts are done
        self._thread: threading.Thread | None = None
        self._since: dict[str, float] = {}  # when a step began to wait for other hosts
        self._copied: Callable[[float], bool] = lambda _: True  # whether no snapshot is being copied; waits for that
        self._ill = ""  # what was said of the failures under way

    def wake(self) -> None:
        """There may be something to do."""
        with self._changed:
            self._asked = True
            self._changed.notify_all()
            if self._thread is None and not self._over:
                self._thread = threading.Thread(target=self._run, name="ckpt-trickle", daemon=True)
                self._thread.start()

    def quiet(self, timeout: float | None) -> bool:
        """Waits until nothing is left to bring, or trying failed; False if that is not so after `timeout` seconds."""
        with self._changed:
            return self._thread is None or self._changed.wait_for(
                lambda: not (self._asked or self._busy or self._waiting), timeout
            )

    def close(self, wait: bool = True) -> None:
        """Stops, in the middle of a step if need be; and has stopped when it returns, unless it is not to `wait`."""
        with self._changed:
            self._over = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and wait:
            thread.join(settings().deadline)

    def pending(self) -> list[Step]:
        """The steps of the local tier that are to reach the remote and have not, the newest first."""
        local = self._way.local
        found = [s for s in list_run(local).committed if exists_at(local, f"{s.folder}/{DUE}")]
        return sorted(found, key=lambda s: (-s.generation, -s.step))

    def _run(self) -> None:
        with suppress(OSError):  # of this thread and those it starts, on Linux
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        pause: float | None = None
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._asked or self._over, pause)
                if self._over:
                    return
                self._asked, self._busy = False, True  # who asks from now on asks for another pass
            try:
                pause = self._pass()
            except _Stopped:
                return
            except Exception as e:
                pause, self._waiting = self._again, 0.0
                log.error("ckpt: the local tier: %s", e, exc_info=None if isinstance(e, CkptError) else e)
            with self._changed:
                self._busy = False
                self._waiting = self._waiting if pause else 0.0
                self._changed.notify_all()
            self._ended()

    def _pass(self) -> float | None:
        """Brings what is due. Returns in how many seconds to try again, if anything is left."""
        again: float | None = None
        steps = self.pending()
        if self._fenced(steps):
            self._tidy()
            return None
        for n, step in enumerate(steps):
            if n and not self._wanted(step):
                self._settled(step)
                continue
            began = time.monotonic()
            try:
                sent, done = self._bring(step)
            except _Superseded as e:
                self._superseded = e
                log.error("ckpt: what was saved on the local disk stays there, from %s on: %s", step.folder, e)
                self._fenced(steps)
                break
            except (StorageError, ConflictError, IntegrityError, FormatError, NotFoundError) as e:
                if not self._hopeful(step, e):
                    self._failed(step, e)
                    log.error("ckpt: %s stays on the local disk: %s", step.folder, e)
                    self._settled(step)
                    continue
                self._say(step, e)
                again, self._waiting = self._again, 0.0
                if isinstance(e, ConflictError):
                    continue
                break  # the others would fare no better
            if not done and self._patient(step):
                again = self._waiting = min(self._again, max(_OTHERS, 2 * self._waiting))
            if not done:
                continue
            if self._ill:
                log.warning("ckpt: %s can be reached again; steps go there as before", self._way.remote.root)
                self._ill = ""
            log.info("ckpt: %s reached the remote after %.1f s", step.folder, time.monotonic() - began)
            self._settled(step)
            self._arrived(step, sent)
        self._tidy()
        return again

    def _bring(self, step: Step) -> tuple[int, bool]:
        way = self._way
        remote = _Polite(way.remote, self._turn, self._may_commit)
        return copy_step(way.local, remote, step.folder, self._look_up, elsewhere=not way.alone, gently=True)

    def _may_commit(self) -> None:
        generation = self._life()
        try:
            refuse_superseded(self._way.remote, generation)
        except ConflictError as e:
            raise _Superseded(generation, e) from None

    def _fenced(self, steps: Sequence[Step]) -> bool:
        """Whether another job was found to be the present while this life trained. That does not change: nothing is tried
        before the next life begins. Each step is counted once."""
        found = self._superseded
        if found is None or self._life() not in (0, found.generation):
            self._superseded = None
            self._refused.clear()
            return False
        for step in steps:
            if step.folder not in self._refused:
                self._refused.add(step.folder)
                self._failed(step, found.why)
        return True

    def _hopeful(self, step: Step, e: CkptError) -> bool:
        """Whether a failure may pass. What is in the way of a step may go, as what somebody else brings; another commit of
        its name stays."""
        if isinstance(e, ConflictError):
            return not exists(self._way.remote, step.folder)
        return isinstance(e, StorageError)

    def _turn(self) -> None:
        """Waits, but not for ever, while the loop is held up by a snapshot: cores, and a store that shares them, are its."""
        until = time.monotonic() + _HELD_UP
        while not self._copied(_POLL) and time.monotonic() < until and not self._over:
            pass

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within, nothing more is sent or read; after it, not until `copied_when` says that a snapshot is copied."""
        free = threading.Event()
        self._copied = free.wait
        try:
            yield
        finally:
            free.set()

    def copied_when(self, copied: Callable[[float], bool]) -> None:
        self._copied = copied

    def _patient(self, step: Step) -> bool:
        """Whether to go on waiting for the packs of other hosts; if not, the step is given up."""
        since = self._since.setdefault(step.folder, time.monotonic())
        if time.monotonic() - since < 2 * settings().deadline:
            return True
        e = DeadlineError(f"{step.folder}: the other hosts did not bring their packs to {self._way.remote.root}")
        self._failed(step, e)
        log.error("ckpt: %s; it stays on the local disks", e)
        self._settled(step)
        return False

    def _look_up(self, _: int) -> None:
        if self._over:
            raise _Stopped

    def _wanted(self, step: Step) -> bool:
        """Whether the remote would keep a step that something newer has overtaken."""
        if not self._way.remote_keep:
            return True
        there = list_run(self._way.remote)
        steps = [*there.steps, *(s for s in self.pending() if s.folder not in {t.folder for t in there.committed})]
        steps = [s for s in steps if s.commit is not None]
        steps.sort(key=lambda s: (s.generation, s.step))
        return kept(type(there)(there.run, there.generations, tuple(steps)), self._way.remote_keep).get(
            step.folder, True
        )

    def _settled(self, step: Step) -> None:
        self._since.pop(step.folder, None)
        self._way.local.delete(f"{step.folder}/{DUE}")

    def _say(self, step: Step, e: Exception) -> None:
        """Counts a failure; says so once until it is over."""
        self._failed(step, e)
        if not self._ill:
            log.error(
                "ckpt: %s did not reach %s, it is on the local disk only; this is tried again with the steps to come: %s",
                step.folder, self._way.remote.root, e,
            )  # fmt: skip
        self._ill = str(e)

    def _tidy(self) -> None:
        """Deletes what no policy of the local tier keeps, and what failed saves left there."""
        local = self._way.local
        retain(local, self._way.keep, {s.folder for s in self.pending()})
        for path in leftovers(local, list_run(local), 2 * settings().deadline):
            delete_tree(local, path)
