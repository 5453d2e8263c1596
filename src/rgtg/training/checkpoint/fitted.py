"""The heads of a search that have been trained: kept beside the checkpoints until the best one is saved."""

import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rgtg.models.loading.scorer_info import ScorerInfo
from rgtg.models.scorers.heads import Head, load_head, save_head
from rgtg.training.checkpoint.manager import Marker, require_resumable, seal, verify
from rgtg.training.report import HeadChoice
from rgtg.types.base import Record

_FOLDER, _FILE = "finished", "fitted.json"


class FittedRecord(Record):
    """What is known of a trained head; ``log_bytes`` is how long the log was when it was done."""

    choice: HeadChoice
    loss: float
    steps: int
    epochs: float
    log_bytes: int


@dataclass
class Fitted:
    """A trained head, rounded to what is saved."""

    head: Head
    record: FittedRecord


def keep_fitted(folder: Path, fitted: Fitted, run: dict[str, Any]) -> None:
    """Write a trained head into its folder, sealed as checkpoints are."""
    target = folder / _FOLDER
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    save_head(target, fitted.head)
    (target / _FILE).write_text(fitted.record.model_dump_json() + "\n", encoding="utf-8")
    seal(target, step=fitted.record.steps, processes=1, run=run)


def find_fitted(folder: Path, run: dict[str, Any], info: ScorerInfo, *, force: bool) -> Fitted | None:
    """A head that an earlier start of the same run has finished, or None; a damaged one is named in a warning.

    Raises:
        UsageError: it is of other data or settings.
    """
    target = folder / _FOLDER
    if not target.exists():
        return None
    marker = verify(target)
    if not isinstance(marker, Marker):
        warnings.warn(f"the head {target} is trained again: {marker}", stacklevel=2)
        return None
    require_resumable(target, marker.run, run, [], force=force)
    record = FittedRecord.model_validate_json((target / _FILE).read_bytes())
    return Fitted(load_head(target, info), record)
