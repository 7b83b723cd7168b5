"""A checkpoint -> files that other tools read: Hugging Face safetensors, a native Zarr directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["ExportReport", "export_safetensors", "export_zarr"]


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    `path`: what now exists; `files`: the files below it that hold data. `bytes`: of all tensors as written.
    `tied`: (left out, kept) names of tensors that are one. `per_rank`: tensors that the checkpoint holds once a rank,
    of which the lowest rank's was taken.
    """

    ref: str
    path: str
    files: tuple[str, ...]
    tensors: int
    bytes: int
    seconds: float
    tied: tuple[tuple[str, str], ...] = ()
    per_rank: tuple[str, ...] = ()


def export_safetensors(
    ref: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    only: Sequence[str] | None = None,
    prefix_strip: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    dtype: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> ExportReport:
    """Writes tensors as Hugging Face safetensors."""
    raise NotImplementedError


def export_zarr(
    ref: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    only: Sequence[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> ExportReport:
    """Writes tensors as a native Zarr v3 directory."""
    raise NotImplementedError
