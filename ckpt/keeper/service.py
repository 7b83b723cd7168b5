"""What a keeper answers about what it holds, to its own trainers and to whoever proved to be of the job.

    inventory   all that it holds, as `ckpt.keeper.wire.decode_holding` reads it; changes nothing
    pin         the same, and from then on nothing of it is overwritten or let go of, until the next life begins
    describe    {key}: the commit and the manifest of a step, and its packs, as `Held.packs`

to trainers only: open, as describe, with descriptors of the memory; protected {generation}, answered when it is known whether
this host can protect the steps of that life; and only to other hosts: fence, for a life that this host is not in; fold, after
which the connection brings chunks; lend {key}, after which a thread of its own answers on it, see `ckpt.keeper.loan`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from ckpt.errors import CkptError, ConflictError, IntegrityError, NotFoundError
from ckpt.keeper.holding import as_checkpoint
from ckpt.keeper.lead import Key
from ckpt.keeper.loan import PARITY, SEGMENT, lend
from ckpt.keeper.loop import Loop, Peer
from ckpt.keeper.protocol import Frame, frame, send
from ckpt.keeper.shield import Shield, host_of, key_of
from ckpt.keeper.streams import receive_pieces
from ckpt.keeper.vault import Vault
from ckpt.keeper.wire import encode_holding

__all__ = ["Service"]

_RANGE = 16 << 20  # bytes that one answer may carry
_MEETING = 15.0  # seconds in which the keepers of a life should have told its seat what they hold
Bytes = npt.NDArray[np.uint8]
Answer = Callable[[Peer, Frame], Frame | None]


class Service:
    """Of one keeper."""

    def __init__(self, loop: Loop, vault: Vault, shield: Shield, tell: Callable[[Frame], None]) -> None:
        self._loop, self._vault, self._shield, self._tell = loop, vault, shield, tell
        self._waiting: list[tuple[int, Peer, Frame]] = []  # generation, who asks, the question
        self._sound: dict[tuple[Key, int], set[int]] = {}  # pieces that were checked since a restart began
        shield.ready_changed = self._tell_ready

    def of(self, role: str, kind: str) -> Answer | None:
        """What answers a question of a "trainer", or of a "caller", which is another host's."""
        both: dict[str, Answer] = {
            "inventory": self._inventory, "pin": self._pin, "describe": self._describe,
        }  # fmt: skip
        own: dict[str, Answer] = {"open": self._open, "protected": self._protected}
        theirs: dict[str, Answer] = {"fence": self._fence, "fold": self._fold, "lend": self._lend}
        return {"trainer": both | own, "caller": both | theirs}.get(role, {}).get(kind)

    def _protected(self, peer: Peer, message: Frame) -> None:
        asked = int(message["generation"]), peer, message
        self._waiting.append(asked)
        self._tell_ready()
        self._loop.after(_MEETING, lambda: self._give_up(asked))

    def _tell_ready(self) -> None:
        if self._shield.ready is None:
            return
        generation, told = self._shield.ready
        for asked in [a for a in self._waiting if a[0] == generation]:
            self._reply(asked, told)

    def _give_up(self, asked: tuple[int, Peer, Frame]) -> None:
        """A trainer waits no longer, unless memory is being reserved."""
        laid = self._shield.layout
        if asked in self._waiting and (laid is None or laid[0] != asked[0]):
            self._reply(asked, frame("answer", why="the keepers of all hosts have not met yet"))

    def _reply(self, asked: tuple[int, Peer, Frame], told: Frame) -> None:
        self._waiting.remove(asked)
        self._loop.tell(asked[1], Frame("answer", {**told.head, "id": asked[2]["id"]}))

    def _inventory(self, peer: Peer, message: Frame) -> Frame:
        holding = encode_holding(self._shield.holding())
        return frame("answer", holding=holding, held=self._held(), pinned=self._shield.pinned)

    def _pin(self, peer: Peer, message: Frame) -> Frame:
        self._sound = {}
        return frame("answer", holding=encode_holding(self._shield.pin()), held=self._held(), pinned=True)

    def _held(self) -> list[Any]:
        """[generation, step, host by rank] of the steps that are complete, of which this host has its part, protected or
        not."""
        return [
            [*key, [held.hosts[rank] for rank in sorted(held.hosts)]]
            for key, held in self._vault.held.items()
            if held.memory.keys() == {rank for rank, host in held.hosts.items() if host == self._shield.host}
        ]

    def _open(self, peer: Peer, message: Frame) -> Frame:
        """A step for reading: as described, with the memory of the packs that are here."""
        held = self._vault.held.get(key_of(message["key"]))
        if held is None:
            return frame("answer", there=False)
        self._tell(frame("reading", rank=peer.rank, slot=held.slot))
        here = [w for w in sorted(held.memory) if held.parts[w].report is not None]
        told, fds = self._describe(peer, message), [held.memory[w].fd for w in here]
        return Frame("answer", {**told.head, "there": True, "here": here}, told.payload, fds)

    def _describe(self, peer: Peer, message: Frame) -> Frame:
        """The commit, then the manifest, which begins at `cut`. Raises NotFoundError."""
        held = self._vault.held.get(key_of(message["key"]))
        if held is None:
            raise NotFoundError(f"step {message['key'][1]} is no longer in the memory of {self._shield.host}")
        commit, manifest = as_checkpoint(held)
        return frame("answer", commit + manifest, folder=held.folder, cut=len(commit), packs=held.packs)

    def _lend(self, peer: Peer, message: Frame) -> None:
        """From here on a thread of its own answers what is asked for over this connection, straight from memory."""
        key, number = key_of(message["key"]), message["id"]
        sock = self._loop.release(peer)

        def work() -> None:
            with sock, suppress(CkptError, OSError):  # who reads is gone, or has what he wants
                lend(sock, number, lambda what, start, stop: self._lent(key, what, start, stop))

        threading.Thread(target=work, name="ckpt-lend", daemon=True).start()

    def _lent(self, key: Key, what: int, start: int, stop: int) -> list[Bytes]:
        """What is asked for, where it lies; of segments and parity it is checked. From any thread.

        Raises NotFoundError if it is there no more, IntegrityError if it is not what was protected.
        """
        shield = self._shield
        if what >= 0:
            held = self._vault.held.get(key)
            if held is None or what not in held.memory:
                raise NotFoundError(f"pack {what} of step {key[1]} is no longer in the memory of {shield.host}")
            pack = held.pack(what)
            _within(start, stop, len(pack), f"pack {what}")
            return [pack[start:stop]]
        segment = shield.segment_of(key) if what == SEGMENT else None
        area = shield.parity_of(key) if what == PARITY else None
        if segment is None and area is None:
            name = "segment" if what == SEGMENT else "parity"
            raise NotFoundError(f"{shield.host} has no {name} of step {key[1]} any more")
        # Within a restart nothing changes: a piece that was found sound is not looked at again for its next few KiB.
        sound = self._sound.setdefault((key, what), set()) if shield.pinned else set[int]()
        try:
            if segment is None:
                _within(start, stop, shield.areas.size(area or 0), "parity")
                return [shield.areas.read(area or 0, start, stop, sound)]
            _within(start, stop, segment.nbytes, "a segment")
            segment.check(start, stop, sound)
            return segment.read(start, stop)
        except IntegrityError as e:
            why = str(e)
            self._loop.later(lambda: shield.spoil(key, why))
            raise

    def _fence(self, peer: Peer, message: Frame) -> Frame:
        told = self._shield.fence(int(message["generation"]))
        return frame("answer", **(told.head if told is not None else {}))

    def _fold(self, peer: Peer, message: Frame) -> None:
        """From here on another keeper brings chunks over this connection, to a thread of its own."""
        sock = self._loop.release(peer)

        def work() -> None:
            send(sock, frame("answer", id=message["id"]))
            receive_pieces(sock, self._shield.receiver)

        threading.Thread(target=work, name="ckpt-fold", daemon=True).start()

    def look(self) -> dict[str, Any]:
        """What people are told: steps, memory of all slots; the group, its data and parity chunks, what was announced last,
        memory that parity takes."""
        shield = self._shield
        group: list[str] = []
        code: list[int] = []
        if shield.layout is not None and shield.name in (placement := shield.layout[1].placement).names:
            found = placement.groups[placement.group_of(shield.name)]
            group, code = [host_of(h.name) for h in found.hosts], [found.data, found.parity]
        announced = list(shield.announced) if shield.announced is not None else None
        steps = [
            {"generation": h.generation, "step": h.step, "ranks": h.ranks, "bytes": h.nbytes}
            for h in self._vault.held.values()
        ]
        protected = {"group": group, "code": code, "announced": announced, "parity": shield.areas.nbytes}
        return {"steps": steps, "memory": self._vault.nbytes, **protected}


def _within(start: int, stop: int, size: int, what: str) -> None:
    if not 0 <= start <= stop <= size or stop - start > _RANGE:
        raise ConflictError(f"bytes {start} to {stop} of {what} of {size} bytes")
