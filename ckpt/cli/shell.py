"""What all verbs of the command line share: errors as sentences, exit codes, --json, one process of many."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from ckpt.errors import CkptError, to_wire

if TYPE_CHECKING:
    from ckpt.backends import Backend

__all__ = ["EXIT_CODES", "Shell", "first_process", "run_backend", "under_torchrun", "verb"]

EXIT_CODES = {
    "integrity": 1,
    "format": 1,
    "version": 1,
    "usage": 2,
    "mismatch": 2,
    "layout": 2,
    "unsafe": 2,
    "not-found": 3,
    "conflict": 4,
    "storage": 5,
    "capacity": 5,
    "deadline": 5,
    "peer": 5,
}
"""Kind of an error -> exit code; see the help text in cli.py."""

_BUG, _INTERRUPTED = 70, 130
_MPI = (("PMI_SIZE", "PMI_RANK"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"))


def under_torchrun() -> bool:
    """Whether torchrun started this process as one of several. WORLD_SIZE alone does not say so: cluster schedulers
    set it for everything that runs in a container."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1 and {"RANK", "LOCAL_RANK"} <= set(os.environ)


def first_process() -> bool:
    """Whether this process is the only one, or rank 0 of those that torchrun or mpiexec started."""
    if under_torchrun() and os.environ["RANK"] != "0":
        return False
    return all(int(os.environ.get(size) or 1) < 2 or int(os.environ.get(rank) or 0) == 0 for size, rank in _MPI)


def verb(name: str, *, together: bool = False) -> Callable[[Callable[..., int | None]], click.Command]:
    """Makes a verb of a function that returns its exit code (None: 0), with `as_json` among its arguments.

    Of several processes only the first one runs it, unless they act `together`.
    """

    def wrap(function: Callable[..., int | None]) -> click.Command:
        @functools.wraps(function)
        def run(*args: Any, **given: Any) -> int:
            if not together and not first_process():
                return 0
            try:
                return function(*args, **given) or 0
            except BrokenPipeError:  # as in `ckpt ls RUN | head`; Python would complain again on its way out
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 0

        return click.command(name)(
            click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")(run)
        )

    return wrap


def run_backend(run: str) -> Backend:
    """Where a run is. Raises UsageError for a ref that names one step of it."""
    from ckpt.backends import backend_for
    from ckpt.catalog import parse_ref
    from ckpt.errors import UsageError

    if parse_ref(run).run != run.rstrip("/"):
        raise UsageError(f"{run!r} names one step; this takes a run, the folder or URL that holds its steps")
    return backend_for(run)


class Shell(click.Group):
    """A group of verbs that ends with their exit codes, and says what went wrong in one sentence."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *_: Any, **extra: Any) -> Any:
        """Runs a verb; does not return."""
        given = list(sys.argv[1:] if args is None else args)
        try:
            code = super().main(given, prog_name or "ckpt", **{**extra, "standalone_mode": False})
            sys.stdout.flush()
        except (Exception, KeyboardInterrupt) as e:
            code = _failed(e, "--json" in given)
        sys.exit(code or 0)


def _failed(e: BaseException, as_json: bool) -> int:
    """Says what went wrong and gives the exit code. Of several processes only the first speaks, unless it cannot."""
    if isinstance(e, (KeyboardInterrupt, click.Abort)):
        click.echo("interrupted", err=True)
        return _INTERRUPTED
    if isinstance(e, click.ClickException):
        kind, message, code = "usage", e.format_message(), EXIT_CODES["usage"]
    elif isinstance(e, (CkptError, OSError)):
        kind, message = to_wire(e)
        code = EXIT_CODES.get(kind, EXIT_CODES["storage"])
    else:
        kind, message, code = "bug", f"{type(e).__name__}: {e}", _BUG
        traceback.print_exception(e)
    if not first_process() and kind not in ("deadline", "peer"):
        return code
    if as_json:
        from ckpt.cli.show import emit

        emit({"error": {"kind": kind, "message": message}})
    elif isinstance(e, click.ClickException):
        e.show()
    elif kind != "bug":
        click.echo(f"{click.style('error:', fg='red')} {message}", err=True)
    return code
