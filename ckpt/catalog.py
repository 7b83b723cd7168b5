"""What a run holds: listing, refs, what may be deleted. Imports no torch: `ckpt ls` must be quick.

A ref is a run (its latest step), `run@latest`, `run@best` (or `run@best:metric`), `run@1000`, or one step's URL;
`run@lcsc` is the latest step of the run in its folder `lcsc`, which no listing of the run itself shows.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from ckpt.backends import Backend, backend_for
from ckpt.backends.base import TEMPORARY
from ckpt.commit import Commit, Generation, read_commit, read_generation
from ckpt.errors import CkptError, FormatError, IntegrityError, NotFoundError, UsageError

__all__ = [
    "COMBINED",
    "Listing",
    "Ref",
    "Step",
    "best",
    "delete_step",
    "delete_tree",
    "drop_attempt",
    "generations_in_use",
    "higher_is_better",
    "leftovers",
    "lineage",
    "list_run",
    "parse_ref",
    "resolve",
    "with_ledger",
    "write_ledger",
]

COMBINED = "lcsc"
"""The folder of a run that holds the run of its combinations: what `ckpt search --watch` publishes."""

_STEP = re.compile(r"step-([0-9]{8,18})\.g([0-9]{4,9})")
_GENERATION = re.compile(r"gen-([0-9]{4,9})\.json")


@dataclass(frozen=True)
class Ref:
    """A parsed ref: the run's URL and which step of it ("latest", "best[:metric]", a number, or a step folder)."""

    run: str
    which: str


@dataclass(frozen=True)
class Step:
    """A step folder of a run: committed (`commit`), damaged (`error`), or a leftover (neither)."""

    step: int
    generation: int
    folder: str
    commit: Commit | None
    error: str = ""


@dataclass(frozen=True)
class Listing:
    """A run: its generations and its step folders, by generation then step."""

    run: str
    generations: tuple[Generation, ...]
    steps: tuple[Step, ...]

    @property
    def committed(self) -> tuple[Step, ...]:
        return tuple(s for s in self.steps if s.commit is not None)


def parse_ref(ref: str | os.PathLike[str]) -> Ref:
    """Splits a ref. Raises UsageError for an unknown word after "@"."""
    text = os.fspath(ref).rstrip("/")
    head, at, which = text.rpartition("@")
    if at and which == COMBINED:
        return Ref(f"{head}/{COMBINED}", "latest")
    if at and ("/" not in which or which.startswith("best:")):
        if not (which in ("latest", "best") or which.startswith("best:") or which.isdecimal()):
            raise UsageError(f"ref {text!r}: after '@' say latest, best, best:METRIC, lcsc or a step number")
        return Ref(head, which)
    folder = text.rpartition("/")[2]
    if _STEP.fullmatch(folder):
        above = text[: -len(folder)]
        return Ref(above.rstrip("/") or above or ".", folder)
    return Ref(text, "latest")


def list_run(backend: Backend, *, commits: bool = True) -> Listing:
    """Everything in a run. With `commits=False` no commit is read, and every folder counts as a leftover."""
    generations, steps = [], []
    for entry in backend.list(""):
        found = _GENERATION.fullmatch(entry.name)
        if found and not entry.folder:
            try:
                generations.append(read_generation(backend, int(found[1])))
            except (IntegrityError, FormatError, NotFoundError) as e:
                generations.append(Generation(int(found[1]), None, "", 0, str(e)))
        found = _STEP.fullmatch(entry.name)
        if found and entry.folder:
            steps.append(_step(backend, int(found[1]), int(found[2]), entry.name, commits))
    steps.sort(key=lambda s: (s.generation, s.step))
    return Listing(backend.root, tuple(sorted(generations, key=lambda g: g.generation)), tuple(steps))


def _step(backend: Backend, step: int, generation: int, folder: str, commits: bool) -> Step:
    try:
        return Step(step, generation, folder, read_commit(backend, folder) if commits else None)
    except NotFoundError:
        return Step(step, generation, folder, None)
    except CkptError as e:
        return Step(step, generation, folder, None, str(e))


def lineage(listing: Listing, *, damaged: bool = False) -> list[Step]:
    """The committed steps that lead to the present, newest first; with `damaged`, those whose commit cannot be read
    stand in their places among them.

    The newest generation's steps, then its parent step and what came before that in the parent's generation, and
    so on. Steps that a rollback left behind are not in it. Where the file of a generation is damaged or gone, all
    of the generation before it counts as its past.
    """
    known = {g.generation: g for g in listing.generations}
    steps = [s for s in listing.steps if s.commit is not None or s.error]
    numbers = {*known, *(s.generation for s in steps)}
    generation = max(numbers, default=None)
    out: list[Step] = []
    bound: int | None = None
    while generation is not None:
        here = [s for s in steps if s.generation == generation and (bound is None or s.step <= bound)]
        out += sorted(here, key=lambda s: -s.step)
        at = known.get(generation)
        if at is None or at.error:
            bound, generation = None, max((n for n in numbers if n < generation), default=None)
            continue
        found = _STEP.fullmatch(at.parent) if at.parent else None
        if found is None or int(found[2]) >= generation:
            break
        bound, generation = int(found[1]), int(found[2])
    return out if damaged else [s for s in out if s.commit is not None]


def resolve(ref: str | os.PathLike[str]) -> tuple[Backend, Commit]:
    """The backend and commit that a ref names. Raises NotFoundError, saying what is there instead; IntegrityError
    or FormatError if the commit that it names is damaged: an older one is never taken in its place."""
    parsed = parse_ref(ref)
    backend = backend_for(parsed.run)
    found = _STEP.fullmatch(parsed.which)
    if found:
        return backend, read_commit(backend, parsed.which)
    listing = list_run(backend)
    candidates = lineage(listing, damaged=True)
    if parsed.which.isdecimal():
        step = int(parsed.which)
        others = [s for s in reversed(listing.steps) if s.commit is not None or s.error]
        candidates = [s for s in [*candidates, *others] if s.step == step]
    elif parsed.which.startswith("best"):
        candidates = [s for s in candidates if s.commit is not None]
        found_steps = lineage(with_ledger(backend, listing))
        candidates = [best(found_steps, parsed.which.partition(":")[2])] if found_steps else []
    if not candidates:
        raise NotFoundError(_nothing(parsed, listing))
    return backend, candidates[0].commit or read_commit(backend, candidates[0].folder)


def _nothing(ref: Ref, listing: Listing) -> str:
    steps = [s.step for s in listing.committed]
    broken = [s for s in listing.steps if s.error]
    text = f"{listing.run}: no committed checkpoint" + (f" of step {ref.which}" if ref.which.isdecimal() else "")
    if steps:
        text += f"; committed steps are {', '.join(map(str, steps[-5:]))}" + (" (the last 5)" if len(steps) > 5 else "")
    if broken:
        text += f"; {len(broken)} damaged: {broken[-1].error}"
    return text


def best(steps: Sequence[Step], metric: str = "") -> Step:
    """The step with the lowest value of a metric ("val_loss", else "loss", if none is named); for names that end in
    "acc", "accuracy", "score" or "reward", the highest. Raises NotFoundError if no step has it."""
    for name in [metric] if metric else ["val_loss", "loss"]:
        having = [(s.commit.metrics[name], s) for s in steps if s.commit is not None and name in s.commit.metrics]
        having = [(v, s) for v, s in having if v == v]
        if having:
            sign = -1 if higher_is_better(name) else 1
            return min(having, key=lambda pair: (sign * pair[0], -pair[1].step))[1]
    raise NotFoundError(f"no committed step has the metric {metric or 'val_loss or loss'!r}; pass metrics= when saving")


def higher_is_better(metric: str) -> bool:
    return metric.endswith(("acc", "accuracy", "score", "reward"))


def delete_step(backend: Backend, folder: str) -> None:
    """Removes a step: its commit first, so that no reader takes what is going for whole."""
    backend.delete(f"{folder}/commit.json")
    delete_tree(backend, folder)


def delete_tree(backend: Backend, path: str) -> None:
    """Removes an object, or a folder with all that is below it."""
    entries = backend.list(path)
    for entry in entries:
        if entry.folder:
            delete_tree(backend, f"{path}/{entry.name}")
        else:
            backend.delete(f"{path}/{entry.name}")
    if not entries:
        backend.delete(path)


def drop_attempt(backend: Backend, folder: str, attempt: str, *, whole: bool) -> None:
    """Removes what a failed attempt left, as far as possible; never raises. Without `whole`, its claim stays: a writer
    that may still be at work must not meet another one under the same name."""
    at = f"{folder}/{attempt}"
    with suppress(Exception):
        for entry in backend.list(at):
            if entry.name != "attempt.json":
                delete_tree(backend, f"{at}/{entry.name}")
        if whole:
            delete_tree(backend, at)


def leftovers(backend: Backend, listing: Listing, min_age: float) -> list[str]:
    """Paths that no committed checkpoint needs and whose newest file is older than `min_age` seconds, for
    `delete_tree`: folders of uncommitted steps, attempts of committed steps that lost, temporary files."""
    root = backend.list("")
    found = [("", e) for e in root if not e.folder and e.name.startswith(TEMPORARY)]
    steps = {s.folder: s for s in listing.steps if not s.error}
    for e in root:
        step = steps.get(e.name)
        if step is not None and step.commit is None:
            found.append(("", e))
        elif step is not None and step.commit is not None:
            inside = backend.list(e.name)
            found += [(f"{e.name}/", x) for x in inside if x.folder and x.name != step.commit.attempt]
            found += [(f"{e.name}/", x) for x in inside if x.name.startswith(TEMPORARY)]
            own = f"{e.name}/{step.commit.attempt}"
            found += [(f"{own}/", x) for x in backend.list(own) if x.name.startswith(TEMPORARY)]
    for rows in ("ledger", "events"):
        found += [(f"{rows}/", x) for x in backend.list(rows) if x.name.startswith(TEMPORARY)]
    before = time.time() - min_age
    return [at + e.name for at, e in found if max(e.modified, _newest(backend, at + e.name)) <= before]


def _newest(backend: Backend, path: str) -> float:
    times = [0.0]
    for e in backend.list(path):
        times.append(e.modified)
        if e.folder:
            times.append(_newest(backend, f"{path}/{e.name}"))
    return max(times)


def generations_in_use(listing: Listing) -> list[int]:
    """The generation numbers in use."""
    return [*(g.generation for g in listing.generations), *(s.generation for s in listing.steps)]


_LEDGER = re.compile(r"g(\d{4,9})-.*\.jsonl", re.ASCII)
_MAX_LEDGER = 64 << 20


def with_ledger(backend: Backend, listing: Listing) -> Listing:
    """The listing, its commits knowing also the metrics that came late: those of the ledger, the newest last.

    A ledger object that cannot be read is passed over: metrics are advice, not state.
    """
    late: dict[tuple[int, int], dict[str, float]] = {}
    for entry in backend.list("ledger"):
        found = _LEDGER.fullmatch(entry.name)
        if not found:
            continue
        with suppress(CkptError, ValueError, TypeError, KeyError):
            for line in backend.fetch(f"ledger/{entry.name}", _MAX_LEDGER).splitlines():
                row = json.loads(line)
                metrics = {str(k): float(v) for k, v in row.items() if k != "step"}
                late.setdefault((int(found[1]), int(row["step"])), {}).update(metrics)
    steps = []
    for s in listing.steps:
        more = late.get((s.generation, s.step))
        if s.commit is not None and more:
            s = replace(s, commit=replace(s.commit, metrics={**s.commit.metrics, **more}))
        steps.append(s)
    return replace(listing, steps=tuple(steps))


def write_ledger(backend: Backend, name: str, rows: Sequence[Mapping[str, object]]) -> None:
    """One immutable object of the ledger: JSON lines."""
    data = "".join(json.dumps(row, separators=(",", ":"), ensure_ascii=False) + "\n" for row in rows)
    backend.create(f"ledger/{name}.jsonl", data.encode())
