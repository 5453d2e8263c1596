"""Load a LoRA adapter as a whole model: merged into the weights of its base."""

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from rgtg.errors import DataError, MissingExtraError, ModelNotFoundError, UsageError, first_line
from rgtg.models.loading.device_map import is_on_one_device
from rgtg.models.loading.hub import with_revision
from rgtg.models.loading.pretrained import load_pretrained, require_dense, require_safe_weights
from rgtg.tokenization.encoding import ensure_pad_token


def load_merged(auto_class: Any, source: str, role: str, tokenizer: Any = None, **kwargs: Any) -> Any:
    """The base model of an adapter folder, with the adapter (and layers trained in full) merged into its weights.

    Args:
        auto_class: of transformers, for the base model.
        source: the adapter's folder or hub id.
        role: of the model, for errors: "scorer" or "base model".
        tokenizer: if given, it gets a padding token, and the base model a row for it, as in training.
        **kwargs: of ``from_pretrained``.

    Raises:
        MissingExtraError: peft is not installed.
        ModelNotFoundError: the base model cannot be loaded.
        UsageError: another kind of adapter, one in a pickle, or a base that is quantised or not on one device.
        DataError: a damaged adapter, or one that does not fit its base.
    """
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise MissingExtraError(f"{source} is a LoRA adapter and needs peft: pip install 'rgtg[train]'") from error
    folder = require_safe_weights(source)
    config = _read_config(PeftConfig, folder, source)
    base = config.base_model_name_or_path
    base = base if Path(base).exists() else with_revision(base, config.revision)
    try:
        model = load_pretrained(auto_class, base, f"{role}'s base", use_safetensors=True, **kwargs)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"{source} is a LoRA adapter of {base}, which cannot be loaded ({error}). If the base model has moved, "
            f'write its new place as "base_model_name_or_path" into {Path(source) / "adapter_config.json"}'
        ) from error
    if not is_on_one_device(model):
        raise UsageError(
            f"{source} is a LoRA adapter, which can only be merged into a base model on one device: load it without "
            "device_map or tp_plan, save the merged model, and use device_map or tp_plan with that"
        )
    require_dense(model, base, f"{role}'s base")
    if tokenizer is not None:
        ensure_pad_token(tokenizer, model)
    if output_name(model) in (getattr(config, "modules_to_save", None) or []):
        untie_output(model)
    with warnings.catch_warnings():
        # peft uses an attribute that transformers has renamed; users cannot do anything about it
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        try:
            return PeftModel.from_pretrained(model, folder, use_safetensors=True).merge_and_unload()
        except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as error:
            raise DataError(
                f"the LoRA adapter {source} does not fit {base}, or is damaged: {first_line(error)}"
            ) from error


def _read_config(kind: Any, folder: str, source: str) -> Any:
    """The configuration of a LoRA adapter that names its base model.

    Raises:
        DataError: it is damaged, or names no base model.
        UsageError: it describes another kind of adapter.
    """
    try:
        config = kind.from_pretrained(folder)
        peft_type, base = str(getattr(config.peft_type, "value", config.peft_type)), config.base_model_name_or_path
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"the adapter_config.json of {source} is damaged, or not of a LoRA: {first_line(error)}"
        ) from error
    if peft_type != "LORA":
        raise UsageError(f"{source} is an adapter of the kind {peft_type}; expected a LoRA")
    if not isinstance(base, str):
        raise DataError(f"the adapter_config.json of {source} names no base model (base_model_name_or_path)")
    return config


def output_name(model: Any) -> str | None:
    """Name of a language model's output layer in its parent module; None for a model without one."""
    head = model.get_output_embeddings()
    return next((name.rpartition(".")[2] for name, module in model.named_modules() if module is head), None)


@torch.no_grad()
def untie_output(model: Any, scale: float = 1.0) -> None:
    """Untie a language model's output layer from its embedding, in place, and multiply its weights by ``scale``."""
    model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight * scale)
    if getattr(head, "bias", None) is not None:
        head.bias = torch.nn.Parameter(head.bias * scale)
