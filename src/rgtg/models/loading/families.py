"""Which families of models can be a policy, a reward model or a base: checks that say what to do about the others."""

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rgtg.errors import ModelNotFoundError, UsageError, first_line
from rgtg.models.loading.hub import EXPECTED

# What a language model can do instead of having a reward model of its family.
OTHER_WAYS = (
    "train a head on the policy's own states (rgtg train --trunk own --head vocab, or state), train a scorer of next "
    "tokens (--objective farma, or autoregressive), or start from a model of another family (--base)"
)


def require_family(auto_class: Any, config: Any, source: str, role: str) -> None:
    """Check that transformers has a class of this kind for a model's family.

    Args:
        auto_class: ``AutoModelForCausalLM`` or ``AutoModelForSequenceClassification``.
        config: of the model.
        source: its folder or hub id.
        role: of the model, for errors.

    Raises:
        UsageError: it has none, or the model is an encoder-decoder, of which it would load a part.
    """
    is_language_model = auto_class.__name__ == "AutoModelForCausalLM"
    if is_language_model and getattr(config, "is_encoder_decoder", False):
        raise UsageError(
            f"{source} is an encoder-decoder ({config.model_type}): the {role} has to be a causal language model, "
            "which continues its prompt"
        )
    if type(config) in auto_class._model_mapping:
        return
    if is_language_model:
        raise UsageError(
            f"{source} is a {config.model_type} model, which does not continue text: the {role} has to be a causal "
            "language model (AutoModelForCausalLM of transformers)"
        )
    if role == "scorer":
        raise UsageError(
            f"{source} is a {config.model_type} model, a family without a reward model (sequence-classification) class "
            "in transformers: use it by its log-probabilities (--method genarm, "
            f'load_scorer(..., kind="autoregressive")), or {OTHER_WAYS}'
        )
    raise UsageError(
        f"transformers has no reward model (sequence-classification) class for the family of {source} "
        f"({config.model_type}): {OTHER_WAYS}"
    )


def reads_ahead(outputs: Float[Tensor, "texts length *features"]) -> bool:
    """Whether a model's outputs at a position depend on later tokens; False if they are not numbers.

    Args:
        outputs: logits or scores of two texts that differ in their last token only.
    """
    one, other = outputs[:, :-1].float()
    scale = (outputs.float() - outputs.float().mean()).abs().max()
    # rounding differs where a layer mixes the rows, as experts do
    tolerance = 1e-3 if outputs.dtype == torch.float32 else 3e-2
    return bool((one - other).abs().max() > tolerance * scale)


@torch.inference_mode()
def require_causal_policy(model: Any, source: str) -> None:
    """Check on two short texts that a language model reads no later tokens and that its logits have a vocabulary.

    Raises:
        UsageError: the logits of a prefix change with the tokens after it, as those of encoders do.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 5, 7]], device=model.device) % rows
    try:
        logits = model(input_ids=ids, use_cache=False).logits  # (2, 4, V)
    except (AttributeError, TypeError, ValueError, LookupError, RuntimeError, NotImplementedError) as error:
        raise UsageError(
            f"{source} ({type(model).__name__}) cannot read a text on its own ({first_line(error)}): the policy has to "
            "be a causal language model of texts"
        ) from error
    if reads_ahead(logits):
        raise UsageError(
            f"{source} ({type(model).__name__}) does not continue text, because it also reads the tokens after a "
            "position: it is an encoder; the policy has to be a causal language model"
        )


def require_dense(model: Any, source: str, role: str) -> None:
    """Check that a model's weights can be changed: trained, or merged with an adapter.

    Raises:
        UsageError: they are quantised.
    """
    method = getattr(model, "quantization_method", None)
    if method is not None:
        raise UsageError(
            f"{source} is quantised ({getattr(method, 'value', method)}), and the {role} has to be trained or merged: "
            "start from the checkpoint that it was made from, or train a head on its states (rgtg train --trunk own "
            "--head vocab, or state)"
        )


def explain(error: Exception, source: str, role: str) -> ModelNotFoundError:
    """One line that says why transformers cannot load a model, and what to do.

    Args:
        error: whatever ``from_pretrained`` raised.
        source: folder, file or hub id.
        role: of the model.
    """
    reason, advice = first_line(error), EXPECTED
    if "ignore_mismatched_sizes" in str(error):  # transformers logs the names, and raises this hint at its setting
        reason = "the sizes of its weights are not those that its config gives"
    elif "trust_remote_code" in str(error) or "contains custom code" in reason:
        reason = "it needs code of its own (auto_map in its config.json), which is never run"
        advice = "Use a model whose family transformers knows."
    elif "does not recognize this architecture" in reason:
        import transformers

        family = reason.partition("`")[2].partition("`")[0]
        reason = f"transformers {transformers.__version__} does not know the family {family}"
        advice = "Update transformers, or use a model of another family."
    elif isinstance(error, ImportError):
        advice = "Install it in this environment."
    elif isinstance(error, AttributeError) and "torch" in reason and "dtype" not in reason:
        reason = f"its config names a dtype that torch does not have ({reason})"
    elif missing := _missing_shard(source):
        reason = f"{missing}, which its index of weights names, is missing"
        advice = "Download the model again."
    return ModelNotFoundError(f"cannot load the {role} {source!r}: {reason}. {advice}")


def _missing_shard(source: str) -> str | None:
    for index in Path(source).glob("*.safetensors.index.json"):
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        return next((name for name in sorted(names) if not (index.parent / name).is_file()), None)
    return None
