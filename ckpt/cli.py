"""The shell: verbs only, each calls one function of the library. Imports nothing heavy before a verb needs it."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import click

from ckpt import __version__
from ckpt.errors import CkptError, NotFoundError, UsageError, to_wire

__all__ = ["cli", "main"]

_EXIT = {
    "integrity": 1,
    "format": 1,
    "usage": 2,
    "mismatch": 2,
    "layout": 2,
    "unsafe": 2,
    "not-found": 3,
    "conflict": 4,
    "storage": 5,
    "deadline": 5,
    "peer": 5,
}
_HELP = """Checkpoints of distributed PyTorch training: look, check, compare, convert, tidy up.

A RUN is a folder or URL. A REF is a run (its latest step), run@latest, run@best, run@best:METRIC, run@1000, or the
URL of one step. `ckpt VERB --help` tells more about each verb; with --json every verb prints one JSON document.

\b
Exit codes:
  0    fine
  1    a finding: verify found damage, diff found a difference, or what was named is damaged
  2    the call is wrong, the parts do not fit, or pickle would be needed and was not allowed
  3    no such run, step, tensor or metric
  4    the name is taken
  5    storage failed, or another process failed or gave no answer; a retry may help
  70   a bug in ckpt
  130  interrupted

`reshard` divides its work over the processes that torchrun or mpiexec start; of any other verb the first one does all.

\b
Completion of verbs and options in the shell:
  bash  eval "$(_CKPT_COMPLETE=bash_source ckpt)"
  zsh   eval "$(_CKPT_COMPLETE=zsh_source ckpt)"
  fish  _CKPT_COMPLETE=fish_source ckpt | source
"""
_Verb = TypeVar("_Verb", bound=Callable[..., Any])


def first_process() -> bool:
    """Whether this process is the only one or rank 0 of those that torchrun or mpiexec started."""
    names = (("WORLD_SIZE", "RANK"), ("PMI_SIZE", "PMI_RANK"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"))
    return all(int(os.environ.get(size) or 1) <= 1 or int(os.environ.get(rank) or 0) == 0 for size, rank in names)


class Shell(click.Group):
    """A group of verbs with this shell's errors and exit codes. A verb returns its exit code, None for 0."""

    together = frozenset({"reshard"})

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *_: Any, **extra: Any) -> NoReturn:  # type: ignore[override]
        given = list(sys.argv[1:] if args is None else args)
        extra["standalone_mode"] = False
        try:
            code = super().main(given, prog_name or "ckpt", **extra)
            sys.stdout.flush()
        except BaseException as e:
            code = _failed(e, "--json" in given)
        sys.exit(code or 0)

    def invoke(self, ctx: click.Context) -> Any:
        alone = ctx._protected_args[:1] and ctx._protected_args[0] not in self.together
        return 0 if alone and not first_process() else super().invoke(ctx)


def _failed(e: BaseException, as_json: bool) -> int:
    """Says what went wrong, in one sentence, and gives the exit code."""
    if isinstance(e, SystemExit):
        return e.code if isinstance(e.code, int) else 1
    if isinstance(e, (KeyboardInterrupt, click.Abort)):
        click.echo("interrupted", err=True)
        return 130
    if isinstance(e, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more on its way out
        return 0
    if isinstance(e, click.ClickException):
        if as_json:
            _tell("usage", e.format_message())
        else:
            e.show()
        return 2
    if isinstance(e, (CkptError, OSError)):
        kind, message = to_wire(e)
        if first_process() or kind in ("deadline", "peer"):
            if as_json:
                _tell(kind, message)
            else:
                click.echo(f"{click.style('error:', fg='red')} {message}", err=True)
        return _EXIT.get(kind, 5)
    traceback.print_exception(e)
    if as_json:
        _tell("bug", f"{type(e).__name__}: {e}")
    return 70


def _tell(kind: str, message: str) -> None:
    from ckpt.show import emit

    emit({"error": {"kind": kind, "message": message}})


@click.group(cls=Shell, help=_HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="ckpt")
def cli() -> None:
    pass


def main() -> NoReturn:
    """The console script `ckpt`."""
    cli.main()


def as_json(verb: _Verb) -> _Verb:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")(verb)
