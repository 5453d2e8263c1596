"""Which models take a 4-D attention mask, which windows their layers have, and when a probe of one has passed."""

from typing import Any

import torch
from torch import Tensor

from rgtg.models.ops.attention import SINGLE_QUERY_ATTENTION

_MASKED_LAYERS = {"full_attention", "sliding_attention"}


def mask_windows(config: Any) -> dict[str, int | None]:
    """Kinds of attention layers, each with its sliding window in tokens (None attends to everything)."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        return {"full_attention": window}
    return {kind: window if kind == "sliding_attention" else None for kind in dict.fromkeys(kinds)}


def takes_any_mask(model: Any) -> bool:
    """Whether a model's attention is computed by a function that takes any mask."""
    return model.config._attn_implementation in ("sdpa", "eager", SINGLE_QUERY_ATTENTION)


def has_maskable_layers(model: Any) -> bool:
    """Whether all layers are attention of a known kind, computed by a function that takes any mask.

    Flash and flex attention take none; such a model is set to ``sdpa``.
    """
    text = model.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or _MASKED_LAYERS)
    if getattr(model.config, "is_encoder_decoder", False) or not kinds <= _MASKED_LAYERS:
        return False
    if getattr(model, "_is_stateful", False) or not hasattr(text, "num_hidden_layers"):
        return False
    if not takes_any_mask(model):
        try:
            model.set_attn_implementation("sdpa")
        except (ValueError, ImportError, AttributeError):
            return False
    return True


def probe_agrees(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether outputs of a masked pass are those of plain passes: a model that ignores or misreads the mask differs.

    Args:
        found: of the masked pass, in fp32.
        expected: the same of plain passes.
        dtype: that the model computes in.
    """
    if not bool(expected.isfinite().all()):
        return True  # a broken model is no reason to read it slowly; what is not finite is refused later
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    scale = expected.abs().max().clamp(min=1e-3)
    return bool((found - expected).abs().max() <= tolerance * scale)
