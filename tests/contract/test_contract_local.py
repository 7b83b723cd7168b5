"""Local files keep the contract: with direct I/O and without it, on disk and on a tmpfs."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from backend_contract import BackendContract

from ckpt.backends import Backend, LocalBackend

MEMORY = Path("/dev/shm")


@pytest.fixture(params=["disk", "tmpfs"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "disk":
        yield tmp_path
        return
    if not (MEMORY.is_dir() and os.access(MEMORY, os.W_OK)):
        pytest.skip(f"no tmpfs at {MEMORY} that this user may write to")
    if shutil.disk_usage(MEMORY).free < 64 << 20:
        pytest.skip(f"{MEMORY} has less than 64 MiB left")
    made = Path(tempfile.mkdtemp(prefix="ckpt-test-", dir=MEMORY))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "cached"])
class TestLocal(BackendContract):
    @pytest.fixture
    def make(self, folder: Path, direct: bool) -> Callable[[], Backend]:
        return lambda: LocalBackend(str(folder / "root"), direct=direct)
