"""Attention of one query in bf16 on a CPU: torch's kernel for fp32 is faster, even if it must be widened first."""

from typing import Any

import torch
from torch import Tensor

# Under this name transformers finds it; models whose attention is ``sdpa`` may have it instead.
NAME = "rgtg_one_query"
# Of keys and values in fp32: what a core's second and third cache hold, beside the weights that stream through them.
_CACHE_BYTES = 2**23


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Transformers' ``sdpa`` attention, with keys and values widened to fp32 for a single bf16 query.

    In bf16 one query goes through matrix-vector products that widen every key and value by themselves: 0.10 ms for 12
    heads of 160 keys, and 0.05 ms so; 6.4 and 1.5 ms for eight rows of 1100. Rows and heads are taken as many at a time
    as a cache holds widened. With grouped heads a single query is several already.

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
    kwargs |= {"is_causal": False}  # a query at the last place sees all keys
    out = query.new_empty(query.shape[0], 1, *query.shape[1::2])  # (B, 1, heads, dim)
    widened = 2 * key[0, 0].numel() * 4  # bytes of one head of one row
    for rows in _slices(query.shape[0], widened * query.shape[1]):
        mask = None if attention_mask is None else attention_mask[rows].float()
        for heads in _slices(query.shape[1], widened):
            part = (tensor[rows, heads].float() for tensor in (query, key, value))
            out[rows, :, heads] = sdpa_attention_forward(module, *part, mask, **kwargs)[0]
    return out, None


def _slices(count: int, nbytes: int) -> list[slice]:
    """So many things, each of so many bytes, in slices that a cache holds, each of one thing or more."""
    size = max(1, _CACHE_BYTES // max(nbytes, 1))
    return [slice(start, start + size) for start in range(0, count, size)]


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
