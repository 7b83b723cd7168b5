"""Running averages over deaths of trainers and keepers: what comes back is what an undisturbed run has, bit by bit.

The oracle folds, with numpy and the closed forms of the rates, the contents that the trainer is known to have had at the
steps that were sealed.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import keepers
import numpy as np
import pytest
from forks import Fresh
from keepers import WIDE, Trainer, content, nothing_left, scene, until

import ckpt
from ckpt.merge import weights

NEVER = 1000
RULES: dict[str, Any] = {"ema": ckpt.EMA(half_life=3), "mean": ckpt.Power(q=1)}
SIZES = {"wide": WIDE, "small": 35, "seen": 1000}


def expected(steps: list[int], name: str, leaf: str, size: int = 0) -> np.ndarray[Any, Any]:
    """An average of the contents at these steps."""
    size = size or SIZES[leaf]
    rates = weights.power_rates([s + 1 for s in steps], 1) if name == "mean" and len(steps) > 1 else [1.0]
    if name == "ema":
        rates = [1.0, *(-np.expm1(-np.log(2) * gap / 3) for gap in np.diff(steps))]
    a = np.zeros(size, dtype=np.float32)
    for step, rate in zip(steps, rates, strict=True):
        x = content(step, "seen 0" if leaf == "seen" else leaf, size).numpy()
        a = x.copy() if rate == 1 else a + np.float32(rate) * (x - a)
    return a


def check(t: Trainer, steps: list[int], names: tuple[str, ...] = ("ema", "mean"), wide: int = WIDE) -> None:
    for name in names:
        found = t("average", name)
        assert found.keys() == SIZES.keys()
        for leaf, value in found.items():
            size = wide if leaf == "wide" else SIZES[leaf]
            assert np.array_equal(value, expected(steps, name, leaf, size)), (name, leaf, steps)


def begin(run: str, rules: dict[str, Any] | None = None, storage: int | None = NEVER, **more: Any) -> Trainer:
    t = Trainer(run, opened=False, **more)
    t("open", 1, storage, RULES if rules is None else rules)
    return t


def _trainer_killed(folder: str, point: str) -> None:
    wide = 3_000_000 if point == "trainer sealed" else WIDE  # the fold takes longer than dying
    with scene(folder) as run:
        t = begin(run, wide=wide)
        t("restore")
        steps = t("seal", 4)
        check(t, steps, wide=wide)
        t("fault", "kill", point, 2)
        sealed = []
        try:
            while True:
                sealed += t("lockstep", 1)
        except keepers.Died as e:
            assert e.code == keepers.KILLED
        t = begin(run, wide=wide)
        start, source = t("restore")
        assert source == "memory"
        steps = sorted({*steps, *sealed, start - 1})
        assert steps[-1] == start - 1
        if point == "trainer sealed":  # what was sealed is folded, whoever dies meanwhile
            assert start - 1 == keepers.seen(run, "at")
        check(t, steps, wide=wide)
        steps += t("seal", 3)
        check(t, steps, wide=wide)
        t.finish()
        nothing_left(run)


@pytest.mark.parametrize("point", ["trainer copied", "trainer sealed"])
def test_a_trainer_is_killed(fresh: Fresh, tmp_path: Path, point: str) -> None:
    fresh(_trainer_killed, str(tmp_path), point)


def _everything_killed(folder: str) -> None:
    with scene(folder) as run:
        t = begin(run, storage=3)
        t("restore")
        steps = t("seal", 7)
        stored = t("quiet")
        t.kill()
        for pid in keepers.keepers(run):
            os.kill(pid, signal.SIGKILL)
            keepers.gone(pid)
        t = begin(run, storage=3)
        start, source = t("restore")
        assert source == "storage" and start - 1 >= stored > 0
        steps = [s for s in steps if s < start]
        check(t, steps)
        steps += t("seal", 3)
        check(t, steps)
        t.finish()
        nothing_left(run)


def test_everything_is_killed_and_storage_has_them(fresh: Fresh, tmp_path: Path) -> None:
    fresh(_everything_killed, str(tmp_path))


def _keeper_killed(folder: str, point: str) -> None:
    with scene(folder) as run:
        t = begin(run, env={"CKPT_FAULT": f"kill@{point}#4"} if point else {})
        t("set", "CKPT_FAULT", None)
        t("restore")
        first = keepers.keeper(run)
        steps: list[int] = []
        if point:
            until(lambda: steps.extend(t("lockstep", 1)) or keepers.state_of(first) in "Z", f"passes {point!r}")
        else:
            steps += t("seal", 4)
            os.kill(first, signal.SIGKILL)
        assert keepers.gone(first) == -signal.SIGKILL
        assert len(steps) >= 3
        steps += t("seal", 3)
        assert keepers.keeper(run) != first
        check(t, steps)
        assert any("go on from step" in line for line in t("logged"))
        t.finish()
        nothing_left(run)


@pytest.mark.parametrize("point", ["", "fold begins", "fold done"])
def test_a_keeper_is_killed(fresh: Fresh, tmp_path: Path, point: str) -> None:
    fresh(_keeper_killed, str(tmp_path), point)


def _not_finite(folder: str) -> None:
    with scene(folder) as run:
        t = begin(run)
        t("restore")
        steps = t("seal", 3)
        sealed: list[int] = []
        while not sealed:  # until one is snapshotted: like any other, but for the averages
            at = t("report")["steps"]
            t("poison", at)
            sealed = t("lockstep", 1)
        assert sealed == [at] and t("views")["ema"] == (len(steps), 1, steps[-1])
        check(t, steps)
        steps += t("seal", 2)
        check(t, steps)
        assert any(f"step {at} does not count in any average: not finite: model.small" in x for x in t("logged"))
        t.finish()


def test_a_step_that_is_not_finite_does_not_count(fresh: Fresh, tmp_path: Path) -> None:
    fresh(_not_finite, str(tmp_path))


def _other_rules(folder: str) -> None:
    with scene(folder) as run:
        t = begin(run)
        t("restore")
        steps = t("seal", 4)
        t.kill()
        t = begin(run, {"ema": ckpt.EMA(half_life=3), "mean": ckpt.Power(q=2), "new": ckpt.Power(q=1)})
        t("restore")
        said = "\n".join(t("logged"))
        assert "'mean' begins anew" in said and "'new' begins" in said and "'ema'" not in said
        check(t, steps, ("ema",))
        with pytest.raises(keepers.Raised, match="nothing was folded"):
            t("average", "mean")
        later = t("seal", 2)
        check(t, [*steps, *later], ("ema",))
        assert t("views")["mean"] == (2, 0, later[-1]) == t("views")["new"]
        t.kill()
        t = begin(run, {"new": ckpt.Power(q=1)})
        t("restore")
        assert "'ema'" in "\n".join(t("logged")), "an average that is not continued is named"
        t.finish()
        nothing_left(run)


def test_another_rule_begins_another_average(fresh: Fresh, tmp_path: Path) -> None:
    fresh(_other_rules, str(tmp_path))


def _not_waited_for(folder: str) -> None:
    """Steps follow one another faster than folds: two are sealed before the first is folded."""
    with scene(folder) as run:
        t = begin(run, wide=3_000_000)
        t("restore")
        t("train", 60)
        steps = t("sealed_steps")
        assert len(steps) > 3
        for name in RULES:
            found = t("average", name)
            assert np.array_equal(found["wide"], expected(steps, name, "wide", 3_000_000)), (name, steps)
        t.finish()


def test_steps_that_overtake_folds_are_folded_in_order(fresh: Fresh, tmp_path: Path) -> None:
    fresh(_not_waited_for, str(tmp_path))


def _not_in_memory(folder: str) -> None:
    """The last step was not granted: the trainer stores it itself, with the averages of the step before."""
    with scene(folder) as run:
        t = begin(run)
        t("restore")
        steps = t("seal", 4)
        t("jump", 500)
        t("train", 1)
        report = t.finish()
        nothing_left(run)
        with ckpt.open(run) as c:
            assert c.step == report["last_step"] >= 500 and c.verify().ok
            for leaf in SIZES:
                stored = c.tensors[f"averages.ema.model.{leaf}"][...].reshape(-1)
                assert np.array_equal(stored, expected(steps, "ema", leaf))
        t = begin(run)
        start, source = t("restore")
        assert source == "storage" and start - 1 == report["last_step"]
        check(t, steps)
        steps += t("seal", 2)
        check(t, steps)
        t.finish()


def test_a_step_that_the_trainer_stores_itself_has_them(fresh: Fresh, tmp_path: Path) -> None:
    fresh(_not_in_memory, str(tmp_path))


def _damaged(folder: str) -> None:
    with scene(folder) as run:
        t = begin(run)
        t("restore")
        steps = t("seal", 3)
        bad = expected(steps, "ema", "wide").tobytes()
        found = 0
        for path in keepers.slots_of(keepers.keeper(run)):
            with open(path, "r+b") as f:
                at = f.read().find(bad)
                if at >= 0:
                    f.seek(at + 1000)
                    f.write(bytes([bad[1000] ^ 1]))
                    found += 1
        assert found == 1
        later = t("seal", 2)
        assert any("begin anew" in line for line in t("logged"))
        check(t, later)
        t.finish()


def test_a_flipped_bit_is_not_folded(fresh: Fresh, tmp_path: Path) -> None:
    fresh(_damaged, str(tmp_path))
