"""How fast are saves to and loads from an object store?

Against the same server in the same rounds: a raw parallel multipart upload of as many bytes from warm buffers, and a raw
parallel ranged download into warm buffers, with the client that ckpt uses, are the limits; torch DCP goes through its
own fsspec writer and reader (s3fs). The server is the one that AWS_ENDPOINT_URL names, else a radosgw that is started
here (`make s3-server`). Store and client share the cores of this machine: the ratios say something, the rates do not.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

import ckpt
from benchmarks.harness import Rank, Rounds, Sample, World
from benchmarks.report import Table, finish, machine, options, ratio_cell, spread, workspace
from ckpt.backends import backend_for
from ckpt.backends.s3_client import client_for
from ckpt.catalog import delete_tree
from ckpt.config import settings

RAW, CKPT, DCP = "limit: raw requests", "ckpt", "torch DCP, fsspec"
BUCKET = "ckpt-bench"
PART, RANGE, RANGES_AT_ONCE = 16 << 20, 8 << 20, 8
ASKED = {"save": 0.90, "load": 0.85}
ASKED_OVER_DCP = 1.3


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
        list(pool.map(lambda at: client.read(BUCKET, key, at, into[at : at + RANGE]), range(0, len(into), RANGE)))


@contextmanager
def served() -> Iterator[None]:
    """The server of the environment, or one of our own that ends with us; and a bucket."""
    if os.environ.get("AWS_ENDPOINT_URL"):
        yield from _with_bucket()
        return
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "s3"))
    from radosgw import Radosgw

    with workspace(None) as folder:
        server = Radosgw(folder / "radosgw")
        os.environ |= {"AWS_ENDPOINT_URL": server.url, "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ |= {"AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key}
        try:
            yield from _with_bucket()
        finally:
            server.close()


def _with_bucket() -> Iterator[None]:
    client_for({}).call("create_bucket", BUCKET, "")
    yield


def run(args: argparse.Namespace) -> dict[str, Any]:
    names = [n for n in (CKPT, DCP) if not args.only or n in args.only]
    result: dict[str, Any] = {"bench": "object_storage", "machine": machine(Path("/tmp")), "tables": []}
    with served():
        for gib in args.gib:
            for ranks in args.ranks:
                with World(ranks, gib) as world:
                    for verb in (save, load):
                        rounds = measure(world, verb.__name__, names, args.rounds)
                        result["tables"].append({"verb": verb.__name__, "gib": gib, "ranks": ranks, **rounds.to_json()})
    return result


def measure(world: World, verb: str, names: Sequence[str], rounds: int) -> Rounds:
    """Saves go into a fresh run each, removed outside of the time; loads read one that was saved before."""
    stored = {name: f"s3://{BUCKET}/{uuid.uuid4().hex}" for name in (RAW, *names)}
    if verb == "load":
        for name, url in stored.items():
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
        return Rounds(world.nbytes, [RAW]).run([RAW, *names], rounds, turn)
    finally:
        for url in stored.values():
            delete_tree(backend_for(f"s3://{BUCKET}"), _key(url))


def tables(result: dict[str, Any]) -> list[Table]:
    return [_table(part) for part in result["tables"]]


def _table(part: dict[str, Any]) -> Table:
    rounds, verb = Rounds.from_json(part), part["verb"]
    gb = rounds.nbytes / 1e9
    table = Table(
        f"{verb.capitalize()} over S3, {part['gib']:g} GiB, {part['ranks']} rank{'s' * (part['ranks'] > 1)}",
        ["", "seconds", "GB/s", "of raw requests", "times as fast as DCP", "CPU s per GB"],
    )
    for name in rounds.samples:
        if name in rounds.failures:
            table.rows.append([name, "failed", "", "", "", ""])
            table.notes.append(f"{name}: {rounds.failures[name]}")
            continue
        seconds = [s.seconds for s in rounds.samples[name] if s]
        asked = ASKED[verb] if name == CKPT else None
        table.rows.append(
            [
                name,
                spread(seconds),
                f"{gb / statistics.median(seconds):.2f}",
                ratio_cell(rounds.ratios(name), asked),
                _over_dcp(rounds, name),
                f"{rounds.median(name, lambda s: s.cpu_seconds) / gb:.2f}",
            ]
        )
    table.notes.append(f"{gb:.2f} GB, medians (min-max) of {len(next(iter(rounds.samples.values())))} rounds.")
    return table


def _over_dcp(rounds: Rounds, name: str) -> str:
    """Of ckpt, in the median over rounds."""
    if name != CKPT or DCP not in rounds.samples or DCP in rounds.failures:
        return ""
    pairs = zip(rounds.samples[DCP], rounds.samples[CKPT], strict=True)
    times = statistics.median(d.seconds / c.seconds for d, c in pairs if d and c)
    return f"{times:.2f} {'✓' if times >= ASKED_OVER_DCP else '✗'}"


def main(argv: Sequence[str] | None = None) -> None:
    args = options(__doc__ or "").parse_args(argv)
    result = run(args)
    finish(result, tables(result), args.json)


if __name__ == "__main__":
    main()
