"""What a keeper writes to storage is what was sealed, to the bit, or nothing."""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ckpt.config
from ckpt.backends import MemoryBackend
from ckpt.errors import IntegrityError
from ckpt.format.codec import BLOCK, parse_codecs
from ckpt.format.fragment import Box, whole
from ckpt.format.pack import Piece, TensorSpec, layout_pack
from ckpt.keeper.holding import Held, Memory, Part, write_packs
from ckpt.plan import SHARD, Claim, Claims, merge
from ckpt.snapshot.copier import Snapshot
from ckpt.write import Ring, Stored

SIZES = (3, BLOCK // 4, BLOCK // 2 + 5, 7, 0, 3 * BLOCK // 4)
_NUMBERS = itertools.count()
CONFIG = ckpt.config.settings({"CKPT_BUFFER_MIB": "1", "CKPT_DIRECT": "0"})


def held() -> tuple[Held, int]:
    """A step of one rank: six float32 tensors of one to three blocks, one of them empty."""
    specs = [TensorSpec(f"t{n}", "float32", (size,)) for n, size in enumerate(SIZES)]
    boxes: list[Box] = [whole(s.shape) for s in specs]
    plan = merge([Claims.of([Claim(s, (b,), SHARD) for s, b in zip(specs, boxes, strict=True)])])
    rows = plan.rows(0)
    pieces = [Piece(plan.tensors[t], whole(plan.tensors[t].shape)) for t in plan.tensor[rows].tolist()]
    layout = layout_pack(pieces)
    fd = os.memfd_create("test")
    os.ftruncate(fd, layout.size + 8192)
    memory = np.zeros(layout.size, dtype=np.uint8)
    data = np.random.default_rng(0)
    sources = [Stored(data.integers(0, 256, p.nbytes, dtype=np.uint8)) for p in pieces]
    snapshot = Snapshot(layout, sources, [False] * len(pieces), memory)
    report = snapshot.seal()
    os.pwrite(fd, memory.tobytes(), 0)
    size = layout.size + 8192
    return Held(1, 5, 0, plan, {}, {0: Part(report, [], {})}, {0: Memory(fd, size)}), layout.size


def write(step: Held, codec: str | None) -> bytes:
    backend = MemoryBackend(f"held-{next(_NUMBERS)}")
    codecs = parse_codecs({"*": codec} if codec else None)
    write_packs(backend, step, "a0", codecs, CONFIG, lambda: Ring(CONFIG))
    return bytes(backend.fetch(f"{step.folder}/a0/rank-00000.safetensors", 1 << 30))


@pytest.mark.parametrize("codec", [None, "zstd"])
def test_a_flipped_bit_is_never_written(codec: str | None) -> None:
    step, size = held()
    memory = step.memory[0]
    good = os.pread(memory.fd, size, 0)
    assert write(step, None) == good

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, size - 1), st.integers(0, 7))
    def flip(at: int, bit: int) -> None:
        os.pwrite(memory.fd, bytes([good[at] ^ 1 << bit]), at)
        try:
            with pytest.raises(IntegrityError, match="memory of rank 0 at step 5 is damaged"):
                write(step, codec)
        finally:
            os.pwrite(memory.fd, good[at : at + 1], at)

    flip()
    assert write(step, None) == good
    memory.close()
