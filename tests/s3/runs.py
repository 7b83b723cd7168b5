"""Runs on S3 for tests: a state that goes out in several parts, and what must be true of a run whatever happened to it."""

from __future__ import annotations

from typing import Any

import torch

import ckpt
from ckpt import catalog
from ckpt.backends import Backend, backend_for
from ckpt.collective import Solo
from ckpt.saving import Planner, Request, SaveReport, save_state


def state(version: int) -> dict[str, Any]:
    """11 MiB that differ from version to version."""
    return {
        "w": torch.arange(11 << 18, dtype=torch.int32) + version,
        "b": torch.full((3,), float(version)),
        "note": version,
    }


def save(backend: Backend, step: int, version: int | None = None) -> SaveReport:
    """Saves through a backend of the caller's."""
    return save_state(Request(backend, step, 0, {}), state(step if version is None else version), Solo(), Planner())


def check(url: str, ref: str | None = None) -> int:
    """Loads a ref (the newest step by default) and compares every bit. Returns the version that it holds."""
    found = {"w": torch.zeros(11 << 18, dtype=torch.int32), "b": torch.zeros(3), "note": None}
    ckpt.load(found, ref or url)
    wanted = state(int(str(found["note"])))
    assert torch.equal(found["w"], wanted["w"]) and torch.equal(found["b"], wanted["b"])  # type: ignore[arg-type]
    return int(str(found["note"]))


def committed(url: str) -> list[int]:
    """The steps that are listed, none of them damaged."""
    listing = catalog.list_run(backend_for(url))
    assert not [s.error for s in listing.steps if s.error]
    return [s.step for s in listing.committed]


def everything(backend: Backend, path: str = "") -> dict[str, bytes]:
    """All objects below a path, whole."""
    out = {}
    for e in backend.list(path):
        at = f"{path}/{e.name}".lstrip("/")
        out.update(everything(backend, at) if e.folder else {at: backend.fetch(at, 1 << 30)})
    return out
