"""Hosts are lost, and the job goes on from the memory of the others: with real keepers, in network namespaces.

What tensors hold is a function of the step (`keepers.content`), so every restored byte is compared with what it must be.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forks import Fresh
from hosts import Cluster
from keepers import check_stored, scene, seen

import ckpt
from examples.hosts import Hosts


def _cluster(folder: str, count: int, redundancy: Any, **options: Any) -> tuple[Hosts, Cluster]:
    hosts = Hosts(count)
    return hosts, Cluster(hosts, f"{folder}/run", redundancy, cut=True, **options)


def _two_of_six(folder: str) -> None:
    """Host 0, which leads, and another one, in the middle of training; then two more of the four that are left."""
    with scene(folder) as run, Hosts(6) as hosts:
        job = Cluster(hosts, run, ckpt.ErasureCode(4, 2), cut=True)
        job.life(range(6))
        assert job.restore() == (0, "nothing")
        announced = job.protected(3)
        job.lose(0, 3)
        job.life([4, 1, 5, 2])
        start, source = job.restore()
        assert source == "memory" and announced <= start - 1 <= seen(run, "at")
        announced = job.protected(2)
        job.lose(4, 2)
        job.life([1, 5])
        start, source = job.restore()
        assert source == "memory" and announced <= start - 1 <= seen(run, "at")
        job.protected()
        report = job.finish()
        check_stored(run, report["last_step"], world=2, cut=True)


def test_two_of_six_hosts_are_lost_and_then_two_of_four(fresh: Fresh, tmp_path: Path) -> None:
    fresh(_two_of_six, str(tmp_path))
