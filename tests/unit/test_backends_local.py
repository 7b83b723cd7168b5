"""Local files: what the contract of all backends does not say. Durability, faults, partial calls, descriptors."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckpt import faults
from ckpt.backends import LocalBackend, backend_for, local
from ckpt.backends.base import TEMPORARY
from ckpt.errors import CkptError, NotFoundError, StorageError

PAGE = 4096


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[LocalBackend]:
    backend = LocalBackend(str(tmp_path / "root"))
    yield backend
    backend.close()


@pytest.fixture
def fail() -> Iterator[Callable[[str, int], list[str]]]:
    """Makes one named point raise an OSError; returns the points that were passed."""
    passed: list[str] = []

    def plan(name: str, code: int) -> list[str]:
        def hook(at: str) -> None:
            passed.append(at)
            if at == name:
                raise OSError(code, os.strerror(code))

        faults.install(hook)
        return passed

    yield plan
    faults.install(None)


def files(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def store(backend: LocalBackend, path: str, data: bytes) -> None:
    upload = backend.new(path, len(data))
    try:
        upload.write(0, memoryview(data))
        upload.finish()
    except BaseException:
        upload.abort()
        raise


CREATE = ["open", "write", "fsync", "link", "unlink", "fsync-folder"]
NEW = ["open", "allocate", "write", "fsync", "fsync-folder"]


def test_the_points_below_are_all_there_are(backend: LocalBackend, fail: Callable[[str, int], list[str]]) -> None:
    passed = fail("", 0)
    backend.create("a/b", b"1")
    assert passed == ["local.mkdir", "local.mkdir.fsync"] * 2 + [f"local.create.{p}" for p in CREATE]
    passed.clear()
    store(backend, "a/c", b"1" * PAGE)
    assert passed == [f"local.new.{p}" for p in NEW]
    passed.clear()
    backend.delete("a/b")
    assert passed == ["local.delete", "local.delete.fsync", "local.delete.folder"]


@pytest.mark.parametrize("point", CREATE)
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_failed_create_says_so(
    backend: LocalBackend, fail: Callable[[str, int], list[str]], tmp_path: Path, point: str, code: int
) -> None:
    fail(f"local.create.{point}", code)
    with pytest.raises(StorageError, match=r"a/b.*") as caught:
        backend.create("a/b", b"1")
    assert ("free some space" in str(caught.value)) == (code == errno.ENOSPC)
    faults.install(None)
    before_link = point in ("open", "write", "fsync", "link")
    names = [f for f in files(tmp_path) if TEMPORARY not in f]
    assert names == ([] if before_link else ["root/a/b"])
    assert point == "unlink" or len(files(tmp_path)) == len(names)


@pytest.mark.parametrize("point", NEW)
def test_a_failed_upload_leaves_nothing(
    backend: LocalBackend, fail: Callable[[str, int], list[str]], tmp_path: Path, point: str
) -> None:
    fail(f"local.new.{point}", errno.ENOSPC)
    with pytest.raises(StorageError, match=r"a/b: No space left on device; free some space"):
        store(backend, "a/b", b"1" * PAGE)
    assert files(tmp_path) == []
    faults.install(None)
    store(backend, "a/b", b"2")
    assert backend.fetch("a/b", 1) == b"2"


def test_no_room_is_known_before_the_first_byte(backend: LocalBackend, tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        backend.new("a/b", 1 << 60)
    assert files(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS])
def test_filesystems_that_cannot_reserve(backend: LocalBackend, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    class Libc:
        @staticmethod
        def fallocate(*args: object) -> int:
            local.ctypes.set_errno(code)
            return -1

    monkeypatch.setattr(local, "_libc", Libc)
    upload = backend.new("a", 3 * PAGE)
    assert backend.size("a") == 3 * PAGE
    upload.write(0, memoryview(b"1" * PAGE))
    upload.finish(PAGE)
    assert backend.fetch("a", PAGE) == b"1" * PAGE


def test_create_is_durable_in_the_right_order(
    backend: LocalBackend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log: list[str] = []
    names: dict[int, str] = {}
    real_open, real_fsync, real_link = os.open, os.fsync, os.link

    def open_(path: str, *args: int) -> int:
        fd = real_open(path, *args)
        names[fd] = "file" if TEMPORARY in str(path) else str(Path(path).relative_to(tmp_path))
        return fd

    def fsync(fd: int) -> None:
        log.append(f"fsync {names[fd]}")
        real_fsync(fd)

    def link(a: str, b: str) -> None:
        log.append("link")
        real_link(a, b)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", link)
    backend.create("step/commit.json", b"1")
    assert log == ["fsync .", "fsync root", "fsync file", "link", "fsync root/step"]
    log.clear()
    backend.delete("step/commit.json")
    assert log == ["fsync root/step"]


def test_partial_reads_and_writes_are_continued(backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write, real_read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real_write(fd, data[:1000], at))
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: real_read(fd, [into[0][:7]], at))
    data = bytes(range(256)) * 40
    backend.create("small", data)
    store(backend, "large", data)
    for path in ("small", "large"):
        buffers = [bytearray(5), bytearray(100), bytearray(300)]
        backend.read(path, 11, [memoryview(b) for b in buffers])
        assert b"".join(buffers) == data[11:416]


@pytest.mark.parametrize("shift", [0, 1, 8, 512])
def test_direct_writes_from_any_memory(tmp_path: Path, shift: int) -> None:
    backend = LocalBackend(str(tmp_path), direct=True)
    memory = mmap.mmap(-1, 8 * PAGE)
    memory[:] = os.urandom(8 * PAGE)
    data = memoryview(memory)[shift : shift + 6 * PAGE + 100]
    upload = backend.new("a", len(data))
    upload.write(4 * PAGE, data[4 * PAGE :])
    upload.write(0, data[: 4 * PAGE])
    upload.finish()
    assert backend.fetch("a", 1 << 20) == bytes(data)
    backend.close()


def test_storage_errors_name_the_file(backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    backend.create("a/b", b"1")

    def broken(*args: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(StorageError, match=r"reading .*root/a/b: Input/output error"):
        backend.read("a/b", 0, [memoryview(bytearray(1))])


def test_a_file_where_a_folder_must_be(backend: LocalBackend, tmp_path: Path) -> None:
    backend.create("a", b"1")
    for verb in (lambda: backend.create("a/b", b"1"), lambda: backend.new("a/b", 1)):
        with pytest.raises(CkptError, match="a/b"):
            verb()
    assert files(tmp_path) == ["root/a"]


def test_a_reader_keeps_its_file_while_others_are_opened(
    backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the oldest of 64 descriptors was closed under the thread that read from it."""
    for i in range(100):
        backend.create(f"{i}", b"%03d" % i)
    real, first = os.preadv, threading.Event()

    def preadv(fd: int, into: list[memoryview], at: int) -> int:
        if not first.is_set():
            first.set()
            for i in range(1, 100):
                got = bytearray(3)
                backend.read(f"{i}", 0, [memoryview(got)])
                assert got == b"%03d" % i
        return real(fd, into, at)

    monkeypatch.setattr(os, "preadv", preadv)
    got = bytearray(3)
    backend.read("0", 0, [memoryview(got)])
    assert got == b"000"


def test_descriptors_are_bounded_and_given_back(backend: LocalBackend) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for i in range(90):
        backend.create(f"{i}", b"1")
        backend.read(f"{i}", 0, [memoryview(bytearray(1))])
    assert len(os.listdir("/proc/self/fd")) <= before + local._OPEN_FILES
    for i in range(90):
        store(backend, f"n{i}", b"1")
        backend.new(f"m{i}", PAGE).abort()
    backend.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_fetch_does_not_allocate_its_limit(backend: LocalBackend) -> None:
    backend.create("a", b"1")
    assert backend.fetch("a", 1 << 62) == b"1"


def test_leftovers_of_a_crash_do_not_disturb(backend: LocalBackend, tmp_path: Path) -> None:
    (tmp_path / "root" / "a").mkdir(parents=True)
    (tmp_path / "root" / "a" / f"{TEMPORARY}0123").write_bytes(b"half")
    backend.create("a/b", b"1")
    assert backend.fetch("a/b", 1) == b"1"
    backend.delete("a/b")
    assert [e.name for e in backend.list("a")] == [f"{TEMPORARY}0123"]


def test_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert backend_for("run").root == str(tmp_path / "run")
    assert backend_for("~/run").root == str(tmp_path / "home" / "run")
    assert backend_for(f"file://{tmp_path}/run/").root == str(tmp_path / "run")
    with pytest.raises(NotFoundError):
        backend_for("run").size("a")
    assert not (tmp_path / "run").exists()
