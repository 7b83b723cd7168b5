"""What a run holds: refs, what leads to the present, retention, leftovers. Trees are made by hand, commits only."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.backends import LocalBackend
from ckpt.catalog import (
    Listing,
    Ref,
    Step,
    best,
    leftovers,
    lineage,
    list_run,
    parse_ref,
    resolve,
    write_ledger,
)
from ckpt.commit import Commit, Generation, publish, sealed, step_folder
from ckpt.errors import FormatError, IntegrityError, NotFoundError, UsageError
from ckpt.offline.prune import Doomed, carry_out, plan_prune, retain
from ckpt.retention import KeepAll, KeepAny, KeepBest, KeepEvery, KeepLast, KeepWithin, Policy, kept


def commit(step: int, generation: int = 0, attempt: str = "a0", **metrics: float) -> Commit:
    path = f"{attempt}/manifest.safetensors"
    return Commit(step, generation, attempt, path, 7, 5, 100, 2, 3, "2026-01-01T00:00:00+00:00", metrics, f"w{step}")


def publish_all(root: Path, *commits: Commit) -> LocalBackend:
    backend = LocalBackend(str(root))
    for c in commits:
        publish(backend, c)
        backend.create(f"{c.folder}/{c.manifest_path}", b"content")
    return backend


def begin(backend: LocalBackend, number: int, parent: str | None) -> None:
    content = {"generation": number, "parent": parent, "time": "2026-01-01T00:00:00+00:00", "world": 2}
    backend.create(f"gen-{number:04d}.json", sealed({"format": "ckpt-generation", "version": 1, **content}))


def listed(steps: Sequence[tuple[int, int]], parents: Sequence[tuple[int, str | None]] = ()) -> Listing:
    """A listing of (step, generation)s and of (generation, parent folder)s."""
    rows = tuple(Step(s, g, step_folder(s, g), commit(s, g)) for s, g in sorted(steps, key=lambda p: (p[1], p[0])))
    return Listing("run", tuple(Generation(g, parent, "then", 1) for g, parent in parents), rows)


def age(path: Path, seconds: float) -> None:
    for p in [path, *path.rglob("*")]:
        os.utime(p, (time.time() - seconds,) * 2)


# Refs.


@pytest.mark.parametrize(
    ("text", "run", "which"),
    [
        ("runs/a", "runs/a", "latest"),
        ("runs/a/", "runs/a", "latest"),
        ("runs/a@latest", "runs/a", "latest"),
        ("runs/a@best", "runs/a", "best"),
        ("runs/a@best:val_loss", "runs/a", "best:val_loss"),
        ("runs/a@best:val/loss", "runs/a", "best:val/loss"),
        ("runs/a@1000", "runs/a", "1000"),
        ("s3://bucket/a@1000", "s3://bucket/a", "1000"),
        ("s3://key@host/a", "s3://key@host/a", "latest"),
        ("s3://key@host/a@best", "s3://key@host/a", "best"),
        ("home/me@work/run", "home/me@work/run", "latest"),
        ("me@work@latest", "me@work", "latest"),
        (r"C:\runs\a", r"C:\runs\a", "latest"),
        (r"C:\runs\a@7", r"C:\runs\a", "7"),
        ("runs/a/step-00000010.g0000", "runs/a", "step-00000010.g0000"),
        ("runs/a/step-00000010.g0000/", "runs/a", "step-00000010.g0000"),
        ("memory://x/step-00000010.g0003", "memory://x", "step-00000010.g0003"),
        ("step-00000010.g0000", ".", "step-00000010.g0000"),
        ("/step-00000010.g0000", "/", "step-00000010.g0000"),
        ("runs/step-1", "runs/step-1", "latest"),
    ],
)
def test_a_ref_names_a_run_and_a_step(text: str, run: str, which: str) -> None:
    assert parse_ref(text) == Ref(run, which)
    assert parse_ref(Path(text)).which == which or "://" in text


@pytest.mark.parametrize("text", ["runs/a@newest", "me@work", "runs/a@-1", "runs/a@1.5", "runs/a@"])
def test_an_unknown_word_after_at_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="after '@' say latest"):
        parse_ref(text)


def test_a_step_is_found_by_every_kind_of_ref(tmp_path: Path) -> None:
    publish_all(tmp_path, commit(10, **{"val/loss": 1.0, "acc": 0.9}), commit(20, **{"val/loss": 2.0, "acc": 0.95}))
    assert resolve(tmp_path)[1].step == 20
    assert resolve(f"{tmp_path}@latest")[1].step == 20
    assert resolve(f"{tmp_path}@10")[1].step == 10
    assert resolve(f"{tmp_path}@best:val/loss")[1].step == 10
    assert resolve(f"{tmp_path}@best:acc")[1].step == 20
    assert resolve(tmp_path / "step-00000010.g0000")[1].step == 10
    with pytest.raises(NotFoundError, match="no committed step has the metric 'val_loss or loss'"):
        resolve(f"{tmp_path}@best")
    with pytest.raises(NotFoundError, match="no committed checkpoint of step 15; committed steps are 10, 20"):
        resolve(f"{tmp_path}@15")


def test_a_step_folder_is_found_from_inside_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_all(tmp_path, commit(10))
    monkeypatch.chdir(tmp_path)
    assert resolve("step-00000010.g0000")[1].step == 10


def test_best_is_lowest_but_highest_for_scores_and_the_newer_of_equals() -> None:
    rows = [Step(s, 0, "", commit(s, **m)) for s, m in [(1, {"loss": 2.0}), (2, {"loss": 1.0}), (3, {"loss": 1.0})]]
    assert best(rows).step == 3
    rows = [Step(s, 0, "", commit(s, score=v)) for s, v in [(1, 2.0), (2, 5.0), (3, float("nan"))]]
    assert best(rows, "score").step == 2


# What leads to the present.


def numbers(listing: Listing) -> list[tuple[int, int]]:
    return [(s.step, s.generation) for s in lineage(listing)]


def test_without_generations_the_newest_step_is_the_present() -> None:
    assert numbers(listed([(10, 0), (30, 0), (20, 0)])) == [(30, 0), (20, 0), (10, 0)]
    assert numbers(listed([])) == []


def test_a_rollback_leaves_what_came_after_it_behind() -> None:
    parents = [(1, None), (2, step_folder(20, 1)), (3, step_folder(30, 2))]
    steps = [(10, 1), (20, 1), (30, 1), (40, 1), (30, 2), (40, 2), (35, 3)]
    assert numbers(listed(steps, parents)) == [(35, 3), (30, 2), (20, 1), (10, 1)]


def test_a_generation_that_saved_nothing_yet_stands_on_its_parent() -> None:
    parents = [(1, None), (2, step_folder(20, 1))]
    assert numbers(listed([(10, 1), (20, 1), (30, 1)], parents)) == [(20, 1), (10, 1)]
    twice = [*parents, (3, step_folder(20, 1))]
    assert numbers(listed([(10, 1), (20, 1), (30, 1), (25, 2)], twice)) == [(20, 1), (10, 1)]


def test_a_fresh_start_has_no_past() -> None:
    assert numbers(listed([(10, 1), (5, 2)], [(1, None), (2, None)])) == [(5, 2)]


def test_a_parent_that_was_deleted_still_bounds_what_came_before_it() -> None:
    parents = [(1, None), (2, step_folder(20, 1))]
    assert numbers(listed([(10, 1), (30, 1), (25, 2)], parents)) == [(25, 2), (10, 1)]


@pytest.mark.parametrize("parent", [step_folder(20, 2), step_folder(20, 3), "nonsense"])
def test_a_parent_that_cannot_be_ends_the_walk(parent: str) -> None:
    assert numbers(listed([(10, 1), (25, 2)], [(1, None), (2, parent)])) == [(25, 2)]


def test_a_damaged_generation_does_not_hide_the_past(tmp_path: Path) -> None:
    backend = publish_all(tmp_path, commit(10, 1), commit(20, 1), commit(25, 2))
    begin(backend, 1, None)
    (tmp_path / "gen-0002.json").write_text("{}")
    assert numbers(list_run(backend)) == [(25, 2), (20, 1), (10, 1)]


def test_latest_is_never_quietly_an_older_step_than_a_damaged_one(tmp_path: Path) -> None:
    backend = publish_all(tmp_path, commit(10), commit(20))
    (tmp_path / step_folder(20, 0) / "commit.json").write_text("{}")
    with pytest.raises(IntegrityError, match="step-00000020"):
        resolve(tmp_path)
    assert [s.step for s in list_run(backend).committed] == [10]


# Retention.

runs = st.builds(
    lambda steps, parents: listed(
        sorted(steps), [(g, None if p is None else step_folder(*p)) for g, p in parents.items()]
    ),
    st.sets(st.tuples(st.integers(0, 12), st.integers(0, 3)), max_size=12),
    st.dictionaries(st.integers(1, 3), st.none() | st.tuples(st.integers(0, 12), st.integers(0, 2)), max_size=3),
)
policies = st.lists(
    st.one_of(
        st.builds(KeepLast, st.integers(1, 4)),
        st.builds(KeepEvery, st.integers(1, 5)),
        st.builds(KeepBest, st.just("loss"), st.integers(1, 3)),
        st.builds(KeepWithin, hours=st.integers(1, 30)),
        st.builds(lambda s, r: KeepAll(KeepEvery(s), KeepBest("loss", r)), st.integers(1, 5), st.integers(1, 3)),
        st.builds(lambda n, h: KeepAny(KeepLast(n), KeepWithin(minutes=h)), st.integers(1, 3), st.integers(1, 300)),
    ),
    max_size=3,
)


@given(runs, policies)
def test_the_latest_step_is_never_dropped(listing: Listing, rules: list[Policy]) -> None:
    keep = kept(listing, rules)
    assert set(keep) == {s.folder for s in listing.committed}
    present = lineage(listing)
    if listing.committed:
        assert any(keep.values())
    if present:
        assert keep[present[0].folder]
    if not rules:
        assert all(keep.values())
    for rule in rules:
        # The present keeps what the policy would keep of it alone, whatever a rollback left behind.
        for s, k in zip(present[::-1], rule(present[::-1]), strict=True):
            assert keep[s.folder] or not k


@given(runs, policies)
def test_what_pruning_leaves_has_the_same_present(listing: Listing, rules: list[Policy]) -> None:
    keep = kept(listing, rules)
    left = Listing(listing.run, listing.generations, tuple(s for s in listing.steps if keep[s.folder]))
    assert lineage(left)[:1] == lineage(listing)[:1]
    assert lineage(left) == [s for s in lineage(listing) if keep[s.folder]]


def test_policies_add_up() -> None:
    listing = listed([(s, 0) for s in (9, 10, 19, 20, 29, 30, 31)])
    assert [f for f, k in kept(listing, [KeepLast(1)]).items() if k] == [step_folder(31, 0)]
    of_ten = [step_folder(s, 0) for s in (9, 10, 19, 20, 29, 30, 31)]
    assert [f for f, k in kept(listing, [KeepEvery(10)]).items() if k] == of_ten
    both = kept(listing, [KeepLast(2), KeepEvery(20)])
    assert [f for f, k in both.items() if k] == [step_folder(s, 0) for s in (19, 20, 30, 31)]


def test_keep_last_keeps_the_present_not_what_a_rollback_left_behind() -> None:
    steps = [(10, 1), (20, 1), (30, 1), (40, 1), (25, 2)]
    keep = kept(listed(steps, [(1, None), (2, step_folder(20, 1))]), [KeepLast(3)])
    assert [f for f, k in keep.items() if k] == [step_folder(10, 1), step_folder(20, 1), step_folder(25, 2)]


def test_keep_best_keeps_the_best_of_the_present_too() -> None:
    rows = [(10, 1, 3.0), (20, 1, 2.0), (30, 1, 1.0), (25, 2, 4.0)]
    steps = tuple(Step(s, g, step_folder(s, g), commit(s, g, loss=v)) for s, g, v in rows)
    listing = Listing("run", (Generation(2, step_folder(20, 1), "then", 1),), steps)
    keep = kept(listing, [KeepBest("loss")])
    assert [f for f, k in keep.items() if k] == [step_folder(20, 1), step_folder(30, 1), step_folder(25, 2)]


def timed(*times: str) -> list[Step]:
    """Steps 0, 1, ... committed at these times."""
    return [Step(n, 0, step_folder(n, 0), dataclasses.replace(commit(n), time=t)) for n, t in enumerate(times)]


def test_keep_within_counts_back_from_the_newest_step() -> None:
    steps = timed(
        "2026-01-01T00:00:00+00:00", "2026-01-02T11:59:00+00:00", "2026-01-02T13:00:00+01:00", "2026-01-03T12:00:00"
    )
    assert KeepWithin(hours=24)(steps) == [False, False, True, True]
    assert KeepWithin(days=1, minutes=1)(steps) == [False, True, True, True]
    assert KeepWithin(minutes=1)(timed("then", "2020-01-01", "never")) == [True, True, True]
    assert KeepWithin(minutes=1)([]) == []


@given(runs, st.lists(policies.filter(bool), min_size=1, max_size=2))
def test_any_and_all_are_union_and_intersection(listing: Listing, rules: list[list[Policy]]) -> None:
    steps = listing.committed
    sets = [{i for rule in some for i, k in enumerate(rule(steps)) if k} for some in rules]
    both = KeepAll(*(KeepAny(*some) for some in rules))
    assert {i for i, k in enumerate(both(steps)) if k} == set.intersection(*sets)
    either = KeepAny(*(KeepAny(*some) for some in rules))
    assert {i for i, k in enumerate(either(steps)) if k} == set.union(*sets)


def test_a_policy_inside_of_others_sees_metrics_that_came_late(tmp_path: Path) -> None:
    backend = LocalBackend(str(tmp_path))
    for n in range(4):
        publish(backend, commit(n))
    write_ledger(backend, "g0000-late", [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.7}])
    retain(backend, [KeepAll(KeepAny(KeepBest("loss")), KeepLast(3))])
    assert [s.step for s in list_run(backend).committed] == [1, 3]
    with pytest.raises(NotFoundError, match="no committed step has the metric"):
        plan_prune(backend, [KeepAny(KeepBest("los"))], 0)


def test_a_policy_that_fails_deletes_nothing_and_is_no_error_of_the_loop(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backend = LocalBackend(str(tmp_path))
    for n in range(3):
        publish(backend, commit(n))

    def broken(steps: Sequence[Step]) -> list[bool]:
        return [steps[99] is None]

    retain(backend, [KeepLast(1), broken])
    assert len(list_run(backend).committed) == 3 and "old steps were not deleted" in caplog.text


@pytest.mark.parametrize(
    "wrong",
    [lambda: KeepLast(0), lambda: KeepEvery(0), KeepWithin, KeepAny, KeepAll]
    + [lambda: KeepWithin(hours=-1), lambda: KeepWithin(days=1, hours=-1), lambda: KeepWithin(days=float("nan"))],
)
def test_a_policy_that_keeps_nothing_is_refused(wrong: Callable[[], object]) -> None:
    with pytest.raises(UsageError):
        wrong()


# Leftovers, and deleting.


def litter(tmp_path: Path) -> LocalBackend:
    """Two committed steps, one of them with a losing attempt; one never committed; one damaged; temporary files."""
    backend = publish_all(tmp_path, commit(10), commit(20, attempt="a1"), commit(30))
    backend.create("step-00000020.g0000/a0/rank-00000.safetensors", b"lost")
    backend.create("step-00000025.g0000/a0/attempt.json", b"{}")
    backend.create("step-00000025.g0000/a0/rank-00000.safetensors", b"x" * 50)
    (tmp_path / "step-00000030.g0000/commit.json").write_text("{}")
    for folder in (".", "step-00000010.g0000", "step-00000010.g0000/a0"):
        (tmp_path / folder / ".ckpt-tmp-dead").write_text("half")
    age(tmp_path, 100_000)
    return backend


_LITTER = [
    ".ckpt-tmp-dead",
    "step-00000010.g0000/.ckpt-tmp-dead",
    "step-00000010.g0000/a0/.ckpt-tmp-dead",
    "step-00000020.g0000/a0",
    "step-00000025.g0000",
]


def test_leftovers_are_what_no_checkpoint_needs(tmp_path: Path) -> None:
    backend = litter(tmp_path)
    assert sorted(leftovers(backend, list_run(backend), 90_000)) == _LITTER
    assert leftovers(backend, list_run(backend), 110_000) == []


def test_a_leftover_is_as_young_as_its_newest_file(tmp_path: Path) -> None:
    backend = litter(tmp_path)
    os.utime(tmp_path / "step-00000025.g0000/a0/rank-00000.safetensors")
    assert "step-00000025.g0000" not in leftovers(backend, list_run(backend), 60)
    assert "step-00000025.g0000" in leftovers(backend, list_run(backend), 0)


def test_pruning_leftovers_leaves_every_checkpoint_whole(tmp_path: Path) -> None:
    backend = litter(tmp_path)
    plan = plan_prune(backend, [], 3600)
    assert sorted(d.path for d in plan.delete) == _LITTER
    assert next(d for d in plan.delete if d.path == "step-00000025.g0000") == Doomed(
        "step-00000025.g0000", "leftover", 52
    )
    assert carry_out(backend, plan, [], 3600).delete == plan.delete
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert left == [
        "step-00000010.g0000/a0/manifest.safetensors",
        "step-00000010.g0000/commit.json",
        "step-00000020.g0000/a1/manifest.safetensors",
        "step-00000020.g0000/commit.json",
        "step-00000030.g0000/a0/manifest.safetensors",
        "step-00000030.g0000/commit.json",
    ]
    assert plan_prune(backend, [], 0).delete == ()


def test_a_damaged_step_goes_only_when_asked_for_and_old(tmp_path: Path) -> None:
    backend = litter(tmp_path)
    assert not any("00000030" in d.path for d in plan_prune(backend, [KeepLast(1)], 0).delete)
    assert not any(d.kind == "damaged" for d in plan_prune(backend, [], 200_000, damaged=True).delete)
    plan = plan_prune(backend, [], 3600, damaged=True)
    assert [d.path for d in plan.delete if d.kind == "damaged"] == ["step-00000030.g0000"]
    carry_out(backend, plan, [], 3600)
    assert not (tmp_path / "step-00000030.g0000").exists()


def test_a_step_of_a_newer_version_is_not_damaged(tmp_path: Path) -> None:
    backend = publish_all(tmp_path, commit(10))
    backend.create("step-00000020.g0000/commit.json", sealed({"format": "ckpt-commit", "version": 99}))
    age(tmp_path, 100_000)
    assert plan_prune(backend, [KeepLast(1)], 0, damaged=True).delete == ()


def test_policies_need_to_know_the_past(tmp_path: Path) -> None:
    backend = publish_all(tmp_path, commit(10), commit(20))
    (tmp_path / "gen-0001.json").write_text("{}")
    with pytest.raises(FormatError, match="no step is pruned"):
        plan_prune(backend, [KeepLast(1)], 0)
    assert plan_prune(backend, [], 0).delete == ()


def test_a_metric_that_no_step_has_prunes_nothing(tmp_path: Path) -> None:
    backend = publish_all(tmp_path, commit(10, loss=1.0), commit(20, loss=2.0))
    with pytest.raises(NotFoundError, match="'los'"):
        plan_prune(backend, [KeepBest("los")], 0)
    assert [d.path for d in plan_prune(backend, [KeepBest("loss")], 0).delete] == []


def test_what_became_needed_since_the_plan_is_not_deleted(tmp_path: Path) -> None:
    backend = publish_all(tmp_path, commit(10), commit(20), commit(30))
    backend.create("step-00000040.g0000/a0/rank-00000.safetensors", b"slow")
    age(tmp_path, 100_000)
    plan = plan_prune(backend, [KeepLast(1)], 3600)
    assert {d.path for d in plan.delete} == {step_folder(s, 0) for s in (10, 20, 40)}
    begin(backend, 1, step_folder(20, 0))  # meanwhile somebody rolled back to 20,
    publish(backend, commit(40))  # and the slow save committed
    done = carry_out(backend, plan, [KeepLast(1)], 3600)
    assert [d.path for d in done.delete] == [step_folder(10, 0)]
    assert resolve(tmp_path)[1].step == 20
    assert resolve(f"{tmp_path}@40")[1].step == 40
