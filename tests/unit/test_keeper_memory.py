"""A keeper without memory for a message ends a connection, and not itself with all that it holds."""

from __future__ import annotations

import socket

import pytest

from ckpt.keeper.loop import Loop, Peer
from ckpt.keeper.protocol import Connection, Frame, frame, send


@pytest.mark.parametrize("where", ["heard", "read"])
def test_no_memory_for_a_message(where: str) -> None:
    gone: list[Peer] = []

    def hear(peer: Peer, message: Frame) -> None:
        raise MemoryError

    class Short(Connection):
        def fill(self) -> bool:
            raise MemoryError

    loop = Loop(hear, gone.append)
    ends = [socket.socketpair() for _ in range(2)]
    links = [Short if where == "read" else Connection, Connection]
    peers = [loop.add(pair[0], link(pair[0]), "trainer") for pair, link in zip(ends, links, strict=True)]
    send(ends[0][1], frame("large"))
    loop.run(lambda: bool(gone))
    assert gone == [peers[0]]
    for _, theirs in ends:
        theirs.close()


def test_others_are_heard_all_the_same() -> None:
    heard: list[str] = []

    def hear(peer: Peer, message: Frame) -> None:
        heard.append(message.kind)
        if message.kind == "large":
            raise MemoryError

    loop = Loop(hear, lambda peer: None)
    ends = [socket.socketpair() for _ in range(2)]
    for ours, _ in ends:
        loop.add(ours, Connection(ours), "trainer")
    send(ends[0][1], frame("large"))
    loop.later(lambda: send(ends[1][1], frame("small")))
    loop.run(lambda: "small" in heard)
    assert sorted(heard) == ["large", "small"]
    for _, theirs in ends:
        theirs.close()
