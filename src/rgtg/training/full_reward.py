"""The trainer of ordinary reward models, which judge finished completions only."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import softplus

from rgtg.losses import prefix_margins
from rgtg.training.pairwise import PairScores, PairwiseRewardTrainer


class FullRewardTrainer(PairwiseRewardTrainer):
    """Minimises `rgtg.losses.bradley_terry_loss`: −log σ( r(x, y^w) − r(x, y^l) ), read at the last tokens."""

    _tag_names = ("rgtg", "full-bt")

    def pair_losses(self, scores: PairScores) -> tuple[Float[Tensor, " batch"], Bool[Tensor, " batch"]]:
        """−log σ(margin at the end); every pair counts."""
        margins = prefix_margins(scores.chosen, scores.rejected, scores.chosen_mask, scores.rejected_mask)[:, -1]
        return softplus(-margins), torch.ones_like(margins, dtype=torch.bool)
