"""A scorer that is a LoRA adapter and a scalar head on the policy's own weights: one forward serves both.

A batch of two halves goes through the policy's trunk: the first half as it is, the second with the adapter's low-rank
terms added to its products. The base weights are read once for both.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor, nn

from rgtg.errors import DataError, UsageError
from rgtg.models.loading.hub import local_folder
from rgtg.models.loading.policy import Policy
from rgtg.models.loading.scorer_info import ScorerInfo, read_info
from rgtg.models.ops.packed_linear import can_pack, group_linears, grouped_linears, structural_copy
from rgtg.models.scorers.hidden_state_head import require_same_policy

ADAPTER_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
# What peft can add to a LoRA that the fused forward does not compute.
_PLAIN = {"use_dora": False, "bias": "none", "alpha_pattern": {}, "layer_replication": None, "lora_bias": False}


class SharedTrunkScorer:
    """A LoRA scorer joined with the policy it was trained on.

    Attributes:
        model: the policy's twin; in a batch of 2B rows the last B get the adapter.
        head: (…, H) states of adapted rows → (…) scores.
    """

    causal = True

    def __init__(self, policy: Policy, adapter: dict[str, tuple[Tensor, Tensor]], head: Tensor, **about: Any) -> None:
        """As ``from_pretrained``; ``adapter`` maps a layer's name to A (r, in) and B (out, r), the scale included."""
        self.model = copy_with_adapter(policy.model, adapter)
        self.tokenizer = policy.tokenizer
        self.weight = head.to(device=policy.model.device, dtype=policy.model.dtype)
        self.info: ScorerInfo | None = about.get("info")
        self.name: str = about.get("name", "scorer")
        self.max_length = policy.max_length
        self.append_eos = self.info.append_eos if self.info else False

    @classmethod
    def from_pretrained(cls, folder: str, policy: Policy) -> Self:
        """Read an adapter that ``rgtg train --trunk shared`` wrote, and join it with its policy.

        Raises:
            UsageError: another policy's adapter, or one with parts that the fused forward does not compute.
            DataError: files that are damaged.
        """
        info = read_info(folder)
        if info is None or info.trunk != "shared":
            raise UsageError(
                f"{folder} holds no adapter on its policy's trunk; make one with rgtg train --trunk shared"
            )
        require_same_policy(policy, info, folder)
        adapter, head = read_adapter(folder)
        return cls(policy, adapter, head, info=info, name=folder)

    def head(self, states: Tensor) -> Tensor:
        """Scores (…) of final states (…, H), fp32."""
        return nn.functional.linear(states, self.weight)[..., 0].float()


def read_adapter(folder: str) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """A peft LoRA with a scalar head: {layer: (A (r, in), B (out, r) times its scale)}, and the head (1, H).

    Raises:
        UsageError: an adapter that is more than a plain LoRA.
        DataError: files that are missing or damaged.
    """
    path = Path(local_folder(folder))
    try:
        config = dict(json.loads((path / CONFIG_FILE).read_text(encoding="utf-8")))
        alpha = float(config["lora_alpha"])
        with safe_open(path / ADAPTER_FILE, framework="pt") as file:
            tensors = {key.removeprefix(_PREFIX): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own, without a common base
        raise DataError(f"cannot read the LoRA scorer {folder}: {error}") from error
    odd = [name for name, plain in _PLAIN.items() if config.get(name) and config[name] != plain]
    if odd or config.get("peft_type") != "LORA":
        raise UsageError(
            f"{folder} is not a plain LoRA ({', '.join(odd) or config.get('peft_type')}); merge it instead"
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


def copy_with_adapter(model: Any, adapter: dict[str, tuple[Tensor, Tensor]]) -> Any:
    """The policy's twin whose linear layers add the adapter to the second half of the batch.

    Raises:
        UsageError: a layer of the adapter that the policy does not have.
    """
    twin = structural_copy(model) if grouped_linears(model) else group_linears(model, pack=can_pack(model))
    layers = grouped_linears(twin)
    unknown = sorted(set(adapter) - set(layers))
    if unknown:
        raise UsageError(f"the adapter changes {unknown[0]}, which {type(model).__name__} has not as a linear layer")
    members: dict[int, list[str]] = {}
    for name, layer in sorted(layers.items(), key=lambda item: item[1].index):
        members.setdefault(id(layer.group), []).append(name)
    with torch.inference_mode():
        for names in members.values():
            pairs = [adapter.get(name, (None, None)) for name in names]
            down, up = zip(*pairs, strict=True)
            layers[names[0]].group.adapt(_placed(down, model), _placed(up, model))
    return twin


def _placed(parts: Sequence[Tensor | None], model: Any) -> list[Tensor | None]:
    return [None if part is None else part.to(model.device, model.dtype) for part in parts]
