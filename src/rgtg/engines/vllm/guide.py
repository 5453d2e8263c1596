"""Guidance on a batch's logits: keep each guided row's candidates, with log π + β·r, and exclude all other tokens.

vLLM then applies the temperature and draws, so a row is drawn from π̃(v) ∝ [π(v)·exp(β·r(prefix⊕v))]^{1/T}. Rows that
are not guided are not touched.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from rgtg.engines.vllm.arguments import Guide
from rgtg.models.scorers.head_file import HeadFile


class RowScorer(Protocol):
    """Scores next tokens of rows of the batch."""

    def score(self, rows: Sequence[int], candidate_ids: Tensor | None) -> Tensor:
        """Scores in fp32: (R, K) of candidates (R, K) of R rows, or (R, V) of all tokens where they are None."""
        ...


class TorchHead:
    """A vocabulary head on a device: Q(h)[v] = ⟨MLP(h), E[v]⟩ + b[v] in fp32, as docs/head-format.md defines it."""

    def __init__(self, head: HeadFile, device: torch.device) -> None:
        arrays = (head.mean, head.std, head.first_weight, head.first_bias, head.second_weight, head.second_bias)
        tensors = [torch.from_numpy(array).to(device) for array in (*arrays, head.table, head.bias)]
        self._mean, self._std, self._w1, self._b1, self._w2, self._b2, self._table, self._bias = tensors

    def score(self, states: Tensor, candidate_ids: Tensor | None) -> Tensor:
        """Scores (R, K) of candidates (R, K) at states (R, H); (R, V) of all tokens where they are None."""
        standardized = (states.float() - self._mean) / self._std
        hidden = torch.nn.functional.gelu(torch.nn.functional.linear(standardized, self._w1, self._b1))
        query = torch.nn.functional.linear(hidden, self._w2, self._b2)  # (R, rank)
        if candidate_ids is None:
            return torch.nn.functional.linear(query, self._table, self._bias)
        products: Tensor = (self._table[candidate_ids] @ query[..., None])[..., 0]
        return products + self._bias[candidate_ids]


class HeadOnStates:
    """A head, and the states (B, H) of the step's rows."""

    def __init__(self, head: TorchHead, states: Tensor) -> None:
        self.head, self.states = head, states

    def score(self, rows: Sequence[int], candidate_ids: Tensor | None) -> Tensor:
        """Scores in fp32: (R, K) of candidates (R, K) of R rows, or (R, V) of all tokens where they are None."""
        return self.head.score(self.states[list(rows)], candidate_ids)


def guide_rows(
    logits: Tensor, guides: Mapping[int, Guide], scorers: Mapping[str, RowScorer], padding: Tensor | None = None
) -> list[int]:
    """Guide some rows of logits (B, V) fp32, in place.

    Args:
        logits: of the policy, after bans and biases; -inf excludes a token.
        guides: by row.
        scorers: by name.
        padding: (P,) ids without a token, which are no candidates; None if there are none.

    Returns:
        Rows that are left to the policy because a scorer gave scores that are not finite.
    """
    groups: dict[tuple[str, int | None, bool], list[int]] = {}
    for row, guide in guides.items():
        groups.setdefault((guide.method.candidates, guide.top_k, guide.method.clip), []).append(row)
    unscored: list[int] = []
    for (kind, top_k, clip), rows in groups.items():
        # 1. the policy's candidates V_k; all tokens where there is no k, or where it counts sums
        index = torch.tensor(rows, device=logits.device)
        own = logits if rows == list(range(len(logits))) else logits[index]  # (R, V)
        if padding is not None:
            own = own.index_fill(1, padding, -torch.inf)
        k = min(top_k or own.shape[1], own.shape[1])
        if kind != "sum" and k < own.shape[1]:
            values, ids = own.topk(k, -1)
        else:
            values, ids = own, None
        # 2. β·r; a row whose scores are not finite is left to the policy
        scores = _weighted(rows, [guides[row] for row in rows], ids, scorers, clip, values)
        finite = scores.isfinite().all(-1)
        if not bool(finite.all()):
            scores = scores.masked_fill(~finite[:, None], 0.0)
            unscored += [row for row, fine in zip(rows, finite.tolist(), strict=True) if not fine]
        # 3. log π + β·r, with its maximum at 0
        combined = values.double() + scores
        if kind == "sum" and k < combined.shape[1]:
            combined, ids = combined.topk(k, -1)
        combined = combined - combined.amax(-1, keepdim=True)
        for i, row in enumerate(rows):
            if guides[row].method.rule == "greedy":
                best = combined[i].argmax()
                combined[i] = torch.full_like(combined[i], -torch.inf).index_fill(0, best[None], 0.0)
        # 4. every other token is excluded
        guided = combined.to(logits.dtype)
        if ids is not None:
            guided = torch.full_like(own, -torch.inf).scatter(1, ids, guided)
        logits[index] = guided
    return unscored


def _weighted(
    rows: list[int], guides: list[Guide], ids: Tensor | None, scorers: Mapping[str, RowScorer], clip: bool, like: Tensor
) -> Tensor:
    """Σ β_j·r_j of R rows, (R, K) float64: the score of a single scorer is clipped before β, a sum as a whole."""
    total = torch.zeros(like.shape, dtype=torch.float64, device=like.device)
    for name in dict.fromkeys(name for guide in guides for name in guide.scorers):
        own = [i for i, guide in enumerate(guides) if name in guide.scorers]
        scores = scorers[name].score([rows[i] for i in own], None if ids is None else ids[own]).double()
        if clip:
            single = torch.tensor([[len(guides[i].scorers) == 1] for i in own], device=scores.device)
            scores = torch.where(single, scores.clamp(0, 1), scores)
        betas = [guides[i].betas[guides[i].scorers.index(name)] for i in own]
        total[own] += torch.tensor(betas, dtype=torch.float64, device=scores.device)[:, None] * scores
    if clip:
        several = torch.tensor([[len(guide.scorers) > 1] for guide in guides], device=total.device)
        total = torch.where(several, total.clamp(0, 1), total)
    return total
