"""What becomes of each leaf when checkpoints are combined: pure functions of their manifests.

floating point and complex       averaged, buffers as well as parameters, trained or frozen, LoRA's factors each by itself
integers, booleans               the base's
float8, float4                   refused: their scales live elsewhere; named in `latest=` they are the base's
stored per rank                  the base's: they belong to a rank, not to the model
values (objects)                 the base's
several names of one tensor      averaged once; all checkpoints have to agree on who is tied to whom
state of optimizers              as the recipe says; single numbers, as Adam's step, are never averaged
running averages                 left out: what they remember is not that of a combination
other names, shapes or types     refused, all at once
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ckpt.errors import MismatchError, UsageError
from ckpt.format.manifest import Manifest
from ckpt.format.pack import TensorSpec
from ckpt.merge.arithmetic import AVERAGED
from ckpt.merge.average import AVERAGES
from ckpt.merge.average import NOTES as RUNNING
from ckpt.merge.recipe import Recipe, Term
from ckpt.offline.dcp_tree import optimizer_keys

__all__ = ["NOTES", "Sources", "base_of", "match"]

NOTES = "__ckpt__."
"""Objects of tools, which speak of the checkpoint they are in."""

_SHOWN = 20


Sources = Mapping[int, tuple[int, ...]]
"""For every leaf that is averaged: its index in the base -> its index in each term's manifest, the base's own last."""


def base_of(recipe: Recipe, manifest: Manifest) -> Manifest:
    """The base's manifest as far as the result has a part in it: without notes, and without the state of optimizers if
    it is to be reset (their groups stay)."""
    keys = _optimizers(manifest) if recipe.moments == "reset" else []
    running = _running(manifest)
    keep = np.array([not _state_of(t.name, keys) and not _below(t.name, running) for t in manifest.tensors], dtype=bool)
    objects = [o for o in manifest.objects if not o.name.startswith(NOTES) and not _state_of(o.name, keys)]
    kept = _only(manifest, keep) if not keep.all() else manifest
    return replace(kept, objects=tuple(objects))


def _only(m: Manifest, keep: npt.NDArray[np.bool_]) -> Manifest:
    """A manifest of some of the tensors, in order, in the same packs."""
    rows = np.repeat(keep, np.diff(m.start))
    boxes = np.repeat(keep, np.diff(m.box_start))
    start = np.concatenate(([0], np.cumsum(np.diff(m.start)[keep]))).astype(np.int64)
    tensors = tuple(t for t, k in zip(m.tensors, keep.tolist(), strict=True) if k)
    names = {t.name for t in tensors}
    return replace(
        m,
        tensors=tensors,
        start=start,
        pack=m.pack[rows],
        offset=m.offset[rows],
        length=m.length[rows],
        block=m.block[rows],
        box=m.box[boxes],
        codec=None if m.codec is None else m.codec[rows],
        aliases={a: b for a, b in m.aliases.items() if b in names},
    )


def match(recipe: Recipe, manifests: Sequence[Manifest], wanted: Sequence[int] | None = None) -> Sources:
    """Finds those of the leaves `wanted` of the base (all by default) that are to be averaged, in every checkpoint.

    `manifests`: of each term, that of the base as `base_of` gives it. Raises MismatchError with everything that does not
    fit, UsageError where the recipe leaves open what becomes of optimizers.
    """
    base = manifests[-1]
    everything = wanted is None
    indices = range(len(base.tensors)) if wanted is None else sorted(set(wanted))
    keys = _optimizers(base)
    _check_moments(recipe, [base.tensors[t] for t in indices], keys)
    problems: dict[str, list[str]] = {}
    sources: dict[int, tuple[int, ...]] = {}
    for t in indices:
        spec = base.tensors[t]
        if not _averaged(recipe, spec, keys, problems):
            continue
        if recipe.weights_of is not None and spec.name not in recipe.weights_of:
            problems.setdefault("without weights in the recipe", []).append(spec.name)
        found = [_find(term, m, spec, problems) for term, m in zip(recipe.terms[:-1], manifests[:-1], strict=True)]
        if all(n is not None for n in found):
            sources[t] = (*(n for n in found if n is not None), t)
    _check_ties(recipe, manifests, {base.tensors[t].name for t in sources}, problems)
    if everything:
        for term, m in zip(recipe.terms[:-1], manifests[:-1], strict=True):
            for name in _extra(recipe, term, m, base, keys):
                problems.setdefault(f"in step {term.step} but not in step {recipe.base.step}", []).append(name)
    if problems:
        raise MismatchError(
            f"the checkpoints of recipe {recipe.method!r} do not fit; nothing was read. {_told(problems)}. "
            "Choose others (steps), or take these leaves from the last one (latest)"
        )
    return sources


def _check_moments(recipe: Recipe, specs: Sequence[TensorSpec], keys: Sequence[str]) -> None:
    if not recipe.moments and any(_state_of(s.name, keys) for s in specs):
        raise UsageError(
            f"the checkpoints hold the state of {', '.join(map(repr, keys))}; say what becomes of it: moments latest (of the "
            "last step), averaged, or reset (left out)"
        )


def _averaged(recipe: Recipe, spec: TensorSpec, keys: Sequence[str], problems: dict[str, list[str]]) -> bool:
    if spec.variant or _named(spec.name, recipe.latest) or (recipe.only and not _named(spec.name, recipe.only)):
        return False
    if _state_of(spec.name, keys) and (recipe.moments != "averaged" or not spec.shape):
        return False
    if spec.dtype in AVERAGED:
        return True
    if spec.dtype.startswith("float"):
        problems.setdefault(f"of type {spec.dtype}, which cannot be averaged", []).append(spec.name)
    return False


def _find(term: Term, m: Manifest, spec: TensorSpec, problems: dict[str, list[str]]) -> int | None:
    """The same leaf in another checkpoint."""
    name = _name_in(term, spec.name)
    index = m.by_key.get(name, m.by_key.get(m.aliases.get(name, name)))
    if index is None:
        problems.setdefault(f"missing from step {term.step}", []).append(name)
        return None
    there = m.tensors[index]
    if (there.shape, there.dtype) != (spec.shape, spec.dtype):
        text = f"{name} ({there.dtype} {list(there.shape)}, in the last {spec.dtype} {list(spec.shape)})"
        problems.setdefault(f"of another shape or type in step {term.step}", []).append(text)
        return None
    m.check_coverage(index)
    return index


def _name_in(term: Term, name: str) -> str:
    for here, there in term.instead:
        if name == here or name.startswith(f"{here}."):
            return there + name[len(here) :]
    return name


def _check_ties(recipe: Recipe, manifests: Sequence[Manifest], names: set[str], problems: dict[str, list[str]]) -> None:
    """What is one tensor in the base has to be one in all."""
    for other, stored in manifests[-1].aliases.items():
        if stored not in names:
            continue
        for term, m in zip(recipe.terms[:-1], manifests[:-1], strict=True):
            a, b = (
                m.by_key.get(n, m.by_key.get(m.aliases.get(n, n)))
                for n in (_name_in(term, other), _name_in(term, stored))
            )
            if a is not None and b is not None and a != b:
                problems.setdefault(f"stored apart in step {term.step}, tied in the last", []).append(
                    f"{other} and {stored}"
                )


def _extra(recipe: Recipe, term: Term, m: Manifest, base: Manifest, keys: Sequence[str]) -> Iterator[str]:
    """Leaves of another checkpoint that would be averaged if the base had them."""
    if term.instead:
        return
    running = _running(m)
    here = {*(t.name for t in base.tensors), *base.aliases}
    for spec in m.tensors:
        ours = spec.name in here or any(a in here for a, b in m.aliases.items() if b == spec.name)
        if (
            not ours
            and not _below(spec.name, running)
            and not (recipe.moments != "averaged" and _state_of(spec.name, [*keys, *_optimizers(m)]))
            and _averaged(recipe, spec, keys, {})
        ):
            yield spec.name


def _running(manifest: Manifest) -> str:
    """What the leaves of running averages begin with; "" if there are none."""
    return f"{AVERAGES}." if any(o.name == RUNNING for o in manifest.objects) else ""


def _below(name: str, prefix: str) -> bool:
    return bool(prefix) and name.startswith(prefix)


def _optimizers(manifest: Manifest) -> list[str]:
    return optimizer_keys([o.name for o in manifest.objects])


def _state_of(name: str, keys: Sequence[str]) -> bool:
    """Whether a leaf is state of one of the optimizers `keys`."""
    return any(name.startswith(f"{key}.state.") for key in keys)


def _named(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, p) or name.startswith(p + ".") for p in patterns)


def _told(problems: dict[str, list[str]]) -> str:
    out = []
    for kind, names in problems.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        out.append(f"{kind} ({len(names)}): {', '.join(names[:_SHOWN])}{more}")
    return "; ".join(out)
