"""Hosts are lost, and the job goes on from the memory of the others: with real keepers, in network namespaces.

What tensors hold is a function of the step (`keepers.content`), so every restored byte is compared with what it must be.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from forks import Fresh
from hosts import Cluster, flip
from keepers import check_stored, scene, seen, together, until

import ckpt
from examples.hosts import Hosts


def _two_of_six(folder: str) -> None:
    """Host 0, which leads, and another one, in the middle of training; then two more of the four that are left."""
    with scene(folder) as run, Hosts(6) as hosts:
        job = Cluster(hosts, run, ckpt.ErasureCode(4, 2), cut=True)
        job.life(range(6))
        assert job.restore() == (0, "nothing")
        announced = job.protected(3)
        job.lose(0, 3)
        job.life([4, 1, 5, 2])
        together(job.ranks, "hold", "recovery reserves")
        start, source = job.restore()
        assert source == "memory" and announced <= start - 1 <= seen(run, "at")
        assert not any(together(job.ranks, "lockstep", 2)), "no slot is there yet; training does not wait for any"
        together(job.ranks, "hold", "")
        announced = job.protected(2)
        assert sum("protected again" in said and "after the restart" in said for said in job.said()) == 1
        job.lose(4, 2)
        job.life([1, 5])
        start, source = job.restore()
        assert source == "memory" and announced <= start - 1 <= seen(run, "at")
        job.protected()
        report = job.finish()
        check_stored(run, report["last_step"], world=2, cut=True)


def test_two_of_six_hosts_are_lost_and_then_two_of_four(fresh: Fresh, tmp_path: Path) -> None:
    fresh(_two_of_six, str(tmp_path))


def _too_many(folder: str) -> None:
    """One host more than there is parity: which, of which step, and why, is said; then storage is read."""
    with scene(folder) as run, Hosts(4) as hosts:
        job = Cluster(hosts, run, ckpt.ErasureCode(3, 1), cut=True)
        job.life(range(4), storage=3)
        job.restore()
        job.protected(4)
        until(lambda: seen(run, "stored") >= 0 or not together(job.ranks, "lockstep", 1), "a step is stored")
        job.lose(0, 2)
        job.life([3, 1])
        start, source = job.restore()
        assert source == "storage" and seen(run, "stored") <= start - 1
        why = "2 of a group of 4 hosts, of which any 1 may be missing, do not have it (gone: h0#"
        lost = [said for said in job.said() if why in said and "generation 1 cannot be had from memory" in said]
        assert lost, job.said()
        job.protected()
        job.finish()


def test_one_host_more_than_there_is_parity(fresh: Fresh, tmp_path: Path) -> None:
    fresh(_too_many, str(tmp_path))


def _spare(folder: str) -> None:
    """Host 0 is lost, and rank 0 is on a spare then, which has never seen the job; later the spare is lost in turn."""
    with scene(folder) as run, Hosts(4) as hosts:
        job = Cluster(hosts, run, ckpt.Replicas(2), cut=True)
        job.life([0, 1, 2])
        job.restore()
        announced = job.protected(2)
        job.lose(0)
        job.life([3, 2, 1])
        start, source = job.restore()
        assert source == "memory" and announced <= start - 1 <= seen(run, "at")
        announced = job.protected(2)
        job.lose(3)
        job.life([1, 2])
        start, source = job.restore()
        assert source == "memory" and announced <= start - 1 <= seen(run, "at")
        job.finish()


def test_a_spare_takes_the_place_of_the_host_that_led(fresh: Fresh, tmp_path: Path) -> None:
    fresh(_spare, str(tmp_path))


def _while_recovering(folder: str, point: str) -> None:
    """A second host is lost while the job recovers from the loss of the first: once a life that was about to begin is given
    up for it, once only its keeper is lost, which has no trainer any more, and the others make up for that as they read."""
    with scene(folder) as run, Hosts(5) as hosts:
        job = Cluster(hosts, run, ckpt.ErasureCode(3, 2), cut=True)
        job.life(range(5))
        job.restore()
        announced = job.protected(2)
        job.lose(0)
        if point:
            job.life([1, 2, 3, 4])
            job.trainers[4]("fault", "kill", point)
            for trainer in job.ranks:
                trainer.tell("restore")
            job.trainers.pop(4).ended()
            job.stop()
            job.lose(4)
        job.life([2, 3, 1])
        if not point:
            together(job.ranks, "fault_of", job.keeper(4), "recovery opened")
        start, source = job.restore()
        assert source == "memory" and announced <= start - 1 <= seen(run, "at")
        job.protected()
        job.finish()


@pytest.mark.parametrize("point", ["recovery chosen", "recovery opened", "recovery reserves", ""])
def test_another_host_is_lost_during_recovery(fresh: Fresh, tmp_path: Path, point: str) -> None:
    fresh(_while_recovering, str(tmp_path), point)


def _partitioned(folder: str) -> str:
    """A host is cut off; the others go on; it comes back, with steps of a life that is over, and takes part again."""
    with scene(folder) as run, Hosts(4) as hosts:
        if hosts.why:
            return hosts.why
        job = Cluster(hosts, run, ckpt.ErasureCode(2, 2), cut=True)
        job.life(range(4))
        job.restore()
        announced = job.protected(2)
        hosts.cut(0)
        job.life([1, 2, 3])
        start, source = job.restore()
        assert source == "memory" and announced <= start - 1 <= seen(run, "at")
        announced = job.protected(3)
        hosts.heal(0)
        job.life([0, 3, 2])
        start, source = job.restore()
        assert source == "memory" and announced <= start - 1 <= seen(run, "at")
        announced = job.protected(2)
        job.lose(2)
        job.life([3, 0])
        start, source = job.restore()
        assert source == "memory" and announced <= start - 1 <= seen(run, "at")
        job.finish()
    return ""


def test_a_host_that_was_cut_off_comes_back(fresh: Fresh, tmp_path: Path) -> None:
    why = fresh(_partitioned, str(tmp_path))
    if why:
        pytest.skip(why)


def _damaged(folder: str, what: str) -> None:
    """What a host holds, or the parity that it keeps, is no longer what it was: it is decoded without it."""
    with scene(folder) as run, Hosts(4) as hosts:
        job = Cluster(hosts, run, ckpt.ErasureCode(2, 2), cut=True)
        job.life(range(4))
        job.restore()
        announced = job.protected(2)
        job.stop()
        if what == "parity":
            job.lose(0)
        assert flip(job.keeper(1), "ckpt-parity" if what == "parity" else "ckpt-1-") >= 2
        job.life([3, 2, 1])
        start, source = job.restore()
        assert source == "memory" and announced <= start - 1 <= seen(run, "at")
        said = [s for s in job.said() if "were not what was written; decoded without" in s]
        assert what == "parity" or said
        job.protected()
        job.finish()


@pytest.mark.parametrize("what", ["slots", "parity"])
def test_damage_is_an_erasure(fresh: Fresh, tmp_path: Path, what: str) -> None:
    fresh(_damaged, str(tmp_path), what)
