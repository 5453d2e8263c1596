"""Load the policy, the frozen language model that is steered: weights, tokenizer, dtype, device."""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from rgtg.decoding.sampling import Vocabulary
from rgtg.errors import RgtgError, UsageError
from rgtg.models.loading.device_map import DeviceMap, Placement, finish_loading
from rgtg.models.loading.engine_choice import choose_engine, load_in_engine
from rgtg.models.loading.engine_model import EngineModel
from rgtg.models.loading.families import explain, require_causal_policy, require_family
from rgtg.models.loading.gguf import as_dense, converted_folder, find_gguf, gguf_arguments, write_converted
from rgtg.models.loading.hub import with_revision
from rgtg.models.loading.scorer_info import require_safe_weights
from rgtg.models.loading.tensor_parallel import TpPlan, require_divisible
from rgtg.tokenization.encoding import embedding_rows, ids_without_token

DTYPES: dict[str, torch.dtype | str] = {
    "auto": "auto",
    "float32": torch.float32, "fp32": torch.float32,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16,
}  # fmt: skip


@dataclass
class Policy:
    """A frozen causal language model with its tokenizer; ``model`` is an `EngineModel` if another engine runs it."""

    model: Any
    tokenizer: Any

    @property
    def engine(self) -> str:
        """What runs it: ``torch``, or another row of `rgtg.config.engines.ENGINES`."""
        return self.model.engine if isinstance(self.model, EngineModel) else "torch"

    @cached_property
    def max_length(self) -> int | None:
        """Longest sequence in tokens; None if the model has no limit."""
        return max_sequence_length(self.model)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokens that it can write: ids with a token and an embedding."""
        return Vocabulary(*ids_without_token(self.tokenizer, embedding_rows(self.model)))


def max_sequence_length(model: Any) -> int | None:
    """Longest sequence that a model reads, in tokens; None if it has no limit.

    Positions of RoBERTa and its relatives (XLM-R, CamemBERT, Longformer, MPNet …) begin after the padding token's id:
    512 of the 514 that their configs name are usable. Their tables of positions say so by a padding index.
    """
    limits = [context_length(model.config)]
    for module in model.modules() if isinstance(model, torch.nn.Module) else ():
        table: Any = getattr(module, "position_embeddings", None)
        padding = getattr(table, "padding_idx", None)
        # LXMERT's table has a padding index too, and its positions begin at 0; it has no id of its own for that
        if padding is not None and getattr(module, "padding_idx", None) == padding:
            limits.append(int(table.weight.shape[0]) - int(padding) - 1)
    known = [limit for limit in limits if limit is not None]
    return min(known, default=None)


def context_length(config: Any) -> int | None:
    """Number of positions that a config names; None if it names none. See ``max_sequence_length`` for a model's."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    return int(limit) if limit and limit > 0 else None  # XLNet's −1 is no limit


def resolve_dtype(dtype: "str | torch.dtype | None") -> "torch.dtype | str":
    """A torch dtype from its name; None and ``auto`` mean the dtype of the checkpoint.

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
    """``auto_class.from_pretrained`` with safe settings, and errors that say what to do.

    Raises:
        ModelNotFoundError: the folder or hub id cannot be loaded.
        UsageError: a model that cannot be sharded as requested, or of a family that cannot have this role.
    """
    from transformers import AutoConfig

    sharding = kwargs.get("distributed_config")
    if sharding is not None:
        config = load_pretrained(AutoConfig, source, role)
        require_divisible(config, sharding.tp_plan, f"the {role} {source}")
    gguf = find_gguf(source)
    located = (
        nullcontext((require_safe_weights(source), kwargs))
        if gguf is None
        else gguf_arguments(gguf, auto_class, kwargs)
    )
    with located as (folder, kwargs):
        try:
            if hasattr(auto_class, "_model_mapping") and (gguf or (Path(folder) / "config.json").is_file()):
                of_file = {"gguf_file": kwargs["gguf_file"]} if "gguf_file" in kwargs else {}
                config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **of_file)
                require_family(auto_class, config, source, role)
            loaded = auto_class.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **kwargs)
        except RgtgError:
            raise
        except Exception as error:  # a damaged checkpoint can lead to any of them
            raise explain(error, source, role) from error
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    if folder != source:  # later files name the repository or the file, not a folder of a cache
        model.name_or_path = source
    if gguf is not None and isinstance(model, torch.nn.Module):
        as_dense(model)
    return loaded


def load_tokenizer(source: str, role: str) -> Any:
    """The tokenizer of a model's folder or hub repository."""
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
    cache_gguf: bool = False,
    engine: str | None = "torch",
) -> Policy:
    """Load a frozen policy from a folder, GGUF file or hub id, or wrap a loaded (model, tokenizer) pair.

    A loaded model is not moved or converted; the other arguments must then be None.

    Args:
        source: folder, GGUF file, hub id, loaded policy, or (model, tokenizer) pair.
        revision: branch, tag or commit of a hub repository; ``owner/name@revision`` means the same.
        dtype: by default that of the checkpoint; bf16 for a GGUF file, which is dequantised.
        device: by default the first GPU, or the CPU if there is none.
        device_map: instead of ``device``: ``auto``, or a device for each module, over GPUs, memory and disk.
        tp_plan: instead of both: ``auto`` (or styles by module) shards each layer among the processes of a torchrun,
            all of which load the policy.
        cache_gguf: keep the conversion of a GGUF file in a folder beside it, FILE.gguf.bf16. Wherever the file is
            loaded in bf16 later, the folder is used instead, as long as the file does not change.
        engine: that runs it: ``torch``; ``llama-cpp`` for a GGUF file; None or ``auto`` for llama.cpp where it is
            installed and runs the file.

    Raises:
        ModelNotFoundError: nothing loadable at ``source``.
        UsageError: a model that reads later tokens; arguments for a loaded model; more than one of device, device_map
            and tp_plan; a tp_plan without torchrun, or one that does not fit; a revision of a folder; missing weights;
            cache_gguf for another kind of model, in another dtype, or with tp_plan; or an engine that does not run this
            model.
        OutputError: the conversion cannot be written.
        MissingExtraError: a device_map without accelerate, or an engine that is not installed.
    """
    from transformers import AutoModelForCausalLM, PreTrainedModel

    placement = Placement(dtype, device, device_map, tp_plan)
    if not isinstance(source, str):
        if placement != Placement() or revision is not None or cache_gguf:
            raise UsageError(
                "dtype, device, device_map, tp_plan, cache_gguf and revision apply to a policy loaded by name; move a "
                "loaded model yourself"
            )
        if isinstance(source, Policy):
            source.model.eval()
            return source
        policy = Policy(*source)
        policy.model.eval()
        if isinstance(policy.model, PreTrainedModel):
            require_causal_policy(policy.model, "the loaded policy")
        return policy

    source = with_revision(source, revision)
    if (chosen := choose_engine(source, engine, placement, cache_gguf=cache_gguf)) != "torch":
        return load_in_engine(chosen, source, device=device)  # type: ignore[no-any-return]
    if cache_gguf:
        _cache_gguf(source, placement)
    model, report = load_pretrained(
        AutoModelForCausalLM, source, "policy",
        dtype=resolve_dtype(dtype), use_safetensors=True, output_loading_info=True, **placement.load_kwargs(),
    )  # fmt: skip
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise UsageError(
            f"{source} is not a complete language model ({missing} not in its weights, and would be random): is it a "
            "reward model, or was saving it interrupted?"
        )
    finish_loading(model, placement)
    require_causal_policy(model, source)
    return Policy(model, load_tokenizer(source, "policy"))


def _cache_gguf(source: str, placement: Placement) -> None:
    """Convert a GGUF file and keep the result beside it, unless that has been done."""
    path = find_gguf(source)
    if path is None:
        raise UsageError(f"cache_gguf: {source} is not a GGUF file, and loads as it is; leave cache_gguf out")
    if resolve_dtype(placement.dtype) not in ("auto", torch.bfloat16):
        raise UsageError(f"cache_gguf keeps bf16 weights, and dtype is {placement.dtype}: leave one of the two out")
    if placement.tp_plan is not None:
        raise UsageError("cache_gguf: convert the file first in one process, without tp_plan")
    if converted_folder(path) is None:
        loaded = load_policy(source, device="cpu", engine="torch")
        write_converted(path, loaded.model, loaded.tokenizer)
