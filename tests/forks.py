"""Fresh processes, forked from a server that has torch and ckpt loaded: milliseconds each, and no second thread."""

from __future__ import annotations

import multiprocessing as mp
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

Fresh = Callable[..., Any]


def _call(pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        pipe.send((True, function(*args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def forks() -> Fresh:
    """`forks()(function, *args)`: its result, from a new process that may fork in turn."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch.distributed.tensor", "torch._dynamo", "ckpt.checkpointer", "ckpt.checkpoint"]
    )

    def run(function: Callable[..., Any], *args: Any, limit: float = 240.0) -> Any:
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_call, args=(theirs, function, args))
        process.start()
        theirs.close()
        try:
            if not mine.poll(limit):
                raise AssertionError(f"{function.__name__} gave no answer within {limit:.0f} s")
            ok, value = mine.recv()
        except EOFError:
            process.join()
            raise AssertionError(f"{function.__name__} died with code {process.exitcode}") from None
        finally:
            process.kill()
            process.join()
            mine.close()
        assert ok, value
        return value

    return run
