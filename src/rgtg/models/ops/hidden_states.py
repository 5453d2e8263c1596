"""Hidden states of a causal language model's layers, captured in a forward pass.

Layers count as in transformers' ``hidden_states``: 0 is the embeddings, ``num_hidden_layers`` the last hidden state,
after the final norm.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from rgtg.errors import UsageError
from rgtg.models.loading.engine_model import EngineModel, ReadableModel
from rgtg.models.ops.lm_head import final_states, trunk

_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm")
_EMBEDDINGS = ("drop", "emb_dropout", "embed_dropout")  # modules that run after positions are added to the embeddings


def hidden_state_module(model: Any, layer: int) -> nn.Module:
    """The module of a causal LM whose forward output (or its first element) is ``hidden_states[layer]``.

    Raises:
        UsageError: the model does not have the layer, or its layers are not in a list.
    """
    owner, layers = _decoder_layers(model)
    if not 0 <= layer <= len(layers):
        raise UsageError(f"layer {layer} is not one of this model's: 0 (embeddings) to {len(layers)} (final state)")
    module: nn.Module
    if layer == len(layers):  # without a known final norm, the trunk itself: its first output is the final state
        module = _child(owner, _FINAL_NORMS) or trunk(model)
    elif layer == 0:
        module = _child(owner, _EMBEDDINGS) or model.get_input_embeddings()
    else:
        module = layers[layer - 1]
    return module


@contextmanager
def capture_hidden_states(model: Any, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Capture hidden states with forward hooks.

    While the block runs, each forward pass writes its states (B, T, H) of these layers into the dictionary, on the
    model's device. States of other layers are not kept.
    """
    captured: dict[int, Tensor] = {}
    device = model.device  # with a device map, a layer may be on another one

    def capture(layer: int, _module: nn.Module, _inputs: Any, output: Any) -> None:
        captured[layer] = (output if isinstance(output, Tensor) else output[0]).to(device)

    hooks = [hidden_state_module(model, i).register_forward_hook(partial(capture, i)) for i in dict.fromkeys(layers)]
    try:
        yield captured
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def hidden_states_of(
    model: Any, input_ids: Int[Tensor, "batch length"], attention_mask: Int[Tensor, "batch length"], layers: list[int]
) -> dict[int, Tensor]:
    """Hidden states (B, T, H) of several layers, in one pass of the trunk. The language-model head does not run.

    Rows may be padded on either side; states at padding have no meaning.
    """
    if isinstance(model, ReadableModel):
        return model.hidden_states(input_ids, attention_mask, layers)
    with capture_hidden_states(model, layers) as states:
        final_states(model, input_ids, attention_mask)
    return dict(states)


@torch.no_grad()
def require_hidden_states(model: Any, layers: Sequence[int]) -> None:
    """Check on three tokens that `capture_hidden_states` captures what transformers calls these hidden states.

    ``hidden_states[i]`` is the input of decoder layer i, and the last one is the trunk's output. (The check does not
    use ``output_hidden_states``, because that leaves transformers' own hooks on every layer.)

    Raises:
        UsageError: the captured states differ: layer 0 of a model in which no module outputs it, or an unknown model.
    """
    if isinstance(model, EngineModel):
        model.require_layers(layers)
        return
    ids = torch.arange(3, device=model.device)[None] % model.config.get_text_config().vocab_size
    stack = _decoder_layers(model)[1]
    expected: dict[int, Tensor] = {}

    def record(layer: int, _module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        expected[layer] = inputs[0] if inputs else named["hidden_states"]

    hooks = [module.register_forward_pre_hook(partial(record, i), with_kwargs=True) for i, module in enumerate(stack)]
    try:
        with capture_hidden_states(model, layers) as captured:
            expected[len(stack)] = trunk(model)(ids, use_cache=False)[0]
    finally:
        for hook in hooks:
            hook.remove()
    for layer in layers:
        if layer not in captured or layer not in expected or not torch.equal(captured[layer], expected[layer]):
            raise UsageError(
                f"layer {layer} of {type(model).__name__} cannot be observed: no module outputs that state; use "
                f"another layer (the final state is layer {len(stack)})"
            )


def _decoder_layers(model: Any) -> tuple[nn.Module, nn.ModuleList]:
    """The module that owns the decoder layers, and the layers."""
    count = model.config.get_text_config().num_hidden_layers
    for module in trunk(model).modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return module, child
    raise UsageError(f"{type(model).__name__} has no list of {count} layers; its states cannot be observed")


def _child(owner: nn.Module, names: Sequence[str]) -> nn.Module | None:
    children = (getattr(owner, name, None) for name in names)
    return next((child for child in children if isinstance(child, nn.Module)), None)
