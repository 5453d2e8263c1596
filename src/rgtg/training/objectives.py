"""What each objective is trained on and by what, and its loss over the scores of a batch."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import softplus

from rgtg.config.training import (
    AutoregressiveSettings,
    FarmaSettings,
    PrefixBtSettings,
    TcrmSettings,
    ValueSettings,
)
from rgtg.losses import (
    autoregressive_pair_losses,
    bellman_losses,
    cumulative_mse_losses,
    farma_consistency_losses,
    fudge_losses,
    last_score,
    prefix_bradley_terry_pair_losses,
    sample_positions,
    tcrm_pair_losses,
)
from rgtg.training.scores import PairScores, RolloutScores

Data = Literal["pairs", "rollouts"]
Losses = tuple[Float[Tensor, " batch"], Bool[Tensor, " batch"]]


@dataclass(frozen=True)
class Objective:
    """One row of the table: the data it reads, whether a language model is trained, and the heads it can train."""

    name: str
    data: tuple[Data, ...]
    language_model: bool
    heads: tuple[Literal["state", "vocab"], ...]
    centred: bool = False  # RewardConfig's center_rewards_coefficient has a meaning


OBJECTIVES = {
    row.name: row
    for row in (
        Objective("prefix-bt", ("pairs",), False, ("state", "vocab"), centred=True),
        Objective("full-bt", ("pairs",), False, ("state",), centred=True),
        Objective("farma", ("pairs",), True, ("vocab",)),
        Objective("autoregressive", ("pairs",), True, ()),
        Objective("value", ("rollouts",), False, ("state", "vocab")),
        Objective("cumulative-mse", ("rollouts", "pairs"), False, ("state", "vocab")),
        Objective("tcrm", ("pairs",), False, ("state",), centred=True),
    )
}


def pair_losses(objective: str, scores: PairScores, options: Any, step: int | None) -> Losses:
    """Loss of each pair, and which pairs count in the mean.

    Args:
        objective: a name of the table.
        scores: of the batch.
        options: the objective's settings.
        step: of the optimiser; None evaluates: every prefix is read and trusted, and ``farma``'s two losses are added.
    """
    chosen, rejected = scores.chosen, scores.rejected
    masks = scores.chosen_mask, scores.rejected_mask
    every = torch.ones(len(chosen), dtype=torch.bool, device=chosen.device)
    match options:
        case PrefixBtSettings():
            return _prefix_losses(scores, options, training=step is not None)
        case TcrmSettings():
            weights = options.model_dump()
            return tcrm_pair_losses(chosen, rejected, *masks, **weights), every
        case FarmaSettings():
            return _farma_losses(scores, options, step)
    won, lost = last_score(chosen, masks[0]), last_score(rejected, masks[1])
    if isinstance(options, AutoregressiveSettings):
        return autoregressive_pair_losses(won, lost, options.beta_r), every
    if objective == "cumulative-mse":
        ones, zeros = torch.ones_like(won), torch.zeros_like(lost)
        both = cumulative_mse_losses(chosen, ones, masks[0]) + cumulative_mse_losses(rejected, zeros, masks[1])
        return both / 2, every
    return softplus(lost - won), every  # full-bt


def rollout_losses(scores: RolloutScores, options: Any) -> Losses:
    """Loss of each completion of ``value`` or ``cumulative-mse``; all of them count."""
    arguments = scores.values, scores.rewards, scores.mask
    every = torch.ones_like(scores.rewards, dtype=torch.bool)
    if not isinstance(options, ValueSettings):
        return cumulative_mse_losses(*arguments), every
    summed = bellman_losses(*arguments) if options.target == "q" else fudge_losses(*arguments)
    return summed / scores.mean_length, every


def _prefix_losses(scores: PairScores, options: PrefixBtSettings, *, training: bool) -> Losses:
    sampled = None
    if training and options.prefixes is not None:
        # torch's own generator: its state is in the checkpoints, so that a resumed run draws what it would have drawn
        sampled = sample_positions(scores.compared, options.prefixes, torch.default_generator)
    return prefix_bradley_terry_pair_losses(
        scores.chosen, scores.rejected, scores.chosen_mask, scores.rejected_mask, scores.differs,
        weighting=options.position_weights, sampled=sampled, trust=scores.trust if training else None,
    )  # fmt: skip


def reads_best_next(objective: str, step: int | None) -> bool:
    """Whether this step needs max_v V(y_{1:i}⊕v): every second one of ``farma``, and its evaluations."""
    return objective == "farma" and (step is None or step % 2 == 1)


def _farma_losses(scores: PairScores, options: FarmaSettings, step: int | None) -> Losses:
    """full-bt in steps 0, 2, …; the constraint in steps 1, 3, …; their sum in evaluations."""
    margins = last_score(scores.chosen, scores.chosen_mask) - last_score(scores.rejected, scores.rejected_mask)
    preference = softplus(-margins)
    every = torch.ones_like(preference, dtype=torch.bool)
    if not reads_best_next("farma", step):
        return preference, every
    assert scores.best_next is not None, "read in these steps"
    constraint = options.constraint_weight * farma_consistency_losses(
        scores.chosen, scores.best_next, scores.chosen_mask
    )
    return (constraint if step is not None else preference + constraint), every
