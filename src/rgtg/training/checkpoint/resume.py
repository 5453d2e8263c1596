"""Where a run goes on: at a checkpoint, from the start, or nowhere, since it has already finished."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from pydantic import ValidationError

from rgtg.config import TrainSettings
from rgtg.errors import UsageError
from rgtg.models.loading.scorer_info import INFO_FILE, ScorerInfo
from rgtg.training.arguments import CHECKPOINTS
from rgtg.training.checkpoint.manager import changes, newest_valid, require_resumable
from rgtg.training.data.read import TrainData
from rgtg.training.report import TrainReport
from rgtg.types.base import Record

REPORT_FILE = "train-report.json"
# Of trl's arguments, those that say where and how a run is told of, kept or fed, and leave its result alone.
_ASIDE = {
    "output_dir", "disable_tqdm", "resume_from_checkpoint", "use_cpu", "seed", "max_length", "debug", "run_name",
    "project", "trackio_space_id", "report_to", "include_num_input_tokens_seen", "include_tokens_per_second",
    "skip_memory_metrics", "prediction_loss_only", "ddp_timeout", "ddp_bucket_cap_mb", "ddp_backend",
}  # fmt: skip
_ASIDE_PREFIXES = ("logging_", "log_", "save_", "dataloader_", "hub_", "push_to_hub", "local_", "batch_eval")


class Finished(Record):
    """train-report.json of a scorer: what the run reported, and what it was made from."""

    report: TrainReport
    run: dict[str, Any]


@dataclass
class Start:
    """Where a run starts: at a checkpoint, or anew; or the report of the same run, which has finished before."""

    checkpoint: Path | None = None
    finished: TrainReport | None = None

    def told(self) -> str:
        """In a line."""
        if self.finished is not None:
            return f"{self.finished.output} is finished: nothing to do"
        return f"resuming from {self.checkpoint}" if self.checkpoint else "no checkpoint yet: starting anew"


def run_facts(settings: TrainSettings, config: Any, info: ScorerInfo, data: TrainData) -> dict[str, Any]:
    """What decides a run's result; names of files do not, what is in them does."""
    names = {"objective", "trunk", "head", "layer", "width", "rank", "seed", "lora", "eval_fraction"}
    facts = settings.model_dump(mode="json", include=names) | {
        "base": info.base_fingerprint, "tokenizer": info.tokenizer_hash, "data": data.fingerprint,
        "held_out": data.held_out_fingerprint, "max_length": info.max_length,
        "reference_scorer": info.reference_fingerprint, "processes": config.world_size,
        "options": settings.options and settings.options.model_dump(mode="json"),
        "train": _train_facts(config),
    }  # fmt: skip
    told: dict[str, Any] = json.loads(json.dumps(facts))
    return told


def _train_facts(config: Any) -> dict[str, Any]:
    facts = {}
    for name, value in config.to_dict().items():
        plain = value is None or isinstance(value, str | int | float | list | dict)
        if plain and name not in _ASIDE and not name.startswith(_ASIDE_PREFIXES):
            facts[name] = value
    return facts


def find_start(settings: TrainSettings, run: dict[str, Any], is_main: bool) -> Start:
    """Where this run starts; the main process looks, and tells the others.

    Raises:
        UsageError: the newest valid checkpoint, or the finished scorer, is of other data or settings.
    """
    found = [_look(settings, run) if is_main else None]
    broadcast_object_list(found)  # nothing to do for one process
    start = found[0]
    assert start is not None, "the main process has looked"
    return start


def _look(settings: TrainSettings, run: dict[str, Any]) -> Start:
    if not settings.resume:
        return Start()
    if (before := read_finished(settings.output)) is not None:
        if changed := changes(before.run, run):
            raise UsageError(
                f"--output {settings.output} holds a finished scorer, and {', '.join(changed)} changed since; choose "
                "another folder or delete it"
            )
        return Start(finished=before.report)
    return Start(find_checkpoint(settings.output / CHECKPOINTS, run, force=settings.force))


def find_checkpoint(folder: Path, run: dict[str, Any], *, force: bool) -> Path | None:
    """Newest valid checkpoint of a training, or None.

    Raises:
        UsageError: it is of other data or settings, or lacks a state.
    """
    if (newest := newest_valid(folder)) is None:
        return None
    path, marker = newest
    require_resumable(path, marker.run, run, marker.missing_state(), force=force)
    return path


def read_finished(output: Path) -> Finished | None:
    """What a finished run left in its folder; None where there is no scorer, or one of an earlier version."""
    if not (output / INFO_FILE).is_file():
        return None
    try:
        return Finished.model_validate_json((output / REPORT_FILE).read_bytes())
    except (OSError, ValidationError):
        return None
