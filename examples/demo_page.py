"""The page of the demo: one self-contained HTML file, drawn with inline SVG, without any script."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from demo_hosts import STEPS, Story
from demo_result import TOLERANCE, Check, Row
from demo_table import COLUMNS, cells, notes

STYLE = """
:root { color-scheme: light dark; --paper: #fcfcfb; --ink: #1a1a19; --soft: #6b6a66; --line: #dddcd8; --band: #f0efec;
  --good: #00733b; --bad: #b3261e; --reference: #b9b8b3; --killed: #1a1a19;
  --c0: #2a78d6; --c1: #d9560d; --c2: #0a8f6c; --c3: #8a4fd0; }
@media (prefers-color-scheme: dark) { :root { --paper: #161615; --ink: #ececea; --soft: #a3a29d; --line: #3a3a37;
  --band: #232321; --good: #4cc38a; --bad: #ff8a80; --reference: #63625e; --killed: #ececea;
  --c0: #5fa4f0; --c1: #f58b4c; --c2: #3fc79d; --c3: #b48bf0; } }
body { margin: 0 auto; max-width: 70rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .5rem; text-wrap: balance; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .35rem; }
p { max-width: 44rem; margin: .35rem 0; }
.soft, figcaption, td small { color: var(--soft); }
.good { color: var(--good); } .bad { color: var(--bad); }
figure { margin: .5rem 0 0; } svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font: 13px system-ui, sans-serif; fill: var(--soft); }
.grid { stroke: var(--line); } .axis { stroke: var(--soft); } .band { fill: var(--band); }
.curve { fill: none; stroke-width: 2.5; stroke-linejoin: round; }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; margin: .4rem 0 .6rem; padding: 0; list-style: none; font-size: .9rem; }
.key i { display: inline-block; width: 1.6rem; height: 0; border-top: 4px solid; vertical-align: middle; margin-right: .45rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; min-width: 100%; }
th, td { padding: .45rem .5rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; } th { color: var(--soft); font-weight: 500; }
th:nth-child(1), td:nth-child(1), th:nth-child(3), td:nth-child(3) { text-align: left; }
.notes { max-width: none; margin-top: .8rem; font-size: .85rem; }
details { margin: .3rem 0; } summary { cursor: pointer; } ul.checks { margin: .3rem 0 .8rem; padding-left: 1.2rem; list-style: none; }
""".strip()

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 1000, 60, 20, 16, 44
Point = tuple[float, float]


def page(rows: Sequence[Row], facts: dict[str, Any], story: Story) -> str:
    """The whole document."""
    ok = all(row.ok for row in rows) and story.ok
    plan = facts["plan"]
    restarts = [row for row in rows if row.name.startswith("restart")]
    found = [check.ok for part in (*rows, story) for check in part.checks]
    count, failed = len(found), found.count(False)
    verdict = f"all {count} checks passed" if ok else f"{failed} of {count} checks failed"
    body = [
        "<h1>One rank killed, the same training everywhere</h1>",
        "<p>A GPT learns the documentation of Python on four processes with FSDP2. One of them is killed with SIGKILL "
        f"after step {plan['kill_at']}; the run restarts from the checkpoint of step {plan['compare_at']} on the same "
        "layout, and then on three others.</p>",
        f'<p><strong class="{"good" if ok else "bad"}">{verdict}</strong> <span class="soft">in '
        f"{facts['seconds']:.0f} s on {facts['cores']} cores, torch {escape(facts['torch'])}, "
        f"Python {escape(facts['python'])}</span></p>",
        "<h2>Loss</h2>",
        _key(restarts, killed=True),
        _figure(
            _losses(rows, restarts, plan),
            "Training loss of every run. They lie on one another, so the restarts are dashes of one line.",
        ),
        "<h2>Distance from the uninterrupted run</h2>",
        _key(restarts, killed=False),
        _figure(
            _distances(restarts, plan),
            f"Loss minus the loss of the uninterrupted run. The band is {TOLERANCE:.0f} times the furthest that any control "
            "drifts, which changes the layout in memory and touches no checkpoint: the order of summation alone.",
        ),
        "<h2>Runs</h2>",
        _table(rows),
        '<p class="notes soft">' + "<br>".join(escape(note) for note in notes(facts, rows)) + "</p>",
        "<h2>Two of six hosts lost</h2>",
        *_hosts(story),
        "<h2>Checks</h2>",
        *(_checks(f"{row.title}: {row.layout.title}", row.checks) for row in rows),
        _checks("two of six hosts lost: the run goes on on four", story.checks),
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<title>ckpt demo</title>\n<style>\n{STYLE}\n</style></head>\n'
        f"<body>\n{chr(10).join(body)}\n</body></html>\n"
    )


def _figure(drawing: str, caption: str) -> str:
    return f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"


def _key(restarts: Sequence[Row], *, killed: bool) -> str:
    items = [("var(--reference)", "uninterrupted"), ("var(--killed)", "killed")] if killed else []
    items += [(f"var(--c{i})", f"restarted: {row.layout.title}") for i, row in enumerate(restarts)]
    lines = "".join(f'<li><i style="border-color:{colour}"></i>{escape(text)}</li>' for colour, text in items)
    return f'<ul class="key">{lines}</ul>'


def _losses(rows: Sequence[Row], restarts: Sequence[Row], plan: dict[str, Any]) -> str:
    """All curves on one pair of axes: dashes of the restarts are shifted, so that each of them can be seen."""
    points = [point for row in rows for point in row.losses]
    low, high = min(y for _, y in points), max(y for _, y in points)
    scale = _Scale(0, plan["total"] - 1, low - 0.1, high + 0.1, 380)
    reference, killed = rows[0], rows[1]
    marks = [
        scale.frame(_ticks(low, high, 0.5), lambda y: f"{y:.1f}"),
        scale.upright(plan["compare_at"], f"checkpoint of step {plan['compare_at']}", "end"),
        scale.curve(reference.losses, "var(--reference)", "stroke-width:9;stroke-linecap:round"),
        scale.upright(plan["kill_at"], f"SIGKILL of rank {plan['kill_rank']}", "start"),
    ]
    dash, gap = 7, 7 * (len(restarts) - 1)
    for i, row in enumerate(restarts):
        marks.append(
            scale.curve(
                row.losses,
                f"var(--c{i})",
                f"stroke-dasharray:{dash} {gap};stroke-dashoffset:{-dash * i};stroke-width:5",
            )
        )
    marks.append(scale.curve(killed.losses, "var(--killed)", "stroke-width:1.8"))
    if killed.losses:
        x, y = scale.place(*killed.losses[-1])
        cross = f"M{x - 7:.1f} {y - 7:.1f}l14 14m0 -14l-14 14"
        marks.append(f'<path d="{cross}" stroke="var(--bad)" stroke-width="3.5" fill="none"/>')
    return scale.svg(marks, "training loss over steps")


def _distances(restarts: Sequence[Row], plan: dict[str, Any]) -> str:
    """Differences to the uninterrupted run, on the steps that the restarts trained."""
    limit = TOLERANCE * max((row.control or 0 for row in restarts), default=0)
    furthest = max([limit, *(row.difference or 0 for row in restarts)]) or 1e-9
    if furthest == float("inf"):
        furthest = limit or 1e-9
    scale = _Scale(plan["compare_at"] + 1, plan["total"] - 1, -1.12 * furthest, 1.12 * furthest, 260)
    left, upper = scale.place(scale.x0, limit)
    right, lower = scale.place(scale.x1, -limit)
    box = f'<rect class="band" x="{left}" y="{upper:.1f}" width="{right - left}" height="{lower - upper:.1f}"/>'
    step = furthest / 3
    marks = [box, scale.frame([i * step for i in range(-3, 4)], lambda y: f"{y:.1e}" if y else "0")]
    for i, row in enumerate(restarts):
        known = [(step, d) for step, d in row.differences if abs(d) <= 1.12 * furthest]
        marks.append(scale.curve(known, f"var(--c{i})"))
        for x, y in (scale.place(*point) for point in known):
            marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{4 - i * 0.5}" fill="var(--c{i})"/>')
    return scale.svg(marks, "difference of the losses over steps")


def _ticks(low: float, high: float, step: float) -> list[float]:
    return [i * step for i in range(int(low / step), int(high / step) + 2) if low - 0.1 <= i * step <= high + 0.1]


class _Scale:
    """Steps and values to places in a drawing."""

    def __init__(self, x0: float, x1: float, y0: float, y1: float, height: int) -> None:
        self.x0, self.x1, self.y0, self.y1, self.height = x0, x1, y0, y1, height

    def place(self, x: float, y: float) -> Point:
        wide, high = WIDTH - LEFT - RIGHT, self.height - TOP - BOTTOM
        return (
            round(LEFT + wide * (x - self.x0) / (self.x1 - self.x0), 2),
            round(TOP + high * (self.y1 - y) / (self.y1 - self.y0), 2),
        )

    def frame(self, ticks: Sequence[float], label: Callable[[float], str]) -> str:
        out = []
        for value in ticks:
            x, y = self.place(self.x0, value)
            out.append(f'<line class="grid" x1="{x}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}"/>')
            out.append(f'<text x="{x - 8}" y="{y + 4}" text-anchor="end">{label(value)}</text>')
        base = self.height - BOTTOM
        for step in range(int(self.x0), int(self.x1) + 1):
            if step % 5 == 0 or step == self.x1:
                x, _ = self.place(step, self.y0)
                out.append(f'<line class="axis" x1="{x}" y1="{base}" x2="{x}" y2="{base + 5}"/>')
                out.append(f'<text x="{x}" y="{base + 20}" text-anchor="middle">{step}</text>')
        out.append(f'<line class="axis" x1="{LEFT}" y1="{base}" x2="{WIDTH - RIGHT}" y2="{base}"/>')
        out.append(f'<text x="{(WIDTH + LEFT) / 2}" y="{base + 38}" text-anchor="middle">step</text>')
        return "".join(out)

    def upright(self, x: float, text: str, anchor: str) -> str:
        at, _ = self.place(x, self.y0)
        shift = -6 if anchor == "end" else 6
        return (
            f'<line class="axis" x1="{at}" y1="{TOP}" x2="{at}" y2="{self.height - BOTTOM}" stroke-dasharray="2 4"/>'
            f'<text x="{at + shift}" y="{TOP + 12}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def curve(self, points: Sequence[Point], colour: str, style: str = "") -> str:
        path = " ".join("{:.1f},{:.1f}".format(*self.place(*point)) for point in points)
        return f'<polyline class="curve" points="{path}" style="stroke:{colour};{style}"/>' if points else ""

    def svg(self, marks: Sequence[str], title: str) -> str:
        return f'<svg viewBox="0 0 {WIDTH} {self.height}" role="img" aria-label="{title}">{"".join(marks)}</svg>'


def _table(rows: Sequence[Row]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    lines = []
    for row in rows:
        *plain, verdict = cells(row)
        tail = f'<td class="{"good" if row.ok else "bad"}"><strong>{verdict}</strong></td>'
        lines.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in plain) + tail + "</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _hosts(story: Story) -> list[str]:
    """The run that loses hosts: its curve, and what happened when."""
    low, high = min(y for _, y in story.losses), max(y for _, y in story.losses)
    scale = _Scale(0, STEPS - 1, low - 0.1, high + 0.1, 260)
    before = [p for p in story.losses if p[0] <= story.lost_at][: story.lost_at + 1]
    names = " and ".join(f"h{n}" for n in story.lost)
    marks = [
        scale.frame(_ticks(low, high, 0.5), lambda y: f"{y:.1f}"),
        scale.curve([p for p in story.losses if p[0] >= story.resumed_at], "var(--c1)", "stroke-width:6"),
        scale.curve(before, "var(--killed)"),
        scale.upright(story.lost_at, f"{names} lost; four hosts go on with step {story.resumed_at}", "start"),
    ]
    rows = "".join(
        f"<tr><td>{s:.2f} s</td><td style='text-align:left'>{escape(t)}</td></tr>" for s, t in story.timeline
    )
    return [
        "<p>Every step is held in the memory of six hosts, each with its own address, keeper and trainer, under an erasure "
        "code of 4 + 2; nothing is written to storage before the end. Two hosts are killed with everything on them. "
        f'<span class="soft">Here the hosts are {escape(story.how)}.</span></p>',
        _figure(
            scale.svg(marks, "training loss over steps"), "Training loss on six hosts, then on the four that are left."
        ),
        f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>',
    ]


def _checks(title: str, checks: Sequence[Check]) -> str:
    items = []
    for check in checks:
        mark = '<span class="good">✓</span>' if check.ok else '<span class="bad">✗</span>'
        detail = f' <span class="soft">{escape(check.detail)}</span>' if check.detail else ""
        items.append(f"<li>{mark} {escape(check.name)}{detail}</li>")
    shown = "" if all(check.ok for check in checks) else " open"
    return f'<details{shown}><summary>{escape(title)}</summary><ul class="checks">{"".join(items)}</ul></details>'
