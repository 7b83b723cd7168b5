"""The examples of averages run from end to end, at a size at which their numbers mean nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def ran(name: str, out: Path, *options: str) -> tuple[str, Any]:
    path = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--seeds", "1", "--out", str(out), *options]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, check=False, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((out / f"{name}.json").read_text())


def test_lora(tmp_path: Path) -> None:
    text, told = ran("lora", tmp_path, "--base", "12", "--steps", "12", "--windows", "16")
    for schedule in ("constant learning rate", "decayed learning rate"):
        (found,) = told["results"][schedule]
        assert found["last step"] < found["before the fine-tuning"]
    assert "| MWA-step, step^4 | " in text


def test_digits(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits ship with scikit-learn, which only this example needs")
    text, told = ran("digits", tmp_path, "--steps", "8", "--saves", "8", "--samples", "40", "--budget", "30")
    (found,) = told["results"]
    assert len(found["last step"]) == 8 and set(found["LCSC"]) == {"4", "8"}
    assert "| LCSC | " in text and "Steps until the same quality" in text
