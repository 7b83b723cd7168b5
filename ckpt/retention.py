"""Retention: which committed steps of a run to keep. Pure functions over step records; nothing is deleted here."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ckpt.catalog import Listing, Step, higher_is_better, lineage
from ckpt.errors import UsageError

__all__ = [
    "KeepAll",
    "KeepAny",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "KeepWithin",
    "Policy",
    "kept",
    "metrics_of",
    "policies_from",
    "policies_told",
]


class Policy(Protocol):
    """Retention: which of the steps (oldest first) to keep. Pure; several policies keep what any of them keeps."""

    def __call__(self, steps: Sequence[Step]) -> list[bool]: ...


@dataclass(frozen=True)
class KeepLast:
    """Keeps the newest `n`."""

    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UsageError("KeepLast(n): n must be 1 or more")

    def __call__(self, steps: Sequence[Step]) -> list[bool]:
        return [i >= len(steps) - self.n for i in range(len(steps))]


@dataclass(frozen=True)
class KeepEvery:
    """Keeps the steps whose number is a multiple of `steps`, or one less (Every(k) saves after k, 2k, ... steps)."""

    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError("KeepEvery(steps): steps must be 1 or more")

    def __call__(self, steps: Sequence[Step]) -> list[bool]:
        return [s.step % self.steps == 0 or (s.step + 1) % self.steps == 0 for s in steps]


@dataclass(frozen=True)
class KeepBest:
    """Keeps the `n` best by a metric; steps without it are not kept by this policy."""

    metric: str
    n: int = 1

    def __call__(self, steps: Sequence[Step]) -> list[bool]:
        having = [
            (s.commit.metrics[self.metric], i)
            for i, s in enumerate(steps)
            if s.commit and self.metric in s.commit.metrics
        ]
        having = [(v, i) for v, i in having if v == v]
        having.sort(key=lambda pair: (-pair[0] if higher_is_better(self.metric) else pair[0], -pair[1]))
        chosen = {i for _, i in having[: self.n]}
        return [i in chosen for i in range(len(steps))]


@dataclass(frozen=True)
class KeepWithin:
    """Keeps the steps that were committed at most so long before the newest one: nothing gets too old while no job runs.

    A step whose time cannot be told is kept. Times are those of the clock of whoever committed.
    """

    days: float = 0.0
    hours: float = 0.0
    minutes: float = 0.0

    def __post_init__(self) -> None:
        if not self._span.total_seconds() > 0 or min(self.days, self.hours, self.minutes) < 0:
            raise UsageError("KeepWithin(hours=24): a positive time, in days=, hours= or minutes=")

    @property
    def _span(self) -> datetime.timedelta:
        try:
            return datetime.timedelta(days=self.days, hours=self.hours, minutes=self.minutes)
        except (OverflowError, ValueError, TypeError):
            raise UsageError(f"{self}: days=, hours= and minutes= are numbers, of at most 10**9 days") from None

    def __call__(self, steps: Sequence[Step]) -> list[bool]:
        times = [_time(s) for s in steps]
        newest = next((t for t in reversed(times) if t is not None), None)
        return [t is None or newest is None or newest - t <= self._span for t in times]


def _time(step: Step) -> datetime.datetime | None:
    """When a step was committed."""
    try:
        found = datetime.datetime.fromisoformat(step.commit.time if step.commit else "")
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=datetime.UTC)


class KeepAny:
    """Keeps what any of the policies keeps, as a list of policies does."""

    def __init__(self, *policies: Policy) -> None:
        self.policies = _some(policies, "KeepAny")

    def __call__(self, steps: Sequence[Step]) -> list[bool]:
        return [any(row) for row in zip(*(p(steps) for p in self.policies), strict=True)]


class KeepAll:
    """Keeps what all of the policies keep, as KeepAll(KeepEvery(1000), KeepWithin(days=7))."""

    def __init__(self, *policies: Policy) -> None:
        self.policies = _some(policies, "KeepAll")

    def __call__(self, steps: Sequence[Step]) -> list[bool]:
        return [all(row) for row in zip(*(p(steps) for p in self.policies), strict=True)]


def _some(policies: tuple[Policy, ...], name: str) -> tuple[Policy, ...]:
    if not policies or not all(callable(p) for p in policies):
        raise UsageError(f"{name} needs policies, as {name}(KeepLast(3), KeepEvery(1000))")
    return policies


def metrics_of(policies: Sequence[Policy]) -> Iterator[KeepBest]:
    """The policies that look at a metric, wherever they stand among the others."""
    for p in policies:
        if isinstance(p, KeepBest):
            yield p
        elif isinstance(p, (KeepAny, KeepAll)):
            yield from metrics_of(p.policies)


def kept(listing: Listing, policies: Sequence[Policy]) -> dict[str, bool]:
    """Folder -> whether to keep it, over the committed steps. The latest step is always kept; with no policy
    everything is.

    A policy is asked twice: about the steps that lead to the present, so that a rollback does not make it keep
    what was left behind instead of them; and about all, what was left behind counting as older.
    """
    present = lineage(listing)[::-1]
    ours = {s.folder for s in present}
    steps = [*(s for s in listing.committed if s.folder not in ours), *present]
    keep = {s.folder: not policies for s in listing.committed}
    for group in (present, steps):
        for policy in policies:
            for s, k in zip(group, policy(group), strict=True):
                keep[s.folder] = keep[s.folder] or k
    for s in (present or steps)[-1:]:
        keep[s.folder] = True
    return keep


_SIMPLE = {kind.__name__: kind for kind in (KeepLast, KeepEvery, KeepBest, KeepWithin)}


def policies_told(policies: Sequence[Policy]) -> list[list[Any]]:
    """Policies as JSON, for another process. UsageError for one that is not of this module."""
    out: list[list[Any]] = []
    for p in policies:
        name = type(p).__name__
        if isinstance(p, (KeepAny, KeepAll)):
            out.append([name, policies_told(p.policies)])
        elif type(p) is _SIMPLE.get(name):
            out.append([name, vars(p)])
        else:
            raise UsageError(
                f"keep={p!r}: the keeper, which carries steps from local= to the run, knows only ckpt's own policies"
            )
    return out


def policies_from(told: Sequence[Sequence[Any]]) -> list[Policy]:
    """What `policies_told` told."""
    out: list[Policy] = []
    for name, content in told:
        if name in ("KeepAny", "KeepAll"):
            out.append((KeepAny if name == "KeepAny" else KeepAll)(*policies_from(content)))
        else:
            out.append(_SIMPLE[name](**content))
    return out
