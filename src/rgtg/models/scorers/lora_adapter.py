"""A scorer that is a LoRA adapter and a scalar head on the policy's own weights: one forward pass serves both.

A batch of two halves goes through the policy's trunk: the first half is the policy, the second half has the adapter's
low-rank terms added to the linear layers. The base weights are read from memory once for both.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn

from rgtg.config.engines import require_carried
from rgtg.errors import DataError, UsageError
from rgtg.models.loading.hub import local_folder
from rgtg.models.loading.policy import Policy
from rgtg.models.loading.scorer_info import ScorerInfo, read_info
from rgtg.models.ops.packed_linear import can_pack, group_linears, grouped_linears, structural_copy
from rgtg.models.scorers.hidden_state_head import require_same_policy

_ADAPTER_FILE, _CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
# Options of a peft LoRA that the fused forward pass does not compute, with the values that leave them off.
_PLAIN = {"use_dora": False, "bias": "none", "alpha_pattern": {}, "layer_replication": None, "lora_bias": False}

# Name of a linear layer → A (rank, in) and B (out, rank), with the scale included in B.
Adapter = dict[str, tuple[Tensor, Tensor]]


class SharedTrunkScorer:
    """A LoRA scorer inside the policy that it was trained on.

    Attributes:
        model: a copy of the policy that shares its weights; in a batch of 2B rows, the last B get the adapter.
        weight: of the scalar head, (1, H).
    """

    causal = True

    def __init__(
        self,
        policy: Policy,
        adapter: Adapter,
        head: Float[Tensor, "1 hidden"],
        *,
        info: ScorerInfo | None = None,
        name: str = "scorer",
    ) -> None:
        self.model = copy_with_adapter(policy.model, adapter)
        self.tokenizer = policy.tokenizer
        self.weight = head.to(device=policy.model.device, dtype=policy.model.dtype)
        self.info, self.name = info, name
        self.max_length = policy.max_length
        self.append_eos = info.append_eos if info else False

    @classmethod
    def from_pretrained(cls, folder: str, policy: Policy) -> Self:
        """Load an adapter that ``rgtg train --trunk shared`` saved, into its policy.

        Raises:
            UsageError: an adapter of another policy, or with options that the fused forward pass does not compute.
            DataError: damaged files.
        """
        require_carried(policy.engine, "LoRA adapter on the policy")
        info = read_info(folder)
        if info is None or info.trunk != "shared":
            raise UsageError(
                f"{folder} holds no adapter on its policy's trunk; make one with rgtg train --trunk shared"
            )
        require_same_policy(policy, info, folder)
        adapter, head = read_adapter(folder)
        return cls(policy, adapter, head, info=info, name=folder)

    def head(self, states: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows"]:
        """Scores, fp32, of the adapter's final states."""
        return nn.functional.linear(states, self.weight)[..., 0].float()


def read_adapter(folder: str) -> tuple[Adapter, Float[Tensor, "1 hidden"]]:
    """A peft LoRA and its scalar head.

    Raises:
        UsageError: an adapter that is more than a plain LoRA.
        DataError: missing or damaged files.
    """
    path = Path(local_folder(folder))
    try:
        config = dict(json.loads((path / _CONFIG_FILE).read_text(encoding="utf-8")))
        alpha = float(config["lora_alpha"])
        with safe_open(path / _ADAPTER_FILE, framework="pt") as file:
            tensors = {key.removeprefix(_PREFIX): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors' errors have no common base class
        raise DataError(f"cannot read the LoRA scorer {folder}: {error}") from error
    options = [name for name, plain in _PLAIN.items() if config.get(name) and config[name] != plain]
    if options or config.get("peft_type") != "LORA":
        raise UsageError(
            f"{folder} is not a plain LoRA ({', '.join(options) or config.get('peft_type')}); merge it instead"
        )
    adapter = {}
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        name = key.removesuffix(".lora_A.weight")
        down, up = tensors.pop(key), tensors.pop(f"{name}.lora_B.weight")
        rank = down.shape[0]
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        adapter[name] = (down, up * scale)
    head = tensors.pop("score.weight", None)
    if head is None or head.shape[0] != 1 or tensors:
        raise UsageError(
            f"{folder} must hold LoRA layers and one scalar head (score), and has {sorted(tensors) or 'no head'}"
        )
    return adapter, head


def copy_with_adapter(model: Any, adapter: Adapter) -> Any:
    """A copy of the policy, with its weights shared, that adds the adapter to the second half of each batch.

    Raises:
        UsageError: the adapter changes a layer that the policy does not have.
    """
    copied = structural_copy(model) if grouped_linears(model) else group_linears(model, pack=can_pack(model))
    layers = grouped_linears(copied)
    if unknown := sorted(set(adapter) - set(layers)):
        raise UsageError(f"the adapter changes {unknown[0]}, which is not a linear layer of {type(model).__name__}")
    names_of: dict[int, list[str]] = {}
    for name, layer in sorted(layers.items(), key=lambda item: item[1].index):
        names_of.setdefault(id(layer.group), []).append(name)
    with torch.inference_mode():
        for names in names_of.values():
            down, up = zip(*(adapter.get(name, (None, None)) for name in names), strict=True)
            layers[names[0]].group.adapt(_to_model(down, model), _to_model(up, model))
    return copied


def _to_model(parts: Sequence[Tensor | None], model: Any) -> list[Tensor | None]:
    return [None if part is None else part.to(model.device, model.dtype) for part in parts]
