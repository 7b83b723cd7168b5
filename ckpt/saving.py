"""One collective save: state -> leaves -> plan -> packs -> commit.

Two rounds: in the first every rank says what it holds and is told what to write; in the second every rank says
what it wrote and the leader commits. Whatever fails on any rank fails the save on all, with the same error, and
then nothing is published.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ckpt.backends import Backend
from ckpt.catalog import delete_tree
from ckpt.collective import Group, decode, encode
from ckpt.commit import Commit, claim_attempt, commit_step, step_folder
from ckpt.config import Settings, no_collection, settings
from ckpt.errors import CkptError, DeadlineError, LayoutError
from ckpt.format.codec import BLOCK, Codec, choose_codec, crc32c
from ckpt.format.fragment import Box
from ckpt.format.manifest import ObjectEntry
from ckpt.format.pack import PackLayout, Piece, TensorSpec, layout_pack
from ckpt.plan import PLAIN, Claim, Claims, NeedDigests, Plan, merge
from ckpt.shards import Held
from ckpt.state import AUTO, REPLICATED, Leaves, ObjectLeaf, TensorLeaf, collect
from ckpt.write import PackReport, Ring, Source, source_of, write_pack

__all__ = ["Planner", "SaveReport", "save_state"]


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
    """What is kept from save to save: the last plan, and on the leader the claims it was made from.

    A plan is reused only if names, dtypes, shapes and placements are the same on every rank, and if the same
    tensors turn out to be copies of one another.
    """

    sent: str = ""
    digests: frozenset[str] = frozenset()
    claims: dict[int, Claims] = field(default_factory=dict)
    plan: Plan | None = None
    plan_key: str = ""
    assignment: _Assignment | None = None
    work: _Work | None = None


_rings: dict[tuple[int, int, int, int], Ring] = {}


def _ring(config: Settings) -> Ring:
    """The process's ring: reserved once, whoever saves. A fork has none of its parent's threads, and needs its own."""
    key = (os.getpid(), config.buffer_mib, config.buffers, config.writers)
    if key not in _rings:
        _rings[key] = Ring(config)
    return _rings[key]


@dataclass(frozen=True)
class _Assignment:
    """What this rank writes: `local` indices of its claims with boxes, and the variants of those stored per rank."""

    key: str
    local: npt.NDArray[np.int64]
    box: npt.NDArray[np.int64]
    variants: Mapping[str, str]


@dataclass(frozen=True)
class _Work:
    """An assignment made ready: pieces, their layout, and where each is: (claim, piece of it, box within that)."""

    key: str
    codecs: tuple[tuple[str, Codec], ...]
    pieces: tuple[Piece, ...]
    layout: PackLayout
    places: tuple[tuple[int, int, Box], ...]


def save_state(
    backend: Backend,
    state: Any,
    *,
    step: int,
    generation: int,
    metrics: Mapping[str, float],
    codecs: Sequence[tuple[str, Codec]],
    group: Group,
    planner: Planner,
    failure: Exception | None = None,
) -> SaveReport:
    """Saves one step; collective over `group`. Returns after the commit, on every rank.

    `failure` is what this rank has to say instead of a state: it then fails on all.

    Raises on every rank, with nothing published: UsageError or LayoutError for a state that cannot be saved,
    ConflictError if the step exists, StorageError, DeadlineError or PeerError for what failed on the way.
    """
    began = time.monotonic()
    folder = step_folder(step, generation)
    lead = _Leader(backend, folder, step, generation, group.world, metrics, codecs, planner)
    try:
        leaves, assignment, told = _agree(lead, state, group, planner, failure)
        planned = time.monotonic()
        path = f"{folder}/{told['attempt']}/rank-{group.rank:05d}.safetensors"
        report: PackReport | None = None
        payload: bytes | Exception
        try:
            work = _prepare(planner, assignment, leaves, codecs)
            if work.pieces:
                sources = [source_of(leaves[i].held.pieces[k][1], box) for i, k, box in work.places]
                with no_collection():
                    report = write_pack(backend, path, work.pieces, sources, _ring(settings()), work.layout)
            payload = _encode_report(report)
        except Exception as e:
            payload = e
        written = time.monotonic()
        answer = group.round(f"commit {folder}", payload, lead.commit)
        total, _ = decode(answer)
    except BaseException as e:
        lead.clean_up(group.rank, e)
        raise
    return SaveReport(
        ref=f"{backend.root}/{folder}",
        step=step,
        generation=generation,
        bytes=total,
        bytes_here=report.size if report else 0,
        seconds=time.monotonic() - began,
        seconds_plan=planned - began,
        seconds_write=written - planned,
        per_rank=tuple(told["per_rank"]),
    )


def _agree(
    lead: _Leader, state: Any, group: Group, planner: Planner, failure: Exception | None
) -> tuple[list[TensorLeaf], _Assignment, dict[str, Any]]:
    """The first round, again while the leader needs more: claims it does not have, digests it cannot do without."""
    again = {"claims": False}
    leaves, names, claims = Leaves(), [], None
    try:
        if failure is None:
            leaves = collect(state)
            names = sorted(leaves.tensors)
    except Exception as e:
        failure = e
    while True:
        payload: bytes | Exception
        try:
            if failure is not None:
                raise failure
            claims = _claims(leaves, names, planner.digests, group.world)
            full = again["claims"] or claims.fingerprint != planner.sent
            payload = _encode_claims(claims, leaves, full, planner.assignment.key if planner.assignment else "")
        except Exception as e:
            payload = e
        head, arrays = decode(group.round(f"plan {lead.folder}", payload, lead.plan))
        if "digests" in head:
            planner.digests = planner.digests | set(head["digests"])
            continue
        if "claims" in head:
            again["claims"] = True
            continue
        break
    assert claims is not None
    planner.sent = claims.fingerprint
    if "local" in arrays:
        planner.assignment = _Assignment(head["key"], arrays["local"], arrays["box"], head["variants"])
    if planner.assignment is None or planner.assignment.key != head["key"]:
        raise LayoutError("this rank lost the plan it was given before; save again")  # cannot happen: see _Leader.plan
    return [leaves.tensors[n] for n in names], planner.assignment, head


def _claims(leaves: Leaves, names: Sequence[str], digests: frozenset[str], world: int) -> Claims:
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
                _digest(held) if content else 0,
            )
        )
    return Claims.of(out)


def _digest(held: Held) -> int:
    """64 bits that tell contents apart: over the CRC32C of every block, as they would be stored."""
    h = hashlib.blake2b(digest_size=8)
    scratch = np.empty(BLOCK, dtype=np.uint8)
    for _, view in held.pieces:
        source = Source(view)
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


def _prepare(
    planner: Planner, assignment: _Assignment, leaves: Sequence[TensorLeaf], codecs: Sequence[tuple[str, Codec]]
) -> _Work:
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
    planner.work = _Work(assignment.key, tuple(codecs), tuple(pieces), layout_pack(pieces), tuple(places))
    return planner.work


def _encode_report(report: PackReport | None) -> bytes:
    if report is None:
        return encode(None)
    head = {k: v for k, v in report.__dict__.items() if isinstance(v, int)}
    return encode(head, offset=report.offset, length=report.length, block=report.block)


def _decode_report(message: bytes) -> PackReport | None:
    head, arrays = decode(message)
    return None if head is None else PackReport(**{**head, **arrays})


class _Leader:
    """The leader's side of a save: what the two rounds decide. Lives for one save; used on rank 0 only."""

    def __init__(
        self,
        backend: Backend,
        folder: str,
        step: int,
        generation: int,
        world: int,
        metrics: Mapping[str, float],
        codecs: Sequence[tuple[str, Codec]],
        planner: Planner,
    ) -> None:
        self.backend, self.folder, self.step, self.generation, self.world = backend, folder, step, generation, world
        self.metrics, self.codecs, self.planner = metrics, codecs, planner
        self.attempt = self.writer = ""
        self.publishing = False
        self.objects: list[ObjectEntry] = []
        self.aliases: dict[str, str] = {}

    def plan(self, letters: list[bytes]) -> list[bytes]:
        """Merges claims into a plan, or reuses the last one; claims the attempt."""
        planner = self.planner
        heads: list[dict[str, Any]] = []
        claims: list[Claims] = []
        for rank, letter in enumerate(letters):
            head, arrays = decode(letter)
            heads.append(head)
            if "head" in head:
                planner.claims[rank] = Claims(head["head"], arrays["tensor"], arrays["box"], arrays["digest"])
            known = planner.claims.get(rank)
            if known is None or known.fingerprint != head["fingerprint"]:
                return [encode({"claims": True})] * self.world
            claims.append(Claims(known.head, known.tensor, known.box, arrays["digest"]))
        key = _plan_key(claims)
        if planner.plan is None or planner.plan_key != key:
            try:
                planner.plan = merge(claims, planner.digests)
            except NeedDigests as e:
                return [encode({"digests": list(e.names)})] * self.world
            planner.plan_key = key
        self.objects, undeclared = _merge_objects([h["objects"] for h in heads])
        self.aliases = _merge_aliases([h["aliases"] for h in heads])
        self.attempt, self.writer = claim_attempt(self.backend, self.folder, self.world)
        plan = planner.plan
        told = {"attempt": self.attempt, "key": key, "per_rank": [*plan.per_rank, *undeclared]}
        return [_assignment(plan, rank, told, heads[rank]["plan"] != key) for rank in range(self.world)]

    def commit(self, letters: list[bytes]) -> bytes:
        """Every rank has written: the manifest, then the commit."""
        plan = self.planner.plan
        assert plan is not None
        table, column = _codec_column(plan, self.codecs)
        reports = [_decode_report(m) for m in letters]

        def publishing() -> None:
            self.publishing = True

        done: Commit = commit_step(
            self.backend,
            step=self.step,
            generation=self.generation,
            attempt=self.attempt,
            writer=self.writer,
            plan=plan,
            codecs=table,
            codec=column,
            objects=self.objects,
            aliases=self.aliases,
            reports=reports,
            metrics=self.metrics,
            publishing=publishing,
        )
        return encode(done.bytes)

    def clean_up(self, rank: int, error: BaseException) -> None:
        """Removes what a failed save left. Only the leader may, and only before it tried to publish: a rank that
        merely lost touch cannot know that its packs are not part of a commit.

        The claim of the attempt goes last, and stays if a rank may still be writing: its name must not be used again.
        """
        if rank != 0 or not self.attempt or self.publishing:
            return
        at = f"{self.folder}/{self.attempt}"
        with suppress(Exception):
            for entry in self.backend.list(at):
                if entry.name != "attempt.json":
                    delete_tree(self.backend, f"{at}/{entry.name}")
            if isinstance(error, CkptError) and not isinstance(error, DeadlineError):
                delete_tree(self.backend, at)


def _plan_key(claims: Sequence[Claims]) -> str:
    """Identifies a plan: the claims of all ranks, and which tensors of equal name are equal in content."""
    h = hashlib.blake2b(digest_size=16)
    seen: dict[str, str] = {}
    for c in claims:
        text = seen.setdefault(c.head, str(len(seen)))
        h.update(f"{text}:{c.fingerprint};".encode())
    same = all(len(c.digest) == len(claims[0].digest) for c in claims) and len(seen) == 1
    if same:
        h.update((np.stack([c.digest for c in claims]) == claims[0].digest).all(axis=0).tobytes())
    else:
        for c in claims:
            h.update(c.digest.tobytes())
    return h.hexdigest()


def _assignment(plan: Plan, rank: int, told: Mapping[str, Any], full: bool) -> bytes:
    if not full:
        return encode(told)
    rows = plan.rows(rank)
    local, tensor = plan.local[rows], plan.tensor[rows]
    variants = {str(i): plan.tensors[t].variant for i, t in zip(local.tolist(), tensor.tolist(), strict=True)}
    return encode({**told, "variants": {i: v for i, v in variants.items() if v}}, local=local, box=plan.box[rows])


def _codec_column(plan: Plan, rules: Sequence[tuple[str, Codec]]) -> tuple[list[Codec], npt.NDArray[np.uint8] | None]:
    """(codecs in use, per fragment 0 for raw or 1 + index)."""
    if not rules:
        return [], None
    table: list[Codec] = []
    chosen = []
    for t in plan.tensors:
        codec = choose_codec(t.name, rules)
        if codec is not None and codec not in table:
            table.append(codec)
        chosen.append(0 if codec is None else 1 + table.index(codec))
    return table, np.array(chosen, dtype=np.uint8)[plan.tensor]


def _merge_objects(rows: Sequence[Sequence[Sequence[str]]]) -> tuple[list[ObjectEntry], list[str]]:
    """Entries of the manifest, and the names that differ between ranks although nobody said they would."""
    held: dict[str, list[tuple[int, ObjectLeaf]]] = {}
    for rank, objects in enumerate(rows):
        for row in objects:
            held.setdefault(row[0], []).append((rank, ObjectLeaf(*row)))
    out: list[ObjectEntry] = []
    undeclared = []
    for name, owners in sorted(held.items()):
        first = owners[0][1]
        equal = all((o.encoding, o.text) == (first.encoding, first.text) for _, o in owners)
        if len({o.policy for _, o in owners}) > 1 and first.policy in (AUTO, REPLICATED):
            raise LayoutError(f"object {name!r} is declared differently on ranks {[r for r, _ in owners][:8]}")
        if first.policy == REPLICATED and not equal:
            other = next(r for r, o in owners if o.text != first.text)
            raise LayoutError(
                f"object {name!r} is declared replicated, but ranks {owners[0][0]} and {other} hold different values"
            )
        if first.policy in (AUTO, REPLICATED) and equal:
            out.append(ObjectEntry(name, "replicated", first.encoding, first.text))
        elif first.policy in (AUTO, "rank"):
            if first.policy == AUTO:
                undeclared.append(name)
            out += [ObjectEntry(name, f"rank={r}", o.encoding, o.text) for r, o in owners]
        else:
            out += _by_coordinate(name, owners)
    return out, undeclared


def _by_coordinate(name: str, owners: Sequence[tuple[int, ObjectLeaf]]) -> list[ObjectEntry]:
    found: dict[str, tuple[int, ObjectLeaf]] = {}
    for rank, o in owners:
        there, known = found.setdefault(o.policy, (rank, o))
        if known.text != o.text:
            raise LayoutError(f"object {name!r}: ranks {there} and {rank} share {o.policy} but hold different values")
    return [ObjectEntry(name, scope, o.encoding, o.text) for scope, (_, o) in sorted(found.items())]


def _merge_aliases(rows: Sequence[Mapping[str, str]]) -> dict[str, str]:
    out: dict[str, str] = {}
    for row in rows:
        out.update(row)
    return out
