"""The Scorer protocol, and what a scorer declares about itself."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from rgtg.models.checkpoint import ScorerInfo


class Scorer(Protocol):
    """Anything that can say how good a prefix is.

    ``info`` is None for a model that was not trained here; ``causal`` says whether one forward reads every prefix.
    """

    model: Any
    tokenizer: Any
    info: ScorerInfo | None
    name: str
    causal: bool
    max_length: int | None

    def score_prefixes(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """Scores of all prefixes y_{1:i}, i = 1 … T, of each completion: one fp32 CPU tensor (T,) per row."""
        ...

    def score(self, prompts: Sequence[str], completions: Sequence[str], *, finished: bool = True) -> list[float]:
        """Reward of each finished completion (or of an unfinished one, read without a closing EOS)."""
        ...
