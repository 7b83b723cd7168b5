"""Every error has a stable kind, and survives the way to another rank."""

from __future__ import annotations

import inspect

import pytest

from ckpt import errors

KINDS = {
    "usage": (errors.UsageError, ValueError),
    "not-found": (errors.NotFoundError, LookupError),
    "conflict": (errors.ConflictError, errors.CkptError),
    "mismatch": (errors.MismatchError, errors.CkptError),
    "layout": (errors.LayoutError, ValueError),
    "format": (errors.FormatError, ValueError),
    "version": (errors.VersionError, errors.FormatError),
    "integrity": (errors.IntegrityError, errors.CkptError),
    "unsafe": (errors.UnsafeError, errors.CkptError),
    "storage": (errors.StorageError, OSError),
    "capacity": (errors.CapacityError, MemoryError),
    "deadline": (errors.DeadlineError, TimeoutError),
    "peer": (errors.PeerError, RuntimeError),
}


def classes() -> list[type[errors.CkptError]]:
    found = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.CkptError)]
    return [c for c in found if c is not errors.CkptError]


def test_the_table_above_names_every_class() -> None:
    assert {c for c, _ in KINDS.values()} == set(classes())


@pytest.mark.parametrize("kind", KINDS)
def test_kind_and_bases_are_stable(kind: str) -> None:
    cls, base = KINDS[kind]
    assert cls.kind == kind
    assert issubclass(cls, errors.CkptError) and issubclass(cls, base)
    assert cls.__name__ in errors.__all__ and cls.__doc__


@pytest.mark.parametrize("kind", KINDS)
def test_docstring_of_the_module_draws_the_tree(kind: str) -> None:
    cls, _ = KINDS[kind]
    line = next(line for line in (errors.__doc__ or "").splitlines() if cls.__name__ in line)
    assert f'kind "{kind}"' in line


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("message", ["plain", "", "ünïcode 検\n{}%s", "x" * 10_000])
def test_wire_round_trip(kind: str, message: str) -> None:
    cls, _ = KINDS[kind]
    sent = errors.to_wire(cls(message))
    assert sent == (kind, message)
    back = errors.from_wire(*sent)
    assert type(back) is cls and str(back) == message


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (OSError(28, "No space left on device"), "storage", "OSError: [Errno 28] No space left on device"),
        (ZeroDivisionError("by zero"), "peer", "ZeroDivisionError: by zero"),
        (KeyboardInterrupt(), "peer", "KeyboardInterrupt: "),
        (KeyError("k"), "peer", "KeyError: 'k'"),
    ],
)
def test_foreign_errors_become_ours(error: BaseException, kind: str, text: str) -> None:
    assert errors.to_wire(error) == (kind, text)


def test_unknown_kind_is_a_peer_error() -> None:
    assert type(errors.from_wire("from a newer version", "text")) is errors.PeerError
