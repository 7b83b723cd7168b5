"""How fast are saves to and loads from an object store?

Against the same server in the same rounds: a raw parallel multipart upload of as many bytes from warm buffers, and a raw
parallel ranged download into warm buffers, with the client that ckpt uses, are the limits; torch DCP goes through its
own fsspec writer and reader (s3fs). The server is the one that AWS_ENDPOINT_URL names, else a radosgw that is started
here (`make s3-server`). Store and client share the cores of this machine: the ratios say something, the rates do not.

Besides, through a proxy that makes every answer 20 ms late: the same; the requests of one save; the bytes that a load
fetches with `exchange=True`. And what a local tier costs a loop while its steps trickle to the store: as it is, and with
the store's processes at the lowest priority, since the cores of a real one are none of the trainer's.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

import ckpt
from benchmarks.harness import DEADLINE, Failed, Rank, Rounds, Sample, World
from benchmarks.report import Table, finish, machine, options, ratio_cell, spread, verdict, workspace
from ckpt.backends import backend_for
from ckpt.backends.s3_client import client_for
from ckpt.catalog import delete_tree
from ckpt.config import settings

sys.path.append(str(Path(__file__).parents[1] / "tests" / "s3"))  # its server and its proxy

RAW, CKPT, DCP = "limit: raw requests", "ckpt", "torch DCP, fsspec"
LOCAL, TIERED = "local disk only", "local disk, and S3 behind it"
APART = f"{TIERED}, the store at the lowest priority"
BUCKET = "ckpt-bench"
PART, RANGE, RANGES_AT_ONCE = 16 << 20, 8 << 20, 8
ASKED = {"save": 0.90, "load": 0.85}
ASKED_OVER_DCP, ASKED_OVER_DCP_LATE = 1.3, 2.0
ASKED_REQUESTS, ASKED_FETCHED, ASKED_STALL = 1.0, 1.02, 1.05
LATE = 0.02  # seconds
LATE_GIB = 0.25  # of what goes through the proxy
TABLES = ("save", "load", "requests", "late-save", "late-load", "fetched", "tiers")
STEPS, STEP = 6, 0.5  # of a loop with a local tier: how many, and seconds of one


def save(rank: Rank, name: str, url: str) -> dict[str, Any]:
    if name == CKPT:
        return rank.timed(lambda: _none(ckpt.save(rank.state.tree(), url)))
    if name == DCP:
        return rank.timed(lambda: _none(dcp.save(rank.state.dicts(), storage_writer=FsspecWriter(url))))
    return rank.timed(lambda: _upload(_flat(rank), f"{_key(url)}/rank-{rank.rank}"))


def load(rank: Rank, name: str, url: str) -> dict[str, Any]:
    if name == CKPT:
        return rank.timed(lambda: _none(ckpt.load(rank.state.tree(), url)))
    if name == DCP:
        return rank.timed(lambda: _none(dcp.load(rank.state.dicts(), storage_reader=FsspecReader(url))))
    return rank.timed(lambda: _download(_flat(rank), f"{_key(url)}/rank-{rank.rank}"))


def load_together(rank: Rank, name: str, url: str) -> dict[str, Any]:
    return rank.timed(lambda: _none(ckpt.load(rank.state.tree(), url, exchange=True)))


def tier_loop(rank: Rank, name: str, folder: str) -> dict[str, Any]:
    """A loop whose steps run on a device, saved each to a local disk; with a tier they trickle to the store meanwhile.
    Returns the seconds for which saves held it up."""
    disk = f"{folder}/{uuid.uuid4().hex}"
    tier = {"local": ckpt.Local(disk)} if name != LOCAL else {}
    run_ = f"s3://{BUCKET}/{uuid.uuid4().hex}" if tier else disk
    stalls: list[float] = []

    def loop() -> dict[str, Any]:
        with ckpt.Checkpointer(run_, rank.state.tree(), storage=ckpt.Every(1), keep=[ckpt.KeepLast(1)], **tier) as cp:  # type: ignore[arg-type]
            for n in range(STEPS):
                time.sleep(STEP)  # the device
                began = time.perf_counter()
                handle = cp.step(n)
                cp.fence()
                stalls.append(time.perf_counter() - began)
                if handle is not None:
                    handle.done(DEADLINE)
        return {"stall": sum(stalls[1:]), "arrived": cp.report.arrived}

    try:
        return rank.timed(loop)
    finally:
        shutil.rmtree(disk, ignore_errors=True)
        if tier:
            delete_tree(backend_for(f"s3://{BUCKET}"), _key(run_))


def _none(_: object) -> None:
    """What a contestant returns is no number of ours."""


def _key(url: str) -> str:
    return url.removeprefix(f"s3://{BUCKET}/")


def _flat(rank: Rank) -> memoryview:
    """Warm memory of as many bytes as this rank holds."""
    if "flat" not in rank.kept:
        rank.kept["flat"] = np.random.default_rng(rank.rank).integers(0, 256, rank.state.local_bytes, dtype=np.uint8)
    return memoryview(rank.kept["flat"])


def _upload(data: memoryview, key: str) -> None:
    client = client_for({})
    upload = client.call("create_multipart_upload", BUCKET, key)["UploadId"]

    def part(at: int) -> dict[str, Any]:
        more = {"UploadId": upload, "PartNumber": at // PART + 1}
        return {"PartNumber": at // PART + 1} | {
            "ETag": client.call("upload_part", BUCKET, key, body=data[at : at + PART], **more)["ETag"]
        }

    with ThreadPoolExecutor(settings().writers) as pool:
        parts = list(pool.map(part, range(0, len(data), PART)))
    client.call("complete_multipart_upload", BUCKET, key, UploadId=upload, MultipartUpload={"Parts": parts})


def _download(into: memoryview, key: str) -> None:
    client = client_for({})
    with ThreadPoolExecutor(RANGES_AT_ONCE) as pool:
        list(pool.map(lambda at: client.read(BUCKET, key, at, [into[at : at + RANGE]]), range(0, len(into), RANGE)))


@contextmanager
def served(parent: Path | None) -> Iterator[list[int]]:
    """The server of the environment, or one of our own that ends with us; and a bucket. Yields the processes of our own."""
    if os.environ.get("AWS_ENDPOINT_URL"):
        yield from _with_bucket([])
        return
    from radosgw import Radosgw

    with workspace(parent) as folder:
        server = Radosgw(folder / "radosgw", gib=32)
        os.environ |= {"AWS_ENDPOINT_URL": server.url, "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ |= {"AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key}
        try:
            yield from _with_bucket(server.pids)
        finally:
            server.close()


def _with_bucket(pids: list[int]) -> Iterator[list[int]]:
    client_for({}).call("create_bucket", BUCKET, "")
    yield pids


@contextmanager
def behind(pids: Sequence[int]) -> Iterator[None]:
    """Within, these processes run at the lowest priority. Only root gets them back from there."""

    def priority(value: int) -> None:
        for pid in pids:
            for thread in Path(f"/proc/{pid}/task").iterdir():
                with suppress(ProcessLookupError):
                    os.setpriority(os.PRIO_PROCESS, int(thread.name), value)

    priority(19)
    try:
        yield
    finally:
        priority(0)


def run(args: argparse.Namespace) -> dict[str, Any]:
    names = [n for n in (CKPT, DCP) if not args.only or n in args.only]
    result: dict[str, Any] = {"bench": "object_storage", "machine": machine(Path("/tmp")), "tables": []}
    small = min(LATE_GIB, *args.gib)

    def measured(world: World, verb: str, **more: Any) -> None:
        rounds = measure(world, verb, names, args.rounds, args.seconds)
        result["tables"].append({"verb": verb, "gib": world.gib, "ranks": world.ranks, **more, **rounds.to_json()})

    with served(args.dir) as pids:
        for gib, ranks in itertools.product(args.gib, args.ranks) if args.tables & {"save", "load"} else ():
            with World(ranks, gib) as world:
                for verb in sorted(args.tables & {"save", "load"}, reverse=True):
                    measured(world, verb)
        with late() as between:
            for ranks in args.ranks if args.tables & {"requests", "late-save", "late-load"} else ():
                with World(ranks, small) as world:
                    if "requests" in args.tables:
                        result["tables"].append(counts(world, between))
                    between.delay = LATE
                    for verb in sorted(args.tables & {"late-save", "late-load"}, reverse=True):
                        measured(world, verb.removeprefix("late-"), late=LATE)
                    between.delay = 0.0
            if "fetched" in args.tables:
                result["tables"].append(fetched(small, between))
        if "tiers" in args.tables:
            tell("a local tier")
            with World(1, small) as world, workspace(args.dir) as folder:

                def turn(_: int, name: str) -> Sample:
                    with behind(pids if name == APART else ()):
                        return world.timed(tier_loop, name, str(folder))

                loops = [LOCAL, TIERED, *([APART] if pids and os.geteuid() == 0 else [])]
                rounds = Rounds(world.nbytes, [LOCAL]).run(loops, args.rounds, turn, args.seconds)
                result["tables"].append({"verb": "tiers", "gib": small, "ranks": 1, **rounds.to_json()})
    return result


@contextmanager
def late() -> Iterator[Any]:
    """A proxy before the server, which the environment names as the server."""
    from proxy import proxy

    server = os.environ["AWS_ENDPOINT_URL"]
    with proxy(server) as between:
        os.environ["AWS_ENDPOINT_URL"] = between.url
        try:
            yield between
        finally:
            os.environ["AWS_ENDPOINT_URL"] = server


def counts(world: World, between: Any) -> dict[str, Any]:
    """The requests of the second save of a process."""
    tell("the requests of a save")
    run_ = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    world.timed(save, CKPT, f"{run_}/1")
    with between.lock:
        between.seen.clear()
    world.timed(save, CKPT, f"{run_}/2")
    seen = list(between.seen)
    parts = sum("partNumber" in request for request in seen)
    delete_tree(backend_for(f"s3://{BUCKET}"), _key(run_))
    return {"verb": "requests", "ranks": world.ranks, "gib": world.gib, "requests": len(seen), "parts": parts}


def fetched(gib: float, between: Any) -> dict[str, Any]:
    """What a load of 2 ranks fetches of what 4 saved."""
    tell("4 ranks to 2")
    url = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    with World(4, gib) as world:
        world.timed(save, CKPT, url)
    with ckpt.open(url) as c:
        stored = c.commit.bytes
    found = {}
    with World(2, gib) as world:
        for name, verb in (("exchange=True", load_together), ("without", load)):
            between.fetched = 0
            world.timed(verb, CKPT, url)
            found[name] = between.fetched / stored
    delete_tree(backend_for(f"s3://{BUCKET}"), _key(url))
    return {"verb": "fetched", "gib": gib, "of": found}


def tell(what: str) -> None:
    """Where a run of many minutes is."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def measure(world: World, verb: str, names: Sequence[str], rounds: int, seconds: float) -> Rounds:
    """Saves go into a fresh run each, removed outside of the time; loads read one that was saved before."""
    tell(f"{verb}, {world.gib:g} GiB, {world.ranks} ranks")
    stored = {name: f"s3://{BUCKET}/{uuid.uuid4().hex}" for name in (RAW, *names)}
    with suppress(Failed):  # a contestant that cannot save shows as one that cannot load
        for name, url in stored.items() if verb == "load" else ():
            world.timed(save, name, url)

    def turn(_: int, name: str) -> Sample:
        if verb == "load":
            return world.timed(load, name, stored[name])
        url = f"s3://{BUCKET}/{uuid.uuid4().hex}"
        try:
            return world.timed(save, name, url)
        finally:
            delete_tree(backend_for(f"s3://{BUCKET}"), _key(url))

    try:
        return Rounds(world.nbytes, [RAW]).run([RAW, *names], rounds, turn, seconds)
    finally:
        for url in stored.values():
            delete_tree(backend_for(f"s3://{BUCKET}"), _key(url))


def tables(result: dict[str, Any]) -> list[Table]:
    special = {"requests": _requests, "fetched": _fetched, "tiers": _tiers}
    return [special.get(part["verb"], _table)(part) for part in result["tables"]]


def _requests(part: dict[str, Any]) -> Table:
    allowed = part["parts"] + 3 * part["ranks"] + 5
    table = Table(
        f"Requests of one save, {part['gib']:g} GiB, {part['ranks']} rank{'s' * (part['ranks'] > 1)}",
        ["requests", "of which parts", "/ (parts + 3 a rank + 5)"],
    )
    ratio = part["requests"] / allowed
    table.rows.append([str(part["requests"]), str(part["parts"]), f"{ratio:.2f}{verdict(ratio <= ASKED_REQUESTS)}"])
    return table


def _fetched(part: dict[str, Any]) -> Table:
    table = Table(f"Load by 2 ranks of what 4 saved, {part['gib']:g} GiB", ["", "bytes fetched / bytes stored"])
    for name, ratio in part["of"].items():
        asked = name == "exchange=True"
        table.rows.append([name, f"{ratio:.3f}{verdict(ratio <= ASKED_FETCHED, asked)}"])
    return table


def _tiers(part: dict[str, Any]) -> Table:
    rounds = Rounds.from_json(part)
    table = Table(
        f"Loop of {STEPS} steps, each saved to a local disk, {part['gib']:g} GiB, 1 rank",
        ["", "stall, seconds", "of local only"],
    )
    stalls = {n: [s.extra["stall"] for s in rounds.samples[n] if s] for n in rounds.samples}
    for name, values in stalls.items():
        ratio = statistics.median(values) / statistics.median(stalls[LOCAL])
        table.rows.append([name, spread(values, ".3f"), f"{ratio:.2f}{verdict(ratio <= ASKED_STALL, name != LOCAL)}"])
    return table


def _table(part: dict[str, Any]) -> Table:
    rounds, verb, late_by = Rounds.from_json(part), part["verb"], part.get("late", 0.0)
    gb = rounds.nbytes / 1e9
    table = Table(
        f"{verb.capitalize()} over S3, {part['gib']:g} GiB, {part['ranks']} rank{'s' * (part['ranks'] > 1)}"
        + (f", every answer {1000 * late_by:g} ms late" if late_by else ""),
        ["", "seconds", "GB/s", "of raw requests", "times as fast as DCP", "CPU s per GB"],
    )
    for name in rounds.samples:
        if name in rounds.failures:
            table.rows.append([name, "failed", "", "", "", ""])
            table.notes.append(f"{name}: {rounds.failures[name]}")
            continue
        seconds = [s.seconds for s in rounds.samples[name] if s]
        asked = ASKED[verb] if name == CKPT and not late_by else None
        table.rows.append(
            [
                name,
                spread(seconds),
                f"{gb / statistics.median(seconds):.2f}",
                ratio_cell(rounds.ratios(name), asked),
                _over_dcp(rounds, name, ASKED_OVER_DCP_LATE if late_by else ASKED_OVER_DCP),
                f"{rounds.median(name, lambda s: s.cpu_seconds) / gb:.2f}",
            ]
        )
    table.notes.append(f"{gb:.2f} GB, medians (min-max) of {len(next(iter(rounds.samples.values())))} rounds.")
    return table


def _over_dcp(rounds: Rounds, name: str, asked: float) -> str:
    """Of ckpt, in the median over rounds."""
    if name != CKPT or DCP not in rounds.samples or DCP in rounds.failures:
        return ""
    pairs = zip(rounds.samples[DCP], rounds.samples[CKPT], strict=True)
    times = statistics.median(d.seconds / c.seconds for d, c in pairs if d and c)
    return f"{times:.2f}{verdict(times >= asked)}"


def _tables(text: str) -> set[str]:
    chosen = set(text.split(","))
    if chosen - set(TABLES):
        raise argparse.ArgumentTypeError(f"tables are {', '.join(TABLES)}")
    return chosen


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__ or "")
    parser.set_defaults(gib=[1.0], ranks=[1, 4])
    parser.add_argument("--tables", type=_tables, default=set(TABLES), help=f"of {','.join(TABLES)}; all by default")
    parser.add_argument("--seconds", type=float, default=300.0, help="begin no further round of a table after so long")
    args = parser.parse_args(argv)
    result = run(args)
    finish(result, tables(result), args.json)


if __name__ == "__main__":
    main()
