"""torch.distributed.checkpoint on ckpt's storage: an existing loop changes one argument.

    dcp.save(sd, storage_writer=ckpt.adapters.dcp.Writer(url))           and dcp.async_save
    dcp.load(sd, storage_reader=ckpt.adapters.dcp.Reader(url))

What is written is an ordinary checkpoint: committed last or not at all, checksummed, opened by `ckpt.open`, loaded by
`ckpt.load` into the same nested state (and into the model and the optimizer themselves, if they were saved by their
names under two keys of it). The reader takes any checkpoint, whoever wrote it. Differences to torch's own storage:

- A failure of any thread of any rank fails the save everywhere; nothing is published.
- A step that exists is never overwritten.
- Values (not tensors) that differ between ranks are stored once a rank, and each rank gets its own back; torch
  keeps those of one rank. Values that JSON can hold need no pickle.
- A dtype that differs between checkpoint and state is an error, unless the reader is told to cast.

DCP does the collectives; nothing here talks to other ranks but through the plans and results that it carries. What
fails on a rank is raised on all of them as DCP's CheckpointException, with our error among its `failures`.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from ckpt.adapters._dcp_read import Opened
from ckpt.adapters._dcp_write import Attempts, check_plans, commit, full_plans, write_local
from ckpt.backends import Backend, backend_for
from ckpt.catalog import generations_in_use, list_run, parse_ref
from ckpt.commit import claim_attempt, exists, step_folder
from ckpt.config import settings
from ckpt.errors import UsageError

__all__ = ["Reader", "Writer"]


@dataclass(frozen=True)
class _Told:
    """What the coordinator tells a rank with its plan: where to write, and as whom."""

    run: str
    folder: str
    attempt: str
    rank: int
    world: int


@dataclass(frozen=True)
class _Save:
    """The save under way, as the coordinator knows it."""

    backend: Backend
    step: int
    generation: int
    attempt: str
    writer: str
    path: str


class Writer(StorageWriter):
    """Writes one checkpoint for each `dcp.save` or `dcp.async_save`; one at a time.

    url      a run (path or URL), or "run@1000": step 1000 of it
    step     the step to save; without it the next free one of the run, from 0 on. May be set between saves.
    metrics  numbers to keep with the step, as {"val_loss": 2.3}

    `dcp.save(..., checkpoint_id=...)` names another run (or step) in place of `url` and `step`. A folder of its own
    for each step, as is usual with DCP, is then a run with one step. After a save the metadata that `dcp.save`
    returns has the new checkpoint's own URL as `storage_meta.checkpoint_id`.
    """

    def __init__(
        self, url: str | os.PathLike[str], *, step: int | None = None, metrics: Mapping[str, float] | None = None
    ) -> None:
        super().__init__()
        self.metrics = dict(metrics or {})
        self._attempts = Attempts()
        self._local: SavePlan | None = None
        self._save: _Save | None = None
        self._stager: DefaultStager | None = None
        self._unwritten = 0  # saves that were staged, and not written by this process
        self._point(url, step)

    def _point(self, url: str | os.PathLike[str], step: int | None) -> None:
        ref = parse_ref(url)
        if ref.which == "best" or ref.which.startswith("best:") or os.fspath(url).endswith("@latest"):
            raise UsageError(f"{os.fspath(url)!r} names a checkpoint that exists; to save, name a run, or run@STEP")
        named = None
        if ref.which.startswith("step-"):
            named = int(ref.which[len("step-") :].partition(".")[0])
        elif ref.which.isdecimal():
            named = int(ref.which)
        if named is not None and step not in (None, named):
            raise UsageError(f"{os.fspath(url)!r} names step {named}, but step={step} was given")
        self.url, self.step = ref.run, named if step is None else step

    def __reduce__(self) -> tuple[Any, ...]:
        return _writer, (self.url, self.step, self.metrics)

    @property
    def checkpoint_id(self) -> str:
        return self.url

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return isinstance(checkpoint_id, (str, os.PathLike))

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=self.url, save_id=uuid.uuid4().hex)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self._attempts.discard()
        self._local, self._save = None, None
        if checkpoint_id is not None:
            self._point(checkpoint_id, None)

    # dcp.async_save asks a writer that has these to stage for it.

    _synchronize_after_execute = True
    should_synchronize_after_execute = True

    def stage(self, state_dict: dict[str, Any]) -> Any:
        """A copy of the state in memory that is kept from save to save: new memory costs several times the copy."""
        if self._stager is None or self._unwritten:  # what another save has staged must stay as it is
            self._stager = DefaultStager(StagingOptions(False, False, False, False))
        self._unwritten += 1
        return self._stager.stage(state_dict)

    def synchronize_staging(self) -> None:
        """There is nothing to wait for."""

    def close(self) -> None:
        """Gives the memory back."""
        self._stager = None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("use_collectives", True):
            raise UsageError("use_collectives=False makes a checkpoint of every rank; leave it out to save with ckpt")
        self._attempts.discard()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        # Before DCP drops what it takes for copies: values of all ranks are compared.
        self._local = plan if plan.usable else None
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Chooses the step, claims an attempt at it, tells every rank. ConflictError if the step is committed."""
        plans = full_plans(plans)
        check_plans(plans)
        backend = backend_for(self.url.rstrip("/") or "/", direct=settings().direct)
        listing = list_run(backend, commits=False)
        step = self.step
        if step is None:
            newest = sorted(listing.steps, key=lambda s: -s.step)
            step = next((s.step + 1 for s in newest if exists(backend, s.folder)), 0)
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise UsageError(f"step={step!r}: a whole number, 0 or more")
        generation = max(generations_in_use(listing), default=0)
        folder = step_folder(step, generation)
        attempt, writer = claim_attempt(backend, folder, len(plans))
        path = f"{folder}/{attempt}"
        self._attempts.begin(backend, path)
        self._save = _Save(backend, step, generation, attempt, writer, path)
        world = len(plans)
        return [replace(p, storage_data=_Told(self.url, folder, attempt, rank, world)) for rank, p in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        told = plan.storage_data
        if not isinstance(told, _Told):
            raise UsageError(f"{type(planner).__name__}.finish_plan dropped the plan's storage_data; keep it")
        backend = backend_for(told.run.rstrip("/") or "/", direct=settings().direct)
        path = f"{told.folder}/{told.attempt}/rank-{told.rank:05d}.safetensors"
        size, message = write_local(backend, path, plan, self._local, planner, told.world)
        self._unwritten = max(0, self._unwritten - 1)
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(MetadataIndex(path), size, message)])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Every rank has written: the manifest, then the commit."""
        save = self._save
        if save is None:
            raise UsageError("finish without a plan; use one Writer for one save at a time")
        stale = [r[0].index.fqn for r in results if not r[0].index.fqn.startswith(f"{save.path}/")]
        if stale:
            raise UsageError(f"{stale[0]} does not belong to {save.path}; use one Writer for one save at a time")
        done = commit(
            save.backend,
            [r[0].storage_data for r in results],
            self.metrics,
            step=save.step,
            generation=save.generation,
            attempt=save.attempt,
            writer=save.writer,
            publishing=self._attempts.publishing,
        )
        self._save = None
        metadata.storage_meta = StorageMeta(checkpoint_id=f"{self.url.rstrip('/')}/{done.folder}", save_id=done.writer)


def _writer(url: str, step: int | None, metrics: Mapping[str, float]) -> Writer:
    return Writer(url, step=step, metrics=metrics)


class Reader(StorageReader):
    """Reads a checkpoint into what `dcp.load` is given, on any parallelism.

    url           a run (its latest step), run@latest, run@best, run@1000, or one step's URL
    allow_pickle  read values that were stored with pickle, which can run code
    cast          convert tensors whose dtype differs from the state's; without it that is a MismatchError

    `dcp.load(..., checkpoint_id=...)` names another one. Ranks that start while a step is being committed load the
    same one: that which the coordinator saw.
    """

    def __init__(self, url: str | os.PathLike[str], *, allow_pickle: bool = False, cast: bool = False) -> None:
        super().__init__()
        self.url, self.allow_pickle, self.cast = os.fspath(url), allow_pickle, cast
        self._opened: Opened | None = None

    @property
    def checkpoint_id(self) -> str:
        return self.url

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return isinstance(checkpoint_id, (str, os.PathLike))

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self._opened = None
        if checkpoint_id is not None:
            self.url = os.fspath(checkpoint_id)

    def read_metadata(self) -> Metadata:
        """What is stored, with every tensor as one chunk: which parts lie where is found when they are read."""
        self._opened = Opened.of(self.url, allow_pickle=self.allow_pickle)
        return self._opened.metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        rank = kwargs.get("rank")
        if rank is not None:
            self._opened = self._need().as_rank(rank)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return replace(plan, storage_data=self._need().folder)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return [replace(plan, storage_data=plans[0].storage_data) for plan in plans]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        opened = self._need()
        if isinstance(plan.storage_data, str) and plan.storage_data != opened.folder:
            opened = self._opened = opened.other(plan.storage_data)
        opened.read(plan.items, planner, cast=self.cast)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _need(self) -> Opened:
        if self._opened is None:
            raise UsageError("read_metadata comes first")
        return self._opened
