"""What fails on one rank fails the save on all, with one cause, and never the loop: the next save works."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool

import ckpt
from ckpt import catalog, collective, faults
from ckpt.backends import LocalBackend
from ckpt.errors import CkptError, DeadlineError, PeerError

SMALL = {"CKPT_BUFFER_MIB": "1", "CKPT_BUFFERS": "2", "CKPT_WRITERS": "2", "CKPT_READERS": "1"}


class Part:
    """A `Stateful` that does on this rank what a test tells it to, when it is asked for its state."""

    def __init__(self) -> None:
        self.trouble: Callable[[], None] | None = None

    def state_dict(self) -> dict[str, Any]:
        if self.trouble is not None:
            self.trouble()
        return {"x": 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert state_dict == {"x": 1}


class Job:
    """A loop of two ranks whose content tells the step that it was saved at."""

    def __init__(self, rank: int, run: str) -> None:
        self.rank, self.run, self.step = rank, run, -1
        self.part = Part()
        self.whole, self.cut = torch.zeros(50), torch.zeros(3, 5)
        self.state = {
            "whole": self.whole,
            "cut": ckpt.Shard(self.cut, (6, 5), (3 * rank, 0)),
            "part": self.part,
        }
        self.cp = ckpt.Checkpointer(run, self.state, storage=ckpt.Every(1))
        assert self.cp.restore() == 0

    def train(self) -> None:
        """What a training step is to a save: nobody passes it alone."""
        dist.barrier()
        self.step += 1
        self.whole.fill_(self.step)
        self.cut.fill_(self.step + self.rank / 2)

    def save(self, **metrics: Any) -> str:
        """ "saved", or the cause."""
        failed = self.cp.report.failed
        handle = self.cp.step(self.step, metrics=metrics)
        saved = handle is not None and handle.committed(None)
        assert saved == (self.cp.report.failed == failed) and not self.cp.report.skipped
        return "saved" if saved else self.cp.report.last_error

    def check(self, saved: list[int]) -> None:
        """The committed steps are these and no others, and every one is what was saved then."""
        backend = LocalBackend(self.run)
        assert [s.step for s in catalog.list_run(backend).committed] == saved
        for step in saved:
            ckpt.load(self.state, f"{self.run}@{step}")
            assert self.whole.eq(step).all() and self.cut.eq(step + self.rank / 2).all()


def _errors_everywhere(rank: int, world: int, run: str, victim: int, code: int) -> list[tuple[str, str]]:
    """An error at the victim's first point of a save, at the second point of the next save, and so on."""
    job, out, saved = Job(rank, run), [], []
    try:
        for n in range(1, 1000):
            point, lock, count = [""], threading.Lock(), [0]

            def hook(name: str, n: int = n, point: Any = point, lock: Any = lock, count: Any = count) -> None:
                with lock:
                    count[0] += 1
                    hit = count[0] == n
                if hit:
                    point[0] = name
                    raise OSError(code, os.strerror(code), name)

            job.train()
            faults.install(hook if rank == victim else None)
            said = job.save(loss=1.0)
            faults.install(None)
            out.append((point[0], said))
            if said != "saved":
                assert job.step not in [s.step for s in catalog.list_run(LocalBackend(run)).committed]
                dist.barrier()
                if n % 2:
                    job.cp.save_now()  # the same step, again
                else:
                    job.train()
                    assert job.save() == "saved"
            saved.append(job.step)
            gone = [None] * world
            dist.all_gather_object(gone, point[0])
            if not gone[victim]:
                break
        job.check(saved)
        assert job.cp.report.committed == len(saved)
    finally:
        faults.install(None)
    return out


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize("victim", [0, 1])
def test_an_error_at_any_file_operation(pool: Pool, quick_folder: Path, victim: int, code: int) -> None:
    answers = pool.run(_errors_everywhere, str(quick_folder / "run"), victim, code, world=2, env=SMALL)
    points = [p for p, _ in answers[victim]][:-1]
    assert [said for _, said in answers[0]] == [said for _, said in answers[1]], "the ranks tell different causes"
    outcome = [(p, said) for p, (_, said) in zip(points, answers[0], strict=False)]
    assert "local.new.fsync" in points and ("local.create.link" in points) == (victim == 0)
    links = [i for i, p in enumerate(points) if p == "local.create.link"]
    for i, (point, said) in enumerate(outcome):
        # Once the commit is linked, the checkpoint exists, and nothing that fails later can undo that.
        if victim == 0 and i > links[2]:
            assert said == "saved", (point, said)
        elif point == "local.new.write" and said == "saved":
            raise AssertionError("an error of a writer thread was lost")
        else:
            assert said.startswith("storage: ") and os.strerror(code) in said, (point, said)
            assert code != errno.ENOSPC or "free some space" in said


def _raising_state(rank: int, world: int, run: str, victim: int) -> list[str]:
    job = Job(rank, run)

    def trouble() -> None:
        raise ValueError("the loader lost its place")

    out = []
    for turn in range(4):
        job.train()
        job.part.trouble = trouble if rank == victim and turn % 2 == 0 else None
        out.append(job.save())
    job.part.trouble = None
    job.check([1, 3])
    bad = object() if rank == victim else 1.0
    job.train()
    with pytest.raises(CkptError) as e:
        ckpt.save(job.state, run, step=9, metrics={"loss": bad})
    return [*out, str(e.value)]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_state_that_raises(pool: Pool, tmp_path: Path, victim: int) -> None:
    answers = pool.run(_raising_state, str(tmp_path / "run"), victim, world=2)
    assert answers[0] == answers[1]
    assert answers[0][1] == answers[0][3] == "saved"
    for said in (answers[0][0], answers[0][2]):
        assert said == f"peer: rank {victim}: ValueError: the loader lost its place"
    assert answers[0][4].startswith(f"rank {victim}: metric 'loss'")


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


COMMIT = "local.create.link#3"


def _hang(rank: int, world: int, run: str, victim: int, where: str) -> tuple[list[str], list[int]]:
    """The victim stops in the middle of a save; it is woken when the other rank has given up."""
    pids: list[int] = [0] * world
    dist.all_gather_object(pids, os.getpid())
    job = Job(rank, run)
    job.train()
    out = [job.save()]
    job.train()
    if rank == victim:
        if where:
            passed = []

            def hook(name: str) -> None:
                passed.append(name)
                if name == where.partition("#")[0] and passed.count(name) == int(where.partition("#")[2] or 1):
                    _stop()

            faults.install(hook)
        else:
            job.part.trouble = _stop
    try:
        out.append(job.save())
    finally:
        faults.install(None)
        job.part.trouble = None
        if rank != victim:
            os.kill(pids[victim], signal.SIGCONT)
    there = [s.step for s in catalog.list_run(LocalBackend(run)).committed]
    dist.barrier()
    if where != COMMIT:
        job.cp.save_now()
    job.train()
    out.append(job.save())
    job.check([0, 1, 2])
    return out, there


@pytest.mark.parametrize(
    ("victim", "where"),
    [
        (1, ""),
        (1, "local.new.open"),
        (1, "local.new.write"),
        (1, "local.new.fsync-folder"),
        (0, ""),
        (0, "local.create.write"),
        (0, "local.new.write"),
        (0, COMMIT),
    ],
)
def test_a_rank_that_hangs(pool: Pool, tmp_path: Path, victim: int, where: str) -> None:
    env = {**SMALL, "CKPT_DEADLINE": "2"}
    answers = pool.run(_hang, str(tmp_path / "run"), victim, where, world=2, env=env)
    for rank, (said, there) in enumerate(answers):
        assert said[0] == said[2] == "saved"
        # Who is stopped with the commit in his hand commits when he is woken, though nobody waits for it any more; the
        # other rank, who woke him, may look before or after that.
        assert there == [0] or (where == COMMIT and there == [0, 1])
        assert there == [0, 1] or not (where == COMMIT and rank == victim)
    cause = answers[0][0][1]
    assert cause.startswith("deadline: ") and f"rank {victim}" in cause and "hanging" in cause
    assert answers[1][0][1] == cause


# Rounds, with threads for ranks.

Rank = Callable[[collective.Group], Any]


def together(*ranks: Rank, store: Any = None) -> list[Any]:
    """What each rank returns or raises."""
    store = store or dist.HashStore()

    def run(rank: int) -> Any:
        try:
            return ranks[rank](collective._StoreGroup(store, rank, len(ranks)))
        except CkptError as e:
            return e

    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(run, range(len(ranks))))


def _number(name: str) -> Rank:
    return lambda group: group.round(name, str(group.rank).encode(), lambda parts: b"+".join(parts))


def test_a_second_process_group_on_the_same_store() -> None:
    store = dist.HashStore()
    assert together(_number("a"), _number("a"), store=store) == [b"0+1"] * 2
    assert together(_number("b"), _number("b"), store=store) == [b"0+1"] * 2


def test_an_abandoned_round_is_not_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_DEADLINE", "0.01")
    decided, gave_up = [], threading.Event()

    def leader(group: collective.Group) -> bytes:
        assert gave_up.wait(60)
        with pytest.raises(DeadlineError, match="rank 0 gave no answer"):
            group.round("one", b"", lambda _: decided.append(1) or b"")
        return _number("two")(group)

    def follower(group: collective.Group) -> bytes:
        with pytest.raises(DeadlineError, match="rank 0 gave no answer"):
            group.round("one", b"", lambda _: b"")
        monkeypatch.setenv("CKPT_DEADLINE", "60")
        gave_up.set()
        return _number("two")(group)

    assert together(leader, follower) == [b"0+1"] * 2 and not decided


def test_a_rank_that_missed_rounds_goes_on_with_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_DEADLINE", "0.01")
    late = threading.Event()

    def leader(group: collective.Group) -> bytes:
        for name in ("one", "two"):
            with pytest.raises(DeadlineError, match="rank 1 did not come"):
                _number(name)(group)
        monkeypatch.setenv("CKPT_DEADLINE", "60")
        late.set()
        return _number("three")(group)

    def follower(group: collective.Group) -> bytes:
        assert late.wait(60)
        return _number("three")(group)

    assert together(leader, follower) == [b"0+1"] * 2


def test_ranks_at_different_places_are_told() -> None:
    for e in together(_number("save"), _number("load")):
        assert "rank 1 is at 'load' while rank 0 is at 'save'" in str(e)


def test_the_leader_lingers_until_it_was_heard() -> None:
    heard = threading.Event()

    def leader(group: Any) -> bool:
        _number("one")(group)
        group.linger()
        return heard.is_set()

    def follower(group: Any) -> None:
        read = group._answer
        group._answer = lambda *args: (heard.set(), read(*args))[1]
        _number("one")(group)

    assert together(leader, follower)[0] is True


@pytest.mark.parametrize("libuv", [True, False])
def test_either_kind_of_torchs_store(monkeypatch: pytest.MonkeyPatch, libuv: bool) -> None:
    """That without libuv does not wake who waits for a key that is compared and set."""
    monkeypatch.setenv("CKPT_DEADLINE", "10")
    server = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False, use_libuv=libuv)

    def run(rank: int) -> list[bytes]:
        store = dist.TCPStore("127.0.0.1", server.port, None, False, wait_for_workers=False, use_libuv=libuv)
        group = collective._StoreGroup(dist.PrefixStore("job", store), rank, 2)
        return [_number(f"round {n}")(group) for n in range(30)]

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(run, range(2))) == [[b"0+1"] * 30] * 2


def test_a_store_that_is_gone() -> None:
    server = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    group = collective._StoreGroup(dist.TCPStore("127.0.0.1", server.port, None, False, wait_for_workers=False), 1, 2)
    del server
    with pytest.raises(PeerError, match="lost touch with the job's key-value store"):
        _number("one")(group)


def published_although_one_failed() -> list[bytes]:
    """What the leader published although rank 1 had nothing to give."""
    published: list[bytes] = []

    def leader(group: collective.Group) -> bytes:
        return group.round("commit", b"mine", lambda parts: published.append(b"+".join(parts)) or b"done")

    def follower(group: collective.Group) -> bytes:
        return group.round("commit", OSError(errno.EIO, "Input/output error"), lambda _: b"")

    told = together(leader, follower)
    assert published or [str(e) for e in told] == ["rank 1: OSError: [Errno 5] Input/output error"] * 2
    return published


def test_without_the_errors_of_others_half_a_save_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    assert published_although_one_failed() == []
    opened = collective._open
    monkeypatch.setattr(
        collective, "_open", lambda r, letter, name: b"" if letter[:1] == b"E" else opened(r, letter, name)
    )
    assert published_although_one_failed() == [b"mine+"]


def test_without_a_settled_round_a_late_leader_publishes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The safeguard of `test_an_abandoned_round_is_not_decided`, taken away."""
    monkeypatch.setenv("CKPT_DEADLINE", "0.01")
    monkeypatch.setattr(collective._StoreGroup, "_settle", lambda self, number, what, mine: mine)
    published, gave_up = [], threading.Event()

    def leader(group: collective.Group) -> bytes:
        assert gave_up.wait(60)
        return group.round("commit", b"", lambda _: published.append(1) or b"done")

    def follower(group: collective.Group) -> None:
        with pytest.raises(DeadlineError):
            group.round("commit", b"", lambda _: b"")
        gave_up.set()

    together(leader, follower)
    assert published == [1]


def test_a_clock_that_nobody_confirms_stops_no_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With minutes, whether a save is due is agreed on; a rank that does not answer is a failed save like any other."""
    cp = ckpt.Checkpointer(tmp_path / "run", {"x": 1}, storage=ckpt.Every(minutes=1e-9))
    cp.restore()
    monkeypatch.setenv("CKPT_DEADLINE", "0.01")
    monkeypatch.setattr(cp._saves, "_group", collective._StoreGroup(dist.HashStore(), 0, 2))
    assert cp.step(0) is None and cp.report.failed == 1
    assert cp.report.last_error.startswith("deadline: due 0: rank 1 did not come")
    monkeypatch.setattr(cp._saves, "_group", collective.Solo())
    assert cp.step(1) is not None and cp.close().committed == 1


def test_metrics_of_any_kind_stop_no_loop(tmp_path: Path) -> None:
    cp = ckpt.Checkpointer(tmp_path / "run", {"x": 1}, storage=ckpt.Every(1))
    cp.restore()
    for step, bad in enumerate([torch.zeros(2), "much", None, object(), 10**400, {}, torch.tensor(float("nan"))]):
        assert cp.step(step, metrics={"loss": bad}).committed(None), cp.report.last_error
    assert cp.close().failed == 0


def _damage_that_one_rank_sees(rank: int, world: int, run: str) -> tuple[int, int]:
    """Rank 1 reads other bytes of the newest commit than rank 0: both fall back, together."""
    job = Job(rank, run)
    for _ in range(2):
        job.train()
        assert job.save() == "saved"
    fetch = LocalBackend.fetch

    def other(self: LocalBackend, path: str, limit: int) -> bytes:
        data = fetch(self, path, limit)
        return data[:-3] if rank == 1 and path == "step-00000001.g0001/commit.json" else data

    LocalBackend.fetch = other  # type: ignore[method-assign]
    try:
        start = ckpt.Checkpointer(run, job.state, storage=ckpt.Every(1)).restore()
        assert job.whole.eq(0).all() and job.cut.eq(rank / 2).all()
        with pytest.raises(ckpt.IntegrityError, match=r"rank 1: .*commit\.json"):
            ckpt.load(job.state, f"{run}@1")
    finally:
        LocalBackend.fetch = fetch  # type: ignore[method-assign]
    return start, ckpt.load(job.state, f"{run}@1").step


def test_damage_that_one_rank_sees_is_damage_for_all(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(_damage_that_one_rank_sees, str(tmp_path / "run"), world=2) == [(1, 1)] * 2
