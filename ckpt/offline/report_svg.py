"""What the report of a run is drawn with: text made safe, numbers with units, axes, charts. Knows nothing of runs.

Every chart has a bounded number of elements, however many things it shows: what falls on the same pixels is drawn once.
"""

from __future__ import annotations

import bisect
import html
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

__all__ = [
    "INNER",
    "LEFT",
    "STYLE",
    "Axis",
    "Bar",
    "Cell",
    "Dot",
    "Mark",
    "bars",
    "clean",
    "clock",
    "esc",
    "grid",
    "heat_map",
    "legend",
    "levels_of",
    "line",
    "milliseconds",
    "nice",
    "path_of",
    "seconds",
    "size",
    "stems",
    "svg",
    "table",
    "timeline",
]

T = TypeVar("T")

WIDTH, LEFT, RIGHT = 1080, 104, 16
INNER = WIDTH - LEFT - RIGHT
_PIXELS = 4  # marks nearer to each other than this become one
_LEVELS = 7
_TICKS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


# Text.


def clean(text: str, width: int = 400) -> str:
    """One line of at most `width` characters, without control, bidirectional and other characters that do not show."""
    if len(text) <= width and text.isprintable():
        return text
    shown = "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text[: width + 1])
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def esc(text: object) -> str:
    """Text as HTML, in an element or in a quoted attribute."""
    return html.escape(clean(str(text)))


def size(nbytes: float) -> str:
    """1536 -> "1.5 KiB"."""
    power = min(int(math.log2(nbytes) / 10), len(_UNITS) - 1) if nbytes >= 1 else 0
    scaled = nbytes / 1024**power
    return f"{scaled:.0f} {_UNITS[power]}" if power == 0 or scaled >= 100 else f"{scaled:.3g} {_UNITS[power]}"


def seconds(value: float) -> str:
    """0.00123 -> "1.23 ms", 90 -> "90 s", 4000 -> "1 h 6 min"."""
    if 0 < value < 0.9995:
        return milliseconds(value)
    return f"{value:.3g} s" if value < 99.5 else clock(value)


def milliseconds(value: float) -> str:
    """0.00123 -> "1.23 ms"; large numbers without an exponent."""
    ms = value * 1000
    return f"{ms:.3g} ms" if ms < 999.5 else f"{ms:,.0f} ms"


def clock(value: float) -> str:
    """A span of time in its two largest units: 4000 -> "1 h 6 min"."""
    left = round(value) if value >= 10 else value
    for unit, length, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if left >= length:
            rest = int(left % length // part)
            return f"{int(left // length):,} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{left:.3g} s"


def legend(items: Iterable[tuple[str, str]]) -> str:
    """(look, what it means) in a row."""
    return '<p class="legend">' + "".join(f'<span><i class="{k}"></i>{esc(v)}</span>' for k, v in items) + "</p>"


def table(head: Sequence[str], rows: Iterable[Sequence[object]], right: str = "") -> str:
    """`right`: a letter for each column, ">" where it is to be flush right."""

    def row(cells: Sequence[object], tag: str) -> str:
        flush = [' class="r"' if right[i : i + 1] == ">" else "" for i in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{f}>{esc(c)}</{tag}>" for c, f in zip(cells, flush, strict=True)) + "</tr>"

    body = "".join(row(r, "td") for r in rows)
    return f'<div class="wide"><table><thead>{row(head, "th")}</thead><tbody>{body}</tbody></table></div>'


# Axes.


@dataclass(frozen=True)
class Axis:
    """Wall time from left to right."""

    began: float
    ended: float

    @property
    def span(self) -> float:
        return max(self.ended - self.began, 1e-3)

    def part(self, time: float, parts: int) -> int:
        """In which of so many equal parts a time lies."""
        return max(0, min(parts - 1, int((time - self.began) / self.span * parts)))

    def x(self, time: float) -> float:
        return LEFT + INNER * min(1.0, max(0.0, (time - self.began) / self.span))

    def ticks(self) -> list[tuple[float, str]]:
        step = next((t for t in _TICKS if self.span / t <= 9), 0) or nice(self.span / 86400 / 9) * 86400
        return [
            (self.x(self.began + i * step), clock(i * step) if i else "0") for i in range(int(self.span / step) + 1)
        ]


def nice(value: float) -> float:
    """The next 1, 2 or 5 times a power of ten that is not below `value`."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next((m * power for m in (1, 2, 5) if m * power >= value * (1 - 1e-9)), 10 * power)


def grid(ticks: Iterable[tuple[float, str]], top: float, bottom: float) -> str:
    """Vertical lines with their labels below."""
    out = []
    for x, label in ticks:
        end = ' text-anchor="end"' if x > WIDTH - 40 else ' text-anchor="middle"'
        out.append(
            f'<path class="grid" d="M{x:.1f} {top}V{bottom}"/><text x="{x:.1f}" y="{bottom + 16}"{end}>{label}</text>'
        )
    return "".join(out)


def levels_of(ticks: Iterable[tuple[float, str]]) -> str:
    """Horizontal lines with their labels on the left."""
    return "".join(
        f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
        f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        for y, label in ticks
    )


def svg(name: str, height: float, content: str) -> str:
    view = f'viewBox="0 0 {WIDTH} {height:.0f}"'
    return f'<div class="wide"><svg {view} role="img" aria-label="{esc(name)}">{content}</svg></div>'


# Charts.


@dataclass(frozen=True)
class Mark:
    """Something at a moment of a training step. `look`: a class of the style; "bad" and "restore" have shapes."""

    time: float
    step: int
    look: str
    text: str


def timeline(axis: Axis, starts: Sequence[tuple[float, str]], lanes: Sequence[tuple[str, Sequence[Mark]]]) -> str:
    """Lanes of marks under each other; `starts` are lines through all of them."""
    lane, top = 34, 26
    bottom = top + lane * len(lanes)
    out = [grid(axis.ticks(), top, bottom)]
    free = 0.0
    for x, names in _near([(axis.x(t), name) for t, name in starts]):
        name = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        out.append(f'<path class="start" d="M{x:.1f} {top - 8}V{bottom}"><title>{esc(name)}</title></path>')
        if x >= free and x < WIDTH - 90:
            out.append(f'<text class="strong" x="{x:.1f}" y="{top - 13}">{esc(name)}</text>')
            free = x + 8 * len(name) + 8
    for i, (name, marks) in enumerate(lanes):
        y = top + lane * i + lane / 2
        out.append(f'<text x="{LEFT - 12}" y="{y + 4:.1f}" text-anchor="end">{esc(name)}</text>')
        out.append(f'<path class="lane" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        looks = sorted({m.look for m in marks}, key=lambda look: (look == "bad", look))  # failures are never hidden
        for look in looks:
            for x, some in _near([(axis.x(m.time), m) for m in marks if m.look == look]):
                out.append(f'<path class="m-{look}" d="{_shape(look, x, y)}"><title>{esc(_told(some))}</title></path>')
    return svg("timeline", bottom + 24, "".join(out))


def _near(items: Iterable[tuple[float, T]]) -> list[tuple[float, list[T]]]:
    """What falls on the same few pixels, together."""
    found: defaultdict[int, list[T]] = defaultdict(list)
    for x, item in items:
        found[int(x / _PIXELS)].append(item)
    return [(at * _PIXELS + _PIXELS / 2, found[at]) for at in sorted(found)]


def _told(marks: Sequence[Mark]) -> str:
    first, last = marks[0], marks[-1]
    if len(marks) == 1:
        return f"step {first.step}: {first.text}"
    return f"{len(marks)} from step {first.step} to step {last.step}; the last: {last.text}"


def _shape(look: str, x: float, y: float) -> str:
    if look == "bad":
        return f"M{x - 5:g} {y - 5:g}l10 10m0 -10l-10 10"
    if look == "restore":
        return f"M{x:g} {y - 7:g}l6 7l-6 7l-6 -7z"
    return f"M{x - 1.25:g} {y - 8:g}h2.5v16h-2.5z"


@dataclass(frozen=True)
class Cell:
    """One cell of a heat map."""

    seconds: float
    text: str


def heat_map(axis: Axis, rows: Sequence[str], columns: int, cells: Mapping[tuple[int, int], Cell]) -> str:
    """(row, column) -> cell, columns being equal parts of the axis; with the legend of its colours, in milliseconds."""
    bounds = _bounds(max((c.seconds for c in cells.values()), default=0.0))
    height = min(26.0, max(7.0, 360 / len(rows)))
    top, width = 6, INNER / columns
    bottom = top + height * len(rows)
    gap = 1.0 if width > 4 and height > 6 else 0.0
    out = [f'<rect class="empty" x="{LEFT}" y="{top}" width="{INNER}" height="{bottom - top:.1f}"/>']
    out += [_names(rows, top, height), grid(axis.ticks(), top, bottom)]
    for (row, column), cell in sorted(cells.items()):
        x, y, level = LEFT + column * width, top + row * height, bisect.bisect_right(bounds, cell.seconds)
        at = f'x="{x:.1f}" y="{y:.1f}" width="{width - gap:.1f}" height="{height - gap:.1f}"'
        out.append(f'<rect class="h{level}" {at}><title>{esc(cell.text)}</title></rect>')
    steps = [f"below {milliseconds(bounds[0])}", *(f"{milliseconds(b)} and more" for b in bounds)]
    shown = [(f"h{i}", label) for i, label in enumerate(steps)]
    return svg("heat map", bottom + 24, "".join(out)) + legend([*shown, ("empty", "no event")])


def _bounds(most: float) -> list[float]:
    """Where the colours change: the 1, 2, 5 times powers of ten below the largest value, in seconds."""
    power = math.floor(math.log10(max(most, 1e-9)))
    series = [m * 10.0**p for p in range(power - 3, power + 1) for m in (1, 2, 5)]
    return [s for s in series if s <= max(most, 1e-9)][1 - _LEVELS :]


def _names(rows: Sequence[str], top: float, height: float) -> str:
    """The names of rows, every so many where they stand close."""
    every = math.ceil(13 / height)
    return "".join(
        f'<text x="{LEFT - 8}" y="{top + (i + 0.5) * height + 4:.1f}" text-anchor="end">{esc(rows[i])}</text>'
        for i in range(0, len(rows), every)
    )


@dataclass(frozen=True)
class Bar:
    """One row of stacked parts: (look, length, what it is)."""

    name: str
    parts: Sequence[tuple[str, float, str]]
    note: str


def bars(rows: Sequence[Bar]) -> str:
    """Horizontal stacked bars with a note behind each, all of one scale."""
    height = min(28.0, max(10.0, 400 / len(rows)))
    notes = 150 if height >= 13 else 0
    scale = (INNER - notes) / (max(sum(length for _, length, _ in r.parts) for r in rows) or 1.0)
    top = 4
    out = [_names([r.name for r in rows], top, height)]
    for i, r in enumerate(rows):
        x, y = float(LEFT), top + i * height
        for look, length, text in r.parts:
            at = f'x="{x:.1f}" y="{y + 1:.1f}" width="{length * scale:.2f}" height="{height * 0.8 - 1:.1f}"'
            out.append(f'<rect class="{look}" {at}><title>{esc(text)}</title></rect>')
            x += length * scale
        if notes:
            out.append(f'<text x="{x + 8:.1f}" y="{y + height / 2 + 3:.1f}">{esc(r.note)}</text>')
    return svg("seconds by part", top + height * len(rows) + 4, "".join(out))


@dataclass(frozen=True)
class Dot:
    """A point of a line, or several put together: from `low` to `high`, most of them about `mid`."""

    at: float
    low: float
    mid: float
    high: float
    text: str


def line(dots: Sequence[Dot], levels: Sequence[tuple[float, str]]) -> str:
    """Milliseconds over steps, on a logarithmic scale: one slow snapshot must not flatten all others. Dots by `at`."""
    top, bottom = 10, 210
    values = [d.low for d in dots if d.low > 0] or [1e-3]
    floor, ceiling = nice(min(values)), nice(max(d.high for d in dots))
    floor = floor if floor <= min(values) else floor / 2.5
    span = math.log10(max(ceiling / floor, 2.0))
    first, last = dots[0].at, dots[-1].at

    def x(at: float) -> float:
        return LEFT + INNER * ((at - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        return bottom - (bottom - top) * min(1.0, math.log10(max(value, floor) / floor) / span)

    power = math.floor(math.log10(floor))
    series = [m * 10.0**p for p in range(power, power + math.ceil(span) + 2) for m in (1, 2, 5)]
    series = [s for s in series if floor * 0.999 <= s <= floor * 10**span * 1.001]
    every = math.ceil(len(series) / 8)
    step = max(1.0, nice((last - first) / 10))
    begin = math.ceil(first / step)
    steps = [(x(i * step), f"{i * step:,.0f}") for i in range(begin, int(last / step) + 1)]
    out = [grid(steps, top, bottom), levels_of((y(s), milliseconds(s)) for s in series[::every])]
    there, back = [(x(d.at), y(d.high)) for d in dots], [(x(d.at), y(d.low)) for d in reversed(dots)]
    out.append(f'<path class="area" d="{path_of([*there, *back])}z"/>')
    out += [f'<path class="level" d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}"/>' for value, _ in levels]
    out.append(f'<path class="line" d="{path_of([(x(d.at), y(d.mid)) for d in dots])}"/>')
    for d in dots:
        at = f'cx="{x(d.at):.1f}" cy="{y(d.mid):.1f}"'
        out.append(f'<circle class="dot" {at} r="2"><title>{esc(d.text)}</title></circle>')
    free = math.inf
    for value, name in sorted(levels):
        if y(value) < free:
            out.append(
                f'<text class="strong" x="{WIDTH - RIGHT}" y="{y(value) - 4:.1f}" text-anchor="end">{esc(name)}</text>'
            )
            free = y(value) - 14
    return svg("stall over steps", bottom + 24, "".join(out))


def path_of(points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def stems(axis: Axis, things: Sequence[tuple[float, int, str]]) -> str:
    """(time, bytes, what it is) as thin columns; the largest where several share their pixels."""
    top, bottom = 10, 150
    most = max(n for _, n, _ in things) or 1
    unit = 1024.0 ** int(math.log2(most) / 10)
    step = nice(most / unit / 4) * unit
    scale = (bottom - top) / (math.ceil(most / step) * step)
    ticks = [(bottom - i * step * scale, size(i * step)) for i in range(math.ceil(most / step) + 1)]
    out = [grid(axis.ticks(), top, bottom), levels_of(ticks)]
    for x, some in _near([(axis.x(t), (n, text)) for t, n, text in things]):
        n, text = max(some)
        text = text if len(some) == 1 else f"the largest of {len(some)}: {text}"
        at = f'x="{x - 1.5:.1f}" y="{bottom - n * scale:.1f}" width="3" height="{n * scale:.1f}"'
        out.append(f'<rect class="m-save" {at}><title>{esc(text)}</title></rect>')
    return svg("bytes of saves", bottom + 24, "".join(out))


STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f8;--card:#fff;--ink:#1a1f26;--soft:#5c6672;--rule:#e4e7eb;--empty:#f1f3f5;
--save:#0072b2;--snapshot:#8a96a3;--skip:#b98200;--restore:#00875f;--bad:#b3123f;
--eager:#d55e00;--other:#e69f00;--fence:#ecd03f;--lazy:#56b4e9;--encode:#0072b2;--write:#009e73;--commit:#cc79a7;
--h0:#e1ecf6;--h1:#c3daee;--h2:#97c1e1;--h3:#62a3d1;--h4:#3582bd;--h5:#155d9f;--h6:#083469}
@media(prefers-color-scheme:dark){:root{--bg:#0f1318;--card:#171c23;--ink:#e7eaee;--soft:#98a3b0;--rule:#2a313b;
--empty:#1b2129;--save:#4da6e0;--snapshot:#75818e;--skip:#e0aa30;--restore:#2fbf93;--bad:#ff6b8b;
--eager:#e8702a;--encode:#2b87c8;--write:#1fae85;
--h0:#1c2f44;--h1:#1d4264;--h2:#225a88;--h3:#2f79b0;--h4:#559bd0;--h5:#92c3e8;--h6:#dcecfa}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",
"DejaVu Sans",sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1176px;margin:0 auto;padding:40px 24px 64px}
header p{margin:0;color:var(--soft)}
h1{font-size:28px;line-height:1.2;font-weight:650;letter-spacing:-.015em;margin:2px 0 6px;overflow-wrap:anywhere}
h2{font-size:17px;font-weight:650;margin:0 0 2px}
section{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:20px 24px;margin-top:20px}
section>p{margin:0 0 12px;color:var(--soft);font-size:13.5px;max-width:100ch}
.numbers{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:1px;padding:0;overflow:hidden;
background:var(--rule)}
.numbers div{background:var(--card);padding:14px 20px}
.numbers span,.numbers small{display:block;color:var(--soft);font-size:13px}
.numbers b{display:block;font-size:24px;line-height:1.3;font-weight:600;letter-spacing:-.01em}
.numbers .bad b{color:var(--bad)}
.wide{overflow-x:auto}
svg{display:block;width:100%;min-width:720px;height:auto;font:11.5px system-ui,-apple-system,"Segoe UI",Roboto,
"Liberation Sans","DejaVu Sans",sans-serif}
svg text{fill:var(--soft)}svg .strong{fill:var(--ink);font-weight:600;paint-order:stroke;
stroke:var(--card);stroke-width:4px}
.grid,.lane{stroke:var(--rule);fill:none}.start{stroke:var(--soft);stroke-dasharray:3 3;fill:none}
.m-save{fill:var(--save)}.m-snapshot{fill:var(--snapshot)}.m-skip{fill:var(--skip)}.m-restore{fill:var(--restore)}
.m-bad{stroke:var(--bad);stroke-width:2.5;stroke-linecap:round;fill:none}
.line,.level{stroke:var(--save);fill:none;stroke-width:1.5}.level{stroke:var(--soft);stroke-dasharray:5 4;stroke-width:1}
.area{fill:var(--save);opacity:.18}.dot{fill:var(--save)}
section>.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:12px 0 0;font-size:13px;max-width:none}
.legend i{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:6px;vertical-align:-1px}
table{border-collapse:collapse;width:100%;font-size:14px}
th{text-align:left;font-weight:600;color:var(--soft);font-size:13px}
td,th{padding:6px 16px 6px 0;border-bottom:1px solid var(--rule);vertical-align:top;overflow-wrap:anywhere}
tr:last-child td{border-bottom:0}.r{text-align:right;white-space:nowrap}
.legend+.wide{margin-top:16px;max-width:760px}
footer{margin-top:20px;color:var(--soft);font-size:13px}
"""
_FILLED = ("eager", "other", "fence", "lazy", "encode", "write", "commit", "empty", *(f"h{i}" for i in range(_LEVELS)))
STYLE += "".join(f".{k}{{fill:var(--{k});background:var(--{k})}}" for k in _FILLED)
STYLE += "".join(f"i.m-{k}{{background:var(--{k})}}" for k in ("save", "snapshot", "skip", "restore", "bad"))
