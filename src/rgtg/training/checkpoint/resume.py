"""Where a run resumes: at a checkpoint, from the start, or nowhere because it has already finished."""

import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from pydantic import ValidationError

from rgtg.config import TrainSettings
from rgtg.errors import UsageError
from rgtg.models.loading.scorer_info import INFO_FILE, ScorerInfo
from rgtg.models.scorers.heads import Head, load_head, save_head
from rgtg.training.checkpoint.manager import CHECKPOINTS, Marker, newest_valid, seal, verify
from rgtg.training.checkpoint.save import REPORT_FILE
from rgtg.training.report import FinishedRun, HeadChoice, TrainReport
from rgtg.types.base import Record

_HEAD_FOLDER, _HEAD_RECORD = "finished", "fitted.json"
_HASHES = ("data", "held_out", "base", "tokenizer", "reference_scorer")


@dataclass
class Start:
    """Where a run starts: at a checkpoint, or from the beginning; ``finished`` if there is nothing left to do."""

    checkpoint: Path | None = None
    finished: TrainReport | None = None


def find_start(settings: TrainSettings, run: dict[str, Any], is_main: bool) -> Start:
    """Find where a run with ``--resume`` starts. The main process looks and broadcasts the result.

    Args:
        settings: of the run.
        run: what decides its result (`rgtg.training.arguments.run_facts`).
        is_main: whether this is the main process.

    Raises:
        UsageError: the newest valid checkpoint, or the finished scorer, was made with other data or settings.
    """
    found = [_find_start(settings, run) if is_main else None]
    broadcast_object_list(found)  # does nothing in a single process
    start = found[0]
    assert start is not None, "the main process has looked"
    return start


def _find_start(settings: TrainSettings, run: dict[str, Any]) -> Start:
    finished = read_finished(settings.output)
    if finished is None:
        return Start(find_checkpoint(settings.output / CHECKPOINTS, run, force=settings.force))
    if changed := changes(finished.run, run):
        raise UsageError(
            f"--output {settings.output} holds a finished scorer, and {', '.join(changed)} changed since; choose "
            "another folder or delete it"
        )
    return Start(finished=finished.report)


def read_finished(output: Path) -> FinishedRun | None:
    """The record of a finished run, or None if the folder has no scorer or one of an earlier version."""
    if not (output / INFO_FILE).is_file():
        return None
    try:
        return FinishedRun.model_validate_json((output / REPORT_FILE).read_bytes())
    except (OSError, ValidationError):
        return None


def find_checkpoint(folder: Path, run: dict[str, Any], *, force: bool) -> Path | None:
    """The newest valid checkpoint in a folder, or None.

    Raises:
        UsageError: it was made with other data or settings, or lacks a state.
    """
    if (newest := newest_valid(folder)) is None:
        return None
    path, marker = newest
    require_same_run(path, marker.run, run, missing=marker.missing_state(), force=force)
    return path


def require_same_run(
    path: Path, before: dict[str, Any], now: dict[str, Any], *, missing: Sequence[str] = (), force: bool
) -> None:
    """Check that training resumed from a checkpoint gives what an uninterrupted run gives; with ``force``, only warn.

    Args:
        path: the checkpoint, or the folder of a trained head.
        before: what decided the result of the run that saved it.
        now: what decides the result of this run.
        missing: states that it lacks (`Marker.missing_state`).
        force: resume in any case.

    Raises:
        UsageError: it lacks optimizer, schedule or random state, or was made with other data or settings.
    """
    reasons = [f"{path} has no {' and no '.join(missing)}"] if missing else []
    if changed := changes(before, now):
        reasons.append(f"{', '.join(changed)} changed since it was made")
    if not reasons:
        return
    why = "; ".join(reasons)
    if not force:
        raise UsageError(
            f"cannot resume from {path.name}: {why}. Use the same data, base and settings, choose another --output, or "
            "add --force to resume in any case (the result then differs from that of one uninterrupted run)"
        )
    warnings.warn(f"resuming in any case (--force): {why}", stacklevel=2)


def changes(before: dict[str, Any], now: dict[str, Any], within: str = "") -> list[str]:
    """Dotted names whose values differ, with the old and new value if both are short.

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


class TrainedHeadRecord(Record):
    """Facts about a trained head; ``log_bytes`` is the length of the log file when it was done."""

    choice: HeadChoice
    loss: float
    steps: int
    epochs: float
    log_bytes: int


@dataclass
class TrainedHead:
    """One head of a search after its training, with its weights rounded as they are saved."""

    head: Head
    record: TrainedHeadRecord


def save_trained_head(folder: Path, trained: TrainedHead, run: dict[str, Any]) -> None:
    """Save one head of a search beside its checkpoints, sealed as they are, so that it need not be trained again."""
    target = folder / _HEAD_FOLDER
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    save_head(target, trained.head)
    (target / _HEAD_RECORD).write_text(trained.record.model_dump_json() + "\n", encoding="utf-8")
    seal(target, step=trained.record.steps, processes=1, run=run)


def load_trained_head(folder: Path, run: dict[str, Any], info: ScorerInfo, *, force: bool) -> TrainedHead | None:
    """A head that an earlier start of the same run has trained, or None. A warning names a damaged one.

    Raises:
        UsageError: it was made with other data or settings.
    """
    target = folder / _HEAD_FOLDER
    if not target.exists():
        return None
    marker = verify(target)
    if not isinstance(marker, Marker):
        warnings.warn(f"the head {target} is trained again: {marker}", stacklevel=2)
        return None
    require_same_run(target, marker.run, run, force=force)
    record = TrainedHeadRecord.model_validate_json((target / _HEAD_RECORD).read_bytes())
    return TrainedHead(load_head(target, info), record)
