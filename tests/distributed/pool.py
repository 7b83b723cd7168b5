"""Worker processes that are shared by all multi-process tests.

Starting a process that imports torch costs seconds; forming a process group costs milliseconds. So four workers
live as long as the session, and every call forms a fresh gloo group of the size it asks for.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

SIZE = 4
LIMIT = 120.0


class WorkerError(AssertionError):
    """A rank raised; its traceback is the message."""


def _serve(pipe: Connection, rank: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        job = pipe.recv()
        if job is None:
            return
        function, args, world, address, env = job
        os.environ.update(env)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
        try:
            store = dist.FileStore(address, world)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
            try:
                result = function(rank, world, *args)
            finally:
                dist.destroy_process_group()
            pipe.send((True, result))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        finally:
            for name in env:
                os.environ.pop(name, None)


class Pool:
    """`run(function, *args, world=n)` calls `function(rank, world, *args)` on n ranks; returns their results."""

    def __init__(self) -> None:
        context = mp.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(SIZE):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank), daemon=True)
            process.start()
            self._pipes.append(mine)
            self._processes.append(process)

    def run(
        self, function: Callable[..., Any], *args: Any, world: int = SIZE, env: dict[str, str] | None = None
    ) -> list[Any]:
        with tempfile.TemporaryDirectory() as folder:
            address = os.path.join(folder, "store")
            for pipe in self._pipes[:world]:
                pipe.send((function, args, world, address, env or {}))
            answers = []
            for rank, pipe in enumerate(self._pipes[:world]):
                if not pipe.poll(LIMIT):
                    raise WorkerError(f"rank {rank} gave no answer within {LIMIT:.0f} s")
                answers.append(pipe.recv())
        for rank, (ok, value) in enumerate(answers):
            if not ok:
                raise WorkerError(f"rank {rank}:\n{value}")
        return [value for _, value in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(10)
            process.kill()
