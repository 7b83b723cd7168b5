"""Rows about what happened: written, told, and read again, whatever became of them in between."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.backends import MemoryBackend
from ckpt.errors import StorageError
from ckpt.events import Event, Events, last_rows, read_events

seconds = st.integers(0, 10**9).map(lambda micros: micros / 2**20)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
counts = st.integers(0, 1 << 60)
events = st.builds(
    Event, kind=st.sampled_from(["snapshot", "save", "skip", "restore"]), rank=counts, step=counts, generation=counts, time=seconds.map(lambda s: s + 1), host=words, outcome=words, why=words,
    steps=counts, loop=seconds, stall=seconds, eager=seconds, lazy=seconds, fence=seconds, encode=seconds, write=seconds,
    commit=seconds, bytes=counts,
)  # fmt: skip
ROW = {"kind": "save", "rank": 1, "step": 2, "generation": 3, "time": 4.5, "outcome": "committed"}
EVENT = Event("save", 1, 2, 3, 4.5, outcome="committed")


@pytest.fixture
def run(request: pytest.FixtureRequest) -> MemoryBackend:
    return MemoryBackend(f"events-{request.node.name}")


def put(run: MemoryBackend, *lines: bytes, name: str = "g0003-r00001-0") -> None:
    run.create(f"events/{name}.jsonl", b"\n".join(lines))


def rounded(event: Event) -> Event:
    return Event(**{k: round(v, 6) if isinstance(v, float) else v for k, v in event.__dict__.items()})


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(events, max_size=5), st.lists(events, max_size=5), st.integers())
def test_what_is_written_is_read(first: list[Event], second: list[Event], salt: int) -> None:
    run = MemoryBackend(f"events-round-{salt}-{id(first)}")
    told: list[Event] = []
    log = Events("r00000", told.append)
    for batch in (first, second):
        for event in batch:
            log.add(event)
        log.write(run, 7)
    assert told == first + second and list(read_events(run)) == [rounded(e) for e in told]
    for entry in run.list("events"):
        run.delete(f"events/{entry.name}")


def test_a_run_without_events(run: MemoryBackend) -> None:
    Events("r00000").write(run, 0)
    assert list(read_events(run)) == [] and not run.list("events")


def test_a_callback_that_fails_harms_nobody(run: MemoryBackend, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: Event) -> None:
        raise RuntimeError("no network")

    log = Events("r00000", fail)
    with caplog.at_level(logging.ERROR):
        log.add(EVENT)
    assert "the callback for events failed, training goes on: no network" in caplog.text
    log.write(run, 3)
    assert list(read_events(run)) == [EVENT]


def test_what_waits_is_bounded(run: MemoryBackend) -> None:
    log = Events("r00000", limit=10)
    for step in range(25):
        log.add(Event("skip", 0, step, 0, 1.0))
    log.write(run, 0)
    assert [e.step for e in read_events(run)] == list(range(15, 25))


def test_when_it_is_time_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("ckpt.events.time.monotonic", lambda: now[0])
    log = Events("r00000")
    assert not log.due
    now[0] = 160.0
    assert log.due
    log.write(MemoryBackend("events-due"), 0)
    assert not log.due
    for step in range(1000):
        assert not log.due
        log.add(Event("skip", 0, step, 0, 1.0))
    assert log.due


def test_storage_that_fails_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    class Full(MemoryBackend):
        def create(self, path: str, data: bytes) -> None:
            raise StorageError("no space left")

    log = Events("r00000")
    log.add(EVENT)
    with caplog.at_level(logging.ERROR):
        log.write(Full("events-full"), 0)
    assert "1 events were not written: no space left" in caplog.text


def test_a_reason_in_any_text(run: MemoryBackend) -> None:
    """Names of files that are no UTF-8 come as lone surrogates, in the text of an error for one."""
    log = Events("r00000")
    log.add(Event("save", 1, 2, 3, 4.5, why=b"no such file: caf\xe9".decode(errors="surrogateescape")))
    log.write(run, 3)
    [event] = read_events(run)
    assert event.step == 2 and event.why.startswith("no such file: caf")


DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "a list": b"[1, 2]",
    "a string": b'"kind"',
    "a number": b"5",
    "null": b"null",
    "cut": json.dumps(ROW).encode()[:-5],
    "not UTF-8": b'{"kind": "\xff"}',
    "zeros": bytes(100),
    "deep": b"[" * 100_000,
    "deep and whole": b'{"kind":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "too little": b'{"kind": "save"}',
    "a step beyond all bounds": json.dumps(ROW).replace('"step": 2', '"step": 1e999').encode(),
    "a step that is no number": json.dumps(ROW).replace('"step": 2', '"step": NaN').encode(),
    "a step in words": json.dumps({**ROW, "step": "two"}).encode(),
    "a step of very many digits": json.dumps(ROW).replace('"step": 2', '"step": ' + "9" * 10_000).encode(),
    "a step that is a list": json.dumps({**ROW, "step": [2]}).encode(),
    "no time": json.dumps({**ROW, "time": None}).encode(),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_rows_are_passed_over(run: MemoryBackend, name: str) -> None:
    good = json.dumps(ROW).encode()
    put(run, good, DAMAGED[name], good)
    assert list(read_events(run)) == [EVENT, EVENT]


def test_fields_of_another_version(run: MemoryBackend) -> None:
    put(run, json.dumps({**ROW, "colour": "red", "more": [1]}).encode())
    assert list(read_events(run)) == [EVENT]


def test_other_objects_are_passed_over(run: MemoryBackend) -> None:
    good = json.dumps(ROW).encode()
    for name in ("notes.jsonl", "g1-r0.jsonl", "g0001-r0.jsonl.tmp", "g٣٣٣٣-r0.jsonl", "g0001-r0.json"):
        run.create(f"events/{name}", good)
    put(run, good, name="g0001-r0")
    assert list(read_events(run)) == [EVENT]


def test_an_object_that_cannot_be_read_is_passed_over(run: MemoryBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    put(run, json.dumps(ROW).encode(), name="g0001-r0")
    put(run, json.dumps(ROW).encode() + b"\n" * 1000, name="g0001-r1")
    monkeypatch.setattr("ckpt.events._MAX", 500)
    assert list(read_events(run)) == [EVENT]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.dictionaries(
        st.sampled_from([*ROW, "bytes", "why"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | words, lambda x: st.lists(x), max_leaves=3
        ),
    )
)
def test_any_row(row: dict[str, Any]) -> None:
    run = MemoryBackend(f"events-any-{id(row)}")
    put(run, json.dumps({**ROW, **row}).encode())
    for event in read_events(run):
        assert all(isinstance(getattr(event, k), type(getattr(EVENT, k))) for k in ROW)
    run.delete("events/g0003-r00001-0.jsonl")


def rows_in(run: MemoryBackend, name: str, rows: bytes) -> list[Event]:
    """What would be read if the object were written."""
    run.create(name, rows)
    found = list(read_events(run))
    run.delete(name)
    return found


def test_what_waits_can_be_read_by_who_outlives_this_process(run: MemoryBackend) -> None:
    log = Events("r00001")
    fd = log.outlive()
    assert last_rows(fd) == ("", b"")
    told = [Event("skip", 1, step, 3, 1.0, why="busy") for step in range(4)]
    for event in told[:3]:
        log.add(event)
    name, rows = last_rows(fd)
    assert rows_in(run, name, rows) == told[:3]
    log.write(run, 3)
    assert [f"events/{e.name}" for e in run.list("events")] == [name], "who comes second finds it written"
    assert last_rows(fd) == ("", b"")
    log.add(told[3])
    assert rows_in(MemoryBackend("events-later"), *last_rows(fd)) == told[3:]
    log.close()


def test_of_too_many_the_newest_outlive_it(run: MemoryBackend) -> None:
    log = Events("r00001")
    fd = log.outlive()
    for step in range(9000):
        log.add(Event("skip", 1, step, 3, 1.0, why="x" * 100))
        if not step % 1000:
            assert rows_in(run, *last_rows(fd))[-1].step == step
    found = [e.step for e in rows_in(run, *last_rows(fd))]
    assert found == list(range(found[0], 9000)) and len(found) > 500
    log.close()


@pytest.mark.parametrize(
    "name", ["events/../commit.json", "gen-0001.json", "events/g0001-a/b.jsonl", "events/g1-x.jsonl", ""]
)
def test_nothing_is_written_under_another_kind_of_name(name: str) -> None:
    with tempfile.TemporaryFile() as f:
        f.write((4).to_bytes(8, "little") + name.encode().ljust(248, b"\0") + b"row\n")
        f.flush()
        assert last_rows(f.fileno()) == ("", b"")


def test_a_row_that_was_cut_short_is_not_there(run: MemoryBackend) -> None:
    log = Events("r00001")
    fd = log.outlive()
    log.add(EVENT)
    name, rows = last_rows(fd)
    os.pwrite(fd, b'{"kind":"save","ra', 256 + len(rows))
    assert last_rows(fd) == (name, rows) and rows_in(run, name, rows) == [EVENT]
    log.close()
