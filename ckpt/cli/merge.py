"""Verbs that make better weights out of many: average, search."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from ckpt.cli.change import processes
from ckpt.cli.shell import first_process, run_backend, verb
from ckpt.cli.show import columns, count, emit, plain, progress, size
from ckpt.errors import UsageError

if TYPE_CHECKING:
    from ckpt.collective import Group
    from ckpt.merge.recipe import Recipe
    from ckpt.merge.watch import Round

__all__ = ["average", "search"]

_NICE = 15
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
    delta:START                  each leaf by how far it moved from the ref START
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
    """Says what a recipe would come to; opens its checkpoints, and reads no tensor (to make one of delta-guided weights does)."""
    from ckpt.merge.stream import Blend

    with Blend(recipe) as blend:
        found, specs = blend.match(), blend.manifest.tensors
        averaged = [specs[t] for t in found]
        copied = [s for t, s in enumerate(specs) if t not in found]
    if as_json:
        leaves = {"averaged": [s.key for s in averaged], "copied": [s.key for s in copied]}
        emit({"dry_run": True, "recipe": plain(recipe), **leaves})
        return 0
    rows = [[str(t.step), f"{t.weight:.6f}", t.ref] for t in recipe.terms]
    click.echo(columns(("STEP", "WEIGHT", "CHECKPOINT"), rows, ">>"))
    if recipe.weights_of is not None:
        click.echo(
            f"each leaf has weights of its own; these are their means over {count(len(recipe.weights_of), 'tensor')}"
        )
    for word, some in (("averaged", averaged), ("copied from the last", copied)):
        click.echo(f"{word}: {count(len(some), 'tensor')}, {size(sum(s.nbytes for s in some))}")
    return 0


@verb("search", together=True)
@click.argument("refs", nargs=-1, required=True, metavar="RUN...")
@click.option("--objective", required=True, metavar="MODULE:FUNCTION", help="Scores a state dict; lower is better.")
@click.option("--held-out", metavar="MODULE:FUNCTION", help="The same on other data: reported, never chosen by.")
@click.option("--method", type=click.Choice(["ladder", "lcsc", "cma"]), default="lcsc", show_default=True)
@click.option("--budget", type=click.IntRange(min=1), default=200, show_default=True, help="Evaluations, at most.")
@click.option("--to", "dst", metavar="DST", help="The run that gets the best combination.")
@click.option("--watch", is_flag=True, help="Follow a run, and publish its best combination as RUN@lcsc.")
@click.option(
    "--until-idle", type=click.FloatRange(min=0), metavar="MINUTES", help="End a watch when no step came for so long."
)
@click.option("--last", type=click.IntRange(min=1), metavar="N", help="Only the newest N steps of a run; a watch: 16.")
@click.option("--steps", metavar="LIST", help="Only these steps of a run: 100,200 or 100:500, both included.")
@click.option(
    "--moments", type=click.Choice(["latest", "reset"]), help="State of optimizers: of the last step, or left out."
)
@click.option("--only", multiple=True, metavar="GLOB", help="Combine only these leaves; the rest is the last step's.")
@click.option("--latest", multiple=True, metavar="GLOB", help="Take these leaves from the last step.")
@click.option(
    "--population", type=click.IntRange(min=4), default=16, show_default=True, help="Candidates of a generation."
)
@click.option("--clip", type=float, default=4.0, show_default=True, help="Bound of the coefficients.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--together", is_flag=True, help="All processes score each combination together: FUNCTION is collective.")
@click.option("--journal", metavar="FILE", help="Keeps the scores; a search that was cut short goes on from it.")
@click.option("--scratch", metavar="DIR", help="Holds the candidates of a generation; the system's temporary folder.")
@click.option("--step", type=click.IntRange(min=0), help="The step's number in DST; that of the last step by default.")
def search(
    refs: tuple[str, ...],
    objective: str,
    held_out: str | None,
    method: str,
    budget: int,
    dst: str | None,
    watch: bool,
    until_idle: float | None,
    last: int | None,
    steps: str | None,
    moments: str | None,
    only: tuple[str, ...],
    latest: tuple[str, ...],
    population: int,
    clip: float,
    seed: int,
    together: bool,
    journal: str | None,
    scratch: str | None,
    step: int | None,
    as_json: bool,
) -> int:
    """Search for the combination of checkpoints that scores best.

    Tries what is cheap first: each checkpoint alone, means of the last k, decay curves, EMAs, a greedy soup. Then goes on
    from the best of them with evolution (lcsc) or CMA-ES (cma) over all affine combinations, negative ones too. FUNCTION
    gets a mapping from names to tensors (`state.under("model")` is what model.load_state_dict takes) and returns a number.

    With --watch it does so beside a job, at low priority: again whenever there is a newer step, until interrupted or, with
    --until-idle, until none came for so long. The best is published in the folder `lcsc` of RUN, where neither `latest` nor
    retention see it; the ref RUN@lcsc names it.

    The processes that torchrun or mpiexec start share the candidates of a generation; the result is the same for any number.
    """
    from ckpt.merge import watch as room
    from ckpt.merge.search import Sought, conduct, objective_of, prepare

    sought = Sought(
        objective_of(objective), objective_of(held_out) if held_out else None, method, budget, population, clip, seed,
        together,
    )  # fmt: skip
    with processes() as group:
        with _counted(budget, show=group.rank == 0 and not as_json and not watch and sys.stderr.isatty()) as tell:
            if watch:
                if dst or steps or step is not None or len(refs) != 1:
                    raise UsageError(
                        "--watch follows one RUN, and publishes as RUN@lcsc: without --to, --steps, --step"
                    )
                with _rounds(group, as_json=as_json) as told:
                    room.watch(
                        refs[0], sought, last=last or 16, moments=moments or "", only=only, latest=latest, journal=journal,
                        scratch=scratch, idle=None if until_idle is None else 60 * until_idle, group=group, told=told,
                    )  # fmt: skip
                return 0
            if until_idle is not None:
                raise UsageError("--until-idle goes with --watch")
            if dst:
                run_backend(dst).close()  # before anything is spent on a name that cannot be written to
            whole = prepare(
                refs, group, last=last, steps=steps, moments=moments or "", only=only, latest=latest
            )  # fmt: skip
            found = conduct(whole, sought, group=group, journal=journal, scratch=scratch, progress=tell)
        from ckpt.merge.write import materialise

        metrics = found.best.metrics
        written = materialise(found.recipe, dst, group=group, step=step, metrics=metrics) if dst else None
        if group.rank:
            return 0
    if as_json:
        emit({**plain(found), "written": plain(written)})
        return 0
    rows = [[t.name, f"{t.score:.6g}", "" if t.held_out is None else f"{t.held_out:.6g}"] for t in found.trials]
    click.echo(columns(("COMBINATION", "SEARCH", "HELD OUT"), rows, "<>>"))
    click.echo(
        f"{count(found.evaluations, 'evaluation')}; best: {found.best.name}" + (f"; {written.ref}" if written else "")
    )
    if not held_out:
        click.echo("no --held-out: the best score is better than it would be on other data")
    return 0


@contextmanager
def _rounds(group: Group, *, as_json: bool) -> Iterator[Callable[[Round], None]]:
    """At low priority; gives what to call with each round of a watch, which says what came out of it."""
    os.nice(max(0, _NICE - os.nice(0)))
    done: list[Round] = []

    def tell(found: Round) -> None:
        done.append(found)
        if not as_json:
            best = found.report.best
            other = "" if best.held_out is None else f", held out {best.held_out:.6g}"
            place = found.published or "what is published is as good"
            click.echo(f"steps {found.steps[0]} to {found.steps[-1]}: {best.name} {best.score:.6g}{other}; {place}")

    yield tell
    if as_json and group.rank == 0:
        emit({"rounds": [plain(r) for r in done]})


@contextmanager
def _counted(total: int, *, show: bool) -> Iterator[Callable[[int], None] | None]:
    """A count of evaluations on standard error; gives what to call with each number of them done."""
    if not show:
        yield None
        return
    done = 0

    def tell(n: int) -> None:
        nonlocal done
        done += n
        click.echo(f"\r{done} of {total} evaluations", nl=False, err=True)

    yield tell
    click.echo("\r" + " " * 40 + "\r", nl=False, err=True)
