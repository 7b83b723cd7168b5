"""The verb that stands above a job: run."""

from __future__ import annotations

import click

from ckpt.cli.show import emit, plain

__all__ = ["run"]


@click.command("run", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document when the job has ended.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(command: tuple[str, ...], as_json: bool) -> int:
    """Run a training job, and stay until its snapshots are safe: ckpt run -- torchrun train.py ...

    For containers and batch systems, which take down all processes of a job when its first one ends: this one passes
    signals on, and ends only when the keepers of its job have written the newest step to storage. Ends with the exit
    code of the job.
    """
    from ckpt.keeper.parent import run_job

    ended = run_job(command)
    if as_json:
        emit(plain(ended))
    elif ended.keepers:
        click.echo(f"ckpt run: waited {ended.seconds:.1f} s for the keeper of the job to write what it held", err=True)
    return ended.code
