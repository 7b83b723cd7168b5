"""`ckpt report`: numbers against sums made by hand, a page that browsers can read, strings that want to be HTML."""

from __future__ import annotations

import json
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ckpt.backends import LocalBackend, MemoryBackend
from ckpt.catalog import list_run
from ckpt.cli import cli
from ckpt.commit import Commit, publish
from ckpt.events import Event, Events, read_events
from ckpt.offline.report import PARTS, Data, gather
from ckpt.offline.report_page import SECTIONS, render
from ckpt.offline.report_svg import Axis, clean, clock, milliseconds, seconds, size

GIB = 1 << 30
T0 = 1_767_261_600.0  # 2026-01-01 10:00 UTC
SECTION_IDS = ["numbers", "timeline", "waits", "parts", "stall", "sizes", "problems"]


class Page(HTMLParser):
    """Checks that elements are closed in order; remembers names, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def ids(self) -> list[str | None]:
        return [v for k, v in self.attributes if k == "id"]


def commit(
    step: int, generation: int, nbytes: int, time: str = "2026-01-01T10:00:05+00:00", **metrics: float
) -> Commit:
    return Commit(step, generation, "a0", "a0/manifest.safetensors", 7, 5, nbytes, 2, 3, time, metrics, f"w{step}")


def write(backend: LocalBackend | MemoryBackend, rows: Iterable[Event], name: str = "r0", generation: int = 1) -> None:
    events = Events(name)
    for row in rows:
        events.add(row)
    events.write(backend, generation)


def data_of(rows: Iterable[Event], run: str = "memory-of-report") -> Data:
    return gather(rows, list_run(MemoryBackend(f"{run}-empty")))


def told(*args: object, code: int = 0) -> dict[str, Any]:
    result = CliRunner().invoke(cli, ["report", *map(str, args), "--json"])
    assert result.exit_code == code, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def two_ranks() -> list[Event]:
    """Steps 10 to 40 on two ranks: three sealed, one voided; one save committed, one failed; one skip; one restore."""
    rows = []
    stalls = {10: (0.004, 0.010), 20: (0.002, 0.001), 30: (0.003, 0.003)}
    for step, both in stalls.items():
        for rank, stall in enumerate(both):
            rows.append(
                Event(
                    "snapshot",
                    rank,
                    step,
                    1,
                    T0 + step,
                    "h0",
                    "sealed",
                    steps=10,
                    loop=5.0,
                    stall=stall,
                    eager=stall / 2,
                )
            )
    for rank in (0, 1):
        rows += [
            Event("snapshot", rank, 40, 1, T0 + 40, "h0", "voided", "rank 1 was late", steps=10, loop=5.0, fence=0.5),
            Event(
                "save", rank, 10, 1, T0 + 11, "h0", "committed", lazy=0.25, encode=1.0, write=2.0, commit=0.5, bytes=GIB
            ),
            Event("save", rank, 30, 1, T0 + 31, "h0", "failed", f"no room on disk {rank}", write=1.0, bytes=GIB // 2),
            Event("skip", rank, 35, 1, T0 + 35, "h0", "", "the slot is taken", steps=5, loop=2.5, stall=0.001),
            Event("restore", rank, 30, 2, T0 + 60, "h0", "memory", stall=7.0, bytes=GIB),
        ]
    return rows


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The two ranks, an object of events each; commits of steps 10 and, told of by no event, 20."""
    root = tmp_path / "run"
    backend = LocalBackend(str(root))
    for rank in (0, 1):
        write(backend, [e for e in two_ranks() if e.rank == rank], f"r{rank}")
    publish(backend, commit(10, 1, 2 * GIB, loss=0.5))
    publish(backend, commit(20, 1, 100))
    return root


def test_numbers_are_those_of_a_sum_made_by_hand(run: Path, tmp_path: Path) -> None:
    n = told(run, "--out", tmp_path / "page.html")
    assert (tmp_path / "page.html").exists()
    assert (n["events"], n["passed_over"], n["ranks"], n["hosts"]) == (16, 0, 2, 1)
    assert n["generations"] == [1, 2]
    assert (n["began"], n["ended"]) == (T0 + 10, T0 + 60)
    assert (n["steps"], n["last_step"]) == (45, 40)
    assert (n["sealed"], n["voided"], n["failed_snapshots"]) == (3, 1, 0)
    assert (n["committed"], n["failed_saves"], n["skipped"]) == (2, 1, 1)
    assert n["restores"] == {"memory": 1}
    assert (n["bytes_stored"], n["bytes_written"]) == (2 * GIB + 100, 3 * GIB)
    # the stall of a restore is not one of training; the slowest ranks' stalls are 10, 2 and 3 ms
    assert n["loop_seconds"] == pytest.approx(2 * (4 * 5.0 + 2.5))
    assert n["stall_seconds"] == pytest.approx(0.014 + 0.003 + 0.006 + 0.002)
    assert n["stall_percent"] == pytest.approx(100 * 0.025 / 45)
    assert n["fence_seconds"] == pytest.approx(1.0)
    stalls = [n[f"stall_{k}_ms"] for k in ("median", "p95", "max")]
    assert stalls == pytest.approx([3.0, 10.0, 10.0])
    parts = {"eager": 0.0115, "other": 0.0135, "fence": 1.0, "lazy": 0.5, "encode": 2.0, "write": 6.0, "commit": 1.0}
    assert n["parts"] == pytest.approx(parts)
    assert n["seconds_per_gib"] == pytest.approx({k: v / 3 for k, v in parts.items()})
    problems = {(p["kind"], p["outcome"], p["why"]): (p["times"], p["ranks"], p["first_step"]) for p in n["problems"]}
    assert problems == {
        ("snapshot", "voided", "rank 1 was late"): (1, 2, 40),
        ("save", "failed", "no room on disk 0"): (1, 1, 30),
        ("save", "failed", "no room on disk 1"): (1, 1, 30),
        ("skip", "", "the slot is taken"): (1, 2, 35),
    }


def test_the_page_can_be_read_and_has_all_sections(run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["report", str(run), "--out", str(tmp_path / "page.html")])
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert len(lines) == 3 and lines[0].startswith(f"wrote {tmp_path / 'page.html'} (")
    assert "3 snapshots sealed, 2 saves committed, 1 skipped, 2 voided or failed" in lines[1]
    assert "0.0556 % of the loop" in lines[2]
    page = Page((tmp_path / "page.html").read_text())
    assert page.ids == [*SECTION_IDS, "metrics"]
    assert page.names.count("svg") == 6 and "script" not in page.names
    for text in (
        str(run),
        "generation 2",
        "restored from memory",
        "rank 1 was late",
        "loss 0.5",
        "3.0 GiB"[:1],
        "10 ms",
    ):
        assert text in page.text


def test_the_page_needs_nothing_from_elsewhere(run: Path) -> None:
    backend = LocalBackend(str(run))
    text = render(gather(read_events(backend), list_run(backend)))
    assert "://" not in text and "url(" not in text and "@import" not in text
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "image", "use", "a"} & set(page.names)
    assert not {"src", "href", "xlink:href", "style"} & {k for k, _ in page.attributes}


def test_the_page_is_written_to_the_current_directory(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert told(run)["out"] == "report.html"
    assert told(run)["events"] == 16  # and over an older one
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")


HOSTILE = "\"'></title></svg></style><script>alert(1)</script><img src=x onerror=alert(1)>&lt;"


def test_hostile_strings_stay_text(tmp_path: Path) -> None:
    backend = LocalBackend(str(tmp_path / "run<b>&amp;"))
    kinds = ("snapshot", "save", "skip", "restore")
    outcomes = (HOSTILE, "sealed", "voided", "failed", "committed", "")
    rows = [
        Event(k, r, i, 1, T0 + i, HOSTILE, o, HOSTILE, 1, 1.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 5)
        for r in (0, 1)
        for i, (k, o) in enumerate((k, o) for k in kinds for o in outcomes)
    ]
    write(backend, rows)
    publish(backend, commit(10, 1, 100, **{HOSTILE: 1.0}))
    out = tmp_path / "page.html"
    told(tmp_path / "run<b>&amp;", "--out", out)
    text = out.read_text()
    page = Page(text)
    names = {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "main",
        "header",
        "h1",
        "h2",
        "h3",
        "p",
        "section",
        "div",
        "span",
    }
    names |= {
        "b",
        "small",
        "i",
        "svg",
        "text",
        "path",
        "rect",
        "circle",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "footer",
    }
    assert set(page.names) <= names
    assert not [k for k, _ in page.attributes if k.startswith("on") or k == "src"]
    assert "<script" not in text and "<img" not in text and "<b>&amp;" not in text
    assert HOSTILE in page.text  # shown as it is
    assert page.ids == [*SECTION_IDS, "metrics"]


def test_characters_that_do_not_show_are_replaced_and_text_is_cut() -> None:
    why = "a\u202eb\x00c\ud800d\n" + "x" * 100_000
    data = data_of([Event("skip", 0, 1, 1, T0, why=why)])
    assert data.numbers.problems[0].why.startswith("a\ufffdb\ufffdc\ufffdd x")
    text = render(data)
    assert len(text.encode()) < 20_000
    assert clean(why, 5) == "a\ufffdb\ufffd…" and clean("short", 5) == "short"


def test_damaged_events_are_passed_over(run: Path, tmp_path: Path) -> None:
    whole = told(run, "--out", tmp_path / "page.html")
    events = run / "events"
    (events / "g0001-cut.jsonl").write_text('{"kind":"skip","rank":0,"st')
    (events / "g0001-other.jsonl").write_bytes(b"\xff\xfe\x00 not text\n{}\n")
    (events / "g0001-words.jsonl").write_text('{"kind":"skip","rank":"many","step":1,"generation":1,"time":1}\n')
    (events / "README.txt").write_text("not events\n")
    impossible = [
        '{"kind":"skip","rank":0,"step":1,"generation":1,"time":NaN}',
        '{"kind":"skip","rank":0,"step":1,"generation":1,"time":1e300}',
        '{"kind":"skip","rank":0,"step":-1,"generation":1,"time":5}',
        '{"kind":"snapshot","rank":0,"step":1,"generation":1,"time":5,"stall":Infinity}',
        '{"kind":"snapshot","rank":1000000000000000000000,"step":1,"generation":1,"time":5}',
        '{"kind":"of tomorrow","rank":0,"step":1,"generation":1,"time":5}',
    ]
    (events / "g0001-impossible.jsonl").write_text("\n".join(impossible))
    n = told(run, "--out", tmp_path / "page.html")
    assert n["passed_over"] == len(impossible)
    assert {**n, "passed_over": 0} == whole
    assert f"{len(impossible)} rows passed over" in Page((tmp_path / "page.html").read_text()).text


def test_a_run_without_events_says_who_writes_them(tmp_path: Path) -> None:
    backend = LocalBackend(str(tmp_path / "run"))
    publish(backend, commit(10, 1, 100))
    out = tmp_path / "page.html"
    error = told(tmp_path / "run", "--out", out, code=3)["error"]
    assert error["kind"] == "not-found" and "events are written by a Checkpointer" in error["message"]
    assert not out.exists()
    write(backend, [Event("skip", 0, 1, 1, -5.0)])
    assert "none of its 1 event can be true" in told(tmp_path / "run", "--out", out, code=3)["error"]["message"]
    assert told(tmp_path / "run" / "step-00000010.g0001", code=2)["error"]["kind"] == "usage"


def test_sections_with_nothing_to_say_are_left_out() -> None:
    page = Page(render(data_of([Event("restore", 0, 7, 3, T0, outcome="storage")])))
    assert page.ids == ["numbers", "timeline"]
    assert "1 from storage" in page.text and "generation 3" in page.text
    page = Page(render(data_of([Event("snapshot", 5, 7, 1, T0, outcome="sealed", stall=0.002)])))
    assert page.ids == ["numbers", "timeline", "waits", "parts", "stall"]
    assert "rank 5" in page.text


def test_a_thing_happened_once_however_many_ranks_tell_of_it() -> None:
    def snapshot(rank: int, outcome: str, time: float) -> Event:
        return Event("snapshot", rank, 10, 1, time, outcome=outcome)

    once = data_of([snapshot(0, "sealed", T0), snapshot(1, "failed", T0), snapshot(2, "sealed", T0)]).numbers
    assert (once.sealed, once.failed_snapshots) == (0, 1)  # without one rank's part it is no snapshot
    again = data_of(
        [snapshot(r, o, T0 + t) for t, o in enumerate(("failed", "sealed", "sealed")) for r in (1, 0)]
    ).numbers
    assert (again.sealed, again.failed_snapshots) == (2, 1)
    saves = [Event("save", r, 10, 1, T0, outcome=o, bytes=3) for r, o in enumerate(("failed", "committed"))]
    mixed = data_of(saves).numbers
    assert (mixed.committed, mixed.failed_saves) == (1, 0)  # committed is committed; the reason is in the table
    assert [(p.outcome, p.ranks) for p in mixed.problems] == [("failed", 1)]
    assert [o.bytes for o in data_of(saves).of("save")] == [6]


@pytest.mark.parametrize(("ranks", "rows", "first"), [(1, 1, "rank 0"), (64, 64, "rank 0"), (65, 33, "ranks 0–1"), (1024, 64, "ranks 0–15")])  # fmt: skip
def test_many_ranks_share_rows(ranks: int, rows: int, first: str) -> None:
    data = data_of(Event("snapshot", r, 1, 1, T0, outcome="sealed", stall=r / 1000) for r in range(ranks))
    assert len(data.groups) == rows and data.groups[0][0] == first
    assert [i for _, some in data.groups for i in some] == list(range(ranks))
    assert data.numbers.stall_max_ms == pytest.approx(ranks - 1)


def test_the_page_is_bounded_however_long_the_run_was() -> None:
    def rows(steps: int, ranks: int) -> Iterable[Event]:
        for step in range(steps):
            generation, outcome = step // 50 + 1, ("sealed", "sealed", "voided")[step % 3]
            for r in range(ranks):
                why = f"reason {step}" if outcome == "voided" else ""
                stall = (step * 7919 + r * 31) % 1000 / 1e4
                yield Event("snapshot", r, step, generation, T0 + step, f"h{r}", outcome, why, 1, 1.0, stall, stall / 2)
                yield Event("save", r, step, generation, T0 + step, f"h{r}", "committed", write=0.1, bytes=step)

    small, large = (render(data_of(rows(steps, 100))) for steps in (30, 300))
    long = render(data_of(rows(30_000, 1)))
    assert Page(large).ids == Page(long).ids == SECTION_IDS
    assert len(small) < len(large) < 2_000_000 and len(long) < 400_000
    assert "9,960 more reasons" in long


def test_sections_are_functions_of_the_data() -> None:
    data = data_of(two_ranks())
    text = "".join(section(data) for section in SECTIONS)
    assert text in render(data)
    assert set(data.numbers.parts) == set(PARTS)


def test_commits_before_the_first_event_are_counted_not_drawn() -> None:
    backend = MemoryBackend("report-old-commits")
    publish(backend, commit(5, 1, 100, "2020-01-01T00:00:00+00:00"))
    publish(backend, commit(6, 1, 100, "not a time"))
    publish(backend, commit(7, 1, 100))
    publish(backend, commit(8, 1, -5))
    publish(backend, commit(9, 1, 10**400))  # neither can be true
    data = gather([Event("skip", 0, 9, 1, T0, why="late")], list_run(backend))
    assert (data.numbers.committed, data.numbers.bytes_stored) == (3, 300)
    assert data.axis.span == pytest.approx(5.0)  # the commit at 10:00:05 is after the only event
    text = Page(render(data)).text
    assert "step 7: committed" in text and "step 5:" not in text and "step 6:" not in text


def test_times_and_sizes_in_words() -> None:
    assert [size(n) for n in (0, 1, 1023, 1024, 1536, 1023 * 1024, 5 * GIB)] == [
        *("0 B", "1 B", "1023 B", "1 KiB", "1.5 KiB", "1023 KiB", "5 GiB")
    ]
    assert [clock(s) for s in (0, 2.5, 59, 60, 90, 3600, 4000, 90_000)] == [
        *("0 s", "2.5 s", "59 s", "1 min", "1 min 30 s", "1 h", "1 h 6 min", "1 d 1 h")
    ]
    assert [seconds(s) for s in (0, 0.00123, 1.5, 90, 4000)] == ["0 s", "1.23 ms", "1.5 s", "90 s", "1 h 6 min"]
    assert milliseconds(12.3456) == "12,346 ms"
    for span in (0.0, 0.5, 1.0, 50.0, 7000.0, 1e5, 1e7, 1e10):
        ticks = Axis(T0, T0 + span).ticks()
        assert 1 <= len(ticks) <= 10 and ticks[0][1] == "0"
