"""When steps go to memory, to the local tier and to storage, and what becomes of them there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ckpt.config import ErasureCode, Every, Replicas
from ckpt.format.codec import CodecRule
from ckpt.merge.average import Rule

__all__ = ["Schedule"]


@dataclass(frozen=True)
class Schedule:
    """When steps go to memory, when to storage, and how they are coded there; what protects memory, and what is averaged
    in it; when steps go to the local tier, where that has a schedule of its own, and what a keeper is told of that tier."""

    memory: Every
    storage: Every | None
    codec: CodecRule | None
    redundancy: ErasureCode | Replicas | None = None
    averages: Mapping[str, Rule] = field(default_factory=dict)
    local: Every | None = None
    tier: Mapping[str, Any] | None = None

    def due(self, step: int) -> bool:
        """Whether a step that is not granted counts as skipped."""
        return any(
            e is not None and e.steps is not None and (step + 1) % e.steps == 0
            for e in (self.memory, self.storage, self.local)
        )

    def told(self) -> dict[str, Any]:
        """As the keeper is told."""
        every = (self.memory, self.storage, self.local)
        memory, storage, near = (None if e is None else [e.steps, e.minutes] for e in every)
        codecs = {pattern: _codec_config(c) for pattern, c in (self.codec or {}).items()}
        return {"memory": memory, "storage": storage, "codecs": codecs, "local": self.tier, "near": near}


def _codec_config(codec: Any) -> Any:
    return codec.get_config() if hasattr(codec, "get_config") else codec
