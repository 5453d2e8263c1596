"""The trainer of scorers fit for token-wise guidance: every prefix of a pair is compared, in one forward pass."""

from jaxtyping import Bool, Float
from torch import Tensor

from rgtg.losses import prefix_bradley_terry_pair_losses
from rgtg.training.pairwise import PairScores, PairwiseRewardTrainer


class PrefixRewardTrainer(PairwiseRewardTrainer):
    """Minimises `rgtg.losses.prefix_bradley_terry_loss` (PARGS, arXiv 2406.07780).

    −log σ( r(x, y^w_{1:i}) − r(x, y^l_{1:i}) ), mean over the positions i where the prefixes differ, then over pairs.

    Example (not run here)::

        trainer = PrefixRewardTrainer("policy-folder", RewardConfig("out"), train_dataset=pairs)
        trainer.train()
    """

    _tag_names = ("rgtg", "prefix-bt")

    def pair_losses(self, scores: PairScores) -> tuple[Float[Tensor, " batch"], Bool[Tensor, " batch"]]:
        """Mean of −log σ(margin) over each pair's differing prefixes; a pair without any does not count."""
        return prefix_bradley_terry_pair_losses(
            scores.chosen, scores.rejected, scores.chosen_mask, scores.rejected_mask, scores.differs
        )
