"""The bytes of fragments where they are in a state: in tensors."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
import torch

from ckpt.format.fragment import Box, contiguous_span, flat_boxes, whole
from ckpt.snapshot.device import device_of

__all__ = ["TensorSource", "source_of"]

Bytes = npt.NDArray[np.uint8]


class TensorSource:
    """The bytes of one fragment, read from the tensor that holds it: `view` has the fragment's shape."""

    def __init__(self, view: torch.Tensor) -> None:
        self._view, self._device = view, device_of(view)
        self._device.begin()
        self.nbytes = view.numel() * view.element_size()
        self.flat: Bytes | None = None  # the bytes themselves, where they lie in one piece
        if self._device.mapped and view.is_contiguous() and self.nbytes:
            memory = (ctypes.c_ubyte * self.nbytes).from_address(view.data_ptr())
            self.flat = np.frombuffer(memory, dtype=np.uint8)

    def into(self, start: int, out: Bytes) -> None:
        """Copies bytes [start, start+len(out)) of the fragment, row-major. Both ends are on elements."""
        if self.flat is not None:
            np.copyto(out, self.flat[start : start + len(out)])
            return
        size = self._view.element_size()
        at = 0
        for box in flat_boxes(tuple(self._view.shape), start // size, (start + len(out)) // size):
            n = box.numel * size
            self._device.read(self._view[box.slices], out[at : at + n])
            at += n


def source_of(view: torch.Tensor, box_in_view: Box) -> TensorSource:
    """The bytes of a box of a view."""
    if box_in_view == whole(tuple(view.shape)):
        return TensorSource(view)
    span = contiguous_span(tuple(view.shape), box_in_view)
    if span is not None and view.is_contiguous():
        return TensorSource(view.reshape(-1)[span[0] : span[0] + span[1]])
    return TensorSource(view[box_in_view.slices])
