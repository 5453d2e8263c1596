"""How a token or a segment is chosen: guided log-probabilities, greedy, sample, accept. Pure and short."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def guided_log_probs(
    candidate_log_probs: Float[Tensor, "batch candidates"],
    scores: Float[Tensor, "batch candidates"],
    beta: float | Float[Tensor, "batch 1"],
    temperature: float = 1.0,
) -> Float[Tensor, "batch candidates"]:
    """Log-probabilities of π̃(v) ∝ [π(v)·exp(β·r(prefix⊕v))]^{1/T} over the candidates.

    Source: PARGS, arXiv 2406.07780, eq. 5 with a temperature on the guided distribution. At T = 0 all mass is on
    the first maximum of log π + β·r.

    Args:
        candidate_log_probs: (B, K) policy log-probabilities in nats; -inf excludes a candidate.
        scores: (B, K) scorer's scores; those of excluded candidates do not matter.
        beta: guidance strength, for all rows or one each; 0 is the policy cut to the candidates.
        temperature: ≥ 0.

    Returns:
        (B, K) fp32, in nats, each row summing to 1 in probability.

    >>> guided_log_probs(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.0, 1.0]]), beta=1.0).exp()
    tensor([[0.2689, 0.7311]])
    """
    # float64, and the maximum at 0 before dividing: a huge beta or a tiny temperature must not overflow to NaN
    combined = _sums(candidate_log_probs, scores, beta)
    if temperature == 0:
        best = combined.argmax(-1, keepdim=True)
        return torch.full_like(combined, -torch.inf, dtype=torch.float32).scatter(-1, best, 0.0)
    below_best = combined - combined.amax(-1, keepdim=True)
    return torch.log_softmax(below_best / temperature, -1).float()


def best_sums(
    candidate_log_probs: Float[Tensor, "batch candidates"],
    scores: Float[Tensor, "batch candidates"],
    beta: float | Float[Tensor, "batch 1"],
    k: int,
) -> Int[Tensor, "batch kept"]:
    """Indices (B, k) of the k largest log π(v) + β·r(v), largest first: FaRMA's candidates (arXiv 2502.04517).

    >>> best_sums(torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.0, 0.0, 2.0]]), beta=1.0, k=2)
    tensor([[2, 0]])
    """
    combined = _sums(candidate_log_probs, scores, beta)
    return combined.topk(min(k, combined.shape[-1]), -1).indices


def _sums(candidate_log_probs: Tensor, scores: Tensor, beta: float | Tensor) -> Tensor:
    """Log π(v) + β·r(v) in float64; what is excluded stays so whatever its score."""
    excluded = candidate_log_probs == -torch.inf
    return candidate_log_probs.double() + beta * scores.double().masked_fill(excluded, 0.0)


def entropy(log_probs: Float[Tensor, "batch vocab"]) -> Float[Tensor, " batch"]:
    """Entropy −Σ p·log p of each row in nats; what has probability zero adds nothing.

    >>> entropy(torch.tensor([[0.5, 0.5, 0.0]]).log())
    tensor([0.6931])
    """
    return -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(-1)


def greedy(log_probs: Float[Tensor, "batch candidates"]) -> Int[Tensor, " batch"]:
    """Index (B,) of the first maximum of each row."""
    return log_probs.argmax(-1)


def sample(log_probs: Float[Tensor, "batch candidates"], uniforms: Float[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """Draw one candidate per row by inverse CDF, from one uniform number per row.

    The j with F(j-1) ≤ u·F(K) < F(j), in float64; a candidate of probability zero is never drawn, and the same
    uniform gives the same draw on every device.

    Args:
        log_probs: (B, K) in nats.
        uniforms: (B,) in [0, 1), each from its row's own generator.
    """
    cumulative = log_probs.double().exp().cumsum(-1)
    reached = (uniforms.to(cumulative)[:, None] * cumulative[:, -1:]).contiguous()
    drawn = torch.searchsorted(cumulative, reached, right=True)[:, 0]
    # u·F(K) can round up to F(K) itself: take the last candidate that has any probability.
    last = (log_probs > -torch.inf).long().cumsum(-1).argmax(-1)
    return torch.minimum(drawn, last)


def accept_draft(
    target: Float[Tensor, "batch candidates"],
    draft: Float[Tensor, "batch candidates"],
    drafted: Int[Tensor, " batch"],
    uniforms: Float[Tensor, " batch"],
) -> tuple[Bool[Tensor, " batch"], Float[Tensor, "batch candidates"]]:
    """Accept a drafted candidate with probability min(1, p(d)/q(d)), and what to draw from where it is rejected.

    Accepted or else drawn from (p − q)₊ / Σ(p − q)₊, a token has distribution p exactly, whatever q. Source: Leviathan
    et al. 2023, arXiv 2211.17192, algorithm 1; here p is the *guided* distribution.

    Args:
        target: (B, K) log-probabilities of p in nats, normalised over the candidates.
        draft: (B, K) log-probabilities of q on the same candidates; what q gives to other tokens does not matter.
        drafted: (B,) index of the drafted candidate, or -1 for a token that is no candidate (p = 0).
        uniforms: (B,) in [0, 1).

    Returns:
        Whether each draft is accepted, and log-probabilities (B, K) of the recovered token where it is not.

    >>> p, q = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]]).log()
    >>> accept_draft(p, q, torch.tensor([0]), torch.tensor([0.4]))[0], accept_draft(p, q, torch.tensor([0]),
    ...     torch.tensor([0.6]))[1].exp()
    (tensor([True]), tensor([[0., 1.]]))
    """
    p, q = target.double().exp(), draft.double().exp()
    at = drafted.clamp(min=0)[:, None]
    accepted = (uniforms.to(q) * q.gather(1, at)[:, 0] < p.gather(1, at)[:, 0]) & (drafted >= 0)
    rest = (p - q).clamp(min=0)
    total = rest.sum(-1, keepdim=True)
    # p = q up to rounding: nothing is ever rejected there but by rounding, and p itself is right
    rest = torch.where(total > 0, rest / total.clamp(min=torch.finfo(torch.float64).tiny), p)
    return accepted, rest.log().float()


def segment_threshold(
    prompt_reward: Float[Tensor, " batch"], target: float, start: float, share: Float[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """The reward τ that a segment should reach: it rises from its start to the target as the completion grows.

    τ = r_0 + share·(r* − r_0), at most r*, with r_0 = (1 − start)·r(x) + start·r*. Source: CARDS, arXiv 2406.16306.

    Args:
        prompt_reward: (B,) r(x), of the prompt alone.
        target: r*, the reward of a finished completion.
        start: in [0, 1].
        share: (B,) tokens of the completion so far, the segment included, of all allowed.

    >>> segment_threshold(torch.tensor([0.0]), 4.0, 0.5, torch.tensor([0.25]))
    tensor([2.5000])
    """
    first = (1 - start) * prompt_reward + start * target
    return (first + share * (target - first)).clamp(max=target)


def accept_segment(
    rewards: Float[Tensor, " batch"],
    thresholds: Float[Tensor, " batch"],
    beta: float,
    uniforms: Float[Tensor, " batch"],
) -> Bool[Tensor, " batch"]:
    """Accept each row's segment with probability min(1, exp(β·(r − τ))). Source: CARDS, arXiv 2406.16306.

    The paper divides by its β, ours multiplies. Each row has its own reward, threshold and uniform number.

    >>> accept_segment(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 1.0]), 1.0, torch.tensor([0.9, 0.4]))
    tensor([ True, False])
    """
    return uniforms.double().log() < beta * (rewards.double() - thresholds.double())


def best_of_n_kl(n: int) -> float:
    """Upper bound ln n − (n−1)/n on the KL, in nats, of best-of-n to what it samples from (Beirami et al. 2024).

    >>> best_of_n_kl(1)
    0.0
    """
    return math.log(n) - (n - 1) / n
