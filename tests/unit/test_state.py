"""State -> leaves -> state, in one process: names, aliases, dtypes, views, values, partial and strict loads."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckpt
from ckpt.state import collect

DTYPES = [
    getattr(torch, n)
    for n in [
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint64",
        "uint32",
        "uint16",
        "uint8",
        "bool",
        "complex32",
        "complex64",
        "complex128",
        "float8_e4m3fn",
        "float8_e5m2",
        "float8_e4m3fnuz",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
        "float4_e2m1fn_x2",
    ]
]


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    n = torch.empty(shape, dtype=dtype)
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (n.numel() * n.element_size(),), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


@pytest.mark.parametrize("codec", [None, {"*": "zstd"}])
def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path: Path, codec: Any) -> None:
    state = {
        f"{str(d)[6:]}.{i}": random_bits(s, d)
        for d in DTYPES
        for i, s in enumerate([(), (3,), (0, 4), (2, 3, 5), (300, 700)])
    }
    ckpt.save(state, tmp_path / "run", codec=codec)
    back = {
        k: torch.zeros(v.shape, dtype=torch.uint8).to(v.dtype) if v.dtype == torch.uint8 else torch.empty_like(v)
        for k, v in state.items()
    }
    ckpt.load(back, tmp_path / "run")
    with ckpt.open(tmp_path / "run") as c:
        assert c.verify().ok
        for name, t in state.items():
            assert torch.equal(bits(back[name]), bits(t)), name
            assert torch.equal(bits(c.tensors[name][...]), bits(t)), name


def test_views_of_any_stride_are_saved_and_loaded_in_place(tmp_path: Path) -> None:
    base = torch.rand(600, 500)
    views = {
        "t": base.t(),
        "step": base[::3, ::7],
        "narrow": base[5:9, 100:400],
        "expand": base[:1].expand(50, 500),
        "flip": torch.rand(64, 3).conj(),
        "conj": torch.rand(8, 2, dtype=torch.complex64).conj(),
        "permuted": torch.rand(3, 40, 50).permute(2, 0, 1),
    }
    ckpt.save(views, tmp_path / "run")
    target = torch.zeros(600, 500)
    back = {
        "t": target.t(),
        "step": torch.zeros(600, 500)[::3, ::7],
        "narrow": torch.zeros(600, 500)[5:9, 100:400],
        "expand": torch.zeros(50, 500),
        "flip": torch.zeros(3, 64).t(),
        "conj": torch.zeros(8, 2, dtype=torch.complex64),
        "permuted": torch.zeros(3, 40, 50).permute(2, 0, 1),
    }
    ckpt.load(back, tmp_path / "run")
    assert all(torch.equal(back[k], v) for k, v in views.items())
    assert torch.equal(target, base)


class Extra(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale: Any = 1.0

    def get_extra_state(self) -> Any:
        return {"scale": self.scale, "amax": torch.tensor([1.0, self.scale])}

    def set_extra_state(self, state: Any) -> None:
        self.scale = float(state["amax"][1])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.norm = nn.BatchNorm1d(4)
        self.extra = Extra()
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("cache", torch.zeros(2), persistent=False)


def test_names_of_a_wrapped_model_are_those_of_the_model() -> None:
    plain = collect({"model": Model()})
    wrapped = collect({"model": torch.compile(nn.DataParallel(Model()))})
    assert sorted(plain.tensors) == sorted(wrapped.tensors)
    assert plain.aliases == wrapped.aliases == {"model.head.weight": "model.embed.weight"}
    assert "model.extra._extra_state" in plain.objects
    assert not any("cache" in n for n in plain.tensors)


def test_module_with_extra_state_ties_and_buffers(tmp_path: Path) -> None:
    a, b = Model(), Model()
    a.extra.scale = 4.0
    nn.init.normal_(a.norm.running_mean)
    ckpt.save({"model": a}, tmp_path / "run")
    ckpt.load({"model": b}, tmp_path / "run")
    assert b.extra.scale == 4.0
    assert b.head.weight is b.embed.weight
    for (n, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert n.endswith("_extra_state") or torch.equal(x, y), n


def test_tied_weights_load_into_an_untied_model_and_back(tmp_path: Path) -> None:
    tied, untied = Model(), Model()
    untied.head.weight = nn.Parameter(torch.zeros(10, 4))
    ckpt.save({"model": tied}, tmp_path / "run")
    ckpt.load({"model": untied}, tmp_path / "run")
    assert torch.equal(untied.head.weight, tied.embed.weight)
    ckpt.save({"model": untied}, tmp_path / "run", step=1)
    again = Model()
    ckpt.load({"model": again}, tmp_path / "run@1")
    assert torch.equal(again.embed.weight, tied.embed.weight)


def test_a_module_on_the_meta_device_gets_memory_and_keeps_its_identity(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    ckpt.save({"model": model}, tmp_path / "run")
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(empty.parameters(), lr=0.1)
    ckpt.load({"model": empty}, tmp_path / "run")
    assert all(torch.equal(x, y) for x, y in zip(model.state_dict().values(), empty.state_dict().values(), strict=True))
    assert optimizer.param_groups[0]["params"][0] is empty[0].weight


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for p in model.parameters():
        p.grad = torch.rand_like(p)
    optimizer.step()
    return optimizer


OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p),
    "rprop": lambda p: torch.optim.Rprop(p),
    "asgd": lambda p: torch.optim.ASGD(p),
    "lr tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1), capturable=False, foreach=False),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_comes_back_and_goes_on_bitwise(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    a, b = nn.Linear(5, 3), nn.Linear(5, 3)
    left = stepped(a, OPTIMIZERS[name](a.parameters()))
    right = OPTIMIZERS[name](b.parameters())
    ckpt.save({"m": a, "o": left}, tmp_path / "run")
    ckpt.load({"m": b, "o": right}, tmp_path / "run")
    for m, o in ((a, left), (b, right)):
        torch.manual_seed(1)
        stepped(m, o)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_groups_may_differ_between_save_and_load(tmp_path: Path) -> None:
    a, b = nn.Linear(5, 3), nn.Linear(5, 3)
    left = torch.optim.AdamW([{"params": [a.weight], "weight_decay": 0.5}, {"params": [a.bias], "lr": 0.25}])
    right = torch.optim.AdamW([{"params": [b.bias]}, {"params": [b.weight]}])
    ckpt.save({"m": a, "o": stepped(a, left)}, tmp_path / "run")
    ckpt.load({"m": b, "o": right}, tmp_path / "run")
    assert (right.param_groups[0]["lr"], right.param_groups[1]["weight_decay"]) == (0.25, 0.5)
    assert torch.equal(right.state[b.weight]["exp_avg"], left.state[a.weight]["exp_avg"])
    with pytest.raises(ckpt.MismatchError, match="saved with different lr, weight_decay"):
        ckpt.load({"m": b, "o": torch.optim.AdamW(b.parameters())}, tmp_path / "run")


def test_parameters_without_state_stay_without(tmp_path: Path) -> None:
    a = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    a[1].requires_grad_(False)
    optimizer = torch.optim.AdamW(a.parameters())
    a[0].weight.grad = torch.ones(3, 3)
    optimizer.step()
    ckpt.save({"m": a, "o": optimizer}, tmp_path / "run")
    busy = stepped(a, torch.optim.AdamW(a.parameters()))
    ckpt.load({"m": a, "o": busy}, tmp_path / "run")
    assert [p for p in a.parameters() if busy.state.get(p)] == [a[0].weight]


def test_everything_wrong_is_said_at_once_and_nothing_is_touched(tmp_path: Path) -> None:
    ckpt.save(
        {"m": {"a": torch.ones(3), "b": torch.ones(2), "c": torch.ones(1)}, "n": nn.Linear(2, 2)}, tmp_path / "run"
    )
    state = {
        "m": {"a": torch.zeros(4), "b": torch.zeros(2, dtype=torch.float64), "c": torch.zeros(1), "d": torch.zeros(1)},
        "n": nn.Linear(2, 2, bias=False),
        "gone": 3,
    }
    before = state["n"].weight.detach().clone()
    with pytest.raises(ckpt.MismatchError) as e:
        ckpt.load(state, tmp_path / "run")
    for word in ("m.a (state [4], checkpoint [3])", "m.b (state float64, checkpoint float32)", "m.d", "n.bias", "gone"):
        assert word in str(e.value)
    assert state["m"]["c"] == 0
    assert torch.equal(state["n"].weight, before)
    ckpt.load({"m": {"b": state["m"]["b"]}, "gone": 3}, tmp_path / "run", cast=True, allow_missing=["gone"])
    assert state["m"]["b"].eq(1).all()
    ckpt.load({"n": state["n"]}, tmp_path / "run", allow_unexpected=["n.bias"])


def test_partial_loads_and_renames(tmp_path: Path) -> None:
    a = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    ckpt.save({"teacher": a, "epoch": 4}, tmp_path / "run")
    b = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    kept = b[0].weight.detach().clone()
    report = ckpt.load({"student": b, "epoch": 0}, tmp_path / "run", rename={"teacher": "student"}, only=["student.1"])
    assert report.tensors == 2
    assert torch.equal(b[1].weight, a[1].weight)
    assert torch.equal(b[0].weight, kept)


class Loader:
    """A loader whose state grows and holds a tensor deep inside."""

    def __init__(self) -> None:
        self.content: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return self.content

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.content = state


def test_a_stateful_gets_back_just_what_it_gave(tmp_path: Path) -> None:
    loader = Loader()
    loader.content = {
        "position": 7,
        "shuffle": torch.arange(5),
        "workers": [{"seed": 1, "buffer": torch.ones(2)}, {"seed": 2, "buffer": torch.zeros(0)}],
        "shards": {3: "three", 4: ("a", None)},
        "exotic": {"nan": float("nan"), "big": 2**80, "bytes": b"\x00\xff", "set": {1, 2}, "complex": 1 + 2j},
    }
    ckpt.save({"loader": loader}, tmp_path / "run")
    back = Loader()
    ckpt.load({"loader": back}, tmp_path / "run")
    assert {k: repr(v) for k, v in back.content.items()} == {k: repr(v) for k, v in loader.content.items()}


class Payload:
    opened = False

    def __reduce__(self) -> Any:
        return (_opened, ())


def _opened() -> int:
    Payload.opened = True
    return 5


def test_pickle_is_refused_on_both_sides_unless_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ckpt.UsageError, match=r"thing: .*ckpt\.Pickled"):
        ckpt.save({"thing": object()}, tmp_path / "run")
    ckpt.save({"thing": ckpt.Pickled(Payload())}, tmp_path / "run")
    state = {"thing": None}
    with pytest.raises(ckpt.UnsafeError, match="allow_pickle=True"):
        ckpt.load(state, tmp_path / "run")
    with ckpt.open(tmp_path / "run") as c, pytest.raises(ckpt.UnsafeError):
        c.objects["thing"]
    assert not Payload.opened
    ckpt.load(state, tmp_path / "run", allow_pickle=True)
    assert state["thing"] == 5
    assert Payload.opened


def test_what_cannot_be_stored_is_refused_by_name(tmp_path: Path) -> None:
    bad = {
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.empty(3, device="meta"),
        "lazy": nn.UninitializedParameter(),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    }
    for name, t in bad.items():
        with pytest.raises(ckpt.CkptError, match=name):
            ckpt.save({name: t}, tmp_path / "run")
    with pytest.raises(ckpt.UsageError, match=r"both called 'a\.b'"):
        ckpt.save({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, tmp_path / "run")
    with pytest.raises(ckpt.UsageError, match="no module in the state owns"):
        ckpt.save({"o": torch.optim.SGD([torch.ones(3, requires_grad=True)])}, tmp_path / "run")
    for key in ("", 1.5, ("a", "b")):
        with pytest.raises(ckpt.UsageError, match=re.escape(f"key {key!r} under the state: use a name")):
            ckpt.save({key: torch.ones(1), "x": torch.ones(1)}, tmp_path / "run")
    assert not list((tmp_path / "run").glob("*")) if (tmp_path / "run").exists() else True


def test_a_step_is_saved_once(tmp_path: Path) -> None:
    ckpt.save({"x": torch.ones(1)}, tmp_path / "run", step=3)
    with pytest.raises(ckpt.ConflictError, match="step-00000003"):
        ckpt.save({"x": torch.zeros(1)}, tmp_path / "run", step=3)
    state = {"x": torch.zeros(1)}
    ckpt.load(state, tmp_path / "run")
    assert state["x"] == 1


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {"w": torch.rand(700, 700), "t": torch.rand(500, 400).t(), "n": {"x": 3, "y": torch.rand(3).bfloat16()}}
    packs = []
    for run in ("a", "b"):
        ckpt.save(state, tmp_path / run, step=1)
        folder = tmp_path / run / "step-00000001.g0000" / "a0"
        packs.append([(folder / n).read_bytes() for n in ("rank-00000.safetensors", "manifest.safetensors")])
    assert packs[0] == packs[1]


@pytest.mark.filterwarnings("error")
def test_metrics_and_best(tmp_path: Path) -> None:
    for step, value in enumerate([3.0, 1.0, 2.0]):
        loss = torch.tensor(value, requires_grad=True) * 1  # as it comes out of a training step
        ckpt.save({"x": torch.tensor(step)}, tmp_path / "run", step=step, metrics={"loss": loss})
    for ref, expected in (
        ("", 2),
        ("@latest", 2),
        ("@best", 1),
        ("@best:loss", 1),
        ("@0", 0),
        ("/step-00000001.g0000", 1),
    ):
        state = {"x": torch.tensor(-1)}
        ckpt.load(state, f"{tmp_path}/run{ref}")
        assert state["x"] == expected, ref
    with pytest.raises(ckpt.NotFoundError, match="committed steps are 0, 1, 2"):
        ckpt.load({"x": torch.tensor(0)}, f"{tmp_path}/run@7")


def test_loop_restores_rolls_back_and_continues(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def session(steps: int, ref: str | None = None) -> tuple[int, float]:
        model = nn.Linear(2, 1, bias=False)
        nn.init.zeros_(model.weight)
        cp = ckpt.Checkpointer(tmp_path / "run", {"model": model}, storage=ckpt.Every(2), keep=[ckpt.KeepLast(3)])
        start = cp.restore(ref)
        for step in range(start, start + steps):
            with torch.no_grad():
                model.weight += 1
            cp.step(step, metrics={"loss": 1.0 / (step + 1)})
            assert cp.wait()
        cp.record(start, {"val_loss": 0.5})
        report = cp.close()
        assert report.failed == 0
        return start, float(model.weight[0, 0].detach())

    assert session(5) == (0, 5.0)  # steps 1, 3 and, at close, 4
    assert session(1) == (5, 6.0)
    assert session(1, f"{tmp_path}/run@4") == (5, 6.0)  # a rollback: step 5 again, in a generation of its own
    assert session(0) == (6, 6.0)
    with pytest.raises(ckpt.UsageError):
        ckpt.Checkpointer(tmp_path / "run", {"x": 1})
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert list((tmp_path / "run" / "ledger").glob("*.jsonl"))


def test_a_warm_start_from_another_run_begins_at_zero(tmp_path: Path) -> None:
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    ckpt.save({"model": a}, tmp_path / "base", step=40)
    cp = ckpt.Checkpointer(tmp_path / "tune", {"model": b, "adapter": nn.Linear(2, 2)}, storage=ckpt.Every(1))
    assert cp.restore(tmp_path / "base", allow_missing=["adapter"]) == 0
    assert torch.equal(a.weight, b.weight)
    cp.step(0)
    assert cp.close().committed == 1
