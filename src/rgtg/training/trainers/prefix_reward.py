"""The trainer of scorers fit for token-wise guidance: every prefix of a pair is compared, in one forward pass."""

from rgtg.training.trainers.reward import PairwiseRewardTrainer


class PrefixRewardTrainer(PairwiseRewardTrainer):
    """Minimises `rgtg.losses.prefix_bradley_terry_loss` (PARGS, arXiv 2406.07780).

    −log σ( r(x, y^w_{1:i}) − r(x, y^l_{1:i}) ), mean over the positions i where the prefixes differ, then over pairs;
    ``options`` (`rgtg.config.training.PrefixBtSettings`) weighs positions and samples prefixes.

    Example (not run here)::

        trainer = PrefixRewardTrainer("policy-folder", RewardConfig("out"), train_dataset=pairs)
        trainer.train()
    """

    objective = "prefix-bt"
    _tag_names = ("rgtg", "prefix-bt")
