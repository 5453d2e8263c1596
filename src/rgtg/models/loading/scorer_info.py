"""rgtg.json, which describes a trained scorer; checks of model folders; and fingerprints of weights."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from rgtg.config.training import Objective as Objective
from rgtg.errors import DataError, ModelNotFoundError, UsageError
from rgtg.models.loading.hub import holds_only_pickles, local_folder
from rgtg.types.base import FORMAT_VERSION, Record
from rgtg.utils.files import write_text_synced

INFO_FILE = "rgtg.json"
HEAD_FILE = "head.safetensors"


class ScorerInfo(Record):
    """Contents of rgtg.json.

    Attributes:
        append_eos: whether finished completions ended with EOS in training.
        max_length: in tokens, of the texts in training.
        trunk: whose hidden states are scored: those of a model of its own (``separate``), of the frozen policy
            (``own``), or of the policy with a LoRA adapter (``shared``).
        head: ``scalar``, one score per text; ``state``, a head on the candidate's state; ``vocab``, a score for each
            next token. A ``vocab`` head on a ``separate`` trunk is a causal language model's output layer.
        layer: whose states a head on the policy scores.
        width: hidden size of that head.
        rank: size of its token table.
        base_casts: fingerprints that the base model's weights have in other dtypes.
        reference_fingerprint: of the scorer that weighted the training pairs, if one did.
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
        """Fingerprints of the base model's weights in every dtype that they may be loaded in."""
        return {self.base_fingerprint, *self.base_casts.values()}


def read_info(folder: str | Path) -> ScorerInfo | None:
    """Contents of rgtg.json in a folder or hub repository; None if there is no such file (a stock reward model).

    Raises:
        DataError: the file is not a valid description.
    """
    path = Path(local_folder(str(folder))) / INFO_FILE
    if not path.is_file():
        return None
    try:
        return ScorerInfo.model_validate_json(path.read_bytes())
    except (ValidationError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a valid scorer description: {error}") from error


def write_info(folder: str | Path, info: ScorerInfo) -> None:
    """Write rgtg.json, atomically and as the last file of a checkpoint: it marks the others as complete."""
    write_text_synced(Path(folder) / INFO_FILE, json.dumps(info.model_dump(), indent=2) + "\n")


def require_safe_weights(source: str) -> str:
    """The local folder of a model, after checking that its files are safe to load.

    Raises:
        ModelNotFoundError: no such folder or repository, or no model in it.
        UsageError: weights in a pickle format, which can run code when loaded; or a head, which is no model.
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
    """Check that an index of weights names only files in its own folder.

    Raises:
        UsageError: a path instead of a file name, or a damaged index.
    """
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        outside = sorted(name for name in names if Path(name).name != name or "\\" in name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{index} is damaged: it does not map weights to files") from error
    if outside:
        raise UsageError(f"{index} names {outside[0]!r}: weights must lie in the model's own folder")


def fingerprint_weights(model: Any, dtype: torch.dtype | None = None) -> str:
    """Short hash of a model's weights: names, shapes and evenly spaced values of every tensor.

    With ``dtype``, the hash that the same weights have when loaded in that dtype. A packed copy of a model stores the
    model's own hash in ``_rgtg_fingerprint``.
    """
    stored = getattr(model, "_rgtg_fingerprint", None)
    if isinstance(stored, str) and dtype is None:
        return stored
    digest = hashlib.sha256()
    for name, tensor in _full_weights(model):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)]
        if dtype is not None and sample.is_floating_point():
            sample = sample.to(dtype)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _full_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The name and full tensor of each weight, sorted by name. Weights on the disk are read one at a time.

    If the model is sharded, all ranks must iterate, because each contributes its shard.
    """
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.device.type == "meta":
            module, _, leaf = name.rpartition(".")
            yield name, model.get_submodule(module)._hf_hook.weights_map[leaf]
        else:
            yield name, tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def cast_fingerprints(model: Any) -> dict[str, str]:
    """Fingerprints that the weights have when loaded in a 16-bit dtype, by its name."""
    return {
        str(dtype).removeprefix("torch."): fingerprint_weights(model, dtype)
        for dtype in (torch.bfloat16, torch.float16)
    }
