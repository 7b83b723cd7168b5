"""Running averages, the trainer's part in them: what is averaged, what the keepers go on from, how each step counts."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckpt.averages import stored_progress, weights_of
from ckpt.backends import Backend
from ckpt.collective import Group
from ckpt.commit import read_commit, read_manifest, step_folder
from ckpt.errors import CapacityError, CkptError, NotFoundError, UsageError
from ckpt.format.dtypes import dtype
from ckpt.format.manifest import Manifest
from ckpt.format.pack import Piece, layout_pack
from ckpt.keeper.averaged import (
    averaged_aliases,
    averaged_pieces,
    decode_progress,
    encode_progress,
    pack_start,
    with_averages,
)
from ckpt.keeper.member import Member
from ckpt.merge.average import AVERAGES, Mark, Progress, Rule
from ckpt.merge.fold import BLOCK_NUMBERS, Folds
from ckpt.plan import Plan
from ckpt.read import Target, read_targets
from ckpt.saving import Work
from ckpt.snapshot.arena import Slot, rounded
from ckpt.state import walk
from ckpt.write import Source

__all__ = ["AverageView", "Averages", "Origin", "check_rules"]

log = logging.getLogger("ckpt")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
Key = tuple[int, int]
Origin = Callable[[], tuple[Backend, str] | None]
"""Opens the checkpoint that a life begins with, for the averages in it: a backend, which is closed, and a folder."""


def check_rules(rules: Mapping[str, Rule] | None) -> dict[str, Rule]:
    """Raises UsageError for names that a leaf cannot bear."""
    for name, rule in (rules or {}).items():
        if not _NAME.fullmatch(name):
            raise UsageError(f"average {name!r}: a name of letters, digits, - and _")
        if not hasattr(rule, "spec"):
            raise UsageError(f"average {name!r}: {rule!r} is no rule; see ckpt.EMA, Power, PowerEMA and MWA")
    return dict(rules or {})


@dataclass(frozen=True)
class AverageView:
    """How an average stands, as of the newest step that the keepers hold.

    rule     what makes it; `folds` and `refused`: snapshots that count in it, and that should and do not
    step     the last one folded, -1 if none was
    drift    |A - theta| / |theta| over a sample of all elements: how far it is from the step itself
    """

    rule: Mapping[str, Any]
    folds: int
    refused: int
    step: int
    drift: float


class Averages:
    """Those of one job, as one of its ranks knows them. Does nothing where there are no rules."""

    def __init__(self, rules: Mapping[str, Rule], rank: int, world: int) -> None:
        self.rules, self._rank, self._world = dict(rules), rank, world
        self._names = sorted(self.rules)
        self._leaves: dict[str, str] = {}  # leaf that is folded -> leaf whose average that is
        self._progress: dict[str, Progress] = {}
        self._seed: Slot | None = None
        self._plan = ""
        self._slots: dict[int, tuple[int, str]] = {}  # step -> slot and plan; granted, or whole and there yet
        self._whole: dict[int, dict[str, Progress]] = {}  # steps of this life that were whole, what was told of them
        self.views: dict[str, AverageView] = {}
        self._lacking: set[str] = set()  # averages in which a step did not count, of which no more was said

    @property
    def progress(self) -> Mapping[str, Progress]:
        """What they remember, as of the newest step that is whole, or as this life began."""
        whole = self._whole
        return whole[max(whole)] if whole else self._progress

    # What is averaged.

    def names(self, state: Any) -> bytes | Exception:
        """The leaves that this rank would average, or why there are none, for `agree`."""
        if not self.rules:
            return b""
        try:
            found = weights_of(state)
            if any(name.split(".")[0] == AVERAGES for name, _, _, _ in walk(state)):
                raise UsageError(
                    f"the state has a key {AVERAGES!r}, under which running averages are stored; rename it"
                )
            return json.dumps({w.leaf: w.source for w in found if w.averaged}, sort_keys=True).encode()
        except Exception as e:
            return e

    def agree(self, names: bytes | Exception, group: Group) -> None:
        """Collective: all ranks average the same leaves."""
        if not self.rules:
            return

        def decide(letters: list[bytes]) -> bytes:
            every: dict[str, str] = {}
            for leaf, source in (item for text in letters for item in json.loads(text).items()):
                if every.get(leaf, leaf) == leaf:  # a master may be known to one rank alone
                    every[leaf] = source
            if not every:
                raise UsageError("averages: the state has no module with parameters to average")
            return json.dumps({source: leaf for leaf, source in sorted(every.items())}).encode()

        self._leaves = json.loads(group.round("averaged", names, decide))

    def plan(self, plan: Plan, aliases: Mapping[str, str]) -> tuple[Plan, Mapping[str, str]]:
        """A plan and its aliases, with the averages."""
        if not self.rules:
            return plan, aliases
        return (
            with_averages(plan, self._world, self._names, self._leaves),
            averaged_aliases(aliases, self._names, self._leaves),
        )

    def key(self, plan: str) -> str:
        """The name of such a plan, which is the one in force from now on."""
        self._plan = plan
        if self.rules:
            text = json.dumps([self._names, sorted(self._leaves.items())])
            self._plan = f"{plan}+{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"
        return self._plan

    def _pairs(self, work: Work) -> list[tuple[Piece, list[Piece]]]:
        return averaged_pieces(work.pieces, self._names, self._leaves)

    def slot_size(self, work: Work) -> int:
        """Bytes of a slot for this rank's part."""
        pieces = [p for _, many in self._pairs(work) for p in many] if self.rules else []
        size = work.layout.size
        return rounded(pack_start(size) + layout_pack(pieces).size if pieces else size)

    # What they go on from.

    def read(self, work: Work, sources: Sequence[Source], origin: Origin) -> bytes:
        """Takes up what a checkpoint holds of the averages; without one they begin anew. Returns why that could not be
        read, if so; raises CapacityError."""
        self._drop()
        self._progress = {name: Progress(rule.spec) for name, rule in self.rules.items()}
        if not self.rules:
            return b""
        backend: Backend | None = None
        try:
            opened = origin()
            if opened is None:
                return b""
            backend, folder = opened
            manifest = read_manifest(backend, read_commit(backend, folder))
            stored = stored_progress(manifest, folder)
            known = {n: p for n, p in stored.items() if n in self.rules and p.spec == self._progress[n].spec}
            if self._rank == 0:
                self._say(stored, known, folder)
            self._read(work, sources, backend, folder, manifest, known)
            self._progress |= known
        except CapacityError:
            raise
        except CkptError as e:
            return str(e).encode()
        finally:
            if backend is not None:
                backend.close()
        return b""

    def _say(self, stored: Mapping[str, Progress], known: Mapping[str, Progress], folder: str) -> None:
        for name in self._names:
            if name in stored and name not in known:
                was, now = dict(stored[name].spec), dict(self._progress[name].spec)
                log.warning("ckpt: average %r begins anew: its rule was %s and is %s", name, was, now)
            elif name not in stored:
                log.warning("ckpt: average %r begins: %s has none of that name", name, folder)
        for name in stored.keys() - self.rules.keys():
            log.warning("ckpt: average %r of %s is not continued: no rule was given for it", name, folder)

    def _read(
        self, work: Work, sources: Sequence[Source], backend: Backend, folder: str, manifest: Manifest,
        known: Mapping[str, Progress],
    ) -> None:  # fmt: skip
        """The accumulators of this rank, into memory that the keeper will get."""
        pairs = self._pairs(work)
        pieces = [p for _, many in pairs for p in many]
        if not pieces or not any(p.folds for p in known.values()):
            return
        layout = layout_pack(pieces)
        seed = self._seed = Slot(layout.size, f"ckpt-seed-{self._rank}")
        place = {(p.tensor.name, p.box): int(at) for p, at in zip(layout.pieces, layout.offset.tolist(), strict=True)}
        source = {(p.tensor.name, p.box): s for p, s in zip(work.pieces, sources, strict=True)}
        targets, absent = [], set()
        for piece, accumulators in pairs:
            for p in accumulators:
                name = p.tensor.name.split(".")[1]
                if name not in known or not known[name].folds:
                    continue
                at, index = place[p.tensor.name, p.box], manifest.by_key.get(p.tensor.name)
                room = seed.buffer[at : at + p.nbytes]
                found = None if index is None else manifest.tensors[index]
                if index is None or found is None or (found.shape, found.dtype) != (p.tensor.shape, p.tensor.dtype):
                    _take(source[piece.tensor.name, piece.box], piece.tensor.dtype, room)
                    absent.add(p.tensor.name)
                    continue
                manifest.check_coverage(index)
                targets.append(Target(index, p.box, room.view(dtype(p.tensor.dtype).numpy).reshape(p.box.shape)))
        read_targets(backend, folder, manifest, targets, threads=1)
        if absent:
            log.warning(
                "ckpt: begin with the value of now, as %s does not have them: %s", folder, ", ".join(sorted(absent)[:8])
            )

    def _own(self) -> list[int]:
        """Steps whose averages lie in this rank's own slots, cut as the plan in force cuts them."""
        slots = self._slots
        return sorted(s for s in self._whole if slots.get(s, (0, ""))[1] == self._plan)

    def take_own(self, work: Work, slots: Mapping[int, Slot], step: int | None = None) -> bytes:
        """Takes up what lies in this rank's own slots as of `step`, the newest by default: all that is left when a keeper
        dies. Returns why there is nothing, if so."""
        own = [s for s in self._own() if s == step or step is None]
        self._drop()
        if not own:
            began = self.rules and self._whole
            self._progress = {name: Progress(rule.spec) for name, rule in self.rules.items()}
            return b"no step of this rank's memory is known to be whole" if began else b""
        self._progress = dict(self._whole[own[-1]])
        log.warning("ckpt: the averages go on from step %d, which is left in this rank's memory", own[-1])
        pieces = [p for _, many in self._pairs(work) for p in many]
        if pieces:
            size, at = layout_pack(pieces).size, pack_start(work.layout.size)
            self._seed = Slot(size, f"ckpt-seed-{self._rank}")
            np.copyto(self._seed.buffer[:size], slots[self._slots[own[-1]][0]].buffer[at : at + size])
        return b""

    def read_held(self, work: Work, sources: Sequence[Source], member: Member, group: Group) -> None:
        """Collective: under a new plan they go on from the newest step that all hosts hold; else, if the plan is the same,
        from the newest that is left in the slots of all ranks."""
        if not self.rules:
            return
        steps = member.recall(group).steps
        own = json.loads(group.round("held", json.dumps(self._own()).encode(), _left))

        def origin() -> tuple[Backend, str]:
            if not steps:
                raise NotFoundError("no step is left in the memory of all hosts")
            return member.open(steps[0]), step_folder(steps[0].key[1], steps[0].key[0])

        if not steps and own is not None:
            why = self.take_own(work, member.slots, own)
        else:
            why = self.read(work, sources, origin)
        why = group.round("averages", why, max)
        member.done_reading()
        self.hand_over(member, why)

    def hand_over(self, member: Member, verdict: bytes) -> None:
        """Gives the keeper what its folds go on from. `verdict`: why averages have to begin anew on all ranks, if so."""
        if not self.rules:
            return
        if verdict:
            self._drop()
            self._progress = {name: Progress(rule.spec) for name, rule in self.rules.items()}
            log.error("ckpt: all averages begin anew: %s", verdict.decode(errors="replace"))
        fds = [] if self._seed is None else [self._seed.fd]
        masters = {source: leaf for source, leaf in self._leaves.items() if source != leaf}
        head = {"plan": self._plan, "progress": encode_progress(self._progress)}
        member.link.ask("averages", json.dumps(masters).encode(), fds, timeout=member.deadline, **head)
        self._drop()

    def _drop(self) -> None:
        if self._seed is not None:
            self._seed.close()
        self._seed = None

    # Steps.

    def marks(self, step: int, metrics: Mapping[str, float]) -> dict[str, Mark | str]:
        """How a step counts in each average; for a seal. Whatever a rule of the user's own raises is why it does not."""
        out: dict[str, Mark | str] = {}
        for name, rule in self.rules.items():
            try:
                out[name] = rule.mark(step, metrics)
            except Exception as e:
                out[name] = f"{type(e).__name__}: {e}"
            why = out[name]
            if isinstance(why, str) and self._rank == 0:
                self._lacking.add(name)
                log.warning("ckpt: step %d does not count in average %r: %s", step, name, why)
        return out

    def came_late(self, step: int, metrics: Iterable[str]) -> None:
        """Says so if an average lacked one of these metrics, which `cp.record` was given for a step."""
        for name, rule in self.rules.items():
            needed = {str(rule.spec.get(key)) for key in ("metric", "by")} & set(metrics)
            if needed and name in self._lacking:
                self._lacking.remove(name)
                log.warning(
                    "ckpt: average %r weighs steps by %r, which came with record() after step %d was folded, and does not count "
                    "in it; give cp.step() the newest one that is known, or average afterwards: ckpt average RUN --weights "
                    "mwa:%s,PENALTY", name, *needed, step, *needed,
                )  # fmt: skip

    def granted(self, step: int, slot: int) -> None:
        """A slot is about to be written to."""
        self._slots = {s: at for s, at in self._slots.items() if at[0] != slot} | {step: (slot, self._plan)}
        newest = max(self._whole, default=-1)
        self._whole = {s: p for s, p in self._whole.items() if s in self._slots or s == newest}

    def whole(self, step: int, told: Mapping[str, Any] | None) -> None:
        """A step is whole in memory, with its averages."""
        if not told:
            return
        progress = decode_progress(str(told["progress"]), "the keeper")
        self._whole = {**self._whole, step: progress}  # the training thread reads the old one meanwhile
        if told["refused"] and self._rank == 0:
            log.warning("ckpt: step %d does not count in any average: %s", step, told["refused"])
        self.views = {
            name: AverageView(p.spec, p.folds, p.refused, p.step, float(told["drift"].get(name, 0.0)))
            for name, p in progress.items()
        }

    def forget(self) -> None:
        """A life begins: what was whole belongs to another."""
        self._slots, self._whole, self.views = {}, {}, {}


def _take(source: Source, kind: str, out: np.ndarray[Any, Any]) -> None:
    """A fragment of the state in the accumulator's type."""
    item = dtype(kind).itemsize
    ratio = len(out) // max(1, source.nbytes // item)
    step, take = BLOCK_NUMBERS // 2, Folds([1.0], guarded=False)
    for at in range(0, source.nbytes // item, step):
        n = min(step, source.nbytes // item - at)
        block = np.empty(n * item, dtype=np.uint8)
        source.into(at * item, block)
        list(take(block, kind, [None], [out[at * ratio : (at + n) * ratio]]))


def _left(letters: Sequence[bytes]) -> bytes:
    """The newest step that all ranks have in slots of their own, or None."""
    return json.dumps(max(set.intersection(*(set(json.loads(text)) for text in letters)), default=None)).encode()
