"""The main path: save, load, and the Checkpointer that a training loop holds."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch

from ckpt.averages import state_dict_of, swapped
from ckpt.averaging import AverageView, check_rules
from ckpt.backends import Backend, backend_for
from ckpt.background import SaveHandle, begin_save
from ckpt.catalog import generations_in_use, list_run, parse_ref
from ckpt.collective import current_group
from ckpt.commit import open_generation
from ckpt.config import ErasureCode, Every, Replicas, check_choices, settings
from ckpt.errors import CkptError, DeadlineError, NotFoundError, PeerError, UsageError
from ckpt.events import Event, Events
from ckpt.format.codec import CodecRule, parse_codecs
from ckpt.kept import Kept
from ckpt.loading import LoadOptions, LoadReport, load_ref
from ckpt.merge.average import Rule
from ckpt.merge.recipe import Recipe
from ckpt.restoring import restore_newest
from ckpt.retention import Policy
from ckpt.saving import Planner, Request, SaveReport, save_state
from ckpt.schedule import Schedule
from ckpt.snapshot.fence import fence_here
from ckpt.threaded import Threaded
from ckpt.tiers import Local, Tiers
from ckpt.upkeep import Account, CloseReport, Metrics, numbers, warn_per_rank

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
    ref: str | os.PathLike[str] | Recipe,
    *,
    only: Sequence[str] | None = None,
    rename: Mapping[str, str] | None = None,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    cast: bool = False,
    allow_pickle: bool = False,
    exchange: bool = False,
) -> LoadReport:
    """Loads a checkpoint into a state, in place, whatever the parallelism it was saved from.

    ref      a run (its latest step), run@latest, run@best, run@1000, or one step's URL; or a recipe, as `ckpt.average`
             makes one, whose checkpoints are then combined on the way
    The other arguments are those of `ckpt.loading.LoadOptions`. Collective if a process group is up.

    Raises, on every rank: NotFoundError; MismatchError, listing everything that is missing, unexpected, or of
    another shape or dtype, before any tensor is touched; IntegrityError or FormatError for damaged bytes, after
    which the state's content is undefined; UnsafeError for pickled content.
    """
    options = LoadOptions(only, rename or {}, allow_missing, allow_unexpected, cast, allow_pickle, exchange)
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


class Checkpointer:
    """Keeps the checkpoints of a run: `restore` before the loop, `step` in it, `close` after it.

    run        a path or URL
    state      what to save; see `ckpt.save`
    storage    when to save to storage, as Every(200); in the background, one save at a time
    memory     when to snapshot into CPU memory, as Every(1): in the hands of a keeper, a process of this host that
               outlives the trainer. What is due for storage is then written by the keeper, from a snapshot
    redundancy what protects what is in memory from the loss of hosts, as ErasureCode(data=6, parity=2) or Replicas(2);
               needs `memory`, and two hosts or more to do anything
    keep       retention policies; a step is kept if any of them keeps it. Nothing is deleted by default
    codec      see `ckpt.save`; for storage only
    averages   running averages of the model, {"ema": ckpt.EMA(half_life=2000)}, folded by the keeper from its snapshots, so
               only with `memory`: see `average`. Which leaves are averaged: `ckpt.averages`. They cost a slot's 4 bytes a
               parameter each, are stored with every step, and go on after a restart bit by bit
    max_stale  seconds: `step` raises DeadlineError once nothing has become durable for so long
    local      a folder of this run on a disk of each host, or a `ckpt.Local`: saves commit there and trickle to `run` in the
               background, with `memory` by the keeper, which outlives the trainer; `restore` takes what is nearest. See
               docs/design/015
    on_event   called with every `ckpt.events.Event`, in whichever thread it happens

    All methods are collective: every rank calls them at the same place, also the constructor. A failed save never stops
    the loop: it is logged and counted, and `close` reports it. All ranks save and skip the same steps. Memory is reserved
    once, at the first `restore` that finds something or the first `step`: as much as this rank writes, or with `memory`
    twice that, thrice if `storage` is given too, and with `redundancy` once more; the keeper takes for parity twice as much
    as this rank writes times parity / data.

    Raises ConflictError if another job trains this run on this host. Where no process can be started, a thread of the first
    trainer of the host is its keeper, and its memory ends with that; where that cannot be had either, `memory` is given up
    for the whole job. Both are said once.
    """

    def __init__(
        self,
        run: str | os.PathLike[str],
        state: Any,
        *,
        storage: Every | None = None,
        memory: Every | None = None,
        redundancy: ErasureCode | Replicas | None = None,
        keep: Sequence[Policy] = (),
        codec: CodecRule | None = None,
        averages: Mapping[str, Rule] | None = None,
        max_stale: float | None = None,
        on_event: Callable[[Event], None] | None = None,
        local: Local | str | os.PathLike[str] | None = None,
    ) -> None:
        check_choices(storage, memory, redundancy, max_stale, averages=bool(averages), local=local is not None)
        codecs, rules = parse_codecs(codec), check_rules(averages)
        self._backend = _backend(run)
        self._state, self._max_stale = state, max_stale
        self._group = current_group()
        self._account = Account(self._backend, self._group.rank, keep, Events(f"r{self._group.rank:05d}", on_event))
        self._opened = False
        self._step: int | None = None
        self._metrics: dict[str, float] = {}
        self.last_load: LoadReport | None = None
        tier = Local(local) if isinstance(local, str | os.PathLike) else local
        self._tiers = Tiers(self._backend, _backend(run), tier, keep, self._group) if tier is not None else None
        self._kept: Kept | None = None
        if memory is not None:
            try:
                near, told = (tier.every, self._tiers.told()) if tier and self._tiers else (None, None)
                schedule = Schedule(memory, storage, codec, redundancy, rules, near, told)
                self._kept = Kept(self._backend, self._group, schedule, self._account, self._tiers)
            except PeerError as e:
                log.warning("ckpt: no snapshots in memory, saves go to storage from threads: %s", e)
                if rules:
                    log.error("ckpt: no averages: there is no keeper to fold them")
        self._swapped = ""
        self._saves = self._kept or Threaded(self._backend, self._group, storage, codecs, self._account, self._tiers)

    @property
    def report(self) -> CloseReport:
        """What was done so far."""
        return self._account.report

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
        exchange: bool = False,
    ) -> int:
        """Loads the newest step of the run, or what `ref` names, and opens a new generation.

        The newest step may be in the memory of the keepers, newer than anything in storage. Returns the step to go on
        with: one more than the loaded one, or 0 for an empty run and for a `ref` of another run (a warm start). A
        damaged step is skipped, loudly, for the next older one; with `ref` it is an error. The other arguments are
        those of `ckpt.load`.
        """
        options = LoadOptions(only, rename or {}, allow_missing, allow_unexpected, cast, allow_pickle, exchange)
        self._refuse_swapped("restore")
        self.wait(settings().deadline)
        if ref is None:
            run: Backend = self._backend
            if self._tiers is not None:
                self._tiers.settle(lambda: self._saves.brought(settings().deadline))
                run = self._tiers.nearest
            found, self.last_load = restore_newest(self._state, run, options, self._group, self._kept)
        else:
            self.last_load = load_ref(self._state, ref, options, self._group)
            root, _, folder = self.last_load.ref.rpartition("/")
            found = folder if os.path.realpath(root) == os.path.realpath(self._backend.root) else None
        self._open(found)
        start = 0 if found is None or self.last_load is None else self.last_load.step + 1
        self._step = None
        if self.last_load is not None:
            self._saves.begin(self._state, start, self.last_load if found is not None else None)
            source = "memory" if self.last_load.ref.startswith("memory of ") else "storage"
            self._account.event("restore", self.last_load.step, outcome=source, bytes=self.last_load.bytes_read)
        return start

    def _open(self, parent: str | None) -> None:
        """Opens a generation that comes from the step folder `parent`."""

        def decide(_: list[bytes]) -> bytes:
            known = generations_in_use(list_run(self._backend, commits=False))
            return str(open_generation(self._backend, parent, self._group.world, known)).encode()

        self._account.generation = int(self._group.round("generation", b"", decide))
        self._opened = True

    def step(self, step: int, metrics: Metrics | None = None) -> SaveHandle | None:
        """Names the iteration just done, right after `optimizer.step()`. Begins to save it if it is due.

        Returns the handle of the save, or None if none was due or it could not begin (see `report`): `staged` once the
        state is copied, `done` once it is sealed in memory on all ranks or, without `memory`, committed. Raises nothing
        but the DeadlineError of `max_stale`, UsageError within `swapped`, and at the first step what keeps snapshots from
        being possible at all.
        """
        self._refuse_swapped("step")
        self._step = step
        self._metrics = self._account.note(step, metrics)
        stale = time.monotonic() - self._account.durable
        if self._max_stale is not None and stale > self._max_stale:
            cause = self.report.last_error or "no save has ended since"
            raise DeadlineError(f"nothing has become durable for {stale:.0f} s (max_stale={self._max_stale}): {cause}")
        try:
            if not self._opened:
                self._open(None)
        except CkptError as e:
            self._account.failed(step, f"step {step} was not saved, training goes on", e)
            return None
        return self._saves.step(self._state, step, self._metrics)

    def record(self, step: int, metrics: Metrics) -> None:
        """Keeps metrics that come late (an evaluation) in the run's ledger; `KeepBest` and `run@best` see them. Running
        averages do not: a step has been folded by then."""
        self._account.record(step, numbers(metrics))
        if self._kept is not None:
            self._kept.came_late(step, metrics)
        self._account.tidy()

    def save_now(self) -> SaveReport:
        """Saves the last step to storage now, unless it is there, and waits for it. Raises what `ckpt.save` raises."""
        self._refuse_swapped("save_now")
        if self._step is None:
            raise UsageError("save_now: no step was done yet; call step(n) first")
        return self._saves.store(self._state, self._step, self._metrics)

    @property
    def averages(self) -> Mapping[str, AverageView]:
        """How each average stands: its rule, what counts in it, how far it is from the last step."""
        return self._kept.averages if self._kept is not None else {}

    def average(self, name: str) -> dict[str, Any]:
        """The state dict of the model with a running average in the place of what is averaged, as of the newest step in
        memory, or as this life began with; collective.

        Names are the model's (with several modules in the state: after their keys), tensors this rank's shards, float32,
        wrapped as the model's own (a `ckpt.Shard` for each parameter within FSDP1's flat ones); what is not averaged is as
        it is in the model, copied. On another layout, or without the
        job: `ckpt.load({"model": model}, ref, rename={"averages.NAME.model": "model"}, cast=True,
        allow_missing=["model.*"])` after a load of the step itself.

        Raises NotFoundError if nothing was folded yet.
        """
        return state_dict_of(self._state, self._average(name))

    def _average(self, name: str) -> dict[str, Any]:
        self._refuse_swapped("average")
        if self._kept is None:
            raise NotFoundError(f"average {name!r}: this job has no keeper, and so no averages")
        return self._kept.average(self._state, name)[name]

    @contextmanager
    def swapped(self, model: torch.nn.Module, name: str) -> Iterator[None]:
        """Within, `model`, a module of the state, has the weights of an average, rounded to its own types; collective. Then
        it has its own again, bit by bit, also after an exception. In between `step`, `save_now`, `restore` and `close` raise
        UsageError. Raises what `average` raises."""
        values = self._average(name)
        with swapped(model, self._state, values):
            self._swapped = name
            try:
                yield
            finally:
                self._swapped = ""

    def _refuse_swapped(self, what: str) -> None:
        if self._swapped:
            raise UsageError(
                f"{what} within swapped({self._swapped!r}): the weights are not those of training; leave it first"
            )

    def fence(self) -> None:
        """Waits until no snapshot is being copied: before anything but a step of an optimizer of the state changes
        its parameters or moments."""
        fence_here().wait()

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until the save under way has ended, well or not, and what it left to delete is deleted; False if that is
        not so after `timeout` seconds."""
        began = time.monotonic()
        return self._saves.wait(timeout) and self._account.tidied(
            None if timeout is None else max(0.0, began + timeout - time.monotonic())
        )

    def close(self) -> CloseReport:
        """Stores the last step if it was not, writes the ledger, ends the keeper, and returns the counts."""
        self._refuse_swapped("close")
        if not self.wait(settings().deadline):
            log.error("ckpt: a save is still under way after %.0f s; it goes on", settings().deadline)
        if self._step is not None:
            try:
                self._saves.store(self._state, self._step, self._metrics)
            except Exception as e:
                log.error("ckpt: the last step, %d, was not saved: %s", self._step, e)
            self._saves.wait(settings().deadline)
        self._account.close()
        self._saves.close()
        self._backend.close()
        return self.report

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.close()
