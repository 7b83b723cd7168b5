"""Saves of a Checkpointer with a keeper: snapshots in memory, written to storage by the keeper."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

from ckpt.averages import read_average
from ckpt.averaging import AverageView
from ckpt.backends import Backend, backend_for
from ckpt.background import SaveHandle
from ckpt.catalog import generations_in_use, list_run
from ckpt.collective import Group
from ckpt.commit import step_folder
from ckpt.config import settings
from ckpt.errors import CkptError, DeadlineError, NotFoundError, PeerError, from_wire
from ckpt.format.codec import parse_codecs
from ckpt.keeper.averaged import encode_progress
from ckpt.keeper.recall import Recalled, Step
from ckpt.keeper.source import SnapshotBackend
from ckpt.keeping import Keeping
from ckpt.loading import LoadReport
from ckpt.merge.average import AVERAGES
from ckpt.outcomes import Outcome, Taken
from ckpt.saving import Planner, Request, SaveReport, save_state
from ckpt.schedule import Schedule
from ckpt.tiers import Tiers
from ckpt.upkeep import Account

__all__ = ["Kept"]

log = logging.getLogger("ckpt")
Key = tuple[int, int]
IN_MEMORY = "memory of "
"""How the ref of a step begins that was loaded from the keepers."""


class _Handle(SaveHandle):
    """Of a snapshot: what is known once it has begun, and (outcome, why) once that is decided."""

    taken: Taken | None = None
    fate: tuple[str, str] | None = None


class Kept:
    """Attached on construction, which is collective. No method but `begin`, `recall` and `store` waits for other ranks.

    Raises on every rank: PeerError if any has no keeper, ConflictError if somebody else trains this run.
    """

    def __init__(
        self, backend: Backend, group: Group, schedule: Schedule, account: Account, tiers: Tiers | None = None
    ) -> None:
        self._backend, self._group, self._schedule, self._account = backend, group, schedule, account
        self._tiers = tiers
        self._handles: dict[int, _Handle] = {}
        self._bytes = 0  # of this rank's last pack
        self._lock = threading.Lock()
        self._began = False
        self._loaded: LoadReport | None = None  # what this life goes on from
        self._restarted: float | None = None  # from memory, and nothing was protected since
        self._steps: dict[Key, Step] = {}  # that were recalled before it
        self.moved = 0  # bytes that came from other hosts when a step in memory was last loaded
        keeping: Keeping | None = None
        failure: bytes | Exception = b""
        try:
            keeping = Keeping(backend.root, group, schedule, self._heard, account.events.outlive())
        except Exception as e:
            failure = e
        try:
            group.round("attached", failure, lambda _: b"")
        except CkptError:
            if keeping is not None:
                keeping.close()
            raise
        assert keeping is not None
        self._keeping = keeping
        keeping.member.meet(group)
        _flush_at_sigterm(keeping)

    def recall(self) -> Recalled:
        """What steps can be had from memory; collective. It stays as it is until the next life begins."""
        recalled = self._keeping.member.recall(self._group, self._newest_life)
        self._steps = {step.key: step for step in recalled.steps}
        return recalled

    def _newest_life(self) -> int:
        lives = generations_in_use(list_run(self._backend, commits=False))
        return max(lives, default=-1)

    def open(self, step: Step) -> SnapshotBackend:
        """A step in memory, to load from. NotFoundError if it is gone."""
        return self._keeping.member.open(step)

    def done(self, damaged: Key | None = None) -> None:
        """It was read; or is damaged, and to be forgotten."""
        try:
            self._keeping.member.done_reading(damaged)
        except CkptError as e:
            log.error("ckpt: %s", e)

    def begin(self, state: Any, start: int, loaded: LoadReport | None = None) -> None:
        """A life begins at step `start`; collective. `loaded`: the step of this run that it goes on from, and its averages
        with it. Raises on every rank what keeps it from having snapshots; but if a keeper was lost, another one is tried,
        and then again at the next step."""
        self._handles.clear()
        self._began, self._loaded = False, loaded
        recovered = loaded is not None and loaded.ref.startswith(IN_MEMORY)  # what is held goes on being held meanwhile
        self._restarted = time.monotonic() if recovered else None
        for left in (1, 0):
            try:
                generation = self._account.generation
                self._keeping.begin(state, generation, start, lambda: self._origin(loaded), beside=recovered)
                self._began = True
                return
            except (PeerError, DeadlineError) as e:
                log.error("ckpt: no snapshots yet, %s: %s", "trying once more" if left else "training goes on", e)
            finally:
                if recovered:
                    self.done()

    def _origin(self, loaded: LoadReport | None) -> tuple[Backend, str] | None:
        """Where the averages of a step that was loaded are."""
        if loaded is None:
            return None
        root, _, folder = loaded.ref.rpartition("/")
        if loaded.ref.startswith(IN_MEMORY):
            return self.open(self._steps[loaded.generation, loaded.step]), folder
        if self._tiers is not None and root == self._tiers.nearest.root:
            return self._tiers.nearest, folder
        return backend_for(root, direct=settings().direct), folder

    @property
    def averages(self) -> Mapping[str, AverageView]:
        """How each average stands, as of the last step that this rank heard was whole."""
        return self._keeping.averages.views

    def came_late(self, step: int, metrics: Iterable[str]) -> None:
        """Says so if these metrics of a step are what a running average lacked."""
        self._keeping.averages.came_late(step, metrics)

    def average(self, state: Any, *names: str) -> dict[str, dict[str, Any]]:
        """{name: {leaf: tensor}} of averages as of the newest step in memory, or as this life began with; collective.

        Raises on every rank what `read_average` raises on any.
        """
        self.wait(settings().deadline)
        out: dict[str, dict[str, Any]] = {}
        payload: bytes | Exception = b""
        step = next(iter(self._keeping.member.recall(self._group).steps), None)
        opened: tuple[Backend, str] | None = None
        try:
            for name in names:
                p = self._keeping.averages.progress.get(name)
                if p is None or not p.folds:
                    raise NotFoundError(
                        f"average {name!r}: {'nothing was folded into it yet' if p else 'there is none'}"
                    )
            if step is not None and step.key[0] == self._account.generation:
                opened = self.open(step), step_folder(step.key[1], step.key[0])
            else:
                opened = self._origin(self._loaded)
            if opened is None:
                raise NotFoundError("no step of this run is in memory yet: there are no averages")
            backend, folder = opened
            out = {name: read_average(state, name, backend, folder, self._group.world) for name in names}
        except Exception as e:
            payload = e
        finally:
            if opened is not None:
                opened[0].close()
            self.done()
        self._group.round("averages read", payload, lambda _: b"")
        return out

    def step(self, state: Any, step: int, metrics: Mapping[str, float]) -> SaveHandle | None:
        """Begins the snapshot of a step, if the keepers granted it; waits for nobody."""
        began = time.monotonic()
        if not self._began:
            self.begin(state, step)
        if not self._began:
            self._account.skipped(step, "no keeper")
            return None
        handle = _Handle(step)
        self._handles[step] = handle
        try:
            taken = self._keeping.step(state, step, metrics)
        except Exception as e:
            self._handles.pop(step, None)
            self._account.failed(step, f"step {step} was not taken into memory, training goes on", e)
            return None
        if isinstance(taken, str):
            self._handles.pop(step, None)
            if taken:
                self._account.skipped(step, taken)
            return None
        handle.follow(taken.copied)
        handle.stalled = time.monotonic() - began
        self._account.report.stalled += handle.stalled
        self._know(handle, taken=taken)
        return handle

    def _heard(self, outcome: Outcome) -> None:
        """What became of a step; in the link's thread."""
        a, step = self._account, outcome.step
        if outcome.kind == "stored":
            if outcome.error is None:
                a.committed(self._report(outcome))
            else:
                a.failed(step, f"step {step} was not written to storage", from_wire(*outcome.error))
            return
        if outcome.kind == "arrived":
            a.arrived()
        elif outcome.kind == "detained":
            a.detained(from_wire(*(outcome.error or ("", ""))))
        elif outcome.kind == "lost":
            for handle in self._take_handles(step):
                handle.end(PeerError(outcome.why))
        elif outcome.kind == "announced":
            since, self._restarted = self._restarted, None
            a.announced(step, outcome.lag, None if since is None else time.monotonic() - since)
        elif outcome.kind == "void":
            a.report.voided += 1
            for handle in self._take_handles(step, only=True):
                handle.end(PeerError(f"step {step} is void: {outcome.why}"))
                self._know(handle, fate=("voided", outcome.why))
        else:
            a.report.sealed += 1
            for handle in self._take_handles(step, only=True):
                handle.end(self._report(outcome))
                self._know(handle, fate=("sealed", ""))

    def _know(self, handle: _Handle, taken: Taken | None = None, fate: tuple[str, str] | None = None) -> None:
        """What `step` knows of a snapshot and what the keeper says of it, in any order; a row once both are known."""
        with self._lock:
            handle.taken, handle.fate = taken or handle.taken, fate or handle.fate
            if handle.taken is None or handle.fate is None:
                return
        taken, (outcome, why) = handle.taken, handle.fate
        self._bytes = taken.bytes
        self._account.event(
            "snapshot", handle.step, outcome=outcome, why=why, stall=handle.stalled, eager=taken.eager,
            lazy=taken.lazy, bytes=taken.bytes,
        )  # fmt: skip

    def _take_handles(self, step: int, only: bool = False) -> list[_Handle]:
        return [h for s in sorted(self._handles) if (s == step or not only) and (h := self._handles.pop(s, None))]

    def _report(self, outcome: Outcome) -> SaveReport:
        folder = step_folder(outcome.step, self._account.generation)
        return SaveReport(
            ref=f"{self._backend.root}/{folder}",
            step=outcome.step,
            generation=self._account.generation,
            bytes=outcome.bytes,
            bytes_here=self._bytes if outcome.bytes else 0,
            seconds=outcome.write + outcome.commit,
            seconds_plan=0.0,
            seconds_write=outcome.write,
            per_rank=(),
        )

    def store(self, state: Any, step: int, metrics: Mapping[str, float]) -> SaveReport:
        """Has a step in storage when it returns, unless it raises: by the keeper if it holds it, else by the ranks
        themselves. Collective."""
        deadline = settings().deadline
        handle = self._handles.get(step)
        if handle is not None:
            handle.done(deadline)

        def decide(_: list[bytes]) -> bytes:
            try:
                return b"keeper" if self._keeping.want(step) else b"ranks"
            except CkptError:
                return b"ranks"

        if self._group.round(f"store {step}", b"", decide) == b"keeper":
            outcome, told = None, b""
            try:
                outcome = self._keeping.stored(step, deadline)
                told = b"" if outcome.error is None else outcome.kind.encode()
            except DeadlineError as e:
                log.error("ckpt: %s", e)
                told = b"late"
            verdict = self._group.round(f"stored {step}", told, lambda all_: max(all_))
            if not verdict and outcome is not None:
                return next((s for s in self._account.report.saves if s.step == step), self._report(outcome))
        request = Request(self._backend, step, self._account.generation, metrics, parse_codecs(self._schedule.codec))
        try:
            done = save_state(request, self._with_averages(state), self._group, Planner())
        except Exception as e:
            self._account.failed(step, "", e)
            raise
        self._account.committed(done)
        return done

    def _with_averages(self, state: Any) -> Any:
        """The state and its averages, as far as they are, for a save that the keepers have no part in."""
        self.wait(settings().deadline)
        progress = self._keeping.averages.progress
        begun = sorted(name for name, p in progress.items() if p.folds)
        if not begun:
            return state
        try:
            found = self.average(state, *begun)
        except CkptError as e:
            log.error("ckpt: this step is stored without its averages: %s", e)
            return state
        return {**state, AVERAGES: found, "__ckpt__": {AVERAGES: encode_progress(progress)}}

    def wait(self, timeout: float | None) -> bool:
        """Waits until nothing is being sealed or written to storage; False if that is not so after `timeout`."""
        until = None if timeout is None else time.monotonic() + timeout
        for handle in list(self._handles.values()):
            if not handle.done(None if until is None else max(0.0, until - time.monotonic())):
                return False
        left = None if until is None else max(0.0, until - time.monotonic())
        return self._keeping.quiet(left) and self.brought(None if until is None else max(0.0, until - time.monotonic()))

    def brought(self, timeout: float | None) -> bool:
        """Waits until nothing is left to bring from the local tier to the run, or trying failed; with a keeper."""
        return self._keeping.brought(timeout)

    def close(self) -> None:
        """Lets go of the keeper."""
        self._keeping.close()


def _flush_at_sigterm(keeping: Keeping) -> None:
    """Where a program handles SIGTERM itself, and so may live on: has the keeper write its newest step first.

    Without a handler the signal ends the trainer, which tells the keeper as much.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    before = signal.getsignal(signal.SIGTERM)
    if not callable(before):
        return
    handler = before

    def flush(number: int, frame: Any) -> None:
        keeping.flush()
        handler(number, frame)

    signal.signal(signal.SIGTERM, flush)
