"""Two checkpoints compared: bits and values, every dtype, any fragments, bounded memory."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ckpt
from ckpt.collective import Solo
from ckpt.format.dtypes import DTYPES, dtype
from ckpt.offline.diff import Diff, TensorDiff, diff
from ckpt.offline.recut import TpRule
from ckpt.offline.reshard import ORIGIN, reshard
from ckpt.offline.values import numbers
from ckpt.offline.window import cut_windows


def compare(tmp_path: Path, a: dict[str, Any], b: dict[str, Any], **options: Any) -> Diff:
    left, right = f"memory://{tmp_path}/a", f"memory://{tmp_path}/b"
    ckpt.save(a, left, metrics=options.pop("metrics_a", None))
    ckpt.save(b, right, metrics=options.pop("metrics_b", None))
    with ckpt.open(left) as x, ckpt.open(right) as y:
        return diff(x, y, **options)


def one(tmp_path: Path, a: torch.Tensor, b: torch.Tensor, **options: Any) -> TensorDiff:
    (found,) = compare(tmp_path, {"t": a}, {"t": b}, **options).tensors
    return found


def of_bits(kind: str, bits: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(bits.reshape(-1).view(np.uint8).copy()).view(getattr(torch, kind))


# Values.


@pytest.mark.parametrize(
    "kind", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"]
)
def test_every_byte_means_what_torch_says(kind: str) -> None:
    raw = np.arange(256, dtype=np.uint8)
    if not hasattr(torch, kind):
        pytest.skip(f"this torch has no {kind}")
    expected = of_bits(kind, raw).to(torch.float32).numpy()
    np.testing.assert_array_equal(numbers(raw.reshape(-1, 1), kind), expected)


def test_every_bfloat16_means_what_torch_says() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    expected = of_bits("bfloat16", bits).to(torch.float32).numpy()
    np.testing.assert_array_equal(numbers(bits.view(np.uint8).reshape(-1, 2), "bfloat16"), expected)


def test_two_numbers_in_one_byte() -> None:
    raw = np.array([[0x00], [0x21], [0xF7]], dtype=np.uint8)
    np.testing.assert_array_equal(numbers(raw, "float4_e2m1fn_x2"), [[0, 0], [0.5, 1], [6, -6]])


@pytest.mark.parametrize("kind", sorted(DTYPES))
def test_every_dtype_has_numbers(kind: str) -> None:
    raw = np.arange(4 * dtype(kind).itemsize, dtype=np.uint8).reshape(4, -1)
    assert len(numbers(raw, kind)) == 4


# Tensors.


def test_equal_bits_are_identical(tmp_path: Path) -> None:
    odd = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
    state = {"a": odd, "b": {"c": torch.arange(7), "d": torch.zeros(0, 3)}, "s": torch.tensor(2.0), "n": [1, "x"]}
    found = compare(tmp_path, state, state)
    assert found.same
    assert [(t.name, t.status) for t in found.tensors] == [(n, "identical") for n in ("a", "b.c", "b.d", "s")]
    assert [(v.kind, v.name, v.status) for v in found.values] == [("object", "n", "identical")]


def test_a_difference_is_measured(tmp_path: Path) -> None:
    a = torch.ones(3, 4)
    b = a.clone()
    b[1, 2], b[2, 0] = 1.5, 1.25
    t = one(tmp_path, a, b)
    assert (t.status, t.elements, t.nonfinite) == ("differs", 2, 0)
    assert (t.max_abs, t.max_rel, t.at) == (0.5, pytest.approx(1 / 3), (1, 2))


def test_the_first_of_equal_differences_is_named_in_a_large_tensor(tmp_path: Path) -> None:
    a = torch.zeros(3, 1_000_003)
    b = a.clone()
    b[2, 1_000_002] = b[1, 17] = -2.0
    t = one(tmp_path, a, b)
    assert (t.elements, t.max_abs, t.max_rel, t.at) == (2, 2.0, 1.0, (1, 17))


def test_integers_differ_exactly_at_any_size(tmp_path: Path) -> None:
    big = 2**63 - 1
    t = one(tmp_path, torch.tensor([big, -5]), torch.tensor([-big - 1, -4]))
    assert (t.max_abs, t.at, t.elements) == (2**64 - 1, (0,), 2)


@pytest.mark.parametrize("kind", ["uint8", "int8", "bool", "uint64", "int16"])
def test_small_and_unsigned_integers(tmp_path: Path, kind: str) -> None:
    a = torch.tensor([0, 1, 1]).to(getattr(torch, kind))
    b = torch.tensor([1, 0, 1]).to(getattr(torch, kind))
    t = one(tmp_path, a, b)
    assert (t.status, t.max_abs, t.elements) == ("differs", 1, 2)


def test_nans_of_other_bits_differ_but_are_close(tmp_path: Path) -> None:
    bits = np.array([0x7FC00000, 0x7FC00001], dtype=np.uint32)
    a, b = of_bits("float32", bits), of_bits("float32", bits[::-1].copy())
    assert one(tmp_path / "x", a, b).status == "differs"
    assert one(tmp_path / "y", a, b, atol=0.0).status == "close"


def test_what_is_not_finite_on_one_side_is_never_close(tmp_path: Path) -> None:
    a = torch.tensor([1.0, 2.0, float("nan"), float("inf"), 5.0])
    b = torch.tensor([1.0, float("nan"), 3.0, 4.0, 5.5])
    t = one(tmp_path, a, b, rtol=1e9, atol=1e9)
    assert (t.status, t.elements, t.nonfinite, t.max_abs, t.at) == ("differs", 4, 3, 0.5, (4,))


@pytest.mark.parametrize(
    ("options", "status"),
    [({}, "differs"), ({"atol": 0.01}, "close"), ({"rtol": 0.001}, "close"), ({"rtol": 0.0001}, "differs")],
)
def test_tolerances(tmp_path: Path, options: dict[str, float], status: str) -> None:
    t = one(tmp_path, torch.tensor([10.0, 1.0]), torch.tensor([10.005, 1.0]), **options)
    assert t.status == status


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float8_e4m3fn", "complex64", "complex128", "float64"])
def test_other_floats_are_measured(tmp_path: Path, kind: str) -> None:
    a = torch.tensor([1.0, 2.0, 4.0]).to(getattr(torch, kind))
    b = torch.tensor([1.0, 3.0, 4.0]).to(getattr(torch, kind))
    t = one(tmp_path, a, b)
    assert (t.max_abs, t.max_rel, t.at, t.elements) == (1.0, pytest.approx(1 / 3), (1,), 1)


def test_another_dtype_is_a_difference_and_still_measured(tmp_path: Path) -> None:
    a = torch.tensor([1.0, 1.0 + 2**-10, float("nan")])
    t = one(tmp_path, a, a.to(torch.bfloat16))
    assert (t.status, t.a, t.b) == ("dtype", "float32 [3]", "bfloat16 [3]")
    assert (t.elements, t.max_abs, t.at) == (1, 2**-10, (1,))


def test_shapes_and_missing_names(tmp_path: Path) -> None:
    a = {"x": torch.zeros(3), "left": torch.zeros(1), "k": 1}
    b = {"x": torch.zeros(3, 1), "right": torch.zeros(1), "m": 1}
    found = compare(tmp_path, a, b, metrics_a={"loss": 1.0, "q": 2}, metrics_b={"loss": 1.5})
    assert [(t.name, t.status) for t in found.tensors] == [
        ("left", "only in A"),
        ("right", "only in B"),
        ("x", "shape"),
    ]
    assert [(v.kind, v.name, v.status) for v in found.values] == [
        ("object", "k", "only in A"),
        ("object", "m", "only in B"),
        ("metric", "loss", "differs"),
        ("metric", "q", "only in A"),
    ]
    assert not found.same


def test_only_some_names(tmp_path: Path) -> None:
    a = {"m": {"x": torch.zeros(3), "y": torch.zeros(3)}, "k": 1}
    b = {"m": {"x": torch.zeros(3), "y": torch.ones(3)}, "k": 2}
    found = compare(tmp_path, a, b, only=["*.x"], metrics_a={"loss": 1.0}, metrics_b={"loss": 2.0})
    assert found.same
    assert [t.name for t in found.tensors] == ["m.x"]
    with pytest.raises(ckpt.NotFoundError, match="is called nothing"):
        compare(tmp_path / "2", a, b, only=["nothing"])


class Tied(torch.nn.Module):
    def __init__(self, tie: bool, value: float = 1.0) -> None:
        super().__init__()
        self.embed = torch.nn.Parameter(torch.full((4, 2), 1.0))
        self.head = self.embed if tie else torch.nn.Parameter(torch.full((4, 2), value))


def test_an_alias_is_the_tensor_it_names(tmp_path: Path) -> None:
    assert compare(tmp_path / "1", {"m": Tied(True)}, {"m": Tied(False)}).same
    found = compare(tmp_path / "2", {"m": Tied(True)}, {"m": Tied(False, 2.0)})
    assert [(t.name, t.status) for t in found.tensors] == [("m.embed", "identical"), ("m.head", "differs")]
    both = compare(tmp_path / "3", {"m": Tied(True)}, {"m": Tied(True)})
    assert [t.name for t in both.tensors] == ["m.embed"]
    asked = compare(tmp_path / "4", {"m": Tied(True)}, {"m": Tied(True)}, only=["*.head"])
    assert [(t.name, t.status) for t in asked.tensors] == [("m.head", "identical")]


# Fragments, damage, memory.


def test_fragments_and_codecs_do_not_matter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {"w": torch.rand(61, 5, 33), "v": torch.arange(1000), "s": torch.tensor(3.0), "o": {"a": 1}}
    ckpt.save(state, tmp_path / "a", metrics={"loss": 2.0}, codec={"w": "zstd"})
    reshard(tmp_path / "a", tmp_path / "b", ranks=6, tp=2, rules=[TpRule("w", 2)], group=Solo())
    with ckpt.open(tmp_path / "a") as a, ckpt.open(tmp_path / "b") as b:
        assert len(b.manifest.pack) > len(a.manifest.pack)
        assert ORIGIN in b.objects
        assert diff(a, b).same
        assert diff(b, a).same


def test_damage_is_not_a_difference(tmp_path: Path) -> None:
    ckpt.save({"w": torch.rand(1000)}, tmp_path / "a")
    ckpt.save({"w": torch.rand(1000)}, tmp_path / "b")
    pack = tmp_path / "b/step-00000000.g0000/a0/rank-00000.safetensors"
    data = bytearray(pack.read_bytes())
    data[5000] ^= 1
    pack.write_bytes(data)
    with (
        ckpt.open(tmp_path / "a") as a,
        ckpt.open(tmp_path / "b") as b,
        pytest.raises(ckpt.IntegrityError, match="'w'"),
    ):
        diff(a, b)


def test_memory_stays_below_64_mib(tmp_path: Path) -> None:
    """A tensor of 80 MiB that differs everywhere, and one of another dtype."""
    a = torch.arange(20 << 20, dtype=torch.int32)
    ckpt.save({"same": a, "other": a[: 2 << 20]}, tmp_path / "a")
    ckpt.save({"same": a + 1, "other": a[: 2 << 20].to(torch.float64) + 1}, tmp_path / "b")
    del a
    with ckpt.open(tmp_path / "a") as x, ckpt.open(tmp_path / "b") as y:
        seen: list[int] = []
        tracemalloc.start()
        found = diff(x, y, progress=seen.append)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert [(t.status, t.elements, t.max_abs) for t in found.tensors] == [
        ("dtype", 2 << 20, 1),
        ("differs", 20 << 20, 1),
    ]
    assert sum(seen) == 88 << 20
    assert peak < 64 << 20, f"{peak >> 20} MiB"


def test_comparing_needs_no_torch(tmp_path: Path) -> None:
    ckpt.save({"w": torch.rand(100).bfloat16()}, tmp_path / "a")
    ckpt.save({"w": torch.rand(100).bfloat16()}, tmp_path / "b")
    code = (
        "import sys; from ckpt.checkpoint import open_checkpoint as o; from ckpt.offline.diff import diff\n"
        f"assert not diff(o({str(tmp_path / 'a')!r}), o({str(tmp_path / 'b')!r})).same\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("sizes", [[], [0], [1], [3, 0, 5], [1 << 20, 1, (1 << 20) + 7], [300_000] * 7])
def test_windows_hold_everything_once_and_fit(sizes: list[int]) -> None:
    limit = 1 << 18
    seen = [0] * len(sizes)
    for window in cut_windows(sizes, limit):
        assert 0 < sum(hi - lo for _, lo, hi in window) <= limit
        for index, lo, hi in window:
            assert lo == seen[index] and lo % (1 << 18) == 0
            seen[index] = hi
    assert seen == sizes
