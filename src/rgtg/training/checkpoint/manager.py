"""Checkpoints of a run: sealed once all files are written, and verified to the byte before training resumes."""

import os
import warnings
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from rgtg.errors import UsageError, first_line
from rgtg.types.base import FileChecksum, Record
from rgtg.utils.files import file_checksum, sync_folders, sync_tree, write_text_synced
from rgtg.version import __version__

CHECKPOINTS = "checkpoints"  # folder of a run's output
PREFIX = "checkpoint-"
MARKER = "rgtg-checkpoint.json"


class Marker(Record):
    """The file that is written last into a checkpoint: the run it belongs to, and the checksum of every file."""

    version: int = 1
    rgtg_version: str
    step: int
    processes: int
    run: dict[str, Any] = Field(description="what decides the result: data, base, objective, settings")
    files: dict[str, FileChecksum]

    def missing_state(self) -> list[str]:
        """States that this checkpoint never had, and without which training would continue differently.

        FSDP and DeepSpeed save the optimizer state in folders of their own (``optimizer_0``, ``global_step6``).
        """
        random = ["rng_state.pth"] if self.processes == 1 else [f"rng_state_{i}.pth" for i in range(self.processes)]
        sharded = any(name.startswith("global_step") for name in self.files)
        checks = (
            ("optimizer state", sharded or any(name.startswith("optimizer") for name in self.files)),
            ("schedule", sharded or "scheduler.pt" in self.files),
            ("random state", all(name in self.files for name in random)),
        )
        return [name for name, found in checks if not found]


def seal(folder: Path, *, step: int, processes: int, run: dict[str, Any]) -> None:
    """Mark a checkpoint as complete, with the size and SHA-256 of all its files.

    When this returns, all of it is on the disk, so older checkpoints can be deleted.

    Raises:
        OSError: the disk is full, or fails.
    """
    sync_tree(folder)
    files = {
        path.relative_to(folder).as_posix(): file_checksum(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MARKER
    }
    marker = Marker(rgtg_version=__version__, step=step, processes=processes, run=run, files=files)
    write_text_synced(folder / MARKER, marker.model_dump_json(indent=2) + "\n")
    sync_folders(folder, folder.parent, folder.parent.parent)  # the parents too: the first checkpoint creates them


def verify(folder: Path) -> Marker | str:
    """The marker of a checkpoint whose files are all as they were saved, or else what is wrong with it."""
    try:
        marker = Marker.model_validate_json((folder / MARKER).read_bytes())
    except FileNotFoundError:
        return f"saving it was interrupted (it has no {MARKER})"
    except (OSError, ValidationError):
        return f"its {MARKER} is damaged"
    for name, expected in marker.files.items():
        try:
            wrong = _difference(folder, name, expected)
        except (OSError, ValueError) as error:  # an impossible file name, or a file that cannot be read
            return f"{name[:80]!r} cannot be read: {first_line(error)[:80]}"
        if wrong:
            return wrong
    return marker


def _difference(folder: Path, name: str, expected: FileChecksum) -> str | None:
    """What is wrong with one file of a checkpoint, or None."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        return f"its {MARKER} names {name!r}, outside of it"
    if not path.is_file():
        return f"{name} is missing"
    if (size := path.stat().st_size) != expected.bytes:
        return f"{name} is truncated or was changed: {size:,} bytes, of {expected.bytes:,}"
    if file_checksum(path) != expected:
        return f"{name} is damaged: its SHA-256 is not the one it was saved with"
    return None


def newest_valid(folder: Path) -> tuple[Path, Marker] | None:
    """The newest checkpoint that is complete and undamaged, or None. A warning names each one that is not."""
    for path in reversed(list_checkpoints(folder)):
        marker = verify(path)
        if isinstance(marker, Marker):
            return path, marker
        warnings.warn(f"checkpoint {path} is skipped: {marker}", stacklevel=2)
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a folder, valid or not, ordered by step."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def blocking_file(folder: Path) -> Path | None:
    """The first path among this folder and its parents that exists and is not a folder, or None."""
    return next((path for path in (folder, *folder.parents) if os.path.lexists(path) and not path.is_dir()), None)


def require_folders(checkpoints: Path) -> None:
    """Check that no file has the name of a folder of checkpoints.

    Raises:
        UsageError: names the first such file.
    """
    heads = sorted(checkpoints.glob("layer-*-width-*"))
    for folder in (checkpoints, *heads, *(path for one in (checkpoints, *heads) for path in list_checkpoints(one))):
        if (path := blocking_file(folder)) is not None:
            raise UsageError(f"{path} is a file, but a folder of checkpoints is needed there: move it away")
