"""The model of an accelerator: what it says a copy takes, by a clock that only its waits move."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ckpt.snapshot import device
from ckpt.snapshot.device import Timed, device_of, pretend
from ckpt.source import TensorSource


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(device, "time", clock)
    return clock


@pytest.mark.parametrize("size", [1000, 1 << 16, 1 << 20])
def test_copies_take_as_long_as_the_bus_does(clock: Clock, size: int) -> None:
    timed = Timed(0.5)
    total = 0
    while total < 100 << 20:
        timed.read(torch.zeros(size, dtype=torch.uint8), np.empty(size, dtype=np.uint8))
        total += size
    assert timed.carried == total
    assert clock.now - 100.0 == pytest.approx(total / 0.5e9, abs=1e-3)


def test_a_bus_that_was_idle_owes_nothing(clock: Clock) -> None:
    timed = Timed(1.0)
    timed.read(torch.zeros(1 << 20, dtype=torch.uint8), np.empty(1 << 20, dtype=np.uint8))
    timed.step(50.0)
    timed.read(torch.zeros(1 << 21, dtype=torch.uint8), np.empty(1 << 21, dtype=np.uint8))
    assert clock.now - 150.0 == pytest.approx(3 * (1 << 20) / 1e9, abs=1e-3)


@pytest.mark.parametrize("moves", [True, False])
def test_bytes_arrive_unless_they_are_left_out(moves: bool) -> None:
    for wide, arrive in ((4, True), (40_000, moves)):  # small ones arrive anyway
        values = torch.arange(3.0 * wide).view(3, wide).t()
        with pretend(Timed(1e6, moves=moves)):
            source = TensorSource(values)
            out = np.zeros(12 * wide, dtype=np.uint8)
            source.into(0, out)
        assert source.flat is None and bool(out.any()) == arrive
        if arrive:
            assert out.tobytes() == values.contiguous().numpy().tobytes()


def test_tensors_of_the_host_are_taken_for_those_of_the_device_only_within() -> None:
    here = torch.zeros(1)
    before = device_of(here)
    with pretend(Timed(1.0)) as _:
        assert device_of(here) is not before
    assert device_of(here) is before and TensorSource(here).flat is not None
