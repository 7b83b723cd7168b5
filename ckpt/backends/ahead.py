"""Ranged reads of remote objects: large ones in parallel, small ones that follow one another read ahead.

A store answers in milliseconds, not microseconds: readers that ask for a block or a megabyte at a time, in order, get
it from windows that were asked for before. What is read here and there is asked for as it is, and no byte more.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from ckpt.backends.base import Buffer

__all__ = ["BUDGET", "Ahead", "scatter"]

THREADS = 8
WINDOW = 8 << 20
BUDGET = 64 << 20
_LARGE = 2 * WINDOW
_FIRST = 1 << 20
_SLACK = 2 << 20
_STREAMS = 16


@dataclass(eq=False)
class _Window:
    start: int
    data: bytearray
    got: Future[int]

    @property
    def stop(self) -> int:
        return self.start + len(self.data)


@dataclass(eq=False)
class _Stream:
    """One reader's way through an object: up to where it has read, how far ahead to ask, and what was asked for."""

    position: int
    ahead: int = 0
    windows: list[_Window] = field(default_factory=list)

    def close_to(self, offset: int) -> bool:
        first = min([w.start for w in self.windows] + [self.position - _SLACK])
        return first <= offset <= self.position + _SLACK

    @property
    def nbytes(self) -> int:
        return sum(len(w.data) for w in self.windows)


class Ahead:
    """`get(path, offset, into)` fills a buffer from an object, from several threads, and returns how many bytes there
    were: fewer than asked for only at the end of the object. Holds at most `BUDGET` bytes."""

    def __init__(self, get: Callable[[str, int, Buffer], int]) -> None:
        self._get = get
        self._lock, self._starting = threading.Lock(), threading.Lock()
        self._streams: dict[str, list[_Stream]] = {}
        self._sizes: dict[str, int] = {}
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

    def read(self, path: str, offset: int, into: Sequence[Buffer]) -> int:
        """Fills the buffers, one after the other. Returns how many bytes there were."""
        n = sum(len(b) for b in into)
        if not n:
            return 0
        if n >= _LARGE:
            return self._in_parallel(path, offset, into, n)
        with self._lock:
            windows = self._windows(path, offset, n)
        if not windows and len(into) == 1:
            return self._get(path, offset, into[0])
        data = bytearray(n) if len(into) > 1 else None
        view = memoryview(data) if data is not None else into[0]
        at = 0
        while at < n:
            window = next((w for w in windows if w.start <= offset + at < w.stop), None)
            if window is not None:
                try:
                    there, here = window.got.result(), offset + at - window.start
                except BaseException:
                    self.forget(path)  # or a store that is back would still fail
                    raise
                count = max(0, min(there - here, n - at))
                view[at : at + count] = memoryview(window.data)[here : here + count]
                short = there < len(window.data) and here + count >= there
            else:
                stop = min([w.start - offset for w in windows if w.start > offset + at] + [n])
                count = self._get(path, offset + at, view[at:stop])
                short = count < stop - at
            at += count
            if short:
                break
        if data is not None:
            scatter(memoryview(data)[:at], into)
        return at

    def told(self, path: str, size: int) -> int:
        """Nothing is asked for beyond the size of an object, once that is known. Returns it."""
        with self._lock:
            self._sizes[path] = size
        return size

    def forget(self, path: str) -> None:
        """Lets go of what is known of an object."""
        with self._lock:
            self._streams.pop(path, None)
            self._sizes.pop(path, None)

    def close(self) -> None:
        """Lets go of everything; the next read begins anew."""
        with self._lock:
            self._streams.clear()
            self._sizes.clear()
        with self._starting:
            pool, self._pool = self._pool, None
        if pool is not None and pool[0] == os.getpid():
            pool[1].shutdown(wait=False, cancel_futures=True)

    def _windows(self, path: str, offset: int, n: int) -> list[_Window]:
        """The windows that hold some of a range, more of them asked for if it continues what was read before."""
        streams = self._streams.pop(path, [])
        self._streams[path] = streams  # the last of all: the others are let go first
        stream = next((s for s in streams if s.close_to(offset)), None)
        if stream is None:
            streams.append(_Stream(offset + n))
            del streams[:-_STREAMS]
            return []
        stream.windows = [w for w in stream.windows if w.stop > stream.position - WINDOW]  # other threads
        stream.ahead = min(BUDGET // 2, max(_FIRST, 2 * stream.ahead))
        stream.position = max(stream.position, offset + n)
        upto = stream.windows[-1].stop if stream.windows else offset
        end = self._sizes.get(path, upto + BUDGET)
        while upto < min(end, stream.position + stream.ahead) and not self._ended(stream):
            size = min(WINDOW, max(_FIRST, stream.ahead), end - upto)
            if not self._room(stream, size):
                break
            window = _Window(upto, bytearray(size), Future())
            window.got = self._threads().submit(self._get, path, upto, memoryview(window.data))
            stream.windows.append(window)
            upto += size
        return [w for w in stream.windows if w.start < offset + n and offset < w.stop]

    @staticmethod
    def _ended(stream: _Stream) -> bool:
        """Whether the last window came back short, or not at all."""
        if not stream.windows or not stream.windows[-1].got.done():
            return False
        got = stream.windows[-1].got
        return got.cancelled() or got.exception() is not None or got.result() < len(stream.windows[-1].data)

    def _room(self, mine: _Stream, size: int) -> bool:
        """Makes room for a window, at the cost of streams that were not read from lately."""
        for streams in self._streams.values():
            for stream in streams:
                if sum(s.nbytes for all_ in self._streams.values() for s in all_) + size <= BUDGET:
                    return True
                if stream is not mine:
                    stream.windows, stream.ahead = [], 0
        return sum(s.nbytes for all_ in self._streams.values() for s in all_) + size <= BUDGET

    def _in_parallel(self, path: str, offset: int, into: Sequence[Buffer], n: int) -> int:
        """Ranges of up to `WINDOW` bytes, straight into the buffers where a range lies in one of them."""
        asked: list[tuple[int, int, Future[int], bytearray | None]] = []
        at = index = inside = 0
        while at < n:
            while inside == len(into[index]):
                index, inside = index + 1, 0
            count = min(WINDOW, n - at)
            place = None if len(into[index]) - inside >= count else bytearray(count)
            view = into[index][inside : inside + count] if place is None else memoryview(place)
            asked.append((at, count, self._threads().submit(self._get, path, offset + at, view), place))
            at += count
            while count:
                step = min(count, len(into[index]) - inside)
                inside, count = inside + step, count - step
                if count:
                    index, inside = index + 1, 0
        wait([got for _, _, got, _ in asked])  # nobody writes into the buffers of a read that is over
        total = 0
        for start, count, got, place in asked:
            there = got.result()
            if place is not None:
                scatter(memoryview(place)[:there], into, start)
            total += there
            if there < count:
                break
        return total

    def _threads(self) -> ThreadPoolExecutor:
        with self._starting:
            if self._pool is None or self._pool[0] != os.getpid():  # a fork has none of its parent's threads
                self._pool = os.getpid(), ThreadPoolExecutor(THREADS, thread_name_prefix="ckpt-fetch")
            return self._pool[1]


def scatter(data: Buffer, into: Sequence[Buffer], skip: int = 0) -> None:
    """Copies data into buffers, one after the other, from byte `skip` of all of them on."""
    for buffer in into:
        if skip >= len(buffer):
            skip -= len(buffer)
            continue
        count = min(len(buffer) - skip, len(data))
        buffer[skip : skip + count] = data[:count]
        data, skip = data[count:], 0
