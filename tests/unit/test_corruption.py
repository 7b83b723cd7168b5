"""Damage of every kind is found by `verify` and by a load, which name what is damaged; `restore` falls back, loudly."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt
from ckpt.backends import LocalBackend, MemoryBackend
from ckpt.commit import publish, read_commit
from ckpt.errors import CkptError, FormatError, IntegrityError, NotFoundError
from ckpt.format.parse import parse_manifest

CODEC = {"coded*": "zstd"}


def state(version: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(version)
    return {
        "model": {"weight": torch.rand(17, 9, generator=g), "bias": torch.rand(5, generator=g).to(torch.bfloat16)},
        "coded": torch.arange(400).reshape(20, 20) + version,
        "count": torch.tensor(version),
        "note": f"version {version}",
    }


def content(s: dict[str, Any]) -> list[Any]:
    tensors = [s["model"]["weight"], s["model"]["bias"], s["coded"], s["count"]]
    return [*(t.tolist() for t in tensors), s["note"]]


@dataclass
class Run:
    """A run in memory with one step, whose bytes can be changed."""

    url: str
    root: str

    def path(self, name: str) -> str:
        return next(k for k in MemoryBackend._stores if k.startswith(f"{self.root}/") and k.endswith(name))

    def get(self, name: str) -> bytes:
        return MemoryBackend._stores[self.path(name)][0]

    def put(self, name: str, data: bytes) -> None:
        MemoryBackend._stores[self.path(name)] = (data, 0.0)


COMMIT, MANIFEST, PACK = "commit.json", "manifest.safetensors", "rank-00000.safetensors"


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    root = f"corrupt-{request.node.name}"
    ckpt.save(state(1), f"memory://{root}", codec=CODEC)
    yield Run(f"memory://{root}", root)
    for key in [k for k in MemoryBackend._stores if k.startswith(f"{root}/")]:
        del MemoryBackend._stores[key]


def flipped(data: bytes, byte: int, bit: int) -> bytes:
    return data[:byte] + bytes([data[byte] ^ (1 << bit)]) + data[byte + 1 :]


def verify(url: str) -> str:
    """What `verify` says of the latest step: "" if all is well."""
    try:
        with ckpt.open(url) as c:
            return "; ".join(c.verify().problems)
    except (IntegrityError, FormatError, NotFoundError) as e:
        return f"{e.kind}: {e}"


def load(url: str) -> str:
    """What a load of the latest step says: "" if it went through."""
    target = state(0)
    try:
        ckpt.load(target, url)
    except (IntegrityError, FormatError, NotFoundError) as e:
        return f"{e.kind}: {e}"
    return ""


def undetected(
    run: Run, name: str, check: Callable[[str], str], damage: Iterator[tuple[object, bytes]]
) -> list[object]:
    """The kinds of damage to a file that `check` does not report by the file's name. Leaves the file as it was."""
    original, out = run.get(name), []
    for what, data in damage:
        run.put(name, data)
        if name not in check(run.url):
            out.append(what)
    run.put(name, original)
    assert check(run.url) == ""
    return out


def flips(data: bytes, step: int = 1, bits: int = 1) -> Iterator[tuple[object, bytes]]:
    """Every `step`-th byte with one bit flipped, a different one each time; with bits=8, each of its bits."""
    for byte in range(0, len(data), step):
        for bit in range(bits) if bits == 8 else [(byte // step) % 8]:
            yield (byte, bit), flipped(data, byte, bit)


def cuts(data: bytes, step: int = 1) -> Iterator[tuple[object, bytes]]:
    for n in range(0, len(data), step):
        yield n, data[:n]


@pytest.mark.parametrize("check", [verify, load])
def test_every_flipped_bit_of_a_commit(run: Run, check: Callable[[str], str]) -> None:
    assert undetected(run, COMMIT, check, flips(run.get(COMMIT), bits=8)) == []


@pytest.mark.parametrize("check", [verify, load])
def test_a_flipped_bit_in_every_byte_of_a_manifest(run: Run, check: Callable[[str], str]) -> None:
    assert undetected(run, MANIFEST, check, flips(run.get(MANIFEST))) == []


def test_a_flipped_bit_in_every_byte_of_a_pack(run: Run) -> None:
    with ckpt.open(run.url) as c:
        assert undetected(run, PACK, lambda _: "; ".join(c.verify().problems), flips(run.get(PACK))) == []


def regions(url: str) -> tuple[int, int, dict[str, range]]:
    """(start of the data, of the table, stored bytes of each tensor) of the pack."""
    with ckpt.open(url) as c:
        m = c.manifest
        rows = {t.key: int(m.start[i]) for i, t in enumerate(m.tensors)}
        where = {k: range(int(m.offset[r]), int(m.offset[r] + m.length[r])) for k, r in rows.items()}
        return int(m.packs.data_start[0]), int(m.packs.table_offset[0]), where


def test_a_load_finds_flips_in_header_data_and_table(run: Run) -> None:
    pack = run.get(PACK)
    data, table, _ = regions(run.url)
    for lo, hi, step in ((0, data, 61), (data, table, 7), (table, len(pack), 1)):
        part = [(what, d) for what, d in flips(pack) if lo <= what[0] < hi][::step]  # type: ignore[index]
        assert undetected(run, PACK, load, iter(part)) == []


def test_a_flip_in_data_names_block_and_tensor(run: Run) -> None:
    pack = run.get(PACK)
    data, table, where = regions(run.url)
    assert sorted(b for r in where.values() for b in r) == list(range(data, table)), "bytes that belong to no tensor"
    for name, place in where.items():
        for byte in (place[0], place[-1]):
            run.put(PACK, flipped(pack, byte, 3))
            for said in (verify(run.url), load(run.url)):
                assert PACK in said and f"tensor {name!r}" in said and "block " in said, said
                assert f"from byte {place[0]}" in said
                assert not [other for other in where if other != name and repr(other) in said]
    run.put(PACK, flipped(pack, 9, 0))
    assert "header (bytes 0 to 4096)" in load(run.url) and "'model.weight'" in load(run.url)
    run.put(PACK, flipped(pack, len(pack) - 1, 0))
    assert "block table" in load(run.url) and "'model.weight'" in load(run.url)


@pytest.mark.parametrize("check", [verify, load])
def test_every_truncation(run: Run, check: Callable[[str], str]) -> None:
    assert undetected(run, COMMIT, check, cuts(run.get(COMMIT))) == []
    assert undetected(run, MANIFEST, check, cuts(run.get(MANIFEST), 7)) == []
    assert undetected(run, PACK, check, cuts(run.get(PACK), 13)) == []


@pytest.mark.parametrize("check", [verify, load])
def test_bytes_too_many_and_files_that_are_gone(run: Run, check: Callable[[str], str]) -> None:
    for name in (COMMIT, MANIFEST, PACK):
        data = run.get(name)
        more = [("one byte", data + b"\0"), ("a copy", data + data), ("a newline", data + b"\n")]
        assert undetected(run, name, check, iter(more)) == []
    path = run.path(PACK)
    kept = MemoryBackend._stores.pop(path)
    assert PACK in check(run.url)
    MemoryBackend._stores[path] = kept
    path = run.path(MANIFEST)
    kept = MemoryBackend._stores.pop(path)
    assert MANIFEST in check(run.url)
    MemoryBackend._stores[path] = kept


def test_a_slice_is_checked_too(run: Run) -> None:
    pack = run.get(PACK)
    _, _, where = regions(run.url)
    run.put(PACK, flipped(pack, where["model.weight"][-1], 0))
    with ckpt.open(run.url) as c:
        with pytest.raises(IntegrityError, match=r"model\.weight"):
            _ = c.tensors["model.weight"][0, 0]
        assert torch.equal(c.tensors["coded"][3], state(1)["coded"][3])


def test_swapped_files_of_two_steps(run: Run) -> None:
    """Whole files that were written, but elsewhere: each names what it belongs to, by its place or its checksum."""
    ckpt.save(state(2), run.url, step=7, codec=CODEC)
    names = [n for n in MemoryBackend._stores if n.startswith(f"{run.root}/step-00000000")]
    for mine in names:
        other = mine.replace("step-00000000", "step-00000007")
        if mine.endswith("attempt.json"):
            continue
        a, b = MemoryBackend._stores[mine], MemoryBackend._stores[other]
        MemoryBackend._stores[mine], MemoryBackend._stores[other] = b, a
        for step in (0, 7):
            assert load(f"{run.url}@{step}") != "", mine
        MemoryBackend._stores[mine], MemoryBackend._stores[other] = a, b
    assert load(run.url) == ""


# Falling back.


def two_steps(tmp_path: Path) -> tuple[str, Callable[[], ckpt.Checkpointer]]:
    run = str(tmp_path / "run")
    live = state(0)

    def job() -> ckpt.Checkpointer:
        return ckpt.Checkpointer(run, live, storage=ckpt.Every(1))

    cp = job()
    assert cp.restore() == 0
    for step in (0, 1):
        live.update(state(step + 10))
        assert cp.step(step).committed(None)
    cp.close()
    live.update(state(0))
    return run, lambda: ckpt.Checkpointer(run, live, storage=ckpt.Every(1))


NEWEST = "step-00000001.g0001"


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path, at: int) -> None:
    path.write_bytes(flipped(path.read_bytes(), at, 2))


DAMAGE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "commit flipped": ("commit.json", lambda p: _flip(p, 40)),
    "commit cut": ("commit.json", _cut),
    "commit empty": ("commit.json", lambda p: p.write_bytes(b"")),
    "manifest flipped": ("a0/manifest.safetensors", lambda p: _flip(p, 200)),
    "manifest cut": ("a0/manifest.safetensors", _cut),
    "manifest gone": ("a0/manifest.safetensors", Path.unlink),
    "header flipped": ("a0/rank-00000.safetensors", lambda p: _flip(p, 4000)),
    "data flipped": ("a0/rank-00000.safetensors", lambda p: _flip(p, 4100)),
    "table flipped": ("a0/rank-00000.safetensors", lambda p: _flip(p, p.stat().st_size - 1)),
    "pack cut": ("a0/rank-00000.safetensors", _cut),
    "pack gone": ("a0/rank-00000.safetensors", Path.unlink),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_restore_falls_back_and_says_so(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    run, job = two_steps(tmp_path)
    name, act = DAMAGE[damage]
    act(Path(run) / NEWEST / name)
    assert name in verify(run) and name in load(run)
    assert load(f"{run}@1") and not load(f"{run}@0")
    cp = job()
    with caplog.at_level(logging.ERROR, "ckpt"):
        assert cp.restore() == 1
    assert content(cp._state) == content(state(10))
    loud = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(loud) == 1 and name in loud[0] and "step-00000000.g0001" in loud[0]
    # The job goes on from there, and what it saves is the present.
    cp._state.update(state(20))
    assert cp.step(1).committed(None)
    assert not load(run) and not verify(run)
    target = state(0)
    assert ckpt.load(target, run).generation == 2 and content(target) == content(state(20))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_run_with_nothing_but_damage_is_not_begun_anew(tmp_path: Path, damage: str) -> None:
    run, job = two_steps(tmp_path)
    name, act = DAMAGE[damage]
    for folder in (NEWEST, "step-00000000.g0001"):
        act(Path(run) / folder / name)
    with pytest.raises((IntegrityError, FormatError, NotFoundError), match=Path(name).name):
        job().restore()


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_generation_file_loses_nothing(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    """A generation that has no step yet, and of which it is not known any more where it came from."""
    run, job = two_steps(tmp_path)
    job().restore()
    path = Path(run) / "gen-0002.json"
    {"flip": lambda: _flip(path, 30), "cut": lambda: _cut(path), "gone": path.unlink}[damage]()
    cp = job()
    with caplog.at_level(logging.ERROR, "ckpt"):
        assert cp.restore() == 2 and content(cp._state) == content(state(11))
    assert damage == "gone" or any("gen-0002.json" in r.getMessage() for r in caplog.records)


def test_every_flipped_byte_of_a_generation_file_is_seen(tmp_path: Path) -> None:
    run, _ = two_steps(tmp_path)
    backend, path = LocalBackend(run), Path(run) / "gen-0001.json"
    original = path.read_bytes()
    for _, data in flips(original, bits=8):
        path.write_bytes(data)
        listing = ckpt.catalog.list_run(backend)
        assert listing.generations[0].error and len(listing.committed) == 2
    path.write_bytes(original)


def test_an_error_of_the_storage_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be read now may be read in a minute: a restore that fell back here would throw work away."""
    _, job = two_steps(tmp_path)
    fetch = LocalBackend.fetch

    def flaky(self: LocalBackend, path: str, limit: int) -> bytes:
        if path.startswith(NEWEST):
            raise ckpt.StorageError(f"reading {path}: Input/output error")
        return fetch(self, path, limit)

    monkeypatch.setattr(LocalBackend, "fetch", flaky)
    with pytest.raises(ckpt.StorageError, match="Input/output error"):
        job().restore()


# One safeguard less: for each, the tests above or in tests/crash would fail, since the damage goes undetected.


class _Equal(int):
    """A checksum that equals every other."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


def test_without_block_checksums_flips_pass(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = run.get(PACK)
    _, table, _ = regions(run.url)
    for module in (ckpt.stored, ckpt.checkpoint):
        monkeypatch.setattr(module, "crc32c", lambda *_: _Equal(0))
    some = [(what, d) for what, d in flips(pack, 101) if what[0] < table]  # type: ignore[index]
    assert len(undetected(run, PACK, verify, iter(some))) == len(some)
    assert undetected(run, PACK, load, iter(some))


def test_without_the_commit_s_checksum_flips_pass(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = run.get(COMMIT)
    monkeypatch.setattr(ckpt.commit, "sealed", lambda content: _Anything())
    digits = [i for i in range(len(commit)) if commit[i : i + 1].isdigit()]
    some = [((i, 0), flipped(commit, i, 0)) for i in digits]
    assert undetected(run, COMMIT, load, iter(some))


class _Anything(bytes):
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = bytes.__hash__


def test_without_the_manifest_s_checksum_flips_pass(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = run.get(MANIFEST)
    monkeypatch.setattr(ckpt.checkpoint, "read_manifest", lambda *_: parse_manifest(run.get(MANIFEST), MANIFEST))
    assert undetected(run, MANIFEST, verify, flips(manifest, 7))


def test_without_the_length_of_a_pack_a_longer_one_passes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with ckpt.open(run.url) as c:
        size = int(c.manifest.packs.size[0])
    monkeypatch.setattr(MemoryBackend, "size", lambda *_: size)
    assert undetected(run, PACK, verify, iter([("one byte", run.get(PACK) + b"\0")])) == ["one byte"]


def racing_commits(backend: LocalBackend) -> list[str]:
    """Two writers publish one step at once: the writers whose commit was accepted."""
    commit = read_commit(backend, "step-00000000.g0000")
    backend.delete("step-00000000.g0000/commit.json")
    accepted = []
    for writer in ("first", "second"):
        try:
            publish(backend, replace(commit, writer=writer))
            accepted.append(writer)
        except CkptError:
            pass
    return accepted


def test_without_create_only_two_commits_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ckpt.save(state(1), tmp_path / "run")
    backend = LocalBackend(str(tmp_path / "run"))
    assert racing_commits(backend) == ["first"]
    monkeypatch.setattr("os.link", lambda src, dst: Path(dst).write_bytes(Path(src).read_bytes()))
    assert racing_commits(backend) == ["first", "second"]


def left_by_a_failed_save(run: Path) -> list[str]:
    """The files that a save whose disk fills up leaves."""

    def full(name: str) -> None:
        if name == "local.new.write":
            raise OSError(28, "No space left on device")

    ckpt.faults.install(full)
    try:
        with pytest.raises(ckpt.StorageError):
            ckpt.save(state(1), run)
    finally:
        ckpt.faults.install(None)
    return [str(p.relative_to(run)) for p in run.rglob("*.safetensors")]


def test_without_abort_a_failed_save_leaves_its_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert left_by_a_failed_save(tmp_path / "a") == []
    monkeypatch.setattr("ckpt.backends.local._FileUpload.abort", lambda self: None)
    monkeypatch.setattr("ckpt.catalog.delete_tree", lambda *_: None)
    assert left_by_a_failed_save(tmp_path / "b") == ["step-00000000.g0000/a0/rank-00000.safetensors"]


def test_without_the_check_of_coverage_a_hole_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = {"x": ckpt.Shard(torch.ones(2, 3), (4, 3), (0, 0))}
    with pytest.raises(ckpt.LayoutError, match="incomplete"):
        ckpt.save(half, tmp_path / "run")
    monkeypatch.setattr("ckpt.plan._check_coverage", lambda *_: None)
    ckpt.save(half, tmp_path / "run")
    # And the reader has a check of its own.
    with ckpt.open(tmp_path / "run") as c:
        assert "fragments hold 6 of 12 elements" in "".join(c.verify().problems)
    with pytest.raises(FormatError, match="fragments hold 6 of 12 elements"):
        ckpt.load({"x": torch.zeros(4, 3)}, tmp_path / "run")
