"""Loads the server's scorers into a vLLM worker, and checks that they and the engine fit each other."""

from typing import Any

import torch

from rgtg.engines.vllm.guide import TorchHead
from rgtg.engines.vllm.scorer_file import scorers_of_server
from rgtg.engines.vllm.states import registered
from rgtg.errors import UsageError
from rgtg.models.loading.hub import with_revision
from rgtg.models.scorers.head_file import HeadFile, read_head
from rgtg.tokenization.encoding import tokenizer_hash
from rgtg.tokenization.vocabulary import ids_without_token


def require_engine(vllm_config: Any) -> None:
    """Check that guidance works with an engine's settings.

    Raises:
        UsageError: the plug-in is switched off, or a setting under which a row's states are not those of its logits.
    """
    if not registered():
        raise UsageError("vLLM did not load the plug-in rgtg: add rgtg to VLLM_PLUGINS, or leave that variable out")
    if vllm_config.lora_config is not None:
        raise UsageError(
            "guidance and --enable-lora exclude each other: an adapter changes the states that a head was trained on, "
            "and replaces the layer that they are read from"
        )
    if getattr(vllm_config.parallel_config, "enable_batch_sharded_sampling", False):
        raise UsageError("guidance needs the logits of whole batches: leave --enable-batch-sharded-sampling out")


def load_heads(vllm_config: Any, device: Any) -> dict[str, TorchHead]:
    """The heads among the server's scorers, on a device, each checked against the policy that vLLM serves.

    Raises:
        UsageError: a head that reads other states than the final ones, or was trained on another policy.
        DataError: damaged files.
    """
    heads = {}
    for name, scorer in scorers_of_server().items():
        if scorer.on_policy_states:
            head = read_head(scorer.folder)
            require_policy(vllm_config.model_config, head)
            heads[name] = TorchHead(head, device)
        else:
            raise UsageError(f"{name} ({scorer.folder}) is a model of its own; vLLM is guided by heads so far")
    return heads


def require_policy(model_config: Any, head: HeadFile) -> None:
    """Check that a head was trained on the policy that vLLM serves: its files, sizes and tokenizer.

    Raises:
        UsageError: it was trained on another policy, or reads states that vLLM does not give.
        TokenizerMismatchError: another tokenizer.
    """
    head.require_vocabulary_of_final_states("vLLM")
    head.require_policy_files(with_revision(model_config.model, model_config.revision))
    found = {
        "hidden": model_config.get_hidden_size(),
        "vocabulary": model_config.get_vocab_size(),
        "policy_layers": model_config.hf_text_config.num_hidden_layers,
    }
    for field, size in found.items():
        if getattr(head.info, field) != size:
            raise UsageError(
                f"{head.folder}: {field} is {getattr(head.info, field)}, and the served policy's is {size}"
            )
    if not model_config.skip_tokenizer_init:
        head.require_tokenizer(tokenizer_hash(_tokenizer(model_config)))


def padding_ids(model_config: Any, device: Any) -> torch.Tensor | None:
    """Ids (P,) of the policy's output layer without a token, which are no candidates; None if there are none."""
    if model_config.skip_tokenizer_init:
        return None
    rows = model_config.get_vocab_size()
    size, missing = ids_without_token(_tokenizer(model_config), rows)
    ids = [*missing, *range(size, rows)]
    return torch.tensor(ids, device=device) if ids else None


def _tokenizer(model_config: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        model_config.tokenizer, revision=model_config.tokenizer_revision, trust_remote_code=False
    )
