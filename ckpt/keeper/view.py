"""What the keepers of this host hold, for people."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt.errors import CkptError
from ckpt.keeper.protocol import Connection, frame, own_peer, receive, send

__all__ = ["HeldStep", "KeeperView", "keepers_here"]

_PATIENCE = 5.0  # seconds


@dataclass(frozen=True)
class HeldStep:
    """A step that a keeper holds whole or in part: the packs of `ranks`, `bytes` in all."""

    step: int
    generation: int
    ranks: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class KeeperView:
    """A keeper: process `pid` of `host`, of a job that saves to `run`; the keeper of host `lead` decides for all.

    `address`: where the keepers of other hosts reach it, "" with one host; `trainers`: pid by rank, of those connected;
    `memory`: bytes of all its slots, `parity`: of what it keeps for other hosts, beside that. `group`: the hosts that keep
    parity of one another, of `code` (data, parity) chunks a stripe; `announced`: (generation, step) that was protected
    last; `lost`: hosts that the keeper which leads has lost sight of; `trouble`: why it could not be asked, with nothing else known but the pid.
    """

    pid: int
    host: str = ""
    run: str = ""
    lead: str = ""
    address: str = ""
    trainers: Mapping[int, int] | None = None
    steps: tuple[HeldStep, ...] = ()
    memory: int = 0
    parity: int = 0
    group: tuple[str, ...] = ()
    code: tuple[int, ...] = ()
    announced: tuple[int, int] | None = None
    lost: tuple[str, ...] = ()
    trouble: str = ""


def keepers_here() -> list[KeeperView]:
    """The keepers on this host of this user; of all users for root. By run."""
    names = set()
    for line in Path("/proc/net/unix").read_text().splitlines():
        name = line.rpartition(" ")[2]
        user = name.split("-")[1] if name.startswith("@ckpt-") else ""
        if user.isdigit() and os.getuid() in (0, int(user)):
            names.add(name[1:])
    return sorted(filter(None, map(_ask, names)), key=lambda k: (k.run, k.host, k.pid))


def _ask(name: str) -> KeeperView | None:
    """What a keeper says; nothing if there is none any more."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(_PATIENCE)
        try:
            sock.connect(f"\0{name}")
        except OSError:
            return None
        pid = 0
        try:
            pid = own_peer(sock)
            send(sock, frame("look", id=1))
            return _view(pid, receive(sock, Connection(sock)).head)
        except CkptError as e:
            return KeeperView(pid, trouble=str(e))


def _view(pid: int, head: Mapping[str, Any]) -> KeeperView:
    steps = [
        HeldStep(int(s["step"]), int(s["generation"]), tuple(int(r) for r in s["ranks"]), int(s["bytes"]))
        for s in head["steps"]
    ]
    return KeeperView(
        pid=pid,
        host=str(head["host"]),
        run=str(head["run"]),
        lead=str(head["lead"]),
        address=str(head["address"]),
        trainers={int(t["rank"]): int(t["pid"]) for t in head["trainers"]},
        steps=tuple(sorted(steps, key=lambda s: (s.generation, s.step))),
        memory=int(head["memory"]),
        parity=int(head.get("parity", 0)),  # a keeper that was started by an older version tells nothing of it
        group=tuple(str(h) for h in head.get("group", ())),
        code=tuple(int(n) for n in head.get("code", ())),
        announced=_key(head.get("announced")),
        lost=tuple(str(h) for h in head.get("lost", ())),
    )


def _key(told: Any) -> tuple[int, int] | None:
    return (int(told[0]), int(told[1])) if told else None
