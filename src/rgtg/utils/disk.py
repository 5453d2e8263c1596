"""What several processes and a power cut ask of files: one writer at a time, and nothing that was only in memory."""

import errno
import hashlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rgtg.errors import OutputError, UsageError
from rgtg.types.base import FileSum
from rgtg.utils.files import make_folder

LOCK_FILE = ".rgtg-lock"


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Let no second process work on an output folder while the block runs; the folder is made where there is none.

    The lock is of the process that holds it and ends with it, however that ends: a file that is left says nothing.

    Raises:
        UsageError: another process holds the folder.
        OutputError: the folder cannot be made or written.
    """
    new = not folder.exists()
    make_folder(folder)
    path = folder / LOCK_FILE
    held = _hold(path)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # before it is let go: who opened it meanwhile sees that it is gone
        os.close(held)
        if new:
            with suppress(OSError):  # something is in it
                folder.rmdir()


def _hold(path: Path) -> int:
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}; choose another --output") from error
        try:
            take_lock(file, path, says=path.parent)
        except UsageError:
            os.close(file)
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file)):
                return file
        os.close(file)  # its last holder has removed it since


def take_lock(file: int, path: Path, *, says: Path | None = None) -> None:
    """Lock an open file until it is closed. Where there are no such locks, a warning says so.

    Args:
        file: its descriptor.
        path: its name.
        says: what a refusal names; ``path`` without.

    Raises:
        UsageError: another process has locked it.
    """
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(f"another process is writing {says or path}: wait for it, or give another --output") from error
    except (ImportError, OSError) as error:  # of the system, or of its file system
        why = getattr(error, "strerror", None) or "this system has no such locks"
        warnings.warn(f"{path} cannot be locked ({why}): see to it that no other process writes there", stacklevel=3)


def sum_of(path: Path) -> FileSum:
    """Size and SHA-256 of a file, read whole.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileSum(bytes=path.stat().st_size, sha256=digest)


def write_kept(path: Path, text: str) -> None:
    """Write a file that vouches for others: through a rename, and on the disk before it has its name.

    Raises:
        OSError: the disk is full, or fails.
    """
    partial = path.with_name(f"{path.name}.tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def keep_files(folder: Path) -> None:
    """Wait until every file below a folder is on the disk, and every name of one.

    Raises:
        OSError: the disk is full, or fails.
    """
    below = sorted(folder.rglob("*"))
    for path in below:
        if path.is_file():
            with path.open("rb") as file:
                _sync(file.fileno())
    keep_names(*(path for path in reversed(below) if path.is_dir()), folder)


def keep_names(*folders: Path) -> None:
    """Wait until the names that folders hold now, after a file was made, renamed or moved, are on the disk.

    Raises:
        OSError: the disk fails.
    """
    for folder in folders:
        try:
            file = os.open(folder, os.O_RDONLY)
        except PermissionError:  # Windows opens no folders
            continue
        try:
            _sync(file)
        finally:
            os.close(file)


def _sync(file: int) -> None:
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some systems know no such thing here
            raise
