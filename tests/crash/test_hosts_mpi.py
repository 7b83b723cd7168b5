"""A host is lost, and mpiexec starts the job anew on what is left: it goes on from the memory of the others."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from forks import Fresh
from keepers import gone, keeper_pids, scene

from ckpt.keeper.link import keeper_name

_TRAINER = """
import os, sys
from mpi4py import MPI
comm = MPI.COMM_WORLD
run, hosts = sys.argv[1], sys.argv[2].split(",")
host = hosts[comm.rank]
os.environ.update(CKPT_HOST=host, CKPT_BIND=f"127.0.0.{int(host[1:]) + 2}")
import torch, ckpt
n = 1200 // comm.size
x, at = torch.zeros(n), torch.arange(comm.rank * n, (comm.rank + 1) * n)
state = {"x": ckpt.Shard(x, (1200,), (comm.rank * n,))}
cp = ckpt.Checkpointer(run, state, memory=ckpt.Every(1), redundancy=ckpt.Replicas(2))
start = step = cp.restore()
if start:
    assert cp.last_load.ref.startswith("memory of ") and torch.equal(x, at + 10_000.0 * (start - 1))
while comm.allreduce(cp.report.announced, MPI.MIN) < 2:
    x.copy_(at + 10_000.0 * step)
    handle = cp.step(step)
    if handle is not None:
        assert handle.done(60)
    step += 1
print(f"rank {comm.rank} {os.getpid()} from {start} to {step - 1}", flush=True)
if not start:
    MPI.COMM_WORLD.Recv([bytearray(1), MPI.BYTE], comm.rank)  # nobody sends anything: until it is killed
comm.Barrier()
cp.close()
"""


def _started(run: str, hosts: str) -> tuple[subprocess.Popen[str], list[list[str]]]:
    """mpiexec, and what each rank said: [pid, "from", first step, "to", last step]."""
    world = hosts.count(",") + 1
    command = [str(Path(sys.executable).with_name("mpiexec")), "-n", str(world), sys.executable, "-c", _TRAINER, run]
    job = subprocess.Popen([*command, hosts], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert job.stdout is not None
    said: list[list[str]] = []
    for line in job.stdout:
        said += [line.split()[2:]] if line.startswith("rank ") else []
        if len(said) == world:
            return job, said
    raise AssertionError(f"mpiexec ended with {job.wait()}: {said}")


def _restarted(folder: str) -> None:
    with scene(folder) as run:
        job, said = _started(run, "h0,h1,h2")
        for pid in [*(int(words[0]) for words in said), job.pid]:
            os.kill(pid, signal.SIGKILL)
        job.wait()
        [lost] = keeper_pids(keeper_name(run, "", "h0"))
        os.kill(lost, signal.SIGKILL)
        gone(lost)
        last = max(int(words[4]) for words in said)
        job, said = _started(run, "h2,h1")
        [start] = {int(words[2]) for words in said}
        assert 2 <= start <= last + 1, "two steps were announced"
        assert job.wait(60) == 0


@pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="needs the mpi extra")
def test_mpiexec_starts_the_job_on_the_hosts_that_are_left(fresh: Fresh, tmp_path: Path) -> None:
    if not os.access(Path(sys.executable).with_name("mpiexec"), os.X_OK):
        pytest.skip("needs mpiexec beside this python")
    fresh(_restarted, str(tmp_path))
