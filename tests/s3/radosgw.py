"""Ceph's S3 gateway on this machine, for a test session: one monitor, one store, one gateway, all below one folder.

Needs Debian's packages ceph-mon, ceph-osd and radosgw, but neither root nor a running systemd. Its processes end with
the one that started them, however that ends.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin", "setpriv")

# What is not obvious: without `ms mon client mode = crc` the gateway insists on encrypted connections to the monitor,
# which need the authentication that is off here; without tcp_nodelay a small GET takes 44 ms; the watch timeout and the
# heartbeat grace shorten what a crash of the gateway or the store holds up; what is deleted takes room for two hours
# unless the garbage collector is told otherwise, and a store that is full makes its clients wait for ever.
CONFIG = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{monitor}/0]
public network = 127.0.0.0/8
ms bind msgr1 = false
ms mon client mode = crc
auth cluster required = none
auth service required = none
auth client required = none
admin socket =
run dir = {folder}
log file = {folder}/$name.log
log to stderr = false
mon allow pool size one = true
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd heartbeat interval = 2
osd heartbeat grace = 5
rgw rados pool pg num min = 4
[mon]
mon data = {folder}/mon
mon data avail warn = 2
mon data avail crit = 1
paxos propose interval = 0.05
paxos min wait = 0.02
[osd]
osd data = {folder}/osd
osd objectstore = bluestore
bluestore block create = true
bluestore block size = {size}
bluestore block preallocate file = false
bluestore cache autotune = false
bluestore cache size = 67108864
osd memory target = 939524096
osd client watch timeout = 4
osd class load list = *
osd class default list = *
osd op num shards = 2
osd op num threads per shard = 1
[client.rgw]
rgw data = {folder}/rgw
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw thread pool size = 32
rgw run sync thread = false
rgw dynamic resharding = false
rgw enable usage log = false
rgw enable ops log = false
rgw enable quota threads = false
rgw gc obj min wait = 5
rgw gc processor period = 5
rgw gc processor max time = 60
"""


def missing() -> list[str]:
    """The programs that are not installed."""
    return [p for p in PROGRAMS if shutil.which(p) is None]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Radosgw:
    """Started on construction, in about 10 s; keeps up to `gib`. Data outlives the death of any of its processes."""

    def __init__(self, folder: Path, gib: int = 8) -> None:
        self.folder = folder
        self.port = free_port()
        self.access_key, self.secret_key = "TEST" + secrets.token_hex(8).upper(), secrets.token_hex(20)
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("mon", "osd", "rgw"):
            (folder / name).mkdir(parents=True)
        fsid, store, monitor = str(uuid.uuid4()), str(uuid.uuid4()), free_port()
        self._config = folder / "ceph.conf"
        self._config.write_text(
            CONFIG.format(fsid=fsid, monitor=monitor, folder=folder, port=self.port, size=gib << 30)
        )
        try:
            self._do("monmaptool", "--create", "--fsid", fsid, "--set-min-mon-release", "pacific",
                     "--addv", "a", f"[v2:127.0.0.1:{monitor}/0]", str(folder / "map"), config=False)  # fmt: skip
            self._do("ceph-mon", "--mkfs", "-i", "a", "--monmap", str(folder / "map"))
            self._begin("mon", "ceph-mon", "-i", "a")
            self._do("ceph", "osd", "new", store, "0")
            self._do("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", store)
            self._begin("osd", "ceph-osd", "-i", "0")
            self._do("radosgw-admin", "-n", "client.rgw", "user", "create", "--uid=test", "--display-name=test",
                     f"--access-key={self.access_key}", f"--secret-key={self.secret_key}")  # fmt: skip
            self.begin_gateway()
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pids(self) -> list[int]:
        """Of all its processes that run."""
        return [process.pid for process in self._running.values()]

    def begin_gateway(self) -> None:
        """Starts the gateway and waits until it answers."""
        self._begin("rgw", "radosgw", "-n", "client.rgw")
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(self.url, timeout=2).close()
                return
            except urllib.error.HTTPError:
                return
            except OSError as e:
                if time.monotonic() > deadline or self._running["rgw"].poll() is not None:
                    raise RuntimeError(f"radosgw does not answer; see {self.folder}") from e
                time.sleep(0.05)

    def kill_gateway(self) -> None:
        """SIGKILL: what it was doing is not done."""
        process = self._running.pop("rgw")
        process.kill()
        process.wait()

    def kill(self) -> None:
        """SIGKILL of the whole cluster: the gateway, the store and the monitor."""
        for process in self._running.values():
            process.kill()
        for process in self._running.values():
            process.wait()
        self._running.clear()

    def begin(self) -> None:
        """Starts the whole cluster on the data that it has, and waits until it answers; some 15 s after a crash."""
        self._begin("mon", "ceph-mon", "-i", "a")
        self._begin("osd", "ceph-osd", "-i", "0")
        self.begin_gateway()

    def close(self) -> None:
        for process in reversed(self._running.values()):
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.wait()
        self._running.clear()

    def _do(self, *command: str, config: bool = True) -> None:
        more = ("-c", str(self._config)) if config else ()
        done = subprocess.run(
            [*command, *more], cwd=self.folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=60
        )
        if done.returncode:
            raise RuntimeError(f"{command[0]} failed: {done.stderr.decode()[-2000:]}")

    def _begin(self, name: str, *command: str) -> None:
        with open(self.folder / f"{name}.out", "ab") as out:
            self._running[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *command, "-f", "-c", str(self._config)],
                cwd=self.folder, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip
