"""Bradley–Terry losses: one completion against another, whole or prefix by prefix."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import softplus

from rgtg.losses.positions import mean_of_counted, prefix_margins

Weighting = Literal["uniform", "linear", "inverse"]


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
    *,
    weighting: Weighting = "uniform",
    sampled: Bool[Tensor, "batch length"] | None = None,
    trust: Float[Tensor, "batch length"] | None = None,
) -> tuple[Float[Tensor, " batch"], Bool[Tensor, " batch"]]:
    """Each pair's own L of `prefix_bradley_terry_loss`, with its options: weights, sampled prefixes, trust.

    With a_i the weight of a position, S ⊆ I the prefixes that are read and c_i how far a judgement is trusted there:

        L = |I| / |S| · Σ_{i ∈ S} a_i · c_i · −log σ(margin_i)  /  Σ_{i ∈ I} a_i

    S drawn uniformly leaves the expectation as it is with S = I. Weights change which errors matter where a scorer
    cannot fit every prefix; where it can (a table, and preferences that follow Bradley–Terry), they leave the optimum
    alone. A pair that is trusted less (c < 1) counts less.

    Args:
        chosen_scores: scores of every prefix of the preferred completions.
        rejected_scores: the same of the others.
        chosen_mask: true on the tokens of the preferred completions.
        rejected_mask: true on the tokens of the others.
        differs: true where the two prefixes differ.
        weighting: a_i: ``uniform`` 1, ``linear`` i (late prefixes, as RAD weighs them), ``inverse`` 1 / i (early ones).
        sampled: true on the prefixes S that are read (`sample_positions`); None reads all.
        trust: c_i in [0, 1]; None trusts every judgement.

    Returns:
        L of each pair, zero where it differs nowhere; and whether it differs.

    Example:
        >>> scores = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> mask = torch.tensor([[True, True]])
        >>> prefix_bradley_terry_pair_losses(*scores, mask, mask, mask, weighting="linear")[0]  # (0.127 + 2·0.693) / 3
        tensor([0.5044])
    """
    margins = prefix_margins(chosen_scores, rejected_scores, chosen_mask, rejected_mask)
    inside = differs & (chosen_mask | rejected_mask)
    weights = position_weights(inside, weighting)
    read = inside if sampled is None else inside & sampled
    share = inside.sum(-1) / read.sum(-1).clamp(min=1)  # |I| / |S|
    terms = weights * softplus(-margins)
    summed = torch.where(read, terms if trust is None else terms * trust.float(), 0.0).sum(-1)
    return share * summed / weights.sum(-1).clamp(min=1e-12), inside.any(-1)


def position_weights(inside: Bool[Tensor, "batch length"], weighting: Weighting) -> Float[Tensor, "batch length"]:
    """a_i of column i − 1: 1, i or 1 / i; zero at positions that do not count.

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
    """Of each row's true positions ``count`` drawn uniformly without replacement; all of them where there are no more.

    Example:
        >>> inside = torch.tensor([[False, True, True, True], [True, False, False, False]])
        >>> sample_positions(inside, 2, torch.Generator().manual_seed(0)).sum(-1)
        tensor([2, 1])
    """
    keys = torch.rand(inside.shape, generator=generator, device=generator.device).to(inside.device)
    ranks = keys.masked_fill(~inside, 2.0).argsort(-1).argsort(-1)  # the position with the smallest key is rank 0
    return inside & (ranks < count)


def agreement(reference_margins: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """How far to trust a judgement, c = σ(margin): the probability that a reference scorer gives it itself.

    Example:
        >>> agreement(torch.tensor([0.0, 4.0]))
        tensor([0.5000, 0.9820])
    """
    return reference_margins.float().sigmoid()
