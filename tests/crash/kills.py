"""Runs in a process without threads, forks once for every fault point, kills there, and looks at what is left.

Nothing is sampled: the points of a save are counted by passing them, from the first on, until a child survives.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ckpt
from ckpt import catalog, faults
from ckpt.backends import LocalBackend
from ckpt.checkpoint import Checkpoint
from ckpt.offline import prune as pruning
from ckpt.offline.prune import carry_out, plan_prune

KILLED = -signal.SIGKILL
MIB = 1 << 20
SMALL = {"CKPT_BUFFER_MIB": "1", "CKPT_BUFFERS": "2", "CKPT_WRITERS": "2", "CKPT_READERS": "1"}


def in_child(body: Callable[[], Any]) -> tuple[int, str]:
    """Runs `body` in a fork of this process; (exit code, or minus the signal; its traceback)."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(read)
            body()
            code = 0
        except BaseException:
            os.write(write, traceback.format_exc()[-4000:].encode())
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as f:
        text = f.read().decode(errors="replace")
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def must(body: Callable[[], Any]) -> None:
    """`in_child`, raising what it raised."""
    code, text = in_child(body)
    assert code == 0, f"exit {code}\n{text}"


def kill_at(n: int, names: str, act: Callable[[], Any] | None = None) -> None:
    """Dies at the n-th point from now on, leaving its name in the file `names`."""
    passed = 0

    def hook(name: str) -> None:
        nonlocal passed
        passed += 1
        if passed == n:
            Path(names).write_text(name)
            (act or (lambda: os.kill(os.getpid(), signal.SIGKILL)))()

    faults.install(hook)


@dataclass(frozen=True)
class Death:
    """What was seen after one kill: the point, and the newest step that stands."""

    point: str
    newest: int
    left: tuple[str, ...] = ()


def state(version: int, extra: int = 0) -> dict[str, Any]:
    """Content that tells its version. `extra` MiB make the pack larger than a buffer."""
    g = torch.Generator().manual_seed(version)
    out: dict[str, Any] = {
        "model": {
            "weight": torch.rand(33, 17, generator=g),
            "half": torch.rand(301, generator=g).to(torch.bfloat16),
            "flag": torch.rand(7, generator=g) > 0.5,
            "empty": torch.zeros(0, 3),
            "count": torch.tensor(version),
        },
        "note": [f"version {version}", version, float("inf")],
    }
    if extra:
        out["model"]["large"] = torch.rand(extra * MIB // 4, generator=g)
    return out


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return bool(a == b)


def files(root: str) -> set[str]:
    """Every file below `root`, and every empty folder (with a slash)."""
    out = set()
    for at, folders, names in os.walk(root):
        out |= {os.path.relpath(os.path.join(at, n), root) for n in names}
        if not folders and not names and at != root:
            out.add(os.path.relpath(at, root) + "/")
    return out


def needed(root: str) -> set[str]:
    """The files that the committed steps, generations and ledger of a run consist of."""
    backend = LocalBackend(root)
    listing = catalog.list_run(backend)
    out = {f"gen-{g.generation:04d}.json" for g in listing.generations}
    for s in listing.committed:
        assert s.commit is not None
        m = Checkpoint(backend, s.commit).manifest
        out |= {f"{s.folder}/commit.json"}
        out |= {f"{s.folder}/{s.commit.attempt}/{n}" for n in ("attempt.json", "manifest.safetensors")}
        out |= {f"{s.folder}/{m.pack_path(p)}" for p in range(len(m.packs))}
    rows = {f"{at}/{e.name}" for at in ("ledger", "events") for e in backend.list(at) if e.name.endswith(".jsonl")}
    return out | rows


def prune(root: str) -> None:
    backend = LocalBackend(root)
    carry_out(backend, plan_prune(backend, [], 0), [], 0)


def check_pruned(root: str) -> None:
    """After a prune there is what the committed steps need, and nothing else."""
    prune(root)
    assert files(root) == needed(root), f"stray: {files(root) - needed(root)}, lost: {needed(root) - files(root)}"


def check_listing(root: str) -> list[int]:
    """No half checkpoint shows: what is listed as committed verifies, nothing is damaged. The steps, newest first."""
    backend = LocalBackend(root)
    listing = catalog.list_run(backend)
    assert not [s.error for s in listing.steps if s.error]
    for s in listing.committed:
        assert s.commit is not None
        found = Checkpoint(backend, s.commit).verify()
        assert found.ok, found.problems
    return [s.step for s in catalog.lineage(listing)]


def check_loads(ref: str, version: int, extra: int = 0) -> None:
    target = state(0, extra)
    ckpt.load(target, ref)
    assert same(target, state(version, extra)), f"{ref} is not version {version}"


# One process: ckpt.save.


def _template(root: Path, body: Callable[[str], Any]) -> str:
    run = str(root / "template")
    must(lambda: body(run))
    return run


def _copies(root: Path, template: str) -> Iterator[tuple[int, str, str]]:
    """(1, a copy of the template, a file for the point's name), and so on."""
    for n in range(1, 1000):
        run = str(root / "run")
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(template, run)
        yield n, run, str(root / "point")
    raise AssertionError("no end of fault points")


def kills_of_save(folder: str) -> list[Death]:
    """Step 1 stands; the save of step 2 is killed at every point."""
    os.environ.update(SMALL)
    root, deaths, extra = Path(folder), [], 2
    template = _template(root, lambda run: ckpt.save(state(1, extra), run, step=1))
    for n, run, name in _copies(root, template):

        def save(n: int = n, run: str = run, name: str = name) -> None:
            kill_at(n, name)
            ckpt.save(state(2, extra), run, step=2)

        code, text = in_child(save)
        if code == 0:
            return deaths
        assert code == KILLED, f"point {n}: exit {code}\n{text}"
        point = Path(name).read_text()
        left = tuple(sorted(files(run) - files(template)))
        newest = os.path.join(run, "step-00000002.g0000/commit.json")
        deaths.append(Death(point, 2 if os.path.exists(newest) else 1, left))

        def check(run: str = run, newest: int = deaths[-1].newest) -> None:
            assert check_listing(run) == list(range(newest, 0, -1))
            check_loads(run, newest, extra)
            if newest == 1:
                ckpt.save(state(2, extra), run, step=2)
            check_pruned(run)
            assert check_listing(run) == [2, 1]
            check_loads(run, 2, extra)
            check_loads(f"{run}@1", 1, extra)

        code, text = in_child(check)
        assert code == 0, f"killed at {point} (point {n}): {text}"
    raise AssertionError


# One process: the Checkpointer, with a generation, retention and a ledger.


def _loop(run: str, steps: int) -> ckpt.Checkpointer:
    """A job: restore, then `steps` steps, the content of each saved as its version."""
    live = state(1000)
    with ckpt.Checkpointer(run, live, storage=ckpt.Every(1), keep=[ckpt.KeepLast(2)]) as cp:
        start = cp.restore()
        if start:
            assert same(live, state(start - 1)), "the restored state is not what was saved"
        for step in range(start, start + steps):
            live["model"], live["note"] = state(step)["model"], state(step)["note"]
            cp.step(step, metrics={"loss": 1.0 / (step + 1)})
            cp.wait()
    assert cp.report.failed == 0, cp.report.last_error
    return cp


def kills_of_a_job(folder: str) -> list[Death]:
    """Steps 0 to 2 stand (two of them kept); the job that goes on from there is killed at every point."""
    os.environ.update(SMALL)
    root, deaths = Path(folder), []
    template = _template(root, lambda run: _loop(run, 3))
    for n, run, name in _copies(root, template):

        def go_on(n: int = n, run: str = run, name: str = name) -> None:
            kill_at(n, name)
            _loop(run, 1)

        code, text = in_child(go_on)
        if code == 0:
            return deaths
        assert code == KILLED, f"point {n}: exit {code}\n{text}"
        point = Path(name).read_text()

        def check(run: str = run) -> None:
            before = check_listing(run)
            assert before in ([2, 1], [3, 2, 1], [3, 2])
            (root / "newest").write_text(str(before[0]))
            _loop(run, 1)
            check_pruned(run)
            assert check_listing(run) == [before[0] + 1, before[0]]

        code, text = in_child(check)
        assert code == 0, f"killed at {point} (point {n}): {text}"
        deaths.append(Death(point, int((root / "newest").read_text())))
    raise AssertionError


def kills_of_prune(folder: str) -> list[Death]:
    """A run full of leftovers; the prune is killed at every point."""
    os.environ.update(SMALL)
    root, deaths = Path(folder), []

    def litter(run: str) -> None:
        ckpt.save(state(1), run, step=1)
        for n in (3, 12):
            code, text = in_child(lambda n=n: (kill_at(n, str(root / "point")), ckpt.save(state(2), run, step=2)))
            assert code == KILLED, text
        ckpt.save(state(3), run, step=3)

    template = _template(root, litter)
    for n, run, name in _copies(root, template):
        code, text = in_child(lambda n=n, run=run, name=name: (kill_at(n, name), prune(run)))

        def check(run: str = run) -> None:
            assert check_listing(run) == [3, 1]
            check_pruned(run)
            check_loads(f"{run}@1", 1)
            check_loads(run, 3)

        must(check)
        if code == 0:
            return deaths
        assert code == KILLED, f"point {n}: exit {code}\n{text}"
        deaths.append(Death(Path(name).read_text(), 3))
    raise AssertionError


# Mutants: the library with one of its safeguards taken away, which the kills above must find.


def _commit_before_the_manifest() -> None:
    create, held = LocalBackend.create, []

    def late(self: LocalBackend, path: str, data: bytes) -> None:
        if path.endswith("manifest.safetensors"):
            held.append((path, data))
            return
        create(self, path, data)
        if path.endswith("commit.json"):
            create(self, *held.pop())

    LocalBackend.create = late  # type: ignore[method-assign]


def _commit_deleted_last() -> None:
    def packs_first(backend: LocalBackend, folder: str) -> None:
        catalog.delete_tree(backend, f"{folder}/a0")
        catalog.delete_tree(backend, folder)

    pruning.delete_step = packs_first  # type: ignore[attr-defined]


def _written_in_place() -> None:
    def create(self: LocalBackend, path: str, data: bytes) -> None:
        full = Path(self.root, path)
        full.parent.mkdir(parents=True, exist_ok=True)
        with full.open("xb") as f:
            for half in (data[: len(data) // 2], data[len(data) // 2 :]):
                faults.point("local.create.write")
                f.write(half)
                f.flush()

    LocalBackend.create = create  # type: ignore[method-assign]


MUTANTS = {
    "commit before the manifest": (_commit_before_the_manifest, kills_of_save),
    "commit deleted last": (_commit_deleted_last, kills_of_a_job),
    "written in place": (_written_in_place, kills_of_save),
}


def found_in_a_mutant(name: str, folder: str) -> str:
    """What the kills say of a mutant ("" if nothing)."""
    mutate, scenario = MUTANTS[name]
    mutate()
    try:
        scenario(folder)
    except AssertionError as e:
        return str(e)
    return ""


_NEW_NAMESPACE, _PRIVATE = 0x20000, (1 << 18) | (1 << 14)


def small_disk(folder: str, options: str) -> str:
    """Mounts a tmpfs that only this process sees, and that ends with it; the reason if that cannot be done."""
    libc = ctypes.CDLL(None, use_errno=True)
    for call, args in (
        (libc.unshare, (_NEW_NAMESPACE,)),
        (libc.mount, (b"none", b"/", None, ctypes.c_ulong(_PRIVATE), None)),
        (libc.mount, (b"tmpfs", folder.encode(), b"tmpfs", ctypes.c_ulong(0), options.encode())),
    ):
        if call(*args) != 0:
            return f"no tmpfs of its own can be mounted here: {os.strerror(ctypes.get_errno())}"
    return ""
