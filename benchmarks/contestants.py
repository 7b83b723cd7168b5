"""`ckpt` and its peers, each as shipped, behind two verbs: `save` returns when all is durable, `load` fills the live
tensors in place. Both are collective. What a training job would do around a peer is part of its time: taking the state
dict, and `fsync` where the peer does not do it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

import ckpt
from benchmarks.harness import Rank
from benchmarks.limits import limits

__all__ = ["CKPT", "LOADERS", "RESHARDERS", "SAVERS", "chosen", "fsync", "load", "notes", "save"]


class Contestant(Protocol):
    """Has either verb or both; `path` is an existing directory, fresh for every save.

    What they return is added up over ranks where it is a whole number.
    """

    def save(self, path: Path) -> dict[str, Any] | None: ...

    def load(self, path: Path) -> dict[str, Any] | None: ...


class Ckpt:
    """This library. All saves of a table go into one run, the parent of `path`, as a training job's do."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank

    def save(self, path: Path) -> None:
        ckpt.save(self.rank.state.tree(), path.parent, step=int(path.name))

    def load(self, path: Path) -> dict[str, Any]:
        report = ckpt.load(self.rank.state.tree(), f"{path.parent}@{path.name}")
        return {"bytes_read": int(report.bytes_read), "bytes_needed": int(report.bytes_needed)}


class TorchSave:
    """torch.save of this rank's shards into one file; torch.load, through a mapping or not, and a copy."""

    def __init__(self, rank: Rank, *, mapped: bool = False) -> None:
        self.rank, self.mapped = rank, mapped

    def save(self, path: Path) -> None:
        with open(self._file(path), "wb") as f:
            torch.save(self.rank.state.local(), f)
            f.flush()
            os.fsync(f.fileno())
        fsync(path)

    def load(self, path: Path) -> None:
        _copy(torch.load(self._file(path), mmap=self.mapped, weights_only=True), self.rank.state.local())

    def _file(self, path: Path) -> Path:
        return path / f"rank-{self.rank.rank}.pt"


class Safetensors:
    """save_file of this rank's shards, then fsync; load_file and a copy."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank

    def save(self, path: Path) -> None:
        save_file(self.rank.state.local(), self._file(path))
        fsync(self._file(path))
        fsync(path)

    def load(self, path: Path) -> None:
        _copy(load_file(self._file(path)), self.rank.state.local())

    def _file(self, path: Path) -> Path:
        return path / f"rank-{self.rank.rank}.safetensors"


class Dcp:
    """torch.distributed.checkpoint; its FileSystemWriter calls fsync itself."""

    def __init__(self, rank: Rank, threads: int) -> None:
        self.rank, self.threads = rank, threads

    def save(self, path: Path) -> None:
        dcp.save(self.rank.state.dicts(), storage_writer=dcp.FileSystemWriter(path, thread_count=self.threads))

    def load(self, path: Path) -> None:
        dcp.load(self.rank.state.dicts(), storage_reader=dcp.FileSystemReader(path))


class TorchCheckpointing:
    """Meta's torch-checkpointing, saving synchronously. It never calls fsync, so we do.

    Without a resharder: 0.1.1 gathers the metadata that resharding needs through CUDA tensors, whatever the group's
    backend, so on CPU more than one rank cannot save with one. `reshard=True` is there to show that.
    """

    def __init__(self, rank: Rank, *, reshard: bool = False) -> None:
        import torch_checkpointing as tc
        from torch_checkpointing.config import SyncCheckpointSaverConfig
        from torch_checkpointing.default_resharder import DefaultResharder
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        logging.getLogger("torch_checkpointing").setLevel(logging.CRITICAL)
        self.rank = rank
        spec = tc.ItemSpec(resharder=DefaultResharder() if reshard else None)
        config = tc.CheckpointManager.Config(
            items={"model": spec, "optimizer": spec},
            save=SyncCheckpointSaverConfig(),
            storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
        )
        self.manager = tc.CheckpointManager(config)

    def save(self, path: Path) -> None:
        self.manager.save(str(path / "step"), self.rank.state.dicts())
        dist.barrier()  # rank 0 has renamed the directory
        for item in ("model", "optimizer"):
            fsync(path / "step" / f"{item}_{self.rank.rank}.pt")
        if self.rank.rank == 0:
            for file in (path / "step").iterdir():
                if file.suffix != ".pt":
                    fsync(file)
            fsync(path / "step")
            fsync(path)

    def load(self, path: Path) -> None:
        self.manager.load(str(path / "step"), into=self.rank.state.dicts(), strict=True)


def fsync(path: Path) -> None:
    """Of a file or a folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _copy(source: dict[str, torch.Tensor], target: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])


# --- who takes part -------------------------------------------------------------------------------------------------

Maker = Callable[[Rank], Any]

CKPT = "ckpt"
PEERS: dict[str, Maker] = {
    "torch.save": TorchSave,
    "safetensors": Safetensors,
    "DCP": lambda rank: Dcp(rank, 1),
    "DCP thread_count=4": lambda rank: Dcp(rank, 4),
    "torch-checkpointing": TorchCheckpointing,
}
SAVERS: dict[str, Maker] = {CKPT: Ckpt, **PEERS}
LOADERS: dict[str, Maker] = {
    CKPT: Ckpt,
    "torch.save": TorchSave,
    "torch.save mmap": lambda rank: TorchSave(rank, mapped=True),
    "safetensors": Safetensors,
    "DCP": lambda rank: Dcp(rank, 1),
    "torch-checkpointing": TorchCheckpointing,
}
RESHARDERS: dict[str, Maker] = {
    CKPT: Ckpt,
    "DCP": LOADERS["DCP"],
    "torch-checkpointing resharder": lambda rank: TorchCheckpointing(rank, reshard=True),
}

# What a reader of a table must know about a row; `notes` picks what applies.
REMARKS = {
    "torch.save": "torch.save: one file a rank, with fsync; torch.load, then a copy into the live tensors.",
    "safetensors": "safetensors: one file a rank, with fsync; load_file, then a copy into the live tensors.",
    "torch-checkpointing": "torch-checkpointing: synchronous, with fsync added, use_direct_io=False (its default fails "
    "on ext4 with EINVAL), without a resharder (on more than one rank that needs CUDA).",
}


def chosen(makers: Mapping[str, Any], only: Sequence[str] | None) -> list[str]:
    """The contestants that take part, in the order of the tables."""
    names = [name for name in makers if not only or name in only]
    if not names:
        raise SystemExit(
            f"no contestant of this benchmark is called {', '.join(only or ())}; there are {', '.join(makers)}"
        )
    return names


def notes(names: Iterable[str], failures: dict[str, str]) -> list[str]:
    """Remarks on these rows, and why some of them are empty."""
    said = [REMARKS[name] for name in names if name in REMARKS and name not in failures]
    return said + [f"{name}: failed with {reason}" for name, reason in failures.items()]


def _contestant(rank: Rank, name: str) -> Any:
    """The contestant of that name, made at its first turn and kept."""
    if name not in rank.kept:
        makers = {**SAVERS, **LOADERS, **RESHARDERS, **limits(rank.world)}
        rank.kept[name] = makers[name](rank)
    return rank.kept[name]


# --- what the parent asks of a rank ---------------------------------------------------------------------------------


def save(rank: Rank, name: str, folder: str, step: int) -> dict[str, Any]:
    """A timed durable save of a step into the contestant's folder."""
    contestant, path = _contestant(rank, name), Path(folder) / str(step)
    if name != CKPT:
        path.mkdir(parents=True, exist_ok=True)
    return rank.timed(lambda: contestant.save(path))


def load(rank: Rank, name: str, folder: str, step: int) -> dict[str, Any]:
    """A timed load of a step; the state is zeroed before and compared with what was saved after."""
    contestant, path = _contestant(rank, name), Path(folder) / str(step)
    is_limit = name.startswith("limit")
    if not is_limit:
        rank.state.zero()
    timing = rank.timed(lambda: contestant.load(path))
    if not is_limit and (wrong := rank.state.wrong()):
        raise AssertionError(f"{name}: {len(wrong)} tensors differ after the load, such as {wrong[0]}")
    return timing
