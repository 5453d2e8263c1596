"""The transformer below a model's head."""

from typing import Any


def trunk(model: Any) -> Any:
    """The transformer below the head, also of a model in a peft wrapper."""
    stock = without_peft(model)
    # Llama 4's prefix is that of its multimodal model, which is not there
    name = stock.base_model_prefix if hasattr(stock, stock.base_model_prefix) else "model"
    return getattr(stock, name)


def without_peft(model: Any) -> Any:
    """The model in a peft wrapper; other models as they are."""
    return getattr(model, "get_base_model", lambda: model)()
