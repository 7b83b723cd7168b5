"""The command line: `ckpt VERB ...`. Verbs only; each calls one function of the library and shows its report.

Importing this imports neither torch nor numpy: what a verb needs, it imports itself.
"""

from __future__ import annotations

import click

from ckpt import __version__
from ckpt.cli.change import export, import_, prune, reshard
from ckpt.cli.copy import cp
from ckpt.cli.details import inspect
from ckpt.cli.keepers import keepers
from ckpt.cli.look import diff, ls, verify
from ckpt.cli.merge import average, search
from ckpt.cli.report import report
from ckpt.cli.run import run
from ckpt.cli.shell import Shell

__all__ = ["cli", "main"]

_HELP = """Checkpoints of distributed PyTorch training: list, check, compare, convert and tidy them.

A RUN is a folder or URL. A REF is a run (its latest step), run@latest, run@best, run@best:METRIC, run@1000,
run@lcsc (what a search beside the run published), or the URL of one step. `ckpt VERB --help` tells more about each verb; with --json every verb prints one JSON document.

\b
Exit codes:
  0    fine
  1    a finding: verify found damage, diff found a difference, or what was named is damaged
  2    the call is wrong, the parts do not fit, or pickle would be needed and was not allowed
  3    no such run, step, tensor or metric
  4    the name is taken
  5    storage failed, or another process failed or did not answer; a retry may help
  70   a bug in ckpt
  130  interrupted

Started by torchrun or mpiexec, `reshard`, `average` and `search` divide their work over the processes; any other verb
runs in the first one.

\b
Completion of verbs and options by the shell:
  bash  eval "$(_CKPT_COMPLETE=bash_source ckpt)"
  zsh   eval "$(_CKPT_COMPLETE=zsh_source ckpt)"
  fish  _CKPT_COMPLETE=fish_source ckpt | source
"""


@click.group(cls=Shell, help=_HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 116})
@click.version_option(__version__, prog_name="ckpt")
def cli() -> None:
    pass


for _verb in (ls, inspect, verify, diff, report, run, reshard, average, search, export, import_, cp, prune, keepers):
    cli.add_command(_verb)


def main() -> None:
    """The console script `ckpt`; ends the process."""
    cli.main()
