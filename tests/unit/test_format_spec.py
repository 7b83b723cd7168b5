"""The normative text says what the code does: its examples and tables are taken from it and checked."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

import ckpt.format
from ckpt.commit import sealed, step_folder, unseal
from ckpt.format import manifest, parse
from ckpt.format.codec import _BYTES_TO_BYTES, BLOCK, crc32c
from ckpt.format.dtypes import DTYPES
from ckpt.format.fragment import Box, whole
from ckpt.format.layout import Layout
from ckpt.format.pack import MAX_HEADER, Piece, TensorSpec, layout_pack

SPEC = (Path(ckpt.format.__file__).parent / "SPEC.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """The text from a heading to the next."""
    return SPEC.split(f"# {title}\n", 1)[1].split("\n#", 1)[0]


def examples(title: str) -> list[str]:
    return re.findall(r"```json\n(.*)\n```", section(title))


def table(text: str) -> list[list[str]]:
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [r for r in rows if not set(r[0]) <= set("-")]


@pytest.mark.parametrize("kind", ["ckpt-commit", "ckpt-generation"])
def test_sealed_examples_are_sealed(kind: str) -> None:
    text = next(t for t in examples("3.5 Example") if f'"{kind}"' in t)
    content = unseal(text.encode() + b"\n", kind, "SPEC.md")
    assert sealed(content) == text.encode() + b"\n"
    told = {row[0].strip("`") for row in table(section("3.2 Sealed JSON"))}
    assert set(content) <= told
    if kind == "ckpt-generation":
        assert content["parent"] == step_folder(100, 6)


def test_the_pack_example_is_what_is_written() -> None:
    w, b = TensorSpec("model.w", "float32", (4, 6)), TensorSpec("model.b", "bfloat16", (5,))
    layout = layout_pack([Piece(b, whole((5,))), Piece(w, Box((0, 0), (2, 6)))])
    header = layout.header
    assert header[8:].decode().rstrip(" ") == examples("5.1 Example")[0]
    assert (int.from_bytes(header[:8], "little"), layout.data_start, layout.offset.tolist()) == (
        4088,
        4096,
        [4096, 4144],
    )
    assert (layout.table_offset, layout.size) == (4154, 4162)


def test_the_columns_are_those_of_the_code() -> None:
    codes = {"<u4": "U32", "<u8": "U64", "<i8": "I64", "|u1": "U8"}
    told = {row[0].strip("`"): row[1] for row in table(section("6.1 Columns"))[1:]}
    wanted = {f"pack.{name}": codes[kind] for name, kind in manifest.PACK_COLUMNS}
    wanted |= {"header": "U8", "start": "I64", "pack": "U32", "offset": "U64", "length": "U64", "block": "U32"}
    assert told == wanted | {"box": "U32 or U64", "codec": "U8"}


def test_the_element_types_are_those_of_the_code() -> None:
    told: dict[str, tuple[int, str | None]] = {}
    for names, sizes, codes in table(section("7. Element types"))[1:]:
        listed = re.findall(r"`(\w+)`", codes) or [None] * len(names.split())
        for name, size, code in zip(re.findall(r"`(\w+)`", names), sizes.split(), listed, strict=True):
            told[name] = int(size), code
    assert told == {name: (d.itemsize, d.safetensors) for name, d in DTYPES.items()}


def test_the_layouts_can_be_read() -> None:
    found = re.findall(r"`(\{\"[^`]*\})`", section("9. Layouts"))
    assert len(found) == 4
    for text in found:
        assert Layout.from_json(text).to_json() == text


def test_numbers() -> None:
    assert f"({BLOCK} bytes)" in SPEC and f"{BLOCK}" in section("6.2 Header")
    assert crc32c(b"123456789") == int(re.findall(r"`123456789` is `(\w+)`", SPEC)[0], 16)
    assert f"{MAX_HEADER:,}".replace(",", " ") in section("5. Pack")
    assert f"{MAX_HEADER + 2 * 4096:,}".replace(",", " ") in section("13. What a reader MUST check")
    assert set(re.findall(r"`(\w+)`", section("8. Codecs"))) >= _BYTES_TO_BYTES
    assert parse._ATTEMPT.pattern in section("12. Security")
    assert np.dtype("<u4").itemsize == 4 and json.loads("1") == manifest.VERSION


def test_it_names_nothing_of_this_machine() -> None:
    assert not re.search(r"(^|[\s`(])/(home|tmp|work|root|usr|var)/", SPEC)
