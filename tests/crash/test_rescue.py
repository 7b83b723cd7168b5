"""Jobs that lose hosts and are never restarted: the keepers that are left decode the newest step, and it is in storage."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from forks import Fresh
from hosts import Cluster, flip
from keepers import check_stored, gone, scene, seen, until
from kills import check_listing

import ckpt
from examples.hosts import Hosts


def _never_restarted(folder: str, lost: tuple[int, ...], trouble: str) -> None:
    """Every byte of it is compared with what it must be."""
    with scene(folder) as run, Hosts(4) as hosts:
        job = Cluster(hosts, run, ckpt.ErasureCode(2, 2), cut=True)
        if trouble == "dies":
            of = hosts.environment
            faulty = {1: {"CKPT_FAULT": "kill@rescue pack#3"}}
            hosts.environment = lambda n: {**of(n), **faulty.get(n, {})}  # type: ignore[method-assign]
        job.life(range(4))
        job.restore()
        announced = job.protected(3)
        if trouble == "flips":
            assert flip(job.keeper(1), "ckpt-1-") >= 2
        job.lose(*lost)
        job.stop()
        [step] = until(lambda: Path(run).exists() and check_listing(run), "a step is in storage")
        assert announced <= step <= seen(run, "at")
        check_stored(run, step, world=4, cut=True)


@pytest.mark.parametrize(
    ("lost", "trouble"),
    [((1, 2), ""), ((0, 3), ""), ((0,), "dies"), ((0,), "flips")],
    ids=["two hosts", "two, of which one led", "the first that acts dies, too", "what another holds is damaged"],
)
def test_hosts_are_lost_and_nobody_comes_back(
    fresh: Fresh, tmp_path: Path, lost: tuple[int, ...], trouble: str
) -> None:
    fresh(_never_restarted, str(tmp_path), lost, trouble)


def _lead_replaced(folder: str) -> None:
    with scene(folder) as run, Hosts(4) as hosts:
        job = Cluster(hosts, run, ckpt.ErasureCode(2, 2), cut=True)
        job.life(range(4))
        job.restore()
        job.protected(2)
        pid = job.keeper(0)
        os.kill(pid, signal.SIGKILL)
        gone(pid)
        announced = job.protected(3)
        job.lose(0, 1)
        job.life([2, 3])
        start, source = job.restore()
        assert source == "memory" and announced <= start - 1 <= seen(run, "at")
        job.finish()


def test_the_keeper_that_leads_dies_under_its_trainer(fresh: Fresh, tmp_path: Path) -> None:
    """Its successor learns from the others what is there, and protects what comes, in the same life; two hosts, its own
    among them, may be lost then."""
    fresh(_lead_replaced, str(tmp_path))
