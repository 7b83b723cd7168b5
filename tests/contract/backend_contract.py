"""What every backend must do. A test class inherits this and says how to make one: see `test_contract_*.py`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ckpt.backends import Backend, Upload
from ckpt.backends.base import ReadsAhead
from ckpt.errors import CkptError, ConflictError, IntegrityError, NotFoundError, UsageError

PAGE = 4096
THREADS = 8
OUTSIDE = [
    "",
    "/",
    "/etc/passwd",
    "..",
    "../x",
    "a/../../x",
    "a/..",
    "./a",
    "a/./b",
    "a//b",
    "a/",
    "a\x00b",
]


def noise(n: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, n, dtype=np.uint8).tobytes()


def at_once(work: Callable[[int], object], n: int = THREADS) -> list[object]:
    """What n threads that start together return or raise."""
    gate = threading.Barrier(n)

    def run(i: int) -> object:
        gate.wait(timeout=30)
        try:
            return work(i)
        except CkptError as e:
            return e

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(run, range(n)))


def read(backend: Backend, path: str, offset: int, *sizes: int) -> list[bytes]:
    buffers = [bytearray(n) for n in sizes]
    backend.read(path, offset, [memoryview(b) for b in buffers])
    return [bytes(b) for b in buffers]


def store(backend: Backend, path: str, data: bytes, part: int = 4 * PAGE) -> None:
    upload = backend.new(path, len(data))
    for at in range(0, len(data), part):
        upload.write(at, memoryview(data)[at : at + part])
    upload.finish()


class BackendContract:
    """The verbs of `ckpt.backends.base.Backend`, one after the other."""

    many = 100  # objects that are read from many threads; fewer where each takes milliseconds

    @pytest.fixture
    def make(self) -> Callable[[], Backend]:
        """Makes a backend; every call gives another one over the same, at first empty, root."""
        raise NotImplementedError

    @pytest.fixture
    def backend(self, make: Callable[[], Backend]) -> Iterator[Backend]:
        backend = make()
        yield backend
        backend.close()

    # create

    @pytest.mark.parametrize("n", [0, 1, 100, 5000, 300_000])
    def test_create_then_fetch(self, backend: Backend, make: Callable[[], Backend], n: int) -> None:
        backend.create("run/commit.json", noise(n))
        assert backend.fetch("run/commit.json", n) == noise(n)
        assert make().fetch("run/commit.json", 1 << 30) == noise(n)
        assert backend.size("run/commit.json") == n

    def test_create_is_exclusive(self, backend: Backend) -> None:
        backend.create("a/b", b"first")
        for data in (b"second", b"first"):
            with pytest.raises(ConflictError, match="exists"):
                backend.create("a/b", data)
        assert backend.fetch("a/b", 100) == b"first"
        assert [e.name for e in backend.list("a")] == ["b"]

    def test_of_many_creators_one_succeeds(self, make: Callable[[], Backend]) -> None:
        for turn in range(10):
            path = f"turn-{turn}/commit.json"
            backends = [make() for _ in range(THREADS)]
            got = at_once(lambda i, b=backends, p=path: b[i].create(p, noise(2000 + i, i)))
            winners = [i for i, r in enumerate(got) if r is None]
            assert len(winners) == 1 and all(type(r) is ConflictError for r in got if r is not None)
            assert make().fetch(path, 1 << 20) == noise(2000 + winners[0], winners[0])
            assert [e.name for e in make().list(f"turn-{turn}")] == ["commit.json"]

    def test_readers_see_all_or_nothing(self, make: Callable[[], Backend]) -> None:
        data, seen, stop = noise(200_000), [], threading.Event()

        def look() -> None:
            backend = make()
            while not stop.is_set():
                try:
                    seen.append(backend.fetch("x/commit.json", len(data)) == data)
                except NotFoundError:
                    continue

        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(look) for _ in range(2)]
            make().create("x/commit.json", data)
            patience = time.monotonic() + 60
            while not seen and time.monotonic() < patience:
                time.sleep(0.001)
            stop.set()
            for future in futures:
                future.result()
        assert seen and all(seen)

    # new, write, finish, abort

    @pytest.mark.parametrize("n", [0, 1, PAGE - 1, PAGE, PAGE + 1, 20 * PAGE, 20 * PAGE + 123])
    def test_new_object(self, backend: Backend, make: Callable[[], Backend], n: int) -> None:
        store(backend, "step/a0/rank-00000.safetensors", noise(n))
        other = make()
        assert other.size("step/a0/rank-00000.safetensors") == n
        assert read(other, "step/a0/rank-00000.safetensors", 0, n) == [noise(n)]

    def test_parts_in_any_order_from_many_threads(self, backend: Backend) -> None:
        data = noise(41 * PAGE + 77)
        upload = backend.new("a/b", len(data))
        parts = [(at, min(at + 3 * PAGE, len(data))) for at in range(0, len(data), 3 * PAGE)]
        turns = np.random.default_rng(1).permutation(len(parts)).tolist()

        def write(i: int) -> None:
            for k in turns[i::THREADS]:
                upload.write(parts[k][0], memoryview(data)[parts[k][0] : parts[k][1]])

        assert at_once(write) == [None] * THREADS
        upload.finish()
        assert read(backend, "a/b", 0, len(data)) == [data]

    def test_the_header_may_come_last(self, backend: Backend) -> None:
        data = noise(3 * PAGE + 5)
        upload = backend.new("a", len(data))
        upload.write(PAGE, memoryview(data)[PAGE:])
        upload.write(0, memoryview(data)[:PAGE])
        upload.finish()
        assert read(backend, "a", 0, len(data)) == [data]

    def test_writers_may_reuse_their_buffer(self, backend: Backend) -> None:
        upload, buffer = backend.new("a", 2 * PAGE), bytearray(PAGE)
        for k in range(2):
            buffer[:] = bytes([k + 1]) * PAGE
            upload.write(k * PAGE, memoryview(buffer))
        buffer[:] = bytes(PAGE)
        upload.finish()
        assert read(backend, "a", 0, 2 * PAGE) == [b"\x01" * PAGE + b"\x02" * PAGE]

    @pytest.mark.parametrize("size", [0, 1, PAGE, PAGE + 100, 3 * PAGE])
    def test_finish_cuts(self, backend: Backend, size: int) -> None:
        upload = backend.new("a/b", 10 * PAGE)
        data = noise(3 * PAGE)
        upload.write(0, memoryview(data))
        upload.finish(size)
        assert backend.size("a/b") == size and read(backend, "a/b", 0, size) == [data[:size]]
        with pytest.raises(IntegrityError):
            read(backend, "a/b", 0, size + 1)

    def test_abort_leaves_nothing(self, backend: Backend, make: Callable[[], Backend]) -> None:
        for begun in (False, True):
            upload = backend.new("a/b", 10 * PAGE)
            if begun:
                upload.write(0, memoryview(noise(2 * PAGE)))
            upload.abort()
            upload.abort()
            with pytest.raises(NotFoundError):
                make().size("a/b")
            assert not [e for e in backend.list("a") if e.name == "b"]
        store(backend, "a/b", b"again")
        assert backend.fetch("a/b", 10) == b"again"

    def test_new_refuses_a_taken_name(self, backend: Backend) -> None:
        backend.create("small", b"1")
        store(backend, "large", b"2")
        for path, data in (("small", b"1"), ("large", b"2")):
            with pytest.raises(ConflictError):
                backend.new(path, PAGE)
            assert backend.fetch(path, 10) == data
        with pytest.raises(ConflictError):
            backend.create("large", b"3")

    def test_of_many_uploads_one_succeeds(self, make: Callable[[], Backend]) -> None:
        backends = [make() for _ in range(THREADS)]
        data = [noise(2 * PAGE, i) for i in range(THREADS)]
        got = at_once(lambda i: store(backends[i], "a/b", data[i]))
        winners = [i for i, r in enumerate(got) if r is None]
        assert len(winners) == 1 and all(type(r) is ConflictError for r in got if r is not None)
        assert read(make(), "a/b", 0, 2 * PAGE) == [data[winners[0]]]

    def test_many_writers_into_one_folder(self, make: Callable[[], Backend]) -> None:
        got = at_once(lambda i: store(make(), f"step/a0/rank-{i:05d}.safetensors", noise(PAGE + i, i)))
        assert got == [None] * THREADS
        assert [(e.name, e.size) for e in make().list("step/a0")] == [
            (f"rank-{i:05d}.safetensors", PAGE + i) for i in range(THREADS)
        ]

    def test_what_is_unfinished_is_no_committed_object(self, backend: Backend, make: Callable[[], Backend]) -> None:
        upload: Upload = backend.new("a/b", 2 * PAGE)
        upload.write(0, memoryview(noise(PAGE)))
        with pytest.raises(NotFoundError):
            make().size("a/commit.json")
        upload.finish()

    # read, fetch, size

    def test_read_scatters(self, backend: Backend) -> None:
        data = noise(50_000)
        store(backend, "a/b", data)
        sizes = (1, 4095, 1, 0, 10_000, 3, 0)
        got, at = read(backend, "a/b", 17, *sizes), 17
        for piece, n in zip(got, sizes, strict=True):
            assert piece == data[at : at + n]
            at += n

    def test_read_into_thousands_of_buffers(self, backend: Backend) -> None:
        data = noise(6000)
        store(backend, "a/b", data)
        assert b"".join(read(backend, "a/b", 3, *[2] * 2500)) == data[3:5003]

    def test_read_of_nothing(self, backend: Backend) -> None:
        store(backend, "a", b"abc")
        store(backend, "empty", b"")
        assert (
            read(backend, "a", 3) == []
            and read(backend, "a", 3, 0) == [b""]
            and read(backend, "empty", 0, 0, 0) == [b"", b""]
        )

    @pytest.mark.parametrize(
        ("offset", "sizes"), [(0, (4,)), (2, (1, 1)), (3, (1,)), (10, (1,)), (0, (3, 1)), (2**40, (1,))]
    )
    def test_short_objects_are_an_integrity_error(self, backend: Backend, offset: int, sizes: tuple[int, ...]) -> None:
        store(backend, "a", b"abc")
        with pytest.raises(IntegrityError, match="ends at"):
            read(backend, "a", offset, *sizes)

    def test_a_read_of_just_that(self, backend: Backend) -> None:
        if not isinstance(backend, ReadsAhead):
            return
        data = noise(100_000)
        backend.create("a/b", data)
        for offset, n in [(0, 1), (17, 70_000), (99_999, 1)]:
            into = bytearray(n)
            backend.read_just("a/b", offset, [memoryview(into)])
            assert into == data[offset : offset + n]
        several = [bytearray(n) for n in (3, 0, 60_000, 1)]
        backend.read_just("a/b", 5, [memoryview(b) for b in several])
        assert b"".join(several) == data[5:60_009]
        with pytest.raises(IntegrityError):
            backend.read_just("a/b", 99_999, [memoryview(bytearray(2))])
        with pytest.raises(NotFoundError):
            backend.read_just("a/c", 0, [memoryview(bytearray(2))])

    def test_reads_from_many_threads(self, backend: Backend) -> None:
        data = [noise(30_000, i) for i in range(self.many)]
        for i, d in enumerate(data):
            store(backend, f"a/{i}", d)

        def look(k: int) -> bool:
            order = np.random.default_rng(k).permutation(self.many).tolist()
            return all(
                read(backend, f"a/{i}", i, 9000, 9000) == [data[i][i : i + 9000], data[i][i + 9000 : i + 18000]]
                for i in order
            )

        assert at_once(look) == [True] * THREADS

    def test_fetch_has_a_limit(self, backend: Backend) -> None:
        backend.create("a", b"12345")
        assert backend.fetch("a", 5) == backend.fetch("a", 6) == b"12345"
        for limit in (0, 4):
            with pytest.raises(IntegrityError, match="larger than"):
                backend.fetch("a", limit)

    @pytest.mark.parametrize("path", ["none", "none/x", "file/below"])
    def test_what_is_not_there(self, backend: Backend, path: str) -> None:
        backend.create("file", b"1")
        for verb in (lambda: backend.size(path), lambda: backend.fetch(path, 10), lambda: read(backend, path, 0, 1)):
            with pytest.raises(NotFoundError):
                verb()
        backend.delete(path)
        assert backend.list(path) == []

    def test_a_folder_is_no_object(self, backend: Backend) -> None:
        backend.create("a/b", b"1")
        for verb in (lambda: backend.size("a"), lambda: backend.fetch("a", 10), lambda: read(backend, "a", 0, 1)):
            with pytest.raises(NotFoundError):
                verb()
        backend.delete("a")
        assert backend.fetch("a/b", 1) == b"1"

    # list

    def test_list(self, backend: Backend, make: Callable[[], Backend]) -> None:
        assert backend.list("") == [] and backend.list("run") == []
        begun = time.time()
        backend.create("run/gen-0001.json", b"12")
        store(backend, "run/step-2/a0/rank-00000.safetensors", noise(5000))
        backend.create("run/step-2/commit.json", b"1")
        backend.create("run/step-10/commit.json", b"1")
        backend.create("runner", b"")
        found = [(e.name, e.folder) for e in make().list("run")]
        assert found == [("gen-0001.json", False), ("step-10", True), ("step-2", True)]
        assert [(e.name, e.folder, e.size) for e in backend.list("run/step-2/a0")] == [
            ("rank-00000.safetensors", False, 5000)
        ]
        assert [(e.name, e.folder) for e in backend.list("")] == [("run", True), ("runner", False)]
        assert backend.list("run/gen-0001.json") == [] and backend.list("ru") == []
        for e in backend.list("run"):
            assert abs(e.modified - begun) < 600 or (e.folder and e.modified == 0.0)

    # delete

    def test_delete(self, backend: Backend, make: Callable[[], Backend]) -> None:
        store(backend, "step/a0/pack", noise(5000))
        backend.create("step/commit.json", b"1")
        assert read(backend, "step/a0/pack", 0, 10) == [noise(5000)[:10]]
        backend.delete("step/commit.json")
        for _ in range(2):
            backend.delete("step/a0/pack")
            for verb in (backend.size, lambda p: backend.fetch(p, 10), lambda p: read(backend, p, 0, 1)):
                with pytest.raises(NotFoundError):
                    verb("step/a0/pack")
        assert backend.list("") == [] and make().list("step") == []
        store(backend, "step/a0/pack", b"other")
        assert read(backend, "step/a0/pack", 0, 5) == [b"other"]

    def test_delete_leaves_the_neighbours(self, backend: Backend) -> None:
        for path in ("a/b", "a/c", "a/b2/x", "ab"):
            backend.create(path, b"1")
        backend.delete("a/b")
        assert [e.name for e in backend.list("a")] == ["b2", "c"] and backend.size("ab") == 1

    # paths

    @pytest.mark.parametrize("path", OUTSIDE)
    def test_paths_that_leave_are_refused(self, backend: Backend, path: str) -> None:
        backend.create("a/b", b"1")
        verbs: list[Callable[[], object]] = [
            lambda: backend.create(path, b"1"),
            lambda: backend.new(path, 1),
            lambda: read(backend, path, 0, 1),
            lambda: backend.fetch(path, 1),
            lambda: backend.size(path),
            lambda: backend.delete(path),
            lambda: backend.list(path or ".."),
        ]
        for verb in verbs:
            with pytest.raises(UsageError, match="leave"):
                verb()
        assert backend.fetch("a/b", 1) == b"1"

    @pytest.mark.parametrize("path", ["a b", "ünï", "a%2f..", "...", "-x", "a\\b", "~", "$HOME", "x" * 200])
    def test_odd_names_are_names(self, backend: Backend, path: str) -> None:
        backend.create(f"d/{path}/x", b"1")
        store(backend, f"d/{path}/y", b"2")
        assert [e.name for e in backend.list("d")] == [path] and backend.fetch(f"d/{path}/x", 1) == b"1"
        assert [e.name for e in backend.list(f"d/{path}")] == ["x", "y"]

    def test_close_may_come_twice(self, backend: Backend) -> None:
        store(backend, "a", b"abc")
        read(backend, "a", 0, 1)
        backend.close()
        backend.close()
