"""On an object store a load with `exchange=True` fetches what its ranks need once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from proxy import proxy

import ckpt
from ckpt.backends import backend_for
from ckpt.loading import LoadReport, load_ref
from ckpt.saving import Planner, Request, save_state
from ckpt.targets import LoadOptions
from tests.distributed.test_reshard_cli import Threads

ROWS, WIDE = 8, 1 << 20


def _part(rank: int, world: int, factor: int) -> dict[str, Any]:
    """Rows by rank, and what all of them have: 64 MiB in all. Zeros with `factor` 0."""
    rows = torch.arange(rank * ROWS // world, (rank + 1) * ROWS // world).repeat_interleave(WIDE).view(-1, WIDE)
    everywhere = torch.arange(8 << 20, dtype=torch.int32) * factor
    own = (rows.to(torch.int32) + torch.arange(WIDE, dtype=torch.int32)) * factor
    return {"own": ckpt.Shard(own, (ROWS, WIDE), (rank * ROWS // world, 0)), "everywhere": everywhere}


def _load(url: str, states: list[dict[str, Any]], exchange: bool) -> None:
    options = LoadOptions(exchange=exchange)
    done = Threads(len(states)).run(lambda g: load_ref(states[g.rank], url, options, g))
    assert all(isinstance(d, LoadReport) for d in done), done


@pytest.mark.parametrize("world", [2, 4])
def test_each_byte_is_fetched_once(url: str, server: Any, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 4 ranks to 2, and what is the same on all 4."""
    saved = Threads(4).run(lambda g: save_state(Request(backend_for(url), 1, 0, {}), _part(g.rank, 4, 3), g, Planner()))
    assert all(r.bytes == saved[0].bytes for r in saved)
    with proxy(server.url) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.url)
        fetched = {}
        for exchange in (True, False):
            states = [_part(rank, world, 0) for rank in range(world)]
            between.fetched = 0
            _load(url, states, exchange)
            fetched[exchange] = between.fetched
            for rank, state in enumerate(states):
                wanted = _part(rank, world, 3)
                assert torch.equal(state["own"].tensor, wanted["own"].tensor)
                assert torch.equal(state["everywhere"], wanted["everywhere"])
    assert fetched[True] <= 1.02 * saved[0].bytes
    assert fetched[False] > 1.3 * saved[0].bytes  # what it is worth
