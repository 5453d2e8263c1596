"""Hidden states of a causal language model's layers, read in a forward pass."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from rgtg.errors import UsageError

_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm")
_EMBEDDINGS = ("drop", "emb_dropout", "embed_dropout")  # what adds positions to the token embeddings


def hidden_state_module(model: Any, layer: int) -> nn.Module:
    """The module of a causal LM whose forward output (or its first element) is ``hidden_states[layer]``.

    Raises:
        UsageError: a layer that the model has not, or a model built in a way that is not known here.
    """
    owner, layers = _stack(model)
    if not 0 <= layer <= len(layers):
        raise UsageError(f"layer {layer} is not one of this model's: 0 (embeddings) to {len(layers)} (final state)")
    if layer == len(layers):  # where no norm is known, the trunk itself: its first output is the final state
        return _child(owner, _FINAL_NORMS) or _module(model.base_model)
    if layer == 0:
        return _child(owner, _EMBEDDINGS) or _module(model.get_input_embeddings())
    return layers[layer - 1]


@contextmanager
def capture_hidden_states(model: Any, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """While the block runs, each forward leaves its states (B, T, H) of these layers in the dictionary; no others."""
    seen: dict[int, Tensor] = {}
    home = model.device  # a layer may be elsewhere

    def keep(layer: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            states = output if isinstance(output, Tensor) else output[0]
            seen[layer] = states.to(home)

        return hook

    handles = [hidden_state_module(model, layer).register_forward_hook(keep(layer)) for layer in dict.fromkeys(layers)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def hidden_states_of(
    model: Any, input_ids: Int[Tensor, "batch length"], attention_mask: Int[Tensor, "batch length"], layers: list[int]
) -> dict[int, Tensor]:
    """Hidden states (B, T, H) of the layers asked for, in one pass of the trunk: the language-model head is not run.

    Positions are counted from the mask, so padding may be on either side; states at padding are meaningless.
    """
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    with capture_hidden_states(model, layers) as seen:
        model.base_model(input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
    return dict(seen)


@torch.no_grad()
def require_hidden_states(model: Any, layers: Sequence[int]) -> None:
    """Try on three tokens that `hidden_state_module` finds what transformers calls these hidden states.

    That is what the next decoder layer is given, or the trunk returns. (Asking for ``output_hidden_states`` would leave
    transformers' hooks on every layer for good.)

    Raises:
        UsageError: it finds something else (a layer 0 that no module gives, or an unknown kind of model).
    """
    ids = torch.arange(3, device=model.device)[None] % model.config.get_text_config().vocab_size
    stack = _stack(model)[1]
    given: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            given[layer] = inputs[0] if inputs else named["hidden_states"]

        return hook

    handles = [module.register_forward_pre_hook(keep(i), with_kwargs=True) for i, module in enumerate(stack)]
    try:
        with capture_hidden_states(model, layers) as seen:
            given[len(stack)] = model.base_model(ids, use_cache=False)[0]
    finally:
        for handle in handles:
            handle.remove()
    for layer in layers:
        if not _same(seen.get(layer), given.get(layer)):
            raise UsageError(
                f"layer {layer} of {type(model).__name__} cannot be observed: no module gives that state; use another "
                f"layer (the final state is layer {len(stack)})"
            )


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and one.shape == other.shape and torch.equal(one, other)


def _stack(model: Any) -> tuple[nn.Module, nn.ModuleList]:
    """The decoder layers, and the module that owns them."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return module, child
    raise UsageError(f"{type(model).__name__} has no list of {count} layers; its states cannot be observed")


def _module(found: nn.Module) -> nn.Module:
    return found


def _child(owner: nn.Module, names: Sequence[str]) -> nn.Module | None:
    found = (getattr(owner, name, None) for name in names)
    return next((module for module in found if isinstance(module, nn.Module)), None)
