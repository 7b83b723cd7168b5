"""Where tensors are and how their bytes get from there into host memory, while the device computes.

Host     memory of this machine: a copy by the processor
Cuda     a side stream that begins where the training stream is now, into pinned slots. Has not been run: the
         machines of this project have no GPU
Timed    a model of an accelerator, for tests and benchmarks: tensors of the host behind a bus of a given speed, and
         steps that are timed waits
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["Device", "Host", "Timed", "begin_copies", "device_of", "pin", "pretend"]

Bytes = npt.NDArray[np.uint8]
_torch_cuda: Any = torch.cuda


class Device(Protocol):
    """What a snapshot needs of a device. `mapped`: its tensors can be read at their addresses."""

    mapped: bool

    def begin(self) -> None:
        """Called by the training thread: what is read from now on is what was computed until here, or is fenced."""
        ...

    def read(self, view: torch.Tensor, out: Bytes) -> None:
        """Copies the bytes of `view`, row-major, into `out`, which has as many; returns when they are there. Called by
        the copying thread, and for what is copied eagerly by the training thread."""
        ...


class Host:
    """Tensors in host memory: there is nothing to wait for."""

    mapped = True

    def begin(self) -> None:
        pass

    def read(self, view: torch.Tensor, out: Bytes) -> None:
        _typed(out, view).copy_(view)


class Cuda:
    """One CUDA device. Has not been run."""

    mapped = False

    def __init__(self, index: int) -> None:
        self._index = index
        self._stream = _torch_cuda.Stream(index)

    def begin(self) -> None:
        self._stream.wait_stream(_torch_cuda.current_stream(self._index))

    def read(self, view: torch.Tensor, out: Bytes) -> None:
        with _torch_cuda.stream(self._stream):
            _typed(out, view).copy_(view, non_blocking=True)
        self._stream.synchronize()


class Timed:
    """A model of an accelerator. Its bus carries `gbps` GB/s, one copy at a time, and a copy takes that long without
    the processor; then the bytes are moved, which costs the processor what a real device would not. With `moves=False`
    all but small ones are left out: for benchmarks of what a save costs, whose snapshots are then nonsense.
    """

    mapped = False

    def __init__(self, gbps: float, *, moves: bool = True) -> None:
        self._rate, self._moves = gbps * 1e9, moves
        self._bus = threading.Lock()
        self._free = 0.0  # when the bus will have carried all that it was given
        self.carried = 0
        """Bytes, so far."""

    def begin(self) -> None:
        pass

    def read(self, view: torch.Tensor, out: Bytes) -> None:
        with self._bus:
            self._free = max(self._free, time.monotonic()) + len(out) / self._rate
            self.carried += len(out)
            wait = self._free - time.monotonic()
        if wait > _GRAIN:  # a sleep has a price of its own: small debts are paid together
            time.sleep(wait)
        if self._moves or len(out) <= _SMALL:
            _typed(out, view).copy_(view)

    def step(self, seconds: float) -> None:
        """Computes, which leaves the processor idle."""
        time.sleep(seconds)


_GRAIN = 1e-3
_SMALL = 64 << 10
_host: Device = Host()


@contextmanager
def pretend(device: Device) -> Iterator[None]:
    """Within, tensors of the host are taken for those of `device`."""
    global _host
    before, _host = _host, device
    try:
        yield
    finally:
        _host = before


def device_of(tensor: torch.Tensor) -> Device:
    """The device of a tensor."""
    return _cuda(tensor.device.index) if tensor.device.type == "cuda" else _host


def begin_copies() -> None:
    """A snapshot begins: `begin` on every device."""
    _host.begin()
    if _torch_cuda.is_initialized():
        for index in range(_torch_cuda.device_count()):
            _cuda(index).begin()


def pin(buffer: Bytes) -> None:
    """Lets CUDA devices copy into memory without a detour. Has not been run."""
    if _torch_cuda.is_initialized():
        _torch_cuda.cudart().cudaHostRegister(buffer.ctypes.data, len(buffer), 0)


@cache
def _cuda(index: int) -> Cuda:
    return Cuda(index)


def _typed(out: Bytes, like: torch.Tensor) -> torch.Tensor:
    return torch.frombuffer(out, dtype=like.dtype).view(like.shape)
