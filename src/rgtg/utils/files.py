"""Outputs are written whole or not at all; what cannot or must not be written is found out before the work."""

import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rgtg.errors import OutputError, RgtgError, UsageError


def make_folder(folder: Path) -> None:
    """Make an output folder where there is none, and try to write in it.

    Raises:
        OutputError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror}; choose another --output") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def keep_inputs(inputs: Iterable[tuple[str, "str | Path | None"]], outputs: Iterable[Path]) -> None:
    """Refuse to write over what is read, by whatever name: no ``--force`` is meant for that.

    Args:
        inputs: options and what they name; None, and names that are no files (a hub id), are passed over.
        outputs: every file that may be written or removed.

    Raises:
        UsageError: a file that is among both.
    """
    there = [output for output in outputs if output.exists()]
    for option, source in inputs:
        for output in there:
            if source is not None and Path(source).exists() and output.samefile(source):
                raise UsageError(f"{option} {source} would be written over: it is {output}; choose another output")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it takes the name, as `take_name` does, only when the block succeeds.

    Raises:
        OutputError: the folder cannot be made or written, ``path`` is a folder, or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = new_beside(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; choose a folder that can be written") from error
    try:
        if path.is_dir():
            raise OutputError(f"cannot write {path}: it is a folder; give a file name")
        yield partial
        take_name(partial, path)
    except RgtgError:  # a model that is not found is an OSError too, and says more
        raise
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def new_beside(path: Path) -> Path:
    """An empty file beside ``path``, which no one may read who may not read what it will replace."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    mode = path.stat().st_mode & 0o666 | 0o600 if path.exists() else _ANYBODY
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
    return partial


def take_name(partial: Path, path: Path) -> None:
    """Rename a finished file and give it the permissions of `mode_for`: libraries write files with others."""
    partial.chmod(mode_for(path))
    partial.replace(path)


def mode_for(path: Path) -> int:
    """Permissions that a file should have: its own where it is there, else those that the umask leaves a new file."""
    if path.exists():
        return path.stat().st_mode & 0o777
    probe = new_beside(path)  # asking for the umask would set it, for other threads too
    try:
        return probe.stat().st_mode & 0o777
    finally:
        probe.unlink()


_ANYBODY = 0o666  # the system takes from it what the umask says
