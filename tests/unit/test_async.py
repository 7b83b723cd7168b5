"""Saves that go on while training does: what is saved is what was there when the save began, whatever comes after."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ckpt
from ckpt import background
from ckpt.backends.local import LocalBackend
from ckpt.catalog import list_run
from ckpt.snapshot import arena
from ckpt.snapshot.fence import Fence, fence_here
from tests.crash.kills import in_child

WAIT = 60.0


class Job:
    """A model with a buffer, its optimizer with momentum, and values."""

    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW, width: int = 300) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
        self.optimizer = optimizer(self.model.parameters(), lr=0.1)
        self.width, self.note = width, 0
        self.train()

    def train(self) -> None:
        self.model(torch.randn(8, self.width)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.note += 1

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "note": self.note, "rng": ckpt.RNG()}

    def content(self) -> dict[str, Any]:
        return {
            "model": copy.deepcopy(self.model.state_dict()),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "note": self.note,
        }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


def stored(run: Path, step: int = 0, **kind: Any) -> dict[str, Any]:
    """What a step of a run holds, loaded into a job of its own."""
    job = Job(**kind)
    state = job.state
    ckpt.load(state, f"{run}@{step}")
    job.note = state["note"]
    return job.content()


class Held:
    """Keeps copies from going on: at their n-th chunk they wait for `go`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int = 1) -> None:
        self.reached, self.go, self.left = threading.Event(), threading.Event(), at
        monkeypatch.setattr(background, "pace", lambda _: self._paced)

    def _paced(self, _: int) -> None:
        self.left -= 1
        if self.left == 0:
            self.reached.set()
            assert self.go.wait(WAIT)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    held = Held(monkeypatch)
    yield held
    held.go.set()


class Fenced:
    """Tells when somebody waits at the fence."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.there = threading.Event()
        wait = Fence.wait

        def told(fence: Fence) -> None:
            self.there.set()
            wait(fence)

        monkeypatch.setattr(Fence, "wait", told)


def in_thread(call: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=call)
    thread.start()
    return thread


def test_what_was_there_is_saved_and_training_goes_on(tmp_path: Path) -> None:
    job = Job()
    before = job.content()
    handle = ckpt.async_save(job.state, tmp_path / "run", metrics={"loss": 1.0})
    for _ in range(3):
        job.train()
    report = handle.result(WAIT)
    assert handle.staged() and handle.done() and handle.committed()
    assert (report.step, report.ref) == (0, f"{tmp_path / 'run'}/step-00000000.g0000")
    assert same(stored(tmp_path / "run"), before) and not same(job.content(), before)
    with ckpt.open(tmp_path / "run") as c:
        assert c.verify().ok and c.metrics == {"loss": 1.0}


def test_copies_give_way_to_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else of the process does."""
    seen = set()

    def look(_: int) -> None:
        seen.add((os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))

    monkeypatch.setattr(background, "pace", lambda _: look)
    before = os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    ckpt.async_save(Job().state, tmp_path / "run").result(WAIT)
    assert seen == {(os.SCHED_BATCH, min(19, before[1] + 5))}
    assert (os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())) == before


def test_what_has_no_fence_is_copied_before_it_returns(tmp_path: Path, held: Held) -> None:
    """Buffers, values, generators and tensors that no optimizer of the state owns may change at once."""
    job, loose = Job(), torch.arange(70_000.0)
    state = {**job.state, "loose": loose}
    before, was = job.content(), loose.clone()
    handle = ckpt.async_save(state, tmp_path / "run")
    assert held.reached.wait(WAIT) and not handle.staged() and not handle.done()
    loose.zero_()
    job.model[1].running_mean.add_(1)  # type: ignore[operator, union-attr]
    job.note = 99
    torch.rand(5)
    held.go.set()
    assert handle.committed(WAIT)
    assert same(stored(tmp_path / "run"), before)
    with ckpt.open(tmp_path / "run") as c:
        assert torch.equal(c.tensors["loose"][:], was)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "fused": lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True),
    "foreach": lambda p, lr: torch.optim.AdamW(p, lr=lr, foreach=True),
    "SGD": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_waits_until_all_is_copied(
    tmp_path: Path, held: Held, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    job = Job(OPTIMIZERS[name])
    before, fenced = job.content(), Fenced(monkeypatch)
    handle = ckpt.async_save(job.state, tmp_path / "run")
    assert held.reached.wait(WAIT)
    step = in_thread(job.train)
    assert fenced.there.wait(WAIT) and step.is_alive() and not handle.staged()
    held.go.set()
    step.join(WAIT)
    assert handle.committed(WAIT) and not same(job.content(), before)
    assert same(stored(tmp_path / "run", optimizer=OPTIMIZERS[name]), before)
    assert fence_here().waited > 0


def test_without_the_fence_the_snapshot_tears(tmp_path: Path, held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fence, "guard", lambda *_: None)
    job = Job()
    before = job.content()
    handle = ckpt.async_save(job.state, tmp_path / "run")
    assert held.reached.wait(WAIT)
    job.train()
    held.go.set()
    assert handle.committed(WAIT)
    saved = stored(tmp_path / "run")
    assert not same(saved, before) and not same(saved["model"], job.content()["model"])


def test_a_torn_tensor_is_named(tmp_path: Path, held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_CHECK_COPIES", "1")
    job = Job()
    handle = ckpt.async_save(job.state, tmp_path / "run")
    assert held.reached.wait(WAIT)
    with torch.no_grad():
        job.model[2].weight.add_(1)  # type: ignore[operator, arg-type, union-attr]
    held.go.set()
    with pytest.raises(ckpt.IntegrityError, match=r"changed while it was being copied: 'model\.2\.weight'"):
        handle.result(WAIT)
    assert not list_run(LocalBackend(str(tmp_path / "run"))).committed
    assert ckpt.async_save(job.state, tmp_path / "run").committed(WAIT)


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_interleaving_of_copies_and_steps(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A step begins while any chunk of the copy is under way."""
    folder = tmp_path_factory.mktemp("run")
    at, widths = data.draw(st.integers(1, 24)), data.draw(st.sampled_from([1, 17, 300]))
    with pytest.MonkeyPatch.context() as monkeypatch:
        held, fenced = Held(monkeypatch, at), Fenced(monkeypatch)
        job = Job(width=widths)
        before = job.content()
        handle = ckpt.async_save(job.state, folder)
        assert held.reached.wait(WAIT)  # six parameters, their two moments and their step: 24 chunks at least
        step = in_thread(job.train)
        assert fenced.there.wait(WAIT)
        held.go.set()
        step.join(WAIT)
        assert handle.committed(WAIT)
    assert same(stored(folder, width=widths), before)


def test_a_state_is_loaded_behind_the_fence(tmp_path: Path, held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job()
    ckpt.save(job.state, tmp_path / "other")
    job.train()
    before, fenced = job.content(), Fenced(monkeypatch)
    handle = ckpt.async_save(job.state, tmp_path / "run")
    assert held.reached.wait(WAIT)
    load = in_thread(lambda: ckpt.load(job.state, tmp_path / "other"))
    assert fenced.there.wait(WAIT) and load.is_alive()
    held.go.set()
    load.join(WAIT)
    assert handle.committed(WAIT) and same(stored(tmp_path / "run"), before)


def test_two_optimizers_a_closure_and_a_skipped_step(tmp_path: Path) -> None:
    torch.manual_seed(0)
    a, b = nn.Linear(40, 40), nn.Linear(40, 40)
    state = {
        "a": a,
        "b": b,
        "sgd": torch.optim.SGD(a.parameters(), lr=0.1, momentum=0.9),
        "adam": torch.optim.Adam(b.parameters(), lr=0.1),
    }
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def closure() -> torch.Tensor:
        state["adam"].zero_grad()
        loss = b(torch.ones(1, 40)).square().mean()
        loss.backward()
        return loss

    for turn in range(4):
        before = [p.detach().clone() for p in (*a.parameters(), *b.parameters())]
        handle = ckpt.async_save(state, tmp_path / "run", step=turn)
        scaler.scale(a(torch.ones(1, 40)).square().mean()).backward()
        if turn == 2:
            a.weight.grad.fill_(float("inf"))  # type: ignore[union-attr]
        scaler.step(state["sgd"])  # which does not step for such a gradient, and then meets no fence
        scaler.update()
        state["sgd"].zero_grad()
        state["adam"].step(closure)
        assert handle.committed(WAIT)
        x, y = nn.Linear(40, 40), nn.Linear(40, 40)
        ckpt.load({"a": x, "b": y}, f"{tmp_path / 'run'}@{turn}")
        assert same([p.detach() for p in (*x.parameters(), *y.parameters())], before)


def test_what_is_copied_is_written_while_the_rest_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no byte before it is: the slot still holds another step's."""
    monkeypatch.setenv("CKPT_BUFFER_MIB", "1")
    job = Job(width=900)
    ckpt.async_save(job.state, tmp_path / "run").result(WAIT)
    job.train()
    before = job.content()
    written, two = [], threading.Event()
    make = LocalBackend.new

    def new(backend: LocalBackend, path: str, size: int) -> Any:
        upload = make(backend, path, size)
        real = upload.write

        def told(offset: int, data: memoryview) -> None:
            real(offset, data)
            written.append(offset)
            if len(written) == 2:
                two.set()

        upload.write = told
        return upload

    monkeypatch.setattr(LocalBackend, "new", new)
    held = Held(monkeypatch, at=5)
    handle = ckpt.async_save(job.state, tmp_path / "run", step=1)
    assert held.reached.wait(WAIT) and two.wait(WAIT)
    assert not handle.staged() and max(written) < 5 << 20 and 0 not in written
    held.go.set()
    handle.result(WAIT)
    assert len(written) > 5 and 0 in written
    assert same(stored(tmp_path / "run", step=1, width=900), before)


def test_a_failed_save_keeps_the_slot_until_its_copy_has_ended(
    tmp_path: Path, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next save would share it with a copy of this one, or take it away from under it."""
    failed = threading.Event()

    def new(*_: object) -> None:
        failed.set()
        raise ckpt.StorageError("the disk is gone")

    with monkeypatch.context() as broken:
        broken.setattr(LocalBackend, "new", new)
        handle = ckpt.async_save(Job().state, tmp_path / "run")
        assert held.reached.wait(WAIT) and failed.wait(WAIT)
        assert not handle.done(0.5)
        held.go.set()
        with pytest.raises(ckpt.StorageError, match="gone"):
            handle.result(WAIT)
    assert ckpt.async_save(Job(width=400).state, tmp_path / "run", step=1).committed(WAIT)


def test_codecs_apply_on_the_way_to_storage(tmp_path: Path) -> None:
    job = Job()
    before = job.content()
    handle = ckpt.async_save(job.state, tmp_path / "run", codec={"*.exp_avg": "zstd"})
    job.train()
    assert handle.committed(WAIT) and same(stored(tmp_path / "run"), before)
    with ckpt.open(tmp_path / "run") as c:
        assert c.manifest.codecs and c.verify().ok


def test_the_second_save_waits_for_the_slot_of_the_first(tmp_path: Path, held: Held) -> None:
    job = Job()
    first = ckpt.async_save(job.state, tmp_path / "run", step=0)
    assert held.reached.wait(WAIT)
    second: list[ckpt.SaveHandle] = []
    other = in_thread(lambda: second.append(ckpt.async_save(job.state, tmp_path / "run", step=1)))
    held.go.set()
    other.join(WAIT)
    assert first.done() and first.committed() and second[0].committed(WAIT)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_nothing_grows_from_save_to_save(tmp_path: Path) -> None:
    job = Job()
    assert ckpt.async_save(job.state, tmp_path / "run", step=0).committed(WAIT)
    slot, fds, threads = background._process().slot, descriptors(), threading.active_count()
    for step in range(1, 20):
        assert ckpt.async_save(job.state, tmp_path / "run", step=step).committed(WAIT)
        job.train()
    assert background._process().slot is slot
    assert (descriptors(), threading.active_count()) == (fds, threads)


def test_no_room_for_a_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background._process(), "slot", None)
    monkeypatch.setattr(arena, "available_memory", lambda: 1 << 20)
    job = Job()
    handle = ckpt.async_save(job.state, tmp_path / "run")
    with pytest.raises(ckpt.CapacityError, match=r"needs 2 MiB .* this host has 1 MiB left"):
        handle.result(WAIT)
    monkeypatch.undo()
    assert ckpt.async_save(job.state, tmp_path / "run").committed(WAIT)


def test_a_limit_of_the_process(tmp_path: Path) -> None:
    """`ulimit -v`: the slot is refused, training and synchronous saves go on."""

    def limited() -> None:
        import resource

        state = {"large": torch.empty(100_000_000)}
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20),) * 2)
        handle = ckpt.async_save(state, tmp_path / "run")
        with pytest.raises(ckpt.CapacityError, match="raise the limit of this process"):
            handle.result(WAIT)
        assert ckpt.async_save({"small": torch.ones(3)}, tmp_path / "run").committed(WAIT)

    code, text = in_child(limited)
    assert code == 0, text


def test_a_slot_is_sealed_in_size(tmp_path: Path) -> None:
    slot = arena.Slot(5_000_000)
    assert slot.size == 6 << 20 and len(slot.buffer) == slot.size and slot.buffer.ctypes.data % 4096 == 0
    for size in (0, slot.size - 4096, slot.size + 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(slot.fd, size)
    slot.close()


def test_a_fork_saves_by_itself(tmp_path: Path) -> None:
    job = Job()
    assert ckpt.async_save(job.state, tmp_path / "run", step=0).committed(WAIT)

    def child() -> None:
        assert ckpt.async_save(job.state, tmp_path / "run", step=1).committed(WAIT)

    code, text = in_child(child)
    assert code == 0, text
    assert same(stored(tmp_path / "run", 1), job.content())


def test_a_failed_save_is_told_and_the_next_works(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job, run = Job(), tmp_path / "run"
    run.mkdir()
    with pytest.raises(ckpt.UsageError, match="step=-1"):
        ckpt.async_save(job.state, run, step=-1)
    assert ckpt.async_save(job.state, run, step=1).committed(WAIT)
    with pytest.raises(ckpt.ConflictError):
        ckpt.async_save(job.state, run, step=1)
    assert ckpt.async_save(job.state, run, step=2).committed(WAIT)


# The Checkpointer.


def test_a_save_that_is_due_while_one_is_under_way_is_skipped(tmp_path: Path, held: Held) -> None:
    job = Job()
    state = job.state
    cp = ckpt.Checkpointer(tmp_path / "run", state, storage=ckpt.Every(1))
    cp.restore()
    first = cp.step(0)
    assert first is not None and held.reached.wait(WAIT)
    assert cp.step(1) is None and cp.report.skipped == 1 and not cp.wait(0)
    held.go.set()
    assert cp.wait(WAIT) and first.committed()
    assert cp.step(2).committed(WAIT)  # type: ignore[union-attr]
    report = cp.close()
    assert (report.steps, report.committed, report.skipped, report.failed) == (3, 2, 1, 0)
    assert [s.step for s in list_run(LocalBackend(str(tmp_path / "run"))).committed] == [0, 2]


def test_closing_stores_the_last_step(tmp_path: Path) -> None:
    cp = ckpt.Checkpointer(tmp_path / "run", {"x": torch.ones(3)}, storage=ckpt.Every(10))
    cp.restore()
    for step in range(12):
        cp.step(step)
    assert cp.close().last_step == 11


def test_a_job_that_another_has_followed_commits_nothing(tmp_path: Path) -> None:
    """Also one that knows nothing of keepers; and no save deletes what the other one has."""
    old = ckpt.Checkpointer(tmp_path / "run", {"x": torch.ones(3)}, storage=ckpt.Every(1), keep=[ckpt.KeepLast(1)])
    old.restore()
    old.step(0)
    assert old.wait(60)
    new = ckpt.Checkpointer(tmp_path / "run", {"x": torch.zeros(3)}, storage=ckpt.Every(1))
    assert new.restore() == 1
    old.step(1)
    assert old.wait(60) and old.report.committed == 1 and old.report.failed == 1
    with pytest.raises(ckpt.ConflictError, match=rf"generation 2 of .* process {os.getpid()} .*trains generation 1"):
        old.save_now()
    new.step(1)
    assert new.wait(60) and new.report.committed == 1
    new.close()
    old.close()
    assert {s.folder for s in list_run(LocalBackend(str(tmp_path / "run"))).committed} == {
        "step-00000000.g0001", "step-00000001.g0002",
    }  # fmt: skip


def test_a_newer_job_whose_file_is_damaged_is_a_newer_job(tmp_path: Path) -> None:
    """It is no damage to the step that is being saved."""
    old = ckpt.Checkpointer(tmp_path / "run", {"x": torch.ones(3)}, storage=ckpt.Every(1))
    old.restore()
    old.step(0)
    (tmp_path / "run" / "gen-0002.json").write_bytes(b"{")
    with pytest.raises(ckpt.ConflictError, match=r"generation 2 of .* cannot be read"):
        old.save_now()
    old.close()


def test_nothing_durable_for_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cp = ckpt.Checkpointer(tmp_path / "run", {"x": torch.ones(3)}, storage=ckpt.Every(2), max_stale=5)
    cp.restore()
    cp.step(0)
    monkeypatch.setattr(cp._account, "durable", cp._account.durable - 6)
    with pytest.raises(ckpt.DeadlineError, match=r"nothing has become durable for 6 s \(max_stale=5\)"):
        cp.step(1)
    for bad in (0, -1, float("nan")):
        with pytest.raises(ckpt.UsageError, match="max_stale"):
            ckpt.Checkpointer(tmp_path / "run", {}, storage=ckpt.Every(2), max_stale=bad)


@pytest.mark.parametrize("pool", ["copying", "saving"])
def test_a_thread_that_cannot_be_had_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: str
) -> None:
    """The save ends (without a copying thread it fails), the fence is open, and the next save works."""

    def none(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    job = Job()
    with monkeypatch.context() as without:
        without.setattr(getattr(background._process(), pool), "submit", none)
        handle = ckpt.async_save(job.state, tmp_path / "run", step=0)
        assert handle.done() or pool == "copying"
        assert handle.committed(WAIT) == (pool == "saving")
    job.train()
    assert ckpt.async_save(job.state, tmp_path / "run", step=1).committed(WAIT)


def test_a_copy_that_takes_too_long_is_given_up_and_training_goes_on(
    tmp_path: Path, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits at the fence for ever: that snapshot fails, and nothing torn is published."""
    job = Job()
    handle = ckpt.async_save(job.state, tmp_path / "run")
    assert held.reached.wait(WAIT)
    monkeypatch.setenv("CKPT_DEADLINE", "0.01")
    job.train()
    monkeypatch.delenv("CKPT_DEADLINE")
    held.go.set()
    with pytest.raises(ckpt.DeadlineError, match="given up"):
        handle.result(WAIT)
    assert not list_run(LocalBackend(str(tmp_path / "run"))).committed
    assert ckpt.async_save(job.state, tmp_path / "run").committed(WAIT)
