"""Atomic writes to local disks: a file or a directory is the old one or the new one, never half of two."""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import TypeVar, cast

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

T = TypeVar("T")

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/+(.+)", re.DOTALL)  # one letter is a drive of Windows
_HIDDEN = re.compile(r"\..*\.[0-9a-f]{12}\.(new|old)", re.DOTALL)  # what a kill leaves
_ATTEMPTS, _PAUSE = 50, 0.02  # of reading what another process is replacing; seconds
ABANDONED = 3600.0  # seconds since anything was written
_FULL = (errno.ENOSPC, errno.EDQUOT)


def remote_address(path: str | PathLike[str]) -> str | None:
    """Return the address that a path is, such as ``s3://bucket/run.ckpt``, also where ``Path`` dropped a slash."""
    found = _ADDRESS.fullmatch(text := str(path))
    if found is None or "://" in text:
        return None if found is None else text
    return "://".join(found.groups())


def replace_directory(
    directory: Path, write: Callable[[Path], None], *, marker: str, stale: tuple[str, ...], overwrite: bool
) -> None:
    """Write files into a hidden directory, and move them into place when they are complete.

    A new directory appears by one rename. One that is there stays, with its mode, its group and its other files: it may
    be a mount point or the current directory. Its files are exchanged one by one; the marker goes first and comes last.
    If the machine dies in between, there is no marker, which is obvious, and the old files remain in a hidden folder
    there, until the directory is replaced again. Processes that write to the same place take turns, as far as the disk
    has locks; the last one wins.

    Args:
        directory: Where to write; parents are created.
        write: Writes the files into the directory that it receives.
        marker: The file that identifies an old directory of this kind.
        stale: Files of an old directory that go, too.
        overwrite: Whether an old directory may be replaced.

    Raises:
        ValueError: The place is not on a local disk, or holds something else, or an old directory that may not be
            replaced.
        OSError: Something could not be written; the old directory is unchanged.
    """
    place = _local(directory)  # a link stays, its target is replaced
    with _turn(place):
        _check_place(place, marker, overwrite=overwrite)
    with _beside(place, directory) as new:
        new.mkdir()
        write(new)
        for path in [*new.iterdir(), new]:
            _flush(path)
        with _turn(place):
            _check_place(place, marker, overwrite=overwrite)  # again: another process may have written meanwhile
            _move(place, new, marker, stale)


@contextmanager
def _turn(place: Path) -> Iterator[None]:
    """Wait until no other process moves files into a place, and let none do so inside the block.

    The lock is that of the folder around the place, which is there before the place is, so no file is left behind. It
    ends with the process that has it. Where a system or a disk has no such locks, nobody waits.
    """
    descriptor = None
    try:
        with suppress(OSError):
            descriptor = os.open(place.parent, os.O_RDONLY)
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                if fcntl is not None:
                    fcntl.flock(descriptor, fcntl.LOCK_UN)  # or a process that was forked meanwhile would keep it
            os.close(descriptor)


def _move(place: Path, new: Path, marker: str, stale: tuple[str, ...]) -> None:
    """Move a complete directory into place, or its files into the directory that is there."""
    if new.parent == place:
        _exchange(place, new, marker, stale)
    elif not place.is_dir():
        new.rename(place)
        return
    else:  # which another process has just made
        inside = new.rename(place / new.name)
        try:
            _exchange(place, inside, marker, stale)
        except BaseException:
            with suppress(OSError):
                inside.rename(new)
            raise
    _remove_abandoned(place)
    for path in _left_behind(place, "old"):
        shutil.rmtree(path, ignore_errors=True)
        if path.exists():
            warnings.warn(
                f"The files of before could not be removed from {str(path)!r}; remove that folder.", stacklevel=3
            )


def read_directory_whole(directory: Path, marker: str, read: Callable[[], T]) -> T:
    """Read files of one version, also from a directory that another process is replacing meanwhile.

    Since the marker goes first and comes last, what was read while it stayed the same belongs together.

    Args:
        directory: The directory.
        marker: As in ``replace_directory``.
        read: Reads the files; called again if they were exchanged meanwhile.

    Raises:
        FileNotFoundError: A process was killed while it replaced the files; it says where those of before are.
        Exception: Whatever else ``read`` raises, except for what an exchange causes.
    """
    for is_last in (*[False] * _ATTEMPTS, True):
        before, error, found = _identity(directory / marker), None, None
        try:
            found = read()
        except (OSError, ValueError) as failure:
            error = failure
        halfway = _left_behind(directory, "old") if before is None else []
        in_exchange = before is None and bool(halfway or _left_behind(directory, "new"))
        is_whole = before == _identity(directory / marker) and not in_exchange
        if error is not None and is_last and halfway:
            raise FileNotFoundError(
                f"{str(directory)!r} has no {marker}, because a process that was replacing its files was killed. The "
                f"files of before are in {str(halfway[0])!r}: move them back, or write the directory again."
            ) from error
        if error is not None and (is_whole or is_last):
            raise error
        if is_whole:
            return cast(T, found)
        time.sleep(_PAUSE)
    raise OSError(f"{str(directory)!r} is replaced again and again; it could not be read between.")


def _identity(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def check_directory(directory: Path, *, marker: str, overwrite: bool) -> None:
    """Check by writing where it will write first that ``replace_directory`` will be able to write a directory.

    Raises:
        ValueError: As ``replace_directory`` would.
        OSError: Nothing can be written there.
    """
    place = _local(directory)
    with _turn(place):
        _check_place(place, marker, overwrite=overwrite)
    with _beside(place, directory) as new:
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
            f"{str(path)!r} exists already; nothing was written. Choose another name, or set overwrite=True "
            "(--overwrite) to replace it."
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
    with _beside(path, path) as new:
        new.touch()  # or torch.save would raise an error without the reason
        write(new)
        _flush(new)
        new.replace(path)


@contextmanager
def _beside(place: Path, given: Path) -> Iterator[Path]:
    """Give a hidden path beside a place, or in a directory that is there, from where to move things into place.

    On an error whatever was written is removed, and the error names the place as it was given.
    """
    folder = place if place.is_dir() else place.parent
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f".{place.name}.{uuid.uuid4().hex[:12]}.new"
    try:
        yield new
    except BaseException as error:
        with suppress(OSError):
            shutil.rmtree(new) if new.is_dir() else new.unlink()
        if isinstance(error, OSError):
            _name_place(error, given, new, new.with_suffix(".old"), place)
        raise
    with suppress(OSError):  # it is done: a disk that cannot confirm the new name leaves the old or the new one
        _flush(folder)


def _name_place(error: OSError, given: Path, *places: Path) -> None:
    """Let an error name what the user knows, not our hidden files."""
    if error.filename is None and error.errno in _FULL:
        error.filename = str(given)
    for place in places:
        if isinstance(error.filename, (str, PathLike)) and (path := Path(error.filename)).is_relative_to(place):
            error.filename = str(given / path.relative_to(place))
            del error.filename2
            return


def _local(place: Path) -> Path:
    """Return where a place really is, and refuse a remote one, which would become a folder of that name."""
    if (address := remote_address(place)) is not None:
        raise ValueError(
            f"{address!r} is not on a local disk; nothing was written. Write to a local place, and copy it there."
        )
    return Path(os.path.realpath(place))


def _check_place(place: Path, marker: str, *, overwrite: bool) -> None:
    if place.is_symlink():  # although links were followed
        raise ValueError(f"{str(place)!r} is a link that leads to itself; name a directory.")
    if place.exists() and not place.is_dir():
        raise ValueError(f"{str(place)!r} is a file; name a directory.")
    if not place.is_dir() or {*place.iterdir()} == {*_left_behind(place, "new")}:
        return
    # The second is what a kill while files were exchanged leaves.
    if not any((folder / marker).is_file() for folder in (place, *_left_behind(place, "old"))):
        raise ValueError(
            f"{str(place)!r} holds other files and no {marker}; nothing was written. Name a new directory, an empty "
            f"one, or one with {marker} to replace."
        )
    check_new(place, overwrite=overwrite)


def _left_behind(place: Path, suffix: str) -> list[Path]:
    """Return the hidden folders of other writes in a directory."""
    return [path for path in place.glob(f".*.{suffix}") if _HIDDEN.fullmatch(path.name) and path.is_dir()]


def _remove_abandoned(place: Path) -> None:
    """Remove what killed processes have written and not moved into place; a young one may be another's, at work."""
    for path in _left_behind(place, "new"):
        with suppress(OSError):
            if time.time() - max(each.stat().st_mtime for each in (path, *path.iterdir())) > ABANDONED:
                shutil.rmtree(path)


def _exchange(place: Path, new: Path, marker: str, stale: tuple[str, ...]) -> None:
    """Move old files out of a directory and new ones into it, or leave everything as it was."""
    old = new.with_suffix(".old")
    names = sorted((path.name for path in new.iterdir()), key=lambda name: (name == marker, name))
    gone = sorted({*names, *stale}, key=lambda name: (name != marker, name))
    moves = [(place / name, old / name) for name in gone if os.path.lexists(place / name)]
    moves += [(new / name, place / name) for name in names]
    old.mkdir()
    try:
        for source, target in moves:
            if target.parent == place:
                _flush(place)  # in this order on the disk, too: old files out, new ones in, the marker last
            source.rename(target)
        new.rmdir()
    except BaseException:
        for source, target in reversed(moves):
            with suppress(OSError):
                if not os.path.lexists(source):
                    target.rename(source)
        with suppress(OSError):
            old.rmdir()
        if old.exists():
            warnings.warn(f"Files of before could not be moved back; they are in {str(old)!r}.", stacklevel=3)
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
