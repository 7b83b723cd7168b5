"""Verbs that look at checkpoints as a whole: ls, verify, diff. None of them needs torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from ckpt.cli.shell import EXIT_CODES, run_backend, verb
from ckpt.cli.show import age, columns, count, emit, plain, progress, seconds_since, shorten, size

if TYPE_CHECKING:
    from ckpt.backends import Backend
    from ckpt.catalog import Step
    from ckpt.checkpoint import Verification
    from ckpt.commit import Commit
    from ckpt.offline.diff import Diff, TensorDiff

__all__ = ["diff", "ls", "verify"]

_FINDING = 1


@verb("ls")
@click.argument("run")
@click.option("--all", "everything", is_flag=True, help="Also uncommitted leftovers, and steps a rollback left behind.")
def ls(run: str, everything: bool, as_json: bool) -> int:
    """List the steps of a run.

    Age, stored bytes, world size, metrics; whether it is committed, and which one is the latest.
    """
    from ckpt.catalog import lineage, list_run
    from ckpt.errors import NotFoundError

    backend = run_backend(run)
    listing = list_run(backend)
    if not listing.steps and not listing.generations:
        raise NotFoundError(f"{listing.run}: no checkpoints here; name the folder that holds the step-... folders")
    present = lineage(listing, damaged=True)
    latest = next((s.folder for s in present if s.commit is not None), "")
    ours = {s.folder for s in present}
    rows = [_row(s, s.folder in ours, s.folder == latest) for s in listing.steps]
    hidden = [r for r in rows if not everything and (r["abandoned"] or r["state"] == "leftover")]
    shown = [r for r in rows if not any(r is h for h in hidden)]
    if everything:
        _measure_leftovers(shown, backend)
    if as_json:
        generations = plain(listing.generations)
        emit(
            {
                "run": listing.run,
                "latest": latest or None,
                "generations": generations,
                "steps": shown,
                "hidden": len(hidden),
            }
        )
        return 0
    if shown:
        head = ("STEP", "GEN", "AGE", "BYTES", "WORLD", "TENSORS", "METRICS", "STATE")
        click.echo(columns(head, [_cells(r) for r in shown], ">>>>>>"))
    committed = [r for r in rows if r["state"] == "committed"]
    text = f"{len(committed)} committed, {size(sum(r['bytes'] for r in committed))}"
    damaged = sum(r["state"] == "damaged" for r in rows)
    text += f"; {damaged} damaged" if damaged else ""
    text += f"; {len(hidden)} not shown (leftovers, or left behind by a rollback): --all" if hidden else ""
    click.echo(text)
    return 0


def _row(s: Step, present: bool, latest: bool) -> dict[str, Any]:
    state = "committed" if s.commit else "damaged" if s.error else "leftover"
    row: dict[str, Any] = {"step": s.step, "generation": s.generation, "folder": s.folder, "state": state}
    row |= {"latest": latest, "abandoned": not present and state != "leftover", "error": s.error}
    c = s.commit
    row |= {"time": c.time if c else None, "age_seconds": seconds_since(c.time) if c else None}
    row |= {"bytes": c.bytes if c else None, "world": c.world if c else None, "tensors": c.tensors if c else None}
    return row | {"metrics": dict(c.metrics) if c else {}}


def _measure_leftovers(rows: Sequence[dict[str, Any]], backend: Backend) -> None:
    """Leftovers have no commit to tell their size and age: their files do."""
    import time

    from ckpt.offline.prune import measure

    for row in rows:
        if row["state"] != "committed":
            row["bytes"], newest = measure(backend, row["folder"])
            row["age_seconds"] = max(0.0, time.time() - newest) if newest else None


def _cells(r: dict[str, Any]) -> list[str]:
    state = str(r["state"])
    if r["error"]:
        state = click.style(f"damaged: {r['error']}", fg="red")
    state += ", left behind" if r["abandoned"] else ""
    state = click.style(f"{state}, latest", fg="green") if r["latest"] else state
    numbers = ["" if r[k] is None else str(r[k]) for k in ("world", "tensors")]
    metrics = " ".join(f"{k}={v:.6g}" for k, v in r["metrics"].items())
    seconds = "" if r["age_seconds"] is None else age(r["age_seconds"])
    nbytes = "" if r["bytes"] is None else size(r["bytes"])
    return [str(r["step"]), str(r["generation"]), seconds, nbytes, *numbers, shorten(metrics, 80), state]


@verb("verify")
@click.argument("ref")
@click.option("--all", "everything", is_flag=True, help="Every step of a RUN, not just the one that REF names.")
def verify(ref: str, everything: bool, as_json: bool) -> int:
    """Read every byte and name what is broken."""
    from ckpt.catalog import list_run, resolve
    from ckpt.checkpoint import Verification
    from ckpt.errors import NotFoundError

    found: list[Verification] = []
    if everything:
        backend = run_backend(ref)
        listing = list_run(backend)
        found += [
            Verification(f"{listing.run}/gen-{g.generation:04d}.json", 0, 0, (f"integrity: {g.error}",))
            for g in listing.generations
            if g.error
        ]
        found += [_damaged(backend, s) for s in listing.steps if s.error]
        commits = [s.commit for s in listing.steps if s.commit is not None]
        if not found and not commits:
            raise NotFoundError(f"{listing.run}: no committed checkpoint here")
    else:
        backend, commit = resolve(ref)
        commits = [commit]
    with progress("verifying", sum(c.bytes for c in commits), show=not as_json) as tell:
        found += [_verified(backend, c, tell) for c in commits]
    if as_json:
        emit({"ok": all(v.ok for v in found), "checkpoints": [{"ok": v.ok, **plain(v)} for v in found]})
    for v in found if not as_json else ():
        if v.ok:
            click.echo(f"{click.style('ok', fg='green')}       {v.ref}  {size(v.bytes)} in {count(v.blocks, 'block')}")
        else:
            click.echo(f"{click.style('damaged', fg='red')}  {v.ref}")
            click.echo("\n".join(f"         {p}" for p in v.problems))
    kinds = {p.partition(":")[0] for v in found for p in v.problems}
    if kinds and kinds <= {"storage", "deadline"}:
        return EXIT_CODES["storage"]  # nothing was found to be wrong: it could not be read
    return _FINDING if kinds else 0


def _damaged(backend: Backend, step: Step) -> Verification:
    """What is wrong with a step whose commit could not be read."""
    from ckpt.checkpoint import Verification
    from ckpt.commit import read_commit
    from ckpt.errors import CkptError

    kind = "storage"  # if it can be read after all
    try:
        read_commit(backend, step.folder)
    except CkptError as e:
        kind = e.kind
    return Verification(f"{backend.root}/{step.folder}", 0, 0, (f"{kind}: {step.error}",))


def _verified(backend: Backend, commit: Commit, tell: Callable[[int], None] | None) -> Verification:
    from ckpt.checkpoint import Checkpoint, Verification
    from ckpt.errors import CkptError

    try:
        return Checkpoint(backend, commit).verify(tell)
    except CkptError as e:
        return Verification(f"{backend.root}/{commit.folder}", 0, 0, (f"{e.kind}: {e}",))


@verb("diff")
@click.argument("a")
@click.argument("b")
@click.option("--only", multiple=True, metavar="GLOB", help="Only tensors and objects of these names.")
@click.option("--rtol", type=float, help="Relative difference, of the larger one, that still counts as close.")
@click.option("--atol", type=float, help="Absolute difference that still counts as close.")
def diff(a: str, b: str, only: tuple[str, ...], rtol: float | None, atol: float | None, as_json: bool) -> int:
    """Compare two checkpoints tensor by tensor.

    A and B are refs; how they are cut into fragments does not matter. Identical means bit for bit, also for NaNs.
    Values and metrics are compared too.
    """
    from ckpt.checkpoint import open_checkpoint
    from ckpt.offline.diff import diff as compare

    with open_checkpoint(a) as left, open_checkpoint(b) as right:
        total = None if only else left.manifest.nbytes
        with progress("comparing", total, show=not as_json) as tell:
            result = compare(left, right, only=only, rtol=rtol, atol=atol, progress=tell)
    if as_json:
        emit({"same": result.same, "counts": _counts(result), **plain(result)})
    else:
        _show_diff(result)
    return 0 if result.same else _FINDING


def _counts(d: Diff) -> dict[str, int]:
    out: dict[str, int] = {}
    for t in d.tensors:
        out[t.status] = out.get(t.status, 0) + 1
    return out


def _show_diff(d: Diff) -> None:
    click.echo(f"A  {d.a}\nB  {d.b}")
    tensors = [_difference(t) for t in d.tensors if t.status != "identical"]
    if tensors:
        head = ("TENSOR", "STATUS", "MAX ABS", "MAX REL", "ELEMENTS", "AT", "")
        click.echo("\n" + columns(head, tensors, "<<>>>"))
    values = [
        [v.kind, v.name, v.status, shorten(v.a, 40), shorten(v.b, 40)] for v in d.values if v.status != "identical"
    ]
    if values:
        click.echo("\n" + columns(("KIND", "NAME", "STATUS", "A", "B"), values))
    same = sum(v.status == "identical" for v in d.values)
    said = [f"{n} {status}" for status, n in sorted(_counts(d).items())]
    click.echo(
        ("\n" if tensors or values else "")
        + f"tensors: {', '.join(said) or 'none'}; values: {same} identical, {len(values)} not"
    )


def _difference(t: TensorDiff) -> list[str]:
    numbers = ["" if x is None else f"{x:.6g}" for x in (t.max_abs, t.max_rel)]
    note = t.a if t.a == t.b or not t.b else t.b if not t.a else f"{t.a} against {t.b}"
    note += f", {t.nonfinite} not finite" if t.nonfinite else ""
    return [
        t.name,
        t.status,
        *numbers,
        str(t.elements) if t.elements else "",
        str(list(t.at)) if t.at is not None else "",
        note,
    ]
