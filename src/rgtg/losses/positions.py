"""Where completions lie in padded rows, which of their prefixes differ, and scores compared position by position."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


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


def before_last(mask: Bool[Tensor, "batch length"]) -> Bool[Tensor, "batch length"]:
    """True on every token of a completion but its last."""
    return torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], -1)


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


def last_score(scores: Float[Tensor, "batch length"], mask: Bool[Tensor, "batch length"]) -> Float[Tensor, " batch"]:
    """Score of each whole completion: the one at its last token; fp32.

    Example:
        >>> last_score(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[True, True, False]]))
        tensor([2.])
    """
    return hold_last(scores, mask)[:, -1].float()


def prefix_margins(
    chosen_scores: Float[Tensor, "batch length"],
    rejected_scores: Float[Tensor, "batch length"],
    chosen_mask: Bool[Tensor, "batch length"],
    rejected_mask: Bool[Tensor, "batch length"],
) -> Float[Tensor, "batch length"]:
    """r(x, y^w_{1:i}) − r(x, y^l_{1:i}) for every i, each completion held at its last score beyond its end; fp32."""
    return hold_last(chosen_scores, chosen_mask).float() - hold_last(rejected_scores, rejected_mask).float()


def mean_over(values: Float[Tensor, "batch length"], where: Bool[Tensor, "batch length"]) -> Float[Tensor, " batch"]:
    """Mean of each row over the positions that are true; zero (with a gradient of zero) in a row that has none."""
    return torch.where(where, values, 0.0).sum(-1) / where.sum(-1).clamp(min=1)


def mean_of_counted(losses: Float[Tensor, " batch"], counted: Bool[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Mean over the counted pairs; zero (with a gradient of zero) when there is none."""
    return torch.where(counted, losses, 0.0).sum() / counted.sum().clamp(min=1)
