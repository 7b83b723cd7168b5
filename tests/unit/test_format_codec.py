"""Checksums, block counts, and which codecs are let in."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ckpt.errors import FormatError, UsageError
from ckpt.format.codec import BLOCK, Codec, choose_codec, crc32c, n_blocks, parse_codecs

ALLOWED = ["zstd", "lz4", "blosc"]


@pytest.mark.parametrize(
    ("data", "value"),
    [  # RFC 3720, appendix B.4, and the check value of the CRC catalogue
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(reversed(range(32))), 0x113FDB5C),
        (b"123456789", 0xE3069283),
        (b"", 0),
    ],
)
def test_crc32c_is_castagnoli(data: bytes, value: int) -> None:
    assert crc32c(data) == value
    assert crc32c(memoryview(data)[3:], crc32c(data[:3])) == value
    assert crc32c(np.frombuffer(data, np.uint8)) == value


@pytest.mark.parametrize(
    ("nbytes", "blocks"), [(0, 0), (1, 1), (BLOCK - 1, 1), (BLOCK, 1), (BLOCK + 1, 2), (10 * BLOCK, 10)]
)
def test_n_blocks(nbytes: int, blocks: int) -> None:
    assert n_blocks(nbytes) == blocks


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed_codecs_round_trip_through_their_text(name: str) -> None:
    codec = Codec.of(name)
    assert Codec.from_manifest(codec.config) == codec == Codec.of(json.loads(codec.config))
    raw = np.arange(1000, dtype=np.uint8)
    out = np.empty(1000, np.uint8)
    codec.make().decode(codec.make().encode(raw), out=out)
    assert np.array_equal(out, raw)


@pytest.mark.parametrize("name", ALLOWED)
def test_decoding_never_writes_past_the_given_buffer(name: str) -> None:
    coded = Codec.of(name).make().encode(np.zeros(1000, np.uint8))
    with pytest.raises(ValueError, match=r"too small|not enough|buffer"):
        Codec.of(name).make().decode(coded, out=np.empty(999, np.uint8))


@pytest.mark.parametrize(
    "config",
    [
        "",
        "zstd",
        "null",
        "[]",
        "{}",
        '"zstd"',
        "{" * 5000,
        '{"id": "pickle"}',
        '{"id": "json2"}',
        '{"id": "msgpack2"}',
        '{"id": "categorize"}',
        '{"id": "vlen-utf8"}',
        '{"id": "delta", "dtype": "O"}',
        '{"id": "zlib"}',
        '{"id": "lzma"}',
        '{"id": "no such codec"}',
        '{"id": ["zstd"]}',
        '{"id": {"a": 1}}',
        '{"id": null}',
        '{"id": "zstd", "unknown": 1}',
        '{"id": "zstd", "level": 1' + "0" * 5000 + "}",
    ],
)
def test_codecs_of_a_manifest_are_let_in_by_name(config: str) -> None:
    with pytest.raises(FormatError):
        Codec.from_manifest(config)


@pytest.mark.parametrize("spec", ["no such codec", {"id": "zstd", "unknown": 1}, {}, {"level": 3}])
def test_unusable_codec_is_a_usage_error(spec: object) -> None:
    with pytest.raises(UsageError):
        Codec.of(spec)  # type: ignore[arg-type]


def test_rules_apply_in_order() -> None:
    rules = parse_codecs({"optim.*": "lz4", "*": {"id": "zstd", "level": 3}})
    chosen = choose_codec("optim.state.w.exp_avg", rules)
    assert chosen is not None and json.loads(chosen.config)["id"] == "lz4"
    fallback = choose_codec("model.w", rules)
    assert fallback is not None and json.loads(fallback.config)["level"] == 3
    assert choose_codec("model.w", parse_codecs({"optim.*": "lz4"})) is None
    assert parse_codecs(None) == ()


@pytest.mark.parametrize("name", ["pickle", "gzip", "lzma", "delta"])
def test_rules_take_only_what_readers_let_in(name: str) -> None:
    with pytest.raises(UsageError):
        parse_codecs({"*": name})
