"""A local tier in front of an object store: what the store does, or does not, is no concern of the loop's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from proxy import Proxy, Rule, proxy

import ckpt
from ckpt.backends import backend_for
from ckpt.backends.base import KeepsUploads
from ckpt.backends.s3_client import client_for
from ckpt.catalog import list_run
from ckpt.keeper.view import keepers_here
from ckpt.offline.prune import carry_out, plan_prune


def job(url: str, disk: Path) -> ckpt.Checkpointer:
    return ckpt.Checkpointer(url, runs.state(0), storage=ckpt.Every(1), local=disk)


def train(cp: ckpt.Checkpointer, start: int, stop: int, brought: bool = True) -> None:
    for n in range(start, stop):
        cp._state["w"].copy_(runs.state(n)["w"])
        cp._state["b"].fill_(float(n))
        cp._state["note"] = n
        handle = cp.step(n)
        assert handle is not None and handle.result(60).step == n
        assert not brought or cp.wait(120)


def local(disk: Path) -> list[int]:
    return [s.step for s in list_run(backend_for(str(disk))).committed]


def test_a_store_that_is_away_and_comes_back(
    url: str, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway is killed while a step is on its way to it. Saves go on; it is brought when the gateway is there again."""
    if server.gateway is None:
        pytest.skip("moto keeps nothing when it dies")
    with proxy(server.url) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.url)
        cp = job(url, tmp_path / "disk")
        assert cp.restore() == 0
        train(cp, 0, 1)
        rule = Rule(r"PUT .*partNumber", "reset")
        between.rules.append(rule)
        train(cp, 1, 2, brought=False)
        assert rule.reached.wait(60)
        server.gateway.kill_gateway()
        train(cp, 2, 4, brought=False)
        assert cp.report.committed == 4 and cp.report.failed == 0
        server.gateway.begin_gateway()
        assert cp.wait(120)
        cp.close()
    assert runs.committed(url) == [0, 1, 2, 3] and runs.check(url) == 3 and runs.check(url, f"{url}@1") == 1


def test_wrong_credentials(
    url: str, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They turn wrong while the job runs: said once, no storm of requests, nothing lost; the next life brings everything."""
    with proxy(server.url) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.url)
        cp = job(url, tmp_path / "disk")
        cp.restore()
        train(cp, 0, 1)
        between.rules.append(Rule(r"PUT|POST", "expired", times=10**6))
        between.seen.clear()
        train(cp, 1, 4)
        assert cp.report.committed == 4 and cp.report.failed == 0 and cp.report.detained == 3
        assert caplog.text.count("did not reach") == 1 and "credentials have expired" in cp.report.last_error
        assert len(between.seen) < 100 and local(tmp_path / "disk") == [1, 2, 3]
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    cp = job(url, tmp_path / "disk")
    assert cp.restore() == 4 and cp._state["note"] == 3 and torch.equal(cp._state["w"], runs.state(3)["w"])
    assert cp.wait(120)
    cp.close()
    assert runs.committed(url) == [0, 1, 2, 3] and runs.check(url) == 3


KEPT = """
import sys, time
from pathlib import Path
sys.path.append({here!r})
import runs, ckpt
cp = ckpt.Checkpointer(sys.argv[1], runs.state(0), memory=ckpt.Every(1), storage=ckpt.Every(1), local=sys.argv[2])
cp.restore()
handle = cp.step(0)
assert handle.result(60).step == 0
time.sleep(600)
"""


@pytest.mark.parametrize("both", [False, True])
def test_a_trainer_dies_between_the_commit_on_the_disk_and_that_in_the_store(
    url: str, between: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, both: bool
) -> None:
    """With a keeper: that brings the step all the same. With the keeper killed at the same point: the next life does."""
    monkeypatch.setenv("CKPT_GRACE", "60")
    rule = Rule(r"PUT .*partNumber", "held")
    between.rules.append(rule)
    code = KEPT.format(here=str(Path(__file__).parent))
    process = subprocess.Popen([sys.executable, "-c", code, url, str(tmp_path / "disk")], env=dict(os.environ))
    try:
        assert rule.reached.wait(90)
        assert local(tmp_path / "disk") == [0] and runs.committed(url) == []
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    [keeper] = [k.pid for k in keepers_here() if k.run == url]
    if both:
        os.kill(keeper, signal.SIGKILL)
        rule.until.set()
        assert runs.committed(url) == []
        cp = ckpt.Checkpointer(url, runs.state(9), memory=ckpt.Every(1), storage=ckpt.Every(1), local=tmp_path / "disk")
        assert cp.restore() == 1 and cp._state["note"] == 0 and cp.wait(120)
        cp.close()
    else:
        rule.until.set()
        end = time.monotonic() + 60
        while runs.committed(url) != [0]:
            assert time.monotonic() < end, "the keeper does not bring it"
            time.sleep(0.02)
        os.kill(keeper, signal.SIGTERM)  # or it would wait for a restart
    assert runs.check(url) == 0


CHILD = """
import sys
from pathlib import Path
sys.path.append({here!r})
from test_s3_tiers import job, train
cp = job(sys.argv[1], Path(sys.argv[2]))
cp.restore()
train(cp, 0, 1)
"""


@pytest.fixture
def between(server: Any, url: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    with proxy(server.url) as found:
        monkeypatch.setenv("AWS_ENDPOINT_URL", found.url)
        yield found


def test_killed_in_the_middle_of_the_trickle(url: str, between: Proxy, tmp_path: Path) -> None:
    """kill -9 once the store has a part, before its answer arrives."""
    rule = Rule(r"PUT .*partNumber", "held")
    between.rules.append(rule)
    code = CHILD.format(here=str(Path(__file__).parent))
    process = subprocess.Popen([sys.executable, "-c", code, url, str(tmp_path / "disk")], env=dict(os.environ))
    try:
        assert rule.reached.wait(90)
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    rule.until.set()
    assert local(tmp_path / "disk") == [0]
    between.rules.clear()
    cp = job(url, tmp_path / "disk")
    assert cp.restore() == 1 and cp._state["note"] == 0 and cp.wait(120)
    train(cp, 1, 2)
    cp.close()
    assert runs.committed(url) == [0, 1] and runs.check(url, f"{url}@0") == 0 and runs.check(url) == 1
    backend = backend_for(url)
    carry_out(backend, plan_prune(backend, (), 0.0), (), 0.0)
    assert isinstance(backend, KeepsUploads) and backend.unfinished() == [] and runs.committed(url) == [0, 1]


def test_the_store_that_is_away_for_good(url: str, between: Proxy, tmp_path: Path, monkeypatch: Any) -> None:
    """Even `close` ends, with everything on the disk."""
    monkeypatch.setattr(client_for({}), "patience", 0.3)
    cp = job(url, tmp_path / "disk")
    cp.restore()
    between.rules.append(Rule(r"PUT|POST|GET|HEAD|DELETE", "reset", times=10**6))
    train(cp, 0, 2)
    report = cp.close()
    assert report.committed == 2 and report.arrived == 0 and local(tmp_path / "disk") == [0, 1]
