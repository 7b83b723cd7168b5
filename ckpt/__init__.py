"""ckpt: checkpoints for distributed PyTorch training.

The public surface. Names are imported when they are first used, so that tools which only list or verify
checkpoints do not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckpt import adapters
    from ckpt.background import SaveHandle
    from ckpt.checkpoint import Checkpoint
    from ckpt.checkpoint import open_checkpoint as open
    from ckpt.checkpointer import Checkpointer, CloseReport, async_save, load, save
    from ckpt.config import ErasureCode, Every, Replicas
    from ckpt.errors import (
        CapacityError,
        CkptError,
        ConflictError,
        DeadlineError,
        FormatError,
        IntegrityError,
        LayoutError,
        MismatchError,
        NotFoundError,
        PeerError,
        StorageError,
        UnsafeError,
        UsageError,
        VersionError,
    )
    from ckpt.format.layout import Layout
    from ckpt.loading import LoadReport
    from ckpt.merge.average import EMA, MWA, Power, PowerEMA
    from ckpt.merge.recipe import Recipe, average, posthoc
    from ckpt.merge.search import SearchReport, search
    from ckpt.merge.write import MergeReport, materialise
    from ckpt.objects import PerCoordinate, PerRank, Pickled, Replicated
    from ckpt.retention import KeepAll, KeepAny, KeepBest, KeepEvery, KeepLast, KeepWithin
    from ckpt.rng import RNG
    from ckpt.saving import SaveReport
    from ckpt.shards import ByLayout, Shard
    from ckpt.tiers import Local

__version__ = "0.1.0"
__all__ = [
    "EMA",
    "MWA",
    "RNG",
    "ByLayout",
    "CapacityError",
    "Checkpoint",
    "Checkpointer",
    "CkptError",
    "CloseReport",
    "ConflictError",
    "DeadlineError",
    "ErasureCode",
    "Every",
    "FormatError",
    "IntegrityError",
    "KeepAll",
    "KeepAny",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "KeepWithin",
    "Layout",
    "LayoutError",
    "LoadReport",
    "Local",
    "MergeReport",
    "MismatchError",
    "NotFoundError",
    "PeerError",
    "PerCoordinate",
    "PerRank",
    "Pickled",
    "Power",
    "PowerEMA",
    "Recipe",
    "Replicas",
    "Replicated",
    "SaveHandle",
    "SaveReport",
    "SearchReport",
    "Shard",
    "StorageError",
    "UnsafeError",
    "UsageError",
    "VersionError",
    "adapters",
    "async_save",
    "average",
    "load",
    "materialise",
    "open",
    "posthoc",
    "save",
    "search",
]

_HOME = {
    "EMA": "merge.average",
    "MWA": "merge.average",
    "Power": "merge.average",
    "PowerEMA": "merge.average",
    "RNG": "rng",
    "Checkpoint": "checkpoint",
    "Checkpointer": "checkpointer",
    "CloseReport": "checkpointer",
    "LoadReport": "loading",
    "MergeReport": "merge.write",
    "Recipe": "merge.recipe",
    "SaveReport": "saving",
    "SearchReport": "merge.search",
    "SaveHandle": "background",
    "async_save": "checkpointer",
    "average": "merge.recipe",
    "load": "checkpointer",
    "materialise": "merge.write",
    "posthoc": "merge.recipe",
    "save": "checkpointer",
    "search": "merge.search",
    "ErasureCode": "config",
    "Every": "config",
    "KeepAll": "retention",
    "KeepAny": "retention",
    "KeepBest": "retention",
    "KeepEvery": "retention",
    "KeepLast": "retention",
    "KeepWithin": "retention",
    "Replicas": "config",
    "PerCoordinate": "objects",
    "PerRank": "objects",
    "Pickled": "objects",
    "Replicated": "objects",
    "ByLayout": "shards",
    "Layout": "format.layout",
    "Shard": "shards",
    "Local": "tiers",
}


def __getattr__(name: str) -> Any:
    if name == "open":
        return import_module("ckpt.checkpoint").open_checkpoint
    if name == "adapters":
        return import_module("ckpt.adapters")
    if name in _HOME:
        return getattr(import_module(f"ckpt.{_HOME[name]}"), name)
    if name in __all__:
        return getattr(import_module("ckpt.errors"), name)
    raise AttributeError(f"module 'ckpt' has no attribute {name!r}")
