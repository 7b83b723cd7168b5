"""Verbs that make better weights out of many: average."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from ckpt.cli.change import processes
from ckpt.cli.shell import first_process, verb
from ckpt.cli.show import columns, count, emit, plain, progress, size
from ckpt.errors import UsageError

if TYPE_CHECKING:
    from ckpt.merge.recipe import Recipe

__all__ = ["average"]

_MOMENTS = click.Choice(["latest", "averaged", "reset"])


@verb("average", together=True)
@click.argument("refs", nargs=-1, required=True, metavar="RUN...")
@click.option("--to", "dst", metavar="DST", help="The run that gets the result; not with --dry-run.")
@click.option("--last", type=click.IntRange(min=1), metavar="N", help="Only the newest N steps of a run.")
@click.option("--steps", metavar="LIST", help="Only these steps of a run: 100,200 or 100:500, both included.")
@click.option("--weights", metavar="HOW", help="How much each counts; uniform by default. See above.")
@click.option("--posthoc-ema", "sigma", type=float, metavar="SIGMA", help="Power EMA of this relative width (EDM2).")
@click.option("--tracked", multiple=True, metavar="KEY=SIGMA", help="A power EMA that the checkpoints hold under KEY.")
@click.option("--key", default="model", show_default=True, help="What the --tracked ones are averages of.")
@click.option(
    "--every", type=click.IntRange(min=1), default=1, show_default=True, help="Steps from update to update of them."
)
@click.option("--moments", type=_MOMENTS, help="State of optimizers: of the last step, averaged, or left out.")
@click.option("--only", multiple=True, metavar="GLOB", help="Average only these leaves; the rest is the last step's.")
@click.option("--latest", multiple=True, metavar="GLOB", help="Take these leaves from the last step.")
@click.option("--step", type=click.IntRange(min=0), help="The step's number in DST; that of the last step by default.")
@click.option("--ranks", type=click.IntRange(min=1), help="How many ranks DST is for; as the last step by default.")
@click.option("--dry-run", is_flag=True, help="Only say what counts how much, and what becomes of the leaves.")
def average(
    refs: tuple[str, ...],
    dst: str | None,
    last: int | None,
    steps: str | None,
    weights: str | None,
    sigma: float | None,
    tracked: tuple[str, ...],
    key: str,
    every: int,
    moments: str | None,
    only: tuple[str, ...],
    latest: tuple[str, ...],
    step: int | None,
    ranks: int | None,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Average checkpoints into a new one.

    RUN is a run (all its steps, or those chosen) or a ref of one step; several are taken in order. What is not averaged (whole
    numbers, values, what is stored per rank) comes from the last. HOW is one of

    \b
    uniform                      SWA, LAWA, PMA
    wsm:CURVE                    as if the learning rate had fallen: linear, 1-sqrt, 1-square, cosine
    ema:RATE                     exponential, RATE a step, such as 0.999
    power:Q, edm:SIGMA           1 - x^Q decay; EDM2's power EMA over the steps there are
    mwa:METRIC,PENALTY[,FORM]    by a metric or `step`; power, exp or range
    runs, interpolate:AMOUNT     mean of the runs' means; from the first to the last
    0.2,0.3,1/2                  these

    --posthoc-ema without --tracked is edm:SIGMA. With it, averages of other widths that were saved are recombined.
    Divides the work over the processes that torchrun or mpiexec start; the result is the same for any number of them.
    """
    build = _recipe(refs, last, steps, weights, sigma, tracked, key, every, moments or "", only, latest)
    if dry_run:
        return _show(build(), as_json) if first_process() else 0
    if not dst:
        raise UsageError("say where the result goes: --to DST, or --dry-run")
    from ckpt.merge.recipe import Recipe
    from ckpt.merge.write import materialise

    with processes() as group:
        recipe = Recipe.from_json(group.round("recipe", b"", lambda _: build().to_json().encode()).decode())
        alone = group.rank == 0 and not as_json and sys.stderr.isatty()
        total = _total(recipe) // group.world if alone else None
        with progress("averaging", total, show=alone) as tell:
            report = materialise(recipe, dst, group=group, step=step, ranks=ranks, progress=tell)
        if group.rank == 0 and as_json:
            emit({**plain(report), "recipe": plain(recipe)})
        elif group.rank == 0:
            text = f"{report.ref}: {report.method} of {count(report.terms, 'checkpoint')}, {report.averaged} leaves averaged"
            click.echo(f"{text}, {report.copied} copied, {size(report.bytes)}, {report.seconds:.1f} s")
    return 0


def _recipe(
    refs: Sequence[str],
    last: int | None,
    steps: str | None,
    weights: str | None,
    sigma: float | None,
    tracked: Sequence[str],
    key: str,
    every: int,
    moments: str,
    only: Sequence[str],
    latest: Sequence[str],
) -> Callable[[], Recipe]:
    """What makes the recipe that is asked for. Raises UsageError for options that contradict one another."""
    from ckpt.merge import recipe as make

    if sigma is not None and weights is not None:
        raise UsageError("--posthoc-ema is a kind of --weights; name one of them")
    if tracked and (sigma is None or only or latest):
        raise UsageError("--tracked goes with --posthoc-ema SIGMA, and without --only and --latest")
    if tracked:
        widths = dict(_width(text) for text in tracked)
        return lambda: make.posthoc(
            refs, sigma or 0.0, widths, key=key, every=every, last=last, steps=steps, moments=moments
        )
    how = weights or ("uniform" if sigma is None else f"edm:{sigma!r}")
    return lambda: make.average(refs, weights=how, last=last, steps=steps, moments=moments, only=only, latest=latest)


def _width(text: str) -> tuple[str, float]:
    key, _, sigma = text.rpartition("=")
    try:
        return key, float(sigma)
    except ValueError:
        raise UsageError(f"--tracked {text!r}: write it as KEY=SIGMA, for example ema5=0.05") from None


def _total(recipe: Recipe) -> int:
    """Bytes of the result, for a bar."""
    from ckpt.catalog import resolve

    backend, commit = resolve(recipe.base.ref)
    backend.close()
    return commit.bytes


def _show(recipe: Recipe, as_json: bool) -> int:
    """Says what a recipe would come to; opens its checkpoints, and reads no tensor."""
    from ckpt.merge.stream import Blend

    with Blend(recipe) as blend:
        found, specs = blend.match(), blend.manifest.tensors
        averaged = [specs[t] for t in found.sources]
        copied = [s for t, s in enumerate(specs) if t not in found.sources]
    if as_json:
        leaves = {"averaged": [s.key for s in averaged], "copied": [s.key for s in copied]}
        emit({"dry_run": True, "recipe": plain(recipe), **leaves})
        return 0
    rows = [[str(t.step), f"{t.weight:.6f}", t.ref] for t in recipe.terms]
    click.echo(columns(("STEP", "WEIGHT", "CHECKPOINT"), rows, ">>"))
    for word, some in (("averaged", averaged), ("copied from the last", copied)):
        click.echo(f"{word}: {count(len(some), 'tensor')}, {size(sum(s.nbytes for s in some))}")
    return 0
