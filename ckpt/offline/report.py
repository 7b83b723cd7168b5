"""The report of a run: what its events say, put together (`gather`) and added up (`Data.numbers`); report_page.py draws it."""

from __future__ import annotations

import datetime
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from ckpt.catalog import Listing
from ckpt.commit import Commit
from ckpt.events import Event
from ckpt.offline.report_svg import Axis, clean

__all__ = ["PARTS", "Data", "Numbers", "Occurrence", "Problem", "gather"]

PARTS = {
    "eager": "eager copy",
    "other": "rest of the stall",
    "fence": "waiting at the fence",
    "lazy": "lazy copy",
    "encode": "encode",
    "write": "write",
    "commit": "commit",
}
"""Where time goes -> what the page calls it. Training stands still in the first three; the rest runs beside it."""

_KINDS = ("snapshot", "save", "skip", "restore", "protect")
_WORST = ("failed", "voided", "sealed")  # of a snapshot: one rank without it, and it is none
_BEST = ("committed", "failed")  # of a save: committed is committed, whatever a rank heard of it
_ROWS = 64  # that ranks are grouped into: the page is bounded, the run is not
_LAST = 250_000_000_000.0  # Unix time; the calendar of Python ends in the year 9999


@dataclass(frozen=True)
class Occurrence:
    """One snapshot, save, skip or restore: the rows of all ranks that tell of it. `stall`: of the slowest rank."""

    kind: str
    generation: int
    step: int
    time: float
    outcome: str
    why: str
    stall: float
    bytes: int
    ranks: int


@dataclass(frozen=True)
class Problem:
    """One reason why something was not taken or went wrong: `times` it did, on how many ranks, from when to when."""

    kind: str
    outcome: str
    why: str
    times: int
    ranks: int
    first_step: int
    last_step: int


@dataclass(frozen=True)
class Numbers:
    """What a run adds up to; bytes, and seconds summed over ranks, where nothing else is said.

    events          rows that were counted; `passed_over`: rows with impossible values, or of a kind not known here
    steps           training steps, those repeated after a restore included
    committed       saves, those of the listing that no event tells of included
    restores        source -> times
    bytes_stored    of the commits that the run holds now; `bytes_written`: by all saves that events tell of
    loop_seconds    that training took, of which `stall_seconds` went to snapshots: `stall_percent`, None if not known
    stall_*_ms      per snapshot, the slowest rank counting; percentiles by nearest rank; None without a snapshot
    parts           seconds by part, see PARTS; `seconds_per_gib`: the same per GiB written, {} if nothing was
    """

    run: str
    events: int
    passed_over: int
    generations: tuple[int, ...]
    ranks: int
    hosts: int
    began: float
    ended: float
    steps: int
    last_step: int
    sealed: int
    voided: int
    failed_snapshots: int
    committed: int
    failed_saves: int
    skipped: int
    restores: Mapping[str, int]
    bytes_stored: int
    bytes_written: int
    loop_seconds: float
    stall_seconds: float
    stall_percent: float | None
    fence_seconds: float
    stall_median_ms: float | None
    stall_p95_ms: float | None
    stall_max_ms: float | None
    parts: Mapping[str, float]
    seconds_per_gib: Mapping[str, float]
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class Data:
    """What the page is drawn from: events and the occurrences they make up, both by time, and what the run holds.

    All but `events` and `passed_over` needs one event or more.
    """

    events: Sequence[Event]
    occurrences: Sequence[Occurrence]
    listing: Listing
    passed_over: int = 0
    commits: Mapping[tuple[int, int], Commit] = field(default_factory=dict)

    @cached_property
    def ranks(self) -> list[int]:
        return sorted({e.rank for e in self.events})

    @cached_property
    def axis(self) -> Axis:
        """Wall time, from the first event to the last."""
        last = max(self.events[-1].time, self.occurrences[-1].time)
        return Axis(self.events[0].time, last)

    @cached_property
    def groups(self) -> list[tuple[str, range]]:
        """(name, indices into `ranks`): one rank each, or so many that few rows are left."""
        each = math.ceil(len(self.ranks) / _ROWS)
        out = []
        for at in range(0, len(self.ranks), each):
            some = range(at, min(at + each, len(self.ranks)))
            first, last = self.ranks[some[0]], self.ranks[some[-1]]
            out.append((f"rank {first}" if first == last else f"ranks {first}–{last}", some))
        return out

    @cached_property
    def spent(self) -> Mapping[int, tuple[float, ...]]:
        """Rank -> seconds, in the order of PARTS; restores are not part of it."""
        sums = {r: [0.0] * len(PARTS) for r in self.ranks}
        for e in self.events:
            if e.kind != "restore":
                other = max(0.0, e.stall - e.eager)
                row = sums[e.rank]
                for k, v in enumerate((e.eager, other, e.fence, e.lazy, e.encode, e.write, e.commit)):
                    row[k] += v
        return {r: tuple(row) for r, row in sums.items()}

    @cached_property
    def written(self) -> Mapping[int, int]:
        """Rank -> bytes of its packs."""
        sums = dict.fromkeys(self.ranks, 0)
        for e in self.events:
            if e.kind == "save":
                sums[e.rank] += e.bytes
        return sums

    @cached_property
    def numbers(self) -> Numbers:
        return _count_up(self)

    def of(self, kind: str, *outcomes: str) -> list[Occurrence]:
        return [o for o in self.occurrences if o.kind == kind and (not outcomes or o.outcome in outcomes)]


def gather(events: Iterable[Event], listing: Listing) -> Data:
    """Sorts events by time and puts the rows together that tell of the same thing. What cannot be is passed over."""
    good, bad = [], 0
    for e in events:
        if _possible(e):
            good.append(_cleaned(e))
        else:
            bad += 1
    good.sort(key=lambda e: e.time)
    having = [s.commit for s in listing.steps if s.commit is not None]
    commits = {(c.generation, c.step): c for c in having if 0 <= c.bytes < 1 << 63}
    seen: Counter[tuple[str, int, int, int]] = Counter()
    rows: defaultdict[tuple[str, int, int, int], list[Event]] = defaultdict(list)
    for e in good:  # the n-th time that a rank tells of a step is the n-th time that it happened
        key = (e.kind, e.generation, e.step)
        rows[(*key, seen[(*key, e.rank)])].append(e)
        seen[(*key, e.rank)] += 1
    found = [_together(group, commits) for group in rows.values()]
    told = {(o.generation, o.step) for o in found if o.kind == "save" and o.outcome == "committed"}
    found += [_untold(c) for key, c in commits.items() if key not in told]
    return Data(good, sorted(found, key=lambda o: o.time), listing, bad, commits)


def _possible(e: Event) -> bool:
    """Whether a row can be true; what a NaN is compared with is not."""
    whole = (e.rank, e.step, e.generation, e.steps, e.bytes)
    spans = (e.loop, e.stall, e.eager, e.lazy, e.fence, e.encode, e.write, e.commit, e.lag)
    sound = all(0 <= n < 1 << 63 for n in whole) and all(0 <= s < _LAST for s in spans)
    return sound and 0 <= e.time < _LAST and e.kind in _KINDS


def _cleaned(e: Event) -> Event:
    why, outcome, host = clean(e.why), clean(e.outcome, 64), clean(e.host, 64)
    same = why is e.why and outcome is e.outcome and host is e.host
    return e if same else replace(e, why=why, outcome=outcome, host=host)


def _together(rows: Sequence[Event], commits: Mapping[tuple[int, int], Commit]) -> Occurrence:
    e = rows[0]
    outcomes = {r.outcome for r in rows}
    order = {"snapshot": _WORST, "save": _BEST}.get(e.kind, ())
    outcome = next((o for o in order if o in outcomes), e.outcome)
    why = next((r.why for r in rows if r.why and r.outcome == outcome), "")
    commit = commits.get((e.generation, e.step)) if outcome == "committed" else None
    nbytes = commit.bytes if commit else sum(r.bytes for r in rows)
    return Occurrence(e.kind, e.generation, e.step, e.time, outcome, why, max(r.stall for r in rows), nbytes, len(rows))


def _untold(c: Commit) -> Occurrence:
    """A commit that no event tells of; without a place in time if its time cannot be read."""
    try:
        time = datetime.datetime.fromisoformat(c.time).timestamp()
    except (ValueError, OverflowError, OSError):
        time = 0.0
    return Occurrence("save", c.generation, c.step, time, "committed", "", 0.0, c.bytes, 0)


# Adding up.


def _count_up(data: Data) -> Numbers:
    """The numbers of a run with one event or more."""
    events = data.events
    steps: Counter[int] = Counter()
    for e in events:
        steps[e.rank] += e.steps
    sealed = data.of("snapshot", "sealed")
    stalls = sorted(o.stall for o in sealed)
    training = [e for e in events if e.kind != "restore"]
    loop, stall = math.fsum(e.loop for e in training), math.fsum(e.stall for e in training)
    parts = {k: math.fsum(column) for k, column in zip(PARTS, zip(*data.spent.values(), strict=True), strict=True)}
    written = sum(data.written.values())
    generations = {e.generation for e in events} | {g.generation for g in data.listing.generations}
    return Numbers(
        run=data.listing.run,
        events=len(events),
        passed_over=data.passed_over,
        generations=tuple(sorted(generations | {g for g, _ in data.commits})),
        ranks=len(data.ranks),
        hosts=len({e.host for e in events if e.host}),
        began=events[0].time,
        ended=events[-1].time,
        steps=max(steps.values()),
        last_step=max(e.step for e in events),
        sealed=len(sealed),
        voided=len(data.of("snapshot", "voided")),
        failed_snapshots=len(data.of("snapshot", "failed")),
        committed=len(data.of("save", "committed")),
        failed_saves=len(data.of("save", "failed")),
        skipped=len(data.of("skip")),
        restores=dict(Counter(o.outcome for o in data.of("restore"))),
        bytes_stored=sum(c.bytes for c in data.commits.values()),
        bytes_written=written,
        loop_seconds=loop,
        stall_seconds=stall,
        stall_percent=100 * stall / loop if loop else None,
        fence_seconds=parts["fence"],
        stall_median_ms=_percentile(stalls, 50),
        stall_p95_ms=_percentile(stalls, 95),
        stall_max_ms=_percentile(stalls, 100),
        parts=parts,
        seconds_per_gib={k: v / (written / (1 << 30)) for k, v in parts.items()} if written else {},
        problems=tuple(_problems(data)),
    )


def _percentile(ordered: Sequence[float], percent: int) -> float | None:
    """In milliseconds, by nearest rank: always a value that occurred."""
    return ordered[max(0, math.ceil(percent * len(ordered) / 100) - 1)] * 1000 if ordered else None


def _problems(data: Data) -> list[Problem]:
    """What was skipped, voided or failed, by reason; the most frequent first. A rank's own reason is told as well."""
    found: defaultdict[tuple[str, str, str], list[Event]] = defaultdict(list)
    for e in data.events:
        if e.kind == "skip" or e.outcome in ("voided", "failed"):
            found[e.kind, e.outcome, e.why].append(e)
    out = []
    for (kind, outcome, why), rows in found.items():
        ranks = Counter(e.rank for e in rows)
        steps = [e.step for e in rows]
        out.append(Problem(kind, outcome, why, max(ranks.values()), len(ranks), min(steps), max(steps)))
    return sorted(out, key=lambda p: (-p.times, p.first_step, p.kind, p.why))
