"""The shell: every verb, its exit codes, its JSON; and that looking at checkpoints costs no torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import ckpt
from ckpt import errors
from ckpt.cli import cli
from ckpt.cli.shell import EXIT_CODES
from ckpt.cli.show import age, duration, shorten, size, size_of
from ckpt.commit import Commit, publish, read_commit, sealed


def shell(*args: object, **options: Any) -> Result:
    result = CliRunner().invoke(cli, [str(a) for a in args], **options)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def told(*args: object, code: int = 0) -> dict[str, Any]:
    """The JSON that a verb prints."""
    result = shell(*args, "--json")
    assert result.exit_code == code, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def state(value: float = 0.0) -> dict[str, Any]:
    torch.manual_seed(0)
    model = torch.nn.Linear(50, 40)
    with torch.no_grad():
        model.bias[3] += value
    return {"model": model, "epoch": int(value), "rng": ckpt.PerRank([1, 2])}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 10, 20, 30; treat as read-only."""
    run = tmp_path_factory.mktemp("made") / "run"
    for step in (10, 20, 30):
        ckpt.save(state(step / 10), run, step=step, metrics={"val/loss": 1 / step, "acc": 0.5})
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def damage(path: Path, at: int = 5000) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


PACK = "a0/rank-00000.safetensors"


# Exit codes and errors.


def test_every_kind_of_error_has_an_exit_code() -> None:
    kinds = {e.kind for e in vars(errors).values() if isinstance(e, type) and issubclass(e, ckpt.CkptError)}
    assert kinds - {"ckpt"} == set(EXIT_CODES)
    assert set(EXIT_CODES.values()) == {1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    ("args", "code", "kind"),
    [
        (["ls", "nowhere"], 3, "not-found"),
        (["inspect", "{run}@15"], 3, "not-found"),
        (["inspect", "{run}@best:nothing"], 3, "not-found"),
        (["verify", "{run}@newest"], 2, "usage"),
        (["ls", "{run}@10"], 2, "usage"),
        (["verify", "{run}@10", "--all"], 2, "usage"),
        (["diff", "{run}"], 2, "usage"),
        (["prune", "{run}", "--older-than", "soon"], 2, "usage"),
        (["reshard", "{run}", "{run}", "--ranks", "2"], 4, "conflict"),
        (["reshard", "{run}", "{run}@10", "--ranks", "2"], 2, "usage"),
        (["reshard", "{run}", "there", "--ranks", "3", "--tp", "2"], 2, "usage"),
        (["reshard", "{run}", "there", "--ranks", "2", "--tp", "2", "--tp-rule", "*.wieght=0"], 2, "usage"),
        (["reshard", "{run}", "there", "--ranks", "2", "--tp-rule", "weight"], 2, "usage"),
        (["frobnicate"], 2, "usage"),
    ],
)
def test_an_error_is_one_sentence_and_a_code(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], code: int, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    args = [a.replace("{run}", str(made)) for a in args]
    result = shell(*args)
    assert result.exit_code == code
    assert "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) <= 4
    error = told(*args, code=code)["error"]
    assert error["kind"] == kind
    assert error["message"]
    assert not any(tmp_path.iterdir())


def test_storage_that_fails_may_be_tried_again(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ckpt.StorageError("reading x: I/O error")

    monkeypatch.setattr("ckpt.backends.LocalBackend.read", refuse)
    assert shell("verify", made).exit_code == 5
    assert told("verify", made, code=5)["checkpoints"][0]["problems"] == ["storage: reading x: I/O error"]
    monkeypatch.setattr("ckpt.backends.LocalBackend.list", refuse)
    assert told("ls", made, code=5) == {"error": {"kind": "storage", "message": "reading x: I/O error"}}


def test_a_bug_is_neither_a_finding_nor_a_usage_error(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt.catalog.list_run", lambda *_: 1 / 0)
    assert shell("ls", made).exit_code == 70
    assert "ZeroDivisionError" in shell("ls", made).output


def test_help_names_verbs_codes_and_completion() -> None:
    result = shell("--help")
    assert result.exit_code == 0
    for word in (
        "ls",
        "inspect",
        "diff",
        "verify",
        "reshard",
        "export",
        "import",
        "prune",
        "Exit codes",
        "_CKPT_COMPLETE",
    ):
        assert word in result.stdout
    assert shell("--version").stdout.strip().endswith(ckpt.__version__)
    for name in cli.commands:
        assert "--json" in shell(name, "--help").stdout


def test_of_several_processes_the_first_one_speaks(made: Path) -> None:
    for rank, said in ((0, True), (1, False)):
        for env in (
            {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            {"PMI_SIZE": "2", "PMI_RANK": str(rank)},
        ):
            result = shell("ls", made, env=env)
            assert (result.exit_code, bool(result.stdout)) == (0, said)
    assert shell("ls", made, env={"WORLD_SIZE": "2", "RANK": "1"}).stdout  # a scheduler's container, no torchrun


# ls


def test_ls_shows_steps_and_marks_the_latest(made: Path) -> None:
    lines = shell("ls", made).stdout.splitlines()
    assert lines[0].split() == ["STEP", "GEN", "AGE", "BYTES", "WORLD", "TENSORS", "METRICS", "STATE"]
    assert [line.split()[0] for line in lines[1:4]] == ["10", "20", "30"]
    assert [line.endswith("committed, latest") for line in lines[1:4]] == [False, False, True]
    assert "acc=0.5 val/loss=0.1" in lines[1]
    assert lines[4].startswith("3 committed, ")


def test_ls_json(made: Path) -> None:
    found = told("ls", made)
    assert (found["run"], found["latest"], found["hidden"]) == (str(made), "step-00000030.g0000", 0)
    first = found["steps"][0]
    assert (first["step"], first["generation"], first["world"], first["tensors"]) == (10, 0, 1, 2)
    assert (first["state"], first["latest"], first["abandoned"]) == ("committed", False, False)
    assert first["metrics"] == {"val/loss": 0.1, "acc": 0.5}
    assert first["bytes"] == sum((made / first["folder"] / PACK).stat().st_size for _ in [0])
    assert 0 <= first["age_seconds"] < 3600


def test_ls_hides_leftovers_and_abandoned_steps_but_never_damage(run: Path) -> None:
    content = {"generation": 1, "parent": "step-00000020.g0000", "time": "2026-01-01T00:00:00+00:00", "world": 1}
    (run / "gen-0001.json").write_bytes(sealed({"format": "ckpt-generation", "version": 1, **content}))
    (run / "step-00000040.g0001/a0").mkdir(parents=True)
    (run / "step-00000040.g0001/a0/rank-00000.safetensors").write_bytes(b"x" * 2048)
    damage(run / "step-00000010.g0000/commit.json", 30)
    found = told("ls", run)
    assert [(s["step"], s["state"]) for s in found["steps"]] == [(10, "damaged"), (20, "committed")]
    assert (found["latest"], found["hidden"]) == ("step-00000020.g0000", 2)
    everything = {s["step"]: s for s in told("ls", run, "--all")["steps"]}
    assert everything[30]["abandoned"]
    assert (everything[40]["state"], everything[40]["bytes"]) == ("leftover", 2048)
    text = shell("ls", run, "--all").stdout
    assert "left behind" in text
    assert "damaged: " in text
    assert "2 not shown" in shell("ls", run).stdout


# inspect


def test_inspect_shows_what_is_there(made: Path) -> None:
    text = shell("inspect", f"{made}@20").stdout
    for words in ("step     20, generation 0", "model.weight", "[40, 50]", "float32", "epoch", "val/loss=0.05"):
        assert words in text
    found = told("inspect", f"{made}@20", "--layout")
    weight = next(t for t in found["tensors"] if t["name"] == "model.weight")
    assert (weight["dtype"], weight["shape"], weight["fragments"], weight["bytes"]) == ("float32", [40, 50], 1, 8000)
    assert weight["pieces"][0]["box"] == [[0, 40], [0, 50]]
    assert {(o["name"], o["scope"], o["value"]) for o in found["objects"]} == {
        ("epoch", "replicated", "2"),
        ("rng", "rank=0", "[1,2]"),
    }
    assert found["packs"][0]["path"] == PACK


def test_inspect_picks(made: Path) -> None:
    text = shell("inspect", made, "--tensors", "*.bias").stdout
    assert "model.bias" in text
    assert "model.weight" not in text
    assert "epoch" not in text
    assert "epoch" in shell("inspect", made, "--objects").stdout
    assert PACK in shell("inspect", made, "--packs").stdout
    assert "[0:40,0:50]" in shell("inspect", made, "--layout").stdout


def test_inspect_names_the_parents(run: Path) -> None:
    for number, parent in ((1, "step-00000020.g0000"), (2, "step-00000025.g0001")):
        content = {"generation": number, "parent": parent, "time": "2026-01-01T00:00:00+00:00", "world": 1}
        (run / f"gen-{number:04d}.json").write_bytes(sealed({"format": "ckpt-generation", "version": 1, **content}))
    shutil.copytree(run / "step-00000010.g0000", run / "step-00000030.g0002")
    (run / "step-00000030.g0002/commit.json").unlink()
    with ckpt.open(f"{run}@30") as c:
        old = c.commit
    publish(c.backend, Commit(**{**old.__dict__, "generation": 2}))
    shutil.copy(
        run / "step-00000030.g0000/a0/manifest.safetensors", run / "step-00000030.g0002/a0/manifest.safetensors"
    )
    result = shell("inspect", run)
    assert result.exit_code == 1  # its manifest says generation 0: found out
    from ckpt.cli.details import _parents

    assert _parents(ckpt.catalog.list_run(c.backend).generations, 2) == ["step-00000025.g0001", "step-00000020.g0000"]


# verify


def test_verify_reads_everything(made: Path) -> None:
    assert shell("verify", made).stdout.startswith("ok  ")
    found = told("verify", made, "--all")
    assert found["ok"]
    assert [c["ref"].rpartition("/")[2] for c in found["checkpoints"]] == [
        f"step-000000{s}.g0000" for s in (10, 20, 30)
    ]
    assert all(c["blocks"] == 2 and c["problems"] == [] for c in found["checkpoints"])


def test_verify_names_what_is_broken(run: Path) -> None:
    damage(run / "step-00000020.g0000" / PACK)
    assert shell("verify", run).exit_code == 0
    result = shell("verify", f"{run}@20")
    assert result.exit_code == 1
    assert "damaged" in result.stdout
    assert "model.weight" in result.stdout
    (run / "step-00000010.g0000/a0/manifest.safetensors").unlink()
    damage(run / "step-00000030.g0000/commit.json", 20)
    (run / "gen-0001.json").write_text("{}")
    found = told("verify", run, "--all", code=1)
    assert not found["ok"]
    assert {c["ref"].rpartition("/")[2]: c["ok"] for c in found["checkpoints"]} == {
        "gen-0001.json": False,
        **{f"step-000000{s}.g0000": False for s in (10, 20, 30)},
    }


# diff


def test_diff_says_what_differs(made: Path) -> None:
    assert shell("diff", made, f"{made}@30").exit_code == 0
    result = shell("diff", f"{made}@10", f"{made}@30")
    assert result.exit_code == 1
    assert "model.bias" in result.stdout
    assert "model.weight" not in result.stdout
    found = told("diff", f"{made}@10", f"{made}@30", code=1)
    assert (found["same"], found["counts"]) == (False, {"differs": 1, "identical": 1})
    bias = found["tensors"][0]
    assert (bias["name"], bias["elements"], bias["at"]) == ("model.bias", 1, [3])
    assert bias["max_abs"] == pytest.approx(2, abs=1e-6)
    assert {v["name"] for v in found["values"] if v["status"] == "differs"} == {"epoch", "val/loss"}
    assert shell("diff", f"{made}@10", f"{made}@30", "--only", "*.weight").exit_code == 0
    close = told("diff", f"{made}@10", f"{made}@30", "--only", "model.*", "--atol", 2.5)
    assert close["counts"] == {"close": 1, "identical": 1}


# reshard (alone; under torchrun and mpiexec in tests/distributed)


def test_reshard_and_its_dry_run(made: Path, tmp_path: Path) -> None:
    rule = ("--tp-rule", "*.weight=1")
    plan = told("reshard", made, tmp_path / "r", "--ranks", 4, "--tp", 2, *rule, "--dry-run")
    assert [r["rank"] for r in plan["ranks"]] == [0, 1, 2, 3]
    assert sum(r["bytes"] for r in plan["ranks"]) == 8160
    assert not (tmp_path / "r").exists()
    done = told("reshard", made, tmp_path / "r", "--ranks", 4, "--tp", 2, *rule, "--step", 7)
    assert (done["step"], done["ranks"], done["packs"]) == (7, 4, 4)
    assert shell("diff", made, tmp_path / "r").exit_code == 0
    assert shell("verify", tmp_path / "r").exit_code == 0
    pieces = {
        t["name"]: [p["box"] for p in t["pieces"]] for t in told("inspect", tmp_path / "r", "--layout")["tensors"]
    }
    assert pieces["model.weight"] == [[[a, a + 20], [b, b + 25]] for a in (0, 20) for b in (0, 25)]
    assert pieces["model.bias"] == [[[0, 20]], [[20, 40]]]


# prune


def steps(run: Path) -> list[str]:
    return sorted(p.name for p in run.iterdir() if p.name.startswith("step"))


def test_prune_shows_and_refuses_then_deletes(run: Path) -> None:
    for args in (["--dry-run"], []):
        result = shell("prune", run, "--keep-last", 1, *args)
        assert result.exit_code == (0 if args else 2)
        assert "step-00000010.g0000  a committed step" in result.stdout
        assert "1 committed step to keep, among them the latest, step-00000030.g0000" in result.stdout
        assert len(steps(run)) == 3
    assert "nothing was deleted" in result.stderr
    refused = told("prune", run, "--keep-last", 1, code=2)
    assert (refused["error"]["kind"], len(refused["delete"]), len(steps(run))) == ("usage", 2, 3)
    done = told("prune", run, "--keep-last", 1, "--yes")
    assert [d["path"] for d in done["delete"]] == ["step-00000010.g0000", "step-00000020.g0000"]
    assert done["bytes"] == sum(d["bytes"] for d in done["delete"]) > 0
    assert steps(run) == ["step-00000030.g0000"]
    assert "nothing to delete" in shell("prune", run, "--keep-last", 1).stdout


@pytest.mark.parametrize(("answer", "code", "left"), [("y\n", 0, 1), ("n\n", 2, 3)])
def test_prune_asks_on_a_terminal(
    run: Path, monkeypatch: pytest.MonkeyPatch, answer: str, code: int, left: int
) -> None:
    monkeypatch.setattr("ckpt.cli.change._somebody_there", lambda: True)
    result = shell("prune", run, "--keep-last", 1, input=answer)
    assert (result.exit_code, len(steps(run))) == (code, left)
    assert "Delete them?" in result.stdout


def test_prune_without_a_policy_touches_no_step(run: Path) -> None:
    (run / "step-00000040.g0000/a0").mkdir(parents=True)
    (run / "step-00000040.g0000/a0/rank-00000.safetensors").write_bytes(b"x")
    assert shell("prune", run, "--yes").exit_code == 0
    assert len(steps(run)) == 4
    old = time.time() - 100_000
    for p in [run / "step-00000040.g0000", *(run / "step-00000040.g0000").rglob("*")]:
        os.utime(p, (old, old))
    assert [d["kind"] for d in told("prune", run, "--yes")["delete"]] == ["leftover"]
    assert len(steps(run)) == 3


def test_prune_by_metric(run: Path) -> None:
    kept = told("prune", run, "--keep-best", "val/loss:2", "--dry-run")["keep"]
    assert kept == ["step-00000020.g0000", "step-00000030.g0000"]
    assert shell("prune", run, "--keep-best", "los", "--yes").exit_code == 3
    assert len(steps(run)) == 3


# export and import


def test_export_and_import_pass_their_options_on(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckpt.offline import export, importing

    seen: list[tuple[Any, ...]] = []

    def note(report: object) -> Callable[..., object]:
        return lambda *args, **options: seen.append((args, options)) or report

    out = export.ExportReport("ref", "there", ("f",), 2, 8160, 0.1, (("head", "embed"),))
    monkeypatch.setattr(export, "export_safetensors", note(out))
    monkeypatch.setattr(export, "export_zarr", note(out))
    monkeypatch.setattr(importing, "import_dcp", note(importing.ImportReport("ref", 7, 2, 1, 8160, 0.1, ("o",))))
    assert "head is embed" in shell("export", made, "there", "--key", "model", "--max-shard-size", "2MiB").stdout
    assert told("export", made, "there", "--format", "zarr", "--only", "*.bias")["tensors"] == 2
    assert "as pickles: o" in shell("import", "dcp", "run", "--step", 7, "--allow-pickle").stdout
    assert shell("export", made, "there", "--format", "zarr", "--dtype", "bfloat16").exit_code == 2
    options = [o for _, o in seen]
    assert (options[0]["only"], options[0]["prefix_strip"], options[0]["max_shard_bytes"]) == (
        ["model"],
        "model",
        2 << 20,
    )
    assert options[1]["only"] == ["*.bias"]
    assert (options[2]["step"], options[2]["allow_pickle"]) == (7, True)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_out_to_other_tools_and_in_from_dcp(made: Path, tmp_path: Path) -> None:
    import safetensors.numpy
    import torch.distributed.checkpoint as dcp

    assert told("export", made, tmp_path / "hf", "--key", "model")["tensors"] == 2
    with ckpt.open(made) as c:
        weight = c.tensors["model.weight"].raw()
    found = safetensors.numpy.load_file(tmp_path / "hf/model.safetensors")
    assert set(found) == {"weight", "bias"}
    assert (found["weight"] == weight).all()
    assert shell("export", made, tmp_path / "hf").exit_code == 4
    assert shell("export", made, tmp_path / "nothing", "--only", "nothing").exit_code == 3
    assert told("export", made, tmp_path / "z", "--format", "zarr")["tensors"] == 2
    assert (tmp_path / "z/zarr.json").exists()

    dcp.save({"model": {"weight": torch.from_numpy(weight)}}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    done = told("import", tmp_path / "dcp", tmp_path / "run", "--step", 3)
    assert (done["step"], done["tensors"]) == (3, 1)
    assert shell("diff", made, tmp_path / "run", "--only", "model.weight").exit_code == 0
    assert shell("import", tmp_path / "dcp", tmp_path / "run", "--step", 3).exit_code == 4
    assert shell("import", tmp_path / "hf", tmp_path / "run", "--step", 4).exit_code == 3


# What it costs.


def test_looking_needs_no_torch_and_no_rich(run: Path) -> None:
    code = f"""
import sys
from click.testing import CliRunner
from ckpt.cli import cli
assert not {{"numpy", "torch", "rich", "zarr", "safetensors"}} & set(sys.modules), "import ckpt.cli is cheap"
run = {str(run)!r}
assert CliRunner().invoke(cli, ["ls", run, "--all"]).exit_code == 0
assert not {{"numpy", "torch", "rich"}} & set(sys.modules), "ls"
verbs = [["inspect", run, "--layout"], ["verify", run, "--all"], ["diff", run, run + "@10"], ["prune", run, "--keep-last", "2", "--yes"]]
for args, expected in zip(verbs, (0, 0, 1, 0)):
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == expected, (args, result.output)
    assert not {{"torch", "rich", "zarr"}} & set(sys.modules), args
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert len(steps(run)) == 2


def test_a_run_of_a_thousand_steps_is_listed_quickly(made: Path, quick_folder: Path) -> None:
    backend = ckpt.backends.LocalBackend(str(made))
    content = read_commit(backend, "step-00000010.g0000").__dict__
    for step in range(1000):
        folder = quick_folder / f"step-{step:08d}.g0000"
        folder.mkdir()
        row = {**content, "step": step}
        row["manifest"] = {"path": row.pop("manifest_path"), "size": row.pop("manifest_size"), "crc32c": "00000005"}
        del row["manifest_crc"]
        (folder / "commit.json").write_bytes(sealed({"format": "ckpt-commit", "version": 1, **row}))
    # The time that the process itself takes: the machine may be busy with other things.
    code = "import resource, sys; from ckpt.cli import cli\ntry: cli.main(sys.argv[1:])\nexcept SystemExit: pass\nu = resource.getrusage(resource.RUSAGE_SELF); print(u.ru_utime + u.ru_stime)"
    best = 9.0
    for _ in range(3):
        out = subprocess.run(
            [sys.executable, "-c", code, "ls", str(quick_folder)], check=True, capture_output=True, text=True
        )
        lines = out.stdout.splitlines()
        assert len(lines) == 1003
        assert lines[-2].startswith("1000 committed")
        best = min(best, float(lines[-1]))
    assert best < 0.5, f"{best:.2f} s"


# How things are shown.


def test_sizes_ages_and_texts() -> None:
    assert [size(n) for n in (0, 1023, 1024, 1536, 1 << 20, 1023 << 10, 5 << 40)] == [
        "0 B", "1023 B", "1.0 KiB", "1.5 KiB", "1.0 MiB", "1.0 MiB", "5.0 TiB",
    ]  # fmt: skip
    assert [age(s) for s in (0, 59, 60, 7300, 200_000, None)] == ["0 s", "59 s", "1 min", "2 h", "2 d", "?"]
    assert [duration(t) for t in ("90", "90s", "1.5h", "7d", "2w")] == [90, 90, 5400, 604800, 1209600]
    assert [size_of(t) for t in ("100", "5GB", "1.5 MiB", "2k", "3GiB")] == [100, 5 * 10**9, 3 << 19, 2000, 3 << 30]
    assert shorten("a\n  b" + "c" * 10, 6) == "a bcc…"
    for wrong in (lambda: size_of("much"), lambda: duration("1y")):
        with pytest.raises(ckpt.UsageError):
            wrong()
