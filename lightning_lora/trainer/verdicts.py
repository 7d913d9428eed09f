"""What a check has found, passed on in Lightning's ways: an exception, or a warning from one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]


def refuse(message: str | None) -> None:
    """Raise, if there is something to say."""
    if message is not None:
        raise MisconfigurationException(message)


@contextmanager
def as_misconfiguration() -> Iterator[None]:
    """Turn what a strategy cannot do into Lightning's exception for it."""
    try:
        yield
    except NotImplementedError as error:
        raise MisconfigurationException(str(error)) from error


def judge(message: str | None, affects_all: bool) -> None:
    """Raise if it concerns everything that trains, else warn."""
    if affects_all:
        refuse(message)
    else:
        warn(message)


def warn(message: str | None) -> None:
    """Warn, if there is something to say."""
    if message is not None:
        rank_zero_warn(message)
