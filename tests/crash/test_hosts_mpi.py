"""A host is lost under mpiexec, which ends the job; started again on what is left it goes on from the memory of the others.

Hosts are network namespaces, which MPICH's mpiexec reaches as it reaches others by ssh; without the privilege for these,
groups of processes, as in `make demo`. Of the tensor every value of every step is known. What ranks say goes into a file
each: mpiexec mixes their lines.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forks import Fresh
from keepers import scene, until

import ckpt
from examples.hosts import Hosts

_MPIEXEC = Path(sys.executable).with_name("mpiexec")
_ELEMENTS = 1200
_FAR = 1_000_000.0

# Trains until it is killed or, in a life that was restored, until two more steps are protected.
_TRAINER = f"""
import os, sys
from mpi4py import MPI
import torch, ckpt
comm, (run, said) = MPI.COMM_WORLD, sys.argv[1:]
log = os.open(f"{{said}}.{{comm.rank}}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
say = lambda *words: os.write(log, (" ".join(map(str, words)) + "\\n").encode())
n = {_ELEMENTS} // comm.size
x, at = torch.zeros(n, dtype=torch.float64), torch.arange(comm.rank * n, (comm.rank + 1) * n, dtype=torch.float64)
state = {{"x": ckpt.Shard(x, ({_ELEMENTS},), (comm.rank * n,))}}
heard = lambda event: event.kind == "protect" and say("protected", event.step)
cp = ckpt.Checkpointer(run, state, memory=ckpt.Every(1), redundancy=ckpt.Replicas(2), on_event=heard)
start = step = cp.restore()
if start:
    assert torch.equal(x, at + {_FAR} * (start - 1)), x
    say("restored", start - 1, cp.last_load.ref.replace(" ", "-"))
while not start or comm.allreduce(cp.report.announced, MPI.MIN) < 2:
    x.copy_(at + {_FAR} * step)
    say("at", step)
    handle = cp.step(step)
    if handle is not None:
        assert handle.done(60)
    comm.Barrier()
    step += 1
cp.close()
say("closed", step - 1)
"""


def _mpiexec(hosts: Hosts, on: list[int], run: str, said: str) -> subprocess.Popen[bytes]:
    """One rank on each of these hosts, in this order."""
    command = [str(_MPIEXEC)]
    if not hosts.why:
        shell = Path(f"{said}.sh")  # what stands for ssh: [options] HOST COMMAND
        shell.write_text(
            '#!/bin/sh\nwhile [ "${1#-}" != "$1" ]; do shift; done\nhost=$1; shift\nexec ip netns exec $host sh -c "$*"\n'
        )
        shell.chmod(0o700)
        names = ",".join(hosts.namespace(n) for n in on)
        command += ["-launcher", "ssh", "-launcher-exec", str(shell), "-localhost", hosts.outside, "-hosts", names]
    for rank, n in enumerate(on):
        environment = hosts.environment(n)
        if rank and not hosts.why:
            del environment["CKPT_BIND"]  # it is found out
        words = [word for name, value in environment.items() for word in ("-env", name, value)]
        command += [*([":"] if rank else []), "-n", "1", *words, sys.executable, "-c", _TRAINER, run, said]
    with open(f"{said}.txt", "wb") as output:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)


def _heard(said: str, world: int, what: str) -> list[list[str]]:
    """Of each rank, what it said of that."""
    rows = []
    for rank in range(world):
        log = Path(f"{said}.{rank}")
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        rows.append(
            [line.split(maxsplit=1)[1].strip() for line in lines if line.startswith(f"{what} ") and line[-1] == "\n"]
        )
    return rows


def _give_up_privileges() -> None:
    """Of this process, and of all that it starts, whoever it belongs to."""
    libc = ctypes.CDLL(None)
    for capability in range(64):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
    assert libc.capset(struct.pack("=Ii", 0x20080522, 0), bytes(24)) == 0


def _restarted(folder: str, privileged: bool) -> None:
    if not privileged:
        _give_up_privileges()
    shared = set(Path("/dev/shm").glob("mpich_shm_*"))
    with scene(folder) as run, Hosts(3) as hosts:
        assert privileged or "not to be had here" in hosts.why
        first, second = f"{folder}/first", f"{folder}/second"
        job = _mpiexec(hosts, [0, 1, 2], run, first)

        def protected() -> bool:
            assert job.poll() is None, Path(f"{first}.txt").read_text()
            return all(len(steps) >= 2 for steps in _heard(first, 3, "protected"))

        until(protected, "steps are protected")
        keepers = {n: set(hosts.pids(n)) for n in (1, 2)}
        hosts.kill(0)
        job.kill()  # as its scheduler does: it may not notice by itself
        job.wait()
        for n in (1, 2):
            until(lambda n=n: len(hosts.pids(n)) == 1, "mpiexec takes down its ranks, and leaves the keepers")
            assert keepers[n] >= set(hosts.pids(n)), "the keeper is the one that was there"
        for left in set(Path("/dev/shm").glob("mpich_shm_*")) - shared:  # by ranks that were killed
            left.unlink(missing_ok=True)
        safe = max(int(step) for steps in _heard(first, 3, "protected") for step in steps)
        last = max(int(step) for steps in _heard(first, 3, "at") for step in steps)
        job = _mpiexec(hosts, [2, 1], run, second)
        until(lambda: job.poll() is not None, "the second life ends")
        assert job.returncode == 0, Path(f"{second}.txt").read_text()
        restored = {text for texts in _heard(second, 2, "restored") for text in texts}
        [start] = {int(text.split()[0]) for text in restored}
        assert safe <= start <= last and all(text.split()[1].startswith("memory-of-") for text in restored), restored
        [end] = {int(step) for steps in _heard(second, 2, "closed") for step in steps}
        assert end >= start + 2
        until(lambda: not any(hosts.pids(n) for n in (1, 2)), "the keepers end with the job")
        found = torch.zeros(_ELEMENTS, dtype=torch.float64)
        assert ckpt.load({"x": found}, run).step == end
        assert torch.equal(found, torch.arange(_ELEMENTS, dtype=torch.float64) + _FAR * end)


@pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="needs the mpi extra")
@pytest.mark.parametrize("privileged", [True, False], ids=["namespaces", "groups of processes"])
def test_mpiexec_starts_the_job_on_the_hosts_that_are_left(fresh: Fresh, tmp_path: Path, privileged: bool) -> None:
    if not os.access(_MPIEXEC, os.X_OK):
        pytest.skip("needs mpiexec beside this python")
    fresh(_restarted, str(tmp_path), privileged)
