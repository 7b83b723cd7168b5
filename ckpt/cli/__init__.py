"""The command line; see main.py."""

from ckpt.cli.main import cli, main

__all__ = ["cli", "main"]
