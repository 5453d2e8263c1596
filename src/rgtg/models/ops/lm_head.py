"""What a model says at its last states: a policy's next-token logits, a scorer's score."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rgtg.models.loading.tensor_parallel import broadcast_from_rank0

# Modules of encoders' classification heads; decoder families call their head ``score``.
_ENCODER_HEADS = ("classifier", "pooler", "pre_classifier", "classification_head", "dropout")
_plain: "WeakKeyDictionary[Any, bool]" = WeakKeyDictionary()


def scalar_head(model: Any) -> Any:
    """The linear head that turns a state into a score, or None where the model does not read every position.

    Decoder families call it ``score``; encoders pool first and have no such head.
    """
    stock = getattr(model, "get_base_model", lambda: model)()
    head = getattr(stock, "score", None)
    return head if isinstance(head, torch.nn.Module) else None


def trunk(model: Any) -> Any:
    """The transformer under the head (under a peft wrapper too)."""
    stock = getattr(model, "get_base_model", lambda: model)()
    return getattr(stock, stock.base_model_prefix)


def is_head_weight(name: str) -> bool:
    """Whether a weight of a sequence-classification model belongs to its head, going by its name."""
    return "score" in name or any(head in name for head in _ENCODER_HEADS)


def policy_logits(model: Any, states: Tensor) -> Tensor:
    """Next-token logits (…, V) after final states (…, H), as the model's own forward makes them of its trunk's output.

    So a token tree can be read first, and only the node that was chosen pays for the product with the vocabulary.
    """
    logits: Tensor = model.get_output_embeddings()(states) if head_is_linear(model) else _forward_over(model, states)
    return broadcast_from_rank0(model, logits)


def head_is_linear(model: Any) -> bool:
    """Whether a model's logits are its output embedding's product and nothing more (no cap, no scale)."""
    if model not in _plain:
        _plain[model] = _head_is_plain(model)
    return _plain[model]


def scorer_scores(model: Any, states: Tensor) -> Tensor:
    """Scalar head of a sequence-classification model: scores (…) of final states (…, H)."""
    scores: Tensor = scalar_head(model)(states)[..., 0]
    return broadcast_from_rank0(model, scores)


@torch.inference_mode()
def _head_is_plain(model: Any) -> bool:
    """Whether logits are the output embedding's product and nothing more (no cap, no scale): bit for bit on a trial."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.tensor([[(5 * i + 2) % vocabulary for i in range(4)]], device=model.device)
    head = model.get_output_embeddings()
    if head is None:
        return False
    try:
        states = trunk(model)(input_ids=ids, use_cache=False).last_hidden_state
        return bool(torch.equal(head(states), model(input_ids=ids, use_cache=False).logits))
    except (AttributeError, TypeError, RuntimeError):
        return False


def _forward_over(model: Any, states: Tensor) -> Tensor:
    """The model's own forward with its trunk standing still: whatever it does to the states, it does here."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    body = trunk(model)
    flat = states.reshape(1, -1, states.shape[-1])
    before = vars(body).get("forward")  # the class's own, unless accelerate has put one around it
    body.forward = lambda *_args, **_kwargs: BaseModelOutputWithPast(last_hidden_state=flat)
    try:
        ids = torch.zeros(flat.shape[:2], dtype=torch.long, device=states.device)
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        del body.forward
        if before is not None:
            body.forward = before
    return logits.reshape(*states.shape[:-1], -1)  # type: ignore[no-any-return]
