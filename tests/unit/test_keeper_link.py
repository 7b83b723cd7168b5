"""A trainer's line to a keeper that hangs up on it."""

from __future__ import annotations

import os
import socket
import threading

import pytest

from ckpt.errors import ConflictError, PeerError, to_wire
from ckpt.keeper.link import Link
from ckpt.keeper.protocol import frame, send

LARGE = bytes(16 << 20)  # more than a socket takes while nobody reads


def hung_up(said: ConflictError | None) -> Exception:
    """What a question raises whose keeper reads nothing of it, says this, and hangs up."""
    name = f"ckpt-test-link-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(f"\0{name}")
        listener.listen()

        def keeper() -> None:
            with listener.accept()[0] as sock:
                if said is not None:
                    send(sock, frame("refused", error=to_wire(said)))

        thread = threading.Thread(target=keeper)
        thread.start()
        link = Link(name, lambda _: None, lambda _: None)
        with pytest.raises(Exception) as e:
            link.ask("attach", LARGE, timeout=60)
        thread.join()
        return e.value


def test_a_refusal_is_heard_even_if_the_question_did_not_get_through() -> None:
    """Else a second job takes the keeper for one that is gone, and writes to the run without one."""
    for _ in range(20):
        error = hung_up(ConflictError("rank 0 of this run is being trained by process 1"))
        assert isinstance(error, ConflictError) and "process 1" in str(error)


def test_a_keeper_that_says_nothing_is_gone() -> None:
    assert type(hung_up(None)) is PeerError
