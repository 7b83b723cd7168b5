"""Hosts on one machine: network namespaces on a bridge, each with an address of its own, which can be cut off or lost.

Where that is not permitted (it takes root, or the right to make networks) hosts have loopback addresses instead, and only
processes can be lost. What runs on a host is started with `command`, or enters it with `enter`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from types import TracebackType

__all__ = ["Hosts"]

_CLONE_NEWNET = 0x40000000
_GONE = 30.0  # seconds


class Hosts:
    """`count` hosts, numbered from 0, and this process beside them, at address `outside`.

    why    why they are no namespaces; "" if they are
    """

    def __init__(self, count: int, *, namespaces: bool = True) -> None:
        self.count, self._tag = count, f"ck{os.getpid() % 100000}"
        self._net = f"10.{200 + os.getpid() // 250 % 50}.{os.getpid() % 250}"
        self.why = "" if namespaces else "network namespaces were not asked for"
        if namespaces:
            try:
                self._make()
            except (OSError, subprocess.CalledProcessError) as e:
                said = e.stderr.decode().strip() if isinstance(e, subprocess.CalledProcessError) else str(e)
                self.close()
                self.why = f"network namespaces are not to be had here ({said})"

    def _make(self) -> None:
        _ip("link", "add", self._tag, "type", "bridge")
        _ip("addr", "add", f"{self.outside}/24", "dev", self._tag)
        _ip("link", "set", self._tag, "up")
        for n in range(self.count):
            inside, out = f"{self._tag}i{n}", f"{self._tag}o{n}"
            _ip("netns", "add", self.namespace(n))
            _ip("link", "add", out, "type", "veth", "peer", "name", inside)
            _ip("link", "set", inside, "netns", self.namespace(n))
            _ip("link", "set", out, "master", self._tag, "up")
            _ip("-n", self.namespace(n), "link", "set", inside, "name", "eth0")
            _ip("-n", self.namespace(n), "addr", "add", f"{self.address(n)}/24", "dev", "eth0")
            _ip("-n", self.namespace(n), "link", "set", "eth0", "up")
            _ip("-n", self.namespace(n), "link", "set", "lo", "up")

    @property
    def outside(self) -> str:
        """Where hosts reach this process."""
        return f"{self._net}.254" if not self.why else "127.0.0.1"

    def namespace(self, n: int) -> str:
        return f"{self._tag}-{n}"

    def address(self, n: int) -> str:
        return f"{self._net}.{n + 1}" if not self.why else f"127.0.0.{n + 2}"

    def environment(self, n: int) -> dict[str, str]:
        """What processes of a host are to find in their environment."""
        return {
            "CKPT_HOST": f"h{n}",
            "CKPT_BIND": self.address(n),
            "GLOO_SOCKET_IFNAME": "lo" if self.why else "eth0",
            "CKPT_ON_HOST": f"{self._tag}.{n}",
        }

    def command(self, n: int, command: Sequence[str]) -> list[str]:
        """A command as it is to be run on a host, with its environment."""
        return [*command] if self.why else ["ip", "netns", "exec", self.namespace(n), *command]

    def enter(self, n: int) -> None:
        """This process, which has one thread, is on a host from now on."""
        if self.why:
            return
        fd = os.open(f"/run/netns/{self.namespace(n)}", os.O_RDONLY)
        try:
            if ctypes.CDLL(None, use_errno=True).setns(fd, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        finally:
            os.close(fd)

    def cut(self, n: int) -> None:
        """Nothing reaches a host any more, nor gets out."""
        if not self.why:
            _ip("link", "set", f"{self._tag}o{n}", "down")

    def heal(self, n: int) -> None:
        if not self.why:
            _ip("link", "set", f"{self._tag}o{n}", "up")

    def pids(self, n: int) -> list[int]:
        """The processes of a host: those in its namespace, and those that were started with its environment."""
        found = set()
        if not self.why:
            found |= {int(pid) for pid in _ip("netns", "pids", self.namespace(n)).split()}
        mark = f"CKPT_ON_HOST={self._tag}.{n}".encode()
        for entry in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError), open(f"/proc/{entry}/environ", "rb") as f:
                if mark in f.read().split(b"\0"):
                    found.add(int(entry))
        return sorted(pid for pid in found - {os.getpid()} if _runs(pid))

    def kill(self, n: int, *, silent: bool = False) -> None:
        """A host is lost with everything on it. `silent`: the others get no word of it, as when it loses power."""
        if silent:
            self.cut(n)
        end = time.monotonic() + _GONE
        while pids := self.pids(n):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > end:
                raise TimeoutError(f"processes {pids} of host {n} do not end")
            time.sleep(0.01)
        self.cut(n)

    def close(self) -> None:
        """Everything on the hosts ends, and they are gone."""
        for n in range(self.count):
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                self.kill(n)
            _try_ip("netns", "del", self.namespace(n))
            _try_ip("link", "del", f"{self._tag}o{n}")
        _try_ip("link", "del", self._tag)

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True).stdout.decode()


def _try_ip(*words: str) -> None:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        _ip(*words)
