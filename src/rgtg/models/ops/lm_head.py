"""A model's trunk, and its heads applied to final states: next-token logits of a policy, scores of a reward model."""

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rgtg.models.loading.tensor_parallel import broadcast_from_rank0, is_tensor_parallel
from rgtg.tokenization.padding import position_ids

# Modules of encoders' classification heads; decoder families call their head ``score``.
_ENCODER_HEADS = ("classifier", "pooler", "pre_classifier", "classification_head", "dropout")
_is_linear: "WeakKeyDictionary[Any, bool]" = WeakKeyDictionary()


def trunk(model: Any) -> Any:
    """The transformer below the head, also of a model in a peft wrapper."""
    stock = without_peft(model)
    # Llama 4's prefix is that of its multimodal model, which is not there
    name = stock.base_model_prefix if hasattr(stock, stock.base_model_prefix) else "model"
    return getattr(stock, name)


def without_peft(model: Any) -> Any:
    """The model in a peft wrapper; other models as they are."""
    return getattr(model, "get_base_model", lambda: model)()


def scalar_head(model: Any) -> Any:
    """The linear head that turns a state into a score, or None if the model does not score every position.

    Decoder families call it ``score``. Encoders pool the states first and have no such head.
    """
    head = getattr(without_peft(model), "score", None)
    return head if isinstance(head, torch.nn.Module) else None


def is_head_weight(name: str) -> bool:
    """Whether a weight of a sequence-classification model belongs to its head, judged by its name."""
    return "score" in name or any(head in name for head in _ENCODER_HEADS)


def final_states(
    model: Any, input_ids: Int[Tensor, "batch length"], attention_mask: Int[Tensor, "batch length"]
) -> Float[Tensor, "batch length hidden"]:
    """Final hidden states of padded sequences. Rows may be padded on either side; states at padding have no meaning."""
    output = trunk(model)(
        input_ids, attention_mask=attention_mask, position_ids=position_ids(attention_mask), use_cache=False
    )
    return output.last_hidden_state  # type: ignore[no-any-return]


def policy_logits(model: Any, states: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows vocabulary"]:
    """Next-token logits of final hidden states, exactly as the model's own forward computes them.

    This lets decoding run the trunk on a whole token tree, and the product with the vocabulary on the chosen node only.
    """
    logits = model.get_output_embeddings()(states) if head_is_linear(model) else _logits_by_forward(model, states)
    return broadcast_from_rank0(model, logits)


def head_is_linear(model: Any) -> bool:
    """Whether a model's logits are its output embedding's product alone, without soft-capping or scaling."""
    if model not in _is_linear:
        _is_linear[model] = _check_linear(model)
    return _is_linear[model]


def scorer_scores(model: Any, states: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows"]:
    """Scores of final hidden states: the scalar head of a sequence-classification model."""
    scores: Tensor = scalar_head(model)(states)[..., 0]
    return broadcast_from_rank0(model, scores)


def output_head(model: Any, head: Callable[[Any, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``policy_logits`` or ``scorer_scores`` of one model: torch's own modules alone, if those are all of it."""
    if not is_tensor_parallel(model):
        if head is policy_logits and head_is_linear(model):
            return model.get_output_embeddings()  # type: ignore[no-any-return]
        if head is scorer_scores and scalar_head(model) is not None:
            return torch.nn.Sequential(scalar_head(model), torch.nn.Flatten(-2))  # (…, H) → (…, 1) → (…)
    return partial(head, model)


@torch.inference_mode()
def _check_linear(model: Any) -> bool:
    """Compare the output embedding's product with the model's logits on four tokens, bit for bit."""
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


def _logits_by_forward(model: Any, states: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows vocabulary"]:
    """Applies the model's output head, including any scaling or soft-capping, to hidden states computed earlier.

    The model's own forward runs with its trunk replaced by a function that returns ``states``.
    """
    body = trunk(model)
    flat = states.reshape(1, -1, states.shape[-1])
    patched = vars(body).get("forward")  # set on the instance if accelerate wrapped it; normally only on the class
    body.forward = lambda *_args, **_kwargs: _TrunkOutput(flat)
    try:
        ids = torch.zeros(flat.shape[:2], dtype=torch.long, device=states.device)
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        del body.forward
        if patched is not None:
            body.forward = patched
    return logits.reshape(*states.shape[:-1], -1)  # type: ignore[no-any-return]


class _TrunkOutput:
    """What a model's forward reads of its trunk: the final states. What else it asks for (router logits) is None."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
