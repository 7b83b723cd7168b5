"""How the ranks of a job agree. The only user of torch.distributed's process group and of mpi4py.

One primitive, the *round*: every rank contributes bytes or an error, the leader decides, every rank gets its
answer or the same error. Rounds run over the job's key-value store, not over its process group: a collective
that times out leaves a process group unusable, a key that nobody wrote does not. So a rank that hangs fails one
save, on all ranks and with one cause, and the next save works.

A rank that comes late to a round takes its verdict; one that missed a round (it raised before it came to it, and is
at another one now) finds that round decided and goes on to the next one.
A leader that comes back after the others gave up finds its round abandoned: of what lets it decide, and of the verdict
itself, whoever writes first, the leader or a rank that waited long enough, has settled it for all.
"""

from __future__ import annotations

import atexit
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load as st_load
from safetensors.numpy import save as st_save

from ckpt.config import settings
from ckpt.errors import CkptError, DeadlineError, PeerError, from_wire, to_wire

__all__ = ["Group", "Solo", "current_group", "decode", "encode", "meeting_point"]

Decide = Callable[[list[bytes]], Sequence[bytes] | bytes]


class Group(Protocol):
    """The ranks of one job."""

    rank: int
    world: int

    def round(self, name: str, payload: bytes | Exception, decide: Decide) -> bytes:
        """One exchange. `payload`: this rank's part, or the error that kept it from having one.

        `decide` runs on the leader (rank 0), on the payloads of all ranks in order; it returns one answer for all
        or one for each. Any error, of a rank or of `decide`, is raised on every rank. `name` must be the same on
        all. DeadlineError names the ranks that did not come.
        """
        ...

    def beside(self) -> Group:
        """The same ranks with a channel of their own, for one other thread. Made once, at the same place on all."""
        ...


@dataclass
class Solo:
    """A job of one process."""

    rank: int = 0
    world: int = 1

    def round(self, name: str, payload: bytes | Exception, decide: Decide) -> bytes:
        if isinstance(payload, Exception):
            raise payload
        answer = decide([payload])
        return answer if isinstance(answer, bytes) else answer[0]

    def beside(self) -> Group:
        return self


_LEADER = b"the leader goes on"
_LINGER = 10.0
_INLINE = 1024  # bytes of an answer that travel with the verdict
_AT_ONCE = 256
_SWEEP = 64


class _StoreGroup:
    """Ranks that share a torch key-value store.

    Keys of round n: `<rank>`, a letter; "begin", what settles whether the leader may decide; "verdict", which ends the
    round for all, whoever writes it first; "answer" or "answer-<rank>", what does not fit into the verdict; "reads"
    and "read", whether everybody knows. Letters and answers are dropped two rounds later; verdicts stay: they are how
    a late rank learns that a round is over.
    """

    def __init__(self, store: Any, rank: int, world: int, channel: str = "ckpt") -> None:
        self.rank, self.world, self._channel = rank, world, channel
        self._store = store
        self._beside: _StoreGroup | None = None
        # torchrun's store outlives a process group: a second one over it must not read the first one's rounds.
        self._prefix = f"{channel}/{(self._do('add', f'{channel}/ranks', 1) - 1) // world}"
        self._next = 0
        self._unread = -1  # the leader's last round, until every rank is known to have read it
        self._large: list[list[str]] = []  # keys of the last rounds with content worth dropping
        self._small: list[str] = []
        while hasattr(store, "underlying_store"):
            store = store.underlying_store
        self.may_hold_the_store = rank == 0 and type(store).__name__ == "TCPStore"
        # Torch's server without libuv (USE_LIBUV=0) wakes nobody who waits for a key when that is compared and set.
        self._sleeps_on = not getattr(store, "libuvBackend", True)

    def beside(self) -> _StoreGroup:
        """See `Group.beside`. A store's client does one thing at a time: the other thread needs one of its own."""
        if self._beside is None:
            store = self._store.clone() if hasattr(self._store, "clone") else self._store
            self._beside = _StoreGroup(store, self.rank, self.world, f"{self._channel}-beside")
            self._beside.may_hold_the_store = self.may_hold_the_store
        return self._beside

    def _key(self, number: int, what: str) -> str:
        return f"{self._prefix}/{number}/{what}"

    def _do(self, verb: str, *args: Any) -> Any:
        """One operation of the store. Raises PeerError if the store is gone."""
        try:
            return getattr(self._store, verb)(*args)
        except Exception as e:
            if verb == "wait" and _is_timeout(e):
                raise
            text = str(e).partition("\n")[0]
            raise PeerError(
                f"lost touch with the job's key-value store ({text}); rank 0, or whatever holds the store, is gone"
            ) from e

    def round(self, name: str, payload: bytes | Exception, decide: Decide) -> bytes:
        """See `Group.round`."""
        if self.rank != 0:
            while self._do("check", [self._key(self._next, "verdict")]):
                verdict = bytes(self._do("get", self._key(self._next, "verdict")))
                self._next += 1
                if verdict[:1] == b"E" and json.loads(verdict[1:])["name"] == name:
                    raise _error(verdict)
        number = self._next
        self._next += 1
        deadline = settings().deadline
        if self.rank == 0:
            return self._lead(number, name, payload, decide, deadline)
        letter = self._key(number, str(self.rank))
        self._do("set", letter, _letter(name, payload))
        self._drop([letter])
        verdict = self._verdict(number, name, deadline)
        try:
            return self._answer(number, verdict)
        finally:
            with suppress(PeerError):
                if self._do("add", self._key(number, "reads"), 1) == self.world - 1:
                    self._do("set", self._key(number, "read"), b"")

    def _verdict(self, number: int, name: str, deadline: float) -> bytes:
        """Waits for the verdict of a round; if the leader fails to give one, settles that it failed."""
        # The leader answers within its own deadline; the margin lets its verdict, which names the culprit, win.
        if self._wait([self._key(number, "verdict")], deadline * 1.5 + min(5.0, deadline)):
            return bytes(self._do("get", self._key(number, "verdict")))
        verdict = _failed(
            name, "deadline", f"{name}: rank 0 gave no answer within {deadline:.0f} s; is it hanging or gone?"
        )
        first = self._settle(number, "begin", verdict)
        if first != _LEADER:
            return self._settle(number, "verdict", first)
        if not self._wait([self._key(number, "verdict")], deadline):
            text = f"{name}: rank 0 stopped while it decided; is it hanging or gone? The run tells how far it came"
            return self._settle(number, "verdict", _failed(name, "deadline", text))
        return bytes(self._do("get", self._key(number, "verdict")))

    def _settle(self, number: int, what: str, mine: bytes) -> bytes:
        """What was written there first, by whomever."""
        first = bytes(self._do("compare_set", self._key(number, what), b"", mine))
        if self._sleeps_on and first == mine:
            self._do("set", self._key(number, what), mine)
        return first

    def linger(self) -> None:
        """Keeps a leader that is about to exit, and may take the store with it, until its last answer was read."""
        if self._unread >= 0:
            with suppress(PeerError):
                self._wait([self._key(self._unread, "read")], min(_LINGER, settings().deadline))
        self._unread = -1

    def _lead(self, number: int, name: str, payload: bytes | Exception, decide: Decide, deadline: float) -> bytes:
        self._unread = -1
        number = self._catch_up(number, name)
        try:
            letters = [_letter(name, payload), *self._letters(number, name, deadline)]
            self._unread = number
            payloads = [_open(rank, letter, name) for rank, letter in enumerate(letters)]
            first = self._settle(number, "begin", _LEADER)
            if first != _LEADER:
                raise _error(first)
            decided = decide(payloads)
            answers = [decided] if isinstance(decided, bytes) else list(decided)
            mine = self._post(number, answers)
        except Exception as e:
            kind, text = to_wire(e)
            self._settle(number, "verdict", _failed(name, kind, text))
            raise e if isinstance(e, CkptError) else from_wire(kind, text) from e
        first = self._settle(number, "verdict", mine)
        self._small += [self._key(number, what) for what in ("begin", "reads", "read")]
        if first != mine:
            raise _error(first)
        return answers[0]

    def _letters(self, number: int, name: str, deadline: float) -> list[bytes]:
        """The letters of the other ranks. DeadlineError names those that did not come."""
        keys = [self._key(number, str(rank)) for rank in range(1, self.world)]
        if not self._wait(keys, deadline):
            late = [rank for rank, key in enumerate(keys, start=1) if not self._do("check", [key])]
            if late:
                who = ", ".join(map(str, late[:8])) + (f" and {len(late) - 8} more" if len(late) > 8 else "")
                raise DeadlineError(f"{name}: rank {who} did not come within {deadline:.0f} s; is it hanging or gone?")
        if not self._store.has_extended_api():
            return [bytes(self._do("get", key)) for key in keys]
        parts = [keys[at : at + _AT_ONCE] for at in range(0, len(keys), _AT_ONCE)]
        return [bytes(letter) for part in parts for letter in self._do("multi_get", part)]

    def _post(self, number: int, answers: list[bytes]) -> bytes:
        """Leaves the answers where the ranks look for them. Returns the verdict that tells them so."""
        if len(answers) == 1 and len(answers[0]) <= _INLINE:
            self._drop([])
            return b"A" + answers[0]
        if len(answers) == 1:
            content = {self._key(number, "answer"): answers[0]}
        else:
            content = {self._key(number, f"answer-{rank}"): answers[rank] for rank in range(1, self.world)}
        for key, answer in content.items():
            self._do("set", key, answer)
        self._drop(list(content))
        return b"O" if len(answers) == 1 else b"R"

    def _answer(self, number: int, verdict: bytes) -> bytes:
        kind = verdict[:1]
        if kind == b"E":
            raise _error(verdict)
        if kind == b"A":
            return verdict[1:]
        return bytes(self._do("get", self._key(number, "answer" if kind == b"O" else f"answer-{self.rank}")))

    def _catch_up(self, number: int, name: str) -> int:
        """Passes rounds that the leader missed and the others gave up waiting for, as a late rank does."""
        while self._do("check", [self._key(number, "begin")]):
            first = bytes(self._do("get", self._key(number, "begin")))
            if first == _LEADER or json.loads(first[1:])["name"] == name:
                break
            self._settle(number, "verdict", first)
            number += 1
            self._next = number + 1
        return number

    def _drop(self, keys: list[str]) -> None:
        """Drops what this rank wrote two rounds ago; `keys` is what it wrote in this one. Small keys go by the dozen."""
        self._large.append(keys)
        old = self._large.pop(0) if len(self._large) > 2 else []
        if len(self._small) >= _SWEEP:
            old, self._small = old + self._small[:-9], self._small[-9:]
        for key in old:
            self._do("delete_key", key)

    def _wait(self, keys: list[str], seconds: float) -> bool:
        try:
            self._do("wait", keys, timedelta(seconds=seconds))
        except PeerError:
            raise
        except Exception:  # a timeout: DistStoreError, or RuntimeError in older versions of torch
            return False
        return True


def _failed(name: str, kind: str, text: str) -> bytes:
    """The verdict that a round failed."""
    return b"E" + json.dumps({"name": name, "kind": kind, "message": text}).encode()


def _error(verdict: bytes) -> CkptError:
    told = json.loads(verdict[1:])
    return from_wire(told["kind"], told["message"])


def _is_timeout(e: Exception) -> bool:
    return "imeout" in type(e).__name__ or "imeout" in str(e) or "imed out" in str(e)


def _letter(name: str, payload: bytes | Exception) -> bytes:
    if isinstance(payload, Exception):
        kind, text = to_wire(payload)
        return b"E" + json.dumps([name, kind, text]).encode()
    head = name.encode()
    return b"P" + len(head).to_bytes(4, "little") + head + payload


def _open(rank: int, letter: bytes, name: str) -> bytes:
    """The payload in a letter; raises the error it carries, or one if it belongs to another round."""
    if letter[:1] == b"E":
        _, kind, text = json.loads(letter[1:])
        raise from_wire(kind, text if text.startswith("rank ") else f"rank {rank}: {text}")
    n = int.from_bytes(letter[1:5], "little")
    theirs = letter[5 : 5 + n].decode()
    if theirs != name:
        raise from_wire(
            "usage", f"rank {rank} is at {theirs!r} while rank 0 is at {name!r}; all ranks must do the same"
        )
    return letter[5 + n :]


_groups: dict[int, _StoreGroup] = {}


@atexit.register
def linger() -> None:
    """What a process does last, so that a save that rank 0 saw succeed does so for ranks that are slower to hear."""
    for group in [g for first in _groups.values() for g in (first, first._beside) if g is not None]:
        if group.may_hold_the_store:
            group.linger()


def current_group() -> Group:
    """The ranks that this process acts with: its process group if one is up, else its MPI world, else itself."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        store = dist.distributed_c10d._get_default_store()
        return _shared(store, dist.get_rank(), dist.get_world_size())
    if _under_mpi():
        return _mpi_group()
    return Solo()


def _shared(store: Any, rank: int, world: int) -> Group:
    if world == 1:
        return Solo()
    # One counter per store: two callers in one process take part in the same sequence of rounds.
    if id(store) not in _groups:
        _groups.clear()
        _groups[id(store)] = _StoreGroup(store, rank, world)
    return _groups[id(store)]


def _under_mpi() -> bool:
    """Started by an mpiexec with more than one process (the variables of MPICH, Intel MPI, Slurm's PMI, Open MPI)."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return False
    return any(int(os.environ.get(name) or 1) > 1 for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS"))


_mpi: Group | None = None
_mpi_host = ""


def meeting_point() -> str:
    """The host to which every other one of the job has a way: where its ranks meet."""
    return _mpi_host or os.environ.get("MASTER_ADDR", "127.0.0.1")


def _mpi_group() -> Group:
    """The MPI world, with a store of its own on MPI's rank 0: MPI only carries the address, which is CKPT_BIND or, without
    it, the host's name."""
    global _mpi, _mpi_host
    if _mpi is not None:
        return _mpi
    try:
        from mpi4py import MPI
    except ImportError as e:
        raise from_wire(
            "usage", f"started by mpiexec, but mpi4py is missing ({e}): pip install 'ckpt-universal[mpi]'"
        ) from e
    import socket

    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    comm = MPI.COMM_WORLD
    rank, world = comm.Get_rank(), comm.Get_size()
    address = np.zeros(256, dtype=np.uint8)
    server = None
    if rank == 0:
        one = comm.Split_type(MPI.COMM_TYPE_SHARED).Get_size() == world
        host = "127.0.0.1" if one else settings().bind or socket.getfqdn()
        server = TCPStore(host, 0, None, True, wait_for_workers=False)
        text = f"{host} {server.port}".encode()
        address[: len(text)] = np.frombuffer(text, dtype=np.uint8)
    else:
        comm.Split_type(MPI.COMM_TYPE_SHARED)
    comm.Bcast([address, MPI.BYTE], root=0)
    host, port = bytes(address).rstrip(b"\0").decode().split()
    store = server or TCPStore(host, int(port), None, False, wait_for_workers=False)
    _mpi, _mpi_host = _shared(store, rank, world), host
    return _mpi


def encode(head: Any, **arrays: npt.NDArray[Any]) -> bytes:
    """A message: JSON and arrays, as a safetensors file (no pickle between ranks either)."""
    text = np.frombuffer(json.dumps(head, ensure_ascii=False).encode(), dtype=np.uint8)
    message: bytes = st_save({"": text, **{k: np.ascontiguousarray(v) for k, v in arrays.items()}})
    return message


def decode(message: bytes) -> tuple[Any, dict[str, npt.NDArray[Any]]]:
    """What `encode` was given."""
    arrays = st_load(message)
    return json.loads(arrays.pop("").tobytes()), arrays
