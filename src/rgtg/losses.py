"""Training objectives as pure functions of tensors.

Everywhere below ``scores[b, i - 1]`` is r(x, y_{1:i}), the score of the first i tokens of completion b; masks are true
on a completion's own tokens and completions start at column 0. All arithmetic is done in fp32.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import softplus


def bradley_terry_loss(chosen: Float[Tensor, " batch"], rejected: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Bradley–Terry negative log-likelihood of whole completions: mean over pairs of −log σ(r(x, y^w) − r(x, y^l)).

    Args:
        chosen: scores of the preferred completions, in nats of log-odds.
        rejected: scores of the others.

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

    For one pair, with T = max(T_w, T_l) and I the positions where the two prefixes are no longer identical:

        L = 1/|I| · Σ_{i ∈ I} −log σ( r(x, y^w_{1:i}) − r(x, y^l_{1:i}) ),   I ⊆ {1 … T}

    Beyond its end the shorter completion is held at its last score. Identical prefixes have zero gradient whatever the
    scorer says, so they are left out. The loss is the mean of L **over pairs**, not over all positions of the batch:
    every human judgement then weighs the same however long its completions are, and the mean over a global batch is the
    mean of its parts, so that DDP and gradient accumulation give the gradient of one large batch.

    Args:
        chosen_scores: scores of every prefix of the preferred completions.
        rejected_scores: the same of the others.
        chosen_mask: true on the tokens of the preferred completions.
        rejected_mask: true on the tokens of the others.
        differs: true where the two prefixes differ, as `prefixes_differ` gives it.

    Returns:
        A scalar; zero, not NaN, when no pair differs anywhere.

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
) -> tuple[Float[Tensor, " batch"], Bool[Tensor, " batch"]]:
    """Each pair's own L of `prefix_bradley_terry_loss`, zero where it differs nowhere, and whether it differs."""
    margins = prefix_margins(chosen_scores, rejected_scores, chosen_mask, rejected_mask)
    counted = differs & (chosen_mask | rejected_mask)
    summed = torch.where(counted, softplus(-margins), 0.0).sum(-1)
    return summed / counted.sum(-1).clamp(min=1), counted.any(-1)


def mean_of_counted(losses: Float[Tensor, " batch"], counted: Bool[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Mean over the counted pairs; zero (with a gradient of zero) when there is none."""
    return torch.where(counted, losses, 0.0).sum() / counted.sum().clamp(min=1)


def prefix_margins(
    chosen_scores: Float[Tensor, "batch length"],
    rejected_scores: Float[Tensor, "batch length"],
    chosen_mask: Bool[Tensor, "batch length"],
    rejected_mask: Bool[Tensor, "batch length"],
) -> Float[Tensor, "batch length"]:
    """r(x, y^w_{1:i}) − r(x, y^l_{1:i}) for every i, each completion held at its last score beyond its end; fp32."""
    return hold_last(chosen_scores, chosen_mask).float() - hold_last(rejected_scores, rejected_mask).float()


def hold_last(
    scores: Float[Tensor, "batch length"], mask: Bool[Tensor, "batch length"]
) -> Float[Tensor, "batch length"]:
    """Scores with everything after a completion's last token replaced by the score at that token.

    Example:
        >>> hold_last(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[True, True, False]]))
        tensor([[1., 2., 2.]])
    """
    last = (mask.sum(-1, keepdim=True) - 1).clamp(min=0)  # (B, 1)
    steps = torch.arange(scores.shape[-1], device=scores.device)
    return scores.gather(-1, torch.minimum(steps.expand_as(scores), last))


def prefixes_differ(
    chosen_ids: Int[Tensor, "batch length"],
    rejected_ids: Int[Tensor, "batch length"],
    chosen_mask: Bool[Tensor, "batch length"],
    rejected_mask: Bool[Tensor, "batch length"],
) -> Bool[Tensor, "batch length"]:
    """True from the first position where two completions have different tokens, or where only one has ended.

    Example:
        >>> same = torch.ones(1, 3, dtype=torch.bool)
        >>> prefixes_differ(torch.tensor([[5, 6, 7]]), torch.tensor([[5, 8, 7]]), same, same)
        tensor([[False,  True,  True]])
    """
    apart = (chosen_mask ^ rejected_mask) | (chosen_mask & rejected_mask & (chosen_ids != rejected_ids))
    return apart.int().cummax(-1).values.bool()


def completion_window(
    attention_mask: Int[Tensor, "batch length"], prompt_lengths: Int[Tensor, " batch"]
) -> tuple[Int[Tensor, "batch width"], Bool[Tensor, "batch width"]]:
    """Where each row's completion lies in its padded sequence, whichever side the padding is on.

    Args:
        attention_mask: 1 on tokens, 0 on padding.
        prompt_lengths: tokens of each row's prompt.

    Returns:
        Column of the i-th completion token in the sequence (B, T), to gather scores and ids with; and the mask of
        columns that hold a token of the completion. T is the longest completion's length.
    """
    lengths = attention_mask.sum(-1) - prompt_lengths  # (B,) tokens of the completion
    first = attention_mask.long().argmax(-1) + prompt_lengths
    steps = torch.arange(int(lengths.max()), device=attention_mask.device)
    columns = (first[:, None] + steps).clamp(max=attention_mask.shape[-1] - 1)
    return columns, steps < lengths[:, None]
