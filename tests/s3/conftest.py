"""S3 servers for the session, each started once; and the environment through which every client finds them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "contract"))

import radosgw

from ckpt.backends.s3_client import client_for

BUCKET = "ckpt-tests"


@dataclass(frozen=True)
class Server:
    """Where an S3 server answers, and to whom. `gateway`: to be killed and started again, if it is radosgw."""

    name: str
    url: str
    access_key: str
    secret_key: str
    gateway: radosgw.Radosgw | None = None

    @property
    def env(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        }


@pytest.fixture(scope="session")
def rados() -> Iterator[Server]:
    """radosgw; skips where it is not installed, but never in CI."""
    lacking = radosgw.missing()
    if lacking:
        reason = f"not installed: {', '.join(lacking)}; run `make s3-server`"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="ckpt-radosgw-") as folder:
        gateway = radosgw.Radosgw(Path(folder))
        server = Server("radosgw", gateway.url, gateway.access_key, gateway.secret_key, gateway)
        try:
            make_bucket(server)
            yield server
        finally:
            gateway.close()


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """moto's server: it knows the newer conditions, and believes every signature."""
    port = radosgw.free_port()
    with open(tmp_path_factory.mktemp("moto") / "out", "wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=out, stderr=out
        )
    server = Server("moto", f"http://127.0.0.1:{port}", "any", "any")
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{server.url}/moto-api/", timeout=2).close()
                break
            except urllib.error.HTTPError:
                break
            except OSError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise
                time.sleep(0.05)
        make_bucket(server)
        yield server
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Server:
    """The most real server there is: radosgw, else moto."""
    stand_in = radosgw.missing() and os.environ.get("CI") != "true"
    found: Server = request.getfixturevalue("moto" if stand_in else "rados")
    return found


def make_bucket(server: Server) -> None:
    with pytest.MonkeyPatch.context() as patch:
        as_env(patch, server)
        client_for({}).call("create_bucket", BUCKET, "")


def as_env(patch: pytest.MonkeyPatch, server: Server) -> None:
    for name in [n for n in os.environ if n.startswith(("AWS_", "FSSPEC_"))]:
        patch.delenv(name)
    for name, value in server.env.items():
        patch.setenv(name, value)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Server], str]:
    """`use(server)` makes it the one of the environment, and returns the URL of a folder of its own there."""

    def begin(server: Server) -> str:
        as_env(monkeypatch, server)
        return f"s3://{BUCKET}/{uuid.uuid4().hex}"

    return begin


@pytest.fixture
def url(server: Server, use: Callable[[Server], str]) -> str:
    return use(server)
