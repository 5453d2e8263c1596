"""What a model says at its last states: a policy's next-token logits, a scorer's score."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rgtg.models.loading.tensor_parallel import agreed
from rgtg.models.scorers.reward_model import scalar_head, trunk

_plain: "WeakKeyDictionary[Any, bool]" = WeakKeyDictionary()


def policy_logits(model: Any, states: Tensor) -> Tensor:
    """Next-token logits (…, V) after final states (…, H), as the model's own forward makes them of its trunk's output.

    So a token tree can be read first, and only the node that was chosen pays for the product with the vocabulary.
    """
    logits: Tensor = model.get_output_embeddings()(states) if head_is_plain(model) else _forward_over(model, states)
    return agreed(model, logits)


def head_is_plain(model: Any) -> bool:
    """Whether a model's logits are its output embedding's product and nothing more (no cap, no scale)."""
    if model not in _plain:
        _plain[model] = _head_is_plain(model)
    return _plain[model]


def scorer_scores(model: Any, states: Tensor) -> Tensor:
    """Scalar head of a sequence-classification model: scores (…) of final states (…, H)."""
    scores: Tensor = scalar_head(model)(states)[..., 0]
    return agreed(model, scores)


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
