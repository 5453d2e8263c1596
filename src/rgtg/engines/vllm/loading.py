"""Loads the server's scorers into a vLLM worker, and checks that they and the engine fit each other."""

import functools
from typing import TYPE_CHECKING, Any

import torch

from rgtg.engines.vllm.guide import TorchHead
from rgtg.engines.vllm.scorer_file import scorers_of_server
from rgtg.engines.vllm.states import registered
from rgtg.errors import MissingExtraError, UsageError
from rgtg.models.loading.hub import with_revision
from rgtg.models.scorers.head_file import HeadFile, read_head
from rgtg.tokenization.encoding import ids_without_token, tokenizer_hash

if TYPE_CHECKING:
    from rgtg.engines.vllm.separate import SeparateScorer


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
    return heads


def load_separate(vllm_config: Any, device: Any) -> "dict[str, SeparateScorer]":
    """The server's scorers that are models of their own, on a device.

    Raises:
        UsageError: a scorer with another tokenizer or a shorter context than the policy's, or drafts.
        MissingExtraError: jaxtyping is not installed beside vLLM.
        ModelNotFoundError: it cannot be loaded.
    """
    sources = {name: one.folder for name, one in scorers_of_server().items() if not one.on_policy_states}
    if not sources:
        return {}
    if vllm_config.speculative_config is not None:
        raise UsageError(f"speculative decoding is guided by heads only, and {next(iter(sources))} is a model")
    try:
        from rgtg.decoding.loading import pack_separate
        from rgtg.engines.vllm.separate import SeparateScorer
        from rgtg.models.scorers.base import load_scorer
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"scorers that are models of their own need {error.name} in vLLM's environment: pip install {error.name}"
        ) from error
    model_config = vllm_config.model_config
    loaded = {}
    for name, source in sources.items():
        scorer = load_scorer(source, device=device)
        _require_scorer(model_config, scorer)
        packed = pack_separate(scorer) if torch.device(device).type == "cpu" else scorer
        loaded[name] = SeparateScorer(packed, model_config.get_vocab_size())
    return loaded


def _require_scorer(model_config: Any, scorer: Any) -> None:
    """Check that a separate scorer reads the policy's tokens, all of them, and texts as long as vLLM writes.

    Raises:
        UsageError: it does not.
    """
    if not scorer.causal:
        raise UsageError(f"{scorer.name} is an encoder, which reads whole texts; vLLM is guided by causal scorers")
    if model_config.skip_tokenizer_init:
        raise UsageError("--skip-tokenizer-init: a scorer that is a model of its own is checked against the tokenizer")
    tokenizer = _tokenizer(model_config)
    if tokenizer_hash(scorer.tokenizer) != tokenizer_hash(tokenizer):
        raise UsageError(
            f"{scorer.name} has another tokenizer than the policy, whose tokens it has to read in vLLM: train it "
            "from the policy's base model"
        )
    rows = len(scorer.model.get_input_embeddings().weight)
    if rows < ids_without_token(tokenizer, model_config.get_vocab_size())[0]:
        raise UsageError(f"{scorer.name} has embeddings for {rows} tokens, fewer than the tokenizer has")
    limit = scorer.max_length
    if limit is not None and limit < model_config.max_model_len:
        raise UsageError(
            f"{scorer.name} reads at most {limit} tokens, and vLLM writes up to {model_config.max_model_len}: give "
            f"--max-model-len {limit}"
        )


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
    return _load_tokenizer(model_config.tokenizer, model_config.tokenizer_revision)


@functools.lru_cache(maxsize=1)
def _load_tokenizer(source: str, revision: str | None) -> Any:
    """Each scorer is checked against it, and loading a large one takes a second."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
