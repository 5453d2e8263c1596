"""The trainers of scorers of next tokens, which are causal language models: FaRMA and GenARM."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rgtg.losses import completion_window, token_log_probs
from rgtg.training.base_model import load_language_base, require_causal_language_model, require_padding
from rgtg.training.objectives import reads_best_next
from rgtg.training.scores import PairScores, pair_scores
from rgtg.training.trainers.reward import PairwiseRewardTrainer, counted_positions


class LanguageModelTrainer(PairwiseRewardTrainer):
    """A ``trl.RewardTrainer`` over an ``AutoModelForCausalLM``: completions are scored by its logits."""

    def load(self, source: str, seed: int, **kwargs: Any) -> tuple[Any, Any]:
        """The language model, and its tokenizer."""
        return load_language_base(source, **kwargs)

    def check_model(self, model: Any, tokenizer: Any) -> None:
        """Refuse a model that looks ahead; padding is never read, so any token will do for it."""
        require_padding(tokenizer)
        require_causal_language_model(model)

    @contextmanager
    def accepted(self, model: Any) -> Iterator[None]:
        """Trl asks every reward model for a single label; a language model's config speaks of labels it has not."""
        labels = model.config.id2label, model.config.label2id
        model.config.num_labels = 1
        try:
            yield
        finally:
            model.config.id2label, model.config.label2id = labels

    def read(self, model: Any, inputs: dict[str, Any]) -> tuple[PairScores, Any]:
        """Scores of the batch from the logits before each token, and the model's own output."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        outputs = model(input_ids=ids, attention_mask=mask, use_cache=False, **counted_positions(mask))
        columns, inside = completion_window(mask, inputs["prompt_lengths"].repeat(2))
        before = self.token_scores(outputs.logits[:, :-1], ids[:, 1:]).gather(-1, columns - 1)
        scores = pair_scores(self.prefix_scores(before, inside), ids.gather(-1, columns), inside)
        if reads_best_next(self.objective, self.step):
            best = best_logits(outputs.logits[: len(scores.chosen)], len(self.processing_class))
            scores.best_next = best.gather(-1, columns[: len(best)])
        return scores, outputs

    def token_scores(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Score (B, L) of the token that follows each position."""
        raise NotImplementedError

    def prefix_scores(self, token_scores: Tensor, inside: Tensor) -> Tensor:
        """Scores (B, T) of prefixes from those of their tokens."""
        raise NotImplementedError


class FarmaTrainer(LanguageModelTrainer):
    """FaRMA (arXiv 2502.04517): full-bt on V(y) in one step, `rgtg.losses.farma_consistency_losses` in the next.

    V(y_{1:i}) = Q(h_{i−1})[y_i], the logit of token i before it.
    """

    objective = "farma"
    _tag_names = ("rgtg", "farma")

    def load(self, source: str, seed: int, **kwargs: Any) -> tuple[Any, Any]:
        """The language model with its output layer scaled, and its tokenizer."""
        return load_language_base(source, output_scale=self.options.output_scale, **kwargs)

    def token_scores(self, logits: Tensor, ids: Tensor) -> Tensor:
        """The logit itself."""
        return logits.gather(-1, ids[..., None])[..., 0].float()

    def prefix_scores(self, token_scores: Tensor, inside: Tensor) -> Tensor:
        """A prefix is worth what its last token's logit says."""
        return token_scores


class AutoregressiveTrainer(LanguageModelTrainer):
    """GenARM (arXiv 2410.08193): minimises `rgtg.losses.autoregressive_pair_losses`."""

    objective = "autoregressive"
    _tag_names = ("rgtg", "autoregressive")

    def token_scores(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Log π_r of the token, nats."""
        return token_log_probs(logits, ids)

    def prefix_scores(self, token_scores: Tensor, inside: Tensor) -> Tensor:
        """Sums over the completion's tokens so far."""
        return torch.where(inside, token_scores, 0.0).cumsum(-1)


@torch.no_grad()
def best_logits(logits: Float[Tensor, "batch length vocabulary"], vocabulary: int) -> Float[Tensor, "batch length"]:
    """max_v over the tokens that the tokenizer has: rows that only fill up the embedding are never trained."""
    return logits[..., :vocabulary].amax(-1).float()
