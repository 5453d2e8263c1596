"""Files: atomic writes, checksums, syncs to the disk and locks. Every part of the package that needs one takes it here.

A name that ends in ``synced``, or begins with ``sync``, returns only once the data is on the disk, so that it survives
a power failure.
"""

import errno
import hashlib
import os
import secrets
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from rgtg.errors import OutputError, RgtgError, UsageError
from rgtg.types.base import FileChecksum

LOCK_FILE = ".rgtg-lock"


def make_folder(folder: Path) -> None:
    """Make an output folder if it does not exist, and check that files can be written in it.

    Raises:
        OutputError: the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror}; choose another --output") from error


def refuse_overwriting(inputs: Iterable[tuple[str, "str | Path | None"]], outputs: Iterable[Path]) -> None:
    """Raise an error if an output is also an input, under whatever name. ``--force`` does not allow it.

    Args:
        inputs: options and their values. None, and names that are not files (a hub id), are ignored.
        outputs: every file that may be written or removed.

    Raises:
        UsageError: a file is both.
    """
    existing = [output for output in outputs if output.exists()]
    for option, source in inputs:
        for output in existing:
            if source is not None and Path(source).exists() and output.samefile(source):
                raise UsageError(f"{option} {source} would be overwritten: it is {output}; choose another output")


@contextmanager
def atomic_write(path: Path, *, advice: str = "choose a folder that can be written") -> Iterator[Path]:
    """Yield a temporary path in the same folder, and rename it to ``path`` only if the block succeeds.

    Args:
        path: the file to write; `replace_file` says which permissions it gets.
        advice: end of the error message if nothing can be written there.

    Raises:
        OutputError: the folder cannot be made or written, ``path`` is a folder, or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _create_beside(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; {advice}") from error
    try:
        if path.is_dir():
            raise OutputError(f"cannot write {path}: it is a folder; give a file name")
        yield partial
        replace_file(partial, path)
    except RgtgError:  # some are OSErrors too, such as ModelNotFoundError, and their message says more
        raise
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_text_synced(path: Path, text: str) -> None:
    """Write a file that marks others as complete: it is on the disk before it gets its name.

    Raises:
        OSError: the disk is full, or fails.
    """
    partial = path.with_name(f"{path.name}.tmp")
    with partial.open("wb") as file:
        write_synced(file, text.encode())
    partial.replace(path)


def write_synced(file: IO[bytes], data: bytes) -> None:
    """Write all bytes to an open file, buffered or not.

    Raises:
        OSError: the disk is full, or fails.
    """
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
    sync_file(file)


def sync_file(file: IO[bytes]) -> None:
    """Wait until all that was written to an open file is on the disk.

    Raises:
        OSError: the disk is full, or fails.
    """
    file.flush()
    os.fsync(file.fileno())


def replace_file(partial: Path, path: Path) -> None:
    """Rename a finished file to ``path``, with the permissions of the file it replaces, or else those of a new file.

    Libraries such as safetensors write files that only their owner can read.
    """
    if path.exists():
        mode = path.stat().st_mode & 0o777
    else:
        probe = _create_beside(path)  # a new file shows the umask; reading the umask would set it for other threads
        mode = probe.stat().st_mode & 0o777
        probe.unlink()
    partial.chmod(mode)
    partial.replace(path)


def _create_beside(path: Path) -> Path:
    """Create an empty file in the folder of ``path``, no more readable than the file it will replace."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    mode = path.stat().st_mode & 0o666 | 0o600 if path.exists() else 0o666  # the system applies the umask
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
    return partial


def file_checksum(path: Path) -> FileChecksum:
    """Read a whole file and return its size and SHA-256.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileChecksum(bytes=path.stat().st_size, sha256=digest)


def sync_tree(folder: Path) -> None:
    """Sync every file and folder in a folder to the disk.

    Raises:
        OSError: the disk is full, or fails.
    """
    below = sorted(folder.rglob("*"))
    for path in below:
        if path.is_file():
            with path.open("rb") as file:
                _sync(file.fileno())
    sync_folders(*(path for path in reversed(below) if path.is_dir()), folder)


def sync_folders(*folders: Path) -> None:
    """Sync folders' lists of names, after a file was made, renamed or moved.

    Raises:
        OSError: the disk fails.
    """
    for folder in folders:
        try:
            file = os.open(folder, os.O_RDONLY)
        except PermissionError:  # Windows cannot open a folder
            continue
        try:
            _sync(file)
        finally:
            os.close(file)


def _sync(file: int) -> None:
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # this file system cannot sync this kind
            raise


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to an output folder during the block. The folder is made if it does not exist.

    The lock ends with the process, however it ends. A lock file that was left behind locks nothing.

    Raises:
        UsageError: another process has locked the folder.
        OutputError: the folder cannot be made or written.
    """
    new = not folder.exists()
    make_folder(folder)
    path = folder / LOCK_FILE
    file = _open_locked(path)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # before the lock is released: a process that has opened the file sees that it is gone
        os.close(file)
        if new:
            with suppress(OSError):  # the folder is not empty
                folder.rmdir()


def _open_locked(path: Path) -> int:
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}; choose another --output") from error
        try:
            lock_file(file, path.parent)
        except UsageError:
            os.close(file)
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file)):
                return file
        os.close(file)  # its last holder has removed the file since it was opened


def lock_file(file: int, output: Path) -> None:
    """Lock an open file until it is closed. If the system has no such locks, warn.

    Args:
        file: its descriptor.
        output: the path that messages name.

    Raises:
        UsageError: another process has locked it.
    """
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(f"another process is writing {output}: wait for it, or give another --output") from error
    except (ImportError, OSError) as error:  # the system, or the file system, has no such locks
        why = getattr(error, "strerror", None) or "this system has no file locks"
        warnings.warn(f"{output} cannot be locked ({why}): make sure that no other process writes there", stacklevel=3)
