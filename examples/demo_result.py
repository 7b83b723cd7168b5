"""From the logs of the runs to rows and verdicts. Nothing here starts anything: it only compares."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from demo_disk import DiskTime
from demo_launch import Ended
from layouts import Layout

TOLERANCE = 3.0  # a restart may drift this many times as far as the control


@dataclass(frozen=True)
class Check:
    """One thing that has to be true."""

    name: str
    ok: bool
    detail: str = ""


@dataclass(frozen=True)
class Row:
    """One run of the table. `losses` are (step, loss); `differences` those to the uninterrupted run."""

    name: str
    title: str
    layout: Layout
    losses: tuple[tuple[int, float], ...]
    differences: tuple[tuple[int, float], ...] = ()
    control: float | None = None  # the furthest that the control drifts on this layout; None: has to be bitwise
    save_seconds: float | None = None
    load_seconds: float | None = None
    bytes: int = 0
    disk_ratio: float | None = None
    checks: tuple[Check, ...] = ()

    @property
    def difference(self) -> float | None:
        """The furthest this run is from the uninterrupted one at any step they share."""
        return max((abs(d) for _, d in self.differences), default=None)

    @property
    def save_rate(self) -> float | None:
        """Bytes per second."""
        return self.bytes / self.save_seconds if self.save_seconds else None

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)


@dataclass(frozen=True)
class Reference:
    """The uninterrupted run and the controls branched from it, as its log tells."""

    ended: Ended
    compare_at: int
    last: int

    @property
    def losses(self) -> dict[int, float]:
        return {e["step"]: e["loss"] for e in self.ended.all("step")}

    @property
    def data(self) -> dict[int, str]:
        return {e["step"]: e["data"] for e in self.ended.all("step")}

    def fingerprint(self, step: int) -> dict[str, Any]:
        return next((e for e in self.ended.all("fingerprint") if e["step"] == step), {})

    def control(self, layout: str) -> dict[int, float]:
        """Step -> loss of the run that changed to this layout in memory."""
        return {e["step"]: e["loss"] for e in self.ended.all("control") if e["layout"] == layout}

    def drift(self, layout: str) -> float | None:
        """The furthest that the change of layout alone takes the loss."""
        losses = self.losses
        return max((abs(loss - losses[step]) for step, loss in self.control(layout).items()), default=None)


def reference_row(reference: Reference, layout: Layout) -> Row:
    """The run that nothing interrupts, and that stores nothing."""
    complete = sorted(reference.losses) == list(range(reference.last + 1))
    hashed = all(reference.fingerprint(step).get("ranks_agree") for step in (reference.compare_at, reference.last))
    checks = (
        Check("ran to the end", reference.ended.code == 0 and complete),
        Check("its ranks agree on every leaf", hashed),
    )
    return Row("uninterrupted", "uninterrupted", layout, tuple(reference.losses.items()), checks=checks)


def killed_row(reference: Reference, ended: Ended, layout: Layout, kill_at: int) -> Row:
    """The run that one SIGKILL ends."""
    losses, differences = _losses(reference, ended)
    checks = (
        Check("one rank died of SIGKILL, the others with it", ended.code != 0 and "Signal 9 (SIGKILL)" in ended.log),
        Check(f"trained until step {kill_at}", bool(losses) and losses[-1][0] in (kill_at - 1, kill_at)),
        Check("up to there bitwise as the uninterrupted run", all(d == 0 for _, d in differences)),
    )
    return Row("killed", f"killed after step {kill_at}", layout, tuple(losses), tuple(differences), checks=checks)


def restart_row(reference: Reference, ended: Ended, layout: Layout, *, name: str, bitwise: bool) -> Row:
    """A run that started from the checkpoint, on the same layout (then bitwise to the end) or on another one."""
    losses, differences = _losses(reference, ended)
    restored = next(iter(ended.all("restored")), {})
    closed = next(iter(ended.all("closed")), {})
    row = Row(
        name,
        "restarted" if bitwise else "restarted elsewhere",
        layout,
        tuple(losses),
        tuple(differences),
        control=None if bitwise else reference.drift(layout.name),
        save_seconds=closed.get("seconds"),
        load_seconds=restored.get("seconds"),
        bytes=restored.get("bytes", 0),
    )
    wanted = list(range(reference.compare_at + 1, reference.last + 1))
    checks = [
        Check("ended well", ended.code == 0 and bool(closed)),
        Check(f"goes on at step {wanted[0]}, to the end", [step for step, _ in losses] == wanted),
        *_state_checks("loaded", reference.fingerprint(reference.compare_at), restored, layout.world),
        Check("reads the same data in the same order", _same_data(reference, ended)),
    ]
    if bitwise:
        final = next(iter(ended.all("fingerprint")), {})
        checks.append(Check("every loss bitwise equal", all(d == 0 for _, d in differences)))
        checks += _state_checks("final", reference.fingerprint(reference.last), final, layout.world)
    else:
        checks.append(_drift_check(reference, row))
    return replace(row, checks=tuple(checks))


def against_disk(rows: Sequence[Row], disk: Sequence[DiskTime]) -> list[Row]:
    """The rows with each save compared to the median of all raw writes: one alone may have met a busy disk."""
    limit = statistics.median(d.rate for d in disk)
    return [replace(row, disk_ratio=row.save_rate / limit if row.save_rate else None) for row in rows]


def stored_check(reference: Reference, found: dict[str, str]) -> Check:
    """The last step as it lies in storage, read by one process without restoring it."""
    wanted = {k: v for k, v in reference.fingerprint(reference.last).get("leaves", {}).items() if k != "schedule"}
    ok = bool(wanted) and found == wanted
    return Check("stored last step bitwise equal, opened without a process group", ok, f"{len(found)} tensors")


def _losses(reference: Reference, ended: Ended) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    losses = [(e["step"], e["loss"]) for e in ended.all("step")]
    expected = reference.losses
    return losses, [(step, loss - expected.get(step, float("inf"))) for step, loss in losses]


def _same_data(reference: Reference, ended: Ended) -> bool:
    steps = ended.all("step")
    return bool(steps) and all(e["data"] == reference.data.get(e["step"]) for e in steps)


def _state_checks(what: str, expected: dict[str, Any], found: dict[str, Any], world: int) -> list[Check]:
    """Weights, AdamW state and schedule leaf by leaf; the random state of rank r is that of r modulo the old world."""
    want, have = expected.get("leaves", {}), found.get("leaves", {})
    wrong = sorted(name for name in want.keys() | have.keys() if want.get(name) != have.get(name))
    same = bool(want) and not wrong and found.get("ranks_agree", False)
    detail = f"{len(want)} leaves" if same else f"{len(wrong)} of {len(want)} differ: {', '.join(wrong[:3])}"
    seeds = expected.get("rng", [])
    random = bool(seeds) and found.get("rng") == [seeds[rank % len(seeds)] for rank in range(world)]
    return [
        Check(f"{what} state bitwise equal, leaf by leaf", same, detail),
        Check(f"{what} random state equal", random),
    ]


def _drift_check(reference: Reference, row: Row) -> Check:
    name = f"loss within {TOLERANCE:.0f} x the control"
    if row.difference is None or row.control is None:
        return Check(name, False, "not measured")
    same = dict(row.losses) == reference.control(row.layout.name)
    detail = f"{row.difference:.1e}, control {row.control:.1e}" + (", bit for bit the control" if same else "")
    return Check(name, row.difference <= TOLERANCE * row.control, detail)
