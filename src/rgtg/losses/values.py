"""Regression losses of value functions: each prefix predicts the reward of the finished completion."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rgtg.losses.pairwise import before_last, position_weights


def fudge_losses(
    values: Float[Tensor, "batch length"], rewards: Float[Tensor, " batch"], mask: Bool[Tensor, "batch length"]
) -> Float[Tensor, " batch"]:
    """CD-FUDGE (arXiv 2310.17022, after FUDGE, 2104.05218): every prefix predicts its own completion's reward.

        L = Σ_i ( V(x, y_{1:i}) − r(x, y) )²

    On the policy's own completions, the minimum is the value function V(y_{1:i}) = E_π[ r(y) | y_{1:i} ]. This needs
    the sum over positions: a mean would weight a completion's reward by the inverse of its length.

    Args:
        values: V of every prefix.
        rewards: of the finished completions.
        mask: true on the tokens of the completions.

    Example:
        >>> fudge_losses(torch.tensor([[0.0, 2.0]]), torch.tensor([1.0]), torch.tensor([[True, True]]))
        tensor([2.])
    """
    errors = (values.float() - rewards.float()[:, None]).square()
    return torch.where(mask, errors, 0.0).sum(-1)


def bellman_losses(
    values: Float[Tensor, "batch length"],
    rewards: Float[Tensor, " batch"],
    mask: Bool[Tensor, "batch length"],
    next_values: Float[Tensor, "batch length"] | None = None,
) -> Float[Tensor, " batch"]:
    """CD-Q (arXiv 2310.17022): every prefix predicts the value one token later; the last prefix predicts the reward.

        L = Σ_i ( V(y_{1:i}) − sg[ v_i ] )²,   v_T = r(y),   v_i = Σ_z π(z | y_{1:i}) · V(y_{1:i}⊕z)  for i < T

    sg stops the gradient. The sum over z needs a value for each token of the vocabulary, which is expensive for a
    scorer that reads one candidate at a time. On completions drawn by π itself, V(y_{1:i+1}) is an unbiased sample of
    the sum and is used instead, unless ``next_values`` gives the sum itself (or another backup, such as the maximum).
    The fixed point is the value function of the backup: E_π[r | y_{1:i}] for the sum and for its samples.

    Args:
        values: V of every prefix.
        rewards: of the finished completions.
        mask: true on the tokens of the completions.
        next_values: v_i of every prefix; the last one is not used.

    Example:
        >>> bellman_losses(torch.tensor([[0.0, 2.0]]), torch.tensor([3.0]), torch.tensor([[True, True]]))
        tensor([5.])
    """
    values = values.float()
    ahead = values.roll(-1, -1) if next_values is None else next_values.float()  # (B, T)
    is_last = mask & ~before_last(mask)
    targets = torch.where(is_last, rewards.float()[:, None], ahead).detach()
    return torch.where(mask, (values - targets).square(), 0.0).sum(-1)


def cumulative_mse_losses(
    scores: Float[Tensor, "batch length"], labels: Float[Tensor, " batch"], mask: Bool[Tensor, "batch length"]
) -> Float[Tensor, " batch"]:
    """RAD's objective (arXiv 2310.09520): squared errors of all prefixes; later prefixes have larger weights.

        L = Σ_i i · ( r(x, y_{1:i}) − label )²  /  Σ_i i

    The minimum of a table is, for each prefix, the mean label of the completions that begin with it, each with weight
    1 / Σ_i i (the weights of one completion add up to 1, so a prefix has more weight in a short completion).

    Args:
        scores: of every prefix.
        labels: of the completions, in [0, 1].
        mask: true on the tokens of the completions.

    Example:
        >>> cumulative_mse_losses(torch.tensor([[0.0, 0.5]]), torch.tensor([1.0]), torch.tensor([[True, True]]))
        tensor([0.5000])
    """
    weights = position_weights(mask, "linear")
    errors = torch.where(mask, (scores.float() - labels.float()[:, None]).square(), 0.0)
    return (weights * errors).sum(-1) / weights.sum(-1).clamp(min=1)
