"""One file per framework. Import the one you need: `from ckpt.adapters import dcp`, or `ckpt.adapters.dcp`."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name == "dcp":
        return import_module("ckpt.adapters.dcp")
    raise AttributeError(f"module 'ckpt.adapters' has no attribute {name!r}")
