"""Which backend serves which URL."""

from __future__ import annotations

import uuid

import pytest

from ckpt.backends import LocalBackend, MemoryBackend, backend_for
from ckpt.errors import NotFoundError, UsageError


def test_paths_and_file_urls_are_local() -> None:
    assert isinstance(backend_for("some/run"), LocalBackend)
    assert isinstance(backend_for("file:///some/run"), LocalBackend)


def test_memory_urls_share_a_store_by_name() -> None:
    one, other = (f"memory://{uuid.uuid4().hex}" for _ in range(2))
    backend_for(one).create("a/b", b"1")
    assert isinstance(backend_for(one), MemoryBackend)
    assert backend_for(f"{one}/").fetch("a/b", 1) == b"1" == backend_for(f"{one}/a").fetch("b", 1)
    with pytest.raises(NotFoundError):
        backend_for(other).fetch("a/b", 1)


def test_names_that_begin_alike_are_apart() -> None:
    name = uuid.uuid4().hex
    backend_for(f"memory://{name}").create("a", b"1")
    assert backend_for(f"memory://{name}x").list("") == []


@pytest.mark.parametrize("url", ["nfs5://host/run", "s4://bucket/run", "://run", "C://run"])
def test_unknown_schemes_are_named(url: str) -> None:
    with pytest.raises(UsageError, match="scheme"):
        backend_for(url)
