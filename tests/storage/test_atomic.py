"""Replacing directories and files: the old one or the new one, in the folder that was there, under the user's names."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_lora.storage import atomic
from lightning_lora.storage.atomic import check_directory, read_directory_whole, replace_directory, replace_file
from tests.processes import Job, succeeded

MARKER = "record.json"  # in the middle of the alphabet


def write(folder: Path) -> None:
    for name in ("tensors", MARKER):
        (folder / name).write_text("new")


def replace(place: Path) -> None:
    replace_directory(place, write, marker=MARKER, stale=("pickled", "absent"), overwrite=True)


def content(place: Path) -> dict[str, str]:
    """Return all files, hidden ones included."""
    return {str(path.relative_to(place)): path.read_text() for path in sorted(place.rglob("*")) if path.is_file()}


OLD = {MARKER: "old", "pickled": "old", "tensors": "old", "notes/mine": "kept", "mine": "kept"}
NEW = {MARKER: "new", "tensors": "new", "notes/mine": "kept", "mine": "kept"}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return filled(tmp_path / "place")


def filled(place: Path) -> Path:
    for name, text in OLD.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    return place


# --- the folder stays


def test_folder_keeps_its_mode_its_group_and_whoever_works_in_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.name == "posix" and os.geteuid() == 0:
        os.chown(place, -1, 12345)
    place.chmod(0o2750)
    before = place.stat()
    monkeypatch.chdir(place)
    replace(Path("."))
    after = place.stat()
    assert (after.st_mode, after.st_gid, after.st_ino) == (before.st_mode, before.st_gid, before.st_ino)
    assert content(Path(".")) == content(place) == NEW


def test_other_files_stay_without_being_copied(place: Path) -> None:
    before = (place / "mine").stat()
    replace(place)
    assert (place / "mine").stat().st_ino == before.st_ino
    assert sorted(path.name for path in place.iterdir()) == ["mine", "notes", MARKER, "tensors"]


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """Give a folder that is a mount point, where the tests may make one."""
    (place := tmp_path / "mounted").mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "none", place], check=False, capture_output=True).returncode == 0
    except OSError:
        done = False
    if not done:
        pytest.skip("mounting is not permitted")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("is_empty", [True, False])
def test_mount_point_is_filled(is_empty: bool, mounted: Path) -> None:
    if not is_empty:
        filled(mounted)
    check_directory(mounted, marker=MARKER, overwrite=True)
    replace(mounted)
    assert content(mounted) == ({MARKER: "new", "tensors": "new"} if is_empty else NEW)


@pytest.mark.parametrize("is_empty", [True, False])
def test_folder_that_cannot_be_renamed_is_filled(
    is_empty: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What mount points do, and folders whose parent is not writable: nothing can be made beside them."""
    (place := tmp_path / "place").mkdir()
    if not is_empty:
        filled(place)
    refusing(tmp_path, monkeypatch)
    rename = Path.rename

    def move(self: Path, target: Path) -> Path:
        if place in (self, target):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", move)
    check_directory(place, marker=MARKER, overwrite=True)
    replace(place)
    assert content(place) == ({MARKER: "new", "tensors": "new"} if is_empty else NEW)


@pytest.mark.parametrize("exists", [True, False])
def test_check_refuses_what_the_write_could_not_do(
    exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = filled(tmp_path / "place") if exists else tmp_path / "place"
    refusing(place if exists else tmp_path, monkeypatch)
    with pytest.raises(PermissionError) as caught:
        check_directory(place, marker=MARKER, overwrite=True)
    assert caught.value.filename == str(place)
    assert content(tmp_path) == ({f"place/{name}": text for name, text in OLD.items()} if exists else {})


@pytest.mark.parametrize("suffix", ["new", "old"])
def test_no_error_is_about_a_hidden_folder(suffix: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing(place, monkeypatch, suffix)
    with pytest.raises(PermissionError, match=r"place'$"):
        replace(place)
    assert content(place) == OLD


def refusing(folder: Path, monkeypatch: pytest.MonkeyPatch, suffix: str = "new") -> None:
    """Let nothing new be made in a folder, as if it were read-only: tests may run as root, who writes everywhere."""

    def guarded(original: Callable[..., None]) -> Callable[..., None]:
        def make(self: Path, *args: Any, **options: Any) -> None:
            if self.parent == folder and self.suffix == f".{suffix}":
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
            original(self, *args, **options)

        return make

    monkeypatch.setattr(Path, "mkdir", guarded(Path.mkdir))
    monkeypatch.setattr(Path, "touch", guarded(Path.touch))


# --- failures


def test_failed_exchange_leaves_the_old_files(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, moved = Path.rename, 0
    for fails in range(6):
        moved = 0

        def move(self: Path, target: Path, fails: int = fails) -> Path:
            nonlocal moved
            moved += 1
            if moved == fails + 1:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(self), None, str(target))
            return rename(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", move)
            if fails == 5:  # three files out, two in
                replace(place)
                break
            with pytest.raises(OSError, match=r"place/[a-z.]+'$") as caught:
                replace(place)
        assert Path(caught.value.filename).parent == place
        assert content(place) == OLD
    assert content(place) == NEW


def test_old_files_that_cannot_be_moved_back_are_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def move(self: Path, target: Path) -> Path:
        if target.parent == place:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", move)
        with (
            pytest.warns(UserWarning, match=r"could not be moved back; they are in '.*\.old'"),
            pytest.raises(OSError, match=os.strerror(errno.EIO)),
        ):
            replace(place)
    assert sorted(name for name in content(place) if name.startswith(".")) == sorted(
        f"{next(place.glob('.*.old')).name}/{name}" for name in (MARKER, "pickled", "tensors")
    )


def test_a_kill_in_the_exchange_never_leaves_half_of_two(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The marker goes first and comes last, so whoever looks for the directory finds all of one, or none."""
    rename, seen = Path.rename, []

    def move(self: Path, target: Path) -> Path:
        moved = rename(self, target)
        seen.append({path.name: path.read_text() for path in place.iterdir() if path.is_file()})
        return moved

    fsync, flushed = os.fsync, []

    def flush(descriptor: int) -> None:
        if os.path.samestat(os.fstat(descriptor), place.stat()):
            flushed.append(len(seen))
        fsync(descriptor)

    monkeypatch.setattr(Path, "rename", move)
    monkeypatch.setattr(os, "fsync", flush)
    replace(place)
    assert [MARKER in files for files in seen] == [*[False] * 4, True]
    assert flushed == [3, 4, 5]  # the old files are out; the marker comes; all is done
    assert seen[-1] == {MARKER: "new", "tensors": "new", "mine": "kept"}


def test_replacing_goes_on_where_a_kill_left_it(place: Path) -> None:
    (hidden := place / ".place.0123456789ab.old").mkdir()
    (place / MARKER).rename(hidden / MARKER)
    (place / ".place.0123456789ab.new").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        check_directory(place, marker=MARKER, overwrite=False)
    replace(place)
    assert {name: text for name, text in content(place).items() if not name.startswith(".")} == NEW


def test_what_killed_writes_have_left_goes_with_time(place: Path) -> None:
    hidden = [place / f".place.0123456789a{which}.new" for which in "bcd"]
    for path in hidden:
        path.mkdir()
        (path / "tensors").write_text("half")
    long_ago = time.time() - 3601
    for path in (hidden[0], hidden[0] / "tensors", hidden[1]):  # a file of the second is being written
        os.utime(path, (long_ago, long_ago))
    replace(place)
    assert sorted(place.glob(".*")) == hidden[1:]


def test_rest_of_a_write_that_was_killed_does_not_fill_a_place(tmp_path: Path) -> None:
    (tmp_path / ".place.0123456789ab.new").mkdir()
    check_directory(tmp_path, marker=MARKER, overwrite=False)
    (tmp_path / ".mine.new").mkdir()
    with pytest.raises(ValueError, match="holds other files"):
        check_directory(tmp_path, marker=MARKER, overwrite=False)


def test_old_files_that_cannot_be_removed_are_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rmtree = shutil.rmtree

    def fail(path: Path, ignore_errors: bool = False) -> None:
        if not str(path).endswith(".old"):
            rmtree(path, ignore_errors)
        elif not ignore_errors:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    monkeypatch.setattr(shutil, "rmtree", fail)
    with pytest.warns(UserWarning, match=r"The files of before could not be removed .*\.old'.*remove"):
        replace(place)
    assert {name: text for name, text in content(place).items() if not name.startswith(".")} == NEW


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_read_only_folder_leaves_nothing_behind(place: Path) -> None:
    place.chmod(stat.S_IRUSR | stat.S_IXUSR)
    before = place.stat().st_mode
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if os.geteuid() == 0:
            replace(place)
        else:
            with pytest.raises(PermissionError, match=r"place'$"):
                replace(place)
    assert place.stat().st_mode == before
    place.chmod(stat.S_IRWXU)
    assert content(place) == (NEW if os.geteuid() == 0 else OLD)
    assert [path.name for path in place.parent.iterdir()] == ["place"]


# --- errors name what was given


def test_errors_name_the_place_that_was_given(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.parent)

    def unwritable(folder: Path) -> None:
        (folder / "shard").mkdir()
        (folder / "shard").write_text("")

    for given in ("place", "other"):
        with pytest.raises(IsADirectoryError) as caught:
            replace_directory(Path(given), unwritable, marker=MARKER, stale=(), overwrite=True)
        assert caught.value.filename == str(Path(given) / "shard")
    assert content(place.parent) == {f"place/{name}": text for name, text in OLD.items()}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_that_of_the_place(code: int, place: Path) -> None:
    def full(_: Path) -> None:
        raise OSError(code, os.strerror(code))

    with pytest.raises(OSError, match=r"place'$") as caught:
        replace_directory(place, full, marker=MARKER, stale=(), overwrite=True)
    assert caught.value.filename == str(place)
    with pytest.raises(OSError, match=r"tensors'$"):
        replace_file(place / "tensors", full)
    assert content(place) == OLD


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ENOSPC])
def test_errors_about_other_files_stay_as_they_are(code: int, place: Path) -> None:
    def missing(_: Path) -> None:
        raise OSError(code, os.strerror(code), "base.safetensors")

    with pytest.raises(OSError, match=r": 'base\.safetensors'$"):
        replace_directory(place, missing, marker=MARKER, stale=(), overwrite=True)


def test_file_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing(tmp_path, monkeypatch)
    with pytest.raises(PermissionError) as caught:  # torch raises a RuntimeError of its own
        replace_file(tmp_path / "run.ckpt", lambda path: torch.save({}, path))
    assert caught.value.filename == str(tmp_path / "run.ckpt")
    assert not list(tmp_path.iterdir())


def test_file_in_the_place_of_a_folder_is_named(place: Path) -> None:
    with pytest.raises(OSError, match=r"place'$") as caught:
        replace_file(place, lambda path: path.write_text("new"))
    assert (caught.value.filename, caught.value.filename2) == (str(place), None)
    assert content(place) == OLD


# --- reading while another process replaces


def texts(place: Path) -> tuple[str, str]:
    return (place / MARKER).read_text(), (place / "tensors").read_text()


def test_what_is_read_is_of_one_version(place: Path) -> None:
    seen = []

    def read() -> tuple[str, str]:
        first = (place / MARKER).read_text()
        if not seen:
            replace(place)  # between the two files
        seen.append((first, (place / "tensors").read_text()))
        return seen[-1]

    assert read_directory_whole(place, MARKER, read) == ("new", "new")
    assert seen == [("old", "new"), ("new", "new")]


def test_reading_waits_for_the_end_of_an_exchange(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            (place / MARKER).write_text("new")

    monkeypatch.setattr(atomic.time, "sleep", sleep)
    (place / ".place.0123456789ab.old").mkdir()
    (place / "tensors").write_text("new")
    (place / MARKER).unlink()
    assert read_directory_whole(place, MARKER, lambda: texts(place)) == ("new", "new")
    assert len(pauses) == 3


@pytest.mark.parametrize("in_exchange", [True, False])
def test_reading_what_is_not_there_raises(place: Path, in_exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = list[float]()
    monkeypatch.setattr(atomic.time, "sleep", pauses.append)
    (place / MARKER).unlink()
    if in_exchange:  # which was killed
        (place / ".place.0123456789ab.old").mkdir()
    advice = r".* was killed. The files of before are in '.*/\.place\.0123456789ab\.old': move them back, or write"
    with pytest.raises(FileNotFoundError, match=MARKER + advice if in_exchange else MARKER):
        read_directory_whole(place, MARKER, lambda: texts(place))
    assert bool(pauses) == in_exchange


def test_a_link_that_leads_to_itself_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ValueError, match="loop' is a link that leads to itself"):
        check_directory(tmp_path / "loop", marker=MARKER, overwrite=True)
    with pytest.raises(ValueError, match="leads to itself"):
        replace(tmp_path / "loop")
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


# --- several writers

WRITER = """
import sys
from pathlib import Path
from lightning_lora.storage.atomic import replace_directory
place, text, rounds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
def write(folder):
    for name in ("tensors", "record.json"):
        (folder / name).write_text(text)
(place.parent / f"begun-{text}").touch()
for _ in range(rounds):
    replace_directory(place, write, marker="record.json", stale=("pickled",), overwrite=True)
"""
posix = pytest.mark.skipif(os.name != "posix", reason="locks of POSIX")


def writer(place: Path, text: str, rounds: int = 1) -> Job:
    (script := place.parent / "writer.py").write_text(WRITER)
    return Job(script, place, text, rounds)


@contextmanager
def locked(folder: Path, *, waits: bool = True) -> Iterator[None]:
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@posix
def test_a_second_writer_waits_for_the_first(place: Path) -> None:
    with locked(place.parent):
        job, end = writer(place, "second"), time.monotonic() + 60
        while not (place.parent / "begun-second").exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(0.5)
        assert job.process.is_alive()
        assert texts(place) == ("old", "old")
        assert read_directory_whole(place, MARKER, lambda: texts(place)) == ("old", "old")  # readers need no lock
    succeeded(job)
    assert texts(place) == ("second", "second")


@posix
def test_files_are_exchanged_under_a_lock_and_written_without(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, moved = Path.rename, []

    def move(self: Path, target: Path) -> Path:
        with pytest.raises(BlockingIOError), locked(place.parent, waits=False):
            pass
        moved.append(self.name)
        return rename(self, target)

    def write_alone(folder: Path) -> None:
        with locked(place.parent, waits=False):
            write(folder)

    monkeypatch.setattr(Path, "rename", move)
    replace_directory(place, write_alone, marker=MARKER, stale=(), overwrite=True)
    assert MARKER in moved
    with locked(place.parent, waits=False):
        assert texts(place) == ("new", "new")


def test_two_writers_at_once_leave_the_files_of_one(place: Path) -> None:
    succeeded(writer(place, "first", 150), writer(place, "second", 150))
    assert texts(place) in [("first", "first"), ("second", "second")]
    assert not [name for name in content(place) if name.startswith(".")]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_place_that_another_writer_has_made_meanwhile_counts_as_there(overwrite: bool, tmp_path: Path) -> None:
    def write_second(folder: Path) -> None:
        filled(tmp_path / "place")
        write(folder)

    def late() -> None:
        replace_directory(tmp_path / "place", write_second, marker=MARKER, stale=("pickled",), overwrite=overwrite)

    if overwrite:
        late()
    else:
        with pytest.raises(ValueError, match="exists already; nothing was written"):
            late()
    assert content(tmp_path) == {f"place/{name}": text for name, text in (NEW if overwrite else OLD).items()}


@pytest.mark.parametrize("lacks", ["module", "disk", "permission"])
def test_without_locks_nobody_waits(lacks: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if lacks == "module":
        monkeypatch.setattr(atomic, "fcntl", None)
    elif lacks == "disk":
        monkeypatch.setattr(atomic, "fcntl", SimpleNamespace(flock=fail, LOCK_EX=2, LOCK_UN=8))
    else:
        opened = os.open
        monkeypatch.setattr(
            os, "open", lambda at, *rest, **more: fail() if at == place.parent else opened(at, *rest, **more)
        )
    replace(place)
    assert content(place) == NEW
