"""Causal language models that score next tokens, and their trainers: FaRMA and GenARM."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rgtg.errors import UsageError
from rgtg.losses import completion_window, last_score, token_log_probs
from rgtg.models.loading.lora_merge import load_merged, untie_output
from rgtg.models.loading.pretrained import is_adapter, load_pretrained, load_tokenizer, require_dense, resolve_dtype
from rgtg.models.loading.scorer_info import read_info
from rgtg.models.ops.tree_attention import reads_packed_rows
from rgtg.training.objectives import PairScores, needs_best_next, pair_scores
from rgtg.training.trainers.reward import PairwiseRewardTrainer, require_causal


def load_language_base(source: str, *, output_scale: float = 1.0, **kwargs: Any) -> tuple[Any, Any]:
    """Load a causal language model, in fp32 unless ``dtype`` is given, and its tokenizer; LoRA adapters are merged.

    Args:
        source: a language model, or a scorer of next tokens that is trained further.
        output_scale: the output layer is multiplied by it. If it is not 1 and the layer is tied to the input embedding,
            the layer gets weights of its own.
        kwargs: of ``from_pretrained``.

    Raises:
        ModelNotFoundError: ``source`` cannot be loaded.
        UsageError: a reward model, which has no output layer over the vocabulary, or quantised weights.
    """
    from transformers import AutoModelForCausalLM

    dtype = resolve_dtype(kwargs.pop("dtype", "float32"))
    info = read_info(source)
    if info is not None and info.head != "vocab":
        raise UsageError(
            f"{source} is a scorer with a {info.head} head; start from a language model, such as the policy"
        )
    tokenizer = load_tokenizer(source, "base model")
    if is_adapter(source):
        return load_merged(AutoModelForCausalLM, source, "base model", dtype=dtype).requires_grad_(True), tokenizer
    model, report = load_pretrained(
        AutoModelForCausalLM, source, "base model",
        dtype=dtype, use_safetensors=True, output_loading_info=True, **kwargs,
    )  # fmt: skip
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise UsageError(
            f"{source} is not a complete language model ({missing} not in its weights): start from the policy"
        )
    require_dense(model, source, "base model")
    if output_scale != 1:
        untie_output(model, output_scale)
    return model, tokenizer


class LanguageModelTrainer(PairwiseRewardTrainer):
    """A ``trl.RewardTrainer`` of an ``AutoModelForCausalLM``, whose logits score the completions."""

    def load(self, source: str, seed: int, **kwargs: Any) -> tuple[Any, Any]:
        """The language model, and its tokenizer."""
        return load_language_base(source, **kwargs)

    def check_model(self, model: Any, tokenizer: Any) -> None:
        """Check that the model is causal, and give the tokenizer a padding token.

        Raises:
            UsageError: the model attends to later tokens.
        """
        if tokenizer.pad_token_id is None:  # any token will do, because masks hide it; the vocabulary must not grow
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
        require_causal(model, lambda ids: model(input_ids=ids, use_cache=False).logits)
        self.packs = reads_packed_rows(model)

    @contextmanager
    def passes_trl_checks(self, model: Any) -> Iterator[None]:
        """Set ``num_labels`` to 1 meanwhile, as trl requires of a reward model; a language model has no labels."""
        labels = model.config.id2label, model.config.label2id
        model.config.num_labels = 1
        try:
            yield
        finally:
            model.config.id2label, model.config.label2id = labels

    def read(self, model: Any, inputs: dict[str, Any]) -> tuple[PairScores, Any]:
        """Scores of the batch from the logits before each token, and the output; its logits are the last scores."""
        ids, mask, prompts = inputs["input_ids"], inputs["attention_mask"], inputs["prompt_lengths"].repeat(2)
        columns, inside = completion_window(mask, prompts)  # (2B, T)
        completions = ids.gather(-1, columns)
        pairs, starts, lengths = len(ids) // 2, prompts.tolist(), inside.sum(-1).tolist()
        before: dict[int, Tensor] = {}  # the token at column t is scored by the logits at t − 1
        best: dict[int, Tensor] = {}
        for part in self.passes(model, inputs):
            outputs = model(**part.inputs)
            for text, row, at in part.texts:
                logits = outputs.logits[row, at[starts[text] - 1 :]][None]  # (1, T + 1, V)
                before[text] = self.token_scores(logits[:, :-1], completions[text : text + 1, : lengths[text]])[0]
                if text < pairs and needs_best_next(self.objective, self.step):
                    best[text] = best_logits(logits[0, 1:], len(self.processing_class))
        found = torch.cat([before[text] for text in range(len(ids))])
        token_scores = found.new_zeros(inside.shape).masked_scatter(inside, found)
        scores = pair_scores(self.prefix_scores(token_scores, inside), completions, inside)
        if best:
            after = torch.cat([best[text] for text in range(pairs)])
            scores.best_next = after.new_zeros(scores.chosen.shape).masked_scatter(scores.chosen_mask, after)
        sides = (scores.chosen, scores.chosen_mask), (scores.rejected, scores.rejected_mask)
        outputs.logits = torch.cat([last_score(*side) for side in sides])[:, None]
        return scores, outputs

    def token_scores(
        self, logits: Float[Tensor, "rows length vocabulary"], ids: Int[Tensor, "rows length"]
    ) -> Float[Tensor, "rows length"]:
        """Score of the token that follows each position."""
        raise NotImplementedError

    def prefix_scores(
        self, token_scores: Float[Tensor, "rows length"], inside: Bool[Tensor, "rows length"]
    ) -> Float[Tensor, "rows length"]:
        """Scores of prefixes from the scores of their tokens."""
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

    def token_scores(
        self, logits: Float[Tensor, "rows length vocabulary"], ids: Int[Tensor, "rows length"]
    ) -> Float[Tensor, "rows length"]:
        """The logit itself."""
        return logits.gather(-1, ids[..., None])[..., 0].float()

    def prefix_scores(
        self, token_scores: Float[Tensor, "rows length"], inside: Bool[Tensor, "rows length"]
    ) -> Float[Tensor, "rows length"]:
        """The score of a prefix is that of its last token."""
        return token_scores


class AutoregressiveTrainer(LanguageModelTrainer):
    """GenARM (arXiv 2410.08193): minimises `rgtg.losses.autoregressive_pair_losses`."""

    objective = "autoregressive"
    _tag_names = ("rgtg", "autoregressive")

    def token_scores(
        self, logits: Float[Tensor, "rows length vocabulary"], ids: Int[Tensor, "rows length"]
    ) -> Float[Tensor, "rows length"]:
        """Log π_r of the token, nats."""
        return token_log_probs(logits, ids)

    def prefix_scores(
        self, token_scores: Float[Tensor, "rows length"], inside: Bool[Tensor, "rows length"]
    ) -> Float[Tensor, "rows length"]:
        """Sums over the completion's tokens so far."""
        return torch.where(inside, token_scores, 0.0).cumsum(-1)


@torch.no_grad()
def best_logits(logits: Float[Tensor, "length vocabulary"], vocabulary: int) -> Float[Tensor, " length"]:
    """max_v over the tokens that the tokenizer has; further rows of the embedding are padding and never trained."""
    return logits[..., :vocabulary].amax(-1).float()
