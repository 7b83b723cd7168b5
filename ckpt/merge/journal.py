"""The journal of a search: the scores that were paid for, so that nothing is paid for twice."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ckpt.errors import FormatError, NotFoundError

__all__ = ["Journal", "Row"]

Row = tuple[float, ...]
"""Weights of a combination."""


_VERSION = "ckpt-search"


class Journal:
    """Scores that were paid for, as JSON lines: a head that says of which search, then a line for each row of weights."""

    def __init__(self, path: str | os.PathLike[str] | None, about: Mapping[str, Any]) -> None:
        self.scores: dict[Row, float] = {}
        self._path = None if path is None else Path(path)
        if self._path is None:
            return
        head = json.dumps({_VERSION: 1, **about}, sort_keys=True)
        text = self._path.read_text() if self._path.exists() else ""
        if "\n" not in text and head.startswith(text):  # the head itself was cut short
            self._path.write_text("")
            self._append(head)
            return
        lines = text.splitlines()
        if not lines or lines[0] != head:
            raise FormatError(
                f"{self._path} is the journal of another search; name another file, or ask for the same search"
            )
        self.read(lines[1:])
        if not text.endswith("\n"):  # cut short within a line, which then does not count
            self._path.write_text("".join(f"{line}\n" for line in lines[:-1]))

    @staticmethod
    def head(path: str | os.PathLike[str]) -> dict[str, Any] | None:
        """What the search is about whose journal this is; None if there is none, or none that can be read."""
        try:
            with Path(path).open() as file:
                found = json.loads(file.readline())
            return {k: v for k, v in found.items() if k != _VERSION} if found[_VERSION] == 1 else None
        except (OSError, ValueError, TypeError, AttributeError, KeyError):
            return None

    @staticmethod
    def scores_in(path: str | os.PathLike[str]) -> list[float]:
        """The scores of a journal, in order. Raises NotFoundError, FormatError."""
        try:
            lines = Path(path).read_text().splitlines()[1:]
        except FileNotFoundError as e:
            raise NotFoundError(f"{os.fspath(path)}: does not exist") from e
        except (OSError, ValueError) as e:
            raise FormatError(f"{os.fspath(path)}: not the journal of a search ({e})") from e
        if Journal.head(path) is None:
            raise FormatError(f"{os.fspath(path)}: not the journal of a search")
        out = Journal(None, {})
        out.read(lines)
        return list(out.scores.values())

    def told(self) -> bytes:
        """All scores, as lines for `read`."""
        return "".join(f"{_line(row, score)}\n" for row, score in self.scores.items()).encode()

    def read(self, lines: Iterable[str]) -> None:
        for line in lines:
            try:
                row, score = json.loads(line)
                self.scores[tuple(float.fromhex(w) for w in row)] = float.fromhex(score)
            except (ValueError, TypeError):
                return  # the line that was being written; what follows cannot be

    def add(self, row: Row, score: float) -> None:
        self.scores[row] = score
        self._append(_line(row, score))

    def _append(self, line: str) -> None:
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())


def _line(row: Row, score: float) -> str:
    return json.dumps([[w.hex() for w in row], score.hex()])
