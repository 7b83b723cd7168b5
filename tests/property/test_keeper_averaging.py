"""The order in which a keeper folds: whatever comes first, from the newest complete step, never in place."""

from __future__ import annotations

import itertools
import os
import queue
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.format.fragment import whole
from ckpt.format.pack import TensorSpec, layout_pack
from ckpt.keeper.averaged import encode_progress, pack_start, with_averages
from ckpt.keeper.averaging import Averaging
from ckpt.keeper.holding import Memory, pieces_of
from ckpt.keeper.protocol import Frame, frame
from ckpt.merge.average import EMA, Progress
from ckpt.plan import SHARD, Claim, Claims, merge
from ckpt.snapshot.copier import Snapshot
from ckpt.write import Stored, encode_report

RULE = EMA(half_life=2)
SIZE = 70_000  # more than one block
PLAN = merge([Claims.of([Claim(TensorSpec("w", "float32", (SIZE,)), (whole((SIZE,)),), SHARD)])])
BOTH = with_averages(PLAN, 1, ["ema"], {"w": "w"})
LAYOUT = layout_pack(pieces_of(PLAN, 0, ()))
SECOND = layout_pack(pieces_of(BOTH, 1, ()))
SLOT = pack_start(LAYOUT.size) + SECOND.size


class Scene:
    """One rank, its slots, its keeper's folds; `told` is what the seat heard."""

    def __init__(self, slots: int) -> None:
        self.actions: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.told: list[Frame] = []
        self.memory = {}
        for n in range(slots):
            fd = os.memfd_create("test")
            os.ftruncate(fd, SLOT)
            self.memory[n] = Memory(fd, SLOT)
        self.folds = Averaging(self.actions.put, lambda _, n: self.memory[n], lambda _: BOTH, self.told.append)
        self.folds.begin(1)
        self.seed()

    def seed(self, plan: str = "p") -> None:
        self.folds.seed(0, frame("averages", plan=plan, progress=encode_progress({"ema": Progress(RULE.spec)})))

    def grant(self, step: int, slot: int) -> None:
        self.folds.obey(frame("grant", step=step, slot=slot))

    def seal(self, step: int, slot: int) -> None:
        """As a trainer does it: what the snapshot holds is a function of the step."""
        snapshot = Snapshot(LAYOUT, [Stored(theta(step).view(np.uint8))], [False], self.memory[slot].writable)
        head = {"step": step, "plan": "p", "objects": [], "copies": {}, "epoch": 0}
        self.folds.obey(frame("weigh", step=step, marks={"ema": [step + 1.0, 0.0]}))
        self.folds.sealed(0, frame("sealed", encode_report(snapshot.seal()), **head))

    def run(self) -> None:
        """Until no fold is under way."""
        while self.folds.busy:
            self.actions.get(timeout=60)()

    def whole(self, step: int) -> None:
        self.folds.obey(frame("complete", key=[1, step]))

    def average(self, slot: int) -> np.ndarray[Any, Any]:
        at = pack_start(LAYOUT.size) + int(SECOND.offset[0])
        return self.memory[slot].buffer[at : at + 4 * SIZE].view(np.float32).copy()

    def close(self) -> None:
        self.folds.begin(1)
        self.run()
        for memory in self.memory.values():
            memory.close()


def theta(step: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(step).standard_normal(SIZE).astype(np.float32)


def expected(steps: list[int]) -> np.ndarray[Any, Any]:
    a = theta(steps[0])
    for before, step in itertools.pairwise(steps):
        a = a + np.float32(-np.expm1(-np.log(2) * (step - before) / 2)) * (theta(step) - a)
    return a


@pytest.fixture
def scene() -> Iterator[Scene]:
    s = Scene(3)
    yield s
    s.close()


@pytest.mark.parametrize("first", ["complete", "void"])
def test_a_step_waits_until_the_one_before_is_decided(scene: Scene, first: str) -> None:
    scene.grant(0, 0)
    scene.seal(0, 0)
    scene.run()
    scene.whole(0)
    scene.grant(1, 1)
    scene.grant(2, 2)
    scene.seal(2, 2)
    scene.run()
    assert [f["step"] for f in scene.told] == [0]
    if first == "complete":
        scene.seal(1, 1)
        scene.run()
        assert [f["step"] for f in scene.told] == [0, 1], "it is told of, but not yet whole"
        scene.whole(1)
    else:
        scene.folds.obey(frame("void", step=1, why=""))
    scene.run()
    assert scene.told[-1]["step"] == 2
    assert np.array_equal(scene.average(2), expected([0, 1, 2] if first == "complete" else [0, 2]))


def test_a_base_in_the_slot_that_is_folded_into_is_kept(scene: Scene) -> None:
    """The seat began anew and does not know that the slot held the newest step. A void fold leaves no trace in it."""
    scene.grant(0, 0)
    scene.seal(0, 0)
    scene.run()
    scene.whole(0)
    for step in (1, 2):
        scene.grant(step, 0)
        scene.seal(step, 0)
        scene.run()
        if step == 1:
            scene.folds.obey(frame("void", step=1, why=""))
    assert np.array_equal(scene.average(0), expected([0, 2]))


def test_a_life_that_is_over_says_nothing(scene: Scene) -> None:
    scene.grant(0, 0)
    scene.seal(0, 0)
    scene.folds.begin(1)
    scene.run()
    assert scene.told == []


def test_what_cannot_be_folded_any_more_is_missed(scene: Scene) -> None:
    scene.seal(5, 0)  # never granted, as far as this keeper knows
    scene.seed("another plan")
    scene.grant(6, 1)
    scene.seal(6, 1)
    scene.run()
    assert [(f.kind, f["step"]) for f in scene.told] == [("missed", 5), ("missed", 6)]


def test_what_is_told_waits_for_folds(scene: Scene) -> None:
    said: list[int] = []
    scene.grant(0, 0)
    scene.seal(0, 0)
    scene.folds.settled(0, lambda: said.append(len(scene.told)))
    assert not said
    scene.run()
    assert said == [1]


@given(st.lists(st.tuples(st.integers(1, 3), st.sampled_from(["whole", "void", "missed"])), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_averages_are_of_the_complete_steps(course: list[tuple[int, str]]) -> None:
    s, counted, step, newest = Scene(2), [], 0, -1
    try:
        for gap, end in course:
            step += gap
            slot = 1 - newest if newest >= 0 else 0
            s.grant(step, slot)
            if end != "missed":
                s.seal(step, slot)
                s.run()
            if end == "whole":
                s.whole(step)
                counted.append(step)
                newest = slot
                assert np.array_equal(s.average(slot), expected(counted))
            else:
                s.folds.obey(frame("void", step=step, why=""))
        assert all(f.kind == "sealed" for f in s.told)
    finally:
        s.close()
