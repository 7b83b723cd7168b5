"""S3 keeps the contract: our own client on two servers, and s3fs through the one backend of fsspec."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from backend_contract import BackendContract

from ckpt.backends import Backend, backend_for


@pytest.mark.parametrize("kind", ["rados", "moto"])
class TestS3(BackendContract):
    many = 10

    @pytest.fixture
    def make(self, kind: str, request: pytest.FixtureRequest, use: Callable[..., str]) -> Callable[[], Backend]:
        url = use(request.getfixturevalue(kind))
        return lambda: backend_for(url)
