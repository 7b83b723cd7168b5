"""Delta-guided weights: each leaf is weighed by how far each checkpoint has moved it from where fine-tuning began.

w_(i,l) = ||theta_i - theta_0||_l / sum_j ||theta_j - theta_0||_l, in the style of CoDiEmb; see `ckpt.merge.weights.delta`. These are the
only weights that need the tensors, so they are computed once, when the recipe is made, and kept in it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from ckpt.catalog import resolve
from ckpt.errors import MismatchError, UsageError
from ckpt.format.codec import BLOCK
from ckpt.format.fragment import whole
from ckpt.merge import weights as maths
from ckpt.merge.arithmetic import NotFinite, Room, squares
from ckpt.merge.recipe import Chosen, Recipe, recipe_of, url_of
from ckpt.merge.rules import Sources, match
from ckpt.merge.stream import Blend, Bytes, cores
from ckpt.merge.weights import Floats

__all__ = ["guided"]


def guided(
    chosen: Sequence[Chosen], start: str, *, moments: str = "", only: Sequence[str] = (), latest: Sequence[str] = ()
) -> Recipe:
    """A recipe that weighs the checkpoints `chosen` leaf by leaf, by their distance from what the ref `start` names.

    Reads them and the start once, past the page cache where they are not in it: 128 MiB of windows, and 4 MiB of scratch for each.
    Distances are L2, in float64, over the whole leaf: the sums of each 256 KiB of it, added up in order, so they are the same for every
    layout and any number of threads. A leaf that none has moved counts 1/n of each. The recipe's `said` tells the start, by URL and the
    checksum of its manifest; what the recipe comes to does not need it any more.

    The moments of optimizers have no weights of their own, and do not get their parameters': "latest" or "reset".

    Raises UsageError (moments averaged), NotFoundError, MismatchError (leaves that do not fit, or that the start does not have; numbers
    that are not finite), IntegrityError or FormatError (a damaged checkpoint, or start).
    """
    if not start:
        raise UsageError("weights 'delta:': name the ref where fine-tuning began, as in delta:RUN@0")
    backend, commit = resolve(start)
    backend.close()
    origin = Chosen(url_of(backend), commit)
    n = len(chosen)
    begun = recipe_of([origin], [1.0], "start").base
    said = {"start": {"ref": begun.ref, "step": begun.step, "manifest": begun.manifest}}
    method = f"delta:{begun.ref}"
    plan = recipe_of(chosen, maths.uniform(n), method, moments=moments, only=only, latest=latest, said=said)
    plan = replace(plan, weights_of={})  # refuses, before anything is read, what goes with no weights of leaves
    opened = replace(plan, moments="latest", weights_of=None, terms=(replace(begun, weight=0.0), *plan.terms))
    with Blend(opened, once=True) as blend:
        sources = _match(opened, blend)
        own = {blend.manifest.tensors[t].name: maths.delta(d) for t, d in _distances(blend, sources).items()}
    mean = np.mean(list(own.values()), axis=0) if own else maths.uniform(n)
    terms = tuple(replace(t, weight=w) for t, w in zip(plan.terms, mean.tolist(), strict=True))
    return replace(plan, terms=terms, weights_of={name: tuple(w.tolist()) for name, w in own.items()})


def _match(opened: Recipe, blend: Blend) -> Sources:
    """Where each leaf that is averaged is: in the start, then in each checkpoint. The start may hold more than that."""
    begun, *terms = opened.terms
    found = match(replace(opened, terms=tuple(terms)), blend.manifests[1:])
    try:
        ends = replace(opened, terms=(begun, replace(opened.base, weight=1.0)))
        first = match(ends, [blend.manifests[0], blend.manifest], list(found))
    except MismatchError as e:
        raise MismatchError(f"the start of the deltas is {begun.ref}, step {begun.step}: {e}") from None
    return {t: (first[t][0], *others) for t, others in found.items()}


def _distances(blend: Blend, sources: Sources) -> dict[int, Floats]:
    """L2 distances (checkpoints,) from the start, of each leaf."""
    mine = threading.local()
    boxes = [(t, whole(blend.manifest.tensors[t].shape)) for t in sources]
    sums = {t: np.zeros(len(blend.recipe.terms) - 1) for t in sources}

    def measured(piece: tuple[int, list[Bytes]]) -> list[float]:
        if not hasattr(mine, "room"):
            mine.room = Room()
        t, (start, *blocks) = piece
        try:
            return squares(blocks, start, blend.manifest.tensors[t].dtype, mine.room)
        except NotFinite as e:
            raise _not_finite(blend, t, e) from None

    with np.errstate(over="ignore"), ThreadPoolExecutor(cores(), thread_name_prefix="ckpt-measure") as hands:
        for windows in zip(*blend.streams(boxes, sources), strict=True):
            pieces = [
                (boxes[parts[0].index][0], [p.data[lo : lo + BLOCK] for p in parts])
                for parts in zip(*windows, strict=True)
                for lo in range(0, len(parts[0].data), BLOCK)
            ]
            # A window begins at a multiple of 256 KiB of a leaf, and the answers come in order: always the same sums.
            for (t, _), some in zip(pieces, hands.map(measured, pieces), strict=True):
                sums[t] += some
    for t, total in sums.items():
        if not np.isfinite(total).all():
            raise _not_finite(blend, t, NotFinite(()))
    return {t: np.sqrt(total) for t, total in sums.items()}


def _not_finite(blend: Blend, tensor: int, e: NotFinite) -> MismatchError:
    terms = blend.recipe.terms
    where = [terms[0] if k == len(terms) - 1 else terms[1 + k] for k in e.inputs]
    refs = ", ".join(t.ref for t in where)
    what = f"holds infinities or NaN in {refs}" if refs else "is too far from the start for float64"
    key = blend.manifest.tensors[tensor].key
    return MismatchError(f"tensor {key!r} {what}; leave such steps out, or take it from the last one (latest)")
