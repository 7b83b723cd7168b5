"""Verbs that write or delete: reshard, export, import, prune."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from ckpt.cli.shell import first_process, run_backend, under_torchrun, verb
from ckpt.cli.show import columns, count, duration, emit, plain, progress, size, size_of
from ckpt.errors import UsageError

if TYPE_CHECKING:
    from ckpt.collective import Group
    from ckpt.offline.prune import Doomed, Pruning
    from ckpt.offline.recut import TpRule
    from ckpt.retention import Policy

__all__ = ["export", "import_", "processes", "prune", "reshard"]


@verb("reshard", together=True)
@click.argument("src")
@click.argument("dst")
@click.option("--ranks", type=click.IntRange(min=1), required=True, help="How many ranks DST is for: a pack for each.")
@click.option("--tp", type=click.IntRange(min=1), default=1, show_default=True, help="Of them, tensor-parallel ranks.")
@click.option("--tp-rule", "rules", multiple=True, metavar="GLOB=DIM", help="Cut these tensors over them along DIM.")
@click.option("--step", type=click.IntRange(min=0), help="The step's number in DST; as in SRC by default.")
@click.option("--dry-run", is_flag=True, help="Only say what each rank would hold.")
def reshard(
    src: str, dst: str, ranks: int, tp: int, rules: tuple[str, ...], step: int | None, dry_run: bool, as_json: bool
) -> int:
    """Rewrite a checkpoint for another number of ranks.

    SRC is a ref, DST a run. Loading reshards anyway; this is for ranks that read their share in one piece, again and again. Rank d * M + t
    gets part t of M along each tensor's tensor-parallel axis, and of that part d along dimension 0. The axis is the
    one recorded with the tensor, else that of the first --tp-rule that matches, else there is none.

    Divides the work over the processes that start it, as in `torchrun --nproc-per-node 4 -m ckpt.cli reshard ...` or
    `mpiexec -n 4 ckpt reshard ...`; the result is the same for any number of them. (torchrun ends with 1 for any error.)
    """
    wanted = [_rule(text) for text in rules]
    if dry_run:
        return _plan_reshard(src, ranks, tp, wanted, as_json) if first_process() else 0
    from ckpt.catalog import resolve
    from ckpt.offline.reshard import reshard as rewrite

    with processes() as group:
        alone = group.rank == 0 and not as_json and sys.stderr.isatty()
        total = resolve(src)[1].bytes // group.world if alone else None
        with progress("resharding", total, show=alone) as tell:
            report = rewrite(src, dst, ranks=ranks, group=group, tp=tp, step=step, rules=wanted, progress=tell)
        if group.rank == 0:
            if as_json:
                emit(report)
            else:
                text = f"{report.ref}: {count(report.tensors, 'tensor')}, {size(report.bytes)} in {count(report.packs, 'pack')}"
                click.echo(f"{text} for {count(report.ranks, 'rank')}, {report.seconds:.1f} s")
    return 0


def _rule(text: str) -> TpRule:
    from ckpt.offline.recut import TpRule

    pattern, _, dim = text.rpartition("=")
    if not pattern or not dim.isdecimal():
        raise UsageError(f"--tp-rule {text!r}: write it as GLOB=DIM, for example '*.o_proj.weight=1'")
    return TpRule(pattern, int(dim))


def _plan_reshard(src: str, ranks: int, tp: int, rules: Sequence[TpRule], as_json: bool) -> int:
    from ckpt.checkpoint import open_checkpoint
    from ckpt.offline.recut import plan_ranks

    with open_checkpoint(src) as c:
        plan = plan_ranks(c.manifest, ranks, tp, rules)
        nbytes = plan.nbytes(ranks).tolist()
        rows = [
            {"rank": r, "fragments": plan.rows(r).stop - plan.rows(r).start, "bytes": nbytes[r]} for r in range(ranks)
        ]
        if as_json:
            emit({"source": c.ref, "dry_run": True, "ranks": rows})
        else:
            cells = [[str(r["rank"]), str(r["fragments"]), size(r["bytes"])] for r in rows]
            click.echo(columns(("RANK", "FRAGMENTS", "BYTES"), cells, ">>>"))
    return 0


@contextmanager
def processes() -> Iterator[Group]:
    """The processes that torchrun or mpiexec started as one group, or this one alone."""
    import torch.distributed as dist

    from ckpt.collective import current_group, linger

    begin = under_torchrun() and not dist.is_initialized()
    if begin:
        dist.init_process_group("gloo")
    try:
        try:
            yield current_group()
        finally:
            linger()  # rank 0 may hold what the others still have to read
    finally:
        if begin:
            dist.destroy_process_group()


@verb("export")
@click.argument("ref")
@click.argument("dst")
@click.option("--format", "kind", type=click.Choice(["safetensors", "zarr"]), default="safetensors", show_default=True)
@click.option("--key", help="Only what the state holds under this key, as in --key model; safetensors without the key.")
@click.option("--only", multiple=True, metavar="GLOB", help="Only tensors of these names (as in the checkpoint).")
@click.option("--max-shard-size", default="5GB", show_default=True, help="Of one safetensors file.")
@click.option("--dtype", help="Convert floating-point tensors, for example to bfloat16 (safetensors).")
def export(
    ref: str,
    dst: str,
    kind: str,
    key: str | None,
    only: tuple[str, ...],
    max_shard_size: str,
    dtype: str | None,
    as_json: bool,
) -> int:
    """Write tensors for other tools.

    safetensors: shards with a model.safetensors.index.json, as Hugging Face loads them. zarr: a native Zarr v3 group.
    """
    from ckpt.offline import export as out

    names = list(only) or ([key] if key else None)
    with progress("exporting", _total(ref), show=not as_json) as tell:
        if kind == "zarr":
            if dtype:
                raise UsageError("--dtype goes with --format safetensors; zarr keeps every tensor as it is")
            report = out.export_zarr(ref, dst, only=names, progress=tell)
        else:
            report = out.export_safetensors(
                ref,
                dst,
                only=names,
                prefix_strip=key,
                max_shard_bytes=size_of(max_shard_size),
                dtype=dtype,
                progress=tell,
            )
    if as_json:
        emit(report)
        return 0
    click.echo(
        f"{report.path}: {count(report.tensors, 'tensor')}, {size(report.bytes)} in {count(len(report.files), 'file')}, {report.seconds:.1f} s"
    )
    for left_out, kept in report.tied:
        click.echo(f"  {left_out} is {kept} and was left out")
    for name in report.per_rank:
        click.echo(f"  {name} differs between the ranks; that of the lowest was taken")
    return 0


def _total(ref: str) -> int | None:
    """Bytes of a checkpoint, for a bar that somebody watches."""
    if not sys.stderr.isatty():
        return None
    from ckpt.catalog import resolve

    return resolve(ref)[1].bytes


@verb("import")
@click.argument("src")
@click.argument("run")
@click.option("--step", type=click.IntRange(min=0), required=True, help="The step's number in RUN.")
@click.option("--allow-pickle", is_flag=True, help="Keep values that only pickle can hold. Only if you trust SRC.")
def import_(src: str, run: str, step: int, allow_pickle: bool, as_json: bool) -> int:
    """Copy a torch.distributed.checkpoint into a run.

    SRC is its directory. Its pickled index is read through an allow-list; no other code in it runs.
    """
    from ckpt.offline.importing import import_dcp

    with progress("importing", None, show=not as_json) as tell:
        report = import_dcp(src, run, step=step, allow_pickle=allow_pickle, progress=tell)
    if as_json:
        emit(report)
    else:
        text = f"{report.ref}: {count(report.tensors, 'tensor')}, {size(report.bytes)}, {count(report.objects, 'object')}, {report.seconds:.1f} s"
        click.echo(text + (f"; as pickles: {', '.join(report.pickled)}" if report.pickled else ""))
    return 0


@verb("prune")
@click.argument("run")
@click.option("--keep-last", type=click.IntRange(min=1), metavar="N", help="Keep the newest N steps.")
@click.option("--keep-every", type=click.IntRange(min=1), metavar="K", help="Keep every K-th step, by its number.")
@click.option("--keep-best", multiple=True, metavar="METRIC[:N]", help="Keep the N best by a metric (1).")
@click.option("--keep-within", metavar="AGE", help="Keep what was saved so long before the newest step: 36h, 7d.")
@click.option("--older-than", default="24h", show_default=True, metavar="AGE", help="Of leftovers: 30m, 24h, 7d.")
@click.option("--damaged", is_flag=True, help="Also delete steps whose commit is damaged, if they are that old.")
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
@click.option("--yes", is_flag=True, help="Delete without asking.")
def prune(
    run: str,
    keep_last: int | None,
    keep_every: int | None,
    keep_best: tuple[str, ...],
    keep_within: str | None,
    older_than: str,
    damaged: bool,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> int:
    """Delete old steps and what failed saves left.

    Deleted are the steps that no --keep option keeps, and leftovers of saves that never committed. Without a --keep option no committed step is deleted; with several, a step stays if any of them keeps it. The
    latest step always stays. Leftovers younger than --older-than may belong to a save that is under way, and stay.
    """
    from ckpt.offline.prune import carry_out, plan_prune

    policies, age = _policies(keep_last, keep_every, keep_best, keep_within), duration(older_than)
    backend = run_backend(run)
    plan = plan_prune(backend, policies, age, damaged=damaged)
    ask = bool(plan.delete) and not dry_run and not yes
    if not as_json:
        _show_plan(plan)
    refusal = "nothing was deleted; to delete what is listed above, say --yes"
    if ask and as_json:
        emit({"dry_run": True, "bytes": plan.bytes, **plain(plan), "error": {"kind": "usage", "message": refusal}})
        return 2
    if ask and not _somebody_there():
        raise UsageError(refusal)
    if ask and not click.confirm("Delete them?"):
        click.echo("nothing was deleted")
        return 2
    done = plan
    if plan.delete and not dry_run:
        with progress("deleting", plan.bytes, show=not as_json) as tell:
            done = carry_out(backend, plan, policies, age, progress=tell)
    if as_json:
        emit({"dry_run": dry_run, "bytes": done.bytes, **plain(done)})
    elif plan.delete and not dry_run:
        click.echo(f"deleted {len(done.delete)}, {size(done.bytes)}")
    return 0


def _somebody_there() -> bool:
    """Whether a question would be read by a person."""
    return sys.stdin.isatty()


def _policies(last: int | None, every: int | None, best: Sequence[str], within: str | None) -> list[Policy]:
    from ckpt.retention import KeepBest, KeepEvery, KeepLast, KeepWithin

    out: list[Policy] = []
    if last is not None:
        out.append(KeepLast(last))
    if every is not None:
        out.append(KeepEvery(every))
    if within is not None:
        out.append(KeepWithin(minutes=duration(within) / 60))
    for text in best:
        metric, colon, n = text.rpartition(":")
        out.append(KeepBest(metric, max(1, int(n))) if colon and n.isdecimal() else KeepBest(text))
    return out


def _show_plan(plan: Pruning) -> None:
    if not plan.delete:
        click.echo(f"{plan.run}: nothing to delete; {count(len(plan.keep), 'committed step')} to keep")
        return
    rows = [[d.path, _what(d), size(d.bytes)] for d in plan.delete]
    click.echo(columns(("DELETE", "WHAT", "BYTES"), rows, "<<>"))
    latest = f", among them the latest, {plan.latest}" if plan.latest else ""
    click.echo(
        f"{len(plan.delete)} to delete, {size(plan.bytes)}; {count(len(plan.keep), 'committed step')} to keep{latest}"
    )


def _what(d: Doomed) -> str:
    kinds = {"step": "a committed step", "damaged": "a damaged step", "leftover": "never committed"}
    return {**kinds, "upload": "an unfinished upload"}[d.kind]
