"""What a caller may ask of a load, and which leaves a pattern names."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["LoadOptions", "matches"]


@dataclass(frozen=True)
class LoadOptions:
    """How to load.

    only             names or globs of the leaves to load; the rest of the state is left alone
    rename           {prefix in the checkpoint: prefix in the state}
    allow_missing    names or globs of leaves that may be absent from the checkpoint (they keep their values)
    allow_unexpected names or globs of stored leaves that the state need not have
    cast             convert tensors whose dtype differs (else that is an error)
    allow_pickle     read objects that were stored with pickle
    exchange         read each byte that is needed once a job, not once a rank: the ranks pass it on (not of a recipe)
    """

    only: Sequence[str] | None = None
    rename: Mapping[str, str] = field(default_factory=dict)
    allow_missing: Sequence[str] = ()
    allow_unexpected: Sequence[str] = ()
    cast: bool = False
    allow_pickle: bool = False
    exchange: bool = False

    def wants(self, name: str) -> bool:
        return self.only is None or matches(name, self.only)

    def stored_name(self, name: str) -> str:
        for stored, here in self.rename.items():
            if name == here or name.startswith(here.rstrip(".") + "."):
                return stored.rstrip(".") + name[len(here.rstrip(".")) :]
        return name


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a leaf is named by one of the patterns: a glob, a name, or the name of something above it."""
    return any(fnmatch.fnmatchcase(name, p) or name.startswith(p + ".") for p in patterns)
