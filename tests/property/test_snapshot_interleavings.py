"""Copies beside training, stopped anywhere: what is sealed is the state at the time of the snapshot, or nothing is."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ckpt
from ckpt.averaging import Averages
from ckpt.collective import current_group
from ckpt.config import Every
from ckpt.errors import DeadlineError, IntegrityError, PeerError
from ckpt.format.codec import BLOCK, crc32c
from ckpt.keeper import link
from ckpt.keeper.protocol import Connection, Frame, frame, receive, send
from ckpt.keeping import Keeping
from ckpt.outcomes import Taken
from ckpt.prepared import Prepared, Preparing
from ckpt.schedule import Schedule
from ckpt.snapshot.copier import Snapshot
from ckpt.snapshot.device import Device, Host, Timed, pretend
from ckpt.snapshot.fence import Fence, fence_here
from ckpt.state import collect

CHECK = settings(max_examples=30, deadline=None, derandomize=True)
WAIT = 60.0
LARGE = 1 << 19  # elements of a tensor of two chunks

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "fused": lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True),
    "foreach": lambda p, lr: torch.optim.AdamW(p, lr=lr, foreach=True),
    "SGD": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
}


class Loader:
    def __init__(self) -> None:
        self.order = torch.arange(10)

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


class Job:
    """Parameters of several chunks, of another dtype, not contiguous, tied and empty; what an optimizer owns and not."""

    def __init__(self, optimizer: str) -> None:
        torch.manual_seed(0)
        self.model = nn.Module()
        self.model.large = nn.Parameter(torch.rand(2, LARGE // 2))
        self.model.turned = nn.Parameter(torch.rand(7, 5).t())
        self.model.low = nn.Parameter(torch.rand(33).bfloat16())
        self.model.tied = self.model.low
        self.model.empty = nn.Parameter(torch.rand(0, 3))
        self.model.register_buffer("mean", torch.zeros(5))
        self.loader, self.loose = Loader(), torch.zeros(4, 3)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters(), lr=0.1)
        for _ in range(2):
            self.train()

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "loader": self.loader, "loose": self.loose}

    def train(self) -> None:
        """An iteration up to the next snapshot: a forward pass changes buffers, a step what the optimizer owns."""
        self.forward()
        self.optimizer.step()

    def forward(self) -> None:
        for p in self.model.parameters():
            p.grad = torch.ones_like(p)
        self.model.mean.add_(1)  # type: ignore[operator, union-attr]
        self.loose.add_(1)
        self.loader.order.add_(1)

    def content(self) -> dict[str, str]:
        """All tensors that have something in them, by their bytes."""
        views = {name: leaf.held.pieces[0][1] for name, leaf in collect(self.state).tensors.items()}
        return {name: digest(view) for name, view in views.items() if view.numel()}


def digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(data, digest_size=8).hexdigest()


class Copying:
    """One rank's snapshots, taken as they are with a keeper; `gates` hold the copy at chosen chunks."""

    def __init__(self, job: Job) -> None:
        self.job, self.plans = job, Preparing(0, 1, Averages({}, 0, 1))
        called = self.plans.roll.call(job.state)
        self.plans.agree(called.leaves, "plan", current_group())
        self.prepared: Prepared = self.plans.prepare(job.state, called)
        self.threads = ThreadPoolExecutor(2)
        self.chunks, self.at, self.reached, self.go = 0, 0, threading.Event(), threading.Event()

    def take(self, hold_at: int, checked: bool = False) -> tuple[Snapshot, Future[None]]:
        """Begins a snapshot; its copy stops before chunk `hold_at` is over, if there is one."""
        called = self.plans.roll.call(self.job.state)
        assert not called.whole
        self.prepared.refresh(called)
        layout = self.prepared.work.layout
        buffer = np.full(layout.size + 100, 0xAA, dtype=np.uint8)
        snapshot = Snapshot(layout, self.prepared.sources, self.prepared.lazy, buffer, checked=checked)
        self.chunks, self.at = 0, hold_at
        self.reached.clear()
        self.go.clear()
        future = self.threads.submit(snapshot.copy_rest, self.paced)
        fence_here().put(snapshot.copied, snapshot.give_up)
        return snapshot, future

    def paced(self, _: int) -> None:
        self.chunks += 1
        if self.chunks == self.at:
            self.reached.set()
            assert self.go.wait(WAIT)

    @property
    def most(self) -> int:
        """Chunks of the lazy part."""
        sizes = [s.nbytes for s, lazy in zip(self.prepared.sources, self.prepared.lazy, strict=True) if lazy]
        return sum(-(-n // (1 << 20)) for n in sizes)

    def close(self) -> None:
        self.go.set()
        self.threads.shutdown()


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when somebody comes to the fence."""
    return tell_of_waits(monkeypatch)


def tell_of_waits(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    there, wait = threading.Event(), Fence.wait

    def told(fence: Fence) -> None:
        there.set()
        wait(fence)

    monkeypatch.setattr(Fence, "wait", told)
    return there


def unsealed(snapshot: Snapshot) -> bool:
    return not snapshot.copied.is_set()


def packed(snapshot: Snapshot) -> dict[str, str]:
    """What is in a sealed pack, its checksums checked."""
    report = snapshot.seal()
    assert report.size == len(snapshot.buffer)
    loaded = safetensors.torch.load(snapshot.buffer.tobytes())
    table = loaded.pop("ckpt.blocks").reshape(-1).view(torch.uint8).numpy().view("<u4")
    row = 0
    for k in range(len(snapshot.layout.pieces)):
        at, n = int(snapshot.layout.offset[k]), int(snapshot.layout.length[k])
        for b in range(at, at + n, BLOCK):
            assert crc32c(snapshot.buffer[b : min(b + BLOCK, at + n)]) == table[row]
            row += 1
    assert row == len(table)
    return {name: digest(t) for name, t in loaded.items()}


@CHECK
@given(
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    holds=st.lists(st.floats(0, 1), min_size=1, max_size=3),
    early=st.booleans(),
    checked=st.booleans(),
    device=st.sampled_from([Host(), Timed(1000.0)]),
)
def test_any_interleaving(optimizer: str, holds: list[float], early: bool, checked: bool, device: Device) -> None:
    """A step comes while some chunk is copied, or (`early`) before the copy has begun to wait."""
    job = Job(optimizer)
    with pytest.MonkeyPatch.context() as monkeypatch, pretend(device):
        copying = Copying(job)
        waiting = tell_of_waits(monkeypatch)
        try:
            for where in holds:
                before = job.content()
                snapshot, future = copying.take(1 + int(where * (copying.most - 1)), checked)
                waiting.clear()
                if not early:
                    assert copying.reached.wait(WAIT)
                job.forward()
                step = copying.threads.submit(job.optimizer.step)
                assert waiting.wait(WAIT)
                assert copying.reached.wait(WAIT) and unsealed(snapshot) and not step.done()
                copying.go.set()
                future.result(WAIT)
                step.result(WAIT)
                assert packed(snapshot) == before != job.content()
        finally:
            copying.close()


@CHECK
@given(optimizer=st.sampled_from(sorted(OPTIMIZERS)), where=st.floats(0, 0.5), checked=st.booleans())
def test_without_the_fence_it_tears(optimizer: str, where: float, checked: bool) -> None:
    job = Job(optimizer)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Fence, "guard", lambda *_: None)
        copying = Copying(job)
        try:
            before = job.content()
            snapshot, future = copying.take(1 + int(where * (copying.most - 1)), checked)
            assert copying.reached.wait(WAIT)
            job.train()
            copying.go.set()
            if checked:
                with pytest.raises(IntegrityError, match="changed while it was being copied"):
                    future.result(WAIT)
            else:
                future.result(WAIT)
                assert packed(snapshot) != before
        finally:
            copying.close()


def test_what_is_copied_at_once_may_change_at_once() -> None:
    job = Job("AdamW")
    copying = Copying(job)
    try:
        before = job.content()
        snapshot, future = copying.take(1)
        job.forward()
        assert copying.reached.wait(WAIT) and unsealed(snapshot)
        copying.go.set()
        future.result(WAIT)
        assert packed(snapshot) == before
    finally:
        copying.close()


def test_a_copy_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step goes on, and the snapshot never counts as one."""
    monkeypatch.setenv("CKPT_DEADLINE", "0.01")
    job = Job("AdamW")
    copying = Copying(job)
    try:
        before = job.content()
        snapshot, future = copying.take(1)
        assert copying.reached.wait(WAIT)
        job.train()
        assert job.content() != before and unsealed(snapshot)
        copying.go.set()
        with pytest.raises(DeadlineError, match="given up"):
            future.result(WAIT)
        assert snapshot.copied.is_set()
        job.train()
    finally:
        copying.close()


def test_a_copy_that_fails_opens_the_fence() -> None:
    job = Job("AdamW")
    copying = Copying(job)
    try:
        broken = copying.prepared.sources[copying.prepared.lazy.tolist().index(True)]

        def fail(*_: Any) -> None:
            raise OSError("gone")

        broken.into = fail  # type: ignore[method-assign]
        _, future = copying.take(0)
        with pytest.raises(OSError, match="gone"):
            future.result(WAIT)
        job.train()
    finally:
        copying.close()


# With what a keeper says at any moment in between.


class Played:
    """A keeper that answers what it is asked, says what the test has it say, and keeps what it heard."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        here, self._sock = socket.socketpair()
        monkeypatch.setattr(link, "_connect", lambda _: here)
        self.heard: deque[Frame] = deque()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        connection = Connection(self._sock)
        empty = {
            "steps": [],
            "slots": [],
            "host": "here",
            "used": 0,
            "secret": "",
            "there": False,
            "done": False,
            "untold": [],
            "newest": [-1, -1],
            "known": {},
            "generation": -1,
        }
        try:
            while True:
                message = receive(self._sock, connection)
                with self._changed:
                    self.heard.append(message)
                    self._changed.notify_all()
                if "id" in message.head:
                    self.say("answer", id=message["id"], **empty)
        except PeerError:
            connection.close()

    def say(self, kind: str, **head: Any) -> None:
        send(self._sock, frame(kind, **head))

    def wait(self, kind: str, **head: Any) -> Frame:
        """Until it hears a certain frame."""

        def found() -> Frame | None:
            return next((m for m in self.heard if m.kind == kind and head.items() <= dict(m.head).items()), None)

        with self._changed:
            assert self._changed.wait_for(found, WAIT)
            message = found()
        assert message is not None
        return message

    def answers(self, step: int) -> list[str]:
        """What was said of a grant."""
        with self._changed:
            return [m.kind for m in self.heard if m.kind in ("sealed", "missed") and m["step"] == step]

    def join(self) -> None:
        self._thread.join(WAIT)
        assert not self._thread.is_alive()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4))


class Trainer:
    """One rank with a keeper that is played. `slots`: its memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
        self.keeper = Played(monkeypatch)
        self.model = Model()
        self.state = {"model": self.model, "note": 0}
        self.keeping = Keeping(str(run), current_group(), Schedule(Every(1), None, None), lambda _: None)
        self.keeping.member.meet(current_group())
        self.keeping.begin(self.state, 1, 0, lambda: None)
        self.keeper.wait("ready", epoch=0)

    def hears(self, *frames: tuple[str, dict[str, Any]]) -> None:
        """It has heard what the keeper says now."""
        for kind, head in frames:
            self.keeper.say(kind, **head)
        self.keeping.member.link.ask("sync", timeout=WAIT)

    def grant(self, *steps: int) -> None:
        self.hears(*(("grant", {"step": n, "slot": n % 2}) for n in steps))

    def replan(self, epoch: int) -> None:
        self.hears(("replan", {"epoch": epoch, "diverged": []}))

    def step(self, n: int) -> Taken | str:
        with torch.no_grad():
            self.model.w.fill_(float(n))
        return self.keeping.step(self.state, n, {})

    def settle(self) -> None:
        """What it does in the background is done, and the keeper has heard of it."""
        for threads in (self.keeping._planning, self.keeping._copying):
            threads.submit(lambda: None).result(WAIT)
        self.hears()

    def sealed(self, n: int, tensor: str = "model.w") -> float:
        """The value of a tensor in the pack that was sealed for a step."""
        self.keeper.wait("sealed", step=n)
        data = self.keeping.member.slots[n % 2].buffer
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        head = json.loads(data[8:start].tobytes())
        missing = [name for name in self.model.state_dict() if f"model.{name}" not in head]
        assert not missing, f"{missing} were not saved"
        lo, hi = head[tensor]["data_offsets"]
        return float(data[start + lo : start + hi].view("<f4")[0])

    def close(self) -> None:
        self.keeping.close()
        self.keeper.join()


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Trainer]:
    trainer = Trainer(monkeypatch, tmp_path)
    yield trainer
    trainer.close()


def test_granted_steps_are_sealed_with_what_was_there(trainer: Trainer) -> None:
    trainer.grant(0, 1)
    for n in range(4):
        taken = trainer.step(n)
        assert isinstance(taken, Taken) == (n < 2)
        if n < 2:
            assert trainer.sealed(n) == n
    assert [trainer.keeper.answers(n) for n in range(3)] == [["sealed"], ["sealed"], []]


def test_a_grant_that_comes_too_late_is_missed(trainer: Trainer) -> None:
    trainer.step(0)
    trainer.grant(0, 1)
    trainer.keeping.step(trainer.state, 5, {})
    trainer.keeper.wait("missed", step=0)
    trainer.keeper.wait("missed", step=1)


def test_every_grant_is_answered_also_when_a_new_plan_is_asked_for(trainer: Trainer) -> None:
    """Else its slot is lost: the keeper cannot know that nobody writes to it."""
    trainer.grant(0, 1, 2)
    trainer.step(0)
    trainer.replan(1)
    trainer.step(1)
    trainer.step(2)
    trainer.settle()
    trainer.keeper.wait("ready", epoch=1)
    assert [len(trainer.keeper.answers(n)) for n in range(3)] == [1, 1, 1]


def test_leaves_that_changed_are_not_saved_by_the_old_plan(trainer: Trainer) -> None:
    """The next step may come before the keeper has said that a new plan is needed."""
    trainer.grant(0, 1, 2)
    assert isinstance(trainer.step(0), Taken) and trainer.sealed(0) == 0.0
    trainer.model.w = nn.Parameter(torch.zeros(4))
    trainer.model.register_buffer("more", torch.zeros(3))
    assert isinstance(trainer.step(1), str)
    trainer.keeper.wait("missed", step=1)
    if isinstance(trainer.step(2), Taken):
        assert trainer.sealed(2) == 2.0, "a tensor that is not in the state any more was saved"


def test_another_tensor_of_the_same_kind_needs_no_new_plan(trainer: Trainer) -> None:
    trainer.grant(0, 1, 2)
    for n in range(3):
        trainer.model.w = nn.Parameter(torch.zeros(4))
        if isinstance(trainer.step(n), Taken):
            assert trainer.sealed(n) == n


def test_a_moment_that_was_replaced_is_never_sealed_as_the_old_one(trainer: Trainer) -> None:
    """That is found beside training: the step is missed, and the next one is right."""
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.0, momentum=0.9)
    trainer.model.w.grad = torch.ones(4)
    optimizer.step()
    trainer.state["optimizer"] = optimizer  # type: ignore[assignment]
    trainer.keeping.begin(trainer.state, 2, 0, lambda: None)
    trainer.grant(0, 1, 2, 3)
    assert isinstance(trainer.step(0), Taken)
    assert trainer.sealed(0, "optimizer.state.w.momentum_buffer") == 1.0
    optimizer.state[trainer.model.w]["momentum_buffer"] = torch.full((4,), 7.0)
    assert isinstance(trainer.step(1), Taken)
    trainer.keeper.wait("missed", step=1)
    assert trainer.keeper.answers(1) == ["missed"]
    for n in (2, 3):
        assert isinstance(trainer.step(n), Taken)
        assert trainer.sealed(n) == n and trainer.sealed(n, "optimizer.state.w.momentum_buffer") == 7.0


@given(
    st.lists(
        st.tuples(st.sampled_from(["step", "step", "grant", "change", "grow", "replan"]), st.integers(1, 2)),
        max_size=14,
    )
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_whatever_the_keeper_says_in_between(
    tmp_path_factory: pytest.TempPathFactory, events: list[tuple[str, int]]
) -> None:
    """Each grant has one answer, and what is sealed is what was there."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        trainer = Trainer(monkeypatch, tmp_path_factory.mktemp("run"))
        try:
            at, granted, epoch = 0, [-1], 0
            for kind, n in [*events, *[("step", 0)] * 5]:
                if kind == "step":
                    trainer.step(at)
                    trainer.settle()
                    if trainer.keeper.answers(at) == ["sealed"]:
                        assert at in granted and trainer.sealed(at) == at
                    at += 1
                elif kind == "grant" and granted[-1] < at + 2 and trainer.keeping._epoch == epoch:
                    granted.append(max(granted[-1], at - 1) + n)
                    trainer.grant(granted[-1])
                elif kind == "change":
                    trainer.model.w = nn.Parameter(torch.zeros(4))
                elif kind == "grow":
                    trainer.model.register_buffer(f"b{len(trainer.model._buffers)}", torch.zeros(n))
                elif kind == "replan" and trainer.keeping._epoch == epoch:
                    epoch += 1
                    trainer.replan(epoch)
            assert [len(trainer.keeper.answers(n)) for n in granted] == [0] + [1] * (len(granted) - 1)
        finally:
            trainer.close()


# With a keeper that is one.


class Kept:
    """A Checkpointer whose keeper has heard all that was said, whenever the test looks."""

    def __init__(self, run: Path) -> None:
        self.model = Model()
        self.cp = ckpt.Checkpointer(run, {"model": self.model}, memory=Every(1))
        assert self.cp._kept is not None
        self.cp.restore()
        self.at = 0

    def step(self) -> ckpt.SaveHandle | None:
        with torch.no_grad():
            self.model.w.fill_(float(self.at))
        handle = self.cp.step(self.at)
        self.at += 1
        if handle is not None:
            handle.done(WAIT)
        self.keeping._planning.submit(lambda: None).result(WAIT)
        self.keeping.member.link.ask("sync", timeout=WAIT)  # what it says before it answers was heard
        return handle

    @property
    def keeping(self) -> Keeping:
        return self.cp._kept._keeping  # type: ignore[union-attr]

    def content(self, step: int) -> float:
        """The first element of the one parameter, as the keeper holds it."""
        steps = self.keeping.member.recall(current_group()).steps
        backend = self.keeping.member.open(next(s for s in steps if s.key == (self.cp._account.generation, step)))
        [path] = [e.name for e in backend.list("") if e.name.endswith("rank-00000.safetensors")]
        data = bytearray(backend.size(path))
        try:
            backend.read(path, 0, [data])
        finally:
            backend.close()
            self.keeping.member.done_reading()
        return float(safetensors.torch.load(bytes(data))["model.w"][0])


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Kept]:
    monkeypatch.setenv("CKPT_GRACE", "10")
    kept = Kept(tmp_path / "run")
    yield kept
    kept.cp.close()


def test_snapshots_go_on_after_leaves_changed(kept: Kept) -> None:
    for change in range(4):
        kept.model.register_buffer(f"more{change}", torch.ones(3))
        taken = [kept.step() for _ in range(5)]
        assert taken[-1] is not None and kept.content(kept.at - 1) == kept.at - 1


def test_the_newest_step_stays_whole_when_the_next_need_more_memory(kept: Kept) -> None:
    while kept.step() is None:
        assert kept.at < 5
    newest = kept.at - 1
    assert kept.content(newest) == newest
    kept.model.register_buffer("large", torch.ones(1 << 20))
    while not (kept.step() is None and kept.keeping._epoch == 1):
        assert kept.at < 10
    assert kept.content(newest) == newest
