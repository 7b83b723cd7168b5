"""What a store, a clock, a client and other readers do over a longer time: the newest committed checkpoint loads bit-exactly."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import runs
from proxy import Rule, proxy

from ckpt.backends import backend_for
from ckpt.errors import StorageError
from ckpt.offline.prune import plan_prune, retain
from ckpt.retention import KeepLast


def test_the_whole_cluster_killed_in_mid_save_and_mid_load(
    url: str, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 of all daemons while one thread saves and another loads; both end well once it is back."""
    if server.gateway is None:
        pytest.skip("moto keeps nothing when it dies")
    with proxy(server.url) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.url)
        runs.save(backend_for(url), 1)
        saving, loading = Rule(r"PUT .*partNumber=2", "reset"), Rule(r"GET .*step-00000001.*rank-", "reset")
        between.rules += [saving, loading]
        with ThreadPoolExecutor(2) as pool:
            save = pool.submit(runs.save, backend_for(url), 2)
            load = pool.submit(runs.check, url, f"{url}@1")
            assert saving.reached.wait(60) and loading.reached.wait(60)
            server.gateway.kill()
            server.gateway.begin()
            save.result(150)
            assert load.result(150) == 1
        assert runs.committed(url) == [1, 2] and runs.check(url) == 2 and runs.check(url, f"{url}@1") == 1


@pytest.mark.parametrize("hours", [2, -2])
def test_a_clock_that_is_wrong(url: str, server: Any, monkeypatch: pytest.MonkeyPatch, hours: int) -> None:
    """What others write is not taken for old because this host's clock is ahead of theirs."""
    runs.save(backend_for(url), 1)
    backend_for(url).create("step-00000009.g0000/a0/attempt.json", b"of a save that is under way")
    upload = backend_for(url).new("step-00000008.g0000/a0/rank-00000.safetensors", 20 << 20)
    real = time.time
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: real() + 3600 * hours)
        assert plan_prune(backend_for(url), (), 3600.0).delete == ()
        assert [d.kind for d in plan_prune(backend_for(url), (), -5.0).delete] == [
            "leftover",
            "upload",
        ]  # to the second
    upload.abort()
    assert runs.committed(url) == [1] and runs.check(url) == 1


def test_a_store_that_refuses_a_wrong_clock(url: str, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """radosgw 16 signs for requests that are hours off; others do not, and then the message says what to do."""
    runs.save(backend_for(url), 1)
    with proxy(server.url) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.url)
        between.rules.append(Rule(r"PUT .*partNumber", "skewed", times=10**6))
        with pytest.raises(StorageError, match="clock of this host is wrong; set it"):
            runs.save(backend_for(url), 2)
        assert len(between.seen) < 40
        assert runs.committed(url) == [1] and runs.check(url) == 1


CHILD = """
import sys
sys.path[:0] = [{here!r}]
import runs
from ckpt.backends import backend_for
from ckpt.errors import CkptError
kept = []
try:
    runs.save(backend_for(sys.argv[1]), 2)
except CkptError as e:
    kept += [e, e.__traceback__, kept]  # alive until the interpreter ends
    print(e.kind, flush=True)
"""


def test_a_client_of_s3fs_whose_store_is_gone_ends(url: str, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of s3fs that fails in `close` and is closed again at exit hangs; none is left behind by a save that failed."""
    other = url.replace("s3://", "s3a://")
    runs.save(backend_for(other), 1)
    with proxy(server.url) as between:
        between.rules.append(Rule(r"(PUT|POST) .*rank-", "reset", times=10**6))
        env = {**os.environ, "AWS_ENDPOINT_URL": between.url, "AWS_MAX_ATTEMPTS": "1"}
        code = CHILD.format(here=str(Path(__file__).parent))
        done = subprocess.run([sys.executable, "-c", code, other], env=env, capture_output=True, text=True, timeout=90)
    assert (done.returncode, done.stdout) == (0, "storage\n"), done.stderr[-2000:]
    assert runs.committed(other) == [1] and runs.check(other) == 1


def test_deletes_race_with_readers(url: str) -> None:
    """One writer that keeps its newest step only, readers of the newest: each gets one whole step, whichever it is."""
    runs.save(backend_for(url), 0)
    over = threading.Event()

    def read() -> list[int]:
        found = []
        while not over.is_set() or not found:
            found.append(runs.check(url))
        return found

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        try:
            for step in range(1, 6):
                runs.save(backend_for(url), step)
                retain(backend_for(url), [KeepLast(1)])
        finally:
            over.set()
        for reader in readers:
            found = reader.result(60)
            assert found == sorted(found)
    assert runs.committed(url) == [5] and runs.check(url) == 5
