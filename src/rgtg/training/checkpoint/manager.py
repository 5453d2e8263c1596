"""Checkpoints of a run: sealed once every file is there, verified to the byte before one is gone on from."""

import os
import warnings
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from rgtg.errors import UsageError, first_line
from rgtg.types.base import FileChecksum, Record
from rgtg.utils.files import file_checksum, sync_folders, sync_tree, write_text_synced
from rgtg.version import __version__

MARKER = "rgtg-checkpoint.json"
PREFIX = "checkpoint-"


class Marker(Record):
    """Written last into a checkpoint's folder: what it belongs to, and what every file of it must be."""

    version: int = 1
    rgtg_version: str
    step: int
    processes: int
    run: dict[str, Any] = Field(description="what decides the result: data, base, objective, settings")
    files: dict[str, FileChecksum]

    def missing_state(self) -> list[str]:
        """Parts without which training would go on differently, that this checkpoint never had.

        FSDP and DeepSpeed keep an optimiser's state in folders of their own (``optimizer_0``, ``global_step6``).
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
    """Say that a checkpoint is complete: sizes and SHA-256 of all its files, through a rename.

    When this returns, all of it is on the disk: older checkpoints can go.

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
    sync_folders(folder, folder.parent, folder.parent.parent)  # its file names, and its own where it is the first


def verify(folder: Path) -> Marker | str:
    """The marker of a checkpoint whose files are all as they were sealed, or what is wrong with it."""
    try:
        marker = Marker.model_validate_json((folder / MARKER).read_bytes())
    except FileNotFoundError:
        return f"saving it was interrupted (it has no {MARKER})"
    except (OSError, ValidationError):
        return f"its {MARKER} is damaged"
    for name, expected in marker.files.items():
        try:
            wrong = _differs(folder, name, expected)
        except (OSError, ValueError) as error:  # a name that no file can have, or a file that cannot be read
            return f"{name[:80]!r} cannot be read: {first_line(error)[:80]}"
        if wrong:
            return wrong
    return marker


def _differs(folder: Path, name: str, expected: FileChecksum) -> str | None:
    """What is wrong with one file of a checkpoint; None: it is as it was sealed."""
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
    """Newest checkpoint that is complete and undamaged, or None; those passed over are named in a warning each."""
    for path in reversed(listed(folder)):
        marker = verify(path)
        if isinstance(marker, Marker):
            return path, marker
        warnings.warn(f"checkpoint {path} is passed over: {marker}", stacklevel=2)
    return None


def in_the_way(folder: Path) -> Path | None:
    """What is no folder where this one or one above it has to be; None where nothing is."""
    return next((path for path in (folder, *folder.parents) if os.path.lexists(path) and not path.is_dir()), None)


def require_room(checkpoints: Path) -> None:
    """Refuse files where the folders of a run's checkpoints have to be.

    Raises:
        UsageError: names the first.
    """
    heads = sorted(checkpoints.glob("layer-*-width-*"))
    for folder in (checkpoints, *heads, *(path for one in (checkpoints, *heads) for path in listed(one))):
        if (path := in_the_way(folder)) is not None:
            raise UsageError(f"{path} is a file, where a folder of checkpoints has to be: move it away")


def listed(folder: Path) -> list[Path]:
    """Checkpoints in a folder, whole or not, by step."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def require_resumable(
    path: Path, before: dict[str, Any], now: dict[str, Any], lacking: list[str], *, force: bool
) -> None:
    """Refuse a checkpoint that would train on differently than it was saved; with ``force``, warn.

    Args:
        path: of the checkpoint, which is valid.
        before: what the run was made from that saved it.
        now: what this run is made from.
        lacking: states that it has not (`Marker.missing_state`).
        force: go on regardless.

    Raises:
        UsageError: it lacks optimiser, schedule or random state, or data or settings have changed.
    """
    changed = changes(before, now)
    if not lacking and not changed:
        return
    reasons = [f"{path} has no {' and no '.join(lacking)}"] if lacking else []
    reasons += [f"{', '.join(changed)} changed since it was made"] if changed else []
    why = "; ".join(reasons)
    if not force:
        raise UsageError(
            f"cannot resume from {path.name}: {why}. Use the same data, base and settings, choose another --output, or "
            "add --force to go on regardless (the result is then not that of one uninterrupted run)"
        )
    warnings.warn(f"resuming regardless (--force): {why}", stacklevel=2)


def changes(before: dict[str, Any], now: dict[str, Any], within: str = "") -> list[str]:
    """Dotted names whose values differ; of small ones, what they were.

    Example:
        >>> changes({"seed": 0, "lora": {"r": 4}}, {"seed": 0, "lora": {"r": 8}})
        ['lora.r (was 4, is 8)']
    """
    found = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            found += changes(old, new, f"{within}{name}.")
        else:
            plain = not name.endswith(_HASHES) and not isinstance(old, dict | list) and not isinstance(new, dict | list)
            found.append(f"{within}{name} (was {old}, is {new})" if plain else f"{within}{name}")
    return found


_HASHES = ("data", "held_out", "base", "tokenizer", "reference_scorer")
