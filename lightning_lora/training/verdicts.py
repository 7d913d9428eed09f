"""How the callback says what a room below has found: Lightning's exception, or a warning of the first process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]


def refuse(message: str | None) -> None:
    """Raise, if there is something to say."""
    if message is not None:
        raise MisconfigurationException(message)


def warn(message: str | None) -> None:
    """Warn, if there is something to say."""
    if message is not None:
        rank_zero_warn(message)


def report(message: str | None, affects_all: bool) -> None:
    """Raise what is true of every adapter, and warn of what is true of some."""
    if affects_all:
        refuse(message)
    else:
        warn(message)


@contextmanager
def as_misconfiguration() -> Iterator[None]:
    """Turn what a strategy cannot do into Lightning's exception for it."""
    try:
        yield
    except NotImplementedError as error:
        raise MisconfigurationException(str(error)) from error
