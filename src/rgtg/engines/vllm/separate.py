"""Scorers that are models of their own, beside the policy that vLLM runs: their caches follow vLLM's batch.

vLLM tells a logits processor which tokens each row has, not what became of a row since the last step: rows move, leave,
come back after preemption, and stand still while their prompt is read in chunks. So a cache row is found by its
*tokens*: a row of this step continues the cached row that holds all its tokens but the last one.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rgtg.decoding.runners.factory import RunnerFactory
from rgtg.engines.vllm.guide import Wanted
from rgtg.models.loading.policy import Policy

_logger = logging.getLogger("vllm.rgtg")  # shown by vLLM's own logging
PREFILL_TOKENS = 8192  # padded tokens that are read in one pass


class SeparateScorer:
    """A scorer with the policy's tokenizer, and its cache of the rows that it scored last.

    Attributes:
        vocabulary: rows of the policy's output layer.
        texts: tokens of each cached row.
    """

    def __init__(self, scorer: Any, vocabulary: int) -> None:
        self._empty = RunnerFactory(Policy(None, scorer.tokenizer), {"scorer": scorer}).scorer_runner("scorer")
        self.vocabulary = vocabulary
        self.texts: list[tuple[int, ...]] = []
        self._runner: Any = None  # with these rows

    def score(self, texts: Sequence[Sequence[int]], candidate_ids: Tensor) -> Tensor:
        """Scores (R, K) in fp32 of candidates (R, K) after texts of R rows. Rows that are not among them are dropped.

        If the scorer fails, its cache is emptied, and the next call reads the texts again.
        """
        try:
            return self._score([tuple(text) for text in texts], candidate_ids)
        except Exception:
            self.texts, self._runner = [], None
            raise

    def _score(self, texts: list[tuple[int, ...]], candidate_ids: Tensor) -> Tensor:
        # 1. each text continues a cached row, is one, or is new
        free: dict[tuple[int, ...], list[int]] = {}
        for row, text in enumerate(self.texts):
            free.setdefault(text, []).append(row)
        longer, same, new = [], [], []
        for i, text in enumerate(texts):
            if found := free.get(text[:-1]):
                longer.append((i, found.pop()))
            elif found := free.get(text):
                same.append((i, found.pop()))
            else:
                new.append(i)
        # 2. the rows of each kind in a runner of their own, up to date
        parts: list[tuple[Any, list[int]]] = []
        if same:
            parts.append((self._runner.copy_rows([row for _, row in same]), [i for i, _ in same]))
        if longer:
            if [row for _, row in longer] != list(range(len(self.texts))):
                self._runner.select_rows([row for _, row in longer])
            newest = torch.tensor([[texts[i][-1]] for i, _ in longer], device=candidate_ids.device)
            self._runner.append(newest)
            parts.insert(0, (self._runner, [i for i, _ in longer]))
        for rows in _batches(new, texts):
            prompts = [list(texts[i]) for i in rows]
            runner = self._empty.fresh(max(map(len, prompts)) + PREFILL_TOKENS // 64, candidate_ids.shape[1])
            runner.prefill([], prompts)
            parts.append((runner, rows))
        # 3. scores, and all rows in one cache again
        scores = torch.empty(candidate_ids.shape, dtype=torch.float32, device=candidate_ids.device)
        for runner, rows in parts:
            scores[rows] = runner.score(candidate_ids[rows])
        self._runner, order = parts[0][0], list(parts[0][1])
        for runner, rows in parts[1:]:
            self._runner.add(runner)
            order += rows
        self.texts = [texts[i] for i in order]
        return scores


class SeparateOnRows:
    """A separate scorer, and the tokens of the step's rows.

    Rows whose tokens are unknown, and all rows where the scorer fails, get NaN for scores.
    """

    def __init__(self, scorer: SeparateScorer, texts: Mapping[int, Sequence[int] | None]) -> None:
        self.scorer, self.texts = scorer, texts

    def score(self, wanted: Sequence[Wanted]) -> list[Tensor]:
        """Scores in fp32 of every item, (R, K): all rows in one call, with as many candidates as the widest item."""
        if not wanted:
            return []
        widest = max(self.scorer.vocabulary if ids is None else ids.shape[1] for _, ids in wanted)
        device = next((ids.device for _, ids in wanted if ids is not None), torch.device("cpu"))
        every = torch.arange(self.scorer.vocabulary, device=device)
        rows = [row for own, _ in wanted for row in own]
        padded = [every.expand(len(own), -1) if ids is None else ids for own, ids in wanted]
        candidates = torch.cat([
            torch.nn.functional.pad(ids, (0, widest - ids.shape[1])) for ids in padded
        ])  # fmt: skip
        known = [i for i, row in enumerate(rows) if self.texts[row] is not None]
        scores = torch.full(candidates.shape, torch.nan, device=device)
        if known:
            try:
                scores[known] = self.scorer.score([self.texts[rows[i]] or () for i in known], candidates[known])
            except Exception:  # vLLM's worker must survive it; the rows are left to the policy
                _logger.exception("a scorer failed; the tokens of this step are left to the policy")
        parts = torch.split(scores, [len(own) for own, _ in wanted])
        return [part[:, : ids.shape[1]] for part, ids in zip(parts, padded, strict=True)]


def _batches(rows: list[int], texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Rows of similar length, with at most ``PREFILL_TOKENS`` tokens and their padding in each batch."""
    batches: list[list[int]] = []
    for i in sorted(rows, key=lambda i: len(texts[i])):
        if batches and (len(batches[-1]) + 1) * len(texts[i]) <= PREFILL_TOKENS:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
