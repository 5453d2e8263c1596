"""Which models take a 4-D attention mask, and which windows their layers have."""

from typing import Any

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
    if model.config._attn_implementation not in ("sdpa", "eager", SINGLE_QUERY_ATTENTION):
        try:
            model.set_attn_implementation("sdpa")
        except (ValueError, ImportError, AttributeError):
            return False
    return True
