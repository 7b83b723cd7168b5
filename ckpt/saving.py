"""One collective save: state -> leaves -> plan -> packs -> commit.

Two rounds: in the first every rank says what it holds and is told what to write; in the second every rank says
what it wrote and the leader commits. Whatever fails on any rank fails the save on all, with the same error, and
then nothing is published.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ckpt.backends import Backend
from ckpt.collective import Group, decode, encode
from ckpt.commit import step_folder
from ckpt.config import Settings, settings, undisturbed
from ckpt.errors import LayoutError
from ckpt.format.codec import BLOCK, Codec, choose_codec, crc32c
from ckpt.format.fragment import Box
from ckpt.format.pack import PackLayout, Piece, TensorSpec, layout_pack
from ckpt.leading import Leader, Memory
from ckpt.plan import PLAIN, Claim, Claims
from ckpt.shards import Held
from ckpt.source import TensorSource, source_of
from ckpt.state import Leaves, TensorLeaf, collect
from ckpt.write import PackReport, Ring, Source, encode_report, write_pack

__all__ = [
    "Agreed",
    "Assignment",
    "Planner",
    "Request",
    "SaveReport",
    "Work",
    "agree",
    "agree_on_plan",
    "commit",
    "content_digest",
    "prepare",
    "ring",
    "save_state",
    "sources_of",
]


@dataclass(frozen=True)
class SaveReport:
    """What a save did. `bytes`: stored by all ranks; `bytes_here`: by this one. Seconds are this rank's.

    `per_rank`: leaves that differ between the ranks without having been declared so, and were stored for each.
    """

    ref: str
    step: int
    generation: int
    bytes: int
    bytes_here: int
    seconds: float
    seconds_plan: float
    seconds_write: float
    per_rank: tuple[str, ...]


@dataclass
class Planner:
    """What a rank keeps from save to save: what it said, what it was told, and the work made ready from that.

    A plan is reused only if names, dtypes, shapes and placements are the same on every rank, and if the same
    tensors turn out to be copies of one another.
    """

    sent: str = ""
    digests: frozenset[str] = frozenset()
    assignment: Assignment | None = None
    work: Work | None = None
    memory: Memory = field(default_factory=Memory)  # used on the leader


_rings: dict[tuple[int, int, int, int], Ring] = {}


def ring(config: Settings) -> Ring:
    """The process's ring: reserved once, whoever saves. A fork has none of its parent's threads, and needs its own."""
    key = (os.getpid(), config.buffer_mib, config.buffers, config.writers)
    if key not in _rings:
        _rings[key] = Ring(config)
    return _rings[key]


@dataclass(frozen=True)
class Assignment:
    """What this rank writes: `local` indices of its claims with boxes, and the variants of those stored per rank."""

    key: str
    local: npt.NDArray[np.int64]
    box: npt.NDArray[np.int64]
    variants: Mapping[str, str]


@dataclass(frozen=True)
class Work:
    """An assignment made ready: pieces, their layout, and where each is: (claim, piece of it, box within that)."""

    key: str
    codecs: tuple[tuple[str, Codec], ...]
    pieces: tuple[Piece, ...]
    layout: PackLayout
    places: tuple[tuple[int, int, Box], ...]


@dataclass(frozen=True)
class Request:
    """What is to be saved where. `failure` is what this rank has to say instead of a state: it then fails on all."""

    backend: Backend
    step: int
    generation: int
    metrics: Mapping[str, float]
    codecs: tuple[tuple[str, Codec], ...] = ()
    failure: Exception | None = None

    @property
    def folder(self) -> str:
        return step_folder(self.step, self.generation)


@undisturbed()
def save_state(request: Request, state: Any, group: Group, planner: Planner) -> SaveReport:
    """Saves one step; collective over `group`. Returns after the commit, on every rank.

    Raises on every rank, with nothing published: UsageError or LayoutError for a state that cannot be saved,
    ConflictError if the step exists, StorageError, DeadlineError or PeerError for what failed on the way.
    """
    agreed = agree(request, state, group, planner)
    report: PackReport | None = None
    payload: bytes | Exception
    try:
        work = prepare(planner, agreed.assignment, agreed.leaves, request.codecs)
        if work.pieces:
            sources = sources_of(agreed.leaves, work)
            report = write_pack(
                request.backend, agreed.path(group.rank), work.pieces, sources, ring(settings()), work.layout
            )
        payload = encode_report(report)
    except Exception as e:
        payload = e
    return commit(agreed, group, payload, report)


@dataclass(frozen=True)
class Agreed:
    """A save that all ranks agreed on: what this rank has (`leaves`, in the order of its claims) and what to write.

    Ends in `commit`, on every rank, whatever happens in between.
    """

    lead: Leader
    leaves: Sequence[TensorLeaf]
    assignment: Assignment
    attempt: str
    per_rank: tuple[str, ...]
    began: float
    planned: float

    def path(self, rank: int) -> str:
        return f"{self.lead.folder}/{self.attempt}/rank-{rank:05d}.safetensors"


def agree(request: Request, state: Any, group: Group, planner: Planner) -> Agreed:
    """The first half of a save; see `save_state`."""
    began, r = time.monotonic(), request
    lead = Leader(r.backend, r.folder, r.step, r.generation, group.world, r.metrics, r.codecs, planner.memory)
    try:
        found = request.failure or collected(state)
        leaves, assignment, told = agree_on_plan(f"plan {r.folder}", lead.plan, found, group, planner)
    except BaseException as e:
        lead.clean_up(group.rank, e)
        raise
    return Agreed(lead, leaves, assignment, told["attempt"], tuple(told["per_rank"]), began, time.monotonic())


def commit(agreed: Agreed, group: Group, payload: bytes | Exception, report: PackReport | None) -> SaveReport:
    """The second half: `payload` is this rank's encoded report, or what kept it from having one."""
    lead, written = agreed.lead, time.monotonic()
    try:
        total, _ = decode(group.round(f"commit {lead.folder}", payload, lead.commit))
    except BaseException as e:
        lead.clean_up(group.rank, e)
        raise
    return SaveReport(
        ref=f"{lead.backend.root}/{lead.folder}",
        step=lead.step,
        generation=lead.generation,
        bytes=total,
        bytes_here=report.size if report else 0,
        seconds=time.monotonic() - agreed.began,
        seconds_plan=agreed.planned - agreed.began,
        seconds_write=written - agreed.planned,
        per_rank=agreed.per_rank,
    )


def collected(state: Any) -> Leaves | Exception:
    """The leaves of a state, or why there are none: an error of one rank is for all to hear."""
    try:
        return collect(state)
    except Exception as e:
        return e


def sources_of(leaves: Sequence[TensorLeaf], work: Work) -> list[Source]:
    """The bytes of the pieces that this rank writes, where they are in its state."""
    return [source_of(leaves[i].held.pieces[k][1], box) for i, k, box in work.places]


def agree_on_plan(
    name: str,
    decide: Callable[[list[bytes]], Sequence[bytes]],
    leaves: Leaves | Exception,
    group: Group,
    planner: Planner,
    digest: Callable[[str, Held], int] = lambda _, held: content_digest(held),
) -> tuple[list[TensorLeaf], Assignment, dict[str, Any]]:
    """The first round, again while the leader needs more: claims it does not have, digests it cannot do without.

    `leaves`: this rank's, or what kept it from having any. Returns the tensors in the order of the claims, what this
    rank is to write of them, and what else the leader told.
    """
    again = {"claims": False}
    claims: Claims | None = None
    names = [] if isinstance(leaves, Exception) else sorted(leaves.tensors)
    while True:
        payload: bytes | Exception
        try:
            if isinstance(leaves, Exception):
                raise leaves
            claims = _claims(leaves, names, planner.digests, group.world, digest)
            full = again["claims"] or claims.fingerprint != planner.sent
            payload = _encode_claims(claims, leaves, full, planner.assignment.key if planner.assignment else "")
        except Exception as e:
            payload = e
        head, arrays = decode(group.round(name, payload, decide))
        if "digests" in head:
            planner.digests = planner.digests | set(head["digests"])
            continue
        if "claims" in head:
            again["claims"] = True
            continue
        break
    assert claims is not None and not isinstance(leaves, Exception)
    planner.sent = claims.fingerprint
    if "local" in arrays:
        planner.assignment = Assignment(head["key"], arrays["local"], arrays["box"], head["variants"])
    if planner.assignment is None or planner.assignment.key != head["key"]:
        raise LayoutError("this rank lost the plan it was given before; save again")  # cannot happen: see Leader.plan
    return [leaves.tensors[n] for n in names], planner.assignment, head


def _claims(
    leaves: Leaves, names: Sequence[str], digests: frozenset[str], world: int, digest: Callable[[str, Held], int]
) -> Claims:
    out = []
    for name in names:
        held = leaves.tensors[name].held
        spec = TensorSpec(name, held.dtype, held.shape, "", held.layout)
        content = world > 1 and (held.kind == PLAIN or name in digests)
        out.append(
            Claim(
                spec,
                tuple(b for b, _ in held.pieces),
                held.kind,
                held.scope,
                held.replica,
                digest(name, held) if content else 0,
            )
        )
    return Claims.of(out)


def content_digest(held: Held) -> int:
    """64 bits that tell contents apart: over the CRC32C of every block, as they would be stored."""
    h = hashlib.blake2b(digest_size=8)
    scratch = np.empty(BLOCK, dtype=np.uint8)
    for _, view in held.pieces:
        source = TensorSource(view)
        for start in range(0, source.nbytes, BLOCK):
            n = min(BLOCK, source.nbytes - start)
            if source.flat is not None:
                block = source.flat[start : start + n]
            else:
                block = scratch[:n]
                source.into(start, block)
            h.update(crc32c(block).to_bytes(4, "little"))
    return int.from_bytes(h.digest(), "little") | 1


def _encode_claims(claims: Claims, leaves: Leaves, full: bool, plan: str) -> bytes:
    """`plan`: the key of the assignment that this rank has, which need not be sent again."""
    objects = [[o.name, o.policy, o.encoding, o.text] for o in leaves.objects.values()]
    head = {"fingerprint": claims.fingerprint, "objects": objects, "aliases": leaves.aliases, "plan": plan}
    arrays: dict[str, npt.NDArray[Any]] = {"digest": claims.digest}
    if full:
        head["head"] = claims.head
        arrays |= {"tensor": claims.tensor, "box": claims.box}
    return encode(head, **arrays)


def prepare(
    planner: Planner, assignment: Assignment, leaves: Sequence[TensorLeaf], codecs: Sequence[tuple[str, Codec]]
) -> Work:
    """The assigned fragments and their layout; those of the last save if nothing changed."""
    work = planner.work
    if work is not None and (work.key, work.codecs) == (assignment.key, tuple(codecs)):
        return work
    pieces, places = [], []
    for i, row in zip(assignment.local.tolist(), assignment.box.tolist(), strict=True):
        name, h = leaves[i].name, leaves[i].held
        box = Box(tuple(row[0][: len(h.shape)]), tuple(row[1][: len(h.shape)]))
        k, at = next((k, b) for k, (b, _) in enumerate(h.pieces) if (b & box) == box)
        spec = TensorSpec(name, h.dtype, h.shape, assignment.variants.get(str(i), ""), h.layout)
        pieces.append(Piece(spec, box, choose_codec(name, codecs)))
        places.append((i, k, box.relative_to(at)))
    planner.work = Work(assignment.key, tuple(codecs), tuple(pieces), layout_pack(pieces), tuple(places))
    return planner.work
