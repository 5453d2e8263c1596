"""What is trained, before training: a reward model, a language model, a LoRA, or a head on the policy's states."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rgtg.config import LoraSettings
from rgtg.errors import MissingExtraError, UsageError
from rgtg.models.loading.lora_merge import is_adapter, load_merged, output_name, untie_output
from rgtg.models.loading.policy import load_pretrained, load_tokenizer, resolve_dtype
from rgtg.models.loading.scorer_info import read_info
from rgtg.models.ops.lm_head import scalar_head
from rgtg.models.scorers.heads import Head, StateHead, VocabularyHead
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.tokenization.encoding import ensure_pad_token


def load_base(source: str, seed: int, **kwargs: Any) -> tuple[Any, Any]:
    """Load a sequence-classification model with one label, in fp32 unless ``dtype`` is given, and its tokenizer.

    A language model gets a new head, drawn from ``seed`` alone. A reward model keeps its head (a LoRA scorer is merged
    into its base). The tokenizer has a padding token that is not its EOS.

    Raises:
        ModelNotFoundError: ``source`` cannot be loaded.
        UsageError: a classifier with several labels, or a model without a classification head in transformers.
    """
    dtype = resolve_dtype(kwargs.pop("dtype", "float32"))
    if is_adapter(source):
        scorer = PrefixScorer.from_pretrained(source, dtype=dtype, device="cpu")
        return scorer.model.requires_grad_(True), scorer.tokenizer
    from transformers import AutoConfig, AutoModelForSequenceClassification

    tokenizer = load_tokenizer(source, "base model")
    config = load_pretrained(AutoConfig, source, "base model")
    classifier = any("ForSequenceClassification" in name for name in config.architectures or [])
    if classifier and config.num_labels != 1:
        raise UsageError(f"{source} is a classifier with {config.num_labels} labels; a scorer gives one number")
    model, report = load_pretrained(
        AutoModelForSequenceClassification, source, "base model",
        dtype=dtype, num_labels=1, use_safetensors=True, output_loading_info=True, **kwargs,
    )  # fmt: skip
    ensure_pad_token(tokenizer, model)
    if any(key.startswith("score.") for key in report["missing_keys"]):
        init_scalar_head(model, seed)
    return model, tokenizer


def init_scalar_head(model: Any, seed: int) -> None:
    """Draw the scalar head from N(0, initializer_range²) with a generator of its own: same seed, same head."""
    std = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in scalar_head(model).parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def load_language_base(source: str, *, output_scale: float = 1.0, **kwargs: Any) -> tuple[Any, Any]:
    """Load a causal language model, in fp32 unless ``dtype`` is given, and its tokenizer; LoRA adapters are merged.

    Args:
        source: a language model, or a scorer of next tokens that is trained further.
        output_scale: the output layer is multiplied by it. If it is not 1 and the layer is tied to the input embedding,
            the layer gets weights of its own.
        kwargs: of ``from_pretrained``.

    Raises:
        ModelNotFoundError: ``source`` cannot be loaded.
        UsageError: a reward model, which has no output layer over the vocabulary.
    """
    from transformers import AutoModelForCausalLM

    dtype = resolve_dtype(kwargs.pop("dtype", "float32"))
    info = read_info(source)
    if info is not None and info.head != "vocab":
        raise UsageError(
            f"{source} is a scorer with a {info.head} head; start from a language model, such as the policy"
        )
    tokenizer = load_tokenizer(source, "base model")
    if is_adapter(source):
        return load_merged(AutoModelForCausalLM, source, "base model", dtype=dtype).requires_grad_(True), tokenizer
    model, report = load_pretrained(
        AutoModelForCausalLM, source, "base model",
        dtype=dtype, use_safetensors=True, output_loading_info=True, **kwargs,
    )  # fmt: skip
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise UsageError(
            f"{source} is not a complete language model ({missing} not in its weights): start from the policy"
        )
    if output_scale != 1:
        untie_output(model, output_scale)
    return model, tokenizer


def lora_config(model: Any, settings: LoraSettings, *, own_output: bool = False, revision: str | None = None) -> Any:
    """Configuration for peft of a scorer: LoRA on the trunk, and the reward head trained in full.

    Args:
        model: with a scalar head, or a language model.
        settings: of the LoRA.
        own_output: train a language model's output layer in full (after `untie_output`); else it stays as it is.
        revision: of the base's hub repository.

    Raises:
        MissingExtraError: peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise MissingExtraError("LoRA needs peft: pip install 'rgtg[train]'") from error
    from transformers.pytorch_utils import Conv1D

    stored_transposed = any(isinstance(module, Conv1D) for module in model.modules())
    what: dict[str, Any] = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    if scalar_head(model) is None:
        what = {"task_type": "CAUSAL_LM", "modules_to_save": [output_name(model)] if own_output else None}
    return LoraConfig(**what, fan_in_fan_out=stored_transposed, revision=revision, **settings.model_dump())


def new_head(states: Float[Tensor, "positions hidden"], width: int, table: Tensor | None, seed: int) -> Head:
    """A new head that standardises ``states``; its weights depend on ``seed`` alone.

    Args:
        states: of training; the head stores their mean and deviation.
        width: of the hidden layer.
        table: initial token table (V, rank) of a vocabulary head; None makes a state head.
        seed: of the weights.
    """
    hidden = states.shape[-1]
    head: Head
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        if table is None:
            head = StateHead(hidden, width)
        else:
            head = VocabularyHead(hidden, width, table.shape[1], len(table))
            head.table.weight.copy_(table)
    head.mlp.mean, head.mlp.std = moments(states)
    return head


def moments(states: Float[Tensor, "positions hidden"]) -> tuple[Float[Tensor, " hidden"], Float[Tensor, " hidden"]]:
    """Mean and standard deviation of each dimension, in fp32; the deviation of a near-constant dimension is floored."""
    total = torch.zeros(states.shape[1], dtype=torch.float64)
    squares = total.clone()
    for chunk in torch.split(states, 65536):
        total += chunk.double().sum(0)
        squares += chunk.double().square().sum(0)
    mean = total / len(states)
    std = (squares / len(states) - mean.square()).clamp(min=0).sqrt()
    floor = 1e-3 * std.square().mean().sqrt() + 1e-12
    return mean.float(), std.clamp(min=floor).float()


def vocabulary_size(model: Any) -> int:
    """Rows of the policy's output embedding: every token it can propose."""
    return len(_output_embedding(model))


@torch.no_grad()
def starting_table(model: Any, rank: int, seed: int) -> Float[Tensor, "vocabulary rank"]:
    """The policy's output embedding along its ``rank`` principal directions, scaled to a deviation of 0.1.

    Tokens that are similar for the policy start with similar rows, so that a token that is rare in the pairs is scored
    like the tokens it resembles; with a random start, the held-out loss was higher. The directions come from a few
    steps of subspace iteration.
    """
    weight = _output_embedding(model)
    parts = torch.split(weight, 16384)  # so that a large table is never held in fp32 as a whole
    mean = torch.stack([rows.float().sum(0) for rows in parts]).sum(0) / len(weight)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(weight.shape[1], rank, generator=generator).to(weight.device)  # (H, rank)
    for _ in range(8):
        product = torch.zeros_like(basis)
        for rows in parts:
            centred = rows.float() - mean
            product += centred.T @ (centred @ basis)
        basis = torch.linalg.qr(product).Q
    table = torch.cat([(rows.float() - mean) @ basis for rows in parts]).cpu()
    return 0.1 * table / table.std().clamp(min=1e-12)


def _output_embedding(model: Any) -> Tensor:
    weight: Tensor = (model.get_output_embeddings() or model.get_input_embeddings()).weight
    return weight
