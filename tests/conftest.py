"""Fixtures for all tests."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from forks import Fresh, forks

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost rank is told by an exception, not by a C++ stack


@pytest.fixture(scope="session")
def fresh() -> Fresh:
    """`fresh(function, *args)`: its result, from a new process that has torch and ckpt loaded and no second thread."""
    return forks()


@pytest.fixture
def quick_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one, for tests that sync thousands of files; else `tmp_path`."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or shutil.disk_usage(memory).free < 256 << 20:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="ckpt-test-", dir=memory) as made:
        yield Path(made)
