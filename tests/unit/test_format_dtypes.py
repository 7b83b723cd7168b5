"""The element types, held against torch's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ckpt.errors import FormatError
from ckpt.format.dtypes import DTYPES, dtype


@pytest.mark.parametrize("name", DTYPES)
def test_names_and_sizes_are_torchs(name: str) -> None:
    ours = dtype(name)
    theirs = getattr(torch, name, None)
    if theirs is None:
        pytest.skip(f"torch {torch.__version__} has no {name}")
    assert str(theirs) == f"torch.{name}" and theirs.itemsize == ours.itemsize == ours.numpy.itemsize
    assert ours.numpy.byteorder in "<|=" and np.dtype(ours.numpy.str) == ours.numpy


@pytest.mark.parametrize("name", [n for n, d in DTYPES.items() if d.exact])
def test_exact_means_that_numpy_agrees(name: str) -> None:
    assert torch.zeros(2, dtype=getattr(torch, name)).numpy().dtype == dtype(name).numpy


def test_every_dense_type_of_torch_is_known() -> None:
    found = {str(v).removeprefix("torch.") for v in vars(torch).values() if isinstance(v, torch.dtype)}
    dense = {n for n in found if not n.startswith(("q", "bits", "int", "uint"))}
    assert dense <= set(DTYPES) and {"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"} <= set(DTYPES)


@pytest.mark.parametrize("name", ["", "float", "torch.float32", "object", "qint8", None, 3, ["float32"], {}])
def test_unknown_is_a_format_error(name: object) -> None:
    with pytest.raises(FormatError):
        dtype(name)  # type: ignore[arg-type]
