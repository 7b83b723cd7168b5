"""Pieces declared by hand, FSDP1's flat ranges, values per rank, and what must be refused."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from pool import Pool
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import ckpt
from ckpt.format.layout import Cut, Layout, Part, local_shape, pieces

FULL = torch.arange(7 * 10, dtype=torch.float32).reshape(7, 10)


def _hand_save(rank: int, world: int, run: str) -> None:
    """Tensor parallel by columns, a flat range, a pipeline stage and an expert of one's own, all by hand."""
    flat = FULL.reshape(-1)
    cut = [0, 13, 13, 44, 70]  # an empty piece, and ranges that begin and end inside rows
    state = {
        "tp": ckpt.Shard(FULL[:, rank * 3 : rank * 3 + (1 if rank == 3 else 3)], (7, 10), (0, rank * 3)),
        "flat": ckpt.Shard(flat[cut[rank] : cut[rank + 1]].clone(), (7, 10), flat_range=(cut[rank], cut[rank + 1])),
        "copy": ckpt.Shard(
            FULL[(rank // 2) * 4 : (rank // 2) * 4 + 4], (7, 10), ((rank // 2) * 4, 0), replica=rank % 2
        ),
        f"layers.{rank}.weight": torch.full((3,), float(rank)),
        f"experts.{rank}": {"w": torch.full((2, 2), 10.0 + rank)},
    }
    ckpt.save(state, run)


def _hand_load(rank: int, world: int, run: str) -> None:
    half = slice(0, 4) if rank == 0 else slice(4, 7)
    state = {
        "tp": ckpt.Shard(torch.zeros(FULL[half].shape), (7, 10), (half.start, 0)),
        "flat": torch.zeros(7, 10),
        "copy": torch.zeros(10, 7).t(),  # not contiguous
        **{f"layers.{i}.weight": torch.zeros(3) for i in range(rank * 2, rank * 2 + 2)},
        **{f"experts.{i}": {"w": torch.zeros(2, 2)} for i in range(4)},
    }
    ckpt.load(state, run)
    assert torch.equal(state["tp"].tensor, FULL[half])
    assert torch.equal(state["flat"], FULL)
    assert torch.equal(state["copy"], FULL)
    assert all(state[f"layers.{i}.weight"].eq(i).all() for i in range(rank * 2, rank * 2 + 2))
    assert all(state[f"experts.{i}"]["w"].eq(10 + i).all() for i in range(4))


def test_pieces_by_hand(pool: Pool, tmp_path: Path) -> None:
    pool.run(_hand_save, str(tmp_path / "run"))
    pool.run(_hand_load, str(tmp_path / "run"), world=2)


PLACEMENTS = [
    (Shard(0), Shard(1)),
    (Shard(1), Shard(1)),
    (Shard(0), Shard(0)),
    (_StridedShard(0, split_factor=2), Shard(0)),
    (_StridedShard(1, split_factor=2), Shard(1)),
    (Replicate(), Shard(0)),
    (Shard(1), Replicate()),
    (Replicate(), Replicate()),
]
SHAPES = [(7, 10), (1, 3), (8, 8), (0, 5), (3, 4)]


def _dtensors(mesh: object, zero: bool) -> dict[str, DTensor]:
    out = {}
    for i, placements in enumerate(PLACEMENTS):
        for shape in SHAPES:
            full = torch.arange(shape[0] * shape[1], dtype=torch.float32).reshape(shape) + 100 * i
            d = distribute_tensor(full, mesh, placements, src_data_rank=None)
            if zero:
                d.to_local().zero_()
            out[f"{i}.{shape[0]}x{shape[1]}"] = d
    return out


def _placements_save(rank: int, world: int, run: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    ckpt.save({"t": _dtensors(mesh, False)}, run)
    state = {"t": _dtensors(mesh, True)}
    ckpt.load(state, run)
    for name, d in _dtensors(mesh, False).items():
        assert torch.equal(state["t"][name].to_local(), d.to_local()), name


def test_every_placement_is_what_torch_says_it_is(pool: Pool, tmp_path: Path) -> None:
    pool.run(_placements_save, str(tmp_path / "run"))
    with ckpt.open(tmp_path / "run") as c:
        assert c.verify().ok
        for i in range(len(PLACEMENTS)):
            for a, b in SHAPES:
                expected = torch.arange(a * b, dtype=torch.float32).reshape(a, b) + 100 * i
                assert torch.equal(c.tensors[f"t.{i}.{a}x{b}"][...], expected), (i, a, b)


def _fsdp1(rank: int, world: int, run: str, original: bool, step: int) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3))
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3))
    model = FSDP(inner, use_orig_params=original, device_id=torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    plain = torch.optim.AdamW(reference.parameters(), lr=0.1)
    batch = torch.linspace(-1, 1, 20).reshape(4, 5)
    for m, o in ((model, optimizer), (reference, plain)):
        m(batch).square().sum().backward()
        o.step()
        o.zero_grad()
    ckpt.save({"model": model, "optimizer": optimizer}, run, step=step)
    before = [p.detach().clone() for p in model.parameters()]
    moments = [v.clone() for s in optimizer.state.values() for v in s.values() if v.dim()]
    with torch.no_grad():
        for t in [*model.parameters(), *(v for s in optimizer.state.values() for v in s.values())]:
            t.zero_()
    ckpt.load({"model": model, "optimizer": optimizer}, f"{run}@{step}")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    after = [v for s in optimizer.state.values() for v in s.values() if v.dim()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))
    # The same names and shapes as the unsharded model: it loads into that one, too.
    fresh = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3))
    fresh_optimizer = torch.optim.AdamW(fresh.parameters(), lr=1.0)
    ckpt.load({"model": fresh, "optimizer": fresh_optimizer}, f"{run}@{step}")
    for p, q in zip(fresh.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q)
        torch.testing.assert_close(fresh_optimizer.state[p]["exp_avg"], plain.state[q]["exp_avg"])
        assert fresh_optimizer.state[p]["step"] == 1
    assert fresh_optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("original", [True, False])
def test_fsdp1_flat_parameters(pool: Pool, tmp_path: Path, original: bool) -> None:
    pool.run(_fsdp1, str(tmp_path / "run"), original, 3, world=2)


def _values(rank: int, world: int, run: str) -> list[float]:
    random.seed(rank)
    np.random.seed(rank)
    torch.manual_seed(rank)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    state = {
        "rng": ckpt.RNG(),
        "same": {"epoch": 3},
        "drifted": rank,
        "mine": ckpt.PerRank({"position": 10 * rank}),
        "group": ckpt.PerCoordinate(f"dp{mesh.get_local_rank('dp')}", mesh, ("dp",)),
        "noise": torch.rand(3),
    }
    report = ckpt.save(state, run)
    assert set(report.per_rank) == {"drifted", "noise"}
    expected = [random.random(), float(np.random.rand()), float(torch.rand(()))]
    random.seed(99)
    back = {
        "rng": ckpt.RNG(),
        "same": {"epoch": 0},
        "drifted": None,
        "mine": ckpt.PerRank(None),
        "group": ckpt.PerCoordinate(None, mesh, ("dp",)),
        "noise": torch.zeros(3),
    }
    ckpt.load(back, run)
    assert [random.random(), float(np.random.rand()), float(torch.rand(()))] == expected
    assert back["same"]["epoch"] == 3
    assert back["drifted"] == rank
    assert back["mine"].value == {"position": 10 * rank}
    assert back["group"].value == f"dp{rank // 2}"
    torch.manual_seed(rank)
    assert torch.equal(back["noise"], state["noise"])
    return expected


def _values_elsewhere(rank: int, world: int, run: str) -> tuple[list[float], list[str]]:
    state = {"rng": ckpt.RNG(), "mine": ckpt.PerRank(None)}
    report = ckpt.load(state, run)
    assert state["mine"].value == {"position": 10 * (rank % 4)}
    return [random.random(), float(np.random.rand()), float(torch.rand(()))], list(report.notes)


def test_values_per_rank_and_what_another_world_gets(pool: Pool, tmp_path: Path) -> None:
    drawn = pool.run(_values, str(tmp_path / "run"))
    assert len({tuple(d) for d in drawn}) == 4, "every rank has random numbers of its own"
    elsewhere = pool.run(_values_elsewhere, str(tmp_path / "run"), world=2)
    assert [e[0] for e in elsewhere] == drawn[:2]
    assert all("stored per rank for 4 ranks" in " ".join(e[1]) for e in elsewhere)


def _refused(rank: int, world: int, run: str) -> list[str]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage = mesh["dp"]
    clash = distribute_tensor(torch.full((4,), float(mesh.get_local_rank("pp"))), stage, [Shard(0)])
    bad = {
        "two stages under one name": {"layers.0.weight": clash},
        "a hole": {"w": ckpt.Shard(torch.zeros(2), (9,), (rank * 2,))},
        "an overlap": {"w": ckpt.Shard(torch.zeros(3), (9,), (rank * 2,))},
        "an undeclared copy": {"w": ckpt.Shard(torch.zeros(9), (9,), (0,))},
        "other shapes": {"w": ckpt.Shard(torch.zeros(2), (8 + rank % 2,), (rank * 2,))},
        "not replicated": {"x": ckpt.Replicated(rank)},
        "a pending sum": {"w": DTensor.from_local(torch.ones(2), mesh, [Replicate(), _partial()])},
        "one rank raises": {"x": object() if rank == 2 else 1},
    }
    out = []
    for name, state in bad.items():
        with pytest.raises(ckpt.CkptError) as e:
            ckpt.save(state, f"{run}-{name}")
        out.append(f"{name}: {e.value.kind}: {e.value}")
    good = ckpt.save({"w": ckpt.Shard(torch.zeros(2), (8,), (rank * 2,))}, f"{run}-good")
    assert good.bytes
    return out


def _partial() -> object:
    from torch.distributed.tensor import Partial

    return Partial()


def test_contradictions_are_refused_by_name_on_every_rank(pool: Pool, tmp_path: Path) -> None:
    said = pool.run(_refused, str(tmp_path / "run"))
    assert said[0] == said[1] == said[2] == said[3]
    for line, word in zip(
        said[0],
        [
            "layers.0.weight",
            "8 of 9 elements",
            "overlapping",
            "replica=1",
            "give different tensors",
            "'x'",
            "placement",
            "rank 2: x",
        ],
        strict=True,
    ):
        assert word in line, line
    assert not [p for p in tmp_path.glob("run-*/*/commit.json") if "good" not in str(p)]


def _tied_stages(rank: int, world: int, run: str) -> None:
    """The same values on two meshes are copies: content decides, and the plan is reused while it holds."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    for step in range(3):
        embed = distribute_tensor(torch.arange(6.0) + step, mesh["dp"], [Shard(0)])
        ckpt.save({"embed": embed}, run, step=step)
    with ckpt.open(run) as c:
        assert torch.equal(c.tensors["embed"][...], torch.arange(6.0) + 2)


def test_equal_content_on_two_meshes_is_one_tensor(pool: Pool, tmp_path: Path) -> None:
    pool.run(_tied_stages, str(tmp_path / "run"))


def _balanced(rank: int, world: int, run: str) -> tuple[int, int]:
    mesh = init_device_mesh("cpu", (world,))
    state = {
        "big": distribute_tensor(torch.rand(3000, 1000), mesh, [Replicate()]),
        "wide": distribute_tensor(torch.rand(1, 2_000_000), mesh, [Replicate()]),
        "own": distribute_tensor(torch.rand(400, 100), mesh, [Shard(0)]),
    }
    report = ckpt.save(state, run)
    back = {k: distribute_tensor(torch.zeros(v.shape), mesh, v.placements) for k, v in state.items()}
    ckpt.load(back, run)
    for k, v in state.items():
        assert torch.equal(back[k].to_local(), v.to_local()), k
    return report.bytes_here, report.bytes


def test_copies_are_cut_and_spread(pool: Pool, tmp_path: Path) -> None:
    sizes = pool.run(_balanced, str(tmp_path / "run"))
    assert max(here for here, _ in sizes) <= 1.1 * sizes[0][1] / 4 + 256 * 1024


def _by_layout(rank: int, world: int, run: str) -> None:
    """Fused q, k, v with uneven heads over three ranks, a padded vocabulary, and a norm that all hold."""
    qkv = torch.arange(12 * 4, dtype=torch.float32).reshape(12, 4)
    vocabulary = torch.arange(50 * 2, dtype=torch.float32).reshape(50, 2)
    cuts = {
        2: ((Part(8, (4, 4), "q"), Part(2, (1, 1), "k"), Part(2, (1, 1), "v")), (Part(50, (26, 26), padding=2),)),
        3: (
            (Part(8, (3, 3, 2), "q"), Part(2, (1, 1, 0), "k"), Part(2, (1, 1, 0), "v")),
            (Part(50, (18, 18, 18), padding=4),),
        ),
    }
    fused, padded = cuts[world]
    layouts = {
        "qkv": Layout((12, 4), (Cut(0, "tp", fused),)),
        "vocab": Layout((50, 2), (Cut(0, "tp", padded),)),
        "norm": Layout((3,), (), replicated=("tp",)),
    }
    whole = {"qkv": qkv, "vocab": vocabulary, "norm": torch.ones(3)}
    at = {"tp": rank}
    mine = {}
    for name, layout in layouts.items():
        local = torch.full(local_shape(layout, at), -1.0)
        for box, there in pieces(layout, at):
            local[box.slices] = whole[name][there.slices]
        mine[name] = local
    state = {n: ckpt.ByLayout(mine[n].clone(), layouts[n], at) for n in layouts}
    if world == 3:
        ckpt.save(state, run)
    back = {n: ckpt.ByLayout(torch.full_like(mine[n], -1.0), layouts[n], at) for n in layouts}
    ckpt.load(back, run)
    for name in layouts:
        assert torch.equal(back[name].tensor, mine[name]), name


def test_layouts_with_parts_padding_and_copies(pool: Pool, tmp_path: Path) -> None:
    pool.run(_by_layout, str(tmp_path / "run"), world=3)
    pool.run(_by_layout, str(tmp_path / "run"), world=2)
    with ckpt.open(tmp_path / "run") as c:
        assert torch.equal(c.tensors["qkv"][...], torch.arange(48.0).reshape(12, 4))
        assert torch.equal(c.tensors["vocab"][...], torch.arange(100.0).reshape(50, 2))
        assert Layout.from_json(c.manifest.tensors[c.manifest.index("vocab")].layout).cuts[0].parts[0].padding == 4
