"""Objectives of scorers that score every next token at once: FaRMA and GenARM."""

from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from rgtg.losses.pairwise import before_last, mean_over


def farma_consistency_losses(
    values: Float[Tensor, "batch length"],
    best_next: Float[Tensor, "batch length"],
    mask: Bool[Tensor, "batch length"],
) -> Float[Tensor, " batch"]:
    """FaRMA's constraint (arXiv 2502.04517): the value of a prefix is the value of its best continuation.

        L = 1/(T−1) · Σ_{i<T} ½ · ( V(y_{1:i}) − sg[ max_v V(y_{1:i}⊕v) ] )²

    With a vocabulary head, V(y_{1:i}) = Q(h_{i−1})[y_i] and max_v V(y_{1:i}⊕v) = max_v Q(h_i)[v], so one forward pass
    gives both. v includes EOS (the completion ends here). The last token is left out: nothing follows EOS, and full-bt
    sets the value of a finished completion; the same holds where a completion was cut off. sg stops the gradient, so
    that values move towards what follows and not the reverse (the authors' code does not stop it).

    Args:
        values: V of every prefix of the chosen completions.
        best_next: max_v V(y_{1:i}⊕v) of every prefix; the last one is not used.
        mask: true on the tokens of the completions.

    Returns:
        One loss per completion; zero if it has one token.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[True, True]])
        >>> farma_consistency_losses(torch.tensor([[1.0, 9.0]]), torch.tensor([[3.0, 0.0]]), mask)
        tensor([2.])
    """
    return mean_over(0.5 * (values.float() - best_next.float().detach()).square(), before_last(mask))


def autoregressive_pair_losses(
    chosen_log_probs: Float[Tensor, " batch"], rejected_log_probs: Float[Tensor, " batch"], beta_r: float
) -> Float[Tensor, " batch"]:
    """GenARM's objective (arXiv 2410.08193): the reward of a completion is its log-probability under the scorer.

        L = −log σ( β_r · [ log π_r(y^w | x) − log π_r(y^l | x) ] ),   log π_r(y | x) = Σ_j log π_r(y_j | x, y_{<j})

    There is no reference model and no length normalisation. At the optimum, log π_r(y^w) − log π_r(y^l) is the log-odds
    of the preference divided by β_r: a smaller β_r gives larger margins.

    Args:
        chosen_log_probs: log π_r of the preferred completions, nats.
        rejected_log_probs: log π_r of the other completions, nats.
        beta_r: β_r > 0.

    Example:
        >>> import torch
        >>> autoregressive_pair_losses(torch.tensor([-2.0]), torch.tensor([-12.0]), beta_r=0.1)  # −log σ(1)
        tensor([0.3133])
    """
    return softplus(-beta_r * (chosen_log_probs.float() - rejected_log_probs.float()))


def token_log_probs(
    logits: Float[Tensor, "batch length vocabulary"], ids: Int[Tensor, "batch length"]
) -> Float[Tensor, "batch length"]:
    """Log π(id), in nats and fp32, of the token that follows each position.

    Example:
        >>> import torch
        >>> token_log_probs(torch.zeros(1, 1, 4), torch.tensor([[3]]))  # −ln 4
        tensor([[-1.3863]])
    """
    logits = logits.float()
    return logits.gather(-1, ids[..., None])[..., 0] - logits.logsumexp(-1)
