"""Load the frozen language model that is steered: weights, tokenizer, dtype, device."""

from dataclasses import dataclass
from typing import Any

import torch

from rgtg.errors import ModelNotFoundError, RgtgError, UsageError, first_line
from rgtg.models.loading.device_map import DeviceMap, Placement, finish_loading
from rgtg.models.loading.hub import EXPECTED, named
from rgtg.models.loading.scorer_info import require_safe_weights
from rgtg.models.loading.tensor_parallel import TpPlan, require_divisible

DTYPES: dict[str, torch.dtype | str] = {
    "auto": "auto",
    "float32": torch.float32, "fp32": torch.float32,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16,
}  # fmt: skip


@dataclass
class Policy:
    """A frozen causal language model with its tokenizer."""

    model: Any
    tokenizer: Any

    @property
    def max_length(self) -> int | None:
        """Longest sequence in tokens, or None where the model has no limit."""
        return context_length(self.model.config)


def context_length(config: Any) -> int | None:
    """Longest sequence a model's positions reach, in tokens; None where its config names no limit."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    return int(limit) if limit else None


def resolve_dtype(dtype: "str | torch.dtype | None") -> "torch.dtype | str":
    """A torch dtype from its name; None and ``auto`` keep the checkpoint's own.

    Raises:
        UsageError: an unknown name.
    """
    if dtype is None:
        return "auto"
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}; choose one of {', '.join(sorted(DTYPES))}")
    return DTYPES[dtype]


def load_pretrained(auto_class: Any, source: str, role: str, **kwargs: Any) -> Any:
    """``auto_class.from_pretrained`` with safe settings and errors that say what to do.

    Raises:
        ModelNotFoundError: the folder or hub id cannot be loaded.
        UsageError: a model that cannot be split among processes, where it is to be.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoConfig

    unusual = (SafetensorError, StrictDataclassError)  # of damaged weights and configs, with no base in common
    folder, split = require_safe_weights(source), kwargs.get("distributed_config")
    try:
        if split is not None:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            require_divisible(config, split.tp_plan, f"the {role} {source}")
        found = auto_class.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **kwargs)
    except RgtgError:
        raise
    except (OSError, ValueError, LookupError, TypeError, ImportError, RuntimeError, AssertionError, *unusual) as error:
        raise ModelNotFoundError(f"cannot load the {role} {source!r}: {first_line(error)}. {EXPECTED}") from error
    if folder != source:  # what is made from the model names the repository, not a cache
        model = found[0] if isinstance(found, tuple) else found
        model.name_or_path = source
    return found


def load_tokenizer(source: str, role: str) -> Any:
    """The tokenizer saved beside a model."""
    from transformers import AutoTokenizer

    return load_pretrained(AutoTokenizer, source, f"tokenizer of the {role}")


def load_policy(
    source: "str | Policy | tuple[Any, Any]",
    *,
    revision: str | None = None,
    dtype: "str | torch.dtype | None" = None,
    device: "str | torch.device | None" = None,
    device_map: DeviceMap | None = None,
    tp_plan: TpPlan | None = None,
) -> Policy:
    """Load a frozen policy from a folder or hub id, or wrap a (model, tokenizer) pair that is already loaded.

    A loaded model stays where it is and as it is: the arguments must then be None.

    Args:
        source: folder, hub id, or what is loaded.
        revision: branch, tag or commit of a hub repository; ``owner/name@revision`` says the same.
        dtype: default the checkpoint's own.
        device: default the first GPU, else the CPU.
        device_map: in place of ``device``: ``auto`` or a device for each module, over GPUs, memory and disk.
        tp_plan: in place of both: ``auto`` (or styles by module) splits each layer among the processes of a torchrun,
            all of which load the policy.

    Raises:
        ModelNotFoundError: nothing loadable at ``source``.
        UsageError: arguments given for a loaded model, a device beside a device map, a plan beside either or without
            torchrun or that does not fit, a revision of a folder, or weights that are missing.
        MissingExtraError: a device map without accelerate.
    """
    placement = Placement(dtype, device, device_map, tp_plan)
    if not isinstance(source, str):
        if placement != Placement() or revision is not None:
            raise UsageError(
                "dtype, device, device_map, tp_plan and revision are of a policy loaded by name; move a loaded model "
                "yourself"
            )
        policy = source if isinstance(source, Policy) else Policy(*source)
        policy.model.eval()
        return policy
    from transformers import AutoModelForCausalLM

    source = named(source, revision)
    model, report = load_pretrained(
        AutoModelForCausalLM, source, "policy",
        dtype=resolve_dtype(dtype), use_safetensors=True, output_loading_info=True, **placement.arguments(),
    )  # fmt: skip
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise UsageError(
            f"{source} is no whole language model ({missing} not in its weights, and would be drawn at random): is "
            "it a reward model, or was its saving cut off?"
        )
    finish_loading(model, placement)
    return Policy(model, load_tokenizer(source, "policy"))
