"""The trainers of reward models that judge finished completions: full-bt, and TCRM, which adds coherent prefixes."""

from rgtg.training.trainers.reward import PairwiseRewardTrainer


class FullRewardTrainer(PairwiseRewardTrainer):
    """Minimises `rgtg.losses.bradley_terry_loss`: −log σ( r(x, y^w) − r(x, y^l) ), read at the last tokens."""

    objective = "full-bt"
    _tag_names = ("rgtg", "full-bt")


class CoherentRewardTrainer(PairwiseRewardTrainer):
    """Minimises `rgtg.losses.tcrm_pair_losses`: full-bt, with prefixes held to what the finished text is worth."""

    objective = "tcrm"
    _tag_names = ("rgtg", "tcrm")
