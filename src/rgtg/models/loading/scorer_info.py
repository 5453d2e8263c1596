"""Save and load scorers: stock Hugging Face files plus rgtg.json, which says what the scorer was trained for."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError

from rgtg.config.training import Objective as Objective
from rgtg.errors import DataError, ModelNotFoundError, UsageError
from rgtg.models.loading.device_map import iter_full_weights
from rgtg.models.loading.hub import holds_only_pickles, local_folder
from rgtg.types.base import FORMAT_VERSION, Record
from rgtg.utils.files import write_text_synced

INFO_FILE = "rgtg.json"
HEAD_FILE = "head.safetensors"


class ScorerInfo(Record):
    """Contents of rgtg.json. ``append_eos``: finished completions were closed by EOS in training.

    ``trunk`` says whose states are scored: those of a model of the scorer's own (``separate``), of the frozen policy
    (``own``), or of the policy under an adapter (``shared``). The fields after it describe a head on them: which kind,
    which layer it reads, its sizes, and the fingerprints that the policy has when loaded in other dtypes. A ``vocab``
    head with a ``separate`` trunk is a causal language model whose output layer scores next tokens.
    ``reference_fingerprint`` is of the scorer that said how far the training pairs were trusted, where one did.
    """

    version: int = FORMAT_VERSION
    rgtg_version: str
    objective: Objective
    base_model: str
    base_fingerprint: str
    tokenizer_hash: str
    data_fingerprint: str
    append_eos: bool = True
    max_length: int | None = None
    trunk: Literal["separate", "own", "shared"] = "separate"
    head: Literal["scalar", "state", "vocab"] = "scalar"
    layer: int | None = None
    width: int | None = None
    rank: int | None = None
    base_casts: dict[str, str] = Field(default_factory=dict)
    reference_fingerprint: str | None = None

    @property
    def base_fingerprints(self) -> set[str]:
        """Of the base model's weights, in every dtype that they may be loaded in."""
        return {self.base_fingerprint, *self.base_casts.values()}


def read_info(folder: str | Path) -> ScorerInfo | None:
    """Contents of the rgtg.json of a folder or hub repository, or None where there is none (a stock reward model)."""
    path = Path(local_folder(str(folder))) / INFO_FILE
    if not path.is_file():
        return None
    try:
        return ScorerInfo.model_validate_json(path.read_bytes())
    except (ValidationError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a valid scorer description: {error}") from error


def write_info(folder: str | Path, info: ScorerInfo) -> None:
    """Write rgtg.json, last of a checkpoint's files, through a rename so that it is never half there."""
    write_text_synced(Path(folder) / INFO_FILE, json.dumps(info.model_dump(), indent=2) + "\n")


def require_safe_weights(source: str) -> str:
    """The local folder of a model; one that does not exist, or holds only pickled weights, is refused.

    Raises:
        ModelNotFoundError: no such folder or repository, or no model in it.
        UsageError: weights in a pickle format, which can run code on loading.
    """
    path = Path(local_folder(source))
    if path.is_file():
        raise ModelNotFoundError(f"{source} is a file; expected a model folder or a hub id")
    if (path / HEAD_FILE).is_file():
        if not (path / INFO_FILE).is_file():
            raise UsageError(f"{source} has no {INFO_FILE}: saving the head was interrupted; train it again")
        raise UsageError(
            f"{source} is a head on its policy's own states (rgtg train --trunk own), not a model of its own: use it "
            "as a scorer, with that policy"
        )
    if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
        raise ModelNotFoundError(f"{source} has no config.json; expected a folder saved by save_pretrained")
    if not any(path.glob("*.safetensors")) and holds_only_pickles(source):
        raise UsageError(
            f"{source} holds pickled weights only, which can run code when loaded; convert them to safetensors"
        )
    for index in path.glob("*.safetensors.index.json"):
        _require_inside(index)
    return str(path)


def _require_inside(index: Path) -> None:
    """Refuse an index of weights that names files elsewhere.

    Raises:
        UsageError: a name that is no plain file name, or an index that is none.
    """
    try:
        named = set(json.loads(index.read_bytes())["weight_map"].values())
        odd = sorted(name for name in named if Path(name).name != name or "\\" in name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{index} is damaged: it maps no weights to files") from error
    if odd:
        raise UsageError(f"{index} names {odd[0]!r}: weights must lie in the model's own folder")


def fingerprint_weights(model: Any, dtype: torch.dtype | None = None) -> str:
    """Short hash of a model's weights: names, shapes and evenly spaced values of every tensor.

    ``dtype`` gives the hash that the same weights have when they are loaded as that. A model whose weights were packed
    for decoding keeps the hash of what it was made from in ``_rgtg_fingerprint``.
    """
    kept = getattr(model, "_rgtg_fingerprint", None)
    if isinstance(kept, str) and dtype is None:
        return kept
    digest = hashlib.sha256()
    for name, tensor in iter_full_weights(model):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)]
        if dtype is not None and sample.is_floating_point():
            sample = sample.to(dtype)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def cast_fingerprints(model: Any) -> dict[str, str]:
    """Fingerprints that the weights have when loaded in 16 bits."""
    return {
        str(dtype).removeprefix("torch."): fingerprint_weights(model, dtype)
        for dtype in (torch.bfloat16, torch.float16)
    }
