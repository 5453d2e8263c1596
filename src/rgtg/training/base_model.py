"""The model a scorer starts from: a language model with a new scalar head, or a reward model trained further."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rgtg.config import LoraSettings
from rgtg.errors import MissingExtraError, UsageError
from rgtg.models.loading.lora_merge import is_adapter, load_merged, output_name, untie_output
from rgtg.models.loading.policy import load_pretrained, load_tokenizer, resolve_dtype
from rgtg.models.loading.scorer_info import read_info
from rgtg.models.ops.lm_head import scalar_head
from rgtg.models.scorers.reward_model import PrefixScorer, position_scores
from rgtg.tokenization.encoding import ensure_pad_token


def load_base(source: str, seed: int, **kwargs: Any) -> tuple[Any, Any]:
    """A sequence-classification model with one label, in fp32 unless ``dtype`` says otherwise, and its tokenizer.

    A language model gets a new head, drawn from ``seed`` alone; a reward model keeps its own (a LoRA scorer's is
    merged into its base). The tokenizer has a padding token that is not its EOS.

    Raises:
        ModelNotFoundError: nothing loadable at ``source``.
        UsageError: a classifier with several labels, or a model that no head can be put on.
    """
    dtype = resolve_dtype(kwargs.pop("dtype", "float32"))
    if is_adapter(source):
        scorer = PrefixScorer.from_pretrained(source, dtype=dtype, device="cpu")
        return scorer.model.requires_grad_(True), scorer.tokenizer
    from transformers import AutoModelForSequenceClassification

    tokenizer = load_tokenizer(source, "base model")
    _require_one_label(source)
    model, report = load_pretrained(
        AutoModelForSequenceClassification, source, "base model",
        dtype=dtype, num_labels=1, use_safetensors=True, output_loading_info=True, **kwargs,
    )  # fmt: skip
    ensure_pad_token(tokenizer, model)
    if any(key.startswith("score.") for key in report["missing_keys"]):
        init_head(model, seed)
    return model, tokenizer


def load_language_base(source: str, *, output_scale: float = 1.0, **kwargs: Any) -> tuple[Any, Any]:
    """A causal language model, in fp32 unless ``dtype`` says otherwise, and its tokenizer; LoRA adapters are merged.

    Args:
        source: a language model, or a scorer of next tokens that is trained further.
        output_scale: what its output layer starts as, times this; other than 1 gives it weights of its own where they
            are tied to the input embedding.
        kwargs: of ``from_pretrained``.

    Raises:
        ModelNotFoundError: nothing loadable at ``source``.
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
        raise UsageError(f"{source} is no whole language model ({missing} not in its weights): start from the policy")
    if output_scale != 1:
        untie_output(model, output_scale)
    return model, tokenizer


def init_head(model: Any, seed: int) -> None:
    """Draw the scalar head from N(0, initializer_range²) with a generator of its own: same seed, same head."""
    std = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in scalar_head(model).parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def require_causal(model: Any) -> None:
    """Refuse a reward model whose score of a prefix depends on what follows it, by trying.

    Raises:
        UsageError: the model pools before its head, or attends to later tokens.
    """
    if scalar_head(model) is None:
        raise UsageError(
            f"{type(model).__name__} pools before its head, so it cannot score every prefix in one pass; start from a "
            "causal (decoder) model, such as the policy itself"
        )
    _require_blind(model, lambda ids: position_scores(model, ids, torch.ones_like(ids)))


def require_causal_language_model(model: Any) -> None:
    """Refuse a language model whose logits depend on what follows, by trying.

    Raises:
        UsageError: the model attends to later tokens.
    """
    _require_blind(model, lambda ids: model(input_ids=ids, use_cache=False).logits)


@torch.no_grad()
def _require_blind(model: Any, read: Callable[[Tensor], Tensor]) -> None:
    """Refuse a model that looks ahead: one forward cannot train it."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 5, 7]], device=device) % model.config.get_text_config().vocab_size
    one, other = read(ids)[:, :3].float()
    model.train(was_training)
    if not torch.allclose(one, other, atol=1e-2, rtol=1e-2, equal_nan=True):
        raise UsageError(
            f"{type(model).__name__} looks ahead: its score of a prefix changes with the tokens after it; start from a "
            "causal (decoder) model"
        )


def require_padding(tokenizer: Any) -> None:
    """Give a language model's tokenizer some padding token, without growing its vocabulary: masks say what is read."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)


def lora_config(model: Any, settings: LoraSettings, *, own_output: bool = False, revision: str | None = None) -> Any:
    """Configuration for peft of a scorer: LoRA on the trunk, the reward head trained in full.

    A language model keeps its output layer as it is; with ``own_output`` (`untie_output`) it is trained in full.
    ``revision`` is of the base's hub repository.

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


def _require_one_label(source: str) -> None:
    from transformers import AutoConfig

    config = load_pretrained(AutoConfig, source, "base model")
    classifier = any("ForSequenceClassification" in name for name in config.architectures or [])
    if classifier and config.num_labels != 1:
        raise UsageError(f"{source} is a classifier with {config.num_labels} labels; a scorer gives one number")
