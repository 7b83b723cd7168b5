"""What a restarting job learns from its keepers: who holds what, which step to go on from, and where its packs are.

every host's first rank asks the keeper there, and hosts that have no trainer any more but may still be alive are asked
by one rank each; one round brings it all to rank 0, which chooses (`recovery.choose`), and its choice to all. Who does
not answer soon is waited for only if the newest step that anyone knows of cannot be had without him.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckpt.collective import Group
from ckpt.errors import CkptError, FormatError
from ckpt.keeper.groups import Group as Team
from ckpt.keeper.groups import Host, Placement
from ckpt.keeper.lead import Key
from ckpt.keeper.protocol import Frame
from ckpt.keeper.recovery import choose
from ckpt.keeper.wire import Holding, Layout, decode_holding, decode_layout, encode_layout

__all__ = ["Recalled", "Step", "recall"]

log = logging.getLogger("ckpt")
_SOON = 0.5  # seconds in which a host without trainers answers, if it is there
_LATE = 5.0  # seconds that it is given where all depends on it


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
    group: Group, mine: Callable[[], Frame | None], others: Collection[str], ask: Callable[[str, float], Frame]
) -> Recalled:
    """Collective. `mine`: has the keeper of this host pinned, None where another rank does; `others`: hosts without trainers,
    the same on all ranks; `ask` one of them, with so many seconds to answer. Raises nothing but what a round raises."""
    found: dict[str, Frame] = {}
    try:
        here = mine()
        if here is not None:
            found[""] = _checked(here)
    except CkptError as e:
        log.error("ckpt: what is in the memory of this host cannot be told: %s", e)
    asked = [host for n, host in enumerate(sorted(others)) if n % group.world == group.rank]
    for patience in (_SOON, _LATE):
        found |= _answers([h for h in asked if h not in found], ask, patience)
        silent = not found.keys() >= set(asked)
        letter = json.dumps(
            [silent and patience == _SOON, [[f["holding"], f["held"]] for f in found.values()]]
        ).encode()
        told = json.loads(group.round(f"in memory, {patience:.1f} s", letter, _decide))
        if told is not None:
            return _recalled(told)
    raise AssertionError("the second time is the last")


def _checked(answer: Frame) -> Frame:
    """An answer that makes sense. Raises FormatError."""
    decode_holding(answer["holding"])
    try:
        [(int(g), int(s), [str(h) for h in hosts]) for g, s, hosts in answer["held"]]
    except (TypeError, ValueError) as e:
        raise FormatError(f"not what a keeper holds ({type(e).__name__}: {e})") from None
    return answer


def _answers(hosts: Sequence[str], ask: Callable[[str, float], Frame], patience: float) -> dict[str, Frame]:
    """What hosts say, all asked at once."""
    found: dict[str, Frame] = {}

    def work(host: str) -> None:
        try:
            found[host] = _checked(ask(host, patience))
        except CkptError as e:
            log.info("ckpt: %s, which had a part in the job, does not answer: %s", host, e)

    threads = [threading.Thread(target=work, args=(h,), name=f"ckpt-ask-{h}") for h in hosts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def _decide(letters: Sequence[bytes]) -> bytes:
    """The choice, for all ranks; null if it may be better when those who are silent are given more time."""
    told = [json.loads(text) for text in letters]
    holdings = _with_unprotected([(decode_holding(holding), held) for _, found in told for holding, held in found])
    hosts = {h.inventory.host: h.host for h in holdings}
    layouts = {key: layout for h in holdings for key, layout in h.layouts.items()}
    choice = choose([h.inventory for h in holdings])
    if choice.missed and not choice.steps and any(waits for waits, _ in told):
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
