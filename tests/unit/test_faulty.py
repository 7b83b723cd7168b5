"""The faulty backend does what it says; and no fault of a storage publishes half a checkpoint or stops the next save."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt
from ckpt import catalog
from ckpt.backends import LocalBackend
from ckpt.backends.faulty import Fault, FaultyBackend
from ckpt.errors import CkptError, ConflictError, StorageError, UsageError


def test_without_faults_it_passes_everything_on(tmp_path: Path) -> None:
    backend = FaultyBackend(LocalBackend(str(tmp_path)))
    backend.create("a/b", b"12345")
    upload = backend.new("a/c", 4)
    upload.write(0, memoryview(b"6789"))
    upload.finish()
    into = bytearray(2)
    backend.read("a/c", 1, [memoryview(into)])
    assert into == b"78" and backend.fetch("a/b", 9) == b"12345" and backend.size("a/c") == 4
    assert [e.name for e in backend.list("a")] == ["b", "c"]
    backend.delete("a/b")
    backend.new("a/d", 1).abort()
    backend.close()
    assert backend.list("a") == LocalBackend(str(tmp_path)).list("a")
    verbs = "create new write finish read fetch size list delete new list"
    assert [verb for verb, _ in backend.calls] == verbs.split()
    assert backend.root == str(tmp_path)


def test_an_error_happens_instead_of_the_call(tmp_path: Path) -> None:
    backend = FaultyBackend(LocalBackend(str(tmp_path)), [Fault("create", "error", "*.json", nth=2)])
    backend.create("a.json", b"1")
    backend.create("b.txt", b"1")
    with pytest.raises(StorageError, match=r"b\.json: a fault was planned here"):
        backend.create("b.json", b"1")
    backend.create("b.json", b"2")
    assert backend.fetch("b.json", 9) == b"2"


def test_a_lost_answer_comes_after_the_call(tmp_path: Path) -> None:
    mine = ConflictError("mine")
    backend = FaultyBackend(LocalBackend(str(tmp_path)), [Fault("create", "lost", nth=0, error=mine)])
    with pytest.raises(ConflictError, match="mine"):
        backend.create("a", b"1")
    assert backend.fetch("a", 9) == b"1"


def test_torn_and_short_writes(tmp_path: Path) -> None:
    faults = [Fault("write", "torn", "torn"), Fault("write", "short", "short"), Fault("create", "torn", "small")]
    backend = FaultyBackend(LocalBackend(str(tmp_path)), faults)
    upload = backend.new("short", 8)
    upload.write(0, memoryview(b"12345678"))
    upload.finish()
    assert backend.fetch("short", 8) == b"1234\0\0\0\0"
    with pytest.raises(StorageError):
        backend.new("torn", 8).write(0, memoryview(b"12345678"))
    with pytest.raises(StorageError):
        backend.create("small", b"1234")
    assert backend.fetch("small", 8) == b"12"


class Gate(threading.Event):
    """An event that tells when somebody waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.reached.set()
        return super().wait(timeout)


def test_a_delay_ends_with_its_event(tmp_path: Path) -> None:
    until = Gate()
    backend = FaultyBackend(LocalBackend(str(tmp_path)), [Fault("create", "delay", until=until)])
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(backend.create, "a", b"first")
        assert until.reached.wait(60)
        backend.create("a", b"second")
        until.set()
        with pytest.raises(ConflictError):
            first.result()
    assert backend.fetch("a", 9) == b"second"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Fault("rename", "error"),
        lambda: Fault("create", "explode"),
        lambda: Fault("read", "torn"),
        lambda: Fault("create", "delay"),
        lambda: Fault("create", "error", until=threading.Event()),
    ],
)
def test_faults_that_make_no_sense(wrong: Callable[[], Fault]) -> None:
    with pytest.raises(UsageError):
        wrong()


# Saves on a faulty storage.


def state(version: int) -> dict[str, Any]:
    return {"w": torch.full((30, 20), float(version)), "note": version}


Save = Callable[..., FaultyBackend]


@pytest.fixture
def save() -> Save:
    """Saves a step of a run through a backend with these faults; returns that backend. Raises what the save does."""

    def run(run: Path, step: int, *faults: Fault) -> FaultyBackend:
        backend = FaultyBackend(LocalBackend(str(run)), faults)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ckpt.checkpointer.backend_for", lambda *_, **__: backend)
            ckpt.save(state(step), run, step=step)
        return backend

    return run


def committed(run: Path) -> list[int]:
    """The steps that are listed, all of which must be whole."""
    listing = catalog.list_run(LocalBackend(str(run)))
    assert not [s.error for s in listing.steps if s.error]
    for s in listing.committed:
        target = state(0)
        ckpt.load(target, f"{run}@{s.step}")
        assert target["w"].eq(s.step).all() and target["note"] == s.step
    return [s.step for s in listing.committed]


@pytest.mark.parametrize("what", ["error", "lost", "torn"])
def test_a_fault_at_every_call_of_a_save(tmp_path: Path, save: Save, what: str) -> None:
    calls = save(tmp_path / "count", 1).calls
    assert [v for v, _ in calls] == ["list", "create", "new", "write", "write", "finish", "create", "create"]
    for i, (verb, path) in enumerate(calls):
        if what == "torn" and verb not in ("write",):
            continue  # `create` never leaves half an object: that is its contract
        run = tmp_path / str(i)
        save(run, 1)
        nth = sum(v == verb for v, _ in calls[: i + 1])
        try:
            save(run, 2, Fault(verb, what, nth=nth))
            failed = False
        except StorageError:
            failed = True
        assert failed != (what == "lost" and path.endswith("commit.json")), (verb, path)
        assert committed(run) == ([1] if failed else [1, 2])
        if failed:
            save(run, 2)
        save(run, 3)
        assert committed(run) == [1, 2, 3]


def test_a_storage_that_lies_is_found_out(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "run", 1, Fault("write", "short", "*.safetensors"))
    with ckpt.open(tmp_path / "run") as c:
        assert any("tensor 'w'" in p or "block table" in p for p in c.verify().problems)


def test_of_two_slow_writers_one_commits(tmp_path: Path, save: Save) -> None:
    """The first is held up in front of its commit until the second has committed the same step."""
    until = Gate()
    run = tmp_path / "run"
    slow = FaultyBackend(LocalBackend(str(run)), [Fault("create", "delay", "*/commit.json", until=until)])
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(_save_through, slow, 1)
        assert until.reached.wait(60)
        save(run, 1)
        until.set()
        with pytest.raises(ConflictError, match="exists already"):
            first.result()
    assert committed(run) == [1]
    left = catalog.leftovers(LocalBackend(str(run)), catalog.list_run(LocalBackend(str(run))), 0)
    assert left == ["step-00000001.g0000/a0"]


def _save_through(backend: FaultyBackend, step: int) -> None:
    from ckpt.collective import Solo
    from ckpt.saving import Planner, Request, save_state

    save_state(Request(backend, step, 0, {}), state(step), Solo(), Planner())


def test_a_prune_that_fails_half_way_goes_on_the_next_time(tmp_path: Path, save: Save) -> None:
    run = tmp_path / "run"
    save(run, 1)
    with pytest.raises(CkptError):
        save(run, 2, Fault("create", "error", "*/commit.json"))
    local = LocalBackend(str(run))
    (left,) = catalog.leftovers(local, catalog.list_run(local), 0)
    with pytest.raises(StorageError):
        catalog.delete_tree(FaultyBackend(local, [Fault("delete", "error", nth=2)]), left)
    assert committed(run) == [1]
    (left,) = catalog.leftovers(local, catalog.list_run(local), 0)
    catalog.delete_tree(local, left)
    assert catalog.leftovers(local, catalog.list_run(local), 0) == [] and committed(run) == [1]
    assert not (run / left).exists()


@pytest.mark.parametrize("what", ["error", "torn"])
def test_an_error_in_any_writer_thread(tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """A pack of several buffers, on two threads and two buffers: no failure is lost, and no buffer is."""
    monkeypatch.setenv("CKPT_BUFFER_MIB", "1")
    monkeypatch.setenv("CKPT_BUFFERS", "2")
    monkeypatch.setenv("CKPT_WRITERS", "2")
    large = {"large": torch.arange(5 * 2**18 + 7)}
    monkeypatch.setitem(globals(), "state", lambda version: {**large, "note": version})
    writes = sum(verb == "write" for verb, _ in save(tmp_path / "count", 0).calls)
    assert writes > 8
    for nth in range(1, writes + 1):
        with pytest.raises(StorageError, match="a fault was planned here"):
            save(tmp_path / "run", nth, Fault("write", what, nth=nth))
        assert not list((tmp_path / "run").rglob("*.safetensors"))
    for step in range(3):
        save(tmp_path / "run", step)
    target = {"large": torch.zeros_like(large["large"]), "note": None}
    ckpt.load(target, tmp_path / "run")
    assert torch.equal(target["large"], large["large"]) and target["note"] == 2
