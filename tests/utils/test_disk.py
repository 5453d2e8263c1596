"""Locks of output folders, and what is on the disk when."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from rgtg.errors import OutputError, UsageError
from rgtg.utils.disk import LOCK_FILE, keep_files, keep_names, only_writer, take_lock

fcntl = pytest.importorskip("fcntl")


def test_a_folder_has_one_writer(tmp_path):
    folder = tmp_path / "deep" / "out"
    with only_writer(folder):
        (folder / "work").touch()
        with pytest.raises(UsageError, match=rf"another process is writing {folder}: wait for it, or give another --o"):
            only_writer(folder).__enter__()
        with only_writer(tmp_path / "another"):
            pass
        assert (folder / LOCK_FILE).exists()  # the refused one has not taken it away
    assert [path.name for path in folder.iterdir()] == ["work"]
    with only_writer(folder):
        pass


def test_a_folder_that_stays_empty_is_not_left(tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    for folder in (tmp_path / "new", there):
        with pytest.raises(KeyError), only_writer(folder):
            raise KeyError
    assert list(tmp_path.iterdir()) == [there]


def test_what_a_killed_process_leaves_does_not_hinder(tmp_path):
    hold = "import pathlib, sys, rgtg.utils.disk\nwith rgtg.utils.disk.only_writer(pathlib.Path(sys.argv[1])):\n"
    hold += " print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match="another process"):
            only_writer(tmp_path).__enter__()
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / LOCK_FILE).exists()
    with only_writer(tmp_path):
        pass


def test_a_lock_that_was_removed_while_it_was_opened_is_no_lock(tmp_path, monkeypatch):
    """Another run ends between our opening its file and locking it."""
    real, seen = os.open, []

    def opened(path, *rest):
        file = real(path, *rest)
        if str(path).endswith(LOCK_FILE) and not seen:
            seen.append(file)
            os.unlink(path)
        return file

    monkeypatch.setattr(os, "open", opened)
    with only_writer(tmp_path), pytest.raises(UsageError, match="another process"):
        only_writer(tmp_path).__enter__()
    assert seen


def test_without_locks_a_warning_says_so_and_the_work_goes_on(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with (tmp_path / "file").open("w") as file, pytest.warns(UserWarning, match="cannot be locked .No locks available"):
        take_lock(file.fileno(), tmp_path / "file")
    with pytest.warns(UserWarning, match="no other process writes there"), only_writer(tmp_path):
        pass


def test_a_lock_that_cannot_be_written(tmp_path):
    (tmp_path / LOCK_FILE).mkdir()
    with pytest.raises(OutputError, match=rf"cannot write .*{LOCK_FILE}: Is a directory"):
        only_writer(tmp_path).__enter__()


@pytest.fixture
def synced(monkeypatch):
    """Paths whose files or names were brought to the disk, in order."""
    real, paths = os.fsync, []

    def fsync(file):
        paths.append(os.readlink(f"/proc/self/fd/{file}"))
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    return paths


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="names of open files are read from /proc")
def test_every_file_and_every_name_reaches_the_disk(tmp_path, synced):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("one", "a/two", "a/b/three"):
        (tmp_path / name).touch()
    keep_files(tmp_path)
    assert sorted(synced[:3]) == [str(tmp_path / name) for name in ("a/b/three", "a/two", "one")]
    assert synced[3:] == [str(tmp_path / "a/b"), str(tmp_path / "a"), str(tmp_path)]


def test_a_file_system_that_cannot_sync_folders_is_no_error_but_a_failing_disk_is(tmp_path, monkeypatch):
    codes = [errno.EINVAL, errno.EIO]

    def fsync(_):
        raise OSError(codes.pop(0), "no")

    monkeypatch.setattr(os, "fsync", fsync)
    keep_names(tmp_path)
    with pytest.raises(OSError, match="no") as failed:
        keep_names(tmp_path)
    assert failed.value.errno == errno.EIO
