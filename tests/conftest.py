"""Fixtures for all tests."""

from __future__ import annotations

import multiprocessing as mp
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

Fresh = Callable[..., Any]
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost rank is told by an exception, not by a C++ stack


def _call(pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        pipe.send((True, function(*args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


@pytest.fixture(scope="session")
def fresh() -> Fresh:
    """`fresh(function, *args)`: its result, from a new process that has torch and ckpt loaded and no second thread.

    Such processes are forked from one server, so each costs milliseconds; and they may fork in turn.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.tensor", "ckpt.checkpointer", "ckpt.checkpoint"])

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


@pytest.fixture
def quick_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one, for tests that sync thousands of files; else `tmp_path`."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or shutil.disk_usage(memory).free < 256 << 20:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="ckpt-test-", dir=memory) as made:
        yield Path(made)
