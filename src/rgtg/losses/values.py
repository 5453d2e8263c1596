"""Regression losses: what a prefix is worth, learnt from the rewards of finished completions."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rgtg.losses.pairwise import position_weights
from rgtg.losses.positions import before_last


def fudge_losses(
    values: Float[Tensor, "batch length"], rewards: Float[Tensor, " batch"], mask: Bool[Tensor, "batch length"]
) -> Float[Tensor, " batch"]:
    """CD-FUDGE (arXiv 2310.17022, after FUDGE, 2104.05218): every prefix predicts its own completion's reward.

        L = Σ_i ( V(x, y_{1:i}) − r(x, y) )²

    Over the policy's own completions the minimum is the value function V(y_{1:i}) = E_π[ r(y) | y_{1:i} ]. That needs
    the sum over positions: a mean would count a completion's reward by the inverse of its length.

    Args:
        values: V of every prefix.
        rewards: of the finished completions.
        mask: true on their tokens.

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
    """CD-Q (arXiv 2310.17022): every prefix predicts the value one token on, the last one the reward.

        L = Σ_i ( V(y_{1:i}) − sg[ v_i ] )²,   v_T = r(y),   v_i = Σ_z π(z | y_{1:i}) · V(y_{1:i}⊕z)  for i < T

    sg stops the gradient. The sum over z is one value per token of the vocabulary, which a scorer that reads its
    candidate cannot give cheaply; on completions that π itself drew, V(y_{1:i+1}) is an unbiased sample of it, and is
    what stands for it unless ``next_values`` has the sum itself (or another backup, such as the maximum). The fixed
    point is the value function of the backup: E_π[r | y_{1:i}] for the sum and for its samples.

    Args:
        values: V of every prefix.
        rewards: of the finished completions.
        mask: true on their tokens.
        next_values: v_i of every prefix; the last one's is not read.

    Example:
        >>> bellman_losses(torch.tensor([[0.0, 2.0]]), torch.tensor([3.0]), torch.tensor([[True, True]]))
        tensor([5.])
    """
    values = values.float()
    ahead = values.roll(-1, -1) if next_values is None else next_values.float()
    is_last = mask & ~before_last(mask)
    targets = torch.where(is_last, rewards.float()[:, None], ahead).detach()
    return torch.where(mask, (values - targets).square(), 0.0).sum(-1)


def cumulative_mse_losses(
    scores: Float[Tensor, "batch length"], labels: Float[Tensor, " batch"], mask: Bool[Tensor, "batch length"]
) -> Float[Tensor, " batch"]:
    """RAD's objective (arXiv 2310.09520): squared errors of all prefixes, later ones weighing more.

        L = Σ_i i · ( r(x, y_{1:i}) − label )²  /  Σ_i i

    The minimum of a table is, per prefix, the mean label of the completions it opens, each weighing 1 / Σ_i i (one
    completion's weights add up to 1, so a prefix weighs more in a short completion than in a long one).

    Args:
        scores: of every prefix.
        labels: of the completions, in [0, 1].
        mask: true on their tokens.

    Example:
        >>> cumulative_mse_losses(torch.tensor([[0.0, 0.5]]), torch.tensor([1.0]), torch.tensor([[True, True]]))
        tensor([0.5000])
    """
    weights = position_weights(mask, "linear")
    errors = torch.where(mask, (scores.float() - labels.float()[:, None]).square(), 0.0)
    return (weights * errors).sum(-1) / weights.sum(-1).clamp(min=1)
