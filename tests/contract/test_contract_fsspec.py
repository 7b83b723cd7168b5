"""Filesystems of fsspec keep the contract through the one backend: one of objects, one of files."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from backend_contract import BackendContract

from ckpt.backends import Backend
from ckpt.backends.fsspec import FsspecBackend
from ckpt.errors import ConflictError, NotFoundError


@pytest.mark.parametrize("kind", ["memory", "file"])
class TestFsspec(BackendContract):
    @pytest.fixture
    def make(self, kind: str, tmp_path: Path) -> Callable[[], Backend]:
        url = f"memory://{uuid.uuid4().hex}" if kind == "memory" else f"file://{tmp_path}/root"
        return lambda: FsspecBackend(url)


def test_of_creators_that_look_at_once_one_succeeds() -> None:
    """A filesystem that cannot create only if absent: within a process, nobody looks while another one creates."""
    url, gate, got = f"memory://{uuid.uuid4().hex}", threading.Barrier(2), []

    def work(data: bytes) -> None:
        backend = FsspecBackend(url)
        look = backend._fs.exists

        def meet(path: str) -> bool:
            there: bool = look(path)
            with suppress(threading.BrokenBarrierError):
                gate.wait(0.3)  # both are here, if they can be
            return there

        backend._fs.exists = meet
        try:
            backend.create("a", data)
            got.append(data)
        except ConflictError:
            pass

    threads = [threading.Thread(target=work, args=(data,)) for data in (b"1", b"2")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1 and FsspecBackend(url).fetch("a", 9) == got[0]


def test_a_file_has_its_name_when_it_is_whole(tmp_path: Path) -> None:
    backend, other = FsspecBackend(f"file://{tmp_path}"), FsspecBackend(f"file://{tmp_path}")
    write, seen = backend._fs.pipe_file, []

    def slowly(path: str, data: bytes, **more: object) -> None:
        write(path, data[:1], **more)
        with suppress(NotFoundError):
            seen.append(other.fetch("a", 9))
        write(path, data, **more)

    backend._fs.pipe_file = slowly
    backend.create("a", b"123")
    assert seen == [] and other.fetch("a", 9) == b"123"
