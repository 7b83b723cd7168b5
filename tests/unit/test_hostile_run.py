"""A run that somebody prepared: nothing outside of it is read or deleted, nothing runs, nothing hangs or grows."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forks import Fresh

import ckpt
from ckpt import catalog
from ckpt.backends import LocalBackend
from ckpt.commit import read_commit, read_generation, sealed
from ckpt.errors import CkptError, ConflictError, FormatError, IntegrityError, NotFoundError, UnsafeError, UsageError
from ckpt.format.codec import crc32c
from ckpt.format.manifest import Manifest, ObjectEntry, dump_manifest
from ckpt.objects import decode_object
from ckpt.offline.prune import carry_out, plan_prune

STEP = "step-00000000.g0000"


def state(version: int = 1) -> dict[str, Any]:
    return {"w": torch.full((4, 5), float(version)), "note": version}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    ckpt.save(state(), tmp_path / "run")
    return tmp_path / "run"


def forge(run: Path, folder: str = STEP, **changes: Any) -> None:
    """Changes a commit, with the right checksum: whoever can write to a run can do that."""
    path = run / folder / "commit.json"
    content = json.loads(path.read_bytes())
    del content["crc32c"]
    for key, value in changes.items():
        content["manifest" if key in ("path", "size") else key] = (
            {**content["manifest"], key: value} if key in ("path", "size") else value
        )
    path.write_bytes(sealed(content))


def forge_manifest(run: Path, change: Callable[[Manifest], Manifest], data: bytes | None = None) -> None:
    """Changes a manifest, and the commit that names it."""
    with ckpt.open(run) as c:
        data = dump_manifest(change(c.manifest)) if data is None else data
    (run / STEP / "a0/manifest.safetensors").write_bytes(data)
    content = {"path": "a0/manifest.safetensors", "size": len(data), "crc32c": f"{crc32c(data):08x}"}
    forge(run, manifest=content)


def refused(run: Path, *kinds: type[CkptError], match: str | None = None) -> None:
    """A load, an open with verify, and a restore all refuse."""
    with pytest.raises(kinds or (FormatError, IntegrityError), match=match):
        ckpt.load(state(), run)
    with pytest.raises(kinds or (FormatError, IntegrityError), match=match), ckpt.open(run) as c:
        assert not c.verify().ok
        raise IntegrityError("; ".join(c.verify().problems))
    with pytest.raises(kinds or (FormatError, IntegrityError), match=match):
        ckpt.Checkpointer(run, state(), storage=ckpt.Every(1)).restore()


# Paths.


@pytest.mark.parametrize(
    "path",
    [
        "../outside/manifest.safetensors",
        "/etc/passwd",
        "a0/../../outside/manifest.safetensors",
        "a0/manifest.safetensors/../manifest.safetensors",
        "a01/manifest.safetensors",
        "a1/manifest.safetensors",
        "",
    ],
)
def test_a_commit_cannot_point_elsewhere(run: Path, path: str) -> None:
    outside = run.parent / "outside"
    (run / STEP / "a0").rename(outside)
    (run / STEP / "a0").mkdir()
    forge(run, path=path)
    refused(run, FormatError, match="does not belong here")


@pytest.mark.parametrize("attempt", ["..", "a0/..", "../../outside", "/tmp", "a00", "A0", "a0\n", ""])
def test_a_manifest_cannot_point_elsewhere(run: Path, attempt: str) -> None:
    forge_manifest(run, lambda m: replace(m, attempt=attempt))
    refused(run, FormatError, match="attempt")
    forge(run, attempt=attempt, path=f"{attempt}/manifest.safetensors")
    refused(run, FormatError, match="does not belong here")


def test_what_says_that_it_is_another_step_is_refused(run: Path) -> None:
    for changes in ({"step": 5}, {"generation": 1}, {"attempt": "a1"}):
        before = (run / STEP / "commit.json").read_bytes()
        forge(run, **changes)
        refused(run, FormatError, match="does not belong here")
        (run / STEP / "commit.json").write_bytes(before)
    forge_manifest(run, lambda m: replace(m, attempt="a7"))
    refused(run, FormatError, match="attempt a7")


@pytest.mark.parametrize("ref", ["step-00000000.g0000/../..", "..", ".", "../run"])
def test_refs_are_paths_of_whoever_gives_them(run: Path, ref: str) -> None:
    """A ref is the caller's; what is in a run never becomes one."""
    ckpt.save(state(2), run, step=1)
    for at in ("run@..", "run@../x"):
        with pytest.raises((UsageError, NotFoundError)):
            ckpt.load(state(), run.parent / at)


# Links.


def test_links_lead_nowhere(run: Path, tmp_path: Path) -> None:
    """A linked step is not listed; a prune removes links, and nothing that they lead to."""
    other = tmp_path / "other"
    ckpt.save(state(9), other, step=9)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("keep me")
    step9 = "step-00000009.g0000"
    (run / step9).symlink_to(other / step9)
    (run / ".ckpt-tmp-x").symlink_to(precious)
    (run / "ledger").symlink_to(precious)
    (run / "step-00000003.g0000").symlink_to(precious)
    (run / "step-00000004.g0000/a0").mkdir(parents=True)
    (run / "step-00000004.g0000/a0/rank-00000.safetensors").symlink_to(precious / "file")
    (run / "step-00000004.g0000/a1").symlink_to(precious)
    (run / STEP / "a1").symlink_to(precious)
    (run / STEP / ".ckpt-tmp-y").symlink_to(precious)
    (precious / ".ckpt-tmp-z").write_text("keep me, too")
    assert [s.step for s in catalog.list_run(LocalBackend(str(run))).steps] == [0, 4]
    backend = LocalBackend(str(run))
    plan = plan_prune(backend, [], 0)
    carry_out(backend, plan, [], 0)
    catalog.delete_tree(backend, "step-00000003.g0000")
    catalog.delete_tree(backend, f"{STEP}/a1")
    assert not os.path.lexists(run / "step-00000003.g0000") and not (run / "step-00000004.g0000").exists()
    assert sorted(p.name for p in precious.iterdir()) == [".ckpt-tmp-z", "file"]
    assert ckpt.load(state(), run).step == 0
    with ckpt.open(other) as c:
        assert c.verify().ok


@pytest.mark.parametrize("name", [f"{STEP}/commit.json", f"{STEP}/a0/manifest.safetensors"])
def test_a_pipe_does_not_hang(run: Path, name: str) -> None:
    (run / name).unlink()
    os.mkfifo(run / name)
    refused(run, match="not a plain file")
    os.mkfifo(run / "gen-0001.json")
    assert catalog.list_run(LocalBackend(str(run))).generations[0].error


def test_a_pack_that_is_a_pipe_does_not_hang(run: Path) -> None:
    (run / STEP / "a0/rank-00000.safetensors").unlink()
    os.mkfifo(run / STEP / "a0/rank-00000.safetensors")
    refused(run)


def test_an_endless_file_is_not_read(run: Path) -> None:
    for name in ("commit.json", "a0/manifest.safetensors", "a0/rank-00000.safetensors"):
        (run / STEP / name).rename(run / "kept")
        (run / STEP / name).symlink_to("/dev/zero")
        refused(run)
        (run / STEP / name).unlink()
        (run / "kept").rename(run / STEP / name)
    assert ckpt.load(state(), run).step == 0


def test_folders_and_files_in_each_other_s_place(run: Path) -> None:
    (run / "gen-0001.json").mkdir()
    (run / "step-00000005.g0000").write_text("a file")
    (run / "step-00000006.g0000/commit.json").mkdir(parents=True)
    assert ckpt.load(state(), run).step == 0
    cp = ckpt.Checkpointer(run, state(2), storage=ckpt.Every(1))
    assert cp.restore() == 1
    assert cp.step(1).committed(None)
    assert cp.report.failed == 0 and ckpt.load(state(), run).step == 1


# Names and numbers.


def test_huge_numbers_in_names(run: Path) -> None:
    for name in (
        "step-99999999999999999999999999.g0000",
        "step-00000001.g99999999999999999999",
        "step-\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0661.g\u0660\u0660\u0660\u0660",
        "step-000000000000000001.g0000",
        "step-00000001.g0000x",
        "gen-99999999999999999999.json",
    ):
        (run / name).mkdir()
    assert ckpt.load(state(), run).step == 0
    ckpt.save(state(3), run, step=10**18 - 1)
    assert ckpt.load(state(), run).step == 10**18 - 1
    with pytest.raises(UsageError, match="18 digits"):
        ckpt.save(state(3), run, step=10**18)


def test_the_last_generation_is_refused_in_front_of_the_training(run: Path) -> None:
    """Else the steps of generation 10**9 would be saved, and never found."""
    (run / "step-00000001.g999999999").mkdir()
    with pytest.raises(ConflictError, match="generation 999999999 is the last possible"):
        ckpt.Checkpointer(run, state(), storage=ckpt.Every(1)).restore()
    assert ckpt.load(state(), run).step == 0


def test_the_last_attempt_is_refused_in_front_of_the_writing(run: Path) -> None:
    for name in ("a999999999", "a99999999999", "a0000000000000000"):
        (run / "step-00000001.g0000" / name).mkdir(parents=True)
    with pytest.raises(ConflictError, match="run `ckpt prune`"):
        ckpt.save(state(2), run, step=1)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e300, 10**400, -1, True, None, [], {}, "9" * 5000])
@pytest.mark.parametrize("key", ["step", "generation", "world", "bytes", "tensors", "size", "metrics", "manifest"])
def test_any_value_in_a_commit(run: Path, key: str, value: Any) -> None:
    """It is refused, or it makes no difference; nothing but our own errors comes out."""
    try:
        forge(run, **{key: value})
    except ValueError:
        return  # Python itself cannot write it
    listing = catalog.list_run(LocalBackend(str(run)))
    assert len(listing.steps) == 1
    with suppress(FormatError, IntegrityError):
        assert ckpt.load(state(), run).step == 0


def test_deep_json(run: Path) -> None:
    deep = b"[" * 200_000 + b"]" * 200_000
    for name in (f"{STEP}/commit.json", "gen-0001.json"):
        path = run / name
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(deep)
        listing = catalog.list_run(LocalBackend(str(run)))
        assert any(s.error for s in listing.steps) or listing.generations[0].error
        path.write_bytes(before or b"")
    forge_manifest(run, lambda m: replace(m, objects=(ObjectEntry("note", "replicated", "json", deep.decode()),)))
    with pytest.raises(FormatError, match="object 'note'"):
        ckpt.load(state(), run)
    with ckpt.open(run) as c:
        assert c.verify().ok
        with pytest.raises(FormatError, match="object 'note'"):
            _ = c.objects["note"]


def _generation(run: Path, number: int, **content: Any) -> None:
    full = {"format": "ckpt-generation", "version": 1, "generation": number, "parent": None, "time": "", "world": 1}
    (run / f"gen-{number:04d}.json").write_bytes(sealed({**full, **content}))


def test_generations_that_come_from_each_other(run: Path) -> None:
    for number, parent in ((1, 1), (2, 3), (3, 2), (4, 5), (5, 4)):
        _generation(run, number, parent=f"step-00000000.g{parent:04d}")
    listing = catalog.list_run(LocalBackend(str(run)))
    assert catalog.lineage(listing) == []
    _generation(run, 4, parent=STEP)
    assert [s.folder for s in catalog.lineage(catalog.list_run(LocalBackend(str(run))))] == [STEP]


@pytest.mark.parametrize("parent", [7, [], {}, True, "../..", "step-1", "step-00000000.g0000/..", "x" * 100_000])
def test_generations_that_come_from_nowhere(run: Path, parent: Any) -> None:
    _generation(run, 1, parent=parent)
    listing = catalog.list_run(LocalBackend(str(run)))
    assert len(listing.committed) == 1
    catalog.lineage(listing)
    assert isinstance(parent, str) or listing.generations[0].error
    _generation(run, 1, generation=2)
    with pytest.raises(FormatError, match="speaks of generation 2"):
        read_generation(LocalBackend(str(run)), 1)


@pytest.mark.parametrize("version", [2, 10**9])
def test_a_newer_version_asks_for_an_upgrade(run: Path, version: int) -> None:
    before = (run / STEP / "commit.json").read_bytes()
    forge(run, version=version)
    refused(run, FormatError, match="upgrade ckpt-universal")
    (run / STEP / "commit.json").write_bytes(before)
    with ckpt.open(run) as c:
        data = dump_manifest(c.manifest).replace(b'"version":1', f'"version":{version}'.encode())
        data = int.from_bytes(data[:8], "little").to_bytes(8, "little") + data[8:]
    if version == 2:  # of the same length, so that it is a valid file
        forge_manifest(run, lambda m: m, data)
        refused(run, FormatError, match="upgrade ckpt-universal")


# Sizes.


def _hardly_any_memory(run: str) -> None:
    """Runs with 600 MiB of address space to spare: who takes memory for what a file merely says fails here."""
    path = Path(run)
    ckpt.load(state(), path)
    with open("/proc/self/statm") as f:
        used = int(f.read().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + (600 << 20),) * 2)

    def huge(m: Manifest, numel: int, size: int) -> Manifest:
        spec = replace(m.tensors[0], shape=(numel,), dtype="uint8", name="huge")
        offset = int(m.packs.data_start[0])
        packs = replace(
            m.packs,
            size=np.array([size], np.uint64),
            table_offset=np.array([size - 4 * -(-numel // 262144)], np.uint64),
            blocks=np.array([-(-numel // 262144)], np.uint32),
        )
        return replace(
            m,
            tensors=(spec,),
            packs=packs,
            offset=np.array([offset], np.uint64),
            length=np.array([numel], np.uint64),
            box=np.array([0, numel], np.uint64),
            objects=(ObjectEntry("note", "replicated", "json", '{"$":"tensor","v":"huge"}'),),
        )

    for numel in (1 << 40, 1 << 47):
        size = 4096 + numel + 4 * -(-numel // 262144)
        forge_manifest(path, lambda m, n=numel, s=size: huge(m, n, s))
        with ckpt.open(path) as c:
            assert not c.verify().ok
            with pytest.raises(IntegrityError, match="bytes long"):
                c.tensors["huge"].read()
            with pytest.raises(IntegrityError, match="bytes long"):
                _ = c.tensors["huge"][5:]
        for target in ({"huge": torch.zeros(3)}, {"note": None}):
            with pytest.raises(CkptError):
                ckpt.load(target, path)
    for size in (1 << 32, (1 << 32) + 1, 1 << 60, -1):
        forge(path, size=size)
        with pytest.raises((FormatError, IntegrityError)):
            ckpt.load(state(), path)


def test_huge_sizes_take_no_memory(run: Path, fresh: Fresh) -> None:
    fresh(_hardly_any_memory, str(run))


# Pickle.


class Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.path),)


def test_no_pickle_runs_unasked(tmp_path: Path) -> None:
    run, crater = tmp_path / "run", tmp_path / "crater"
    ckpt.save({"note": ckpt.Pickled(Bomb(str(crater))), "w": torch.ones(2)}, run)
    target = {"note": None, "w": torch.zeros(2)}
    with pytest.raises(UnsafeError, match="allow_pickle=True"):
        ckpt.load(target, run)
    with pytest.raises(UnsafeError):
        ckpt.Checkpointer(run, target, storage=ckpt.Every(1)).restore()
    with ckpt.open(run) as c:
        assert c.verify().ok and list(c.objects) == ["note"]
        with pytest.raises(UnsafeError, match="object 'note'"):
            _ = c.objects["note"]
    ckpt.load(target, run, only=["w"])
    assert not crater.exists() and target["note"] is None
    ckpt.load(target, run, allow_pickle=True)
    assert crater.exists()


@pytest.mark.parametrize("encoding", ["Pickle", "pickle ", "dill", "", "torch"])
def test_other_encodings_are_not_known(run: Path, encoding: str) -> None:
    forge_manifest(run, lambda m: replace(m, objects=(ObjectEntry("note", "replicated", encoding, "gA=="),)))
    refused(run, FormatError, match="encoding")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nul",
        '{"$":"tuple"}',
        '{"$":"tuple","v":5}',
        '{"$":"complex","v":[]}',
        '{"$":"complex","v":["a","b"]}',
        '{"$":"float","v":"1e999"}',
        '{"$":"set","v":[[1]]}',
        '{"$":"dict","v":[[[1],2]]}',
        '{"$":"dict","v":[1]}',
        '{"$":"bytes","v":"*"}',
        '{"$":"bytes","v":7}',
        '{"$":"ndarray","v":["O",[1],"AAAAAAAAAAA=",false]}',
        '{"$":"ndarray","v":["<f8",[4611686018427387904],"",false]}',
        '{"$":"ndarray","v":["<U1000000000",[1],"",false]}',
        '{"$":"ndarray","v":["<f8",[0],"",true]}',
        '{"$":"ndarray","v":[{"a":1},[0],"",true]}',
        '{"$":"ndarray","v":["f8,(",[0],"",true]}',
        '{"$":"datetime","v":"tomorrow"}',
        '{"$":"datetime","v":12}',
        '{"$":"dtype","v":"torch.load"}',
        '{"$":"dtype","v":3}',
        '{"$":"device","v":"moon"}',
        '{"$":"tensor","v":"w"}',
        '{"$":"os.system","v":"true"}',
        '{"$":["tuple"],"v":[]}',
    ],
)
def test_damaged_values_are_told_as_such(text: str) -> None:
    with pytest.raises(FormatError, match="object 'note'"):
        decode_object("json", text, "object 'note'")


def test_the_commit_of_a_forged_run_is_what_the_tests_think(run: Path) -> None:
    forge(run)
    assert read_commit(LocalBackend(str(run)), STEP).step == 0
    forge_manifest(run, lambda m: m)
    assert ckpt.load(state(), run).step == 0
