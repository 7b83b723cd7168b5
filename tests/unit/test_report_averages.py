"""What `ckpt report` says about averages: against what was saved, and never as HTML."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from test_report import Page

import ckpt
from ckpt.backends import LocalBackend
from ckpt.catalog import list_run, with_ledger
from ckpt.cli import cli
from ckpt.collective import Solo
from ckpt.merge.search import Sought, search
from ckpt.merge.watch import watch
from ckpt.offline.report_ledger import Ledger, read_ledger

STEPS = (10, 20, 30, 40)
HOSTILE = '<script>alert("x")</script>&amp;'


def state(step: int) -> dict[str, Any]:
    """A model, and averages of it as keepers store them."""
    g = torch.Generator().manual_seed(step)
    model = {"w": torch.randn(700, 300, generator=g).to(torch.bfloat16), "b": torch.randn(7, generator=g)}
    far = {"w": model["w"].float() * (1 + step / 100), "b": model["b"] * (1 + step / 100)}
    known = {
        "ema": {"spec": {"kind": "ema", "half_life": 20.0, "by": None}, "folds": step // 10, "refused": 1},
        HOSTILE: {"spec": {"kind": HOSTILE}, "folds": 1, "refused": 0},
    }
    return {
        "model": model,
        "averages": {"ema": {"model": far}},
        "__ckpt__": {"averages": json.dumps(known)},
    }


def distance(candidate: Any) -> float:
    return float((candidate["model.b"] - 1).norm())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ledger")
    run = folder / "run"
    for step in STEPS:
        ckpt.save(state(step), run, step=step, metrics={"loss": 1 / step, HOSTILE: 2.0})
    watch(run, Sought(distance, distance, budget=40), idle=0, only=["model"], latest=["averages"], group=Solo())
    return run


def ledger_of(run: Path) -> Ledger:
    backend = LocalBackend(str(run))
    return read_ledger(backend, str(run), with_ledger(backend, list_run(backend)))


def drawn(run: Path, out: Path, *options: str) -> tuple[Page, dict[str, Any]]:
    told = CliRunner().invoke(cli, ["report", str(run), "--out", str(out), "--json", *options])
    assert told.exit_code == 0, told.output
    text = out.read_text()
    assert "<script" not in text
    return Page(text), json.loads(told.stdout)


def test_what_the_run_tells(run: Path) -> None:
    found = ledger_of(run)
    assert found.metrics["loss"] == [(s, 1 / s) for s in STEPS]
    assert found.rules["ema"] == "ema: half_life 20.0"
    assert [(f.step, f.folds, f.refused) for f in found.folds["ema"]] == [(s, s // 10, 1) for s in STEPS]
    for f in found.folds["ema"]:  # |A - theta| / |theta| of A = theta (1 + step / 100)
        assert f.drift == pytest.approx(f.step / 100, rel=1e-3)
    assert found.folds[HOSTILE][0].drift is None
    (combined,) = found.combinations
    best = search(run, distance, held_out=distance, budget=40, only=["model"], latest=["averages"]).best
    assert dict(combined.weights) == {s: w for s, w in zip(STEPS, best.weights, strict=True) if w or s == 40}
    assert combined.scores[-1] == (best.name, best.score, best.held_out)


def test_the_page_of_a_run_without_events(run: Path, tmp_path: Path) -> None:
    page, told = drawn(run, tmp_path / "page.html")
    assert page.ids == ["metrics", "folds", "drift", "combinations", "scores"]
    titles = [line for line in page.text.splitlines() if line]
    for text in ("step 40: 0.025", "ema, step 30: 3", "ema, step 40: 0.4", HOSTILE, "half_life 20.0", "lcsc"):
        assert text in page.text, (text, titles)
    for step, weight in told["averages"]["combinations"][0]["weights"]:
        assert f"step {step}: {weight:.6f}" in page.text
    assert page.names.count("rect") >= len(told["averages"]["combinations"][0]["weights"])


def test_a_combination_in_a_run_of_its_own_and_the_journal_of_a_search(run: Path, tmp_path: Path) -> None:
    found = search(run, distance, budget=30, only=["model"], latest=["averages"], journal=tmp_path / "journal")
    ckpt.materialise(found.recipe, tmp_path / "dst")
    ckpt.materialise(ckpt.average(run, weights="0.5,0,0,0.5", only=["model"]), tmp_path / "dst", step=41)
    page, told = drawn(tmp_path / "dst", tmp_path / "page.html", "--journal", str(tmp_path / "journal"))
    assert [c["method"] for c in told["averages"]["combinations"]] == [found.recipe.method, "explicit"]
    assert page.ids == ["combinations", "scores", "searches"]  # what keepers noted of others is not taken over
    scores = told["averages"]["searches"][str(tmp_path / "journal")]
    assert len(scores) == 30 and min(scores) == found.best.score
    assert f"best so far, step 30: {min(scores):.6g}" in page.text


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"ckpt-search": 2}', "\x00\xff"])
def test_what_is_no_journal(run: Path, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "j").write_text(content)
    told = CliRunner().invoke(cli, ["report", str(run), "--out", str(tmp_path / "p"), "--journal", str(tmp_path / "j")])
    assert told.exit_code == (3 if content is None else 1) and not (tmp_path / "p").exists()


def test_what_cannot_be_read_is_left_out(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    manifests = sorted((tmp_path / "run").glob("step-*/*/manifest.safetensors"))
    manifests[1].write_bytes(manifests[1].read_bytes()[:-9])
    next((tmp_path / "run").glob("lcsc/step-*/*/manifest.safetensors")).unlink()
    found = ledger_of(tmp_path / "run")
    assert [f.step for f in found.folds["ema"]] == [10, 30, 40] and not found.combinations
    assert len(found.metrics["loss"]) == 4
    page, _ = drawn(tmp_path / "run", tmp_path / "page.html")
    assert page.ids == ["metrics", "folds", "drift"]


@pytest.mark.parametrize(
    "known", ["", "[]", "7", '{"a": 1}', '{"a": {"folds": -1, "refused": 0, "spec": {}}}', '{"a": {"folds": "x"}}']
)
def test_notes_that_are_none(tmp_path: Path, known: str) -> None:
    ckpt.save({"w": torch.zeros(3), "__ckpt__": {"averages": known}}, tmp_path / "run", step=1, metrics={"loss": 1.0})
    assert not ledger_of(tmp_path / "run").folds
    page, _ = drawn(tmp_path / "run", tmp_path / "page.html")
    assert page.ids == ["metrics"]


def test_the_page_does_not_grow_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckpt.offline.report_averages import curves

    lines = {f"m{k}": [(s, float(s % 7)) for s in range(5000)] for k in range(20)}
    assert len(curves(lines)) < 600_000 and curves({}) == "" and curves({"x": []}) == ""
    assert "step 4,999" in curves(lines) and "step 0:" in curves(lines)
    assert curves({"x": [(5, 3.0)]}).count("<circle") == 1
