"""Where the packs of a step are read: here, in the memory of another host, or decoded from what others of its group hold."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ckpt.errors import NotFoundError
from ckpt.keeper.loan import PARITY, SEGMENT, Loans
from ckpt.keeper.rebuild import Share, Stripes
from ckpt.keeper.recall import Step
from ckpt.keeper.source import Pack, RemotePack, SharedPack

__all__ = ["PATIENCE", "packs_of"]

PATIENCE = 10.0
"""Seconds that a keeper may say nothing while it is read; then others make up for it, or the step is given up."""

Address = tuple[str, int]


class _Pieces:
    """What another keeper holds of a step, as a `Store` of one thread."""

    def __init__(self, loans: Loans, address: Address) -> None:
        self._loan = loans.at(address)

    def ask(self, parity: bool, offset: int, length: int) -> None:
        self._loan.ask(PARITY if parity else SEGMENT, offset, length)

    def take(self, into: memoryview) -> None:
        self._loan.take(into)

    def close(self) -> None:
        self._loan.close()


def packs_of(
    step: Step,
    extents: Mapping[int, tuple[int, int]],
    here: Mapping[int, Pack],
    reach: Mapping[str, Address],
    host: str,
    loans: Loans,
) -> tuple[dict[int, Pack], list[Stripes]]:
    """(packs by writer, stripes that some of them are decoded from); both read what is not here over `loans`.

    `extents` of all packs by writer: bytes, where it begins in its rank's memory; `here`: those on this host, which people
    call `host`; `reach`: keepers by their host.
    Raises NotFoundError if one cannot be had.
    """
    placement = step.layout.placement
    address = {name: reach[h] for name, h in step.hosts.items() if h in reach}
    stripes: dict[int, Stripes] = {}
    packs: dict[int, Pack] = {}

    def stripes_of(number: int) -> Stripes:
        if number not in stripes:
            shares = {
                name: Share(
                    partial(_Pieces, loans, address[name]),
                    name in step.parts,
                    name in step.parity,
                    step.hosts[name] == host,
                )
                for name in placement.groups[number].names & address.keys()
            }
            stripes[number] = Stripes(placement.groups[number], shares)
        return stripes[number]

    for writer, (size, start) in extents.items():
        name, base, _ = step.layout.ranks[writer % len(step.layout.ranks)]
        direct = here.get(writer)
        if direct is None and name in step.parts and name in address:
            direct = RemotePack(writer, size, address[name], loans)
        number = placement.group_of(name)
        if placement.groups[number].parity:
            packs[writer] = SharedPack(size, name, base + start, stripes_of(number), direct)
        elif direct is not None:
            packs[writer] = direct
        else:
            raise NotFoundError(
                f"pack {writer} of step {step.key[1]} was on {name}, which is gone, and is not protected"
            )
    return packs, list(stripes.values())
