"""The local tier in the hands of a keeper: its host's folder, and the thread that brings steps from there to the run.

A step is committed in the folder of the seat's host; the others get its manifest and commit with the news that it is stored,
and each brings its own packs. So a step that is on the disks reaches the run as long as the keepers live, whatever becomes
of the trainers; after the keepers, the next life brings it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from ckpt.backends import Backend, LocalBackend, backend_for
from ckpt.catalog import Step
from ckpt.commit import Commit, exists, step_folder
from ckpt.config import Settings
from ckpt.errors import ConflictError, UsageError, to_wire
from ckpt.keeper.holding import Held
from ckpt.keeper.loop import Loop
from ckpt.keeper.protocol import Frame, frame
from ckpt.retention import policies_from
from ckpt.tiers import Way, mark_due
from ckpt.trickle import Trickle

__all__ = ["Tier", "commit_to_share"]

log = logging.getLogger("ckpt.keeper")


class Tier:
    """`work` runs a function in the storage thread, the second is called with its result in the loop; `tell` tells the
    trainers."""

    def __init__(
        self,
        loop: Loop,
        config: Settings,
        work: Callable[[Callable[[], Any], Callable[[Any], None]], None],
        tell: Callable[[Frame], None],
    ) -> None:
        self._loop, self._config, self._work, self._tell = loop, config, work, tell
        self._way: Way | None = None
        self._trickle: Trickle | None = None
        self._generation = 0  # that is being trained on this host
        self._sharing = 0  # steps whose commit is on its way to the folder
        self._until: float | None = None

    def begin(self, told: Mapping[str, Any] | None, run: str, generation: int, first: bool) -> str:
        """A life begins, or another trainer joins it. The folder of the local tier, "" if there is none."""
        self._until, self._generation = None, generation
        if told is None:
            return ""
        path, known = str(told["path"]), self._way
        if known is not None and known.local.root != path:
            if not first:
                raise UsageError(f"local={path!r}: other ranks of this host have {known.local.root!r}; name one folder")
            self.close(wait=False)
            known = None
        keep, remote_keep = policies_from(told["keep"]), policies_from(told["remote_keep"])
        if known is None:
            direct = self._config.direct
            local = LocalBackend(path, direct=direct)
            self._way = Way(local, backend_for(run, direct=direct), keep, remote_keep, bool(told["alone"]))
        else:
            known.keep, known.remote_keep, known.alone = keep, remote_keep, bool(told["alone"])
        if told["leads"] and self._trickle is None:
            assert self._way is not None
            life, ended = (lambda: self._generation), (lambda: self._loop.later(lambda: None))
            self._trickle = Trickle(self._way, self._arrived, self._detained, life, ended)
        self._wake()
        return path

    def orphaned(self) -> None:
        """No trainer is left. A job that goes on from what is here has begun its generation by the time this is brought."""
        self._generation = 0

    def backend(self, held: Held, attempt: str) -> Backend:
        """Where this host's packs of a step go. What an attempt that failed left of them is removed: the claim of an attempt
        is on another host, and went with it."""
        assert self._way is not None
        local = self._way.local
        if not exists(local, held.folder):
            for rank in held.memory:
                local.delete(f"{held.folder}/{attempt}/rank-{rank:05d}.safetensors")
        return local

    def obey(self, order: Frame) -> None:
        """`stored`: a step may have been committed on the local tier; `due`: one that is there is to reach the run."""
        way = self._way
        if way is None or not order.head.get("local", True):
            return
        key = order["key"] if order.kind == "due" else (order["generation"], order["step"])
        folder = step_folder(int(key[1]), int(key[0]))
        if order.kind == "stored" and not order.payload:
            self._wake()
            return

        def work() -> None:
            if order.kind == "due":
                if exists(way.local, folder):
                    mark_due(way.local, folder)
                return
            if order["due"]:
                mark_due(way.local, folder)
            cut = int(order["cut"])
            for name, data in ((order["manifest"], order.payload[:cut]), ("commit.json", order.payload[cut:])):
                with suppress(ConflictError):  # it is this folder that it comes from
                    way.local.create(f"{folder}/{name}", data)

        def done(result: Any) -> None:
            self._sharing -= 1
            if isinstance(result, Exception):
                log.error("%s was not committed on the disk of this host: %s", folder, result)
            self._wake()

        self._sharing += 1
        self._work(work, done)

    def quiet(self) -> bool:
        """Whether nothing is left to bring, or trying failed."""
        return not self._sharing and (self._trickle is None or self._trickle.quiet(0))

    def holds(self) -> bool:
        """Whether a keeper that is about to end should wait for what is being brought; not for longer than CKPT_DEADLINE."""
        if self.quiet():
            return False
        if self._until is None:
            self._until = time.monotonic() + self._config.deadline
            self._loop.after(self._config.deadline, lambda: None)
        return time.monotonic() < self._until

    def close(self, wait: bool = True) -> None:
        """Stops, in the middle of a step if need be; what is left the next life brings."""
        if self._trickle is not None:
            self._trickle.close(wait)
        self._trickle = self._way = None

    def _wake(self) -> None:
        if self._trickle is not None:
            self._trickle.wake()

    def _arrived(self, step: Step, sent: int) -> None:
        self._loop.later(lambda: self._tell(frame("arrived", step=step.step, bytes=sent)))

    def _detained(self, step: Step, e: Exception) -> None:
        error = to_wire(e)
        self._loop.later(lambda: self._tell(frame("detained", step=step.step, error=error)))


def commit_to_share(local: Backend, commit: Commit) -> Frame:
    """What the other hosts need of a step that is committed here, as part of the news of it."""
    manifest = local.fetch(f"{commit.folder}/{commit.manifest_path}", 1 << 40)
    text = local.fetch(f"{commit.folder}/commit.json", 1 << 20)
    return frame("share", manifest + text, manifest=commit.manifest_path, cut=len(manifest))
