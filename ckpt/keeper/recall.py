"""What a restarting job learns from its keepers: who holds what, which step to go on from, and where its packs are.

every host's first rank asks the keeper there, and hosts that have no trainer any more but may still be alive are asked
by one rank each; one round brings it all to rank 0, which chooses (`recovery.choose`), and its choice to all.

Hosts that are dead say nothing, and are not waited for: who does not answer at once may only be needed if a step newer
than the one that is chosen can have been announced. It cannot if that is of the newest life that ever began, and each
newer one that anybody knows of is not encoded on some host that answered, since all hosts of a life encode what it
announces.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckpt.collective import Group
from ckpt.errors import CkptError, FormatError
from ckpt.keeper.groups import Group as Team
from ckpt.keeper.groups import Host, Placement
from ckpt.keeper.guard import Inventory
from ckpt.keeper.lead import Key
from ckpt.keeper.protocol import Frame
from ckpt.keeper.recovery import Choice, choose
from ckpt.keeper.wire import Holding, Layout, decode_holding, decode_layout, encode_layout

__all__ = ["Recalled", "Step", "recall"]

log = logging.getLogger("ckpt")
_AT_ONCE = 0.05  # seconds in which a host without trainers answers, if it is there
_SOON = 0.5  # if it is busy; given where it may know more than the others
_LATE = 5.0  # given where there is nothing without it


@dataclass(frozen=True)
class Step:
    """A step that can be had from memory: `layout` says where its packs are, `parts` and `parity` which keepers still
    have theirs, `hosts` how people call these hosts, and so where they are reached."""

    key: Key
    layout: Layout
    parts: frozenset[str]
    parity: frozenset[str]
    hosts: Mapping[str, str]

    @property
    def lost(self) -> frozenset[str]:
        return self.layout.placement.names - self.parts


@dataclass(frozen=True)
class Recalled:
    """What all ranks go by: steps, newest first; what newer ones are known of, and why they cannot be had."""

    steps: tuple[Step, ...] = ()
    missed: tuple[tuple[Key, str], ...] = ()


def recall(
    group: Group,
    mine: Callable[[], Frame | None],
    others: Collection[str],
    ask: Callable[[str, float, Callable[[], bool]], Frame],
    newest: Callable[[], int],
) -> Recalled:
    """Collective. `mine`: has the keeper of this host pinned, None where another rank does; `others`: hosts without trainers,
    the same on all ranks; `ask` one of them, with so many seconds to answer, unless that is not wanted any more once it is
    reached; `newest`: the last life that began, as storage knows it, for rank 0. Raises nothing but what a round raises."""
    asking = _Asking([host for n, host in enumerate(sorted(others)) if n % group.world == group.rank], ask)
    found: dict[str, Frame] = {}
    try:
        here = mine()
        if here is not None:
            found[""] = _checked(here)
    except CkptError as e:
        log.error("ckpt: what is in the memory of this host cannot be told: %s", e)
    try:
        for patience in (_AT_ONCE, _SOON, _LATE):
            answers, silent = asking.wait(patience)
            told = [[f["holding"], f["held"]] for f in (*found.values(), *answers)]
            letter = json.dumps([silent and patience, told]).encode()
            chosen = json.loads(group.round(f"in memory, {patience:.2f} s", letter, lambda all_: _decide(all_, newest)))
            if chosen is not None:
                return _recalled(chosen)
        raise AssertionError("the last time is the last")
    finally:
        asking.over = True


class _Asking:
    """Asks hosts, all at once, each in a thread that ends with its answer, or when nobody waits for it any more."""

    def __init__(self, hosts: Collection[str], ask: Callable[[str, float, Callable[[], bool]], Frame]) -> None:
        self._hosts, self._ask = hosts, ask
        self._began, self.over = time.monotonic(), False
        self._changed = threading.Condition()
        self._found: dict[str, Frame] = {}
        self._trying: set[str] = set()
        self._try()

    def _try(self) -> None:
        for host in self._hosts:
            if host not in self._found and host not in self._trying:
                self._trying.add(host)
                threading.Thread(target=self._work, args=(host,), name=f"ckpt-ask-{host}", daemon=True).start()

    def _work(self, host: str) -> None:
        try:
            answer = _checked(self._ask(host, _LATE, lambda: not self.over))
            with self._changed:
                self._found[host] = answer
        except CkptError as e:
            log.info("ckpt: %s, which had a part in the job, does not answer: %s", host, e)
        finally:
            with self._changed:
                self._trying.discard(host)
                self._changed.notify_all()

    def wait(self, patience: float) -> tuple[list[Frame], bool]:
        """(the answers, whether there may be more), so many seconds after all were asked, or once there are all. Who refused
        the time before is asked again."""
        with self._changed:
            if patience > _AT_ONCE:
                self._try()
            left = self._began + patience - time.monotonic()
            self._changed.wait_for(lambda: not self._trying, max(0.0, left))
            return list(self._found.values()), len(self._found) < len(self._hosts)


def _checked(answer: Frame) -> Frame:
    """An answer that makes sense. Raises FormatError."""
    decode_holding(answer["holding"])
    try:
        [(int(g), int(s), [str(h) for h in hosts]) for g, s, hosts in answer["held"]]
    except (TypeError, ValueError) as e:
        raise FormatError(f"not what a keeper holds ({type(e).__name__}: {e})") from None
    return answer


def _decide(letters: Sequence[bytes], newest: Callable[[], int]) -> bytes:
    """The choice, for all ranks; null if it may be better when those who are silent are given more time."""
    told = [json.loads(text) for text in letters]
    holdings = _with_unprotected([(decode_holding(holding), held) for _, found in told for holding, held in found])
    hosts = {h.inventory.host: h.host for h in holdings}
    layouts = {key: layout for h in holdings for key, layout in h.layouts.items()}
    choice = choose([h.inventory for h in holdings])
    waited = max((seconds for seconds, _ in told if seconds), default=None)  # for who is silent still
    if waited == _SOON and choice.missed and not choice.steps:
        return b"null"
    if waited == _AT_ONCE and not _settled(choice, [h.inventory for h in holdings], newest):
        return b"null"
    steps = [
        {
            "key": c.key,
            "layout": encode_layout(layouts[c.key]),
            "parts": sorted(c.parts),
            "parity": sorted(c.parity),
            "hosts": {n: hosts[n] for n in sorted(c.parts | c.parity)},
        }
        for c in choice.steps
        if c.key in layouts
    ]
    return json.dumps({"steps": steps, "missed": choice.missed}).encode()


def _settled(choice: Choice, inventories: Sequence[Inventory], newest: Callable[[], int]) -> bool:
    """Whether no step can have been announced that is newer than what is chosen."""
    if not choice.steps or any(_all_encoded(key, inventories) for key, _ in choice.missed):
        return False
    try:
        return choice.steps[0].key[0] >= newest()
    except CkptError as e:
        log.info("ckpt: what lives there were cannot be told: %s", e)
        return False


def _all_encoded(key: Key, inventories: Sequence[Inventory]) -> bool:
    """Whether a step may have been announced: each host that answered has encoded it, of those that should have."""
    placed = {i.whole[key] for i in inventories if key in i.whole}
    placed |= {a.placement for i in inventories for a in i.areas if a is not None and a.key == key}
    should = frozenset[str]().union(*(p.names for p in placed))
    return all(any(a is not None and a.key == key for a in i.areas) for i in inventories if i.host in should)


def _with_unprotected(told: Sequence[tuple[Holding, Sequence[Any]]]) -> list[Holding]:
    """The inventories with the steps that nobody was to protect, as steps of which no part may be lost."""
    known = {key for h, _ in told for key in h.layouts} | {key for h, _ in told for key in h.inventory.whole}
    names = {h.host: h.inventory.host for h, _ in told}
    out = []
    for holding, held in told:
        whole, layouts = dict(holding.inventory.whole), dict(holding.layouts)
        for g, s, ranks in held:
            if (g, s) not in known:
                on = [names.get(host, host) for host in ranks]
                placement = Placement((Team(tuple(Host(n, n, 0) for n in sorted(set(on))), 1, 0),))
                layouts[g, s] = Layout(placement, tuple((n, 0, 0) for n in on))
                whole[g, s] = placement
        out.append(replace(holding, inventory=replace(holding.inventory, whole=whole), layouts=layouts))
    return out


def _recalled(told: Mapping[str, Any]) -> Recalled:
    steps = tuple(
        Step(
            (int(s["key"][0]), int(s["key"][1])),
            decode_layout(s["layout"]),
            frozenset(s["parts"]),
            frozenset(s["parity"]),
            s["hosts"],
        )
        for s in told["steps"]
    )
    return Recalled(steps, tuple(((int(g), int(s)), str(why)) for (g, s), why in told["missed"]))
