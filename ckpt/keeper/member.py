"""A trainer among the keepers of its job: attached to that of its host, introduced to the others."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ckpt.collective import Group, meeting_point
from ckpt.config import settings
from ckpt.errors import CkptError, NotFoundError, PeerError
from ckpt.keeper.holding import ATTEMPT
from ckpt.keeper.link import Link, keeper_name
from ckpt.keeper.loan import Loans
from ckpt.keeper.opening import PATIENCE, packs_of
from ckpt.keeper.protocol import Frame
from ckpt.keeper.recall import Recalled, Step, recall
from ckpt.keeper.source import Line, LocalPack, Pack, SnapshotBackend
from ckpt.snapshot.arena import Slot

__all__ = ["Member", "own_address"]

log = logging.getLogger("ckpt")
Key = tuple[int, int]
Address = tuple[str, int]
_TRIES = 4


class Member:
    """`slots`: this rank's memory, by number, which outlives keepers as they outlive trainers. When this trainer came
    the keeper held memory under numbers below `used`.

    `tail`: the descriptor of this rank's last events, or -1; see `ckpt.events`. Attached on construction. Raises PeerError if there is no keeper to be had, ConflictError if somebody else trains
    this run. `heard` and `ended` are called in a thread of the link's.
    """

    def __init__(
        self,
        run: str,
        rank: int,
        heard: Callable[[Frame], None],
        ended: Callable[[CkptError], None],
        tail: int = -1,
    ) -> None:
        config = settings()
        self._tail = [tail] if tail >= 0 else []
        self._name = keeper_name(run, config.job, config.host)
        self._rank, self._heard, self._ended, self.deadline = rank, heard, ended, config.deadline
        self.slots: dict[int, Slot] = {}
        self.used = 0
        self.ranks: Mapping[str, str] = {}
        self._peers: dict[str, Any] = {}
        self._reach: dict[str, Address] = {}  # keepers by host, also of hosts that have no trainer any more
        self._address = ("", 0)
        self._attach()

    def _attach(self) -> None:
        for left in reversed(range(_TRIES)):
            try:
                return self._attach_once()
            except PeerError:  # it was just about to end; the name is free when it has
                if not left:
                    raise

    def _attach_once(self) -> None:
        self.link = Link(self._name, self._heard, self._ended)
        slots = sorted(self.slots.items())
        answer = self.link.ask(
            "attach", fds=[*(s.fd for _, s in slots), *self._tail], timeout=self.deadline, rank=self._rank,
            bring=[n for n, _ in slots],
        )  # fmt: skip
        self.link.in_use = True
        self.used = int(answer["used"])
        for text in answer["untold"]:
            log.error("ckpt: while no trainer was here, %s", text)
        self._host, self._told = str(answer["host"]), answer.head
        for (number, size), fd in zip(answer["slots"], answer.fds, strict=True):
            if number in self.slots:
                os.close(fd)
            else:
                self.slots[number] = Slot(size, fd=fd)

    def attach_again(self) -> None:
        """After the keeper died: starts another, and hands it this rank's memory."""
        self._attach()
        if self._peers["hosts"]:
            self._listen(self._address[1])  # where the others will look for it
        self._tell_peers()

    def meet(self, group: Group) -> None:
        """Collective: the keepers of all hosts get to know one another. With one host there is nothing to say."""
        mine_told = [self._told[what] for what in ("secret", "newest", "known", "generation")]
        letter = json.dumps([self._host, *mine_told]).encode()
        ranks, secret, known, generation = json.loads(group.round("keepers", letter, _introduce))
        hosts: dict[str, list[Any]] = {}
        if len(set(ranks.values())) > 1:
            try:
                mine: bytes | Exception = json.dumps([self._host, *self._listen(0)]).encode()
            except Exception as e:
                mine = e
            found = group.round("addresses", mine, lambda all_: json.dumps([json.loads(x) for x in all_]).encode())
            hosts = {host: [address, port] for host, address, port in json.loads(found)}
        self.ranks = ranks
        self._peers = {"hosts": hosts, "secret": secret, "lead": ranks["0"], "generation": generation}
        self._reach = {host: (str(a), int(p)) for host, (a, p) in {**known, **hosts}.items()}
        self._tell_peers()

    def recall(self, group: Group, newest: Callable[[], int] | None = None) -> Recalled:
        """Collective: what steps can be had from the memory of the hosts of this life; with `newest`, the last life that
        began, of all hosts that can be reached, and nothing of them is overwritten until the next life begins."""
        kind = "inventory" if newest is None else "pin"
        first = min(int(rank) for rank, host in self.ranks.items() if host == self._host)

        def mine() -> Frame | None:
            return self.link.ask(kind, timeout=self.deadline) if first == self._rank else None

        def ask(host: str, patience: float, wanted: Callable[[], bool]) -> Frame:
            return self._ask_host(host, patience, kind, wanted)

        others = set[str]() if newest is None else self._reach.keys() - set(self.ranks.values())
        return recall(group, mine, others, ask, newest or (lambda: -1))

    def _ask_host(
        self, host: str, patience: float, kind: str, wanted: Callable[[], bool] = lambda: True, **head: Any
    ) -> Frame:
        """Asks the keeper of another host, if that is still `wanted` once it is reached. Raises PeerError if it is not there,
        or what it refuses with."""
        line = Line(self._reach[host], bytes.fromhex(self._peers["secret"]), patience)
        try:
            if not wanted():
                raise PeerError(f"the keeper of {host} was reached too late")
            return line.ask(kind, **head)
        finally:
            line.close()

    def _listen(self, port: int) -> tuple[str, int]:
        address = own_address(settings().bind)
        answer = self.link.ask("listen", timeout=self.deadline, address=address, port=port)
        self._address = address, int(answer["port"])
        return self._address

    def _tell_peers(self) -> None:
        self.link.ask("peers", timeout=self.deadline, **self._peers)

    def open(self, step: Step) -> SnapshotBackend:
        """A step in memory as a backend. NotFoundError if nobody who can be reached has heard of it any more."""
        answer = self.link.ask("open", timeout=self.deadline, key=list(step.key))
        if not answer["there"]:
            answer = self._told_by_others(step)
        folder, cut = str(answer["folder"]), int(answer["cut"])
        objects = {
            f"{folder}/commit.json": answer.payload[:cut],
            f"{folder}/{ATTEMPT}/manifest.safetensors": answer.payload[cut:],
        }
        extents = {int(writer): (int(size), int(start)) for writer, size, start in answer["packs"]}
        writers = [int(writer) for writer in answer.head.get("here", ())]
        mapped = {os.fstat(slot.fd).st_ino: slot.buffer for slot in self.slots.values()}
        here: dict[int, Pack] = {
            w: LocalPack(fd, *extents[w], mapped.get(os.fstat(fd).st_ino))
            for w, fd in zip(writers, answer.fds, strict=True)
        }
        loans = Loans(step.key, bytes.fromhex(self._peers["secret"]), PATIENCE)
        packs, stripes = packs_of(step, extents, here, self._reach, self._host, loans)
        found = {_pack_path(folder, writer): pack for writer, pack in packs.items()}
        return SnapshotBackend(f"memory of {socket.gethostname()}", objects, found, stripes, loans)

    def _told_by_others(self, step: Step) -> Frame:
        """What a keeper of another host says of a step that the one here has never heard of."""
        why = "no keeper is left that has a part of it"
        for name in sorted(step.parts):
            try:
                return self._ask_host(step.hosts[name], PATIENCE, "describe", key=list(step.key))
            except CkptError as e:
                why = str(e)
        raise NotFoundError(f"step {step.key[1]} is no longer in memory: {why}")

    def brought(self, timeout: float | None) -> bool:
        """Waits until nothing is left to bring from the local tier to the run, or trying failed, or nobody is there to try."""
        until = None if timeout is None else time.monotonic() + timeout
        never = threading.Event()
        while self.link.lost is None:
            with suppress(CkptError):
                if self.link.ask("brought", timeout=self.deadline)["quiet"]:
                    return True
            if until is not None and time.monotonic() >= until:
                return False
            never.wait(0.02)
        return True

    def done_reading(self, damaged: Key | None = None) -> None:
        """The step that was opened may go; `damaged` if it is not what was sealed."""
        self.link.tell("done", damaged=list(damaged) if damaged else None)


def _pack_path(folder: str, rank: int) -> str:
    return f"{folder}/{ATTEMPT}/rank-{rank:05d}.safetensors"


def own_address(bind: str) -> str:
    """The address at which other hosts reach this one: as told, else of the interface that leads to where ranks meet."""
    if bind:
        return bind
    rendezvous = meeting_point()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            s.connect((rendezvous, 9))
            return str(s.getsockname()[0])
        except OSError as e:
            raise PeerError(f"no way from this host to {rendezvous} ({e.strerror}); set CKPT_BIND") from None


def _introduce(letters: Sequence[bytes]) -> bytes:
    """([rank: host], the job's secret, address by host, the last life that any keeper took part in).

    The secret is the one that most keepers of those with the newest step know, else a new one; a spare, or a host that was
    away, may know another or none.
    """
    told = [json.loads(text) for text in letters]
    ranks = {str(rank): host for rank, (host, *_) in enumerate(told)}
    newest: dict[str, list[Any]] = {}
    count = Counter(secret for _, secret, *_ in told if secret)
    known: dict[str, list[Any]] = {}
    for _, secret, key, addresses, _ in sorted(told, key=lambda t: (t[2], t[0])):
        newest[secret] = max(key, newest.get(secret, [-1, -1]))
        known |= addresses  # those told by who has newer steps win
    best = max(count, key=lambda secret: (newest[secret], count[secret], secret), default="")
    return json.dumps([ranks, best or os.urandom(32).hex(), known, max(t[4] for t in told)]).encode()
