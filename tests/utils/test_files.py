"""Atomic writes, permissions, locks of output folders, and syncs to the disk."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from rgtg.data.sources import rejects_writer
from rgtg.errors import ModelNotFoundError, OutputError, UsageError
from rgtg.utils.files import (
    LOCK_FILE,
    atomic_write,
    lock_file,
    lock_folder,
    make_folder,
    refuse_overwriting,
    sync_folders,
    sync_tree,
    write_text,
)

fcntl = pytest.importorskip("fcntl")


def test_a_file_is_written_whole_and_its_folder_is_made(tmp_path):
    path = tmp_path / "new" / "folder" / "x.json"
    write_text(path, "ü\n")
    assert path.read_text(encoding="utf-8") == "ü\n"
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


@pytest.fixture(params=[(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)], ids=lambda pair: f"{pair[0]:03o}")
def new_mode(request):
    """The permissions of a new file under each umask."""
    before = os.umask(request.param[0])
    yield request.param[1]
    os.umask(before)


def mode(path):
    return path.stat().st_mode & 0o777


def test_a_new_file_gets_the_permissions_of_the_umask(tmp_path, new_mode):
    write_text(tmp_path / "text", "x")
    with atomic_write(tmp_path / "library") as partial:
        partial.unlink()
        os.close(os.open(partial, os.O_CREAT | os.O_WRONLY, 0o600))  # as safetensors does
    with rejects_writer(tmp_path / "rejects") as write:
        write("x\n")
    assert {path.name: mode(path) for path in tmp_path.iterdir()} == dict.fromkeys(
        ("text", "library", "rejects"), new_mode
    )


@pytest.mark.parametrize("kept", [0o600, 0o640, 0o444, 0o755])
def test_a_replaced_file_keeps_its_permissions(tmp_path, new_mode, kept):
    path = tmp_path / "x"
    path.write_text("before")
    path.chmod(kept)
    with atomic_write(path) as partial:
        assert mode(partial) & 0o077 & ~kept == 0, "no one reads meanwhile who may not read it afterwards"
        partial.write_text("after")
    assert (path.read_text(), mode(path)) == ("after", kept)


def test_an_output_that_is_an_input_is_an_error_under_any_name(tmp_path):
    kept, other, link = (tmp_path / name for name in ("kept", "other", "link"))
    kept.write_text("")
    other.write_text("")
    link.symlink_to(kept)
    refuse_overwriting(
        [("--a", "kept"), ("--b", None), ("--c", "owner/name"), ("--d", other)], [kept, tmp_path / "new"]
    )
    for given, output in ((kept, kept), (link, kept), (kept, link), (str(tmp_path / "." / "kept"), link)):
        with pytest.raises(UsageError, match=r"--b .* would be overwritten: it is .*; choose another output"):
            refuse_overwriting([("--a", other), ("--b", given)], [tmp_path / "new", output])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x"), OSError(28, "No space left on device")])
def test_a_failure_leaves_the_old_file_unchanged(tmp_path, error):
    path = tmp_path / "x.json"
    path.write_text("before")

    def write():
        with atomic_write(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(OutputError if isinstance(error, OSError) else type(error)):
        write()
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_an_rgtg_error_in_the_block_is_raised_unchanged(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no model"), atomic_write(tmp_path / "x"):
        raise ModelNotFoundError("no model")


def test_a_folder_is_made_or_is_an_error(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match=r"cannot write to .*; choose another --output"):
            make_folder(folder)


def test_a_second_writer_of_a_folder_is_an_error(tmp_path):
    folder = tmp_path / "deep" / "out"
    with lock_folder(folder):
        (folder / "work").touch()
        with pytest.raises(UsageError, match=rf"another process is writing {folder}: wait for it, or give another --o"):
            lock_folder(folder).__enter__()
        with lock_folder(tmp_path / "another"):
            pass
        assert (folder / LOCK_FILE).exists()  # the refused one has not taken it away
    assert [path.name for path in folder.iterdir()] == ["work"]
    with lock_folder(folder):
        pass


def test_a_new_folder_that_stays_empty_is_removed(tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    for folder in (tmp_path / "new", there):
        with pytest.raises(KeyError), lock_folder(folder):
            raise KeyError
    assert list(tmp_path.iterdir()) == [there]


def test_the_lock_file_of_a_killed_process_locks_nothing(tmp_path):
    hold = "import pathlib, sys, rgtg.utils.files\nwith rgtg.utils.files.lock_folder(pathlib.Path(sys.argv[1])):\n"
    hold += " print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match="another process"):
            lock_folder(tmp_path).__enter__()
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / LOCK_FILE).exists()
    with lock_folder(tmp_path):
        pass


def test_a_lock_file_that_was_removed_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    """Another run ends between our opening its file and locking it."""
    real, seen = os.open, []

    def opened(path, *rest):
        file = real(path, *rest)
        if str(path).endswith(LOCK_FILE) and not seen:
            seen.append(file)
            os.unlink(path)
        return file

    monkeypatch.setattr(os, "open", opened)
    with lock_folder(tmp_path), pytest.raises(UsageError, match="another process"):
        lock_folder(tmp_path).__enter__()
    assert seen


def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with (tmp_path / "file").open("w") as file, pytest.warns(UserWarning, match="cannot be locked .No locks available"):
        lock_file(file.fileno(), tmp_path / "file")
    with pytest.warns(UserWarning, match="no other process writes there"), lock_folder(tmp_path):
        pass


def test_an_unwritable_lock_file_is_an_error(tmp_path):
    (tmp_path / LOCK_FILE).mkdir()
    with pytest.raises(OutputError, match=rf"cannot write .*{LOCK_FILE}: Is a directory"):
        lock_folder(tmp_path).__enter__()


@pytest.fixture
def synced(monkeypatch):
    """Synced paths, in order."""
    real, paths = os.fsync, []

    def fsync(file):
        paths.append(os.readlink(f"/proc/self/fd/{file}"))
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    return paths


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="names of open files are read from /proc")
def test_sync_tree_syncs_every_file_and_folder(tmp_path, synced):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("one", "a/two", "a/b/three"):
        (tmp_path / name).touch()
    sync_tree(tmp_path)
    assert sorted(synced[:3]) == [str(tmp_path / name) for name in ("a/b/three", "a/two", "one")]
    assert synced[3:] == [str(tmp_path / "a/b"), str(tmp_path / "a"), str(tmp_path)]


def test_a_failed_sync_is_an_error_unless_the_file_system_cannot_sync(tmp_path, monkeypatch):
    codes = [errno.EINVAL, errno.EIO]

    def fsync(_):
        raise OSError(codes.pop(0), "no")

    monkeypatch.setattr(os, "fsync", fsync)
    sync_folders(tmp_path)
    with pytest.raises(OSError, match="no") as failed:
        sync_folders(tmp_path)
    assert failed.value.errno == errno.EIO
