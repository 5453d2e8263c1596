"""Rewards of segments behind a growing completion: over the scorer's own cache, or of whole texts."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rgtg.decoding.request import Request, source_of
from rgtg.decoding.runners.model_runner import Runner, read
from rgtg.decoding.runners.scorer_runner import MAX_WIDTH
from rgtg.decoding.runners.token_tree import TokenTree
from rgtg.models.scorers.base import Scorer
from rgtg.models.scorers.cross_tokenizer import CrossTokenizerScorer
from rgtg.tokenization.encoding import decode_completion
from rgtg.tokenization.padding import pad_right

# Segments of each row, as token ids: rows × segments × tokens; every row has as many segments, none is empty.
Segments = Sequence[Sequence[Sequence[int]]]


class SegmentReader(Protocol):
    """What segment-wise decoding needs of a scorer."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts; their rewards (B,)."""
        ...

    def score(self, segments: Segments) -> Tensor:
        """Rewards (B, n) of what is kept with each of n segments behind it; nothing is kept."""
        ...

    def keep(self, segments: Sequence[Sequence[int]]) -> None:
        """Keep one segment per row; an empty one keeps nothing."""
        ...

    def select_rows(self, rows: Tensor) -> None:
        """Keep only these rows."""
        ...


class CachedSegments:
    """A causal reward model with the policy's tokenizer: all segments of a row are branches of one token tree."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts; their rewards (B,)."""
        rewards: Tensor = self.runner.readout(self.runner.model, self.runner.prefill(prompts))
        return rewards.float().cpu()

    def score(self, segments: Segments) -> Tensor:
        """Rewards (B, n), in passes of at most ``MAX_WIDTH`` nodes (or one segment)."""
        width = max(len(tokens) for row in segments for tokens in row)
        at_once = max(1, MAX_WIDTH // width)
        n = len(segments[0])
        parts = [self._score([row[i : i + at_once] for row in segments], width) for i in range(0, n, at_once)]
        return torch.cat(parts, 1)

    def _score(self, segments: Segments, width: int) -> Tensor:
        n = len(segments[0])
        ids, _ = pad_right([tokens for row in segments for tokens in row], 0, "cpu")
        ids = torch.nn.functional.pad(ids, (0, width - ids.shape[1])).reshape(len(segments), -1)
        parents = tuple(-1 if step == 0 else branch * width + step - 1 for branch in range(n) for step in range(width))
        scores = read(self.runner, TokenTree(ids, parents)).float().cpu()  # (B, n·width)
        ends = [[branch * width + len(tokens) - 1 for branch, tokens in enumerate(row)] for row in segments]
        return scores.gather(1, torch.tensor(ends))

    def keep(self, segments: Sequence[Sequence[int]]) -> None:
        """Keep one segment per row; an empty one keeps nothing."""
        read_ragged(self.runner, segments)

    def select_rows(self, rows: Tensor) -> None:
        """Keep only these rows."""
        self.runner.select_rows(rows)


class _Texts:
    """What readers of whole texts share: the tokens kept of each row so far."""

    kept: list[list[int]]

    def keep(self, segments: Sequence[Sequence[int]]) -> None:
        """Keep one segment per row; an empty one keeps nothing."""
        for kept, tokens in zip(self.kept, segments, strict=True):
            kept.extend(tokens)


class WholeTexts(_Texts):
    """Any scorer of prefixes, of whatever make: every segment's whole text is read anew."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.prompts: list[list[int]] = []

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Note the prompts; their rewards (B,)."""
        self.prompts, self.kept = [list(prompt) for prompt in prompts], [[] for _ in prompts]
        # an empty completion is worth what its prompt is: the prompt's last token stands for it
        return self._rewards([prompt[:-1] for prompt in self.prompts], [prompt[-1:] for prompt in self.prompts])

    def score(self, segments: Segments) -> Tensor:
        """Rewards (B, n)."""
        n = len(segments[0])
        texts = [[*kept, *tokens] for kept, row in zip(self.kept, segments, strict=True) for tokens in row]
        return self._rewards([prompt for prompt in self.prompts for _ in range(n)], texts).reshape(-1, n)

    def select_rows(self, rows: Tensor) -> None:
        """Keep only these rows."""
        chosen = rows.tolist()
        self.kept, self.prompts = [self.kept[i] for i in chosen], [self.prompts[i] for i in chosen]

    def _rewards(self, prompts: list[Any], completions: list[Any]) -> Tensor:
        return torch.stack([scores[-1] for scores in self.scorer.score_prefixes(prompts, completions)]).float()


class OwnTexts(_Texts):
    """A reward model with a tokenizer of its own: every segment's whole text, as that tokenizer writes it.

    What does not fit its context is worth −∞.
    """

    def __init__(self, scorer: CrossTokenizerScorer, tokenizer: Any, requests: Sequence[Request]) -> None:
        """Set up; ``tokenizer`` is the policy's, ``requests`` are those of the prompts."""
        self.scorer, self.tokenizer, self.requests = scorer, tokenizer, list(requests)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Note the prompts; their rewards (B,)."""
        self.kept = [[] for _ in prompts]
        return self.score([[[]] for _ in prompts])[:, 0]

    def select_rows(self, rows: Tensor) -> None:
        """Keep only these rows."""
        chosen = rows.tolist()
        self.kept, self.requests = [self.kept[i] for i in chosen], [self.requests[i] for i in chosen]

    def score(self, segments: Segments) -> Tensor:
        """Rewards (B, n)."""
        sources, texts = [], []
        for request, kept, mine in zip(self.requests, self.kept, segments, strict=True):
            sources += [source_of(request, self.tokenizer)] * len(mine)
            texts += [decode_completion(self.tokenizer, request.prompt_ids, [*kept, *tokens]) for tokens in mine]
        rewards = self.scorer.rewards(sources, texts, finished=False)
        scored = [-math.inf if reward is None else reward for reward in rewards]
        return torch.tensor(scored).reshape(len(self.kept), -1)


def read_ragged(runner: Runner, tokens: Sequence[Sequence[int]], before: Tensor | None = None) -> Tensor | None:
    """Read and keep so many tokens of each row, possibly none; the readout (B, …) at each row's last.

    Args:
        runner: has read what is before.
        tokens: of each row.
        before: the readout of rows that read nothing; needed if there are any.
    """
    counts = [len(row) for row in tokens]
    if not max(counts):
        return before
    ids, _ = pad_right(tokens, 0, "cpu")
    states = runner.states(TokenTree.chain(ids))
    runner.keep(torch.arange(ids.shape[1]).expand(len(ids), -1), counts)
    rows, last = torch.arange(len(ids)), torch.tensor(counts).clamp(min=1) - 1
    read_now: Tensor = runner.readout(runner.model, states[rows, last])
    if before is None:
        return read_now
    new = (torch.tensor(counts) > 0).to(read_now.device)
    return torch.where(new.reshape(-1, *[1] * (read_now.dim() - 1)), read_now, before.to(read_now))
