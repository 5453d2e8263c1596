"""Load the policy, the frozen language model that is steered: weights, tokenizer, dtype, device."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from rgtg.decoding.sampling import Vocabulary
from rgtg.errors import UsageError, first_line
from rgtg.models.loading.device_map import DeviceMap, Placement, finish_loading
from rgtg.models.loading.engine_choice import choose_engine, load_in_engine
from rgtg.models.loading.engine_model import EngineModel
from rgtg.models.loading.gguf import converted_folder, write_converted
from rgtg.models.loading.hub import with_revision
from rgtg.models.loading.pretrained import (
    find_gguf,
    load_pretrained,
    load_tokenizer,
    max_sequence_length,
    reads_ahead,
    resolve_dtype,
)
from rgtg.models.loading.tensor_parallel import TpPlan
from rgtg.tokenization.encoding import embedding_rows, ids_without_token


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
        dtype: by default that of the checkpoint; bf16 for a GGUF file, which is dequantised. On a CPU that cannot
            multiply it, float32 instead, if that takes at most half of the memory.
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
        MissingExtraError: an engine that is not installed.
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
            _require_causal(policy.model, "the loaded policy")
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
    _require_causal(model, source)
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
        loaded = load_policy(source, dtype="bfloat16", device="cpu", engine="torch")
        write_converted(path, loaded.model, loaded.tokenizer)


@torch.inference_mode()
def _require_causal(model: Any, source: str) -> None:
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
