"""The main path: save, load, and the Checkpointer that a training loop holds."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from ckpt.backends import Backend, backend_for
from ckpt.background import SaveHandle, begin_save
from ckpt.catalog import Policy, generations_in_use, lineage, list_run, parse_ref
from ckpt.collective import current_group
from ckpt.commit import open_generation
from ckpt.config import Every, settings
from ckpt.errors import CkptError, DeadlineError, FormatError, IntegrityError, NotFoundError, UsageError
from ckpt.format.codec import CodecRule, parse_codecs
from ckpt.loading import LoadOptions, LoadReport, load_folder, load_ref
from ckpt.saving import Planner, Request, SaveReport, save_state
from ckpt.snapshot.fence import fence_here
from ckpt.upkeep import Metrics, numbers, retain, warn_per_rank, write_rows

__all__ = ["Checkpointer", "CloseReport", "async_save", "load", "save"]

log = logging.getLogger("ckpt")
_planners: dict[str, Planner] = {}


def save(
    state: Any,
    run: str | os.PathLike[str],
    *,
    step: int = 0,
    metrics: Metrics | None = None,
    codec: CodecRule | None = None,
) -> SaveReport:
    """Saves a state as one step of a run; collective if a process group is up. Returns after the commit.

    state    a dict of modules, optimizers, `Stateful`s, tensors, DTensors, `ckpt.Shard`s and values, nested at will
    run      a path or URL; the step goes into its generation 0
    metrics  numbers to keep with the step, as {"val_loss": 2.3}
    codec    {"glob of leaf names": numcodecs codec}, as {"*.exp_avg": "zstd"}; nothing is compressed by default

    Raises, on every rank and with nothing published: UsageError, LayoutError, ConflictError (the step exists),
    StorageError, DeadlineError, PeerError.
    """
    backend, group = _backend(run), current_group()
    planner = _planners.setdefault(backend.root, Planner())
    report = save_state(_request(backend, step, 0, metrics, codec), state, group, planner)
    warn_per_rank(report.per_rank, group.rank)
    return report


def async_save(
    state: Any,
    run: str | os.PathLike[str],
    *,
    step: int = 0,
    metrics: Metrics | None = None,
    codec: CodecRule | None = None,
) -> SaveHandle:
    """As `save`, but returns as soon as training may go on; the rest happens in threads of this process.

    Copied at once: everything but what the optimizers in `state` own (their parameters and their state), which is
    copied in the background; a step of such an optimizer waits until that is done. Change parameters in another way
    only after `handle.staged()`. One save at a time: a second one waits for the first.

    Raises, on every rank, what agreeing on a save raises (UsageError, LayoutError, ConflictError, DeadlineError,
    PeerError); the rest is told by the handle: CapacityError (no memory for the snapshot), StorageError and so on.
    """
    backend, group = _backend(run), current_group()
    planner = _planners.setdefault(backend.root, Planner())
    return begin_save(_request(backend, step, 0, metrics, codec), state, group, planner)


def load(
    state: Any,
    ref: str | os.PathLike[str],
    *,
    only: Sequence[str] | None = None,
    rename: Mapping[str, str] | None = None,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    cast: bool = False,
    allow_pickle: bool = False,
) -> LoadReport:
    """Loads a checkpoint into a state, in place, whatever the parallelism it was saved from.

    ref      a run (its latest step), run@latest, run@best, run@1000, or one step's URL
    The other arguments are those of `ckpt.loading.LoadOptions`. Collective if a process group is up.

    Raises, on every rank: NotFoundError; MismatchError, listing everything that is missing, unexpected, or of
    another shape or dtype, before any tensor is touched; IntegrityError or FormatError for damaged bytes, after
    which the state's content is undefined; UnsafeError for pickled content.
    """
    options = LoadOptions(only, rename or {}, allow_missing, allow_unexpected, cast, allow_pickle)
    return load_ref(state, ref, options, current_group())


def _backend(run: str | os.PathLike[str]) -> Backend:
    if parse_ref(run).which != "latest" or "@" in os.fspath(run).rpartition("/")[2]:
        raise UsageError(f"{os.fspath(run)!r} names a step; to save, name a run (a folder or URL)")
    return backend_for(os.fspath(run).rstrip("/"), direct=settings().direct)


def _request(backend: Backend, step: int, generation: int, metrics: Metrics | None, codec: CodecRule | None) -> Request:
    """What is to be saved, checked. A bad metric or codec of one rank is to fail the save on all."""
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 10**18:
        raise UsageError(f"step={step!r}: a whole number, 0 or more, of at most 18 digits")
    try:
        return Request(backend, step, generation, numbers(metrics), parse_codecs(codec))
    except UsageError as e:
        return Request(backend, step, generation, {}, failure=e)


@dataclass
class CloseReport:
    """What a Checkpointer did: steps counted, saves committed, failed, and skipped (due while another was under way);
    bytes stored by all ranks, seconds that saves held up the loop on this rank, and the last error."""

    steps: int = 0
    committed: int = 0
    failed: int = 0
    skipped: int = 0
    bytes: int = 0
    stalled: float = 0.0
    last_step: int | None = None
    last_error: str = ""
    saves: list[SaveReport] = field(default_factory=list)


class Checkpointer:
    """Keeps the checkpoints of a run: `restore` before the loop, `step` in it, `close` after it.

    run        a path or URL
    state      what to save; see `ckpt.save`
    storage    when to save, as Every(200); in the background, one save at a time, as `ckpt.async_save` does
    keep       retention policies; a step is kept if any of them keeps it. Nothing is deleted by default
    codec      see `ckpt.save`
    max_stale  seconds: `step` raises DeadlineError once nothing has become durable for so long

    All methods are collective: every rank calls them at the same place. A failed save never stops the loop: it is
    logged and counted, and `close` reports it. A save that is due while the last one is under way is skipped on all
    ranks, and counted. Saving reserves as much CPU memory as this rank writes, once, for the life of the process.
    """

    def __init__(
        self,
        run: str | os.PathLike[str],
        state: Any,
        *,
        storage: Every | None = None,
        keep: Sequence[Policy] = (),
        codec: CodecRule | None = None,
        max_stale: float | None = None,
    ) -> None:
        if storage is None:
            raise UsageError("storage=ckpt.Every(n): say when to save")
        if max_stale is not None and not max_stale > 0:
            raise UsageError(f"max_stale={max_stale!r}: a positive number of seconds")
        parse_codecs(codec)
        self._backend = _backend(run)
        self._state, self._every, self._keep, self._codec = state, storage, tuple(keep), codec
        self._group = current_group()
        self._planner = Planner()
        self._generation: int | None = None
        self._step: int | None = None
        self._handle: SaveHandle | None = None  # of the last save begun
        self._last = self._durable = time.monotonic()
        self._max_stale = max_stale
        self._metrics: dict[str, float] = {}
        self._ledger: deque[dict[str, object]] = deque()
        self.report = CloseReport()
        self.last_load: LoadReport | None = None

    def restore(
        self,
        ref: str | os.PathLike[str] | None = None,
        *,
        only: Sequence[str] | None = None,
        rename: Mapping[str, str] | None = None,
        allow_missing: Sequence[str] = (),
        allow_unexpected: Sequence[str] = (),
        cast: bool = False,
        allow_pickle: bool = False,
    ) -> int:
        """Loads the newest committed step of the run, or what `ref` names, and opens a new generation.

        Returns the step to go on with: one more than the loaded one, or 0 for an empty run and for a `ref` of
        another run (a warm start). A damaged step is skipped, loudly, for the next older one; with `ref` it is
        an error. The other arguments are those of `ckpt.load`.
        """
        options = LoadOptions(only, rename or {}, allow_missing, allow_unexpected, cast, allow_pickle)
        self.wait(settings().deadline)
        if ref is None:
            found = self._restore_newest(options)
        else:
            self.last_load = load_ref(self._state, ref, options, self._group)
            root, _, folder = self.last_load.ref.rpartition("/")
            found = folder if os.path.realpath(root) == os.path.realpath(self._backend.root) else None
        self._open_generation(found)
        self._step = self._handle = None
        return 0 if found is None or self.last_load is None else self.last_load.step + 1

    def _restore_newest(self, options: LoadOptions) -> str | None:
        """Tries the steps of the present, newest first. Returns the folder of the one that was loaded."""
        answer = self._group.round("restore", b"", lambda _: "\n".join(self._candidates()).encode()).decode()
        folders = [f for f in answer.split("\n") if f]
        for i, folder in enumerate(folders):
            try:
                self.last_load = load_folder(self._state, self._backend, folder, options, self._group)
                return folder
            except (IntegrityError, FormatError, NotFoundError) as e:
                if i + 1 == len(folders):
                    raise
                log.error(
                    "ckpt: %s/%s cannot be used, falling back to %s: %s", self._backend.root, folder, folders[i + 1], e
                )
        return None

    def _candidates(self) -> list[str]:
        listing = list_run(self._backend)
        for g in listing.generations:
            if g.error:
                log.error("ckpt: where generation %d came from is not known any more: %s", g.generation, g.error)
        present = lineage(listing, damaged=True)
        if listing.committed and not present:
            log.error(
                "ckpt: %s: its newest generation came from nowhere and saved nothing, so none of its %d checkpoints is "
                "the present; name the one to go on from with restore(ref=...)",
                self._backend.root,
                len(listing.committed),
            )
        return [s.folder for s in present]

    def _open_generation(self, parent: str | None) -> None:
        def decide(_: list[bytes]) -> bytes:
            known = generations_in_use(list_run(self._backend, commits=False))
            return str(open_generation(self._backend, parent, self._group.world, known)).encode()

        self._generation = int(self._group.round("generation", b"", decide))

    def step(self, step: int, metrics: Metrics | None = None) -> SaveHandle | None:
        """Names the iteration just done, right after `optimizer.step()`. Begins to save it if it is due.

        Returns the handle of the save, or None if none was due, the last one is still under way, or it could not begin
        (see `report`). Raises nothing but the DeadlineError of `max_stale`.
        """
        self.report.steps += 1
        self._step = step
        self._note(step, metrics)
        stale = time.monotonic() - self._durable
        if self._max_stale is not None and stale > self._max_stale:
            cause = self.report.last_error or "no save has ended since"
            raise DeadlineError(f"nothing has become durable for {stale:.0f} s (max_stale={self._max_stale}): {cause}")
        try:
            return self._begin(step) if self._due(step) else None
        except Exception as e:
            self._failed(f"step {step} was not saved, training goes on", e)
            return None

    def _due(self, step: int) -> bool:
        """All ranks must answer alike: clocks, and whether a save is under way, decide only on the leader."""
        if self._every.minutes is None and not self._every.due(step, self._last):
            return False

        def decide(_: list[bytes]) -> bytes:
            if not self._every.due(step, self._last):
                return b""
            return b"skip" if self._handle is not None and not self._handle.done() else b"save"

        answer = self._group.round(f"due {step}", b"", decide)
        if answer == b"skip":
            self.report.skipped += 1
        return answer == b"save"

    def record(self, step: int, metrics: Metrics) -> None:
        """Keeps metrics that come late (an evaluation) in the run's ledger; `KeepBest` and `run@best` see them."""
        self._ledger.append({"step": int(step), **numbers(metrics)})
        self._tidy()

    def save_now(self) -> SaveReport:
        """Saves the last step now, unless it is saved already, and waits for it. Raises what `ckpt.save` raises."""
        if self._step is None:
            raise UsageError("save_now: no step was done yet; call step(n) first")
        if self._saves(self._step):
            assert self._handle is not None
            return self._handle.result()
        try:
            handle = self._begin(self._step)
        except Exception as e:
            self._failed("", e)
            raise
        return handle.result()

    def fence(self) -> None:
        """Waits until no snapshot is being copied: before anything but a step of an optimizer of the state changes
        its parameters or moments."""
        fence_here().wait()

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until the save under way has ended, well or not; False if it has not after `timeout` seconds."""
        return self._handle is None or self._handle.done(timeout)

    def close(self) -> CloseReport:
        """Stores the last step if it was not, writes the ledger and returns the counts."""
        deadline = settings().deadline
        self.wait(deadline)
        if self._step is not None and not self._saves(self._step):
            try:
                self._begin(self._step)
            except Exception as e:
                self._failed(f"the last step, {self._step}, was not saved", e)
        if not self.wait(deadline):
            log.error("ckpt: step %s is still being saved after %.0f s; it goes on", self._step, deadline)
        if self._group.rank == 0:
            write_rows(self._backend, self._generation or 0, self._ledger)
        self._backend.close()
        return self.report

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.close()

    def _note(self, step: int, metrics: Metrics | None) -> None:
        self._metrics = {}
        if metrics:
            try:
                self._metrics = numbers(metrics)
            except UsageError as e:
                log.error("ckpt: step %d: %s", step, e)
            self._ledger.append({"step": int(step), **self._metrics})

    def _saves(self, step: int) -> bool:
        """Whether the last save is of this step and has not failed; it may be under way."""
        handle = self._handle
        return handle is not None and handle.step == step and (handle.committed() or not handle.done())

    def _begin(self, step: int) -> SaveHandle:
        if self._generation is None:
            self._open_generation(None)
        assert self._generation is not None
        self._handle = begin_save(
            _request(self._backend, step, self._generation, self._metrics, self._codec),
            self._state,
            self._group,
            self._planner,
            after=lambda outcome: self._ended(step, outcome),
        )
        self._last = time.monotonic()
        self.report.stalled += self._handle.stalled
        return self._handle

    def _ended(self, step: int, outcome: SaveReport | Exception) -> None:
        """The bookkeeping of a save that has ended, in the thread that did it."""
        if isinstance(outcome, Exception):
            self._failed(f"step {step} was not saved, training goes on", outcome)
            return
        self._durable = time.monotonic()
        self.report.last_step = step
        self.report.committed += 1
        self.report.bytes += outcome.bytes
        self.report.saves.append(outcome)
        warn_per_rank(outcome.per_rank, self._group.rank)
        self._tidy()

    def _tidy(self) -> None:
        if self._group.rank == 0:
            write_rows(self._backend, self._generation or 0, self._ledger)
            retain(self._backend, self._keep)

    def _failed(self, what: str, e: Exception) -> None:
        """Counts a failed save, and logs it once with its cause; with the way to it only if it is not one of ours."""
        self.report.failed += 1
        self.report.last_error = f"{e.kind if isinstance(e, CkptError) else type(e).__name__}: {e}"
        if what:
            log.error("ckpt: %s: %s", what, e, exc_info=None if isinstance(e, CkptError) else e)
