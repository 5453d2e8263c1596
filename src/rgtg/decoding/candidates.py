"""Which next tokens are considered: the policy's top-k, then its nucleus, or all."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def propose(
    policy_log_probs: Float[Tensor, "batch vocab"], *, top_k: int | None, top_p: float = 1.0
) -> tuple[Int[Tensor, "batch candidates"], Float[Tensor, "batch candidates"]]:
    """The k most likely next tokens V_k, cut to their nucleus.

    Of the top k, the smallest leading set whose probability, renormalised over the k, reaches ``top_p`` is kept (always
    the first); the others get a log-probability of -inf, so that rows stay rectangular.

    Args:
        policy_log_probs: (B, V) in nats; -inf for banned tokens.
        top_k: candidates per row; None, or at least V, takes all V, unsorted where nothing is cut.
        top_p: in (0, 1]; 1 keeps all k.

    Returns:
        Token ids and policy log-probabilities (nats, over the whole vocabulary), both (B, K), likeliest first (all V
        without a nucleus: in the order of their ids).

    >>> ids, log_probs = propose(torch.tensor([[0.1, 0.6, 0.3]]).log(), top_k=2)
    >>> ids.tolist()
    [[1, 2]]
    """
    k = policy_log_probs.shape[-1] if top_k is None else min(top_k, policy_log_probs.shape[-1])
    if k == policy_log_probs.shape[-1] and top_p == 1:
        ids = torch.arange(k, device=policy_log_probs.device).expand_as(policy_log_probs)
        return ids, policy_log_probs
    log_probs, ids = policy_log_probs.topk(k, dim=-1)
    if top_p < 1:
        probabilities = torch.softmax(log_probs.float(), -1)
        before = probabilities.cumsum(-1) - probabilities
        outside = before >= top_p
        outside[..., 0] = False
        log_probs = log_probs.masked_fill(outside, -torch.inf)
    return ids, log_probs
