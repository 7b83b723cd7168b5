"""reshard: what each rank is to hold, and that one process, torchrun and mpiexec write the same bytes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ckpt
from ckpt.collective import Solo, current_group
from ckpt.format.fragment import Box, tiles
from ckpt.format.layout import Cut, Layout, Part
from ckpt.format.manifest import Manifest, Packs
from ckpt.format.pack import TensorSpec
from ckpt.offline.diff import diff
from ckpt.offline.recut import TpRule, plan_ranks
from ckpt.offline.reshard import ORIGIN, ReshardReport, reshard
from ckpt.saving import Planner, Request, save_state


class Threads:
    """Ranks that are threads of this process: a Group as `ckpt.collective` describes it."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.letters: list[bytes | Exception] = [b""] * world
        self.answers: list[bytes] | Exception = []
        self.barrier = threading.Barrier(world, timeout=60)

    def run(self, function: Callable[[Any], Any]) -> list[Any]:
        """`function(group)` on each rank; what each returned or raised."""
        out: list[Any] = [None] * self.world

        def act(rank: int) -> None:
            try:
                out[rank] = function(_Rank(self, rank))
            except BaseException as e:
                out[rank] = e

        threads = [threading.Thread(target=act, args=(r,)) for r in range(self.world)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        return out


class _Rank:
    def __init__(self, all_: Threads, rank: int) -> None:
        self.rank, self.world, self._all = rank, all_.world, all_

    def round(self, name: str, payload: bytes | Exception, decide: Callable[[list[bytes]], Any]) -> bytes:
        job = self._all
        job.letters[self.rank] = payload
        job.barrier.wait()
        if self.rank == 0:
            try:
                for letter in job.letters:
                    if isinstance(letter, Exception):
                        raise letter
                answer = decide([letter for letter in job.letters if isinstance(letter, bytes)])
                job.answers = [answer] * self.world if isinstance(answer, bytes) else list(answer)
            except Exception as e:
                job.answers = e
        job.barrier.wait()
        if isinstance(job.answers, Exception):
            raise job.answers
        return job.answers[self.rank]


# Two query heads of 6 rows, one key head, one value head: what tensor parallelism must not cut across.
FUSED = Layout((16, 10), (Cut(0, "tp", (Part(12, (6, 6), "q"), Part(2, (1, 1), "k"), Part(2, (1, 1), "v"))),))


class Net(torch.nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = torch.nn.Embedding(301, 64)
        self.up = torch.nn.Linear(64, 130)
        self.down = torch.nn.Linear(130, 64)
        self.odd = torch.nn.Parameter(torch.randn(5, 3, 7).to(torch.bfloat16))
        self.head = torch.nn.Linear(64, 301, bias=False)
        self.head.weight = self.embed.weight


def state(seed: int, rank: int = 0) -> dict[str, Any]:
    model = Net(seed)
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.rand_like(p)
    optimizer.step()
    fused = torch.rand(16, 10, generator=torch.Generator().manual_seed(seed))
    rest = {
        "fused": ckpt.Shard(fused, (16, 10), offset=(0, 0), replica=rank, layout=FUSED.to_json()),
        "own": torch.full((3, 2), seed + 10.0 * rank),
        "empty": torch.zeros(0, 4),
        "big": torch.rand(1 << 19, 3, generator=torch.Generator().manual_seed(seed)),
        "epoch": seed,
        "rng": ckpt.PerRank([seed, rank]),
    }
    return {"model": model, "optimizer": optimizer, **rest}


RANKS = 6
OPTIONS = ["--ranks", "6", "--tp", "2", "--tp-rule", "*.up.*=0", "--tp-rule", "*.down.weight*=1"]


@pytest.fixture(scope="module")
def quick() -> Iterator[Path]:
    """A folder in memory where there is one: syncing to a busy disk is not what is tested here."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) and shutil.disk_usage("/dev/shm").free > 1 << 30 else None
    with tempfile.TemporaryDirectory(prefix="ckpt-test-", dir=memory) as made:
        yield Path(made)


@pytest.fixture
def folder(quick: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=quick) as made:
        yield Path(made)


@pytest.fixture(scope="module")
def source(quick: Path) -> Path:
    """A step saved by two ranks, with copies, per-rank values, an alias and a codec. About 10 MB."""
    run = quick / "source"
    made = [state(1, rank) for rank in range(2)]
    codecs = ckpt.format.codec.parse_codecs({"*.exp_avg": "zstd"})
    backend = ckpt.backends.LocalBackend(str(run))

    def save(group: Any) -> Any:
        return save_state(Request(backend, 5, 0, {"loss": 0.5}, codecs), made[group.rank], group, Planner())

    for result in Threads(2).run(save):
        assert not isinstance(result, BaseException), result
    return run


def content(run: Path) -> dict[str, bytes]:
    """Every file of a run by its path; of those that name time and writer, the rest of what they say."""
    out = {}
    for p in sorted(run.rglob("*")):
        if p.name.endswith(".json"):
            said = json.loads(p.read_text())
            out[str(p.relative_to(run))] = repr(
                {k: v for k, v in said.items() if k not in ("time", "writer", "crc32c")}
            ).encode()
        elif p.is_file():
            out[str(p.relative_to(run))] = p.read_bytes()
    return out


def rewrite(source: Path, dst: Path, group: Any) -> ReshardReport:
    rules = [TpRule("*.up.*", 0), TpRule("*.down.weight*", 1)]
    return reshard(source, dst, ranks=RANKS, tp=2, rules=rules, group=group)


@pytest.fixture(scope="module")
def alone(source: Path, quick: Path) -> Path:
    dst = quick / "alone"
    assert isinstance(current_group(), Solo)
    report = rewrite(source, dst, current_group())
    assert (report.packs, report.ranks, report.step, report.generation) == (RANKS, RANKS, 5, 0)
    assert report.bytes == sum(p.stat().st_size for p in dst.rglob("rank-*.safetensors"))
    return dst


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CKPT_BUFFER_MIB": "2", "CKPT_DEADLINE": "100"}


def test_under_torchrun_the_bytes_are_the_same(source: Path, alone: Path, folder: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ckpt.cli"]
    command = [sys.executable, *launch, "reshard", str(source), str(folder / "run"), *OPTIONS, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["packs"] == RANKS  # one document, from one of the two
    assert content(folder / "run") == content(alone)


@pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="needs the mpi extra")
def test_under_mpiexec_the_bytes_are_the_same(source: Path, alone: Path, folder: Path) -> None:
    mpiexec = Path(sys.executable).with_name("mpiexec")
    if not mpiexec.exists():
        pytest.skip("needs mpiexec beside this python")
    command = [str(mpiexec), "-n", "2", sys.executable, "-m", "ckpt.cli", "reshard", str(source)]

    def run(dst: str) -> subprocess.CompletedProcess[str]:
        whole = [*command, dst, *OPTIONS, "--json"]
        return subprocess.run(whole, capture_output=True, text=True, timeout=200, env=environment(), check=False)

    done = run(str(folder / "run"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["packs"] == RANKS
    assert content(folder / "run") == content(alone)
    again = run(str(folder / "run"))
    assert again.returncode == 4
    assert json.loads(again.stdout)["error"]["kind"] == "conflict"


@pytest.mark.parametrize("world", [2, 3, 7])
def test_with_any_number_of_processes_the_bytes_are_the_same(
    source: Path, alone: Path, folder: Path, world: int
) -> None:
    results = Threads(world).run(lambda group: rewrite(source, folder / "run", group))
    assert all(isinstance(r, ReshardReport) for r in results), results
    assert content(folder / "run") == content(alone)


def test_nothing_but_the_fragments_changed(source: Path, alone: Path) -> None:
    with ckpt.open(source) as a, ckpt.open(alone) as b:
        assert b.verify().ok
        found = diff(a, b)
        assert found.same, [t for t in found.tensors if t.status != "identical"]
        assert (len(b.manifest.packs), b.manifest.world, b.step, b.metrics) == (RANKS, RANKS, 5, {"loss": 0.5})
        assert b.manifest.tensors == a.manifest.tensors
        assert b.manifest.aliases == a.manifest.aliases == {"model.head.weight": "model.embed.weight"}
        assert a.manifest.codecs == b.manifest.codecs
        assert b.manifest.has_variants == {"own": ["rank=0", "rank=1"]}
        origin = b.objects[ORIGIN]
        assert (origin["step"], origin["world"], origin["packs"]) == (5, 2, 2)
        assert set(b.objects) - set(a.objects) == {ORIGIN}


def test_the_result_loads(alone: Path) -> None:
    wanted, target = state(1), state(2)
    ckpt.load(target, alone)
    for (name, a), b in zip(wanted["model"].state_dict().items(), target["model"].state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(wanted["optimizer"].state.values(), target["optimizer"].state.values(), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert torch.equal(wanted["big"], target["big"])
    assert torch.equal(wanted["own"], target["own"])
    assert (target["epoch"], target["rng"].value) == (1, [1, 0])


def test_resharding_back_gives_the_same_again(alone: Path, folder: Path) -> None:
    reshard(alone, folder / "one", ranks=1, group=Solo(), step=9)
    reshard(folder / "one", folder / "six", ranks=RANKS, group=Solo(), step=5)
    with ckpt.open(folder / "one") as one, ckpt.open(alone) as there, ckpt.open(folder / "six") as back:
        assert one.step == 9
        assert diff(one, there).same
        assert diff(back, there).same
        assert back.objects[ORIGIN]["step"] == 9
        assert len(one.manifest.packs) == 1


# What each rank holds.


def held(c: ckpt.Checkpoint, name: str) -> dict[int, list[Box]]:
    m = c.manifest
    t = m.by_key[name]
    out: dict[int, list[Box]] = {}
    for row, box in zip(range(int(m.start[t]), int(m.start[t + 1])), m.boxes(t).tolist(), strict=True):
        out.setdefault(int(m.packs.writer[m.pack[row]]), []).append(Box(tuple(box[0]), tuple(box[1])))
    return out


def test_tensors_are_cut_over_tp_then_over_data_ranks(alone: Path) -> None:
    with ckpt.open(alone) as c:
        # Rule, dimension 0 of 130 rows: 65 a tensor-parallel rank, of them 22, 22, 21.
        assert [held(c, "model.up.bias")[r] for r in range(6)] == [
            [Box((a,), (n,))] for a, n in ((0, 22), (65, 22), (22, 22), (87, 22), (44, 21), (109, 21))
        ]
        # Rule, dimension 1 of 130 columns; rows 64 over 3: 22, 22, 20. Optimizer state alike.
        for name in ("model.down.weight", "optimizer.state.down.weight.exp_avg"):
            assert held(c, name)[5] == [Box((44, 65), (20, 65))]
        # Recorded layout: each of q, k, v is cut by itself; 8 rows a rank, of them 3, 3, 2.
        assert held(c, "fused") == {
            0: [Box((0, 0), (3, 10))],
            1: [Box((6, 0), (3, 10))],
            2: [Box((3, 0), (3, 10))],
            3: [Box((9, 0), (3, 10))],
            4: [Box((12, 0), (1, 10)), Box((14, 0), (1, 10))],
            5: [Box((13, 0), (1, 10)), Box((15, 0), (1, 10))],
        }
        # No axis: rows over 3 data ranks, each part held by one of two.
        parts = held(c, "big")
        assert len(parts) == 3
        assert {r // 2 for r in parts} == {0, 1, 2}
        assert sum(b.numel for boxes in parts.values() for b in boxes) == 3 << 19
        assert held(c, "empty") == {}


def manifest_of(*specs: TensorSpec) -> Manifest:
    none = np.empty(0, np.uint64)
    packs = Packs(*(none.astype(t) for t in ("u4", "u8", "u8", "u4", "u8", "u4", "u1", "u4")))
    start = np.zeros(len(specs) + 1, np.int64)
    few = none.astype(np.uint32)
    return Manifest(1, 0, "a0", 1, specs, (), (), packs, start, few, none, none, few, few, None)


shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)


@given(
    st.lists(st.tuples(shapes, st.sampled_from(["float32", "uint8", "complex128"])), max_size=6),
    st.integers(1, 4),
    st.integers(1, 4),
    st.lists(st.builds(TpRule, st.sampled_from(["t*", "t0", "*1"]), st.integers(0, 2)), max_size=2),
)
def test_every_element_is_held_once_whatever_the_rules(
    tensors: list[tuple[tuple[int, ...], str]], data: int, tp: int, rules: list[TpRule]
) -> None:
    specs = [TensorSpec(f"t{i}", kind, shape) for i, (shape, kind) in enumerate(tensors)]
    try:
        plan = plan_ranks(manifest_of(*specs), data * tp, tp, rules)
    except ckpt.UsageError:
        return  # a rule that fits nothing
    assert (np.diff(plan.rank) >= 0).all()
    assert plan.rank.min(initial=0) >= 0
    assert plan.rank.max(initial=0) < data * tp
    for t, spec in enumerate(specs):
        box = plan.box[plan.tensor == t][:, :, : len(spec.shape)]
        assert (box[:, 1] > 0).all()
        if 0 not in spec.shape:
            assert tiles(spec.shape, box[:, 0], box[:, 1])


@pytest.mark.parametrize("layout", ["not JSON", '{"version":1,"shape":[4]}', FUSED.to_json()])
def test_a_recorded_layout_that_does_not_fit_is_no_axis(layout: str) -> None:
    plan = plan_ranks(manifest_of(TensorSpec("t", "float32", (8, 4), "", layout)), 2, 2)
    assert plan.box.tolist() == [[[0, 0], [8, 4]]]


def test_equal_tensors_without_an_axis_are_spread() -> None:
    specs = [TensorSpec(f"t{i}", "float32", (8, 4)) for i in range(8)] + [
        TensorSpec(f"s{i}", "int64", ()) for i in range(8)
    ]
    plan = plan_ranks(manifest_of(*specs), 4, 4)
    assert plan.nbytes(4).tolist() == [2 * 128 + 2 * 8] * 4


# Failure.


def nothing_left(run: Path) -> bool:
    return not [p for p in run.rglob("*") if p.is_file()]


@pytest.mark.parametrize("world", [1, 2])
def test_damage_in_the_source_is_found_and_publishes_nothing(source: Path, folder: Path, world: int) -> None:
    shutil.copytree(source, folder / "src")
    pack = folder / "src/step-00000005.g0000/a0/rank-00001.safetensors"
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 4
    pack.write_bytes(data)
    for result in Threads(world).run(lambda group: rewrite(folder / "src", folder / "dst", group)):
        assert isinstance(result, ckpt.IntegrityError), result
    assert nothing_left(folder / "dst")


def test_a_process_that_fails_fails_all(source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ckpt.offline.rewrite as module

    def refuse(backend: Any, path: str, *rest: Any) -> Any:
        if "rank-00001" in path:
            raise ckpt.StorageError("writing rank-00001: no space left")
        return original(backend, path, *rest)

    original = module.write_pack
    monkeypatch.setattr(module, "write_pack", refuse)
    for result in Threads(2).run(lambda group: rewrite(source, folder / "dst", group)):
        assert isinstance(result, ckpt.StorageError), result
    assert nothing_left(folder / "dst")


def test_ranks_that_hold_nothing_have_no_pack(folder: Path) -> None:
    ckpt.save({"n": 1}, folder / "none")
    ckpt.save({"x": torch.arange(3), "s": torch.tensor(1.0)}, folder / "few")
    for name, packs in (("none", 0), ("few", 4)):
        report = reshard(folder / name, folder / f"{name}-out", ranks=5, group=Solo())
        assert (report.packs, report.ranks) == (packs, 5)
        with ckpt.open(folder / name) as a, ckpt.open(folder / f"{name}-out") as b:
            assert diff(a, b).same
            assert b.manifest.world == 5


def test_it_goes_into_the_newest_generation(source: Path, folder: Path) -> None:
    with ckpt.Checkpointer(folder / "run", {"x": torch.zeros(1)}, storage=ckpt.Every(1)) as cp:
        cp.restore()
        cp.step(0)
    report = reshard(source, folder / "run", ranks=2, group=Solo())
    assert (report.generation, report.step) == (1, 5)
    with ckpt.open(folder / "run") as c:
        assert c.step == 5
