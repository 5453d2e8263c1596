"""A scorer that says of every next token at once how good it is: one row of one token through a model of its own."""

import torch
from torch import Tensor

from rgtg.errors import UsageError
from rgtg.models.checkpoint import ScorerInfo
from rgtg.models.policy import Policy, context_length


class VocabularyScorer:
    """A causal model whose output layer scores next tokens: r(y_{1:i}) = Q(h_{i−1})[y_i] with Q(h) = W·h + b.

    Reads FaRMA's head (arXiv 2502.04517) and autoregressive reward models (GenARM, arXiv 2410.08193): for the latter
    r = log π_r(y_i | y_{<i}) differs from the logit by a term of the prefix alone, which cancels among its candidates.
    Only the candidates' rows of W are read.
    """

    causal = True

    def __init__(self, scorer: Policy, *, info: ScorerInfo | None = None, name: str = "vocabulary scorer") -> None:
        output = scorer.model.get_output_embeddings()
        if output is None or not hasattr(output, "weight"):
            raise UsageError(f"{name}: {type(scorer.model).__name__} has no output layer over a vocabulary")
        self.model, self.tokenizer = scorer.model, scorer.tokenizer
        self.weight, self.bias = output.weight, getattr(output, "bias", None)
        self.info, self.name = info, name
        self.layer = scorer.model.config.get_text_config().num_hidden_layers
        self.max_length = context_length(scorer.model.config)
        self.append_eos = info.append_eos if info else False

    def head(self, states: Tensor, candidate_ids: Tensor) -> Tensor:
        """Scores (B, K), fp32, of the candidates (B, K) after prefixes with final states (B, H)."""
        rows = torch.nn.functional.embedding(candidate_ids, self.weight)  # (B, K, H)
        scores = (rows @ states[..., None])[..., 0].float()
        return scores if self.bias is None else scores + self.bias[candidate_ids]
