"""Guidance inside ``model.generate(..., custom_generate=rgtg.custom_generate(...))``."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.decoding.loading import ScorerSource
from rgtg.decoding.request import configured_end_tokens
from rgtg.errors import UsageError
from rgtg.tokenization.padding import pad_right

# Settings of a GenerationConfig that mean the same here, with transformers' own defaults.
_PASSED = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
# Settings that change the text and are not supported: an error, never ignored.
_UNSUPPORTED = {
    "num_beams": 1, "num_return_sequences": 1, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
    "min_p": None, "bad_words_ids": None, "force_words_ids": None, "sequence_bias": None, "guidance_scale": None,
    "penalty_alpha": None, "forced_bos_token_id": None, "forced_eos_token_id": None, "suppress_tokens": None,
    "begin_suppress_tokens": None, "stop_strings": None, "max_time": None, "watermarking_config": None,
    "return_dict_in_generate": False,
}  # fmt: skip

# Processors that generate builds from supported settings (it uses min_length for min_new_tokens).
_SUPPORTED = {
    "RepetitionPenaltyLogitsProcessor", "NoRepeatNGramLogitsProcessor", "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor", "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper",
    "MaxLengthCriteria", "EosTokenCriteria",
}  # fmt: skip


def custom_generate(
    scorer: "ScorerSource | Sequence[ScorerSource] | None" = None,
    *,
    tokenizer: Any,
    method: str = "pargs",
    beta: float | Sequence[float] | None = None,
    top_k: int | Literal["default"] | None = "default",
    seed: int = 0,
) -> Callable[..., Tensor]:
    """Make a callable for ``generate(custom_generate=...)`` that decodes with guidance.

    ``max_new_tokens``, ``min_new_tokens``, ``temperature``, ``top_p``, ``repetition_penalty`` and
    ``no_repeat_ngram_size`` of the call are used; ``top_k`` is the one given here, not the call's. Settings that would
    have to be ignored are errors. ``generate`` itself drops ``streamer=`` for custom callables.

    Args:
        scorer: folder, hub id or loaded pair, or a list of them; None with method ``policy``.
        tokenizer: the policy's.
        method: name of a decoding method.
        beta: guidance strength, multiplies the score; one for each of several scorers.
        top_k: candidates per step; ``default`` is the method's own.
        seed: from which each row's seed is derived.

    Returns:
        ``f(model, input_ids, ...) -> (B, L + T)`` token ids, prompts as given, completions padded on the right.

    Raises:
        UsageError: the settings of a call are not supported.
    """
    loaded: dict[int, GuidedPolicy] = {}

    def run(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        config = kwargs["generation_config"]
        if id(model) not in loaded:
            loaded[id(model)] = GuidedPolicy.from_pretrained(
                (model, tokenizer), scorer, method=method, beta=beta, top_k=top_k
            )
        settings = _settings(config, loaded[id(model)], input_ids.shape[1])
        _check_processors(kwargs)
        return _generate(loaded[id(model)], input_ids, kwargs.get("attention_mask"), settings, seed)

    return run


def _generate(
    guided: GuidedPolicy, input_ids: Tensor, mask: Tensor | None, settings: dict[str, Any], seed: int
) -> Tensor:
    kept = torch.ones_like(input_ids) if mask is None else mask
    prompts = [row[keep.bool()].tolist() for row, keep in zip(input_ids, kept, strict=True)]
    done = guided.generate_ids(prompts, seed=seed, batch_size=len(prompts), **settings)
    pad = guided.policy.tokenizer.pad_token_id
    pad = guided.policy.tokenizer.eos_token_id if pad is None else pad
    new, _ = pad_right([completion.token_ids for completion in done], pad, input_ids.device)
    return torch.cat([input_ids, new], 1)


def _check_processors(kwargs: dict[str, Any]) -> None:
    """Raise an error for processors and criteria of the caller, which ``generate`` passes along with its own."""
    for name in ("logits_processor", "stopping_criteria"):
        for item in kwargs.get(name) or ():
            if type(item).__name__ not in _SUPPORTED:
                raise UsageError(f"guided generation does not run the {name} {type(item).__name__}; leave it out")


def _settings(config: Any, guided: GuidedPolicy, prompt_length: int) -> dict[str, Any]:
    eos = config.eos_token_id
    ends = (guided.end_tokens, configured_end_tokens(guided.policy))
    if eos is not None and set(eos if isinstance(eos, list) else [eos]) not in ends:
        raise UsageError(
            f"guided generation ends at {sorted(guided.end_tokens)}, not at eos_token_id={eos}; set it in the model's "
            "generation_config"
        )
    if config.min_length and not config.min_new_tokens:
        raise UsageError(f"guided generation does not do min_length={config.min_length}; use min_new_tokens")
    for name, default in _UNSUPPORTED.items():
        value = getattr(config, name, default)
        if value not in (default, None):
            raise UsageError(f"guided generation does not do {name}={value!r}; leave it out")
    settings: dict[str, Any] = {"max_new_tokens": config.max_length - prompt_length}
    if config.min_new_tokens:
        settings["min_new_tokens"] = config.min_new_tokens
    for name, default in _PASSED.items():
        value = getattr(config, name, None)
        settings[name] = default if value is None else value
    if config.do_sample:
        settings["top_p"] = 1.0 if config.top_p is None else config.top_p
        if config.temperature is not None:  # with a greedy method, any but 1 is an error
            settings["temperature"] = config.temperature
    elif guided.method.random:
        settings["temperature"] = 0.0
    return settings
