"""The leader's side of a save: what the two rounds decide. Runs on rank 0, on what all ranks said."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ckpt.backends import Backend
from ckpt.catalog import delete_tree
from ckpt.collective import decode, encode
from ckpt.commit import Commit, claim_attempt, commit_step
from ckpt.errors import CkptError, DeadlineError, LayoutError
from ckpt.format.codec import Codec, choose_codec
from ckpt.format.manifest import ObjectEntry
from ckpt.plan import Claims, NeedDigests, Plan, merge
from ckpt.state import AUTO, REPLICATED, ObjectLeaf
from ckpt.write import PackReport

__all__ = ["Leader", "Memory", "encode_report"]


@dataclass
class Memory:
    """What the leader keeps from save to save: the claims of all ranks and the plan made of them."""

    claims: dict[int, Claims] = field(default_factory=dict)
    plan: Plan | None = None
    plan_key: str = ""


class Leader:
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
        memory: Memory,
    ) -> None:
        self.backend, self.folder, self.step, self.generation, self.world = backend, folder, step, generation, world
        self.metrics, self.codecs, self.memory = metrics, codecs, memory
        self.attempt = self.writer = ""
        self.publishing = False
        self.made: Plan | None = None  # this save's plan; the memory's may be a later one by the time of the commit
        self.objects: list[ObjectEntry] = []
        self.aliases: dict[str, str] = {}

    def plan(self, letters: list[bytes]) -> list[bytes]:
        """Merges claims into a plan, or reuses the last one; claims the attempt."""
        memory = self.memory
        heads: list[dict[str, Any]] = []
        claims: list[Claims] = []
        for rank, letter in enumerate(letters):
            head, arrays = decode(letter)
            heads.append(head)
            if "head" in head:
                memory.claims[rank] = Claims(head["head"], arrays["tensor"], arrays["box"], arrays["digest"])
            known = memory.claims.get(rank)
            if known is None or known.fingerprint != head["fingerprint"]:
                return [encode({"claims": True})] * self.world
            claims.append(Claims(known.head, known.tensor, known.box, arrays["digest"]))
        key = _plan_key(claims)
        if memory.plan is None or memory.plan_key != key:
            try:
                memory.plan = merge(claims)
            except NeedDigests as e:
                return [encode({"digests": list(e.names)})] * self.world
            memory.plan_key = key
        self.objects, undeclared = _merge_objects([h["objects"] for h in heads])
        self.aliases = _merge_aliases([h["aliases"] for h in heads])
        self.attempt, self.writer = claim_attempt(self.backend, self.folder, self.world)
        plan = self.made = memory.plan
        told = {"attempt": self.attempt, "key": key, "per_rank": [*plan.per_rank, *undeclared]}
        return [_assignment(plan, rank, told, heads[rank]["plan"] != key) for rank in range(self.world)]

    def commit(self, letters: list[bytes]) -> bytes:
        """Every rank has written: the manifest, then the commit."""
        plan = self.made
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
        equal = all(_same(o, first) for _, o in owners)
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


def _same(a: ObjectLeaf, b: ObjectLeaf) -> bool:
    """Equal values; the order in which a dict was filled does not count."""
    if (a.encoding, a.text) == (b.encoding, b.text):
        return True
    return a.encoding == b.encoding == "json" and json.dumps(json.loads(a.text), sort_keys=True) == json.dumps(
        json.loads(b.text), sort_keys=True
    )


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


def encode_report(report: PackReport | None) -> bytes:
    if report is None:
        return encode(None)
    head = {k: v for k, v in report.__dict__.items() if isinstance(v, int)}
    return encode(head, offset=report.offset, length=report.length, block=report.block)


def _decode_report(message: bytes) -> PackReport | None:
    head, arrays = decode(message)
    return None if head is None else PackReport(**{**head, **arrays})
