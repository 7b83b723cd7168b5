"""The rule of the house: a room knows only the rooms it needs. Read from the source, so that nothing slips by."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "ckpt"
FILES = sorted(ROOT.rglob("*.py"))


def imported(file: Path) -> set[str]:
    """All modules a file imports, anywhere in it."""
    out: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            out |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            out |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return out


def knows(file: Path, *modules: str) -> set[str]:
    return {i for i in imported(file) for m in modules if i == m or i.startswith(f"{m}.")}


def place(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


RULES = {
    "format/": ("torch", "ckpt.backends", "ckpt.collective", "ckpt.state", "ckpt.plan", "ckpt.catalog", "mpi4py"),
    "backends/": ("torch", "numpy", "ckpt.format", "ckpt.collective", "ckpt.plan", "ckpt.state"),
    "plan.py": ("torch", "ckpt.backends"),
    "stored.py": ("torch", "ckpt.collective", "ckpt.plan", "ckpt.state"),
    "read.py": ("torch", "ckpt.collective", "ckpt.plan", "ckpt.state"),
    "commit.py": ("torch", "ckpt.collective"),
    "merge/weights.py": ("torch", "ckpt.backends", "ckpt.format", "ckpt.catalog"),
    "merge/fold.py": ("torch", "ckpt.backends", "ckpt.format", "ckpt.catalog"),
    "merge/arithmetic.py": ("torch", "ckpt.backends", "ckpt.format", "ckpt.catalog"),
    "merge/evolve.py": ("torch", "ckpt.backends", "ckpt.format", "ckpt.catalog"),
    "merge/rules.py": ("torch", "ckpt.backends", "ckpt.catalog.list_run"),
    "catalog.py": ("torch", "ckpt.collective"),
    "retention.py": ("torch", "ckpt.backends", "ckpt.collective"),
}


@pytest.mark.parametrize("room", RULES)
def test_a_room_does_not_know(room: str) -> None:
    files = [f for f in FILES if place(f).startswith(room)]
    assert files
    for file in files:
        assert not knows(file, *RULES[room]), place(file)


def test_only_collective_talks_to_the_other_ranks() -> None:
    """Placements, meshes and process group objects may be looked at; exchanging anything is for one file."""
    looks = (
        "torch.distributed.tensor",
        "torch.distributed.device_mesh",
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint",
    )
    for file in FILES:
        if place(file) in ("collective.py",) or place(file).startswith("adapters/"):
            continue
        used = {m for m in knows(file, "torch.distributed") if m != "torch.distributed" and not m.startswith(looks)}
        start_up = {"torch.distributed.init_process_group", "torch.distributed.destroy_process_group"}
        assert not used - start_up, place(file)
        assert not knows(file, "mpi4py"), place(file)


def test_nobody_imports_the_command_line_or_the_adapters() -> None:
    for file in FILES:
        if not place(file).startswith(("cli/", "adapters/")) and place(file) != "__init__.py":
            assert not knows(file, "ckpt.cli", "ckpt.adapters"), place(file)


def test_files_stay_readable() -> None:
    long = {place(f): n for f in FILES if (n := len(f.read_text().splitlines())) > 440}
    assert not long


def test_unpickling_happens_in_two_named_places() -> None:
    """objects.py behind allow_pickle, importing.py with an allow-list; nowhere else."""
    for file in FILES:
        text = file.read_text()
        if place(file) in ("objects.py", "offline/importing.py", "offline/dcp_index.py") or place(file).startswith(
            "adapters/"
        ):
            continue
        assert "pickle.load" not in text and "torch.load(" not in text, place(file)


def test_listing_needs_no_torch() -> None:
    code = "import sys, ckpt, ckpt.catalog, ckpt.checkpoint, ckpt.cli; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
