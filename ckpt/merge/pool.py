"""Many combinations of the same checkpoints at once, each as a state dict that an objective can look into.

One pass over the checkpoints makes all combinations of a generation: each checkpoint is read once, however many there are.
The results rest in unnamed files that are mapped into memory, not in memory that they would have to share with the objective.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
import torch

from ckpt.checkpoint import Checkpoint
from ckpt.errors import StorageError
from ckpt.format.fragment import whole
from ckpt.merge.recipe import Recipe
from ckpt.merge.stream import Blend
from ckpt.merge.weights import Floats

__all__ = ["Candidate", "Pool"]

_ALIGN = 64


class Candidate(Mapping[str, torch.Tensor]):
    """A combination as a state dict: name -> tensor, by the names of the checkpoint, tied names too, made when asked for.

    The tensors are valid while the objective runs; they may be changed.
    """

    def __init__(self, pool: Pool, memory: npt.NDArray[np.uint8]) -> None:
        self._pool, self._memory = pool, memory

    def __getitem__(self, name: str) -> torch.Tensor:
        t = self._pool.names.get(name)
        if t is None:
            raise KeyError(name)
        at = self._pool.offsets.get(t)
        if at is None:
            return self._pool.base.tensors[name].read()
        spec = self._pool.base.manifest.tensors[t]
        raw = torch.from_numpy(self._memory[at : at + spec.nbytes])
        return raw.view(getattr(torch, spec.dtype)).reshape(spec.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._pool.names)

    def __len__(self) -> int:
        return len(self._pool.names)

    def under(self, key: str) -> dict[str, torch.Tensor]:
        """What the state held under a key, as `model.load_state_dict` takes it: names without the key."""
        return {n[len(key) + 1 :]: self[n] for n in self if n.startswith(f"{key}.")}

    @property
    def objects(self) -> Mapping[str, Any]:
        """The values of the last checkpoint."""
        return self._pool.base.objects


class Pool:
    """The checkpoints of a recipe (its weights do not matter), open. Raises what `Blend` and `Blend.match` raise.

    `names`: of all tensors and what they are also called, to their index. `offsets`: of those that are averaged, by index,
    to the byte where they lie in a combination.
    """

    def __init__(self, recipe: Recipe, scratch: str | None) -> None:
        self.blend = Blend(recipe)
        try:
            self._found = self.blend.match()
            self._scratch = scratch
            self._files: list[npt.NDArray[np.uint8]] = []
            self.passes = 0
            self.base = Checkpoint(self.blend.backends[-1], self.blend.commit)
            self.base.manifest = self.blend.manifest
            m = self.blend.manifest
            self.names = {**m.by_key, **{a: m.by_key[b] for a, b in m.aliases.items() if b in m.by_key}}
            self.offsets: dict[int, int] = {}
            self._size = 0
            for t in self._found:
                self.offsets[t] = self._size
                self._size += -(-m.tensors[t].nbytes // _ALIGN) * _ALIGN
        except BaseException:
            self.blend.close()
            raise

    @property
    def bytes_read(self) -> int:
        return self.blend.stats.read

    def combine(self, rows: Sequence[Floats]) -> list[Candidate]:
        """The combinations for rows of weights (terms,), from one pass. They replace those of the last call."""
        if not len(rows):
            return []
        weights = np.array(rows, dtype=np.float64)
        m = self.blend.manifest
        order = list(self._found)
        boxes = [(t, whole(m.tensors[t].shape)) for t in order]
        places = [self._memory(i) for i in range(len(weights))]
        for window in self.blend.weighed(boxes, self._found, weights):
            for parts in window:
                at = self.offsets[order[parts[0].index]] + parts[0].start
                for place, part in zip(places, parts, strict=True):
                    place[at : at + len(part.data)] = part.data
        self.passes += 1
        return [Candidate(self, place) for place in places]

    def _memory(self, i: int) -> npt.NDArray[np.uint8]:
        if i == len(self._files):
            try:
                with tempfile.TemporaryFile(dir=self._scratch) as made:
                    os.posix_fallocate(made.fileno(), 0, max(self._size, 1))  # a hole would be a SIGBUS on a full disk
                    file = cast(BinaryIO, made)
                    self._files.append(np.memmap(file, dtype=np.uint8, mode="r+"))  # the mapping keeps it
            except OSError as e:
                raise StorageError(
                    f"no room for a combination of {self._size} bytes ({e}); name another scratch folder"
                ) from e
        return self._files[i]

    def close(self) -> None:
        self._files.clear()
        self.blend.close()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
