"""sftp://, through fsspec's own implementation and a server on the loopback."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sftpd
import torch
from backend_contract import BackendContract

import ckpt
from ckpt.backends import Backend, backend_for
from ckpt.errors import StorageError


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with sftpd.served(tmp_path_factory.mktemp("sftp")) as found:
        yield found


@pytest.fixture
def url(port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FSSPEC_SFTP_PASSWORD", sftpd.PASSWORD)
    from fsspec.config import conf, set_conf_env

    monkeypatch.setitem(conf, "sftp", {})
    set_conf_env(conf)
    conf["sftp"] |= {"look_for_keys": False, "allow_agent": False}
    return f"sftp://{sftpd.USER}@127.0.0.1:{port}/{tmp_path.name}"


class TestSftp(BackendContract):
    """All of it but that a small object is seen whole or not at all: what is seen half-written is taken for damaged."""

    test_readers_see_all_or_nothing = None  # type: ignore[assignment]

    @pytest.fixture
    def make(self, url: str) -> Callable[[], Backend]:
        return lambda: backend_for(url)


def test_a_run(url: str) -> None:
    """Saved, listed, loaded, verified, by its URL alone."""
    for step in (1, 2):
        ckpt.save({"w": torch.arange(300_000) + step}, url, step=step)
    state = {"w": torch.zeros(300_000, dtype=torch.int64)}
    assert ckpt.load(state, url).step == 2 and torch.equal(state["w"], torch.arange(300_000) + 2)
    with ckpt.open(f"{url}@1") as c:
        assert c.verify().ok


def test_a_wrong_password(url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "ckpt")
    options = {"password": "not-" + sftpd.PASSWORD}
    with pytest.raises(StorageError) as caught:
        backend_for(url, storage_options=options)
    assert sftpd.PASSWORD not in f"{caught.value}{caplog.text}"
