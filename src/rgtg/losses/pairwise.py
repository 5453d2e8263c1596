"""Bradley–Terry losses of whole completions and of their prefixes, and the position arithmetic of all objectives."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import softplus

Weighting = Literal["uniform", "linear", "inverse"]


def bradley_terry_loss(chosen: Float[Tensor, " batch"], rejected: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Bradley–Terry negative log-likelihood of whole completions: mean over pairs of −log σ(r(x, y^w) − r(x, y^l)).

    Args:
        chosen: scores of the preferred completions, in nats of log-odds.
        rejected: scores of the other completions.

    Example:
        >>> bradley_terry_loss(torch.tensor([1.0]), torch.tensor([1.0]))  # ln 2: undecided
        tensor(0.6931)
    """
    return softplus(rejected.float() - chosen.float()).mean()


def prefix_bradley_terry_loss(
    chosen_scores: Float[Tensor, "batch length"],
    rejected_scores: Float[Tensor, "batch length"],
    chosen_mask: Bool[Tensor, "batch length"],
    rejected_mask: Bool[Tensor, "batch length"],
    differs: Bool[Tensor, "batch length"],
) -> Float[Tensor, ""]:
    """PARGS objective on partial sequences (arXiv 2406.07780), in nats.

    For one pair, with T = max(T_w, T_l) and I the positions at which the two prefixes differ:

        L = 1/|I| · Σ_{i ∈ I} −log σ( r(x, y^w_{1:i}) − r(x, y^l_{1:i}) ),   I ⊆ {1 … T}

    After its end, the shorter completion keeps its last score. Identical prefixes have zero gradient for any scorer,
    so they are left out. The loss is the mean of L **over pairs**, not over all positions of the batch: every human
    judgement has the same weight, however long its completions are, and the mean over a global batch is the mean of its
    parts, so that DDP and gradient accumulation give the gradient of one large batch.

    Args:
        chosen_scores: scores of every prefix of the preferred completions.
        rejected_scores: scores of every prefix of the other completions.
        chosen_mask: true on the tokens of the preferred completions.
        rejected_mask: true on the tokens of the other completions.
        differs: true where the two prefixes differ (`prefixes_differ`).

    Returns:
        A scalar; zero, not NaN, if no pair differs anywhere.

    Example:
        >>> scores = torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 2.0]])
        >>> mask = torch.tensor([[True, True]])
        >>> prefix_bradley_terry_loss(*scores, mask, mask, torch.tensor([[False, True]]))
        tensor(0.6931)
    """
    per_pair, counted = prefix_bradley_terry_pair_losses(
        chosen_scores, rejected_scores, chosen_mask, rejected_mask, differs
    )
    return mean_of_counted(per_pair, counted)


def prefix_bradley_terry_pair_losses(
    chosen_scores: Float[Tensor, "batch length"],
    rejected_scores: Float[Tensor, "batch length"],
    chosen_mask: Bool[Tensor, "batch length"],
    rejected_mask: Bool[Tensor, "batch length"],
    differs: Bool[Tensor, "batch length"],
    *,
    weighting: Weighting = "uniform",
    sampled: Bool[Tensor, "batch length"] | None = None,
    pair_weights: Float[Tensor, "batch length"] | None = None,
) -> tuple[Float[Tensor, " batch"], Bool[Tensor, " batch"]]:
    """L of `prefix_bradley_terry_loss` for each pair, with position weights, sampled prefixes and pair weights.

    With a_i the weight of a position, S ⊆ I the sampled prefixes and c_i the weight of the pair at that position:

        L = |I| / |S| · Σ_{i ∈ S} a_i · c_i · −log σ(margin_i)  /  Σ_{i ∈ I} a_i

    If S is drawn uniformly, the expectation is the loss with S = I. Position weights decide which errors matter if a
    scorer cannot fit every prefix. If it can (a table, and preferences that follow Bradley–Terry), they do not change
    the optimum. A pair with a lower weight (c < 1) contributes less.

    Args:
        chosen_scores: scores of every prefix of the preferred completions.
        rejected_scores: scores of every prefix of the other completions.
        chosen_mask: true on the tokens of the preferred completions.
        rejected_mask: true on the tokens of the other completions.
        differs: true where the two prefixes differ.
        weighting: a_i: ``uniform`` 1, ``linear`` i (late prefixes, as in RAD), ``inverse`` 1 / i (early prefixes).
        sampled: true on the prefixes S (`sample_positions`); None uses all.
        pair_weights: c_i in [0, 1]; None gives every judgement the weight 1.

    Returns:
        L of each pair, zero if it differs nowhere; and whether it differs anywhere.

    Example:
        >>> scores = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> mask = torch.tensor([[True, True]])
        >>> prefix_bradley_terry_pair_losses(*scores, mask, mask, mask, weighting="linear")[0]  # (0.127 + 2·0.693) / 3
        tensor([0.5044])
    """
    margins = prefix_margins(chosen_scores, rejected_scores, chosen_mask, rejected_mask)  # (B, T)
    inside = differs & (chosen_mask | rejected_mask)  # I
    weights = position_weights(inside, weighting)
    used = inside if sampled is None else inside & sampled  # S
    share = inside.sum(-1) / used.sum(-1).clamp(min=1)  # |I| / |S|
    terms = weights * softplus(-margins)
    summed = torch.where(used, terms if pair_weights is None else terms * pair_weights.float(), 0.0).sum(-1)
    return share * summed / weights.sum(-1).clamp(min=1e-12), inside.any(-1)


def fit_length_offset(longer: Sequence[int]) -> float:
    """How many nats of preference one more token is worth in these pairs: γ of σ(γ·ℓ), by maximum likelihood.

    ℓ is the length of the chosen completion minus that of the rejected one. Two pairs of mean |ℓ|, one won by each
    side, keep γ finite where the longer side always wins.

    >>> fit_length_offset([5, -5])
    0.0
    >>> fit_length_offset([5, 5, 5, -5]) > 0
    True
    """
    given = torch.tensor(list(longer), dtype=torch.float64)
    typical = given.abs().mean()
    if not float(typical):
        return 0.0
    lengths = torch.cat([given, torch.stack([typical, -typical])]) / typical
    offset = torch.zeros((), dtype=torch.float64)
    for _ in range(50):  # Newton's steps on a concave function of one number; five are usual
        probability = torch.sigmoid(offset * lengths)
        step = ((1 - probability) * lengths).sum() / (probability * (1 - probability) * lengths.square()).sum()
        offset = offset + step.clamp(-1, 1)
        if abs(float(step)) < 1e-10:
            break
    return float(offset / typical)


def with_length(
    scores: Float[Tensor, "batch length"], mask: Bool[Tensor, "batch length"], offset: float
) -> Float[Tensor, "batch length"]:
    """Scores plus γ nats for each token so far: r(y_{1:i}) + γ·i.

    In a Bradley–Terry loss the scorer then learns what γ·(length difference) leaves to explain (an offset of a
    logistic regression). Source of the idea: length-controlled win rates, arXiv 2404.04475.

    >>> with_length(torch.tensor([[1.0, 1.0]]), torch.tensor([[True, True]]), 0.5)
    tensor([[1.5000, 2.0000]])
    """
    return scores + offset * mask.to(scores.dtype).cumsum(-1)


def position_weights(inside: Bool[Tensor, "batch length"], weighting: Weighting) -> Float[Tensor, "batch length"]:
    """a_i at column i − 1: 1, i or 1 / i; zero at positions that are not ``inside``.

    Example:
        >>> position_weights(torch.tensor([[False, True, True]]), "linear")
        tensor([[0., 2., 3.]])
    """
    order = torch.arange(1, inside.shape[-1] + 1, device=inside.device, dtype=torch.float32)
    weights = {"uniform": torch.ones_like(order), "linear": order, "inverse": 1 / order}[weighting]
    return weights * inside


def sample_positions(
    inside: Bool[Tensor, "batch length"], count: int, generator: torch.Generator
) -> Bool[Tensor, "batch length"]:
    """Draw ``count`` true positions of each row uniformly without replacement; all of them if there are no more.

    Example:
        >>> inside = torch.tensor([[False, True, True, True], [True, False, False, False]])
        >>> sample_positions(inside, 2, torch.Generator().manual_seed(0)).sum(-1)
        tensor([2, 1])
    """
    keys = torch.rand(inside.shape, generator=generator, device=generator.device).to(inside.device)
    ranks = keys.masked_fill(~inside, 2.0).argsort(-1).argsort(-1)  # the position with the smallest key has rank 0
    return inside & (ranks < count)


def agreement(reference_margins: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Pair weight c = σ(margin): the probability of the judgement according to a reference scorer.

    Example:
        >>> agreement(torch.tensor([0.0, 4.0]))
        tensor([0.5000, 0.9820])
    """
    return reference_margins.float().sigmoid()


def completion_window(
    attention_mask: Int[Tensor, "batch length"], prompt_lengths: Int[Tensor, " batch"]
) -> tuple[Int[Tensor, "batch width"], Bool[Tensor, "batch width"]]:
    """Columns of each row's completion tokens in its padded sequence; the padding may be on either side.

    Args:
        attention_mask: 1 on tokens, 0 on padding.
        prompt_lengths: tokens of each row's prompt.

    Returns:
        Column of the i-th completion token in the sequence (B, T), to gather scores and ids with; and the mask of
        columns that hold a token of the completion. T is the length of the longest completion.
    """
    lengths = attention_mask.sum(-1) - prompt_lengths  # (B,) tokens of the completion
    first = attention_mask.long().argmax(-1) + prompt_lengths  # (B,)
    steps = torch.arange(int(lengths.max()), device=attention_mask.device)  # (T,)
    columns = (first[:, None] + steps).clamp(max=attention_mask.shape[-1] - 1)
    return columns, steps < lengths[:, None]


def prefixes_differ(
    chosen_ids: Int[Tensor, "batch length"],
    rejected_ids: Int[Tensor, "batch length"],
    chosen_mask: Bool[Tensor, "batch length"],
    rejected_mask: Bool[Tensor, "batch length"],
) -> Bool[Tensor, "batch length"]:
    """True from the first position at which two completions have different tokens, or only one of them has ended.

    Example:
        >>> same = torch.ones(1, 3, dtype=torch.bool)
        >>> prefixes_differ(torch.tensor([[5, 6, 7]]), torch.tensor([[5, 8, 7]]), same, same)
        tensor([[False,  True,  True]])
    """
    unequal = (chosen_mask ^ rejected_mask) | (chosen_mask & rejected_mask & (chosen_ids != rejected_ids))
    return unequal.int().cummax(-1).values.bool()


def prefix_margins(
    chosen_scores: Float[Tensor, "batch length"],
    rejected_scores: Float[Tensor, "batch length"],
    chosen_mask: Bool[Tensor, "batch length"],
    rejected_mask: Bool[Tensor, "batch length"],
) -> Float[Tensor, "batch length"]:
    """r(x, y^w_{1:i}) − r(x, y^l_{1:i}) for every i, in fp32; a completion keeps its last score after its end."""
    return hold_last(chosen_scores, chosen_mask).float() - hold_last(rejected_scores, rejected_mask).float()


def hold_last(
    scores: Float[Tensor, "batch length"], mask: Bool[Tensor, "batch length"]
) -> Float[Tensor, "batch length"]:
    """Scores in which every column after a completion's last token holds the score at that token.

    Example:
        >>> hold_last(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[True, True, False]]))
        tensor([[1., 2., 2.]])
    """
    last = (mask.sum(-1, keepdim=True) - 1).clamp(min=0)  # (B, 1)
    steps = torch.arange(scores.shape[-1], device=scores.device)
    return scores.gather(-1, torch.minimum(steps.expand_as(scores), last))


def last_score(scores: Float[Tensor, "batch length"], mask: Bool[Tensor, "batch length"]) -> Float[Tensor, " batch"]:
    """Score of each whole completion, in fp32: the score at its last token.

    Example:
        >>> last_score(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[True, True, False]]))
        tensor([2.])
    """
    return hold_last(scores, mask)[:, -1].float()


def before_last(mask: Bool[Tensor, "batch length"]) -> Bool[Tensor, "batch length"]:
    """True on every token of a completion except the last."""
    return torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], -1)


def mean_over(values: Float[Tensor, "batch length"], where: Bool[Tensor, "batch length"]) -> Float[Tensor, " batch"]:
    """Mean of each row over the positions that are true; zero (with a gradient of zero) in a row without any."""
    return torch.where(where, values, 0.0).sum(-1) / where.sum(-1).clamp(min=1)


def mean_of_counted(losses: Float[Tensor, " batch"], counted: Bool[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Mean over the counted pairs; zero (with a gradient of zero) if there are none."""
    return torch.where(counted, losses, 0.0).sum() / counted.sum().clamp(min=1)
