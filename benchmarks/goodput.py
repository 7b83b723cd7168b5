"""How much of a job's time is training, with each way of keeping checkpoints?

Nothing is run: the closed form is fed with published failure rates, with what was measured of ckpt, and with
assumptions, each labelled as what it is. Of all time a job trains

    (1 - sum of stall / interval) * (1 - sum over classes c of rate_c * (interval / 2 + lag + down + load))

where c is a class of failures (a process, a device of a host that can still be reached, a whole host), and interval, lag
and load are those of the cheapest tier that survives it. First order in the rates: where a failure costs more than a
fifth of the time between failures it is too rough, and the figure is marked. Without any checkpoint a job of length T
takes (e^(rate T) - 1) / rate. Losses of more hosts of one group than it bears, while it is protected anew, come at
hosts * rate * C(n - 1, m) * (rate * window)^m and fall back to storage.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.report import Table, finish

HOSTS = (16, 64, 256, 1024, 4096, 16384)
PUBLISHED, MEASURED, ASSUMED = "published", "measured", "assumed"
ROUGH = 0.2


def given(value: float, kind: str, source: str) -> Any:
    return field(default=value, metadata={"kind": kind, "source": source})


@dataclass(frozen=True)
class Inputs:
    """What the form is fed with; GB are 10^9 bytes, `state` is what one host holds of the training state."""

    failures: float = given(
        3.79, PUBLISHED, "a 1000 hosts and days: Llama 3 405B, 419 unexpected in 54 days on 2,048 hosts"
    )
    process: float = given(
        0.15, ASSUMED, "part of failures that end a process: our reading of the causes in that paper"
    )
    device: float = given(0.64, ASSUMED, "part that takes a device, the host's memory still being there: likewise")
    host: float = given(0.21, ASSUMED, "part that takes a host with its memory: likewise")
    detect: float = given(15, PUBLISHED, "s: torchrun, three keep-alives of 5 s missed")
    join: float = given(30, PUBLISHED, "s: torchrun, last call of the rendezvous")
    start: float = given(60, ASSUMED, "s: processes, process groups, compiling")
    swap: float = given(300, ASSUMED, "s: until another host takes the place of one that failed")
    job: float = given(30, ASSUMED, "days of training that the job needs")
    step: float = given(10, ASSUMED, "s of one training step")
    state: float = given(15, ASSUMED, "GB a host: 14 bytes a parameter, about 70e9 parameters on 64 hosts")
    disk_write: float = given(1.0, ASSUMED, "GB/s a host into shared storage")
    disk_read: float = given(1.0, ASSUMED, "GB/s a host out of shared storage")
    async_stall: float = given(0.13, MEASURED, "s a GB: DCP async_save with a reused stager, two cores")
    storage_every: float = given(600, ASSUMED, "s between saves to storage behind snapshots in memory")
    network: float = given(12.5, ASSUMED, "GB/s a host: 100 Gb/s")
    share: float = given(0.25, ASSUMED, "part of it that protection may take")
    data: float = given(6, ASSUMED, "data chunks of a stripe")
    parity: float = given(2, ASSUMED, "parity chunks of a stripe")
    stall: float = given(0.0036, MEASURED, "s a GB: stall of ckpt, memory=Every(1), README")
    lag: float = given(
        0.0, ASSUMED, "s a GB from sealed to announced; 0: parity times the state over the network's share"
    )
    load: float = given(0.154, MEASURED, "s a GB: load from memory, every block checked, README")
    rebuild: float = given(
        0.0, ASSUMED, "s a GB of a lost host; 0: data chunks over the whole network, as reads of k peers"
    )
    restart: float = given(1.0, MEASURED, "s: the rest of a restart in ckpt, README")

    def lag_seconds(self, copies: float) -> float:
        return (self.lag or copies / (self.network * self.share)) * self.state

    def rebuild_seconds(self) -> float:
        return (self.rebuild or self.data / self.network) * self.state


@dataclass(frozen=True)
class Tier:
    """A place that checkpoints rest in: seconds of stall a save, between saves, until one counts, and to load it."""

    stall: float
    interval: float
    lag: float
    load: float


@dataclass(frozen=True)
class Scheme:
    """`tiers`: all that cost a stall; `survives`: the tier and the seconds of standstill by class of failures; `memory`: GB
    a host; `network`: GB a host and protected snapshot; `beyond`: rate, for one of a host, of what no tier in memory survives."""

    name: str
    tiers: tuple[Tier, ...]
    survives: Mapping[str, tuple[Tier, float]]
    memory: float = 0.0
    network: float = 0.0
    beyond: Callable[[float], float] = lambda rate: 0.0
    last: Tier | None = None


def schemes(i: Inputs, hosts: int) -> list[Scheme]:
    """All that are compared, but for having no checkpoint at all; each with its best interval."""
    rate = failure_rate(i, hosts)
    quick = i.detect + i.join + i.start
    waits = {"process": quick, "device": quick + i.swap, "host": quick + i.swap}
    shrinks = {"process": quick, "device": quick + i.swap / hosts, "host": quick + i.swap / hosts}
    write, read = i.state / i.disk_write, i.state / i.disk_read

    def behind(tier: Tier) -> dict[str, tuple[Tier, float]]:
        return {c: (tier, wait) for c, wait in waits.items()}

    disk = Tier(write, math.sqrt(2 * write / rate), 0.0, read)
    stall = i.async_stall * i.state
    later = Tier(stall, max(math.sqrt(2 * stall / rate), write), write, read)
    storage = Tier(i.stall * i.state, max(i.storage_every, write), write, read)

    def memory(lag: float, load: float) -> Tier:
        every = i.step * max(1, math.ceil(lag / i.step))
        return Tier(i.stall * i.state, every, lag, load)

    m, k = i.parity, i.data
    own, copied, coded = memory(0.0, i.load * i.state + i.restart), i.lag_seconds(1), i.lag_seconds(m)
    peer = memory(copied, i.state / i.network + i.restart)
    decoded = memory(coded, i.rebuild_seconds() + i.load * i.state + i.restart)
    out = [
        Scheme("disk", (disk,), behind(disk)),
        Scheme("async disk", (later,), behind(later), memory=i.state),
    ]
    for name, tier, wait, extra, sent, n, bears in (
        ("replicas, 2 copies", peer, waits, 4.0, 1.0, 2, 1),
        (f"erasure code {k:g}+{m:g}", decoded, waits, 2 + 2 * m / k, m, k + m, m),
        (f"ckpt, {k:g}+{m:g}", decoded, shrinks, 3 + 2 * m / k, m, k + m, m),
    ):
        local = replace(own, interval=tier.interval, lag=tier.lag)
        survives = {
            "process": (local, wait["process"]),
            "device": (local, wait["device"]),
            "host": (tier, wait["host"]),
        }
        window = wait["host"] + tier.load + tier.interval + tier.lag
        out.append(
            Scheme(
                name,
                (tier, storage),
                survives,
                extra * i.state,
                sent * i.state,
                lambda one, n=n, bears=bears, window=window: (
                    one * math.comb(int(n) - 1, int(bears)) * (one * window) ** bears
                ),
                storage,
            )
        )
    return out


def failure_rate(i: Inputs, hosts: int) -> float:
    """Failures of any kind, a second."""
    return i.failures / 1000 / 86400 * hosts


def goodput(i: Inputs, hosts: int) -> list[dict[str, Any]]:
    """One row a scheme: part of the time that trains, steps lost a day, what a failure costs, memory and network."""
    rate = failure_rate(i, hosts)
    exponent = rate * i.job * 86400
    nothing = exponent / math.expm1(exponent) if exponent < 700 else 0.0
    out = [{"scheme": "no checkpoint", "ettr": nothing, "rough": False, "lost_steps_a_day": None, "failure_s": None}]
    out[0] |= {"interval_s": None, "memory_gb": 0.0, "network_gb_s": 0.0}
    for scheme in schemes(i, hosts):
        stalled = sum(t.stall / t.interval for t in scheme.tiers)
        lost = cost = 0.0
        for name, (tier, wait) in scheme.survives.items():
            again = tier.interval / 2 + tier.lag
            lost += getattr(i, name) * rate * again
            cost += getattr(i, name) * rate * (again + wait + tier.load)
        if scheme.last is not None:
            beyond = hosts * scheme.beyond(i.host * rate / hosts)
            again = scheme.last.interval / 2 + scheme.last.lag
            lost += beyond * again
            cost += beyond * (again + i.detect + i.join + i.start + i.swap + scheme.last.load)
        out.append(
            {
                "scheme": scheme.name,
                "ettr": max(0.0, (1 - stalled) * (1 - cost)),
                "rough": cost > ROUGH,
                "interval_s": scheme.tiers[0].interval,
                "failure_s": cost / rate,
                "lost_steps_a_day": lost * 86400 / i.step,
                "memory_gb": scheme.memory,
                "network_gb_s": scheme.network / scheme.tiers[0].interval,
            }
        )
    return out


def run(i: Inputs, hosts: Sequence[int]) -> dict[str, Any]:
    kinds = {f.name: {**f.metadata, "value": getattr(i, f.name)} for f in fields(i)}
    return {"bench": "goodput", "inputs": kinds, "rows": {str(n): goodput(i, n) for n in hosts}}


def tables(result: dict[str, Any]) -> list[Table]:
    hosts = list(result["rows"])
    names = [row["scheme"] for row in result["rows"][hosts[0]]]
    by = {(n, row["scheme"]): row for n in hosts for row in result["rows"][n]}
    times = Table("Part of the time that trains", ["hosts", *(f"{int(n):,}" for n in hosts)])
    lost = Table("Training steps done again, a day", ["hosts", *(f"{int(n):,}" for n in hosts)])
    costs = Table(
        f"What it costs, at {int(hosts[-1]):,} hosts",
        ["", "interval s", "s a failure", "memory GB a host", "network GB/s a host"],
    )
    for name in names:
        rows = [by[n, name] for n in hosts]
        times.rows.append([name, *(f"{r['ettr']:.3f}" + ("?" if r["rough"] else "") for r in rows)])
        last = rows[-1]
        if last["failure_s"] is not None:
            lost.rows.append([name, *(f"{r['lost_steps_a_day']:.1f}" for r in rows)])
            costs.rows.append(
                [name, *(f"{last[c]:.3g}" for c in ("interval_s", "failure_s", "memory_gb", "network_gb_s"))]
            )
    times.notes += [
        "? where a failure costs more than a fifth of the time between failures: the form is too rough there.",
        "All but ckpt stand still until another host takes the place of one that failed (input swap; --swap 0: spares are",
        "ready); ckpt goes on with the others, which is taken to cost one host's part of the speed for that time.",
    ]
    costs.notes.append(
        "Memory in slots: two, for ckpt three because storage is written from one; parity or copies of two."
    )
    inputs = Table("Inputs", ["", "value", "kind", "source"])
    for name, given_ in result["inputs"].items():
        inputs.rows.append([name, f"{given_['value']:g}", given_["kind"], given_["source"]])
    return [times, lost, costs, inputs]


# The plot.

_COLOURS = ("#8a96a3", "#b3123f", "#d55e00", "#e69f00", "#56b4e9", "#0072b2")
_W, _H, _LEFT, _TOP, _RIGHT, _BOTTOM = 860, 420, 64, 24, 210, 48


def plot(result: dict[str, Any]) -> str:
    """The first table as an SVG: part of the time over hosts, these on a logarithmic scale."""
    hosts = [int(n) for n in result["rows"]]
    low, high = math.log2(min(hosts)), math.log2(max(hosts))

    def x(n: float) -> float:
        return _LEFT + (_W - _LEFT - _RIGHT) * (math.log2(n) - low) / ((high - low) or 1)

    def y(part: float) -> float:
        return _TOP + (_H - _TOP - _BOTTOM) * (1 - part)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_W} {_H}" role="img" aria-label="goodput" '
        'font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{_W}" height="{_H}" fill="#fff"/>',
    ]
    for tenth in range(0, 11, 2):
        at = y(tenth / 10)
        out.append(f'<path d="M{_LEFT} {at:.1f}H{_W - _RIGHT}" stroke="#e4e7eb" fill="none"/>')
        out.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end" fill="#5c6672">{tenth * 10} %</text>')
    for n in hosts:
        out.append(f'<text x="{x(n):.1f}" y="{_H - _BOTTOM + 20}" text-anchor="middle" fill="#5c6672">{n:,}</text>')
    out.append(f'<text x="{(_LEFT + _W - _RIGHT) / 2}" y="{_H - 8}" text-anchor="middle" fill="#5c6672">hosts</text>')
    names = [row["scheme"] for row in result["rows"][str(hosts[0])]]
    ends = {name: y(result["rows"][str(hosts[-1])][i]["ettr"]) for i, name in enumerate(names)}
    below = -math.inf
    for name in sorted(ends, key=lambda n: ends[n]):
        below = max(ends[name], below + 16)
        number = names.index(name)
        rows = [result["rows"][str(n)][number] for n in hosts]
        points = [(x(n), y(row["ettr"])) for n, row in zip(hosts, rows, strict=True)]
        path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
        colour = _COLOURS[number % len(_COLOURS)]
        out.append(f'<path d="{path}" stroke="{colour}" stroke-width="2" fill="none"/>')
        for (a, b), row, n in zip(points, rows, hosts, strict=True):
            fill = "#fff" if row["rough"] else colour
            out.append(
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" stroke="{colour}" fill="{fill}">'
                f"<title>{name}, {n:,} hosts: {row['ettr']:.3f}</title></circle>"
            )
        out.append(f'<text x="{_W - _RIGHT + 12}" y="{below + 4:.1f}" fill="{colour}">{name}</text>')
    out.append(
        f'<text x="{_LEFT}" y="14" fill="#1a1f26">part of the time that trains; hollow: the form is too rough</text>'
    )
    return "\n".join([*out, "</svg>"]) + "\n"


def inputs(args: argparse.Namespace) -> Inputs:
    """The defaults, over them a file of measured figures, over them the command line."""
    values: dict[str, float] = {}
    kinds: dict[str, dict[str, str]] = {}
    names = {f.name for f in fields(Inputs)}
    if args.measured:
        for name, value in json.loads(args.measured.read_text()).items():
            if name not in names:
                raise SystemExit(f"{args.measured}: no input is called {name!r}; there are {', '.join(sorted(names))}")
            values[name], kinds[name] = float(value), {"kind": MEASURED, "source": str(args.measured)}
    for name in names:
        if (value := getattr(args, name)) is not None:
            values[name], kinds[name] = value, {"kind": ASSUMED, "source": "given on the command line"}
    args.kinds = kinds
    return Inputs(**values)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--hosts", type=lambda s: [int(n) for n in s.split(",")], default=list(HOSTS), help="such as 16,1024"
    )
    parser.add_argument("--measured", type=Path, help='JSON of measured inputs, such as {"lag": 0.2, "rebuild": 0.5}')
    parser.add_argument("--json", type=Path, help="file for the raw numbers")
    parser.add_argument("--svg", type=Path, help="file for the plot")
    for f in fields(Inputs):
        parser.add_argument(f"--{f.name.replace('_', '-')}", type=float, help=f"{f.metadata['source']} ({f.default:g})")
    args = parser.parse_args(argv)
    result = run(inputs(args), args.hosts)
    for name, kind in args.kinds.items():
        result["inputs"][name] |= kind
    if args.svg:
        args.svg.parent.mkdir(parents=True, exist_ok=True)
        args.svg.write_text(plot(result))
    finish(result, tables(result), args.json)


if __name__ == "__main__":
    main()
