"""Several hosts on this machine, each with a real keeper and one trainer that speaks the protocol, and needs no torch.

What a slot holds after a step is a function of step and rank, and is written once the keeper grants it. What the keepers
hold is read from their memory, through /proc, and compared with parity that pyeclib computes.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pyeclib.ec_iface import ECDriver

from ckpt.config import ErasureCode, Replicas
from ckpt.errors import CkptError
from ckpt.format.codec import BLOCK, crc32c
from ckpt.format.fragment import Box
from ckpt.format.pack import PackLayout, Piece, TensorSpec, layout_pack
from ckpt.keeper.groups import Placement
from ckpt.keeper.holding import encode_plan
from ckpt.keeper.link import Link, keeper_name
from ckpt.keeper.loan import PARITY, SEGMENT, Loan
from ckpt.keeper.protocol import Frame, frame, greet, receive, send
from ckpt.keeper.shield import host_of
from ckpt.keeper.wire import Holding, decode_holding, encode_redundancy
from ckpt.plan import SHARD, Claim, Claims, merge
from ckpt.snapshot.arena import Slot, rounded
from ckpt.write import encode_report, pack_report

Bytes = npt.NDArray[np.uint8]
Key = tuple[int, int]
WAIT = 60.0


def until(condition: Callable[[], Any], what: str, limit: float = WAIT) -> Any:
    """The first true value of `condition`, which is asked until then."""
    end = time.monotonic() + limit
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {limit:.0f} s: {what}"
        time.sleep(0.005)
    return found


def noise(key: Key, rank: int, nbytes: int) -> Bytes:
    """What a rank's tensor holds after a step."""
    return np.random.default_rng([*key, rank]).integers(0, 256, nbytes, dtype=np.uint8)


def fill(out: Bytes, layout: PackLayout, data: Bytes) -> tuple[bytes, Bytes]:
    """Makes a pack of one tensor; its header and block table."""
    at, header = int(layout.offset[0]), layout.header
    table = np.array([crc32c(data[i : i + BLOCK]) for i in range(0, len(data), BLOCK)], dtype="<u4").view(np.uint8)
    out[: len(header)] = np.frombuffer(header, dtype=np.uint8)
    out[at : at + len(data)] = data
    out[layout.table_offset : layout.table_offset + len(table)] = table
    return header, table


@dataclass
class Trainer:
    """The one trainer of a host. `granted`: slots by step; `sealed`: steps."""

    host: str
    rank: int
    nbytes: int
    link: Link
    slots: dict[int, Slot] = field(default_factory=dict)
    used: int = 0
    secret: str = ""
    layout: PackLayout | None = None
    generation: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    sealed: set[int] = field(default_factory=set)
    heard: list[Frame] = field(default_factory=list)
    granted: dict[int, int] = field(default_factory=dict)
    address: tuple[str, int] = ("", 0)

    @property
    def pid(self) -> int:
        return self.link.keeper_pid

    def seal(self, step: int, spoil: Callable[[Trainer, int, Bytes], None]) -> None:
        """Fills the slot of a granted step, has it spoiled, and says that it is sealed."""
        assert self.layout is not None
        slot, layout, key = self.slots[self.granted.pop(step)], self.layout, (self.generation, step)
        slot.buffer[:] = noise(key, 1000 + self.rank, slot.size)
        header, table = fill(slot.buffer, layout, noise(key, self.rank, self.nbytes))
        report = pack_report(layout, header, table)
        self.sealed.add(step)
        spoil(self, step, slot.buffer)
        self.link.tell("sealed", encode_report(report), copies={}, step=step, plan="plan", objects=[], metrics={})

    def announced(self) -> list[int]:
        return [int(f["step"]) for f in self.heard if f.kind == "announced"]

    def said(self, kind: str) -> list[Frame]:
        return [f for f in self.heard if f.kind == kind]


class Fleet:
    """Hosts h0, h1, ... of `sizes` bytes of data each. `env`: of all keepers; `own`: of that of one host."""

    def __init__(
        self,
        run: str,
        sizes: Mapping[str, int],
        redundancy: ErasureCode | Replicas | None,
        *,
        env: Mapping[str, str] | None = None,
        own: Mapping[str, Mapping[str, str]] | None = None,
        slots: int = 3,
    ) -> None:
        self.run, self.sizes, self.redundancy, self.count = run, dict(sizes), redundancy, slots
        self.env = {"CKPT_GRACE": "60", "CKPT_PROTECT_PATIENCE": "20", **(env or {})}
        self.own = own or {}
        self.secret = ""
        self.peers: dict[str, Any] = {}
        self.told: dict[str, Any] = {}
        self.plan = b""
        self.trainers: dict[str, Trainer] = {}
        self.laid: dict[tuple[int, str], tuple[int, int, PackLayout]] = {}  # rank, bytes, pack: by generation and host
        self.proxies: dict[str, Proxy] = {}  # between a host and the others
        self.spoil: Callable[[Trainer, int, Bytes], None] = lambda trainer, step, slot: None
        self.sealing = True
        self.pids: set[int] = set()

    # Lives.

    def attach(self, hosts: Sequence[str]) -> None:
        """Trainers of these hosts come, by rank; keepers are started where there are none."""
        for rank, host in enumerate(hosts):
            with environment({**self.env, "CKPT_HOST": host, **self.own.get(host, {})}):
                trainer: list[Trainer] = []
                heard = self._heard(trainer)
                link = Link(keeper_name(self.run, "", host), heard, lambda _: None)
                trainer.append(Trainer(host, rank, self.sizes[host], link))
                self.pids.add(link.keeper_pid)
            t = self.trainers[host] = trainer[0]
            answer = link.ask("attach", timeout=WAIT, rank=rank, bring=[])
            t.used, t.secret = int(answer["used"]), str(answer["secret"])
            for (number, size), fd in zip(answer["slots"], answer.fds, strict=True):
                t.slots[number] = Slot(size, fd=fd)
        self.secret = next((t.secret for t in self.trainers.values() if t.secret), self.secret or os.urandom(32).hex())
        for t in self.trainers.values():
            port = int(t.link.ask("listen", timeout=WAIT, address="127.0.0.1", port=0)["port"])
            t.address = "127.0.0.1", port
        for host, proxy in self.proxies.items():
            proxy.target = self.trainers[host].address if host in self.trainers else proxy.target
        away = {host: proxy.address for host, proxy in self.proxies.items()}
        where = {t.host: list(away.get(t.host, t.address)) for t in self.trainers.values()}
        lead = hosts[0]
        self.peers = {"hosts": where, "secret": self.secret, "lead": lead}
        for t in self.trainers.values():
            t.link.ask("peers", timeout=WAIT, **self.peers)

    def replace(self, host: str) -> None:
        """The keeper of a host dies under its trainer, which starts another one and hands it its slots."""
        old = self.trainers[host]
        os.kill(old.pid, signal.SIGKILL)
        until(lambda: old.link.lost is not None, "the trainer has noticed")
        name = keeper_name(self.run, "", host)
        until(lambda: not listens(name), "the name is free")  # its line may be cut before its listener is closed
        with environment({**self.env, "CKPT_HOST": host}), old.lock:
            old.link = Link(name, self._heard([old]), lambda _: None)
            self.pids.add(old.link.keeper_pid)
            numbers = sorted(old.slots)
            fds = [old.slots[n].fd for n in numbers]
            old.link.ask("attach", fds=fds, timeout=WAIT, rank=old.rank, bring=numbers)
            old.link.ask("listen", timeout=WAIT, address="127.0.0.1", port=old.address[1])
            old.granted.clear()
        old.link.ask("peers", timeout=WAIT, **self.peers)
        old.link.ask("begin", timeout=WAIT, new=[], **self.told | {"start": max(old.sealed, default=-1) + 1})
        if old.rank == 0:
            old.link.tell("plan", self.plan, key="plan")
        old.link.tell("ready", epoch=0)

    def begin(self, generation: int, start: int = 0) -> list[Frame]:
        """A life begins; what the keepers answer to the question whether they can protect it."""
        by_rank = sorted(self.trainers.values(), key=lambda t: t.rank)
        spec = [TensorSpec(f"w{t.rank}", "uint8", (t.nbytes,)) for t in by_rank]
        plan = merge([Claims.of([Claim(s, (Box((0,), s.shape),), SHARD)]) for s in spec])
        fit = set.intersection(*(set(t.slots) for t in by_rank))
        first = max(max([t.used, *(n + 1 for n in t.slots)]) for t in by_rank)
        numbers = [*sorted(fit)[: self.count], *range(first, first + self.count - min(len(fit), self.count))]
        extents = []
        for t, s in zip(by_rank, spec, strict=True):
            t.layout = layout_pack([Piece(s, Box((0,), s.shape), None)])
            self.laid[generation, t.host] = t.rank, t.nbytes, t.layout
            extents.append(rounded(t.layout.size))
            t.generation = generation
            t.heard.clear()
            t.granted.clear()
            t.sealed.clear()
        self.told = {
            "generation": generation, "world": len(by_rank), "run": self.run, "memory": [1, None], "storage": None, "codecs": {},
            "slots": numbers, "start": start, "ranks": {str(t.rank): t.host for t in by_rank}, "extents": extents,
            "redundancy": encode_redundancy(self.redundancy),
        }  # fmt: skip
        for t, n in zip(by_rank, extents, strict=True):
            new = [number for number in numbers if number not in t.slots]
            for number in new:
                t.slots[number] = Slot(n)
            t.link.ask("begin", fds=[t.slots[n].fd for n in new], timeout=WAIT, new=new, **self.told)
        answers = [t.link.ask("protected", timeout=WAIT, generation=generation) for t in by_rank]
        for t in by_rank:
            if t.rank == 0:
                self.plan = encode_plan(plan, {})
                t.link.tell("plan", self.plan, key="plan")
            t.link.tell("ready", epoch=0)
        return answers

    def _heard(self, who: list[Trainer]) -> Callable[[Frame], None]:
        def heard(message: Frame) -> None:
            t = who[0]
            t.heard.append(message)
            if message.kind == "grant":
                with t.lock:
                    t.granted[int(message["step"])] = int(message["slot"])
                    if self.sealing:
                        with suppress(CkptError):
                            t.seal(int(message["step"]), self.spoil)

        return heard

    def seal(self, sealing: bool) -> None:
        """Whether trainers seal what they are granted at once; when they begin to, also what waits."""
        self.sealing = sealing
        for t in self.trainers.values():
            with t.lock:
                for step in sorted(t.granted) if sealing else ():
                    t.seal(step, self.spoil)

    def announced(self, at_least: int, hosts: Sequence[str] | None = None) -> int:
        """Waits until all of these hosts know a step as protected, at least so new; the newest."""
        some = [self.trainers[h] for h in hosts or self.trainers]
        until(lambda: all(max(t.announced(), default=-1) >= at_least for t in some), f"step {at_least} is announced")
        return min(max(t.announced()) for t in some)

    def rest(self) -> Key:
        """Nothing more is sealed, and what was is protected: the newest step."""
        self.seal(False)
        last = max(set.intersection(*(t.sealed for t in self.trainers.values())))
        assert self.announced(last) == last
        return next(iter(self.trainers.values())).generation, last

    # What keepers hold.

    def ask(self, host: str, kind: str, **head: Any) -> Frame:
        """Asks a keeper as one of another host does."""
        sock, line = greet(self.trainers[host].address, bytes.fromhex(self.secret), WAIT)
        with sock:
            sock.settimeout(WAIT)
            send(sock, frame(kind, id=0, **head))
            return receive(sock, line)

    def lent(self, host: str, key: Key, what: int, offset: int, length: int) -> bytes:
        """Bytes that a keeper lends of its segment or parity. Raises what it refuses with."""
        loan, out = Loan(self.trainers[host].address, bytes.fromhex(self.secret), key, WAIT), bytearray(length)
        try:
            loan.ask(what, offset, length)
            loan.take(memoryview(out))
        finally:
            loan.close()
        return bytes(out)

    def holding(self, host: str) -> Holding:
        return decode_holding(self.ask(host, "inventory")["holding"])

    def look(self, host: str) -> Frame:
        """What the keeper of a host tells people."""
        return self.trainers[host].link.ask("look", timeout=WAIT)

    def segment(self, host: str, key: Key) -> bytes:
        """What a host's part of a step must be: computed, not asked."""
        rank, nbytes, layout = self.laid[key[0], host]
        out = noise(key, 1000 + rank, rounded(layout.size))
        fill(out, layout, noise(key, rank, nbytes))
        return out.tobytes()

    def area(self, host: str, area: int) -> list[str]:
        """The memory of a parity area of a keeper, as a file; and one that will take its place, if there is one."""
        pid, found = self.trainers[host].pid, {}
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{fd}").startswith(f"/memfd:ckpt-parity-{area}"):
                    found[os.stat(f"/proc/{pid}/fd/{fd}").st_ino] = f"/proc/{pid}/fd/{fd}"
        return list(found.values())

    def flip_parity(self, host: str, area: int, at: int) -> None:
        [path] = self.area(host, area)
        with open(path, "r+b", buffering=0) as f:
            f.seek(at)
            byte = f.read(1)[0]
            f.seek(at)
            f.write(bytes([byte ^ 1]))

    def check(self, key: Key, hosts: Sequence[str] | None = None) -> Placement:
        """That every byte of parity of a step is what pyeclib says, on these hosts, and every segment what was sealed."""
        names = list(hosts or self.trainers)
        held = {h: self.holding(h) for h in names}
        by_name = {held[h].inventory.host: h for h in names}
        placement = held[names[0]].inventory.whole[key]
        segments = {h: self.segment(h, key) for h in map(host_of, placement.names)}
        for h in names:
            assert held[h].inventory.whole[key] == placement
            got = b"".join(
                self.lent(h, key, SEGMENT, at, min(1 << 20, len(segments[h]) - at))
                for at in range(0, len(segments[h]), 1 << 20)
            )
            assert got == segments[h], f"the segment of {h} at {key} is not what was sealed"
        for group in placement.groups:
            for stripe in group.stripes:
                longest = stripe.parity[0][2] if stripe.parity else 0
                chunks = [segments[host_of(name)][a:b].ljust(longest, b"\0") for name, a, b in stripe.data]
                expected = expected_parity(chunks, group.parity)
                for (name, offset, n), bytes_ in zip(stripe.parity, expected, strict=True):
                    if name not in by_name:
                        continue
                    host = by_name[name]
                    areas = held[host].inventory.areas
                    [area] = [i for i, a in enumerate(areas) if a is not None and a.key == key]
                    found = [Path(path).read_bytes()[offset : offset + n] for path in self.area(host, area)]
                    assert bytes_ in found and len(found) <= 2, f"parity of stripe {stripe.number} on {host} at {key}"
                    assert self.lent(host, key, PARITY, offset, min(n, 1 << 20)) == bytes_[: 1 << 20]
        return placement

    # What happens to hosts.

    def kill(self, host: str) -> None:
        """A host with everything on it."""
        t = self.trainers.pop(host)
        os.kill(t.pid, signal.SIGKILL)
        until(lambda: not alive(t.pid), f"the keeper of {host} is gone")
        t.link.close()

    def stop(self, host: str) -> None:
        os.kill(self.trainers[host].pid, signal.SIGSTOP)

    def resume(self, host: str) -> None:
        os.kill(self.trainers[host].pid, signal.SIGCONT)

    def between(self, host: str) -> Proxy:
        """From the next life on all that other hosts send to this one goes through a proxy."""
        self.proxies[host] = Proxy()
        return self.proxies[host]

    def leave(self) -> None:
        """All trainers end without a word; their keepers stay."""
        for t in self.trainers.values():
            t.link.close()
        self.trainers.clear()

    def close(self) -> None:
        for t in self.trainers.values():
            t.link.close()
        for pid in self.pids:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        for proxy in self.proxies.values():
            proxy.close()


def expected_parity(chunks: Sequence[bytes], m: int) -> list[bytes]:
    """By pyeclib; plain copies where there is one data chunk."""
    n = len(chunks[0])
    if not m or not n:
        return [b""] * m
    if len(chunks) == 1:
        return [chunks[0]] * m
    room = -(-n // 64) * 64
    whole = b"".join(c.ljust(room, b"\0") for c in chunks)
    driver = ECDriver(k=len(chunks), m=m, ec_type="isa_l_rs_cauchy" if m > 1 else "isa_l_rs_vand")
    return [f[80 : 80 + n] for f in driver.encode(whole)[len(chunks) :]]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def listens(name: str) -> bool:
    """Whether a keeper of that name can be reached."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        return sock.connect_ex(f"\0{name}") == 0


class environment:
    """Variables that are set for a while."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = dict(values)

    def __enter__(self) -> None:
        self._before = {k: os.environ.get(k) for k in self._values}
        os.environ.update(self._values)

    def __exit__(self, *_: object) -> None:
        for k, v in self._before.items():
            os.environ.pop(k, None)
            if v is not None:
                os.environ[k] = v


class Proxy:
    """Passes on what comes, both ways, to `target`. `flip`: so many large reads from now one bit is changed; `cut` ends all
    connections, and those that come, until it is `healed`."""

    def __init__(self) -> None:
        self.target = ("", 0)
        self.flip = 0
        self.passing = True
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.address: tuple[str, int] = self._listener.getsockname()
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            if not self.passing:
                sock.close()
                continue
            try:
                other = socket.create_connection(self.target, 5)
            except OSError:
                sock.close()
                continue
            other.settimeout(None)
            self._open += [sock, other]
            for a, b in ((sock, other), (other, sock)):
                threading.Thread(target=self._pass, args=(a, b), daemon=True).start()

    def _pass(self, a: socket.socket, b: socket.socket) -> None:
        with suppress(OSError):
            while data := a.recv(1 << 16):
                if len(data) > 1 << 12 and self.flip:
                    self.flip -= 1
                    if not self.flip:
                        data = data[:1000] + bytes([data[1000] ^ 4]) + data[1001:]
                b.sendall(data)
        for sock in (a, b):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        self.passing = False
        for sock in self._open:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def heal(self) -> None:
        self.passing = True

    def close(self) -> None:
        self._listener.close()
        self.cut()
        for sock in self._open:
            sock.close()
