"""The sections of a report about averages, drawn from the ledger: metrics, folds and drift, weights and scores."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

from ckpt.offline.report_ledger import Combination, Ledger
from ckpt.offline.report_svg import (
    INNER,
    LEFT,
    esc,
    grid,
    legend,
    levels_of,
    nice,
    path_of,
    svg,
    table,
)

__all__ = ["AVERAGES_STYLE", "ledger_sections"]

Points = Sequence[tuple[int, float]]
_POINTS, _METRICS, _LINES = 400, 6, 6
_COLOURS = ("save", "eager", "write", "other", "commit", "lazy")


def ledger_sections(ledger: Ledger) -> str:
    """HTML; "" where there is nothing to say."""
    return "".join(section(ledger) for section in (_metrics, _folds, _drifts, _combinations, _scores, _searches))


def _section(name: str, title: str, text: str, content: str) -> str:
    return f'<section id="{name}"><h2>{esc(title)}</h2><p>{esc(text)}</p>{content}</section>' if content else ""


def _metrics(ledger: Ledger) -> str:
    order = sorted(ledger.metrics, key=lambda name: (name not in ("loss", "val_loss"), name))
    shown = [name for name in order if ledger.metrics[name]][:_METRICS]
    content = "".join(f"<h3>{esc(name)}</h3>{curves({name: ledger.metrics[name]})}" for name in shown)
    more = len(order) - len(shown)
    content += f"<p>{more} more metrics are recorded.</p>" if more > 0 else ""
    return _section("metrics", "Metrics", "As they were recorded at the steps that lead to the present.", content)


def _folds(ledger: Ledger) -> str:
    lines = {name: [(f.step, float(f.folds)) for f in known] for name, known in ledger.folds.items()}
    last = {name: known[-1] for name, known in ledger.folds.items()}
    rows = [
        (name, ledger.rules[name], f"{f.folds:,}", f"{f.refused:,}", "" if f.drift is None else f"{f.drift:.3g}")
        for name, f in last.items()
    ]
    content = curves(lines) if lines else ""
    content += table(("average", "rule", "folds", "refused", "drift at the end"), rows, "<<>>>") if rows else ""
    return _section("folds", "Running averages", "How many snapshots count in each, by training step.", content)


def _drifts(ledger: Ledger) -> str:
    lines = {name: [(f.step, f.drift) for f in known if f.drift is not None] for name, known in ledger.folds.items()}
    text = "How far each average is from the step itself, of its length; over a sample of elements."
    return _section("drift", "Drift of the averages", text, curves(lines) if any(lines.values()) else "")


def _combinations(ledger: Ledger) -> str:
    parts = []
    for c in reversed(ledger.combinations):
        scores = ", ".join(f"{k} {v:.6g}" for k, v in list(c.metrics.items())[:4])
        caption = f"{c.ref}: {c.method}" + (f" ({scores})" if scores else "")
        parts.append(f"<h3>{esc(caption)}</h3>{columns(c)}")
    text = "What each checkpoint that was made of others was made of: the weight of every step in it."
    return _section("combinations", "Combinations", text, "".join(parts))


def _scores(ledger: Ledger) -> str:
    rows = [
        (_short(c.ref), name, _number(score), _number(held))
        for c in reversed(ledger.combinations)
        for name, score, held in c.scores
    ]
    head = ("found for", "combination", "score", "held out")
    text = "What searches found, by their objective (lower is better) and by the one that never chose."
    return _section("scores", "Scores", text, table(head, rows, "<<>>") if rows else "")


def _searches(ledger: Ledger) -> str:
    """Every score and the best so far, unless it is no number."""
    parts = []
    for path, scores in ledger.searches.items():
        points = [(i, v) for i, v in enumerate(scores, start=1) if math.isfinite(v)]
        best = list(itertools.accumulate(points, lambda a, b: (b[0], min(a[1], b[1]))))
        content = curves({"best so far": best, "score": points})
        parts.append(f"<h3>{esc(path)}: {len(scores):,} evaluations</h3>{content}" if content else "")
    return _section("searches", "Searches", "Scores of combinations, in order of their evaluation.", "".join(parts))


def _short(ref: str) -> str:
    return "/".join(ref.split("/")[-2:])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


# Charts.


def curves(lines: Mapping[str, Points]) -> str:
    """Lines over steps on a linear scale, with their legend if there are several; the first few of them."""
    shown = {name: _few(points) for name, points in list(lines.items())[:_LINES] if points}
    every = [p for points in shown.values() for p in points]
    if not every:
        return ""
    x = _steps([s for s, _ in every])
    y, ticks = _scale([v for _, v in every], 10, 190)
    out = [grid(x[1], 10, 190), levels_of(ticks)]
    for colour, (name, points) in zip(_COLOURS, shown.items(), strict=False):
        out.append(f'<path class="c-{colour}" d="{path_of([(x[0](s), y(v)) for s, v in points])}"/>')
        for s, v in points:
            text = f"{name}, step {s:,}: {v:.6g}"
            out.append(
                f'<circle class="d-{colour}" cx="{x[0](s):.1f}" cy="{y(v):.1f}" r="2"><title>{esc(text)}</title></circle>'
            )
    key = legend((f"d-{c}", name) for c, name in zip(_COLOURS, shown, strict=False)) if len(shown) > 1 else ""
    return svg("over steps", 214, "".join(out)) + key


def columns(c: Combination) -> str:
    """The weights of a combination as columns over steps, negative ones below the line."""
    x = _steps([s for s, _ in c.weights])
    y, ticks = _scale([0.0, *(w for _, w in c.weights)], 10, 120)
    width = max(2.0, min(18.0, 0.6 * INNER / len(c.weights)))
    out = [grid(x[1], 10, 120), levels_of(ticks)]
    for step, w in c.weights:
        top, bottom = sorted((y(0.0), y(w)))
        at = f'x="{x[0](step) - width / 2:.1f}" y="{top:.1f}" width="{width:.1f}" height="{max(bottom - top, 0.5):.1f}"'
        look = "d-save" if w >= 0 else "d-bad"
        out.append(f'<rect class="{look}" {at}><title>{esc(f"step {step:,}: {w:.6f}")}</title></rect>')
    return svg("weights of steps", 144, "".join(out))


def _few(points: Points) -> Points:
    """At most `_POINTS` of them, evenly, the first and the last among them."""
    if len(points) <= _POINTS:
        return points
    return [points[round(i * (len(points) - 1) / (_POINTS - 1))] for i in range(_POINTS)]


def _steps(steps: Sequence[int]) -> tuple[Callable[[int], float], list[tuple[float, str]]]:
    """Where a step is from left to right, and ticks."""
    first, last = min(steps), max(steps)

    def x(step: int) -> float:
        return LEFT + 12 + (INNER - 24) * ((step - first) / (last - first) if last > first else 0.5)

    unit = max(1, round(nice((last - first) / 10)))
    return x, [(x(i * unit), f"{i * unit:,}") for i in range(-(-first // unit), last // unit + 1)]


def _scale(
    values: Sequence[float], top: float, bottom: float
) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """Where a value is from top to bottom, and ticks at round numbers about them all."""
    low, high = min(values), max(values)
    unit = nice((high - low) / 4) if high > low else nice(abs(high) / 4 or 1.0)
    first, last = math.floor(low / unit), math.ceil(high / unit)
    last = max(last, first + 1)

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value / unit - first) / (last - first)

    return y, [(y(i * unit), f"{i * unit:.6g}") for i in range(first, last + 1)]


AVERAGES_STYLE = "h3{font-size:13.5px;font-weight:600;margin:14px 0 4px;overflow-wrap:anywhere}"
AVERAGES_STYLE += "".join(f".c-{k}{{stroke:var(--{k});fill:none;stroke-width:1.5}}" for k in _COLOURS)
AVERAGES_STYLE += "".join(f".d-{k}{{fill:var(--{k});background:var(--{k})}}" for k in (*_COLOURS, "bad"))
