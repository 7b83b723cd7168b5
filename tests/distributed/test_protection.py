"""Real keepers of several hosts protect steps: every byte of parity, whatever happens on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet import Fleet

from ckpt.config import ErasureCode, Replicas

MIB = 1 << 20
Made = Callable[..., Fleet]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Made]:
    log = tmp_path / "keepers.txt"
    monkeypatch.setenv("CKPT_KEEPER_LOG", str(log))
    fleets: list[Fleet] = []

    def make(sizes: Any, redundancy: Any, **more: Any) -> Fleet:
        fleet = Fleet(str(tmp_path / "run"), sizes, redundancy, **more)
        fleets.append(fleet)
        return fleet

    try:
        yield make
        assert "Traceback" not in log.read_text(), log.read_text()[-3000:]
    except BaseException as e:
        e.add_note(log.read_text()[-3000:] if log.exists() else "no log")
        raise
    finally:
        for fleet in fleets:
            fleet.close()


def hosts(count: int, *nbytes: int) -> dict[str, int]:
    return {f"h{n}": (nbytes or (3 * MIB,))[n % len(nbytes or (1,))] for n in range(count)}


@pytest.mark.parametrize(
    ("count", "redundancy"), [(6, ErasureCode(4, 2)), (3, Replicas(2)), (3, ErasureCode(2, 1))], ids=str
)
def test_every_byte_of_parity(made: Made, count: int, redundancy: Any) -> None:
    """Of hosts with segments of different sizes; in the first step and in one that reuses slots and areas."""
    fleet = made(hosts(count, 3 * MIB, MIB + 12345, 5 * MIB), redundancy)
    fleet.attach(sorted(fleet.sizes))
    assert all(not a.head.keys() & {"error", "why"} for a in fleet.begin(1))
    fleet.announced(4)
    key = fleet.rest()
    placement = fleet.check(key)
    [group] = placement.groups
    assert len(group.hosts) == count and key[1] >= 4
