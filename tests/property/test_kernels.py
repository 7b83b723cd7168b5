"""The compiled kernels, built here from their source, against numpy doing the same: the same bits, the same refusals."""

from __future__ import annotations

import math
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ckpt.merge import arithmetic, fold
from ckpt.merge.arithmetic import AVERAGED, Room, combine
from ckpt.merge.fold import ACCUMULATORS, Folds
from ckpt.merge.native import Kernels, load

ROOT = Path(__file__).parents[2]
SIZES = (1, 15, 16, 1023, 1025, 5003, 33000)
Raw = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """Built as an installation builds them."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"][0]
    out = tmp_path_factory.mktemp("kernels") / "kernels.so"
    flags = [*about["extra-compile-args"], "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, "-o", str(out), *(str(ROOT / s) for s in about["sources"])], check=True)
    return load(str(out))


@pytest.fixture
def both(compiled: Kernels, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], tuple[Any, Any]]:
    """Runs something with the kernels and without; what came out, or was raised. An installation has one or the other."""

    def run(action: Callable[[], Any]) -> tuple[Any, Any]:
        out = []
        for known in (compiled, Kernels({}, {})):
            monkeypatch.setattr(fold, "kernels", lambda known=known: known)
            monkeypatch.setattr(arithmetic, "kernels", lambda known=known: known)
            try:
                out.append(action())
            except ArithmeticError as e:
                out.append((type(e), str(e)))
        return out[0], out[1]

    return run


def stored(kind: str, n: int, seed: int) -> Raw:
    """Numbers of very different sizes, with an offset that no vector is aligned to."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n + 1, generator=g, dtype=torch.float64) * torch.logspace(-20, 4, n + 1, dtype=torch.float64)
    made = (
        x.to(getattr(torch, kind))
        if not kind.startswith("complex")
        else torch.complex(x, x.flip(0)).to(getattr(torch, kind))
    )
    return made.view(torch.uint8).numpy()[made.element_size() :]


def room_for(nbytes: int, shift: int) -> Raw:
    """Memory that begins so many bytes after what every vector is aligned to."""
    whole = np.zeros(nbytes + 128, dtype=np.uint8)
    return whole[-whole.ctypes.data % 64 + shift :][:nbytes]


@pytest.mark.parametrize("kind", ["float32", "float64", "bfloat16", "float16", "complex64", "complex128"])
def test_folds(both: Callable[..., Any], compiled: Kernels, kind: str) -> None:
    assert (kind in compiled.fold) == (kind != "float16")
    wide = getattr(torch, ACCUMULATORS[kind]).itemsize
    for n in SIZES:
        theta = stored(kind, n, n)
        old: list[Raw | None] = [stored(ACCUMULATORS[kind], n, n + k) for k in range(5)]
        old[2] = None

        def action(n: int = n, theta: Raw = theta, old: list[Raw | None] = old) -> Any:
            new, sums = [room_for(n * wide, shift) for shift in (0, 0, 0, 0, wide)], []
            for k, (square, made) in enumerate(Folds([1e-4, 0.7, 1.0, 0.0, 1 - 1e-12])(theta, kind, old, new)):
                sums.append(square)
                assert np.array_equal(made, new[k]), "what a checksum is taken of is what lies in memory"
            return np.stack(new), sums

        (a, sums), (b, others) = both(action)
        assert np.array_equal(a, b) and np.allclose(sums, others, rtol=1e-5)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_folds_of_many_averages(both: Callable[..., Any], kind: str) -> None:
    """More than the kernel has sums for at once."""
    theta = stored(kind, 1000, 1)
    old = [stored("float32", 1000, k) for k in range(37)]

    def action() -> Any:
        new = [np.zeros(4000, dtype=np.uint8) for _ in old]
        sums = [square for square, _ in Folds([k / 40 for k in range(1, 38)])(theta, kind, old, new)]
        return np.stack(new), sums

    (a, sums), (b, others) = both(action)
    assert np.array_equal(a, b) and np.allclose(sums, others, rtol=1e-5)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("held", [0.5, math.inf, -3e38])
def test_folds_of_what_is_not_finite(both: Callable[..., Any], kind: str, value: float, held: float) -> None:
    x, a = torch.ones(100), torch.full((100,), 2.0)
    x[57], a[57] = value, held
    theta, old = x.to(getattr(torch, kind)).view(torch.uint8).numpy(), a.view(torch.uint8).numpy()

    def action() -> Any:
        new = [np.empty_like(old) for _ in range(2)]
        return list(Folds([0.5, 0.25])(theta, kind, [old] * 2, new))[:0], np.stack(new).tolist()

    first, second = both(action)
    assert first == second
    refused = isinstance(first[0], type)
    assert refused == (math.isnan(value) or math.isinf(value) != math.isinf(held) or value == -held)


@pytest.mark.parametrize("kind", sorted(AVERAGED))
def test_combinations(both: Callable[..., Any], kind: str) -> None:
    for n in SIZES:
        blocks = [stored(kind, n, seed) for seed in (n, n + 1, n + 1, n + 2)]
        for weights in ([0.25] * 4, [1.5, 0.0, -0.75, 0.25], [0.0, 0.0, 0.0, 1.0]):

            def action(blocks: list[Raw] = blocks, weights: list[float] = weights) -> Any:
                out = np.empty_like(blocks[0])
                combine(blocks, np.array([weights]), kind, [out], Room())
                return out.tolist()

            first, second = both(action)
            assert first == second and isinstance(first, list)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("values", [(math.inf, math.inf), (math.inf, 1.0), (math.nan, 1.0), (-3.3e38, 3.3e38)])
def test_combinations_that_are_not_finite(both: Callable[..., Any], kind: str, values: tuple[float, float]) -> None:
    blocks = []
    for value in values:
        x = torch.ones(3000, dtype=torch.float64)
        x[2345] = value
        blocks.append(x.to(getattr(torch, kind)).view(torch.uint8).numpy())

    def action() -> Any:
        out = np.empty_like(blocks[0])
        combine(blocks, np.array([[-2.0, 3.0]]), kind, [out], Room())
        return out.tolist()

    first, second = both(action)
    assert first == second
    assert isinstance(first, tuple) == (values[0] != values[1] and not (kind == "float64" and abs(values[0]) < 1e39))
