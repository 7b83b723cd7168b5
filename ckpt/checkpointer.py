"""The main path: save, load, and the Checkpointer that a training loop holds."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from ckpt.backends import Backend, backend_for
from ckpt.catalog import (
    KeepBest,
    Policy,
    delete_step,
    generations_in_use,
    kept,
    lineage,
    list_run,
    parse_ref,
    with_ledger,
    write_ledger,
)
from ckpt.collective import Group, current_group
from ckpt.commit import open_generation
from ckpt.config import Every, settings
from ckpt.errors import CkptError, ConflictError, FormatError, IntegrityError, NotFoundError, UsageError
from ckpt.format.codec import Codec, CodecRule, parse_codecs
from ckpt.loading import LoadOptions, LoadReport, load_folder, load_ref
from ckpt.saving import Planner, SaveReport, save_state

__all__ = ["Checkpointer", "CloseReport", "load", "save"]

log = logging.getLogger("ckpt")
Metrics = Mapping[str, Any]
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
    backend = _backend(run)
    planner = _planners.setdefault(backend.root, Planner())
    group = current_group()
    return _save(backend, state, step, 0, metrics, codec, group, planner)


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


def _save(
    backend: Backend,
    state: Any,
    step: int,
    generation: int,
    metrics: Metrics | None,
    codec: CodecRule | None,
    group: Group,
    planner: Planner,
) -> SaveReport:
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 10**18:
        raise UsageError(f"step={step!r}: a whole number, 0 or more, of at most 18 digits")
    numbers: dict[str, float] = {}
    codecs: tuple[tuple[str, Codec], ...] = ()
    failure: Exception | None = None
    try:
        numbers, codecs = _numbers(metrics), parse_codecs(codec)
    except UsageError as e:
        failure = e
    report = save_state(
        backend,
        state,
        step=step,
        generation=generation,
        metrics=numbers,
        codecs=codecs,
        group=group,
        planner=planner,
        failure=failure,
    )
    if report.per_rank and group.rank == 0:
        names = ", ".join(report.per_rank[:10])
        log.warning(
            "ckpt: stored per rank, since the ranks hold different values: %s (declare ckpt.PerRank to say so)", names
        )
    return report


def _numbers(metrics: Metrics | None) -> dict[str, float]:
    """Metrics as plain numbers; those that are not finite have no place in JSON and are left out."""
    out = {}
    for name, value in (metrics or {}).items():
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # torch's own for a tensor of many elements
            raise UsageError(f"metric {name!r}: {value!r:.200} is not a number") from None
        if number - number == 0:
            out[str(name)] = number
    return out


@dataclass
class CloseReport:
    """What a Checkpointer did: steps counted, saves committed and failed, bytes stored by all ranks, seconds that
    `step` and `save_now` held up the loop on this rank, and the last error."""

    steps: int = 0
    committed: int = 0
    failed: int = 0
    bytes: int = 0
    stalled: float = 0.0
    last_step: int | None = None
    last_error: str = ""
    saves: list[SaveReport] = field(default_factory=list)


class Checkpointer:
    """Keeps the checkpoints of a run: `restore` before the loop, `step` in it, `close` after it.

    run      a path or URL
    state    what to save; see `ckpt.save`
    storage  when to save, as Every(200)
    keep     retention policies; a step is kept if any of them keeps it. Nothing is deleted by default
    codec    see `ckpt.save`

    All methods are collective: every rank calls them at the same place. A failed save never stops the loop:
    `step` logs it and goes on, and `close` reports it.
    """

    def __init__(
        self,
        run: str | os.PathLike[str],
        state: Any,
        *,
        storage: Every | None = None,
        keep: Sequence[Policy] = (),
        codec: CodecRule | None = None,
    ) -> None:
        if storage is None:
            raise UsageError("storage=ckpt.Every(n): say when to save")
        parse_codecs(codec)
        self._backend = _backend(run)
        self._state, self._every, self._keep, self._codec = state, storage, tuple(keep), codec
        self._group = current_group()
        self._planner = Planner()
        self._generation: int | None = None
        self._step: int | None = None
        self._saved_step: int | None = None
        self._last = time.monotonic()
        self._metrics: dict[str, float] = {}
        self._ledger: list[dict[str, object]] = []
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
        if ref is None:
            found = self._restore_newest(options)
        else:
            self.last_load = load_ref(self._state, ref, options, self._group)
            root, _, folder = self.last_load.ref.rpartition("/")
            found = folder if os.path.realpath(root) == os.path.realpath(self._backend.root) else None
        self._open_generation(found)
        self._step = self._saved_step = None
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

    def step(self, step: int, metrics: Metrics | None = None) -> SaveReport | None:
        """Names the iteration just done, right after `optimizer.step()`. Saves it if it is due.

        Returns the report of the save, or None if none was due or it failed (see `report.last_error`).
        """
        self.report.steps += 1
        self._step = step
        self._note(step, metrics)
        try:
            return self._store(step) if self._due(step) else None
        except Exception as e:
            self._log_failure(f"step {step} was not saved, training goes on", e)
            return None

    def _due(self, step: int) -> bool:
        """All ranks must answer alike, so that clocks decide only on the leader."""
        if self._every.minutes is None:
            return self._every.due(step, self._last)
        try:
            answer = self._group.round(f"due {step}", b"", lambda _: b"1" if self._every.due(step, self._last) else b"")
        except Exception as e:
            self._count_failure(e)
            raise
        return bool(answer)

    def record(self, step: int, metrics: Metrics) -> None:
        """Keeps metrics that come late (an evaluation) in the run's ledger; `KeepBest` and `run@best` see them."""
        self._ledger.append({"step": int(step), **_numbers(metrics)})
        self._write_ledger()
        self._retain()

    def save_now(self) -> SaveReport:
        """Saves the last step now, unless it is saved already. Raises what `ckpt.save` raises."""
        if self._step is None:
            raise UsageError("save_now: no step was done yet; call step(n) first")
        if self._saved_step == self._step and self.report.saves:
            return self.report.saves[-1]
        return self._store(self._step)

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until all that is pending is done; True, since saves are synchronous."""
        return True

    def close(self) -> CloseReport:
        """Stores the last step if it was not, writes the ledger and returns the counts."""
        if self._step is not None and self._saved_step != self._step:
            try:
                self._store(self._step)
            except Exception as e:
                self._log_failure(f"the last step, {self._step}, was not saved", e)
        self._write_ledger()
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
                self._metrics = _numbers(metrics)
            except UsageError as e:
                log.error("ckpt: step %d: %s", step, e)
            self._ledger.append({"step": int(step), **self._metrics})

    def _store(self, step: int) -> SaveReport:
        """One save with its bookkeeping. A step that this generation holds already counts as saved."""
        began = time.monotonic()
        try:
            if self._generation is None:
                self._open_generation(None)
            assert self._generation is not None
            report = _save(
                self._backend,
                self._state,
                step,
                self._generation,
                self._metrics,
                self._codec,
                self._group,
                self._planner,
            )
        except Exception as e:
            self._count_failure(e)
            raise
        finally:
            self._last = time.monotonic()
            self.report.stalled += self._last - began
        self._saved_step = self.report.last_step = step
        self.report.committed += 1
        self.report.bytes += report.bytes
        self.report.saves.append(report)
        self._write_ledger()
        self._retain()
        return report

    def _count_failure(self, e: Exception) -> None:
        self.report.failed += 1
        self.report.last_error = f"{e.kind if isinstance(e, CkptError) else type(e).__name__}: {e}"

    def _log_failure(self, what: str, e: Exception) -> None:
        """Once, with the cause; with the way to it only if it is not one of ours."""
        log.error("ckpt: %s: %s", what, e, exc_info=None if isinstance(e, CkptError) else e)

    def _write_ledger(self) -> None:
        rows, self._ledger = self._ledger, []
        if not rows or self._group.rank != 0:
            return
        name = f"g{self._generation or 0:04d}-{rows[0]['step']:08d}-{time.time_ns():x}"
        try:
            write_ledger(self._backend, name, rows)
        except CkptError as e:
            log.error("ckpt: metrics of %d steps were not written: %s", len(rows), e)

    def _retain(self) -> None:
        """Deletes what no policy keeps; a failure is logged, not raised."""
        if not self._keep or self._group.rank != 0:
            return
        with suppress(ConflictError):
            try:
                listing = list_run(self._backend)
                if any(isinstance(p, KeepBest) for p in self._keep):
                    listing = with_ledger(self._backend, listing)
                for folder, keep in kept(listing, self._keep).items():
                    if not keep:
                        delete_step(self._backend, folder)
            except CkptError as e:
                log.error("ckpt: old steps were not deleted: %s", e)
