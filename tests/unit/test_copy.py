"""Copies between stores: the same bytes, resumed, verified, committed last, and nothing that is not the source's touched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import ckpt
from ckpt import catalog
from ckpt.backends import Backend, LocalBackend, backend_for
from ckpt.backends.faulty import Fault, FaultyBackend
from ckpt.cli import cli
from ckpt.errors import CkptError, ConflictError, IntegrityError, NotFoundError, UsageError
from ckpt.offline.copy import copy, copy_step, plan_copy


def state(step: int) -> dict[str, Any]:
    return {"w": torch.arange(100_000) + step, "v": torch.full((7,), float(step)), "n": step}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two lives, three steps, metrics that came late."""
    where = tmp_path / "run"
    for _ in range(2):
        with ckpt.Checkpointer(where, state(0), storage=ckpt.Every(1)) as cp:
            start = cp.restore()
            cp._state = state(start)
            cp.step(start, {"loss": 1.0})
            cp.wait(60)
            cp.record(start, {"val_loss": 5.0 - start})
    return where


def files(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}


def steps(url: object) -> list[int]:
    return [s.step for s in catalog.list_run(backend_for(str(url))).committed]


def test_a_run_is_the_same_afterwards(run: Path, tmp_path: Path) -> None:
    report = copy(run, tmp_path / "to")
    assert files(tmp_path / "to") == files(run) and len(report.copied) == 2 and report.present == ()
    assert report.bytes == sum(p.stat().st_size for p in run.rglob("rank-*"))
    again = copy(run, tmp_path / "to")
    assert (again.copied, again.bytes, len(again.present)) == ((), 0, 2)
    found = state(9)
    ckpt.load(found, f"{tmp_path}/to@best")
    assert torch.equal(found["w"], state(1)["w"]) and found["n"] == 1


def test_one_step(run: Path, tmp_path: Path) -> None:
    copy(f"{run}@0", tmp_path / "to")
    assert steps(tmp_path / "to") == [0] and steps(run) == [0, 1]
    copy(f"{run}@latest", tmp_path / "to")
    assert steps(tmp_path / "to") == [0, 1]


@pytest.fixture
def through(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Fault], FaultyBackend]:
    """`through(url, fault)`: copies meet that fault at that run."""

    def begin(url: str, *faults: Fault) -> FaultyBackend:
        faulty = FaultyBackend(LocalBackend(url), faults)

        def choose(u: str, **more: Any) -> Backend:
            return faulty if u == url else LocalBackend(u)

        monkeypatch.setattr("ckpt.offline.copy.backend_for", choose)
        return faulty

    return begin


def test_a_fault_at_every_call_at_the_target(
    run: Path, quick_folder: Path, through: Callable[..., FaultyBackend]
) -> None:
    """Whatever fails, what is committed there is whole; the next copy completes it, and sends no pack twice."""
    target = str(quick_folder / "count")
    counted = through(target)
    copy(run, target)
    calls = counted.calls
    for i, (verb, _) in enumerate(calls):
        target = str(quick_folder / str(i))
        through(target, Fault(verb, "error", nth=sum(v == verb for v, _ in calls[: i + 1])))
        with pytest.raises(CkptError):
            copy(run, target)
        whole = steps(target)
        for step in whole:
            with ckpt.open(f"{target}@{step}") as c:
                assert c.verify().ok
        through(target)
        report = copy(run, target)
        assert len(report.present) == len(whole) and files(Path(target)) == files(run)


def test_what_was_half_sent_is_sent_again(run: Path, tmp_path: Path) -> None:
    """A pack of the right length with wrong bytes, as a crash leaves it on a disk, and no commit."""
    target = tmp_path / "to"
    shutil.copytree(run, target)
    folder = catalog.list_run(LocalBackend(str(run))).committed[0].folder
    (target / folder / "commit.json").unlink()
    pack = next((target / folder).rglob("rank-*"))
    pack.write_bytes(bytes(pack.stat().st_size))
    assert copy(run, target).copied == (folder,)
    assert files(target) == files(run)


def test_damage_is_not_copied(run: Path, tmp_path: Path) -> None:
    folder = catalog.list_run(LocalBackend(str(run))).committed[0].folder
    pack = next((run / folder).rglob("rank-*"))
    data = bytearray(pack.read_bytes())
    data[-5000] ^= 1
    pack.write_bytes(data)
    with pytest.raises(IntegrityError, match="ckpt verify"):
        copy(run, tmp_path / "to")
    assert steps(tmp_path / "to") == [] and not list((tmp_path / "to").rglob("rank-*"))


def test_a_target_that_loses_bytes_is_found_out(
    run: Path, tmp_path: Path, through: Callable[..., FaultyBackend]
) -> None:
    through(str(tmp_path / "to"), Fault("write", "short"))
    with pytest.raises(IntegrityError):
        copy(run, str(tmp_path / "to"))
    assert steps(tmp_path / "to") == []


def test_another_step_of_the_same_name(run: Path, tmp_path: Path) -> None:
    ckpt.save(state(5), tmp_path / "to", step=7)
    ckpt.save(state(6), tmp_path / "from", step=7)
    before = files(tmp_path / "to")
    with pytest.raises(ConflictError, match="another run"):
        copy(tmp_path / "from", tmp_path / "to")
    assert files(tmp_path / "to") == before


def test_a_save_that_is_under_way_keeps_its_name(run: Path, tmp_path: Path) -> None:
    target = LocalBackend(str(tmp_path / "to"))
    folder = catalog.list_run(LocalBackend(str(run))).committed[0].folder
    target.create(f"{folder}/a0/attempt.json", b"of another writer")
    with pytest.raises(ConflictError, match="ckpt prune"):
        copy(run, tmp_path / "to")
    assert target.fetch(f"{folder}/a0/attempt.json", 99) == b"of another writer" and steps(tmp_path / "to") == []


def test_a_mirror_forgets_what_the_source_has_not(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "to"
    copy(run, target)
    ckpt.save(state(3), target, step=3)
    shell = CliRunner()
    assert shell.invoke(cli, ["cp", str(run), str(target), "--mirror"]).exit_code == 2
    told = json.loads(shell.invoke(cli, ["cp", str(run), str(target), "--mirror", "--dry-run", "--json"]).stdout)
    assert told["dry_run"] and told["removed"] == ["step-00000003.g0000"] and 3 in steps(target)
    copy(run, target)
    assert 3 in steps(target)
    done = shell.invoke(cli, ["cp", str(run), str(target), "--mirror", "--yes"])
    assert done.exit_code == 0 and "deleted" in done.output and steps(target) == [0, 1]
    with pytest.raises(UsageError, match="whole run"):
        plan_copy(f"{run}@0", target, mirror=True)


def test_the_shell(run: Path, tmp_path: Path) -> None:
    shell = CliRunner()
    result = shell.invoke(cli, ["cp", str(run), f"memory://{tmp_path.name}/x"])
    assert result.exit_code == 0 and "2 steps" in result.output
    assert steps(f"memory://{tmp_path.name}/x") == [0, 1]
    assert shell.invoke(cli, ["cp", str(tmp_path / "none"), str(tmp_path / "to")]).exit_code == 3
    assert shell.invoke(cli, ["cp", str(run), f"{tmp_path}/to@3"]).exit_code == 2


def test_nothing_to_copy(tmp_path: Path) -> None:
    for src in (tmp_path / "none", f"{tmp_path}/none@3"):
        with pytest.raises(NotFoundError):
            copy(src, tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_a_step_that_is_committed_meanwhile_is_not_touched(run: Path, tmp_path: Path) -> None:
    """By another copy of the same step, after this one has looked for its commit."""
    copy(run, tmp_path / "to")
    (pack,) = (tmp_path / "to").glob("step-00000000.*/a0/rank-*")
    pack.write_bytes(pack.read_bytes()[:-1])
    before = files(tmp_path / "to")
    source, target = LocalBackend(str(run)), LocalBackend(str(tmp_path / "to"))
    assert copy_step(source, target, pack.parents[1].name) == (0, True)
    assert files(tmp_path / "to") == before
