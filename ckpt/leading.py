"""The leader's side of a save: what the two rounds decide. Runs on rank 0, on what all ranks said."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ckpt.backends import Backend
from ckpt.catalog import drop_attempt
from ckpt.collective import decode, encode
from ckpt.commit import Commit, claim_attempt, commit_step, refuse_superseded
from ckpt.errors import CkptError, DeadlineError
from ckpt.format.codec import Codec, choose_codec
from ckpt.format.manifest import ObjectEntry
from ckpt.plan import Claims, NeedDigests, Plan, merge
from ckpt.scopes import merge_aliases, merge_objects
from ckpt.write import decode_report

__all__ = ["Leader", "Memory", "Planning", "codec_column"]


@dataclass
class Memory:
    """What the leader keeps from save to save: the claims of all ranks and the plan made of them."""

    claims: dict[int, Claims] = field(default_factory=dict)
    plan: Plan | None = None
    plan_key: str = ""


class Planning:
    """The leader's side of the first round: claims and values of all ranks -> a plan, and every rank's part of it."""

    def __init__(self, world: int, memory: Memory) -> None:
        self.world, self.memory = world, memory
        self.made: Plan | None = None  # this round's plan; the memory's may be a later one by the time of the commit
        self.key = ""
        self.objects: list[ObjectEntry] = []
        self.aliases: dict[str, str] = {}

    def plan(self, letters: list[bytes], told: Callable[[], Mapping[str, Any]] = dict) -> list[bytes]:
        """Merges claims into a plan, or reuses the last one. Answers with each rank's part and what `told` returns;
        or asks again, for claims it does not have or digests it cannot do without."""
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
        self.objects, undeclared = merge_objects([h["objects"] for h in heads])
        self.aliases = merge_aliases([h["aliases"] for h in heads])
        self.made, self.key = memory.plan, key
        plan = memory.plan
        head = {"key": key, "per_rank": [*plan.per_rank, *undeclared], **told()}
        return [_assignment(plan, rank, head, heads[rank]["plan"] != key) for rank in range(self.world)]


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
        self.backend, self.folder, self.step, self.generation = backend, folder, step, generation
        self.metrics, self.codecs, self.planning = metrics, codecs, Planning(world, memory)
        self.attempt = self.writer = ""
        self.publishing = False

    def plan(self, letters: list[bytes]) -> list[bytes]:
        """Plans, and claims the attempt."""

        def claim() -> dict[str, str]:
            self.attempt, self.writer = claim_attempt(self.backend, self.folder, self.planning.world)
            return {"attempt": self.attempt}

        return self.planning.plan(letters, claim)

    def commit(self, letters: list[bytes]) -> bytes:
        """Every rank has written: the manifest, then the commit."""
        plan = self.planning.made
        assert plan is not None
        refuse_superseded(self.backend, self.generation)
        table, column = codec_column(plan, self.codecs)

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
            objects=self.planning.objects,
            aliases=self.planning.aliases,
            reports=[decode_report(m) for m in letters],
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
        whole = isinstance(error, CkptError) and not isinstance(error, DeadlineError)
        drop_attempt(self.backend, self.folder, self.attempt, whole=whole)


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


def codec_column(plan: Plan, rules: Sequence[tuple[str, Codec]]) -> tuple[list[Codec], npt.NDArray[np.uint8] | None]:
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
