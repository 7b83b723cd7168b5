"""Real keepers of several hosts protect steps: every byte of parity, whatever happens on the way."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fleet import Fleet, Trainer, alive, noise, until

import ckpt
from ckpt.backends.local import LocalBackend
from ckpt.catalog import list_run
from ckpt.config import ErasureCode, Replicas
from ckpt.errors import IntegrityError
from ckpt.keeper.groups import Placement
from ckpt.keeper.loan import PARITY, SEGMENT
from ckpt.keeper.shield import host_of
from ckpt.keeper.view import keepers_here
from ckpt.snapshot.arena import rounded

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
    mine = [k for k in keepers_here() if k.run == fleet.run]
    assert [k.host for k in mine] == sorted(fleet.sizes)
    for k in mine:
        assert k.announced == key and k.group == tuple(host_of(h.name) for h in group.hosts) and k.lost == ()
        assert k.code == (group.data, group.parity) and k.parity == 2 * rounded(
            group.shares[k_name(fleet, k.host)].parity_bytes
        )


def k_name(fleet: Fleet, host: str) -> str:
    return fleet.holding(host).inventory.host


def begun(fleet: Fleet, generation: int = 1, start: int = 0, names: list[str] | None = None) -> Fleet:
    fleet.attach(names or sorted(fleet.sizes))
    for answer in fleet.begin(generation, start):
        assert not answer.head.keys() & {"error", "why"}, answer
    return fleet


def covered(fleet: Fleet) -> tuple[int, int]:
    """The newest step that all hosts which are left have encoded in full, with fewer missing than its groups have parity:
    every byte of it is checked."""
    held = [fleet.holding(h) for h in fleet.trainers]
    names = {h.inventory.host for h in held}
    whole = {k: p for h in held for k, p in h.inventory.whole.items()}
    found = []
    for key, placement in whole.items():
        mine = [h.inventory for h in held if h.inventory.host in placement.names]
        if all(any(i.areas[n] is not None and i.areas[n].key == key for n in (0, 1)) for i in mine) and borne(
            placement, names
        ):
            found.append(key)
    assert found, [h.inventory for h in held]
    fleet.check(max(found), [host_of(n) for n in whole[max(found)].names & names])
    return max(found)


def borne(placement: Placement, there: set[str]) -> bool:
    return all(len(g.names - there) <= g.parity for g in placement.groups)


@pytest.mark.parametrize("point", ["started#3", "sending#9", "folding#18", "encoded#3"])
def test_a_host_dies_while_a_step_is_encoded(made: Made, point: str) -> None:
    """What was announced is there in full on those that are left, and stays until their next life has announced a step."""
    fleet = made(hosts(4), ErasureCode(3, 1), own={"h2": {"CKPT_FAULT": f"kill@shield {point}"}})
    begun(fleet)
    until(lambda: not alive(fleet.trainers["h2"].pid), "h2 dies")
    fleet.kill("h2")
    until(lambda: fleet.look("h0")["lost"] == ["h2"], "the seat has noticed")
    last = max(max(t.announced(), default=-1) for t in fleet.trainers.values())
    key = covered(fleet)
    assert key[1] >= last >= 0
    fleet.leave()
    fleet.seal(False)
    begun(fleet, 2, key[1] + 1, ["h0", "h1", "h3"])
    assert covered(fleet) == key, "as long as nothing newer is protected"
    fleet.seal(True)
    fleet.announced(key[1] + 3)
    now = fleet.rest()
    assert now[0] == 2 and len(fleet.check(now).groups[0].hosts) == 3


def test_two_of_six_are_lost_and_a_new_host_leads(made: Made) -> None:
    """The keeper that leads the next life holds nothing, and learns from the others what must stay as it is."""
    fleet = made(hosts(7), ErasureCode(4, 2))
    begun(fleet, names=[f"h{n}" for n in range(6)])
    fleet.announced(2)
    key = fleet.rest()
    fleet.kill("h0")
    fleet.kill("h4")
    fleet.leave()
    begun(fleet, 2, key[1] + 1, ["h6", "h1", "h2", "h3", "h5"])
    assert covered(fleet) == key
    fleet.seal(True)
    fleet.announced(key[1] + 2)
    placement = fleet.check(fleet.rest())
    assert [(len(g.hosts), g.data, g.parity) for g in placement.groups] == [(5, 3, 2)]


def test_a_host_of_each_of_two_groups_is_lost(made: Made) -> None:
    """The one that leads among them; others go on. Then one more, and nobody comes back: what is in storage was decoded."""
    fleet = begun(made(hosts(8, 3 * MIB, MIB + 12345), ErasureCode(3, 1)))
    fleet.announced(2)
    key = fleet.rest()
    groups = fleet.check(key).groups
    assert [(len(g.hosts), g.data, g.parity) for g in groups] == [(4, 3, 1)] * 2
    lost = {"h0", next(host_of(h.name) for g in groups for h in g.hosts if not {x.name[:2] for x in g.hosts} & {"h0"})}
    for host in lost:
        fleet.kill(host)
    fleet.leave()
    begun(fleet, 2, key[1] + 1, [h for h in sorted(fleet.sizes) if h not in lost])
    assert covered(fleet) == key
    fleet.seal(True)
    fleet.announced(key[1] + 2)
    key = fleet.rest()
    fleet.check(key)
    fleet.kill(next(iter(fleet.trainers)))
    fleet.leave()
    until(lambda: Path(fleet.run).exists() and list_run(LocalBackend(fleet.run)).committed, "a step is in storage")
    with ckpt.open(fleet.run) as found:
        assert found.step == key[1]
        for (generation, host), (rank, nbytes, _) in fleet.laid.items():
            if generation == key[0]:
                assert np.array_equal(found.tensors[f"w{rank}"][:], noise(key, rank, nbytes)), host


def test_nothing_moves_while_a_restart_looks_around(made: Made) -> None:
    """Pinned keepers refuse what the seat of before orders; the next life goes on."""
    fleet = begun(made(hosts(3), Replicas(2)))
    fleet.announced(1)
    held = {host: fleet.ask(host, "pin")["holding"] for host in fleet.trainers}
    key = covered(fleet)
    until(lambda: all(t.said("lagging") for t in fleet.trainers.values()), "the trainers hear of it")
    assert covered(fleet) == key
    assert all(fleet.ask(host, "inventory")["holding"]["areas"] == held[host]["areas"] for host in held)
    fleet.leave()
    begun(fleet, 2, 100)
    fleet.announced(102)
    fleet.check(fleet.rest())


def test_damage_in_a_slot_is_not_encoded(made: Made) -> None:
    """The step is not protected, the next one is; and what is damaged later is not given away."""

    def spoil(trainer: Trainer, step: int, slot: Any) -> None:
        if (trainer.host, step) == ("h1", 3):
            slot[1 << 20] ^= 1

    fleet = made(hosts(4), ErasureCode(3, 1))
    fleet.spoil = spoil
    begun(fleet)
    fleet.announced(5)
    key = fleet.rest()
    assert all(3 not in t.announced() for t in fleet.trainers.values())
    fleet.check(key)
    slot = fleet.trainers["h2"].slots[fleet.holding("h2").slots[key]]
    slot.buffer[(1 << 20) + 5] ^= 1
    with pytest.raises(IntegrityError):
        fleet.lent("h2", key, SEGMENT, 1 << 20, 1 << 12)
    assert fleet.lent("h2", key, SEGMENT, 0, 1 << 12) == fleet.segment("h2", key)[: 1 << 12]
    assert fleet.holding("h2").inventory.spoiled == {key}


def test_damage_in_parity_is_not_given_away(made: Made) -> None:
    fleet = begun(made(hosts(3), Replicas(2)))
    fleet.announced(1)
    key = fleet.rest()
    [area] = [n for n, a in enumerate(fleet.holding("h1").inventory.areas) if a is not None and a.key == key]
    fleet.flip_parity("h1", area, (1 << 20) + 77)
    with pytest.raises(IntegrityError):
        fleet.lent("h1", key, PARITY, 1 << 20, 100)
    assert len(fleet.lent("h1", key, PARITY, 0, 100)) == 100
    assert fleet.holding("h1").inventory.spoiled == {key}


def test_a_bit_that_flips_on_the_way(made: Made) -> None:
    """It is noticed, said, and the step is encoded from zero."""
    fleet = made(hosts(4), ErasureCode(3, 1))
    proxy = fleet.between("h1")
    begun(fleet)
    fleet.announced(1)
    proxy.flip = 20
    until(lambda: fleet.trainers["h0"].said("lagging"), "it is said")
    why = fleet.trainers["h0"].said("lagging")[0]["why"]  # of who took it, or of who sent it, whoever is first
    assert "changed on its way" in why or "the connection ended" in why
    now = max(fleet.trainers["h0"].announced())
    fleet.announced(now + 2)
    fleet.check(fleet.rest())


def test_a_keeper_that_is_stopped_for_a_while(made: Made) -> None:
    """Protection waits for it, says so, and goes on when it is back."""
    own = {"h1": {"CKPT_FAULT": "stop@shield folding#18"}}
    fleet = begun(made(hosts(3), Replicas(2), env={"CKPT_PROTECT_PATIENCE": "1"}, own=own))
    until(lambda: fleet.trainers["h0"].said("lagging"), "it is said")
    now = max(fleet.trainers["h0"].announced())
    fleet.check((1, now), ["h0", "h2"])
    fleet.resume("h1")
    fleet.announced(now + 3)
    fleet.check(fleet.rest())


def test_a_keeper_that_is_replaced_under_its_trainer(made: Made) -> None:
    """It comes back without what it kept for others, and so as another host, around which groups are made anew."""
    fleet = begun(made(hosts(3), Replicas(2)))
    now = fleet.announced(1)
    before = fleet.holding("h1").inventory.host
    fleet.replace("h1")
    fleet.announced(now + 4)
    placement = fleet.check(fleet.rest())
    after = fleet.holding("h1").inventory.host
    assert after != before and after in placement.names and before not in placement.names


def test_a_lead_that_is_replaced_under_its_trainer(made: Made) -> None:
    """The next keeper of that host learns from the others what is announced, and protects what comes after."""
    fleet = begun(made(hosts(4), ErasureCode(2, 2)))
    now = fleet.announced(1)
    fleet.replace("h0")
    fleet.announced(now + 4)
    fleet.check(fleet.rest())


def test_a_slow_link(made: Made) -> None:
    """An encoding may take longer than the seconds without a byte after which it begins anew: bytes come all the time."""
    env = {"CKPT_PROTECT_PATIENCE": "1", "CKPT_PROTECT_GBPS": "0.003"}
    fleet = begun(made(hosts(3, 5 * MIB), Replicas(2), env=env))
    fleet.announced(1)
    key = fleet.rest()
    assert not any(t.said("lagging") for t in fleet.trainers.values())
    fleet.check(key)


def test_a_seat_that_is_cut_off_for_a_while(made: Made) -> None:
    """Nothing is protected meanwhile; once the keepers find one another again that goes on in the same life."""
    fleet = made(hosts(3), Replicas(2))
    proxy = fleet.between("h0")
    begun(fleet)
    fleet.announced(1)
    proxy.cut()
    until(lambda: fleet.look("h0")["lost"] == ["h1", "h2"], "the seat has lost sight of the others")
    now = max(fleet.trainers["h0"].announced())
    proxy.heal()
    fleet.announced(now + 3)
    assert fleet.look("h0")["lost"] == []
    fleet.check(fleet.rest())


def test_a_keeper_without_memory_for_parity(made: Made) -> None:
    """Every trainer is to hear of it before training begins; with numbers."""
    fleet = made(hosts(3, 64 * MIB), Replicas(2))
    fleet.attach(sorted(fleet.sizes))
    pages = int(Path(f"/proc/{fleet.trainers['h1'].pid}/statm").read_text().split()[0])
    room = pages * os.sysconf("SC_PAGE_SIZE") + 48 * MIB
    resource.prlimit(fleet.trainers["h1"].pid, resource.RLIMIT_AS, (room, room))
    answers = fleet.begin(1)
    assert [("error" in a.head) for a in answers] == [False, True, False]
    kind, text = answers[1]["error"]
    assert kind == "capacity" and "h1 is to keep parity" in text and "MiB" in text
