"""Attention of one query in bf16 on a CPU: torch's kernel takes two in less than half the time of one."""

from typing import Any

import torch
from torch import Tensor

# Under this name transformers finds it; models whose attention is ``sdpa`` may have it instead.
NAME = "rgtg_one_query"


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Transformers' ``sdpa`` attention, a single query asked twice.

    One query goes through a matrix-vector product that widens every key and value by itself (240 µs for 12 heads of 190
    keys where two queries take 100). With grouped heads a single query is several already.

    Args:
        module: the attention layer.
        query: (B, heads, N, dim).
        key: (B, key heads, L, dim).
        value: (B, key heads, L, dim).
        attention_mask: (B, 1, N, L), additive.
        **kwargs: as transformers passes them.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if query.shape[2] > 1 or query.shape[1] != key.shape[1] or query.dtype != torch.bfloat16:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    twice = None if attention_mask is None else attention_mask.expand(-1, -1, 2, -1)
    # never causal: with a query at the last place both see all keys
    out, _ = sdpa_attention_forward(
        module, query.expand(-1, -1, 2, -1), key, value, twice, **kwargs | {"is_causal": False}
    )
    return out[:, :1], None


def use_on(model: Any) -> None:
    """Let a model attend so, where it attends with ``sdpa``; its config must be its own."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == "sdpa":
            config._attn_implementation = NAME
