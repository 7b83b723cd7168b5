"""Checkpoints of other libraries -> ours: torch DCP directories, read without running what they pickled."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["ImportReport", "import_dcp"]


@dataclass(frozen=True)
class ImportReport:
    """What an import wrote. `bytes`: of all tensors. `pickled`: objects that could only be kept as pickles."""

    ref: str
    step: int
    tensors: int
    objects: int
    bytes: int
    seconds: float
    pickled: tuple[str, ...] = ()


def import_dcp(
    src_dir: str | os.PathLike[str],
    run: str | os.PathLike[str],
    *,
    step: int = 0,
    allow_pickle: bool = False,
    progress: Callable[[int], None] | None = None,
) -> ImportReport:
    """Copies a torch DCP directory into a run."""
    raise NotImplementedError
