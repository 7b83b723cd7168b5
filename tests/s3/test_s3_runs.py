"""A run on S3 is used as one on a disk is: from Python, from the shell, by a loop; by other filesystems of fsspec too."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from click.testing import CliRunner
from fsspec.config import conf
from proxy import proxy

import ckpt
from ckpt.backends import backend_for
from ckpt.backends.s3 import S3Backend
from ckpt.backends.s3_client import client_for
from ckpt.cli import cli
from ckpt.errors import ConflictError, UsageError


def told(*args: object, code: int = 0) -> dict[str, Any]:
    """The JSON that a verb prints."""
    result = CliRunner().invoke(cli, [*(str(a) for a in args), "--json"])
    assert result.exit_code == code, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def test_save_load_open(url: str) -> None:
    for step in (1, 2):
        report = ckpt.save(runs.state(step), url, step=step, metrics={"loss": 1 / step})
        assert report.ref == f"{url}/step-{step:08d}.g0000"
    assert runs.check(url) == 2 == runs.check(url, f"{url}@best") and runs.check(url, f"{url}@1") == 1
    assert runs.check(url, report.ref) == 2
    with ckpt.open(f"{url}@1") as c:
        assert c.tensors["w"][5:7].tolist() == [6, 7] and c.objects["note"] == 1 and c.verify().ok
    with pytest.raises(ConflictError):
        ckpt.save(runs.state(3), url, step=2)
    assert runs.check(url) == 2


def test_the_shell(url: str) -> None:
    for step in (1, 2):
        ckpt.save(runs.state(step), url, step=step)
    assert [s["step"] for s in told("ls", url)["steps"]] == [1, 2]
    assert told("verify", f"{url}@1")["ok"]
    other = f"{url}-other"
    assert told("reshard", f"{url}@2", other, "--ranks", 3)["packs"] == 3
    assert runs.check(other) == 2
    assert told("diff", f"{url}@2", other)["same"]
    assert [d["kind"] for d in told("prune", url, "--keep-last", 1, "--yes")["delete"]] == ["step"]
    assert runs.committed(url) == [2] and runs.check(url) == 2
    told("ls", f"s3://no-such-{uuid.uuid4().hex}/run", code=3)


def test_a_loop(url: str) -> None:
    """Saves in the background, retention, a new life that goes on where the last one ended."""
    for life in range(2):
        state = {"w": torch.zeros(1000), "n": 0}
        with ckpt.Checkpointer(url, state, storage=ckpt.Every(2), keep=[ckpt.KeepLast(2)]) as cp:
            start = cp.restore()
            assert start == 6 * life and state["n"] == (0 if life == 0 else start - 1)
            for step in range(start, start + 6):
                state["w"] += 1
                state["n"] = step
                cp.step(step, {"loss": float(step)})
                cp.wait(60)
        assert cp.report.failed == 0 and cp.report.committed == 3
    found = {"w": torch.zeros(1000), "n": 0}
    ckpt.load(found, url)
    assert found["n"] == 11 and found["w"].eq(12).all()
    assert runs.committed(url) == [9, 11]


def test_options_in_place_of_the_environment(url: str, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.save(backend_for(url), 1)
    for name in server.env:
        monkeypatch.delenv(name)
    options = {"key": server.access_key, "secret": server.secret_key, "endpoint_url": server.url}
    assert backend_for(url, storage_options=options).list("")
    monkeypatch.setitem(conf, "s3", options)
    assert runs.check(url) == 1
    with pytest.raises(UsageError, match="password") as caught:
        backend_for("sftp://me:hush@host/run")
    assert "hush" not in str(caught.value)


def test_other_filesystems_of_fsspec_hold_runs(url: str, server: Any, caplog: pytest.LogCaptureFixture) -> None:
    """s3fs, through the same backend as any other filesystem, in the same bucket."""
    other = url.replace("s3://", "s3a://")
    runs.save(backend_for(other), 1)
    assert runs.check(other) == 1 == runs.check(url)
    with pytest.raises(ConflictError):
        backend_for(other).create("step-00000001.g0000/commit.json", b"")
    with pytest.raises(ConflictError):
        backend_for(other).new("step-00000001.g0000/commit.json", 1)
    assert not caplog.records
    backend_for(other).delete("step-00000001.g0000/commit.json")
    assert runs.committed(url) == []


def test_a_store_without_conditions_is_said_once(
    use: Callable[..., str], moto: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A proxy that forgets the condition; moto does not mind that it was signed."""
    url = use(moto)
    with proxy(moto.url) as between, pytest.MonkeyPatch.context() as patch:
        between.dropped.add("if-none-match")
        patch.setenv("AWS_ENDPOINT_URL", between.url)
        with caplog.at_level(logging.WARNING, "ckpt"):
            for name in ("a", "b"):
                backend_for(url).create(name, b"1")
                with pytest.raises(ConflictError):
                    backend_for(url).create(name, b"2")
                assert backend_for(url).fetch(name, 9) == b"1"
        assert len([r for r in caplog.records if "two jobs" in r.message]) == 1
        assert client_for({}).exclusive == {"ckpt-tests": False}


def test_an_upload_uses_few_requests(use: Callable[..., str], server: Any) -> None:
    """Of the parts, three a rank, and five more."""
    url = use(server)
    with proxy(server.url) as between, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", between.url)
        runs.save(S3Backend(url), 1)
        between.seen.clear()
        runs.save(S3Backend(url), 2)
        parts = len([r for r in between.seen if "partNumber" in r])
        assert parts > 1 and len(between.seen) <= parts + 3 + 5


def test_copies_to_and_fro(url: str, tmp_path: Path) -> None:
    ckpt.save(runs.state(1), tmp_path / "run", step=1, metrics={"loss": 1.0})
    assert told("cp", tmp_path / "run", url)["copied"] == ["step-00000001.g0000"]
    assert told("cp", tmp_path / "run", url)["copied"] == []
    assert runs.check(url) == 1
    told("cp", f"{url}@1", f"{url}-other")
    told("cp", f"{url}-other", tmp_path / "back")
    assert runs.everything(backend_for(str(tmp_path / "back"))) == runs.everything(backend_for(str(tmp_path / "run")))
