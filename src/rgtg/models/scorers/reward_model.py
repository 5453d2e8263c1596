"""A sequence-classification reward model that scores every prefix in one forward pass."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rgtg.errors import DataError, UsageError, of_row
from rgtg.models.loading.device_map import DeviceMap, Placement, finish_loading
from rgtg.models.loading.lora_merge import load_merged
from rgtg.models.loading.pretrained import (
    is_adapter,
    load_pretrained,
    load_tokenizer,
    max_sequence_length,
    resolve_dtype,
)
from rgtg.models.loading.scorer_info import ScorerInfo, read_info
from rgtg.models.loading.tensor_parallel import TpPlan, broadcast_from_rank0
from rgtg.models.ops.lm_head import final_states, is_head_weight, scalar_head, scorer_scores
from rgtg.models.scorers.token_scorer import (
    Flags,
    TokenScorer,
    encode_for_scoring,
    finished_flags,
    require_within_context,
)
from rgtg.tokenization.conversation import PromptSource, TemplateKwargs, completed_chat
from rgtg.tokenization.encoding import adds_eos, embedding_rows, require_embeddings


class PrefixScorer(TokenScorer):
    """Scores prefixes with an ``AutoModelForSequenceClassification(num_labels=1)``.

    The score of prefix y_{1:i} is the scalar head's output at token i. For a causal model, it equals the stock model's
    output for that prefix alone. An encoder has no head for every position: it scores each prefix as a text of its own.
    """

    def __init__(self, model: Any, tokenizer: Any, *, info: ScorerInfo | None = None, name: str = "scorer") -> None:
        if getattr(model.config, "num_labels", 1) != 1:
            raise UsageError(
                f"{name} has {model.config.num_labels} labels; a scorer must give one number (num_labels=1)"
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.info = info
        self.name = name
        self.causal = scalar_head(model) is not None
        self.max_length = max_sequence_length(model)
        self.append_eos = info.append_eos if info else adds_eos(tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        source: "str | PrefixScorer | tuple[Any, Any]",
        *,
        dtype: "str | torch.dtype | None" = None,
        device: "str | torch.device | None" = None,
        device_map: DeviceMap | None = None,
        tp_plan: TpPlan | None = None,
    ) -> "PrefixScorer":
        """Load a reward model from a folder or hub id, or wrap a loaded (model, tokenizer) pair.

        ``dtype``, ``device``, ``device_map`` and ``tp_plan`` are those of `rgtg.models.loading.policy.load_policy`.

        Raises:
            ModelNotFoundError: nothing loadable at ``source``.
            UsageError: a model with more than one label, or without a trained reward head.
        """
        if isinstance(source, PrefixScorer):
            return source
        if not isinstance(source, str):
            return cls(*source)
        info = read_info(source)
        tokenizer = load_tokenizer(source, "scorer")
        model = _load_classifier(source, Placement(dtype, device, device_map, tp_plan), tokenizer)
        return cls(model, tokenizer, info=info, name=source)

    def score_prefixes(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], *, batch_size: int = 8
    ) -> list[Tensor]:
        """Score every prefix of each completion, as `TokenScorer.score_prefixes`."""
        if self.causal:
            return super().score_prefixes(prompt_ids, completion_ids, batch_size=batch_size)
        rows = list(zip(prompt_ids, completion_ids, strict=True))
        require_within_context(rows, self.max_length)
        scores = []
        for row, (prompt, completion) in enumerate(rows):
            ends = range(1, len(completion) + 1)
            texts = [self.tokenizer.decode([*prompt, *completion[:i]], skip_special_tokens=True) for i in ends]
            try:
                scores.append(self._score_texts(texts, batch_size))
            except DataError as error:
                raise of_row(error, row, len(rows)) from error
        return scores

    def _score_batch(
        self, ids: Int[Tensor, "batch length"], mask: Int[Tensor, "batch length"], windows: Sequence[slice]
    ) -> list[Tensor]:
        scores = position_scores(self.model, ids, mask).float().cpu()
        return [row[window].clone() for row, window in zip(scores, windows, strict=True)]

    def score(
        self,
        prompts: Sequence[PromptSource],
        completions: Sequence[str],
        *,
        finished: Flags = True,
        templated: bool = False,
        batch_size: int = 8,
        chat_template_kwargs: TemplateKwargs | None = None,
    ) -> list[float]:
        """Score each completion after its prompt, as `TokenScorer.score`."""
        if self.causal:
            return super().score(
                prompts, completions, finished=finished, templated=templated, batch_size=batch_size,
                chat_template_kwargs=chat_template_kwargs,
            )  # fmt: skip
        # An encoder scores texts, with the same requirements.
        encode_for_scoring(self, prompts, completions, finished, templated=templated,
                           chat_template_kwargs=chat_template_kwargs)  # fmt: skip
        scores, ended = [], finished_flags(finished, len(prompts))
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            if isinstance(prompt, str):
                text, own = f"{prompt}{completion}", templated
            else:
                own = True
                text = completed_chat(
                    self.tokenizer, prompt, completion, finished=ended[i], whole=self.info is None,
                    template_kwargs=chat_template_kwargs,
                )  # fmt: skip
            try:
                scores.append(float(self._score_texts([text], 1, special_tokens=not own)[0]))
            except DataError as error:
                raise of_row(error, i, len(prompts)) from error
        return scores

    @torch.inference_mode()
    def _score_texts(
        self, texts: Sequence[str], batch_size: int, *, special_tokens: bool = True
    ) -> Float[Tensor, " texts"]:
        """Scores of whole texts by an encoder, fp32 on the CPU; a chat template has written its special tokens.

        Raises:
            DataError: a text has more tokens than the scorer's context, special ones included, or one that has no
                embedding.
        """
        embeddings, parts = embedding_rows(self.model), []
        for ids in self.tokenizer(list(texts), add_special_tokens=special_tokens).input_ids:
            if self.max_length is not None and len(ids) > self.max_length:
                raise DataError(
                    f"a text of {len(ids)} tokens exceeds the context of {self.max_length} of the scorer {self.name}; "
                    "drop it, or use a scorer with a longer context"
                )
            require_embeddings(ids, embeddings, f"the scorer {self.name}")
        pad = self.tokenizer.pad_token_id
        if pad is None or (embeddings is not None and pad >= embeddings):
            batch_size = 1  # nothing can pad
        for start in range(0, len(texts), batch_size):
            some = texts[start : start + batch_size]
            batch = self.tokenizer(some, padding=len(some) > 1, return_tensors="pt", add_special_tokens=special_tokens)
            logits = self.model(**batch.to(self.model.device)).logits
            parts.append(broadcast_from_rank0(self.model, logits[:, 0].float()).cpu())
        return torch.cat(parts)


def position_scores(
    model: Any, input_ids: Int[Tensor, "batch length"], attention_mask: Int[Tensor, "batch length"]
) -> Float[Tensor, "batch length"]:
    """Score at every position of padded sequences, in one forward pass.

    ``out[b, t]`` is the reward that the stock model gives tokens 0 … t of row b. Rows may be padded on either side;
    scores at padding have no meaning.
    """
    return scorer_scores(model, final_states(model, input_ids, attention_mask))


def _renamed_head(names: Iterable[str]) -> str | None:
    """A weight that is a reward head, judged by its name: value_head.weight, v_head.summary.weight and so on."""
    found = [name for name in names if re.search(r"(head|score|reward|regression|value|classifier)\b", name)]
    return next((name for name in sorted(found) if name.endswith("weight") and "lm_head" not in name), None)


def _load_classifier(source: str, placement: Placement, tokenizer: Any) -> Any:
    from transformers import AutoModelForSequenceClassification

    dtype, auto_class = resolve_dtype(placement.dtype), AutoModelForSequenceClassification
    kwargs = placement.load_kwargs()
    if is_adapter(source):
        model = load_merged(auto_class, source, "scorer", tokenizer, dtype=dtype, num_labels=1, **kwargs)
        return finish_loading(model, placement)
    model, report = load_pretrained(
        auto_class, source, "scorer", dtype=dtype, use_safetensors=True, output_loading_info=True, **kwargs
    )
    if missing := [name for name in report["missing_keys"] if is_head_weight(name)]:
        if name := _renamed_head(report["unexpected_keys"]):
            raise UsageError(
                f"the weights of {source} hold a head under another name ({name}): rename it to {missing[0]} in its "
                "safetensors file"
            )
        raise UsageError(
            f"{source} has no trained reward head ({', '.join(sorted(missing)[:3])} not in its weights): it is a "
            f"language model, not a reward model. Train one: rgtg train --base {source} (or use its "
            'log-probabilities as scores: load_scorer(..., kind="autoregressive"))'
        )
    return finish_loading(model, placement)
