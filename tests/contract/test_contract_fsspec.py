"""Filesystems of fsspec keep the contract through the one backend: one of objects, one of files."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from backend_contract import BackendContract

from ckpt.backends import Backend
from ckpt.backends.fsspec import FsspecBackend


@pytest.mark.parametrize("kind", ["memory", "file"])
class TestFsspec(BackendContract):
    @pytest.fixture
    def make(self, kind: str, tmp_path: Path) -> Callable[[], Backend]:
        url = f"memory://{uuid.uuid4().hex}" if kind == "memory" else f"file://{tmp_path}/root"
        return lambda: FsspecBackend(url)
