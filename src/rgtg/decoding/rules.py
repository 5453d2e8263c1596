"""How a token is chosen: guided log-probabilities, greedy, sample. Pure and short."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def guided_log_probs(
    candidate_log_probs: Float[Tensor, "batch candidates"],
    scores: Float[Tensor, "batch candidates"],
    beta: float,
    temperature: float = 1.0,
) -> Float[Tensor, "batch candidates"]:
    """Log-probabilities of π̃(v) ∝ [π(v)·exp(β·r(prefix⊕v))]^{1/T} over the candidates.

    Source: PARGS, arXiv 2406.07780, eq. 5 with a temperature on the guided distribution. At T = 0 all mass is on
    the first maximum of log π + β·r.

    Args:
        candidate_log_probs: (B, K) policy log-probabilities in nats; -inf excludes a candidate.
        scores: (B, K) scorer's scores; those of excluded candidates do not matter.
        beta: guidance strength; 0 is the policy cut to the candidates.
        temperature: ≥ 0.

    Returns:
        (B, K) fp32, in nats, each row summing to 1 in probability.

    >>> guided_log_probs(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.0, 1.0]]), beta=1.0).exp()
    tensor([[0.2689, 0.7311]])
    """
    out = candidate_log_probs == -torch.inf
    # float64, and the maximum at 0 before dividing: a huge beta or a tiny temperature must not overflow to NaN
    combined = candidate_log_probs.double() + beta * scores.double().masked_fill(out, 0.0)
    if temperature == 0:
        best = combined.argmax(-1, keepdim=True)
        return torch.full_like(combined, -torch.inf, dtype=torch.float32).scatter(-1, best, 0.0)
    below_best = combined - combined.amax(-1, keepdim=True)
    return torch.log_softmax(below_best / temperature, -1).float()


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
