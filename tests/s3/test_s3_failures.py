"""What can go wrong between us and an object store: nothing committed is lost, nothing is half-published, no storm."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import runs
from proxy import Proxy, Rule, proxy

from ckpt.backends import backend_for
from ckpt.backends.base import KeepsUploads
from ckpt.backends.faulty import Fault, FaultyBackend
from ckpt.backends.s3_client import client_for
from ckpt.errors import CkptError, ConflictError, NotFoundError, StorageError
from ckpt.offline.copy import copy
from ckpt.offline.prune import carry_out, plan_prune

REQUESTS = {
    "list": r"GET .*list-type=2",
    "claim": r"PUT .*attempt\.json",
    "head": r"HEAD .*rank-",
    "begin": r"POST .*\?uploads",
    "part": r"PUT .*partNumber",
    "complete": r"POST .*uploadId=",
    "manifest": r"PUT .*manifest",
    "commit": r"PUT .*commit\.json",
}


@pytest.fixture(scope="module")
def proxied(server: Any) -> Iterator[Proxy]:
    with proxy(server.url) as found:
        yield found


@pytest.fixture
def between(url: str, proxied: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy that the environment names as the server; the run has a step 1, which must not be lost."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxied.url)
    runs.save(backend_for(url), 1)
    proxied.seen.clear()
    yield proxied
    proxied.rules.clear()


@pytest.mark.parametrize("fault", ["lost", "reset", "busy"])
def test_answers_that_do_not_come_to_a_save(url: str, between: Proxy, fault: str) -> None:
    """Of every kind of request that a save makes, twice each."""
    between.rules += [Rule(what, fault, times=2) for what in REQUESTS.values()]
    runs.save(backend_for(url), 2)
    assert [r.what for r in between.rules if r.times] == []
    assert runs.committed(url) == [1, 2] and runs.check(url) == 2 and runs.check(url, f"{url}@1") == 1


def test_the_requests_of_a_save(url: str, between: Proxy) -> None:
    """Parts, three for a rank's pack, five for the rest: each request is a wait."""
    runs.save(backend_for(url), 2)
    parts = sum("partNumber" in request for request in between.seen)
    assert parts == 2 and len(between.seen) <= parts + 3 + 5


@pytest.mark.parametrize("fault", ["lost", "reset", "busy", "torn"])
def test_answers_that_do_not_come_to_a_load(url: str, between: Proxy, fault: str) -> None:
    what = [r"GET .*list-type=2", r"GET .*commit\.json", r"GET .*manifest", r"GET .*rank-"]
    between.rules += [Rule(w, fault, times=2) for w in what]
    assert runs.check(url) == 1
    assert [r.what for r in between.rules if r.times] == []


def test_answers_that_do_not_come_to_a_prune(url: str, between: Proxy) -> None:
    upload = backend_for(url).new("step-00000007.g0000/a0/rank-00000.safetensors", 20 << 20)
    between.rules += [Rule(w, "lost", times=2) for w in (r"DELETE ", r"GET .*\?.*uploads", r"GET .*list-type=2")]
    assert prune(url) == ["upload"]
    assert [r.what for r in between.rules if r.times] == [] and uploads(url) == []
    upload.abort()
    assert runs.committed(url) == [1]


@pytest.mark.parametrize("fault", ["lost", "reset", "busy"])
def test_answers_that_do_not_come_to_a_copy(url: str, between: Proxy, fault: str) -> None:
    """Of every kind of request that a copy makes, twice each."""
    what = [
        r"GET .*list-type=2",
        r"GET .*commit\.json",
        r"GET .*manifest",
        r"GET .*rank-",
        r"HEAD .*rank-",
        r"DELETE .*rank-",
    ]
    between.rules += [Rule(w, fault, times=2) for w in (*what, *REQUESTS.values()) if w != REQUESTS["list"]]
    assert copy(url, f"{url}-copy").copied == ("step-00000001.g0000",)
    assert [r.what for r in between.rules if r.times] == []
    assert runs.committed(f"{url}-copy") == [1] == runs.committed(url) and runs.check(f"{url}-copy") == 1


def prune(url: str) -> list[str]:
    """Kinds of the leftovers that are deleted."""
    backend = backend_for(url)
    done = carry_out(backend, plan_prune(backend, (), 0.0), (), 0.0)
    return [d.kind for d in done.delete]


def uploads(url: str) -> list[str]:
    backend = backend_for(url)
    assert isinstance(backend, KeepsUploads)
    return [u.path for u in backend.unfinished()]


def test_a_store_that_stays_away(url: str, between: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The save fails after its patience, names the remedy, leaves nothing of its parts; the next one works."""
    monkeypatch.setattr(client_for({}), "patience", 1.0)
    between.rules.append(Rule(r"PUT .*partNumber=2", "busy", times=10**6))
    with pytest.raises(StorageError, match=r"503 SlowDown.*AWS_ENDPOINT_URL"):
        runs.save(backend_for(url), 2)
    assert len(between.seen) < 60
    between.rules.clear()
    assert runs.committed(url) == [1] and uploads(url) == []
    runs.save(backend_for(url), 2)
    assert runs.committed(url) == [1, 2]


def test_an_upload_whose_end_is_unknown(url: str, between: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_for({}), "patience", 0.5)
    between.rules.append(Rule(r"POST .*uploadId=", "lost", times=10**6))
    runs.save(backend_for(url), 2)  # it was done: the object says whose it is
    between.rules[0].fault = "reset"
    with pytest.raises(StorageError, match="complete_multipart_upload"):
        runs.save(backend_for(url), 3)
    between.rules.clear()
    assert runs.committed(url) == [1, 2] and uploads(url) == []


@pytest.mark.parametrize("when", ["part", "commit"])
def test_the_gateway_killed_in_mid_save(url: str, server: Any, between: Proxy, when: str) -> None:
    if server.gateway is None:
        pytest.skip("moto keeps nothing when it dies")
    rule = Rule(REQUESTS[when], "held" if when == "commit" else "reset")
    between.rules.append(rule)
    with ThreadPoolExecutor(1) as thread:
        saving = thread.submit(runs.save, backend_for(url), 2)
        assert rule.reached.wait(60)
        server.gateway.kill_gateway()
        rule.until.set()
        server.gateway.begin_gateway()
        saving.result(60)
    assert runs.committed(url) == [1, 2] and runs.check(url) == 2


def test_the_gateway_killed_in_mid_load(url: str, server: Any, between: Proxy) -> None:
    if server.gateway is None:
        pytest.skip("moto keeps nothing when it dies")
    rule = Rule(r"GET .*rank-", "reset")
    between.rules.append(rule)
    with ThreadPoolExecutor(1) as thread:
        loading = thread.submit(runs.check, url)
        assert rule.reached.wait(60)
        server.gateway.kill_gateway()
        server.gateway.begin_gateway()
        assert loading.result(60) == 1


def test_of_two_writers_of_one_step_one_commits(url: str) -> None:
    """Both have written everything, and meet in front of the commit."""
    runs.save(backend_for(url), 1)
    gate = threading.Barrier(2)

    class Meet(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            gate.wait(60)
            return True

    def work(version: int) -> int | CkptError:
        backend = FaultyBackend(backend_for(url), [Fault("create", "delay", "*/commit.json", until=Meet())])
        try:
            runs.save(backend, 2, version)
            return version
        except CkptError as e:
            return e

    for _ in range(2):
        with ThreadPoolExecutor(2) as pool:
            got = list(pool.map(work, (20, 30)))
        won = [g for g in got if isinstance(g, int)]
        assert len(won) == 1 and [type(g) for g in got if not isinstance(g, int)] == [ConflictError]
        assert runs.check(url) == won[0]
        backend_for(url).delete("step-00000002.g0000/commit.json")


def test_a_commit_whose_answer_is_lost_is_not_anothers(url: str, between: Proxy) -> None:
    """Two writers with the very same bytes: the write id tells them apart."""
    backend_for(url).create("gen-0001.json", b"same")
    between.rules.append(Rule(r"PUT .*gen-0002", "lost"))
    backend_for(url).create("gen-0002.json", b"same")
    for name in ("gen-0001.json", "gen-0002.json"):
        with pytest.raises(ConflictError):
            backend_for(url).create(name, b"same")


def test_a_client_that_dies_in_mid_upload(url: str) -> None:
    """What it had stored is found and removed, but not while it may be under way."""
    path = "step-00000005.g0000/a0/rank-00000.safetensors"
    code = (
        "import os, signal, sys\nfrom ckpt.backends import backend_for\n"
        f"upload = backend_for(sys.argv[1]).new({path!r}, 64 << 20)\n"
        "upload.write(0, memoryview(bytes(6 << 20)))\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, url]).returncode == -signal.SIGKILL
    runs.save(backend_for(url), 5)
    assert uploads(url) == [path]
    assert plan_prune(backend_for(url), (), 3600.0).delete == ()
    (found,) = plan_prune(backend_for(url), (), 0.0).delete
    assert found.kind == "upload" and found.path.startswith(f"{path}?")
    assert prune(url) == ["upload"] and uploads(url) == []
    assert runs.committed(url) == [5] and runs.check(url) == 5


def test_a_writer_whose_upload_was_removed_is_told(url: str) -> None:
    backend = backend_for(url)
    upload = backend.new("a/b", 20 << 20)
    upload.write(0, memoryview(bytes(6 << 20)))
    assert prune(url) == ["upload"]
    with pytest.raises((StorageError, NotFoundError)):
        upload.write(6 << 20, memoryview(bytes(14 << 20)))
        upload.finish()
    upload.abort()
    with pytest.raises(NotFoundError):
        backend.size("a/b")


def test_the_object_of_another_is_not_taken_for_ones_own(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same name and size, finished while our upload was removed. radosgw answers 500 to that, for ever."""
    backend, size = backend_for(url), 9 << 20
    ours, theirs = backend.new("a/b", size), backend.new("a/b", size)
    ours.write(0, memoryview(bytes(size)))
    theirs.write(0, memoryview(b"1" * size))
    theirs.finish()
    assert prune(url) == ["upload"]
    monkeypatch.setattr(client_for({}), "patience", 1.0)
    with pytest.raises(StorageError, match=r"removed the upload|complete_multipart_upload failed"):
        ours.finish()
    ours.abort()
    assert backend.fetch("a/b", size) == b"1" * size


@pytest.mark.parametrize("which", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials(url: str, server: Any, between: Proxy, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if server.gateway is None:
        pytest.skip("moto believes every signature")
    with monkeypatch.context() as patch:
        patch.setenv(which, "WRONG" * 5)
        for verb in (lambda: runs.save(backend_for(url), 2), lambda: runs.check(url)):
            with pytest.raises(StorageError, match=which) as caught:
                verb()
            assert "WRONG" not in str(caught.value)
    assert len(between.seen) == 2
    assert runs.committed(url) == [1]


def test_no_credentials_at_all(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(StorageError, match="AWS_PROFILE"):
        runs.save(backend_for(url), 2)


@pytest.mark.parametrize("request_", ["part", "complete", "commit"])
def test_credentials_that_expire_in_mid_save(url: str, between: Proxy, request_: str) -> None:
    between.rules.append(Rule(REQUESTS[request_], "expired", times=10**6))
    with pytest.raises(StorageError, match="have expired; get new ones"):
        runs.save(backend_for(url), 2)
    assert len(between.seen) < 40
    between.rules.clear()
    assert runs.committed(url) == [1] and runs.check(url) == 1 and uploads(url) == []


def test_a_bucket_that_does_not_exist(url: str) -> None:
    nowhere = "s3://no-such-bucket-here/run"
    for verb in (lambda: runs.save(backend_for(nowhere), 1), lambda: runs.check(nowhere)):
        with pytest.raises(NotFoundError, match=r"no bucket 'no-such-bucket-here'; create it"):
            verb()
    with pytest.raises(CkptError):
        backend_for(nowhere).create("a", b"")
    with pytest.raises(CkptError):
        backend_for(nowhere).new("a", 20 << 20)


def test_credentials_are_shown_nowhere(
    url: str, server: Any, proxied: Proxy, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In no object of a run, no log of ours at any level, no error."""
    said: list[str] = []
    with caplog.at_level(logging.DEBUG, "ckpt"):
        for u in (url, url.replace("s3://", "s3a://")):
            backend = backend_for(u)
            runs.save(backend, 1 if u == url else 2)
            said.append(repr(backend) + repr(vars(backend).get("root")))
            with monkeypatch.context() as patch:
                patch.setenv("AWS_ENDPOINT_URL", proxied.url)
                proxied.rules[:] = [Rule("", "expired", times=10**6)]
                for verb in (lambda b=u: runs.save(backend_for(b), 3), lambda b=u: runs.check(b)):
                    with pytest.raises(CkptError) as caught:
                        verb()
                    said.append(str(caught.value))
    proxied.rules.clear()
    stored = runs.everything(backend_for(url))
    assert len(stored) == 8 and len(said) == 6
    texts = [*said, *(r.getMessage() for r in caplog.records if r.name.startswith("ckpt"))]
    for secret in (server.access_key, server.secret_key):
        assert secret in os.environ.values()
        assert not [t for t in texts if secret in t]
        assert not [path for path, data in stored.items() if secret.encode() in data]
