"""Write a finished scorer: its weights and tokenizer, a model card, and rgtg.json last."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from safetensors import SafetensorError

from rgtg.errors import OutputError
from rgtg.models.loading.scorer_info import INFO_FILE, ScorerInfo, write_info
from rgtg.models.scorers.heads import Head, save_head
from rgtg.utils.files import replace_file, sync_folders, sync_tree

_STAGE = ".unfinished-"


def save_scorer(
    folder: Path, model: Any, tokenizer: Any, info: ScorerInfo, card: str, *, settings: dict[str, Any] | None = None,
    weights: dict[str, Any] | None = None, **records: BaseModel,
) -> None:  # fmt: skip
    """Save a model of the scorer's own, whole or not at all.

    Args:
        folder: of the scorer.
        model: unwrapped.
        tokenizer: its own.
        info: rgtg.json.
        card: README.md.
        settings: settings.json.
        weights: of a model that is sharded, gathered; those of ``model`` without.
        records: further JSON files by name, with _ for -.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    # The row a padding token may have added to the embedding is never read: an adapter need not carry it.
    extra = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
    with _staged(folder) as stage:
        model.save_pretrained(stage, state_dict=weights, **extra)
        _write_rest(stage, tokenizer, info, card, settings, records)


def save_own_state(
    folder: Path, head: Head, tokenizer: Any, info: ScorerInfo, card: str, *, settings: dict[str, Any],
    **records: BaseModel,
) -> None:  # fmt: skip
    """Save a head on the policy's own states, whole or not at all.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    with _staged(folder) as stage:
        save_head(stage, head)
        _write_rest(stage, tokenizer, info, card, settings, records)


def _write_rest(
    stage: Path, tokenizer: Any, info: ScorerInfo, card: str, settings: dict[str, Any] | None,
    records: dict[str, BaseModel],
) -> None:  # fmt: skip
    tokenizer.save_pretrained(stage)
    (stage / "README.md").write_text(card, encoding="utf-8")
    if settings is not None:
        (stage / "settings.json").write_text(json.dumps(settings, indent=2, default=str) + "\n", encoding="utf-8")
    for name, record in records.items():
        (stage / f"{name.replace('_', '-')}.json").write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    sync_tree(stage)  # since a stage with rgtg.json is complete
    write_info(stage, info)


def finish_saving(folder: Path) -> None:
    """Finish what a process that was killed while saving left behind: a stage with rgtg.json is complete.

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
    """Move all files, rgtg.json last and only once the others are there for good."""
    for path in sorted(stage.iterdir(), key=lambda path: path.name == INFO_FILE):
        if path.name == INFO_FILE:
            sync_folders(folder)
        replace_file(path, folder / path.name)
    sync_folders(folder)


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """Yield a folder inside ``folder``; what is in it afterwards moves out, rgtg.json last.

    Raises:
        OutputError: something cannot be written; nothing half-written is left.
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
