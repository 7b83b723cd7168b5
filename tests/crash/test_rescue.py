"""Jobs that lose hosts and are never restarted: the keepers that are left decode the newest step, and it is in storage."""

from __future__ import annotations

from pathlib import Path

import pytest
from forks import Fresh
from hosts import Cluster, flip
from keepers import check_stored, scene, seen, until
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
