"""The in-memory model keeps the contract."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import pytest
from backend_contract import BackendContract

from ckpt.backends import Backend, MemoryBackend


class TestMemory(BackendContract):
    @pytest.fixture
    def make(self) -> Callable[[], Backend]:
        root = uuid.uuid4().hex
        return lambda: MemoryBackend(root)
