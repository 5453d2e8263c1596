"""Guidance on a batch's logits: keep each guided row's candidates, with log π + β·r, and exclude all other tokens.

vLLM then applies the temperature and draws, so a row is drawn from π̃(v) ∝ [π(v)·exp(β·r(prefix⊕v))]^{1/T}. Rows that
are not guided are not touched.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rgtg.engines.vllm.arguments import Guide
from rgtg.models.scorers.head_file import HeadFile

# Rows of the batch, and their candidates (R, K); None is the whole vocabulary.
Wanted = tuple[Sequence[int], Tensor | None]


class RowScorer(Protocol):
    """Scores next tokens of rows of the batch."""

    def score(self, wanted: Sequence[Wanted]) -> list[Tensor]:
        """Scores in fp32 of every item: (R, K) of its candidates, or (R, V) of all tokens. Called once in a step."""
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

    def score(self, wanted: Sequence[Wanted]) -> list[Tensor]:
        """Scores in fp32 of every item: (R, K) of its candidates, or (R, V) of all tokens."""
        return [self.head.score(self.states[list(rows)], ids) for rows, ids in wanted]


@dataclass
class _Group:
    """Rows that choose their candidates alike.

    Attributes:
        rows: of the batch, R of them.
        guides: of the rows.
        logits: (R, V) of the policy.
        values: (R, K) logits of the candidates.
        ids: (R, K) the candidates; None is the whole vocabulary.
        total: (R, K) Σ β_j·r_j in float64.
    """

    rows: list[int]
    guides: list[Guide]
    logits: Tensor
    values: Tensor
    ids: Tensor | None
    total: Tensor


def guide_rows(
    logits: Tensor, guides: Mapping[int, Guide], scorers: Mapping[str, RowScorer], padding: Tensor | None = None
) -> Tensor:
    """Guide some rows of logits (B, V) fp32, in place, without waiting for the device.

    Args:
        logits: of the policy, after bans and biases; -inf excludes a token.
        guides: by row.
        scorers: by name.
        padding: (P,) ids without a token, which are no candidates; None if there are none.

    Returns:
        (B,) bool: rows that are left to the policy because a scorer gave scores that are not finite.
    """
    # 1. candidates: those of rows that choose them alike together
    alike: dict[tuple[str, int | None, bool], list[int]] = {}
    for row, guide in guides.items():
        alike.setdefault((guide.method.candidates, guide.top_k, guide.method.clip), []).append(row)
    groups = [_propose(logits, rows, [guides[row] for row in rows], padding) for rows in alike.values()]
    # 2. β·r, one scorer after the other
    for name in dict.fromkeys(name for guide in guides.values() for name in guide.scorers):
        _add_scores(name, scorers[name], groups)
    # 3. log π + β·r in place of the logits
    unscored = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    for group in groups:
        unscored[group.rows] = _write(logits, group)
    return unscored


def _propose(logits: Tensor, rows: list[int], guides: list[Guide], padding: Tensor | None) -> _Group:
    """The policy's candidates V_k; all tokens where there is no k, or where it counts sums."""
    own = logits if rows == list(range(len(logits))) else logits[rows]  # (R, V)
    if padding is not None:
        own = own.index_fill(1, padding, -torch.inf)
    top_k = guides[0].top_k
    values, ids = own, None
    if top_k is not None and top_k < own.shape[1] and guides[0].method.candidates != "sum":
        values, ids = own.topk(top_k, -1)
    return _Group(rows, guides, own, values, ids, torch.zeros(values.shape, dtype=torch.float64, device=own.device))


def _add_scores(name: str, scorer: RowScorer, groups: list[_Group]) -> None:
    """Add β·r of one scorer to the rows that it steers; RAD clips the score of a single scorer before β."""
    own = [[i for i, guide in enumerate(group.guides) if name in guide.scorers] for group in groups]
    steered = [(group, of_group) for group, of_group in zip(groups, own, strict=True) if of_group]
    wanted: list[Wanted] = [
        ([group.rows[i] for i in rows], None if group.ids is None else group.ids[rows]) for group, rows in steered
    ]
    for (group, rows), found in zip(steered, scorer.score(wanted), strict=True):
        scores = found.double()
        if group.guides[0].method.clip:
            single = torch.tensor([[len(group.guides[i].scorers) == 1] for i in rows], device=scores.device)
            scores = torch.where(single, scores.clamp(0, 1), scores)
        betas = [[group.guides[i].betas[group.guides[i].scorers.index(name)]] for i in rows]
        group.total[rows] += torch.tensor(betas, dtype=torch.float64, device=scores.device) * scores


def _write(logits: Tensor, group: _Group) -> Tensor:
    """Write the guided logits of a group's rows; (R,) bool: those without finite scores, left to the policy."""
    total, ids, guides = group.total, group.ids, group.guides
    # 1. RAD clips the sum of several scorers; scores that are not finite steer nothing
    if guides[0].method.clip:
        several = torch.tensor([[len(guide.scorers) > 1] for guide in guides], device=total.device)
        total = torch.where(several, total.clamp(0, 1), total)
    finite = total.isfinite().all(-1)
    total = total.masked_fill(~finite[:, None], 0.0)
    # 2. log π + β·r with its maximum at 0; FaRMA keeps the k largest sums
    combined = group.values.double() + total
    top_k = guides[0].top_k
    if guides[0].method.candidates == "sum" and top_k is not None and top_k < combined.shape[1]:
        combined, ids = combined.topk(top_k, -1)
    combined = combined - combined.amax(-1, keepdim=True)
    # 3. methods that take the maximum leave only that
    greedy = [i for i, guide in enumerate(guides) if guide.method.rule == "greedy"]
    if greedy:
        best = combined[greedy].argmax(-1, keepdim=True)
        combined[greedy] = torch.full_like(combined[greedy], -torch.inf).scatter(1, best, 0.0)
    # 4. every other token is excluded
    guided = combined.to(logits.dtype)
    if ids is not None:
        guided = torch.full_like(group.logits, -torch.inf).scatter(1, ids, guided)
    logits[group.rows] = guided
    return ~finite
