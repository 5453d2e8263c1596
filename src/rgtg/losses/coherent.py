"""TCRM: a full-sequence loss with regularisers that tie the score of each prefix to the scores that follow it."""

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import softplus

from rgtg.losses.pairwise import before_last, last_score, mean_over


def coherence_losses(
    scores: Float[Tensor, "batch length"],
    mask: Bool[Tensor, "batch length"],
    *,
    lookahead_weight: float,
    smoothness_weight: float,
) -> Float[Tensor, " batch"]:
    """The two regularisers of TCRM for one completion; both are zero if it has one token.

        1/(T−1) · Σ_{i<T}  w_l · ( r(y_{1:i}) − sg[ r(y) ] )²  +  w_s · ( r(y_{1:i}) − sg[ r(y_{1:i+1}) ] )²

    The first term (look-ahead) is Monte Carlo regression on the model's own final score, the second (smoothness) is one
    step of TD. sg stops the gradient, so that a prefix moves towards what follows and not the reverse. The optimum of a
    table is then E[ r(y) | y_{1:i} ] over the completions of the data, each with weight 1/(T−1). With a gradient into
    both sides, the scores would shrink.

    Args:
        scores: of every prefix.
        mask: true on the tokens of the completions.
        lookahead_weight: w_l; 0 leaves the term out.
        smoothness_weight: w_s; 0 leaves the term out.
    """
    scores = scores.float()
    final, ahead = last_score(scores, mask).detach()[:, None], scores.detach().roll(-1, -1)  # (B, 1), (B, T)
    terms = lookahead_weight * (scores - final).square() + smoothness_weight * (scores - ahead).square()
    return mean_over(terms, before_last(mask))


def tcrm_pair_losses(
    chosen_scores: Float[Tensor, "batch length"],
    rejected_scores: Float[Tensor, "batch length"],
    chosen_mask: Bool[Tensor, "batch length"],
    rejected_mask: Bool[Tensor, "batch length"],
    *,
    lookahead_weight: float,
    smoothness_weight: float,
) -> Float[Tensor, " batch"]:
    """Temporally coherent reward modelling (arXiv 2604.22981): full-bt plus `coherence_losses` of both completions.

        L = −log σ( r(x, y^w) − r(x, y^l) ) + ½ · ( C(y^w) + C(y^l) )

    Implemented from the abstract and a summary ("an MSE penalty aligning intermediate outputs with the final
    prediction", "an MSE penalty between adjacent tokens", minimisers that are conditional expectations). The place of
    the stop-gradient, the average over positions and the weights are ours and may differ from the paper.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[True, True]])
        >>> chosen, rejected = torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 2.0]])
        >>> tcrm_pair_losses(chosen, rejected, mask, mask, lookahead_weight=0.5, smoothness_weight=0.25)  # ln 2 + 3
        tensor([3.6931])
    """
    preference = softplus(last_score(rejected_scores, rejected_mask) - last_score(chosen_scores, chosen_mask))
    weights = {"lookahead_weight": lookahead_weight, "smoothness_weight": smoothness_weight}
    coherence = coherence_losses(chosen_scores, chosen_mask, **weights)
    return preference + (coherence + coherence_losses(rejected_scores, rejected_mask, **weights)) / 2
