"""How well scores rank and choose the candidates of one prefix: rank correlation, value, regret. Pure functions.

Legend: N prefixes, K candidates, m roll-outs of each; π is the policy renormalised over the K candidates of a prefix.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rgtg.decoding.sampling import guided_log_probs
from rgtg.evaluation.metrics import EMPTY_INTERVAL, resampled, unit_numbers
from rgtg.types.base import Interval

_STEPS = 60  # of doubling or bisecting beta


def mid_ranks(values: Float[Tensor, "prefixes candidates"]) -> Float[Tensor, "prefixes candidates"]:
    """Rank of each candidate within its row; 1 is the lowest, and ties share the mean of their ranks.

    >>> mid_ranks(torch.tensor([[3.0, 1.0, 3.0]]))
    tensor([[2.5000, 1.0000, 2.5000]], dtype=torch.float64)
    """
    mine, other = values[:, :, None], values[:, None, :]
    return (other < mine).double().sum(-1) + ((other == mine).double().sum(-1) + 1) / 2


def spearman(
    a: Float[Tensor, "prefixes candidates"], b: Float[Tensor, "prefixes candidates"]
) -> Float[Tensor, " prefixes"]:
    """Spearman's ρ within each row: Pearson's correlation of the mid-ranks; NaN if all candidates of a row tie.

    >>> spearman(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 3.0, 2.0]]))
    tensor([0.5000], dtype=torch.float64)
    """
    x, y = (ranks - ranks.mean(-1, keepdim=True) for ranks in (mid_ranks(a), mid_ranks(b)))
    return (x * y).sum(-1) / (x.square().sum(-1) * y.square().sum(-1)).sqrt()


def kendall(
    a: Float[Tensor, "prefixes candidates"], b: Float[Tensor, "prefixes candidates"]
) -> Float[Tensor, " prefixes"]:
    """Kendall's τ-b within each row, (concordant − discordant) / √(pairs untied in a · in b); NaN if all tie.

    >>> kendall(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 3.0, 2.0]]))
    tensor([0.3333], dtype=torch.float64)
    """
    x, y = (torch.sign(v[:, :, None] - v[:, None, :]).double() for v in (a, b))
    return (x * y).sum((-1, -2)) / (x.abs().sum((-1, -2)) * y.abs().sum((-1, -2))).sqrt()


def argmax_weights(
    log_probs: Float[Tensor, "prefixes candidates"], scores: Float[Tensor, "prefixes candidates"]
) -> Float[Tensor, "prefixes candidates"]:
    """Distribution of the candidate with the highest score; ties are drawn as π draws them.

    It is the limit of π·exp(β·s) as β → ∞: if a scorer ties everywhere, the policy chooses.

    >>> argmax_weights(torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.0, 1.0, 1.0]]))
    tensor([[0.0000, 0.6000, 0.4000]], dtype=torch.float64)
    """
    best = scores == scores.amax(-1, keepdim=True)
    return torch.softmax(log_probs.double().masked_fill(~best, -torch.inf), -1)


def guided_weights(
    log_probs: Float[Tensor, "prefixes candidates"], scores: Float[Tensor, "prefixes candidates"], beta: float
) -> Float[Tensor, "prefixes candidates"]:
    """The guided distribution ∝ π(v)·exp(β·s(v)) (`rgtg.decoding.sampling.guided_log_probs`), as probabilities."""
    if beta == 0:  # exactly π: fp32 rounding must not look like a gain or a loss
        return torch.softmax(log_probs.double(), -1)
    return guided_log_probs(log_probs, scores, beta).double().exp()


def mean_kl(log_probs: Float[Tensor, "prefixes candidates"], weights: Float[Tensor, "prefixes candidates"]) -> float:
    """Mean over the prefixes of KL(weights ‖ π) in nats.

    >>> mean_kl(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]))
    0.6931471805599453
    """
    policy = torch.log_softmax(log_probs.double(), -1)
    w = weights.double()
    return float((torch.special.xlogy(w, w) - w * policy).sum(-1).mean())


def beta_for_kl(
    log_probs: Float[Tensor, "prefixes candidates"], scores: Float[Tensor, "prefixes candidates"], kl_nats: float
) -> float:
    """The β ≥ 0 at which guidance costs ``kl_nats`` per token, on average over these prefixes.

    KL grows with β. If even the argmax costs less, the result is a β so large that guidance is the argmax. It is 0 for
    a scorer that ties everywhere.
    """
    spread = float((scores.double() - scores.double().mean(-1, keepdim=True)).square().mean().sqrt())
    if spread == 0 or kl_nats == 0:
        return 0.0

    def kl(beta: float) -> float:
        return mean_kl(log_probs, guided_weights(log_probs, scores, beta))

    # 1. Double beta until it costs enough.
    low, high = 0.0, 1 / spread
    for _ in range(_STEPS):
        if kl(high) >= kl_nats:
            break
        low, high = high, 2 * high
    else:
        return high
    # 2. Bisect.
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if kl(middle) < kl_nats else (low, middle)
    return high


def with_ties(values: Float[Tensor, "prefixes candidates"]) -> Float[Tensor, "prefixes candidates"]:
    """Values rounded to 1e-10 of the largest, so that means that differ only by rounding error tie.

    >>> with_ties(torch.tensor([[0.1 + 0.2, 0.3]], dtype=torch.float64)).unique().numel()
    1
    """
    scale = values.abs().max()
    return values if scale == 0 else torch.round(values / scale, decimals=10) * scale


def split_best(rewards: Float[Tensor, "prefixes candidates rollouts"]) -> Float[Tensor, " prefixes"]:
    """Value of the best candidate without the winner's curse: choose on one half of the roll-outs, read on the other.

    The maximum of noisy means is too high. A choice made on independent roll-outs can only be too low. The true best
    lies between the two, in expectation. The result is the mean over both assignments of the halves, and over tied
    candidates; NaN with fewer than two roll-outs.
    """
    if rewards.shape[-1] < 2:
        return torch.full(rewards.shape[:1], math.nan, dtype=torch.float64)
    one, other = halves(rewards)

    def chosen_value(estimate: Tensor, value: Tensor) -> Tensor:  # (N, K), (N, K) → (N,)
        best = (estimate == estimate.amax(-1, keepdim=True)).double()
        return (best * value).sum(-1) / best.sum(-1)

    return (chosen_value(one, other) + chosen_value(other, one)) / 2


def halves(
    rewards: Float[Tensor, "prefixes candidates rollouts"],
) -> tuple[Float[Tensor, "prefixes candidates"], Float[Tensor, "prefixes candidates"]]:
    """Mean rewards of the first and of the second half of the roll-outs."""
    middle = rewards.shape[-1] // 2
    return rewards[..., :middle].double().mean(-1), rewards[..., middle:].double().mean(-1)


def moments(
    log_probs: Float[Tensor, "prefixes candidates"],
    scores: Float[Tensor, "prefixes candidates"],
    rewards: Float[Tensor, "prefixes candidates rollouts"],
) -> Float[Tensor, "prefixes 3"]:
    """Columns Cov_π(s, Q), Var_π(s) and an unbiased estimate of Var_π(Q), for each prefix.

    Var_π(Q̂) is too high by Σ π(1−π)·σ²/m, where σ²/m is the Monte Carlo variance of one candidate's mean. This term is
    subtracted (NaN with one roll-out). Cov_π(s, Q̂) needs no correction, because s does not depend on the roll-outs.
    """
    policy = torch.softmax(log_probs.double(), -1)
    q = rewards.double().mean(-1)
    s, q = (v - (policy * v).sum(-1, keepdim=True) for v in (scores.double(), q))
    noise = (policy * (1 - policy) * standard_error(rewards).square()).sum(-1)
    return torch.stack([(policy * s * q).sum(-1), (policy * s * s).sum(-1), (policy * q * q).sum(-1) - noise], -1)


def standard_error(
    rewards: Float[Tensor, "prefixes candidates rollouts"],
) -> Float[Tensor, "prefixes candidates"]:
    """Monte Carlo standard error of each candidate's mean reward; NaN with one roll-out."""
    m = rewards.shape[-1]
    if m < 2:
        return torch.full(rewards.shape[:2], math.nan, dtype=torch.float64)
    return rewards.double().std(-1) / math.sqrt(m)


def ratio(columns: Float[Tensor, "*samples 2"]) -> Float[Tensor, "*samples"]:
    """First column over the second; NaN if the second is 0."""
    denominator = columns[..., 1]
    return columns[..., 0] / denominator.where(denominator != 0, math.nan)


def correlation(columns: Float[Tensor, "*samples 3"]) -> Float[Tensor, "*samples"]:
    """Cov / √(Var · Var) of pooled ``moments``; NaN if the variance of Q is not above the noise.

    To first order in KL it is the gain in reward of guidance with s, as a share of the gain of guidance with Q itself
    at the same KL: d E[Q] = β·Cov_π(s, Q) and KL = β²·Var_π(s)/2. A scorer whose scores are all equal gains 0.
    """
    covariance, score_variance, value_variance = columns.unbind(-1)
    share = covariance / (score_variance * value_variance.where(value_variance > 0, math.nan)).sqrt()
    return share.where((score_variance > 0) | value_variance.isnan() | (value_variance <= 0), 0.0)


def clustered_interval(
    columns: Float[Tensor, "prefixes columns"],
    statistic: Callable[[Tensor], Tensor],
    clusters: Sequence[int],
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> Interval:
    """A statistic of column means with its 95 % percentile bootstrap interval; whole clusters are resampled.

    Args:
        columns: rows with a NaN are left out.
        statistic: maps column means (…, C) to values (…).
        clusters: the unit (prompt) of each row.
        seed: of the resampling.
        resamples: number of bootstrap samples.

    Returns:
        NaN with ``n`` = 0 if no row is left. Resamples in which the statistic is undefined are left out.
    """
    # 1. The complete rows, and a column of ones that counts them.
    complete = ~columns.isnan().any(-1)
    x = columns[complete].double()
    if not len(x):
        return EMPTY_INTERVAL
    unit = unit_numbers([cluster for cluster, keep in zip(clusters, complete.tolist(), strict=True) if keep])
    counted = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)  # (N, C + 1)
    # 2. Sums and counts of each unit: (U, C + 1).
    sums = torch.zeros(int(unit.max()) + 1, counted.shape[1], dtype=torch.float64).index_add_(0, unit, counted)
    # 3. The statistic of every resample of the units.
    found = []
    for units in resampled(len(sums), seed=seed, resamples=resamples):
        total = sums[units].sum(1)
        found.append(statistic(total[:, :-1] / total[:, -1:]))
    estimate = float(statistic(x.mean(0)))
    low, high = torch.nanquantile(torch.cat(found), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(mean=estimate, low=low, high=high, n=len(sums))
