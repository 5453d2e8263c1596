"""Write a finished scorer: its weights and tokenizer, a model card, and rgtg.json last."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rgtg.errors import OutputError
from rgtg.models.checkpoint import INFO_FILE, ScorerInfo, write_info
from rgtg.models.heads import Head, save_head


def save_scorer(
    folder: Path, model: Any, tokenizer: Any, info: ScorerInfo, card: str, *, settings: dict[str, Any] | None = None
) -> None:
    """Save a model of the scorer's own, whole or not at all.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    # The row a padding token may have added to the embedding is never read: an adapter need not carry it.
    extra = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
    with _staged(folder) as stage:
        model.save_pretrained(stage, **extra)
        _write_rest(stage, tokenizer, info, card, settings)


def save_own_state(
    folder: Path, head: Head, tokenizer: Any, info: ScorerInfo, card: str, *, settings: dict[str, Any]
) -> None:
    """Save a head on the policy's own states, whole or not at all.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    with _staged(folder) as stage:
        save_head(stage, head)
        _write_rest(stage, tokenizer, info, card, settings)


def _write_rest(stage: Path, tokenizer: Any, info: ScorerInfo, card: str, settings: dict[str, Any] | None) -> None:
    tokenizer.save_pretrained(stage)
    (stage / "README.md").write_text(card, encoding="utf-8")
    if settings is not None:
        (stage / "settings.json").write_text(json.dumps(settings, indent=2, default=str) + "\n", encoding="utf-8")
    write_info(stage, info)


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """Yield a folder inside ``folder``; what is in it afterwards moves out, rgtg.json last.

    Raises:
        OutputError: something cannot be written; nothing half-written is left.
    """
    stage: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=folder, prefix=".unfinished-"))
        yield stage
        for path in sorted(stage.iterdir(), key=lambda path: path.name == INFO_FILE):
            path.chmod(0o644)  # safetensors leaves weights to their owner alone
            path.replace(folder / path.name)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"cannot write the scorer to {folder}: {getattr(error, 'strerror', None) or error}"
        ) from error
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)
