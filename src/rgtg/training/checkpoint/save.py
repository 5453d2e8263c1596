"""The output folder of a run: checked before training, and the finished scorer written into it atomically."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from safetensors import SafetensorError

from rgtg.errors import OutputError, UsageError
from rgtg.models.loading.scorer_info import INFO_FILE, ScorerInfo, write_info
from rgtg.models.scorers.heads import StateHead, VocabularyHead, save_head
from rgtg.training.checkpoint.manager import CHECKPOINTS, PREFIX, require_folders
from rgtg.utils.files import replace_file, sync_folders, sync_tree

REPORT_FILE = "train-report.json"
_STAGE = ".unfinished-"


def require_output(output: Path, resume: bool) -> None:
    """Check that an output folder can be used, before training rather than after it.

    With ``resume``, the same run may have finished in the folder before, or may have been killed while it saved.

    Raises:
        UsageError: the folder already holds a model or another run's checkpoints, or a file has the name of a folder
            of checkpoints.
    """
    if resume:
        finish_saving(output)
    model_files = [name for name in ("config.json", "adapter_config.json", INFO_FILE) if (output / name).exists()]
    if model_files and any(output.glob(f"{_STAGE}*/{INFO_FILE}")):
        raise UsageError(f"saving the scorer to {output} was interrupted: --resume finishes it")
    if model_files and not (resume and (output / REPORT_FILE).is_file()):
        raise UsageError(
            f"--output {output} already holds a model ({model_files[0]}); choose another folder or delete it"
        )
    checkpoints = output / CHECKPOINTS
    if os.path.lexists(checkpoints):
        require_folders(checkpoints)
        if not resume and any(checkpoints.rglob(f"{PREFIX}*")):
            raise UsageError(
                f"--output {output} holds checkpoints of an unfinished run; add --resume or choose another"
            )


def save_scorer(
    folder: Path, model: Any, tokenizer: Any, info: ScorerInfo, card: str, *, settings: dict[str, Any] | None = None,
    weights: dict[str, Any] | None = None, **records: BaseModel,
) -> None:  # fmt: skip
    """Save a scorer completely or not at all: its weights, tokenizer, model card and settings, and rgtg.json last.

    Args:
        folder: of the scorer.
        model: a transformers or peft model, unwrapped; or a head on the policy's hidden states.
        tokenizer: of the model.
        info: written as rgtg.json.
        card: written as README.md.
        settings: written as settings.json.
        weights: gathered weights of a model that is sharded over processes; None if the model holds all of them.
        records: further JSON files by name, with _ in place of -.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    with _staged(folder) as stage:
        if isinstance(model, StateHead | VocabularyHead):
            save_head(stage, model)
        else:
            # A padding token may have added a row to the embedding. It is never read, so an adapter need not save it.
            extra = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
            model.save_pretrained(stage, state_dict=weights, **extra)
        tokenizer.save_pretrained(stage)
        texts = {"README.md": card}
        if settings is not None:
            texts["settings.json"] = json.dumps(settings, indent=2, default=str) + "\n"
        for name, record in records.items():
            texts[f"{name.replace('_', '-')}.json"] = record.model_dump_json(indent=2) + "\n"
        for name, text in texts.items():
            (stage / name).write_text(text, encoding="utf-8")
        sync_tree(stage)  # before rgtg.json, which marks the stage as complete
        write_info(stage, info)


def finish_saving(folder: Path) -> None:
    """Finish the work of a process that was killed while it saved: a stage that has rgtg.json is complete.

    Raises:
        OutputError: the folder cannot be written.
    """
    for stage in sorted(folder.glob(f"{_STAGE}*")):
        try:
            if (stage / INFO_FILE).is_file():
                _move_out(stage, folder)
            shutil.rmtree(stage)
        except OSError as error:
            raise OutputError(f"cannot finish saving the scorer to {folder}: {error.strerror or error}") from error


def _move_out(stage: Path, folder: Path) -> None:
    """Move all files out of the stage: rgtg.json last, after the other names are on the disk."""
    for path in sorted(stage.iterdir(), key=lambda path: path.name == INFO_FILE):
        if path.name == INFO_FILE:
            sync_folders(folder)
        replace_file(path, folder / path.name)
    sync_folders(folder)


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """Yield a folder inside ``folder``; if the block succeeds, move its files out, rgtg.json last.

    Raises:
        OutputError: something cannot be written; no incomplete file is left behind.
    """
    stage: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=folder, prefix=_STAGE))
        yield stage
        _move_out(stage, folder)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"cannot write the scorer to {folder}: {getattr(error, 'strerror', None) or error}"
        ) from error
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)


def drop_empty_checkpoints(output: Path) -> None:
    """Remove the folders that the Trainer makes even if it saves no checkpoint."""
    checkpoints = output / CHECKPOINTS
    for folder in (*sorted(checkpoints.rglob("*"), reverse=True), checkpoints):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
