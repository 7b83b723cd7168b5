"""A rank's slots: those of a plan are made, those that nobody uses any more are given back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ckpt.errors import CapacityError
from ckpt.snapshot import arena
from ckpt.snapshot.arena import Slot, rounded
from ckpt.snapshot.device import pin

__all__ = ["drop", "missing", "refuse", "reserve"]

Slots = dict[int, Slot]
"""By number, as a `Member` has them."""


def missing(slots: Mapping[int, Slot], numbers: Sequence[int]) -> list[int]:
    """Those of a plan that are not there."""
    return [n for n in numbers if n not in slots]


def refuse(count: int, size: int) -> None:
    """Raises CapacityError if so many slots of `size` bytes plainly do not fit into the memory of this host."""
    room = arena.available_memory()
    if room is not None and count * rounded(size) > room:
        raise CapacityError(
            f"{count} slots of {size / 2**20:.0f} MiB are needed for snapshots, and this host has {room / 2**20:.0f} MiB "
            "of memory left; free some, or save synchronously with ckpt.save"
        )


def reserve(slots: Slots, numbers: Sequence[int], size: int, rank: int) -> list[int]:
    """Makes the slots that are not there, of `size` bytes; gives back those that are not in `numbers`. Returns the new ones.
    Raises CapacityError; what was made for it is given back then."""
    drop(slots, [n for n in slots if n not in numbers])
    new = missing(slots, numbers)
    try:
        for number in new:
            slots[number] = Slot(size, f"ckpt-{rank}-{number}")
            pin(slots[number].buffer)
    except BaseException:
        drop(slots, new)
        raise
    return new


def drop(slots: Slots, numbers: Sequence[int]) -> None:
    """Gives back slots. Of those that are in use the keeper must know, and it must know every slot that counts as there."""
    for number in numbers:
        slot = slots.pop(number, None)
        if slot is not None:
            slot.close()
