"""Contestants that save while training goes on, behind three verbs: `begin` a save and return as soon as the peer does,
`Pending.fence` before the state changes, `Pending.wait` until all of it is durable.

What a job would do around a peer is done here too: the state dict inside the call, `fsync` where the peer does not do
it, and a process group of its own where the peer issues collectives from a thread (on the group that training uses the
two can meet in different orders and hang). Each turn makes its contestant anew and closes it, so that only one at a
time holds staging memory; what that costs the first saves is warm-up.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

import ckpt
from benchmarks.contestants import CKPT, fsync
from benchmarks.crew import may_have_children
from benchmarks.harness import Rank
from benchmarks.limits import Memcpy, WriteLimit, release
from ckpt.snapshot.device import Device, Timed, pretend

__all__ = [
    "BOTH", "DEVICE", "DISK", "LIMIT", "MEMORY", "NOTHING", "OURS", "Pending", "Saver", "grown", "make", "remarks",
    "savers", "unavailable",
]  # fmt: skip

NOTHING = "no saves"
LIMIT = "limit: buffer + direct write"
MEMORY, BOTH = "ckpt memory", "ckpt memory + storage"
DEVICE = "ckpt memory (timed device)"
OURS = (CKPT, MEMORY, BOTH, DEVICE)
MIB = 1 << 20
POLL = 0.005


def _nothing() -> None:
    pass


class Pending:
    """A save under way. A thread waits for it and notes when all of it was durable, or why it never will be."""

    def __init__(self, fence: Callable[[], object], durable: Future[float | None] | None) -> None:
        self.fence, self._durable = fence, durable

    def done(self) -> bool:
        return self._durable is None or self._durable.done()

    def wait(self) -> float | None:
        """When it was durable, on the machine's monotonic clock; None where nothing was stored. Raises its error."""
        return None if self._durable is None else self._durable.result()


class Saver(Protocol):
    """`every_step`: is told of every step and chooses by itself when to save. `counts`: what it says it did, if it does;
    `at_rest` waits before until nothing is under way."""

    every_step: bool

    def begin(self, step: int) -> Pending: ...

    def counts(self, *, at_rest: bool) -> dict[str, int]: ...

    def close(self) -> None: ...


class _Stored:
    """A saver whose saves end in storage, each in a folder of its own; the parent of those is fresh."""

    every_step = False

    def __init__(self, rank: Rank, folder: Path) -> None:
        self.rank, self.folder = rank, folder
        self._waiting = ThreadPoolExecutor(1, "durable")

    def pending(self, wait: Callable[[], object], fence: Callable[[], object] = _nothing) -> Pending:
        def durable() -> float | None:
            return None if wait() is False else time.perf_counter()

        return Pending(fence, self._waiting.submit(durable))

    def path(self, step: int) -> Path:
        return self.folder / str(step)

    def counts(self, *, at_rest: bool) -> dict[str, int]:
        return {}

    def close(self) -> None:
        self._waiting.shutdown()


class Ckpt(_Stored):
    """`ckpt.async_save` into one run. Its slot belongs to the process and stays."""

    def begin(self, step: int) -> Pending:
        handle = ckpt.async_save(self.rank.state.tree(), self.folder, step=step)
        return self.pending(handle.result, lambda: handle.staged(None))


class Checkpointer(_Stored):
    """`ckpt.Checkpointer` with snapshots in memory, told of every step. Without `storage` there is nothing to wait for,
    and a step for which memory is not free is skipped; with it, a step that is stored is waited for as any other's."""

    every_step = True

    def __init__(self, rank: Rank, folder: Path, *, storage: int | None, device: Device | None = None) -> None:
        super().__init__(rank, folder)
        self.pretended = ExitStack()
        if device is not None:
            self.pretended.enter_context(pretend(device))
        options: dict[str, Any] = {"memory": ckpt.Every(1)}
        if storage is not None:
            options["storage"] = ckpt.Every(storage)
        self.storage = storage
        self.checkpointer = ckpt.Checkpointer(folder, rank.state.tree(), **options)
        self.checkpointer.restore()

    def begin(self, step: int) -> Pending:
        handle = self.checkpointer.step(step)
        if handle is None or self.storage is None or (step + 1) % self.storage:
            return Pending(self.checkpointer.fence, None)
        return self.pending(lambda: self._stored(handle), self.checkpointer.fence)

    def _stored(self, handle: ckpt.SaveHandle) -> bool:
        """The handle tells when a step is whole in memory; when it is in storage, only the report does. False for a
        step that not all ranks have taken: it is void, and counted as such."""
        try:
            handle.result()
        except ckpt.PeerError:
            return False
        while (stored := self.checkpointer.report.last_step) is None or stored < handle.step:
            if self.checkpointer.report.failed:
                raise RuntimeError(self.checkpointer.report.last_error)
            time.sleep(POLL)
        return True

    def counts(self, *, at_rest: bool) -> dict[str, int]:
        if at_rest:
            self.checkpointer.wait()
        report = self.checkpointer.report
        names = ("sealed", "committed", "skipped", "voided", "failed")
        return {name: int(getattr(report, name)) for name in names if hasattr(report, name)}

    def close(self) -> None:
        super().close()
        self.checkpointer.close()
        self.pretended.close()


class DcpAsync(_Stored):
    """`torch.distributed.checkpoint.async_save`; without `staging` as shipped, else with one stager kept over saves.

    In process form, the process that saves lives until the trainer ends; closing ends it.
    """

    def __init__(
        self, rank: Rank, folder: Path, *, staging: StagingOptions | None = None, process: bool = False
    ) -> None:
        super().__init__(rank, folder)
        may_have_children()
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        if "dcp group" not in rank.kept:
            rank.kept["dcp group"] = dist.new_group(backend="gloo")
        self.kind = AsyncCheckpointerType.PROCESS if process else AsyncCheckpointerType.THREAD
        self.stager = None if staging is None else DefaultStager(staging)

    def begin(self, step: int) -> Pending:
        answer = dcp.async_save(
            self.rank.state.dicts(),
            checkpoint_id=self.path(step),
            process_group=self.rank.kept["dcp group"],
            async_checkpointer_type=self.kind,
            async_stager=self.stager,
        )
        if isinstance(answer, AsyncSaveResponse):
            return self.pending(answer.upload_completion.result, answer.staging_completion.result)
        return self.pending(answer.result)

    def close(self) -> None:
        from torch.distributed.checkpoint import _async_process_executor as executor

        super().close()
        executor._CHECKPOINT_PROCESS = None  # there is no call for it; its finaliser ends the process
        if self.stager is not None:
            self.stager.close()


class TorchCheckpointingAsync(_Stored):
    """Meta's torch-checkpointing, saving from its own process, which never calls fsync: its callbacks do it here.

    Without a resharder, as on CPU more than one rank cannot save with one.
    """

    def __init__(self, rank: Rank, folder: Path) -> None:
        super().__init__(rank, folder)
        import torch_checkpointing as tc
        from torch_checkpointing.config import AsyncCheckpointSaverConfig
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        may_have_children()
        logging.getLogger("torch_checkpointing").setLevel(logging.CRITICAL)
        config = tc.CheckpointManager.Config(
            items={"model": tc.ItemSpec(), "optimizer": tc.ItemSpec()},
            save=AsyncCheckpointSaverConfig(),
            storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
            pre_finalize_callback=partial(_fsync_part, rank=rank.rank),
            finalize_callback=partial(_fsync_parent, rank=rank.rank),
        )
        self.manager = tc.CheckpointManager(config)

    def begin(self, step: int) -> Pending:
        writing = self.manager.save(str(self.path(step)), self.rank.state.dicts())
        return self.pending(writing.result, self._staged)

    def _staged(self) -> None:
        with self.manager.lock():  # what the manual puts around optimizer.step()
            pass

    def close(self) -> None:
        super().close()
        self.manager.close()


def _fsync_part(done: Any, *, rank: int) -> None:
    """This rank's files, before the ranks meet and the first one publishes the folder."""
    for file in Path(done.path).iterdir():
        if file.stem.endswith(f"_{rank}") or (rank == 0 and file.suffix != ".pt"):
            fsync(file)
    if rank == 0:
        fsync(Path(done.path))


def _fsync_parent(done: Any, *, rank: int) -> None:
    if rank == 0:
        fsync(Path(done.path).parent)


class TorchSnapshot(_Stored):
    """torchsnapshot's `async_take`, which never calls fsync: every rank then does it for its share of the files."""

    def __init__(self, rank: Rank, folder: Path) -> None:
        super().__init__(rank, folder)
        from torchsnapshot import Snapshot, StateDict

        logging.getLogger("torchsnapshot").setLevel(logging.CRITICAL)
        self.take, self.wrap = Snapshot.async_take, StateDict

    def begin(self, step: int) -> Pending:
        path = self.path(step)
        taken = self.take(path=str(path), app_state={"state": self.wrap(**self.rank.state.local())})

        def durable() -> None:
            taken.wait()
            entries = sorted(path.rglob("*"))
            for entry in [path, *entries][self.rank.rank :: self.rank.world]:
                fsync(entry)

        return self.pending(durable)


class BareBuffer(_Stored):
    """The least that a durable background save does: a copy into one warm buffer, and a thread that writes it."""

    def __init__(self, rank: Rank, folder: Path) -> None:
        super().__init__(rank, folder)
        self.copy, self.write = Memcpy(rank), WriteLimit(rank, 1, 8 * MIB)

    def begin(self, step: int) -> Pending:
        path = self.path(step)
        path.mkdir(exist_ok=True)
        self.copy.save(path)
        return self.pending(lambda: self.write.save(path))

    def close(self) -> None:
        super().close()
        del self.copy, self.write
        release()


# --- who takes part -------------------------------------------------------------------------------------------------

_SHARED = StagingOptions(
    use_pinned_memory=False, use_shared_memory=True, use_async_staging=False, use_non_blocking_copy=False
)
_BESIDE = StagingOptions(
    use_pinned_memory=False, use_shared_memory=True, use_async_staging=True, use_non_blocking_copy=False
)
Maker = Callable[[Rank, Path], Saver]
PEERS: dict[str, Maker] = {
    "DCP thread": DcpAsync,
    "DCP thread, shared memory": partial(DcpAsync, staging=_SHARED),
    "DCP thread, staged beside": partial(DcpAsync, staging=_BESIDE),
    "DCP thread, pinned stager": partial(DcpAsync, staging=StagingOptions()),
    "DCP process": partial(DcpAsync, process=True),
    "DCP process, shared memory": partial(DcpAsync, staging=_SHARED, process=True),
    "torchsnapshot": TorchSnapshot,
    "torch-checkpointing": TorchCheckpointingAsync,
}
DISK: dict[str, Maker] = {CKPT: Ckpt, **PEERS}

REMARKS = {
    LIMIT: "buffer + direct write: a memcpy of the state into a warm buffer, then a thread that writes that with O_DIRECT.",
    CKPT: "ckpt: async_save.",
    MEMORY: "ckpt memory: Checkpointer(memory=Every(1)), nothing stored.",
    DEVICE: "timed device: the same, with all tensors taken for those of an accelerator behind a bus of 12 GB/s, whose copies "
    "cost the processor nothing (ckpt.snapshot.device.Timed; the bytes are left out).",
    BOTH: "ckpt memory + storage: Checkpointer(storage=..., memory=Every(1)).",
    "DCP thread": "DCP thread: async_save as shipped, on a process group of its own; it stages into new memory each time.",
    "DCP thread, shared memory": "shared memory: one DefaultStager kept over saves, use_shared_memory alone.",
    "DCP thread, staged beside": "staged beside: the same with use_async_staging, fenced before the state changes.",
    "DCP thread, pinned stager": "pinned stager: DefaultStager() with its defaults.",
    "torchsnapshot": "torchsnapshot: async_take of each rank's own shards, fsync added.",
    "torch-checkpointing": "torch-checkpointing: its async default, fsync added in its callbacks, use_direct_io=False "
    "(its default fails on ext4 with EINVAL), without a resharder (on more than one rank that needs CUDA).",
}
_NEEDS = {"torchsnapshot": "torchsnapshot", "torch-checkpointing": "torch_checkpointing"}


def savers(storage: int = 1) -> dict[str, Maker]:
    """All contestants, in the order of the tables; a Checkpointer stores every `storage` steps."""
    ours: dict[str, Maker] = {
        CKPT: Ckpt,
        MEMORY: partial(Checkpointer, storage=None),
        BOTH: partial(Checkpointer, storage=storage),
    }
    return {**ours, **PEERS}


def unavailable(names: Iterable[str]) -> dict[str, str]:
    """Why some of these cannot even be tried."""
    return {name: "not installed" for name in names if name in _NEEDS and find_spec(_NEEDS[name]) is None}


def make(rank: Rank, name: str, folder: str, storage: int = 1) -> Saver:
    """A contestant for one turn, its saves going below `folder`, which exists and is fresh."""
    timed = partial(Checkpointer, storage=None, device=Timed(12.0, moves=False))
    makers: dict[str, Maker] = {**savers(storage), LIMIT: BareBuffer, DEVICE: timed}
    return makers[name](rank, Path(folder))


def grown(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    """What a contestant counted between two looks at its counts."""
    return {name: count - before.get(name, 0) for name, count in after.items()}


def remarks(names: Iterable[str], failures: Mapping[str, str]) -> list[str]:
    """What a reader must know about these rows, and why some of them are empty."""
    said = " ".join(REMARKS[name] for name in names if name in REMARKS and name not in failures)
    return [said, *(f"{name} does not run: {reason}" for name, reason in failures.items())]
