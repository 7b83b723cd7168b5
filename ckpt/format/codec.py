"""CRC32C per 256 KiB block, and numcodecs compression of such blocks."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from awscrt.checksums import crc32c as _crc32c

from ckpt.errors import FormatError, UsageError

__all__ = ["BLOCK", "Codec", "CodecRule", "choose_codec", "crc32c", "n_blocks", "parse_codecs"]

BLOCK = 256 * 1024
"""Bytes of a fragment under one checksum, counted from the fragment's own start; the last one may be shorter."""


def _numcodecs() -> Any:
    import numcodecs  # a tenth of a second that listing a run need not pay

    return numcodecs


def crc32c(data: Any, value: int = 0) -> int:
    """CRC32C (Castagnoli, RFC 3720) of a contiguous buffer, continuing from `value`."""
    return int(_crc32c(data, value))


def n_blocks(nbytes: int) -> int:
    """How many blocks a fragment of `nbytes` has."""
    return -(-nbytes // BLOCK)


@dataclass(frozen=True)
class Codec:
    """A numcodecs codec by its configuration; each block of a fragment is coded by itself."""

    config: str  # canonical JSON, as in numcodecs' get_config()

    @staticmethod
    def of(spec: str | Mapping[str, Any]) -> Codec:
        """From a numcodecs id ("zstd") or configuration ({"id": "blosc", "cname": "lz4", "shuffle": 2}).

        Raises UsageError if numcodecs does not know it.
        """
        config = {"id": spec} if isinstance(spec, str) else dict(spec)
        try:
            full = _numcodecs().get_codec(dict(config)).get_config()
            return Codec(json.dumps(full, sort_keys=True))
        except Exception as e:
            raise UsageError(
                f"codec {spec!r}: numcodecs cannot make it ({e}); name one it knows, such as 'zstd'"
            ) from e

    @staticmethod
    def from_manifest(config: str) -> Codec:
        """A codec named in a manifest. Raises FormatError if it cannot be made here or keeps Python objects."""
        try:
            parsed = json.loads(config)
            if not isinstance(parsed, dict) or parsed.get("id") not in _BYTES_TO_BYTES:
                raise ValueError("not a bytes-to-bytes codec of this version")
            _numcodecs().get_codec(dict(parsed))
        except Exception as e:
            raise FormatError(f"codec {config[:200]!r} of this checkpoint cannot be used here: {e}") from e
        return Codec(config)

    def make(self) -> Any:
        """A numcodecs codec; not shared between threads."""
        return _numcodecs().get_codec(json.loads(self.config))


_BYTES_TO_BYTES = frozenset({"zstd", "lz4", "blosc"})
# Those that decode into a given buffer: a hostile block cannot make them allocate.

CodecRule = Mapping[str, str | Mapping[str, Any]]


def parse_codecs(rules: CodecRule | None) -> tuple[tuple[str, Codec], ...]:
    """{"glob of tensor names": codec} -> ordered (glob, Codec). Raises UsageError for a codec that cannot be used."""
    out = []
    for pattern, spec in (rules or {}).items():
        codec = Codec.of(spec)
        if json.loads(codec.config)["id"] not in _BYTES_TO_BYTES:
            raise UsageError(f"codec for {pattern!r}: use one of {sorted(_BYTES_TO_BYTES)}")
        out.append((pattern, codec))
    return tuple(out)


def choose_codec(name: str, rules: Sequence[tuple[str, Codec]]) -> Codec | None:
    """The codec of the first rule whose glob matches `name`, or None."""
    return next((codec for pattern, codec in rules if fnmatch.fnmatchcase(name, pattern)), None)
