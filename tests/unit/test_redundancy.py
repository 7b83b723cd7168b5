"""What a user may ask for: `ErasureCode` and `Replicas`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import ckpt
from ckpt.config import ErasureCode, Replicas
from ckpt.errors import UsageError


def test_what_may_be_asked_for() -> None:
    assert ErasureCode(data=6, parity=2) == ErasureCode(6, 2) != ErasureCode(6, 1)
    assert ErasureCode(1, 1) and ErasureCode(253, 2) and Replicas(2) == Replicas(copies=2) and Replicas(255)
    with pytest.raises(dataclasses.FrozenInstanceError):
        ErasureCode(6, 2).data = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("data", "parity"), [(0, 2), (6, 0), (-1, 2), (6, -2), (6.0, 2), (True, 2), (6, "2"), (254, 2)]
)
def test_codes_that_there_are_not(data: object, parity: object) -> None:
    with pytest.raises(UsageError, match="ErasureCode"):
        ErasureCode(data, parity)  # type: ignore[arg-type]


@pytest.mark.parametrize("copies", [1, 0, -2, 2.0, True, None, 256])
def test_replicas_that_there_are_not(copies: object) -> None:
    with pytest.raises(UsageError, match=r"Replicas\("):
        Replicas(copies)  # type: ignore[arg-type]


def test_what_a_checkpointer_takes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="memory="):
        ckpt.Checkpointer(tmp_path, {}, storage=ckpt.Every(1), redundancy=ckpt.ErasureCode(data=6, parity=2))
    with pytest.raises(UsageError, match="ErasureCode"):
        ckpt.Checkpointer(tmp_path, {}, memory=ckpt.Every(1), redundancy=2)  # type: ignore[arg-type]
    assert ckpt.Replicas is Replicas and ckpt.ErasureCode is ErasureCode
