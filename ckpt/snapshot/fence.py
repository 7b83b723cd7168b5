"""The fence: whoever is about to change what is being copied waits until it is copied."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ckpt.config import settings

__all__ = ["Fence", "fence_here", "owned_storages"]

log = logging.getLogger("ckpt")


class Fence:
    """Between copies and changes. Copies under way are put behind it; `wait` returns when all of them are done.

    An optimizer is fenced by hooks: before its step, and before a state is loaded into it, it waits. Whatever changes
    parameters in another way (an optimizer outside `torch.optim`, a step compiled as a whole, weights swapped by hand)
    calls `wait` itself. Tensor version counters cannot replace it: a fused optimizer does not bump them.
    """

    def __init__(self) -> None:
        self._fenced: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._copies: list[tuple[threading.Event, weakref.WeakMethod[Callable[[], None]]]] = []
        self.waited = 0.0

    def guard(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes an optimizer wait; once per optimizer."""
        if optimizer not in self._fenced:
            self._fenced.add(optimizer)
            optimizer.register_step_pre_hook(lambda *_: self.wait())
            optimizer.register_load_state_dict_pre_hook(lambda *_: self.wait())

    def put(self, copied: threading.Event, give_up: Callable[[], None]) -> None:
        """Puts a copy behind the fence: `copied` is set when it is done, or has failed; `give_up`, a method of the copy,
        makes it fail. The fence does not keep the copy in memory."""
        self._copies = [c for c in self._copies if not c[0].is_set()] + [(copied, weakref.WeakMethod(give_up))]

    def wait(self) -> None:
        """Until all copies are done. One that is not after the deadline is given up: training goes on."""
        if all(copied.is_set() for copied, _ in self._copies):
            return
        began = time.monotonic()
        deadline = settings().deadline
        for copied, give_up in self._copies:
            if not copied.wait(max(0.0, began + deadline - time.monotonic())):
                log.error(
                    "ckpt: a snapshot was not copied within %.0f s and is given up; is its thread alive?", deadline
                )
                call = give_up()
                if call is not None:
                    call()
        self._copies = []
        self.waited += time.monotonic() - began


_fences: dict[int, Fence] = {}


def fence_here() -> Fence:
    """The fence of this process; a fork copies nothing and begins with one of its own."""
    if os.getpid() not in _fences:
        _fences[os.getpid()] = Fence()
    return _fences[os.getpid()]


def owned_storages(optimizers: Iterable[torch.optim.Optimizer]) -> set[int]:
    """Addresses of the storages that only a step of these optimizers changes: parameters, moments, masters."""
    out = set()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                for value in (p, *optimizer.state.get(p, {}).values()):
                    if isinstance(value, torch.Tensor):
                        out.add(_local(value).untyped_storage().data_ptr())
    out.discard(0)
    return out


def _local(value: Any) -> Any:
    return value._local_tensor if hasattr(value, "_local_tensor") else value
