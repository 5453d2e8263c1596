"""Save and load scorers: stock Hugging Face files plus rgtg.json, which says what the scorer was trained for."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from rgtg.errors import DataError, ModelNotFoundError, UsageError
from rgtg.types import FORMAT_VERSION, Record

INFO_FILE = "rgtg.json"
Objective = Literal["prefix-bt", "full-bt"]


class ScorerInfo(Record):
    """Contents of rgtg.json. ``append_eos``: finished completions were closed by EOS in training."""

    version: int = FORMAT_VERSION
    rgtg_version: str
    objective: Objective
    base_model: str
    base_fingerprint: str
    tokenizer_hash: str
    data_fingerprint: str
    append_eos: bool = True
    max_length: int | None = None


def read_info(folder: str | Path) -> ScorerInfo | None:
    """Contents of a folder's rgtg.json, or None where there is none (a stock reward model)."""
    path = Path(folder) / INFO_FILE
    if not path.is_file():
        return None
    try:
        return ScorerInfo.model_validate_json(path.read_bytes())
    except (ValidationError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a valid scorer description: {error}") from error


def write_info(folder: str | Path, info: ScorerInfo) -> None:
    """Write rgtg.json, last of a checkpoint's files, through a rename so that it is never half there."""
    path = Path(folder) / INFO_FILE
    partial = path.with_suffix(".json.tmp")
    partial.write_text(json.dumps(info.model_dump(), indent=2) + "\n")
    partial.replace(path)


def require_safe_weights(source: str) -> None:
    """Refuse a local folder that does not exist, or holds only pickled weights.

    Raises:
        ModelNotFoundError: no such folder, or not a model folder.
        UsageError: weights in a pickle format, which can run code on loading.
    """
    path = Path(source)
    if not path.is_dir():
        if path.is_file():
            raise ModelNotFoundError(f"{source} is a file; expected a model folder or a hub id")
        looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source
        if looks_local:
            raise ModelNotFoundError(f"no model folder {source}; expected a folder with config.json, or a hub id")
        return
    if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
        raise ModelNotFoundError(f"{source} has no config.json; expected a folder saved by save_pretrained")
    if not any(path.glob("*.safetensors")) and (any(path.glob("*.bin")) or any(path.glob("*.pt"))):
        raise UsageError(
            f"{source} holds pickled weights only, which can run code when loaded; convert them to safetensors"
        )


def fingerprint_weights(model: Any) -> str:
    """Short hash of a model's weights: names, shapes and evenly spaced values of every tensor."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)].float().cpu().numpy()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.tobytes())
    return digest.hexdigest()[:16]
