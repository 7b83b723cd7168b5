"""Kills one rank of two, or both, at every fault point of a collective save; many pairs at a time, since most wait."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kills
import torch
import torch.distributed as dist

import ckpt
from ckpt import collective
from ckpt.errors import CkptError

AT_ONCE = 8


@dataclass(frozen=True)
class Case:
    """The n-th point that rank `victim` passes kills it, or `both`. The store is a `file`, or lives in rank 0."""

    victim: int
    both: bool
    file: bool
    n: int


@dataclass(frozen=True)
class Outcome:
    """The point (empty: the save passed fewer), the newest step that stands, what the survivor said."""

    case: Case
    point: str
    newest: int
    said: str


def state(version: int, rank: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(version)
    full = torch.rand(6, 5, generator=g)
    return {
        "cut": ckpt.Shard(full[3 * rank : 3 * rank + 3].clone(), (6, 5), (3 * rank, 0)),
        "whole": torch.rand(100, generator=g),
        "mine": ckpt.PerRank([version, rank]),
        "note": f"version {version}",
    }


def check_loads(ref: str, version: int, rank: int) -> None:
    target, expected = state(0, rank), state(version, rank)
    ckpt.load(target, ref)
    assert torch.equal(target["cut"].tensor, expected["cut"].tensor)
    assert torch.equal(target["whole"], expected["whole"])
    assert (target["mine"].value, target["note"]) == (expected["mine"].value, expected["note"])


def ranks(body: Callable[[int], Any], *, file: bool = True) -> tuple[list[int], list[str]]:
    """Two forks with a process group, in one OS process group of their own; their exit codes and what they wrote."""
    folder = tempfile.mkdtemp(prefix="ckpt-test-")
    mine, theirs = os.pipe()
    pids: list[int] = []
    for rank in range(2):
        pid = os.fork()
        if pid:
            os.setpgid(pid, (pids or [pid])[0])
            pids.append(pid)
            continue
        code, said = 1, ""
        try:
            os.setpgid(0, (pids or [0])[0])
            os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
            dist.init_process_group("gloo", store=_store(rank, folder, file, mine, theirs), rank=rank, world_size=2)
            body(rank)
            collective.linger()
            code, said = 0, "ok"
        except CkptError as e:
            code, said = 0, f"{e.kind}: {e}"
        except BaseException as e:
            said = f"{type(e).__name__}: {e}"
        finally:
            Path(folder, f"said-{rank}").write_text(said)
            os._exit(code)
    os.close(mine)
    os.close(theirs)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    said = [p.read_text() if p.exists() else "" for p in (Path(folder, f"said-{r}") for r in range(2))]
    shutil.rmtree(folder)
    return codes, said


def _store(rank: int, folder: str, file: bool, read: int, write: int) -> Any:
    if file:
        return dist.FileStore(f"{folder}/store", 2)
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
        os.write(write, store.port.to_bytes(4, "little"))
        return store
    return dist.TCPStore("127.0.0.1", int.from_bytes(os.read(read, 4), "little"), 2, False, wait_for_workers=False)


def _both(body: Callable[[int], Any]) -> None:
    codes, said = ranks(body)
    assert codes == [0, 0] and said == ["ok", "ok"], said


def _try(template: str, root: str, case: Case, deadline: float) -> Outcome | None:
    """One case from beginning to end, or None if the deadline was too short for the machine to come to the point."""
    run, name = f"{root}/run", f"{root}/point"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(template, run)
    os.environ["CKPT_DEADLINE"] = str(deadline)

    def die() -> None:
        (os.killpg if case.both else os.kill)(os.getpgid(0) if case.both else os.getpid(), signal.SIGKILL)

    def save(rank: int) -> None:
        if rank == case.victim:
            kills.kill_at(case.n, name, die)
        ckpt.save(state(2, rank), run, step=2)

    codes, said = ranks(save, file=case.file)
    died = codes[case.victim] == kills.KILLED
    if not died and "deadline" in "".join(said):
        return None
    assert died or said == ["ok", "ok"], said
    os.environ["CKPT_DEADLINE"] = "60"
    newest = 2 if os.path.exists(f"{run}/step-00000002.g0000/commit.json") else 1
    kills.must(lambda: _check(run, newest))
    assert died or newest == 2
    return Outcome(case, Path(name).read_text() if died else "", newest, said[1 - case.victim])


def _check(run: str, newest: int) -> None:
    assert kills.check_listing(run) == list(range(newest, 0, -1))

    def go_on(rank: int) -> None:
        check_loads(run, newest, rank)
        ckpt.save(state(newest + 1, rank), run, step=newest + 1)
        check_loads(run, newest + 1, rank)

    _both(go_on)
    kills.check_pruned(run)
    assert kills.check_listing(run) == list(range(newest + 1, 0, -1))


def _enumerate(template: str, folder: str, victim: int, both: bool, file: bool, first: int, step: int) -> list[Outcome]:
    """Every `step`-th point from `first` on, until a save survives."""
    out = []
    for n in range(first, 1000, step):
        case, deadline = Case(victim, both, file, n), 2.0
        while True:
            outcome = _try(template, f"{folder}/{victim}{both:d}{file:d}-{n}", case, deadline)
            if outcome is not None:
                break
            deadline *= 3
        if not outcome.point:
            return out
        out.append(outcome)
    raise AssertionError("no end of fault points")


def kills_of_a_pair(folder: str) -> list[Outcome]:
    """All cases, spread over `AT_ONCE` processes. Those whose survivor waits longest are cut finest."""
    os.environ.update(kills.SMALL)
    template = f"{folder}/template"
    kills.must(lambda: _both(lambda rank: ckpt.save(state(1, rank), template, step=1)))
    work = [(1, False, True, 1, 1), (1, False, False, 1, 1)]
    work += [(0, False, False, first, 2) for first in (1, 2)]
    work += [(0, False, True, first, 8) for first in range(1, 9)]
    work += [(0, True, True, 1, 1), (1, True, True, 1, 1)]
    pids: dict[int, str] = {}
    failed = []
    todo = list(enumerate(work))
    while todo or pids:
        while todo and len(pids) < AT_ONCE:
            i, (victim, both, file, first, step) = todo.pop(0)
            answer = f"{folder}/answer-{i}"
            pid = os.fork()
            if pid == 0:
                code, text = kills.in_child(
                    lambda a=answer, w=(victim, both, file, first, step): Path(a).write_text(
                        json.dumps(
                            [[vars(o.case), o.point, o.newest, o.said] for o in _enumerate(template, folder, *w)]
                        )
                    )
                )
                if code:
                    Path(answer + ".failed").write_text(text)
                os._exit(0)
            pids[pid] = answer
        pid, _ = os.wait()
        answer = pids.pop(pid)
        if not os.path.exists(answer):
            failed.append(Path(answer + ".failed").read_text())
    assert not failed, "\n".join(failed)
    rows = [row for i in range(len(work)) for row in json.loads(Path(f"{folder}/answer-{i}").read_text())]
    return [Outcome(Case(**case), point, newest, said) for case, point, newest, said in rows]
