"""What a load touches and what it leaves alone; what retention and restore see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckpt
from ckpt import read
from ckpt.backends import LocalBackend
from ckpt.catalog import delete_step


def stepped(model: nn.Module, **group: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), **group)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def test_a_load_of_the_model_leaves_the_optimizer_alone(tmp_path: Path) -> None:
    saved, model = nn.Linear(2, 2), nn.Linear(2, 2)
    ckpt.save({"model": saved, "optimizer": torch.optim.AdamW(saved.parameters(), lr=0.1)}, tmp_path / "run")
    optimizer = stepped(model, lr=0.5)
    ckpt.load({"model": model, "optimizer": optimizer}, tmp_path / "run", only=["model.*"])
    assert torch.equal(model.weight, saved.weight)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert set(optimizer.state[model.weight]) == {"step", "exp_avg", "exp_avg_sq"}
    ckpt.save({"model": saved}, tmp_path / "weights")
    ckpt.load({"model": model, "optimizer": optimizer}, tmp_path / "weights", only=["model.*"])
    ckpt.load({"model": model, "optimizer": optimizer}, tmp_path / "run", only=["optimizer.groups"])
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert optimizer.state[model.weight]


def test_a_refused_load_makes_no_state_and_changes_no_weight(tmp_path: Path) -> None:
    saved, model = nn.Linear(2, 2), nn.Linear(2, 2)
    ckpt.save({"model": saved, "optimizer": stepped(saved)}, tmp_path / "run")
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ckpt.MismatchError, match="extra"):
        ckpt.load({"model": model, "optimizer": optimizer, "extra": 1}, tmp_path / "run")
    assert not optimizer.state
    groups = [{"params": [saved.weight], "lr": 0.1}, {"params": [saved.bias], "lr": 0.2}]
    ckpt.save({"model": saved, "optimizer": torch.optim.AdamW(groups)}, tmp_path / "two")
    before = model.weight.detach().clone()
    with pytest.raises(ckpt.MismatchError, match="different lr"):
        ckpt.load({"model": model, "optimizer": optimizer}, tmp_path / "two")
    assert torch.equal(model.weight, before)


def test_a_renamed_submodule_takes_its_optimizer_state_along(tmp_path: Path) -> None:
    old, new = nn.ModuleDict({"a": nn.Linear(2, 2)}), nn.ModuleDict({"b": nn.Linear(2, 2)})
    left = stepped(old, lr=0.25)
    ckpt.save({"m": old, "o": left}, tmp_path / "run")
    right = torch.optim.AdamW(new.parameters())
    ckpt.load({"m": new, "o": right}, tmp_path / "run", rename={"m.a": "m.b", "o.state.a": "o.state.b"})
    assert torch.equal(right.state[new["b"].weight]["exp_avg"], left.state[old["a"].weight]["exp_avg"])
    assert right.param_groups[0]["lr"] == 0.25


def test_names_in_groups_are_not_hyper_parameters(tmp_path: Path) -> None:
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    ckpt.save({"m": a, "o": torch.optim.AdamW(a.named_parameters(), lr=0.3)}, tmp_path / "run")
    split = torch.optim.AdamW([{"params": [(n, p)]} for n, p in b.named_parameters()])
    ckpt.load({"m": b, "o": split}, tmp_path / "run")
    assert [g["param_names"] for g in split.param_groups] == [["weight"], ["bias"]]
    assert {g["lr"] for g in split.param_groups} == {0.3}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.head.weight = self.embed.weight


def test_a_tied_tensor_loads_under_either_name(tmp_path: Path) -> None:
    a, b = Tied(), Tied()
    ckpt.save({"m": a}, tmp_path / "run")
    ckpt.load({"m": b}, tmp_path / "run", only=["m.head.*"])
    assert torch.equal(a.embed.weight, b.embed.weight)


def test_what_may_be_missing_stays_on_the_meta_device(tmp_path: Path) -> None:
    ckpt.save({"m": nn.ModuleDict({"base": nn.Linear(2, 2)})}, tmp_path / "run")
    with torch.device("meta"):
        model = nn.ModuleDict({"base": nn.Linear(2, 2), "lora": nn.Linear(2, 2)})
    ckpt.load({"m": model}, tmp_path / "run", allow_missing=["m.lora"])
    assert model["lora"].weight.is_meta
    assert not model["base"].weight.is_meta


def test_scopes_are_for_values_and_tuples_are_made_anew(tmp_path: Path) -> None:
    with pytest.raises(ckpt.UsageError, match=r"ckpt\.Replicated"):
        ckpt.save({"x": ckpt.Replicated(torch.ones(2))}, tmp_path / "run")
    ckpt.save({"p": (torch.ones(2), 5, (6, torch.ones(1)))}, tmp_path / "run")
    state: dict[str, Any] = {"p": (torch.zeros(2), 0, (0, torch.zeros(1)))}
    ckpt.load(state, tmp_path / "run")
    assert repr(state["p"]) == repr((torch.ones(2), 5, (6, torch.ones(1))))
    with pytest.raises(ckpt.MismatchError, match="conjugate"):
        ckpt.load({"z": torch.zeros(2, dtype=torch.complex64).conj()}, _complex(tmp_path))


def _complex(tmp_path: Path) -> Path:
    ckpt.save({"z": torch.ones(2, dtype=torch.complex64)}, tmp_path / "complex")
    return tmp_path / "complex"


def test_a_reader_thread_that_dies_fails_the_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ckpt.save({"x": torch.rand(5_000, 1_000)}, tmp_path / "run")
    monkeypatch.setattr(read, "SCRATCH", 2**62)
    with pytest.raises((MemoryError, ValueError, ckpt.CkptError)):
        ckpt.load({"x": torch.zeros(1_000, 5_000).T}, tmp_path / "run")


def loop(run: Path, *, keep: list[Any], ref: Path | None = None) -> tuple[ckpt.Checkpointer, int]:
    cp = ckpt.Checkpointer(run, {"x": torch.zeros(1)}, storage=ckpt.Every(1), keep=keep)
    return cp, cp.restore(ref)


def test_metrics_that_come_late_count_for_the_best(tmp_path: Path) -> None:
    cp, _ = loop(tmp_path / "run", keep=[ckpt.KeepLast(2), ckpt.KeepBest("val_loss")])
    for step, loss in enumerate([3.0, 1.0, 2.0, 4.0, 5.0]):
        cp.step(step)
        assert cp.wait()
        cp.record(step, {"val_loss": loss})
    cp.close()
    with ckpt.open(f"{tmp_path / 'run'}@best") as c:
        assert c.step == 1
    assert {p.name for p in (tmp_path / "run").glob("step-*")} == {f"step-{s:08d}.g0001" for s in (1, 3, 4)}


def test_saving_twice_is_saving_once_and_a_rollback_saves_again(tmp_path: Path) -> None:
    cp, _ = loop(tmp_path / "run", keep=[])
    first = cp.step(0)
    assert first is not None and cp.save_now() == first.result()
    assert cp.report.failed == 0
    cp.restore(f"{tmp_path / 'run'}@0")
    cp.step(0)
    assert cp.close().committed == 2


def test_a_run_below_a_run_is_another_run(tmp_path: Path) -> None:
    ckpt.save({"x": torch.ones(1)}, tmp_path / "run" / "base", step=777)
    _, start = loop(tmp_path / "run", keep=[], ref=tmp_path / "run" / "base")
    assert start == 0
    (tmp_path / "link").symlink_to(tmp_path / "run" / "base")
    _, start = loop(tmp_path / "run" / "base", keep=[], ref=tmp_path / "link")
    assert start == 778


def test_restore_says_when_no_step_leads_to_the_present(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ckpt.save({"x": torch.ones(1)}, tmp_path / "base")
    cp, _ = loop(tmp_path / "run", keep=[])
    cp.step(0)
    cp.close()
    loop(tmp_path / "run", keep=[], ref=tmp_path / "base")  # a warm start that dies before its first save
    _, start = loop(tmp_path / "run", keep=[])
    assert start == 0
    assert "came from nowhere" in caplog.text


class _Deleting(LocalBackend):
    """Another process's retention: it deletes a step once a load has read its manifest."""

    doomed = ""

    def size(self, path: str) -> int:
        if self.doomed and path.startswith(self.doomed):
            folder, _Deleting.doomed = self.doomed, ""
            delete_step(LocalBackend(self.root), folder)
        return super().size(path)


@pytest.mark.parametrize("ref", ["", "@latest", "@best", "@3", "/step-00000003.g0000"])
def test_a_step_deleted_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ref: str) -> None:
    """What a ref names by its place is then the next one; what it names by number is gone, which is said."""
    run = tmp_path / "run"
    for step in (1, 2, 3):
        ckpt.save({"x": torch.full((100_000,), float(step))}, run, step=step, metrics={"loss": 3.0 - step})
    monkeypatch.setattr("ckpt.loading.backend_for", _Deleting)
    monkeypatch.setattr(_Deleting, "doomed", "step-00000003.g0000")
    found = {"x": torch.zeros(100_000)}
    if "3" in ref:
        with pytest.raises(ckpt.NotFoundError, match=r"deleted while it was read|no committed checkpoint of step 3"):
            ckpt.load(found, f"{run}{ref}")
    else:
        assert ckpt.load(found, f"{run}{ref}").step == 2 and found["x"].eq(2).all()
    assert _Deleting.doomed == ""


def test_what_a_store_gives_back_is_checked(tmp_path: Path) -> None:
    """By way of requests: a range that is all of one tensor, ranges of many small ones and of a coded one."""
    full = {
        "large": torch.rand(5_000_000),
        "coded": torch.rand(700_000),
        **{f"s{k}": torch.rand(999) for k in range(9)},
    }
    ckpt.save(full, tmp_path / "run", codec={"coded": "zstd"})
    (pack,) = (tmp_path / "run").rglob("rank-*")
    whole, url = pack.read_bytes(), f"local://{tmp_path}/run"

    def load() -> bool:
        found = {k: torch.zeros_like(v) for k, v in full.items()}
        ckpt.load(found, url)
        return all(torch.equal(found[k], v) for k, v in full.items())

    assert load()
    with ckpt.open(tmp_path / "run") as c:
        spots = {
            n: int(c.manifest.offset[int(c.manifest.start[c.manifest.index(n)])]) for n in ("large", "coded", "s4")
        }
    for name, at in spots.items():
        pack.write_bytes(whole[: at + 9] + bytes([whole[at + 9] ^ 1]) + whole[at + 10 :])
        with pytest.raises(ckpt.IntegrityError, match=f"'{name}'"):
            load()
