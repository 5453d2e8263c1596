"""A stock sequence-classification reward model, read at every position in one pass."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rgtg.errors import DataError, UsageError
from rgtg.models.loading.device_map import DeviceMap, Placement, finish_loading
from rgtg.models.loading.lora_merge import is_adapter, load_merged
from rgtg.models.loading.policy import context_length, load_pretrained, load_tokenizer, resolve_dtype
from rgtg.models.loading.scorer_info import ScorerInfo, read_info
from rgtg.models.loading.tensor_parallel import TpPlan, broadcast_from_rank0
from rgtg.models.ops.lm_head import is_head_weight, scalar_head, trunk
from rgtg.tokenization.encoding import encode_completion, encode_prompt
from rgtg.tokenization.padding import batches_by_length


class PrefixScorer:
    """Reads an ``AutoModelForSequenceClassification(num_labels=1)`` at chosen positions.

    The score of prefix y_{1:i} is the scalar head on the last layer's state at token i, which for a causal model equals
    the stock model run on that prefix alone.
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
        self.max_length = context_length(model.config)
        self.append_eos = info.append_eos if info else False

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

        ``dtype``, ``device``, ``device_map`` and ``tp_plan`` as of `rgtg.models.loading.policy.load_policy`.

        Raises:
            ModelNotFoundError: nothing loadable at ``source``.
            UsageError: a model with more than one label, or one without a trained reward head.
        """
        if isinstance(source, PrefixScorer):
            return source
        if not isinstance(source, str):
            return cls(*source)
        info = read_info(source)
        tokenizer = load_tokenizer(source, "scorer")
        model = _load_classifier(source, Placement(dtype, device, device_map, tp_plan), tokenizer)
        return cls(model, tokenizer, info=info, name=source)

    @torch.inference_mode()
    def score_prefixes(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        *,
        batch_size: int = 8,
    ) -> list[Tensor]:
        """Scores of every prefix y_{1:i}, i = 1 … T, of each completion.

        A causal model needs one forward per completion; an encoder reads each prefix's text as a row of its own.

        Returns:
            One fp32 CPU tensor of shape (T,) per completion.
        """
        rows = list(zip(prompt_ids, completion_ids, strict=True))
        require_within_context(rows, self.max_length)
        if not self.causal:
            return [self._score_prefix_texts(prompt, completion, batch_size) for prompt, completion in rows]
        scores: dict[int, Tensor] = {}
        for part, ids, mask in batches_by_length(rows, batch_size, self.model.device):
            read = position_scores(self.model, ids, mask).float().cpu()
            for row, i in enumerate(part):
                first, total = len(rows[i][0]), len(rows[i][0]) + len(rows[i][1])
                scores[i] = read[row, first:total].clone()
        return [scores[i] for i in range(len(rows))]

    def score(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        *,
        finished: bool | Sequence[bool] = True,
        templated: bool = False,
        batch_size: int = 8,
    ) -> list[float]:
        """Reward of each completion after its prompt.

        Args:
            prompts: texts.
            completions: texts, as many.
            finished: whether a completion ended, for all or one each; those that did are closed with EOS if the scorer
                was trained so, those that were cut off at a limit are not.
            templated: the prompts went through a chat template, which wrote the special tokens.
            batch_size: texts read together.

        Raises:
            DataError: an empty prompt, or a text over the scorer's context.
            UsageError: another number of ``finished`` than of completions.
        """
        prompt_ids, completion_ids = encode_for_scoring(
            self.tokenizer, prompts, completions, finished, append_eos=self.append_eos, templated=templated
        )
        if self.causal:
            return [float(s[-1]) for s in self.score_prefixes(prompt_ids, completion_ids, batch_size=batch_size)]
        return [float(self._score_texts([p + c], 1)[0]) for p, c in zip(prompts, completions, strict=True)]

    def _score_prefix_texts(self, prompt: Sequence[int], completion: Sequence[int], batch_size: int) -> Tensor:
        texts = [
            self.tokenizer.decode([*prompt, *completion[:i]], skip_special_tokens=True)
            for i in range(1, len(completion) + 1)
        ]
        return self._score_texts(texts, batch_size)

    @torch.inference_mode()
    def _score_texts(self, texts: list[str], batch_size: int) -> Tensor:
        parts = []
        for start in range(0, len(texts), batch_size):
            batch = self.tokenizer(texts[start : start + batch_size], padding=True, return_tensors="pt")
            logits = self.model(**batch.to(self.model.device)).logits
            parts.append(broadcast_from_rank0(self.model, logits[:, 0].float()).cpu())
        return torch.cat(parts)


def require_within_context(rows: Sequence[tuple[Sequence[int], Sequence[int]]], limit: int | None) -> None:
    """Refuse an empty completion, and a prompt and completion over the scorer's context of ``limit`` tokens.

    Raises:
        DataError: saying which.
    """
    for prompt, completion in rows:
        if not completion:
            raise DataError("a scored completion must have at least one token")
        if limit and len(prompt) + len(completion) > limit:
            raise DataError(
                f"a text of {len(prompt)} + {len(completion)} tokens exceeds the scorer's context of {limit}; drop it, "
                "or use a scorer with a longer context"
            )


def encode_for_scoring(
    tokenizer: Any,
    prompts: Sequence[str],
    completions: Sequence[str],
    finished: bool | Sequence[bool],
    *,
    append_eos: bool,
    templated: bool,
) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and completions as a causal scorer reads them: what ended is closed if the scorer was trained so.

    An empty text that no EOS closes is worth what its prompt is: the prompt's last token then stands for it.

    Raises:
        UsageError: another number of ``finished`` than of completions.
    """
    ended = finished_flags(finished, len(completions))
    prompt_ids = [encode_prompt(tokenizer, p, templated=templated) for p in prompts]
    completion_ids = [
        encode_completion(tokenizer, p, c, templated=templated, append_eos=append_eos and end)
        for p, c, end in zip(prompts, completions, ended, strict=True)
    ]
    for prompt, completion in zip(prompt_ids, completion_ids, strict=True):
        if not completion:
            completion.append(prompt.pop())
    return prompt_ids, completion_ids


def finished_flags(finished: bool | Sequence[bool], many: int) -> list[bool]:
    """Whether each of so many completions ended, from one answer for all or one for each.

    Raises:
        UsageError: another number of answers than of completions.
    """
    ended = [finished] * many if isinstance(finished, bool) else list(finished)
    if len(ended) != many:
        raise UsageError(f"finished says of {len(ended)} completions whether they ended, and there are {many}")
    return ended


class ReadsCompletions:
    """Scores texts by their tokens: what scorers share that read every prefix of the policy's tokens."""

    tokenizer: Any
    append_eos: bool

    def score_prefixes(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], *, batch_size: int = 8
    ) -> list[Tensor]:
        """Scores of all prefixes of each completion."""
        raise NotImplementedError

    def score(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        *,
        finished: bool | Sequence[bool] = True,
        templated: bool = False,
        batch_size: int = 8,
    ) -> list[float]:
        """Score of each completion after its prompt; arguments as `PrefixScorer.score`."""
        prompt_ids, completion_ids = encode_for_scoring(
            self.tokenizer, prompts, completions, finished, append_eos=self.append_eos, templated=templated
        )
        return [float(s[-1]) for s in self.score_prefixes(prompt_ids, completion_ids, batch_size=batch_size)]


def position_scores(
    model: Any, input_ids: Int[Tensor, "batch length"], attention_mask: Int[Tensor, "batch length"]
) -> Float[Tensor, "batch length"]:
    """Score at every position of right-padded sequences, in one forward pass.

    ``out[b, t]`` is the reward the stock model gives tokens ``0 … t`` of row b. Positions are counted from the mask,
    so left padding works too; scores at padding are meaningless.
    """
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    states = trunk(model)(
        input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
    ).last_hidden_state
    scores: Tensor = scalar_head(model)(states)[..., 0]
    return broadcast_from_rank0(model, scores)


def _load_classifier(source: str, placement: Placement, tokenizer: Any) -> Any:
    from transformers import AutoModelForSequenceClassification

    dtype, auto_class = resolve_dtype(placement.dtype), AutoModelForSequenceClassification
    if is_adapter(source):
        where = placement.arguments()
        model = load_merged(auto_class, source, "scorer", tokenizer, dtype=dtype, num_labels=1, **where)
        return finish_loading(model, placement)
    model, report = load_pretrained(
        auto_class, source, "scorer",
        dtype=dtype, use_safetensors=True, output_loading_info=True, **placement.arguments(),
    )  # fmt: skip
    if missing := [key for key in report["missing_keys"] if is_head_weight(key)]:
        raise UsageError(
            f"{source} has no trained reward head ({', '.join(sorted(missing)[:3])} not in its weights): it is a "
            f"language model, not a reward model. Train one: rgtg train --base {source} (or read "
            'its own log-probabilities as scores: load_scorer(..., kind="autoregressive"))'
        )
    return finish_loading(model, placement)
