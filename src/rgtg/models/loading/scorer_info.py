"""rgtg.json, which describes a trained scorer; checks of model folders; and fingerprints of weights."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rgtg.models.loading.engine_model import EngineModel
from rgtg.models.scorers.head_file import read_info as read_info
from rgtg.types.scorer import HEAD_FILE as HEAD_FILE
from rgtg.types.scorer import INFO_FILE as INFO_FILE
from rgtg.types.scorer import ScorerInfo as ScorerInfo
from rgtg.utils.files import write_text_synced


def write_info(folder: str | Path, info: ScorerInfo) -> None:
    """Write rgtg.json, atomically and as the last file of a checkpoint: it marks the others as complete."""
    write_text_synced(Path(folder) / INFO_FILE, json.dumps(info.model_dump(), indent=2) + "\n")


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

    A quantised weight gives the tensors that it stores: integers and scales.

    If the model is sharded, all ranks must iterate, because each contributes its shard.
    """
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if tensor.device.type == "meta":
            module, _, leaf = name.rpartition(".")
            yield name, model.get_submodule(module)._hf_hook.weights_map[leaf]
        elif hasattr(tensor, "full_tensor"):
            yield name, tensor.full_tensor()
        else:
            yield from _stored_tensors(name, tensor)


def _stored_tensors(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """A plain tensor itself, or the tensors that a tensor subclass wraps."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from _stored_tensors(f"{name}.{part}", getattr(tensor, part))


def cast_fingerprints(model: Any) -> dict[str, str]:
    """Fingerprints that the weights have when loaded in a 16-bit dtype, by its name; none of another engine's model."""
    if isinstance(model, EngineModel):
        return {}
    return {
        str(dtype).removeprefix("torch."): fingerprint_weights(model, dtype)
        for dtype in (torch.bfloat16, torch.float16)
    }
