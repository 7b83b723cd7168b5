"""Trainers that do as they are told and die where they are told to, and a look at the keepers that they leave.

A scene runs in a process without threads, whose forks are the trainers; what they lose it adopts. What a trainer
holds after a step is a function of the step and the tensor's name, so what is restored can be told without the library.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import multiprocessing as mp
import os
import re
import resource
import select
import signal
import socket
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from kills import KILLED, check_listing, must
from torch import nn

import ckpt
from ckpt import faults
from ckpt.config import settings
from ckpt.keeper.link import keeper_name
from ckpt.keeper.protocol import Connection, frame, receive, send
from ckpt.snapshot import arena

WAIT = 60.0
WIDE = 300_000  # more than one chunk of a copy
ROWS = 120  # for as many ranks as divide it
_SUBREAPER = 36

_SOURCE = "\n".join(p.read_text() for p in sorted(Path(ckpt.__file__).parent.rglob("*.py")))
POINTS = sorted(set(re.findall(r"""faults\.point\(["']((?:trainer|keeper) [^"']+)""", _SOURCE)))
"""Every fault point of trainers and keepers."""
TRAINER = [p for p in POINTS if p.startswith("trainer ")]
KEEPER = [p for p in POINTS if p.startswith("keeper ")]


class Died(Exception):
    """A trainer ended before it answered; `code` as in `os.waitstatus_to_exitcode`."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the trainer ended with {code}")
        self.code = code


class Raised(Exception):
    """What a trainer was told to do raised; `kind` is the name of the class."""

    def __init__(self, kind: str, text: str, trace: str) -> None:
        super().__init__(trace)
        self.kind, self.text = kind, text


def until(condition: Callable[[], Any], what: str, limit: float = WAIT) -> Any:
    """The first true value of `condition`, which is asked until then."""
    end = time.monotonic() + limit
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < end, f"not within {limit:.0f} s: {what}"
        time.sleep(0.005)


# What is trained.


def content(step: int, name: str, size: int, salt: int = 0) -> torch.Tensor:
    """What a tensor holds after a step; of its own for each step, name and salt, and exact in float32."""
    return torch.arange(size, dtype=torch.float32) + zlib.crc32(f"{step} {name} {salt}".encode()) % (1 << 23)


class Writing(torch.optim.Optimizer):
    """An optimizer whose step writes what `content` says into parameters and moments."""

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], salt: int) -> None:
        super().__init__([p for _, p in named], {"lr": 1.0})
        self.named, self.salt, self.next, self.poisoned = list(named), salt, 0, -1
        for _, p in named:
            self.state[p] = {"m": torch.zeros_like(p), "v": torch.zeros_like(p)}

    def parts(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, p in self.named:
            yield name, p.data
            for key in ("m", "v"):
                yield f"{name}.{key}", self.state[p][key]

    def step(self, closure: Any = None) -> None:
        for name, tensor in self.parts():
            tensor.view(-1).copy_(content(self.next, name, tensor.numel(), self.salt))
            if name == "small" and self.next == self.poisoned:
                tensor.view(-1)[3] = torch.nan


class Net(nn.Module):
    def __init__(self, wide: int) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.zeros(wide))
        self.small = nn.Parameter(torch.zeros(7, 5))
        self.register_buffer("seen", torch.zeros(1000))


class Job:
    """A training program: its state, its loop, its Checkpointer.

    diverge  from which step on the buffer is another one on each rank
    cut      with a tensor of which each rank declares a piece
    near     with a local tier that is saved to every so many steps
    redundancy  see `ckpt.Checkpointer`
    log      a file for what was seen: "at N" before a step is passed, "sealed N" and "stored N" after the fact
    """

    def __init__(
        self,
        run: str,
        log: str = "",
        *,
        salt: int = 0,
        wide: int = WIDE,
        extra: int = 0,
        rank: int = 0,
        world: int = 1,
        diverge: int | None = None,
        cut: bool = False,
        redundancy: Any = None,
        near: int | None = None,
    ) -> None:
        self.near = near
        self.run, self.salt, self.rank, self.world, self.diverge = run, salt, rank, world, diverge
        self.redundancy = redundancy
        self.model = Net(wide)
        self.optimizer = Writing(list(self.model.named_parameters()), salt)
        rows = ROWS // world
        self.cut = ckpt.Shard(torch.zeros(rows, 10), (ROWS, 10), (rows * rank, 0))
        self.state: dict[str, Any] = {
            "model": self.model, "optimizer": self.optimizer, "step": -1, "salt": salt, "mine": ckpt.PerRank([-1, rank]),
        }  # fmt: skip
        if cut:
            self.state["cut"] = self.cut
        if extra:
            self.grow(extra)
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if log else -1
        self.at, self.told, self.pending = -1, 0, []  # type: ignore[var-annotated]
        self.cp: ckpt.Checkpointer | None = None
        self.said: list[str] = []
        self._held = threading.Event()
        self.events: list[Any] = []

    def grow(self, size: int) -> None:
        """One leaf more."""
        self.state["extra"] = torch.zeros(size)

    def shrink(self) -> None:
        del self.state["extra"]

    def _parts(self, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(a tensor that no optimizer owns, what it is to hold)."""
        own = self.rank if self.diverge is not None and step >= self.diverge else 0
        yield self.model.seen, content(step, f"seen {own}", 1000, self.salt)  # type: ignore[misc]
        if "cut" in self.state:
            rows = ROWS // self.world
            yield self.cut.tensor, content(step, "cut", ROWS * 10, self.salt).view(ROWS, 10)[rows * self.rank :][:rows]
        if "extra" in self.state:
            yield self.state["extra"], content(step, "extra", len(self.state["extra"]), self.salt)

    def check(self, step: int) -> None:
        """That the state is the one after `step`, bit for bit."""
        self.optimizer.salt = self.salt = self.state["salt"]
        found = [self.state["step"], *self.state["mine"].value]
        assert found == [step, step, self.rank], f"values {found} instead of those of step {step}"
        parts = [(t.view(-1), content(step, n, t.numel(), self.salt)) for n, t in self.optimizer.parts()]
        for k, (tensor, expected) in enumerate([*parts, *self._parts(step)]):
            assert torch.equal(tensor.flatten(), expected.flatten()), f"tensor {k} is not that of step {step}"

    def note(self, what: str, step: int) -> None:
        os.write(self._log, f"{what} {step}\n".encode())

    # Told by a scene.

    def open(self, memory: int = 1, storage: int | None = 4, averages: Any = None, **more: Any) -> None:
        every = None if storage is None else ckpt.Every(storage)
        if self.redundancy is not None:
            more["redundancy"] = self.redundancy
        if self.near is not None:
            disk = f"{self.run}.disk{os.environ.get('CKPT_HOST', '')}"
            more["local"] = ckpt.Local(disk, ckpt.Every(self.near), [ckpt.KeepLast(2)])
        self.cp = ckpt.Checkpointer(
            self.run, self.state, memory=ckpt.Every(memory), storage=every, on_event=self.events.append,
            averages=averages, **more
        )  # fmt: skip

    def average(self, name: str) -> dict[str, Any]:
        """An average as numpy arrays, flat."""
        assert self.cp is not None
        return {leaf: value.numpy().reshape(-1) for leaf, value in self.cp.average(name).items()}

    def views(self) -> dict[str, tuple[int, int, int]]:
        """Of each average: folds, refused, last step."""
        assert self.cp is not None
        return {name: (v.folds, v.refused, v.step) for name, v in self.cp.averages.items()}

    def jump(self, steps: int) -> None:
        """The next step is one that nobody has thought of."""
        self.at += steps

    def sealed_steps(self) -> list[int]:
        """Of this life, those that were sealed."""
        assert self.cp is not None and self.cp.wait(WAIT)
        return sorted(e.step for e in self.events if e.outcome == "sealed")

    def poison(self, step: int) -> None:
        """What is written into the small parameter at that step is no number."""
        self.optimizer.poisoned = step

    def restore(self, salt: int | None = None) -> tuple[int, str]:
        """(the step to go on with, where the state came from); the state is that step's. `salt`: of what follows."""
        assert self.cp is not None
        start, loaded = self.cp.restore(), self.cp.last_load
        if start:
            self.check(start - 1)
        self.at = start - 1
        if salt is not None:
            self.optimizer.salt = self.salt = self.state["salt"] = salt
        return start, "nothing" if loaded is None else "memory" if loaded.ref.startswith("memory of ") else "storage"

    def turn(self) -> Any:
        """One step of training; its handle."""
        assert self.cp is not None
        self.at += 1
        self.optimizer.next = self.at
        self.optimizer.step()  # waits until the last snapshot is copied
        for tensor, value in self._parts(self.at):
            tensor.copy_(value)
        self.state["step"], self.state["mine"] = self.at, ckpt.PerRank([self.at, self.rank])
        self.note("at", self.at)
        handle = self.cp.step(self.at)
        for save in self.cp.report.saves[self.told :]:
            self.note("stored", save.step)
            self.told += 1
        return handle

    def train(self, steps: int) -> int:
        """So many steps, waiting for nobody. Returns the last one."""
        for _ in range(steps):
            self.pending.append(self.turn())
            self.pending = [h for h in self.pending if h is not None and not self._over(h)]
        return self.at

    def _over(self, handle: Any, timeout: float = 0.0) -> bool:
        if not handle.done(timeout):
            return False
        if handle.committed():
            self.note("sealed", handle.step)
        return True

    def lockstep(self, steps: int) -> list[int]:
        """So many steps, waiting for the end of each snapshot. Those that were sealed."""
        out = []
        for _ in range(steps):
            handle = self.turn()
            if handle is not None:
                assert self._over(handle, WAIT), f"step {handle.step} is never sealed"
                out += [handle.step] * handle.committed()
        return out

    def seal(self, count: int = 1) -> list[int]:
        """Trains until so many steps more are sealed."""
        out: list[int] = []
        end = time.monotonic() + WAIT
        while len(out) < count:
            assert time.monotonic() < end, f"no snapshots any more: {self.said[-5:]}"
            out += self.lockstep(1)
        return out

    def close(self) -> dict[str, Any]:
        assert self.cp is not None
        report = self.cp.close()
        return {k: v for k, v in vars(report).items() if k != "saves"}

    def report(self) -> dict[str, Any]:
        assert self.cp is not None
        return {k: v for k, v in vars(self.cp.report).items() if k != "saves"}

    def announced(self) -> int:
        """The newest step that is protected, -1 if none."""
        return max((e.step for e in self.events if e.kind == "protect"), default=-1)

    def no_process(self) -> None:
        """From now on no process can be started here."""
        sys.executable = "/nowhere/python"

    def write_events(self) -> None:
        """Those until now go to the run."""
        assert self.cp is not None
        account = self.cp._account
        account.events.write(account.backend, account.generation)

    def heard(self) -> list[str]:
        """What ckpt logged."""
        return self.said

    def voids(self) -> list[str]:
        """Why steps were void."""
        return [e.why for e in self.events if e.outcome == "voided"]

    def set(self, name: str, value: str | None) -> None:
        """Sets or removes an environment variable, for the keepers to come."""
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value

    def fault(self, what: str, point: str, nth: int = 1) -> None:
        """Kills or stops this process at the n-th passing from now on."""
        left, lock = [nth], threading.Lock()

        def hook(name: str) -> None:
            with lock:
                left[0] -= name == point
                now = name == point and left[0] == 0
            if now:
                os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGSTOP)

        faults.install(hook)

    def hold(self, point: str) -> None:
        """Whoever passes there waits, until this is called with another point."""
        self._held.set()
        self._held = held = threading.Event()
        faults.install(lambda name: held.wait(WAIT) if name == point else None)

    def fault_of(self, pid: int, point: str) -> None:
        """Kills another process when this one passes there."""

        def hook(name: str) -> None:
            if name == point:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

        faults.install(hook)

    def room(self, *mib: int) -> None:
        """How much memory the host says it has left, each time it is asked; what it really has after that."""
        told, real = list(mib), arena.available_memory
        arena.available_memory = lambda: told.pop(0) << 20 if told else real()  # type: ignore[assignment]

    def limit(self, mib: int) -> None:
        """How much address space there is left when a slot is reserved, until that has failed."""

        def limited() -> None:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + (mib << 20), -1))

        arena.available_memory = limited  # type: ignore[assignment]

    def handle_sigterm(self, done: str) -> None:
        """Has a handler of its own: it leaves a file with the number of the step."""
        signal.signal(signal.SIGTERM, lambda *_: Path(done).write_text(str(self.at)))

    def child(self, pipe: int) -> int:
        """Forks a process that lives until the pipe closes, as a loader's worker may."""
        pid = os.fork()
        if pid == 0:
            os.read(pipe, 1)
            os._exit(0)
        return pid

    def open_files(self) -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    def mapped(self) -> int:
        """Slots that this process maps or holds."""
        gc.collect()
        maps = Path("/proc/self/maps").read_text().count("/memfd:ckpt-")
        return maps + len(slots_of(os.getpid()))

    def logged(self) -> list[str]:
        return self.said

    def quiet(self) -> int:
        """Waits until nothing is on its way to storage; the last step that got there, -1 if none."""
        assert self.cp is not None and self.cp.wait(WAIT)
        return max((s.step for s in self.cp.report.saves), default=-1)

    def life(self, seals: int = 1) -> int:
        """A life from its beginning to its end; descriptors that are open after it."""
        self.open()
        self.restore()
        self.seal(seals)
        report = self.close()
        assert report["failed"] == 0 and report["last_step"] == self.at
        self.told = 0
        return self.open_files()


# Trainers, as their scene sees them.


class Trainer:
    """A fork that serves a Job. `trainer("verb", ...)` calls a method of it and returns what that returns; `enter` is
    called in it first."""

    def __init__(
        self,
        run: str,
        *,
        env: dict[str, str] | None = None,
        store: str = "",
        opened: bool = True,
        enter: Callable[[], None] | None = None,
        **options: Any,
    ) -> None:
        storage = options.pop("storage", 4)
        self._pipe, theirs = mp.Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.environ.update(env or {})
                if enter is not None:
                    enter()
                rank, world = options.get("rank", 0), options.get("world", 1)
                os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
                torch.set_num_threads(1)
                if store:
                    files = dist.FileStore(store, world)
                    dist.init_process_group("gloo", store=files, rank=rank, world_size=world)
                _serve(theirs, run, options)
            finally:
                os._exit(3)
        theirs.close()
        self.pidfd = os.pidfd_open(self.pid)
        self.code: int | None = None
        if opened and not store:
            self("open", 1, storage)

    def tell(self, verb: str, *args: Any) -> None:
        self._pipe.send((verb, args))

    def answer(self, limit: float = WAIT) -> Any:
        """What it answers. Raises Died or Raised."""
        ready = wait([self._pipe, self.pidfd], limit)
        assert ready, f"no answer within {limit:.0f} s"
        try:
            ok, value = self._pipe.recv() if self._pipe in ready else (None, None)
        except (EOFError, ConnectionError):
            ok = None
        if ok is None:
            raise Died(self.ended())
        if not ok:
            raise Raised(*value)
        return value

    def __call__(self, verb: str, *args: Any, limit: float = WAIT) -> Any:
        self.tell(verb, *args)
        return self.answer(limit)

    def dies(self, verb: str, *args: Any) -> None:
        """Is killed while it does that."""
        try:
            value = self(verb, *args)
        except Died as e:
            assert e.code == KILLED, e
        else:
            raise AssertionError(f"{verb} was to be its death, and returned {value}")

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert self.ended() == KILLED

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        self.stopped()

    def stopped(self) -> None:
        """Waits until it is."""
        until(lambda: state_of(self.pid) == "T", "stopped")

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def ended(self) -> int:
        """Waits until it has ended; with what."""
        if self.code is None:
            self.code = gone(self.pid)
        return self.code

    def leave(self) -> None:
        """Ends without a word to anybody."""
        self._pipe.send(None)
        assert self.ended() == 0

    def finish(self) -> dict[str, Any]:
        """Closes, and ends."""
        report: dict[str, Any] = self("close")
        self.leave()
        return report


def _serve(pipe: Any, run: str, options: dict[str, Any]) -> None:
    job = Job(run, f"{run}.log", **options)

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            job.said.append(f"{record.levelname} {record.getMessage()}")

    logging.getLogger("ckpt").addHandler(Ear())
    logging.getLogger("ckpt").propagate = False
    while True:
        try:
            told = pipe.recv()
        except EOFError:
            os._exit(4)
        if told is None:
            os._exit(0)
        verb, args = told
        try:
            answer = True, getattr(job, verb)(*args)
        except BaseException as e:
            resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
            answer = False, (type(e).__name__, str(e), traceback.format_exc())
        pipe.send(answer)


def together(trainers: Sequence[Trainer], verb: str, *args: Any) -> list[Any]:
    """All of them do it at once."""
    for t in trainers:
        t.tell(verb, *args)
    return [t.answer() for t in trainers]


# Processes.


def state_of(pid: int) -> str:
    """As in `ps`; "" if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def gone(pid: int, limit: float = WAIT) -> int:
    """Waits for the end of a child of this process, adopted or not; its exit code."""
    fd = os.pidfd_open(pid)
    try:
        assert select.select([fd], [], [], limit)[0], f"process {pid} still runs after {limit:.0f} s"
    finally:
        os.close(fd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def keepers(run: str) -> list[int]:
    """The keepers of a run on this host."""
    return keeper_pids(_name(run))


def keeper_pids(keeper: str) -> list[int]:
    """The keepers of a name, by their command line."""
    name, out = keeper.encode(), []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                words = Path("/proc", entry, "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if name in words and b"ckpt.keeper" in words:
                out.append(int(entry))
    return out


def keeper(run: str) -> int:
    """The one keeper of a run."""
    return int(until(lambda: len(found := keepers(run)) == 1 and found[0], f"one keeper of {run}"))


def _name(run: str) -> str:
    config = settings()
    return keeper_name(run, config.job, config.host)


def bound(run: str) -> bool:
    """Whether somebody listens under the name of a run's keeper."""
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    return any(row[-1] == "@" + _name(run) for row in rows)


def held_steps(run: str) -> list[int]:
    """The steps that the keeper of a run says it holds."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(WAIT)
        sock.connect(f"\0{keeper_name(run, settings().job, settings().host)}")
        send(sock, frame("look", id=1))
        return [int(s["step"]) for s in receive(sock, Connection(sock))["steps"]]


def slots_of(pid: int) -> list[str]:
    """The slots that a process holds, each once, as files."""
    out: dict[int, str] = {}
    for fd in os.listdir(f"/proc/{pid}/fd"):
        at = f"/proc/{pid}/fd/{fd}"
        try:
            if os.readlink(at).startswith("/memfd:ckpt-"):
                out[os.stat(at).st_ino] = at
        except OSError:
            continue
    return list(out.values())


def children() -> list[int]:
    """Of this process, with what it adopted; also those that wait to be reaped."""
    me, out = os.getpid(), []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == me:
                out.append(int(entry))
    return out


def nothing_left(run: str) -> None:
    """The keeper ends by itself, and well; nobody has its name; no process is left."""
    for pid in keepers(run):
        assert gone(pid) == 0
    until(lambda: not bound(run), "nobody listens any more")
    for pid in children():
        until(lambda pid=pid: state_of(pid) == "Z", f"process {pid} ends")
        os.waitpid(pid, 0)


@contextmanager
def scene(folder: str, grace: float = 60.0) -> Iterator[str]:
    """The path of a run. At the end no process is left, whatever happened, and no keeper has failed."""
    assert ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0) == 0
    log = f"{folder}/keepers.txt"
    os.environ.update(
        CKPT_GRACE=str(grace), CKPT_DEADLINE="20", CKPT_BUFFER_MIB="1", CKPT_BUFFERS="2", CKPT_WRITERS="2",
        CKPT_KEEPER_LOG=log,
    )  # fmt: skip
    for name in ("CKPT_JOB", "CKPT_HOST", "CKPT_FAULT"):
        os.environ.pop(name, None)
    try:
        yield f"{folder}/run"
        said = Path(log).read_text() if os.path.exists(log) else ""
        assert "Traceback" not in said, "a keeper failed"
    except BaseException as e:
        e.add_note(f"keepers: {Path(log).read_text()[-3000:] if os.path.exists(log) else ''}")
        raise
    finally:
        while left := children():
            for pid in left:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


# What was seen, and what is there.


def seen(run: str, what: str) -> int:
    """The newest step that any trainer noted so, -1 if none."""
    log = Path(f"{run}.log")
    rows = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    return max((int(row[1]) for row in rows if row[0] == what), default=-1)


def check_stored(run: str, step: int, **options: Any) -> None:
    """The latest step in storage is `step`, and loads bit for bit; everything that is listed verifies."""

    def check() -> None:
        steps = check_listing(run)
        assert steps and steps[0] == step, f"{steps} in storage instead of {step}"
        job = Job(run, **options)
        report = ckpt.load(job.state, run)
        assert report.step == step
        job.check(step)

    must(check)


def goes_on(run: str, at_least: int, at_most: int, **options: Any) -> tuple[int, str]:
    """A new trainer restores a step within these bounds, trains, closes, and leaves nothing. (the step, from where)"""
    t = Trainer(run, **options)
    start, source = t("restore")
    assert at_least <= start - 1 <= at_most, f"step {start - 1} was restored, not {at_least} to {at_most}"
    t("seal", 2)
    last = t("train", 1)
    report = t.finish()
    assert report["failed"] == 0 and report["last_step"] == last, report
    nothing_left(run)
    check_stored(run, last, **options)
    return start - 1, source
