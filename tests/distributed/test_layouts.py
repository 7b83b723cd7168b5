"""Every layout saved is every layout loaded, bit for bit; the oracle is torch's own gather of content known by name."""

from __future__ import annotations

from pathlib import Path

import models
import pytest
import torch
from pool import Pool

import ckpt

LAYOUTS = [("single", 1), ("ddp", 2), ("fsdp", 4), ("fsdp", 3), ("hsdp", 4), ("tp", 2), ("fsdp_tp", 4)]


def _save(rank: int, world: int, run: str, layout: str, salt: int) -> ckpt.saving.SaveReport:
    model = models.build(layout, rank, world)
    optimizer = models.train_once(model)
    models.fill(model, optimizer, salt)
    for group in optimizer.param_groups:
        group["lr"] = 0.125
    return ckpt.save({"model": model, "optimizer": optimizer}, run, step=salt)


def _load(rank: int, world: int, run: str, layouts: list[str], salts: list[int]) -> None:
    for layout in layouts:
        for salt in salts:
            model = models.build(layout, rank, world)
            optimizer = torch.optim.AdamW([{"params": [p]} for p in model.parameters()])
            report = ckpt.load({"model": model, "optimizer": optimizer}, f"{run}@{salt}")
            assert report.step == salt
            assert models.check(model, optimizer, salt) > 30
            assert {g["lr"] for g in optimizer.param_groups} == {0.125}
            assert {g["weight_decay"] for g in optimizer.param_groups} == {0.1, 0.0}
            inner = model.module if layout == "ddp" else model
            assert inner.head.weight is inner.embed.weight


@pytest.fixture(scope="module")
def run(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts") / "run"
    for salt, (layout, world) in enumerate(LAYOUTS):
        reports = pool.run(_save, str(folder), layout, salt, world=world)
        assert len({r.ref for r in reports}) == 1
        assert not reports[0].per_rank
    return folder


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_layout_loads_on_every_other(pool: Pool, run: Path, world: int) -> None:
    layouts = [name for name, w in LAYOUTS if w == world]
    if world == 2:
        layouts.append("fsdp")
    pool.run(_load, str(run), layouts, list(range(len(LAYOUTS))), world=world)


def test_the_stored_bytes_do_not_depend_on_who_holds_them(run: Path) -> None:
    """Copies are stored once on every layout, and each checkpoint is whole."""
    sizes = set()
    for salt in range(len(LAYOUTS)):
        with ckpt.open(f"{run}@{salt}") as c:
            assert c.verify().ok
            sizes.add(sum(t.nbytes for t in c.manifest.tensors))
            for name in ("model.embed.weight", "model.blocks.1.down.weight", "model.odd"):
                t = c.tensors[name]
                assert torch.equal(t[...], models.content(name.removeprefix("model."), t.shape, salt))
            assert c.manifest.aliases == {"model.head.weight": "model.embed.weight"}
    assert len(sizes) == 1
