"""The page of a report: a list of sections, each a function of the data that gives "" where it has nothing to say."""

from __future__ import annotations

import datetime
from collections import defaultdict
from collections.abc import Callable, Sequence

from ckpt.events import Event
from ckpt.offline.report import PARTS, Data, Numbers, Occurrence
from ckpt.offline.report_averages import AVERAGES_STYLE, ledger_sections
from ckpt.offline.report_ledger import Ledger
from ckpt.offline.report_svg import (
    STYLE,
    Bar,
    Cell,
    Dot,
    Mark,
    bars,
    clock,
    esc,
    heat_map,
    legend,
    line,
    milliseconds,
    seconds,
    size,
    stems,
    table,
    timeline,
)

__all__ = ["SECTIONS", "render"]

_COLUMNS, _DOTS, _LINES = 120, 300, 40  # the page is bounded, the run is not


def render(data: Data, ledger: Ledger | None = None) -> str:
    """One HTML page that needs nothing else: no script, no font, no image from anywhere. Without events it tells only what
    the ledger does."""
    parts = [section(data) for section in SECTIONS] if data.events else [_plain_title(data)]
    known = ledger_sections(ledger) if ledger else ""
    sections = "".join([*parts[:-1], known, parts[-1]] if data.events else [*parts, known])
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'"  # were anything of the data taken for HTML: it does nothing
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{esc(data.listing.run)} · ckpt report</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}{AVERAGES_STYLE}</style></head><body><main>{sections}</main></body></html>\n"
    )


def _section(name: str, title: str, text: str, content: str) -> str:
    return f'<section id="{name}"><h2>{esc(title)}</h2><p>{esc(text)}</p>{content}</section>' if content else ""


def _count(n: int, word: str) -> str:
    return f"{n:,} {word}" if n == 1 else f"{n:,} {word}s"


def _plain_title(data: Data) -> str:
    n = len(data.commits)
    return f"<header><p>ckpt report</p><h1>{esc(data.listing.run)}</h1><p>{esc(_count(n, 'checkpoint'))}</p></header>"


def _title(data: Data) -> str:
    n = data.numbers
    began, ended = (datetime.datetime.fromtimestamp(t, datetime.UTC) for t in (n.began, n.ended))
    until = f"{ended:%H:%M:%S}" if began.date() == ended.date() else f"{ended:%Y-%m-%d %H:%M:%S}"
    what = [_count(len(n.generations), "generation"), _count(n.ranks, "rank")]
    what += [_count(n.hosts, "host")] if n.hosts else []
    what += [f"{began:%Y-%m-%d %H:%M:%S} to {until} UTC ({clock(n.ended - n.began)})"]
    return f"<header><p>ckpt report</p><h1>{esc(n.run)}</h1><p>{' · '.join(map(esc, what))}</p></header>"


def _headline(data: Data) -> str:
    n = data.numbers
    lost = n.voided + n.failed_snapshots + n.failed_saves
    failed = [_count(k, word) for k, word in ((n.failed_snapshots, "snapshot"), (n.failed_saves, "save")) if k]
    failed_text = f"{' and '.join(failed)} failed" if failed else ""
    lost_text = ", ".join(x for x in (f"{n.voided:,} voided" if n.voided else "", failed_text) if x)
    restores = ", ".join(f"{times} from {source or 'elsewhere'}" for source, times in sorted(n.restores.items())[:4])
    cards = [
        ("training steps", f"{n.steps:,}", f"up to step {n.last_step:,}", ""),
        ("snapshots sealed", f"{n.sealed:,}", "", ""),
        ("saves committed", f"{n.committed:,}", f"{len(data.commits):,} of them in the run now", ""),
        ("skipped", f"{n.skipped:,}", "", ""),
        ("voided or failed", f"{lost:,}", lost_text, "bad" if lost else ""),
        ("restored", f"{sum(n.restores.values()):,}", restores, ""),
        ("bytes stored", size(n.bytes_stored), f"{size(n.bytes_written)} written in all", ""),
        ("total stall per rank", seconds(n.stall_seconds / n.ranks), _fence(n), ""),
    ]
    if n.stall_percent is not None:
        each = f"of {seconds(n.loop_seconds / n.ranks)} of training"
        cards.append(("stall of loop time", f"{n.stall_percent:.3g} %", each, ""))
    if n.stall_median_ms is not None and n.stall_p95_ms is not None and n.stall_max_ms is not None:
        rest = f"p95 {milliseconds(n.stall_p95_ms / 1e3)}, max {milliseconds(n.stall_max_ms / 1e3)}"
        cards.append(("stall per snapshot, median", milliseconds(n.stall_median_ms / 1e3), rest, ""))
    shown = (
        f'<div class="{look}"><span>{esc(name)}</span><b>{esc(value)}</b><small>{esc(more)}</small></div>'
        for name, value, more, look in cards
    )
    return f'<section id="numbers" class="numbers">{"".join(shown)}</section>'


def _fence(n: Numbers) -> str:
    return f"and {seconds(n.fence_seconds / n.ranks)} at the fence"


def _timeline(data: Data) -> str:
    began = data.axis.began
    starts: dict[int, float] = {}
    for e in data.events:
        starts.setdefault(e.generation, e.time)
    lanes: dict[str, list[Mark]] = {"restored": [], "snapshots": [], "saves": [], "skipped": []}
    where = {"restore": "restored", "snapshot": "snapshots", "save": "saves", "skip": "skipped"}
    for o in data.occurrences:
        if o.time >= began:
            look = "bad" if o.outcome in ("voided", "failed") else o.kind
            lanes[where[o.kind]].append(Mark(o.time, o.step, look, _what(o, data)))
    names = [(t, f"generation {g}") for g, t in starts.items()]
    shown = [(name, marks) for name, marks in lanes.items() if marks]
    looks = {m.look for _, marks in shown for m in marks}
    means = {
        "snapshot": "sealed",
        "save": "committed",
        "skip": "skipped",
        "restore": "restored",
        "bad": "voided or failed",
    }
    content = timeline(data.axis, names, shown) + legend((f"m-{k}", v) for k, v in means.items() if k in looks)
    return _section("timeline", "Timeline", "Wall time from the first event. Hover over a mark for more.", content)


def _what(o: Occurrence, data: Data) -> str:
    """One line about an occurrence."""
    said = {"restore": f"restored from {o.outcome}", "skip": "skipped"}.get(o.kind, o.outcome)
    commit = data.commits.get((o.generation, o.step)) if o.kind == "save" else None
    metrics = [f"{k} {v:.6g}" for k, v in list(commit.metrics.items())[:4]] if commit else []
    more = [size(o.bytes)] if o.bytes else []
    more += [f"stall {milliseconds(o.stall)}"] if o.stall else []
    said = ", ".join([f"{said} at {clock(o.time - data.axis.began)}", *more, *metrics])
    return f"{said}: {o.why}" if o.why else said


def _heat(data: Data) -> str:
    row_of = {data.ranks[i]: row for row, (_, some) in enumerate(data.groups) for i in some}
    columns = max(1, min(_COLUMNS, len({(o.generation, o.step) for o in data.of("snapshot")})))
    found: defaultdict[tuple[int, int], list[Event]] = defaultdict(list)
    for e in data.events:
        if e.kind != "restore":
            found[row_of[e.rank], data.axis.part(e.time, columns)].append(e)
    if not any(e.stall + e.fence for some in found.values() for e in some):
        return ""
    cells = {}
    for (row, column), some in found.items():
        worst = max(some, key=lambda e: e.stall + e.fence)
        text = f"rank {worst.rank}, step {worst.step}: stall {milliseconds(worst.stall)}, fence {milliseconds(worst.fence)}"
        if len(some) > 1:
            text = f"{data.groups[row][0]}, the longest of {len(some)}: {text}"
        cells[row, column] = Cell(worst.stall + worst.fence, f"{text}{f' ({worst.host})' if worst.host else ''}")
    content = heat_map(data.axis, [name for name, _ in data.groups], columns, cells)
    text = "Stall and waiting at the fence, by rank and time; of several rows in one cell, the longest counts."
    return _section("waits", "How long each rank waited", text, content)


def _where(data: Data) -> str:
    n = data.numbers
    total = sum(n.parts.values())
    if not total:
        return ""
    rows = []
    for name, some in data.groups:
        ranks = [data.ranks[i] for i in some]
        mean = [sum(column) / len(ranks) for column in zip(*(data.spent[r] for r in ranks), strict=True)]
        gib = sum(data.written[r] for r in ranks) / len(ranks) / (1 << 30)
        each = f" · {sum(mean) / gib:.3g} s/GiB" if gib else ""
        told = [
            (k, v, f"{name}, {PARTS[k]}: {seconds(v)}{f', {v / gib:.3g} s/GiB' if gib else ''}")
            for k, v in zip(PARTS, mean, strict=True)
        ]
        rows.append(Bar(name, [part for part in told if part[1]], f"{seconds(sum(mean))}{each}"))
    used = {k: v for k, v in n.parts.items() if v}
    per_gib = {k: f"{v:.3g}" for k, v in n.seconds_per_gib.items()}
    lines = [(PARTS[k], seconds(v / n.ranks), per_gib.get(k, ""), f"{100 * v / total:.1f} %") for k, v in used.items()]
    content = bars(rows) + legend((k, PARTS[k]) for k in used)
    content += table(("part", "seconds per rank", "seconds per GiB written", "share"), lines, "<>>>")
    text = "Training stands still in the warm colours; cool ones run beside it. Seconds per rank, and per GiB that it wrote"
    text += "; of several ranks in one row, the mean." if len(rows) < n.ranks else "."
    return _section("parts", "Where time went", text, content)


def _stalls(data: Data) -> str:
    n = data.numbers
    snapshots = sorted(data.of("snapshot", "sealed"), key=lambda o: o.step)
    if not any(o.stall for o in snapshots):
        return ""
    first, last = snapshots[0].step, snapshots[-1].step
    found: defaultdict[int, list[Occurrence]] = defaultdict(list)
    for o in snapshots:
        found[(o.step - first) * _DOTS // (last - first + 1)].append(o)
    dots = [_dot(some) for some in found.values()]
    levels = [(v / 1e3, k) for k, v in (("median", n.stall_median_ms), ("p95", n.stall_p95_ms)) if v]
    text = "Of the slowest rank of each snapshot, by training step, on a logarithmic scale; the band spans those that share a point."
    return _section("stall", "Stall per snapshot", text, line(dots, levels))


def _dot(some: Sequence[Occurrence]) -> Dot:
    ordered = sorted(o.stall for o in some)
    low, mid, high = ordered[0], ordered[(len(ordered) - 1) // 2], ordered[-1]
    text = f"step {some[0].step}: {milliseconds(mid)}"
    if len(some) > 1:
        text = f"steps {some[0].step} to {some[-1].step}: median {milliseconds(mid)}, max {milliseconds(high)}"
    return Dot(some[0].step, low, mid, high, text)


def _sizes(data: Data) -> str:
    saves = [o for o in data.of("save", "committed") if o.bytes and o.time >= data.axis.began]
    things = [(o.time, o.bytes, f"step {o.step}: {_what(o, data)}") for o in saves]
    text = "Bytes of each committed save, all ranks together."
    return _section("sizes", "Size of saves", text, stems(data.axis, things) if things else "")


def _troubles(data: Data) -> str:
    n = data.numbers
    if not n.problems:
        return ""
    rows = []
    for p in n.problems[:_LINES]:
        steps = f"{p.first_step:,}" if p.first_step == p.last_step else f"{p.first_step:,} to {p.last_step:,}"
        what = "skipped" if p.kind == "skip" else f"{p.kind} {p.outcome}"
        rows.append((what, p.why or "no reason given", f"{p.times:,}", f"{p.ranks:,}", steps))
    more = len(n.problems) - len(rows)
    content = table(("what", "why", "times", "ranks", "steps"), rows, "<<>>>")
    content += f"<p>{_count(more, 'more reason')}: --json has them all.</p>" if more else ""
    return _section("problems", "Skipped, voided, failed", "By reason, the most frequent first.", content)


def _foot(data: Data) -> str:
    n = data.numbers
    over = f"; {_count(n.passed_over, 'row')} passed over that cannot be true" if n.passed_over else ""
    return f"<footer>{esc(_count(n.events, 'event'))}{esc(over)}</footer>"


SECTIONS: Sequence[Callable[[Data], str]] = (
    _title,
    _headline,
    _timeline,
    _heat,
    _where,
    _stalls,
    _sizes,
    _troubles,
    _foot,
)
"""The page from top to bottom."""
