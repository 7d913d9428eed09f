"""Atomic writes to local disks: a file or a directory is always complete, the old one or the new one."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/+(.+)", re.DOTALL)  # one letter is a drive of Windows


def remote_address(path: str | PathLike[str]) -> str | None:
    """Return the address that a path is, such as ``s3://bucket/run.ckpt``, also where ``Path`` dropped a slash."""
    found = _ADDRESS.fullmatch(text := str(path))
    if found is None or "://" in text:
        return None if found is None else text
    return "://".join(found.groups())


def replace_directory(
    directory: Path, write: Callable[[Path], None], *, marker: str, stale: tuple[str, ...], overwrite: bool
) -> None:
    """Write files into a new directory, and let it replace an old one when it is complete.

    Other files of the old directory are copied. If the machine dies between the last two renames, the old directory
    remains under a hidden name beside its place; nothing is lost.

    Args:
        directory: Where to write; parents are created.
        write: Writes the files into the directory that it receives.
        marker: The file that identifies an old directory of this kind.
        stale: Files of an old directory that are not copied.
        overwrite: Whether an old directory may be replaced.

    Raises:
        ValueError: The place is not on a local disk, or holds something else, or an old directory that may not be
            replaced.
        OSError: Something could not be written; the old directory is unchanged.
    """
    place = _local(directory)  # a link stays, its target is replaced
    _check_place(place, marker, overwrite=overwrite)
    with _beside(place) as new:
        new.mkdir()
        write(new)
        if place.exists():
            _bring_along(place, new, {*stale, *(path.name for path in new.iterdir())})
        for path in [*new.iterdir(), new]:
            _flush(path)
        old = new.with_suffix(".old")
        _exchange(place, new, old)
    shutil.rmtree(old, ignore_errors=True)


def check_directory(directory: Path, *, marker: str, overwrite: bool) -> None:
    """Check by writing beside it that ``replace_directory`` will be able to write a directory.

    Raises:
        ValueError: As ``replace_directory`` would.
        OSError: Nothing can be written there.
    """
    place = _local(directory)
    _check_place(place, marker, overwrite=overwrite)
    with _beside(place) as new:
        new.mkdir()
        (new / marker).touch()
        shutil.rmtree(new)


def check_new(path: Path, *, overwrite: bool) -> None:
    """Refuse to replace a file or folder, unless that was asked for.

    Raises:
        ValueError: It exists, or is not on a local disk.
    """
    if _local(path).exists() and not overwrite:
        raise ValueError(
            f"{str(path)!r} exists already; nothing was written. Choose another name, or replace it with "
            "overwrite=True, on the command line --overwrite."
        )


def check_apart(place: Path, *inputs: Path | None) -> None:
    """Refuse to write over what is read, also if replacing was asked for.

    Raises:
        ValueError: The place is one of the inputs, or the folder of a safetensors file among them.
    """
    read = [path.resolve() for path in inputs if path is not None]
    read += [path.parent for path in read if path.suffix == ".safetensors"]
    if place.resolve() in read:
        raise ValueError(f"{str(place)!r} is read here and would be lost; nothing was written. Choose another name.")


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place, and move it there when it is complete on disk.

    Raises:
        ValueError: The place is not on a local disk.
        OSError: It could not be written; an old file is unchanged.
    """
    _local(path)
    with _beside(path) as new:
        write(new)
        _flush(new)
        new.replace(path)


@contextmanager
def _beside(place: Path) -> Iterator[Path]:
    """Give a hidden path beside a place, to be moved there; on an error whatever was written is removed."""
    place.parent.mkdir(parents=True, exist_ok=True)
    new = place.with_name(f".{place.name}.{uuid.uuid4().hex[:12]}.new")
    try:
        yield new
    except BaseException:
        with suppress(OSError):
            shutil.rmtree(new) if new.is_dir() else new.unlink()
        raise
    with suppress(OSError):  # it is done: a disk that cannot confirm the new name leaves the old or the new one
        _flush(place.parent)


def _local(place: Path) -> Path:
    """Return where a place really is, and refuse a remote one, which would become a folder of that name."""
    if (address := remote_address(place)) is not None:
        raise ValueError(
            f"{address!r} is not on a local disk; nothing was written. Write to a local place, and copy it there."
        )
    return Path(os.path.realpath(place))


def _check_place(place: Path, marker: str, *, overwrite: bool) -> None:
    if place.exists() and not place.is_dir():
        raise ValueError(f"{str(place)!r} is a file; name a directory.")
    if place.is_dir() and any(place.iterdir()) and not (place / marker).is_file():
        raise ValueError(
            f"{str(place)!r} holds other files and no {marker}; nothing was written. Name a new directory, an empty "
            f"one, or one with {marker} to replace."
        )
    if place.is_dir() and any(place.iterdir()):
        check_new(place, overwrite=overwrite)


def _bring_along(old: Path, new: Path, but: set[str]) -> None:
    for path in old.iterdir():
        if path.name in but:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True)
        else:
            shutil.copy2(path, new / path.name, follow_symlinks=False)


def _exchange(place: Path, new: Path, old: Path) -> None:
    had_one = place.exists()
    if had_one:
        place.rename(old)
    try:
        new.rename(place)
    except BaseException:
        if had_one:
            old.rename(place)
        raise


def _flush(path: Path) -> None:
    """Flush a file to disk, or a directory where the system supports it."""
    if path.is_symlink() or (path.is_dir() and os.name != "posix"):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
