"""The table of objectives; their losses and figures over the prefix scores of a batch."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from rgtg.config.training import (
    AutoregressiveSettings,
    FarmaSettings,
    PrefixBtSettings,
    TcrmSettings,
    ValueSettings,
)
from rgtg.errors import UsageError
from rgtg.losses import (
    autoregressive_pair_losses,
    bellman_losses,
    completion_window,
    cumulative_mse_losses,
    farma_consistency_losses,
    fudge_losses,
    hold_last,
    last_score,
    prefix_bradley_terry_pair_losses,
    prefix_margins,
    prefixes_differ,
    sample_positions,
    tcrm_pair_losses,
    with_length,
)

DataKind = Literal["pairs", "rollouts"]
Losses = tuple[Float[Tensor, " batch"], Bool[Tensor, " batch"]]  # loss of each unit, and whether it counts in the mean
PERCENTS = (10, 25, 50, 75, 100)
PAIR_FIGURES = (*(f"accuracy_{percent}" for percent in PERCENTS), "margin")
ROLLOUT_FIGURES = (*(f"mse_{percent}" for percent in PERCENTS), "reward", "reward_square")


@dataclass(frozen=True)
class ObjectiveSpec:
    """One row of the table: the data it reads, whether it trains a language model, and the heads it can train."""

    name: str
    data: tuple[DataKind, ...]
    language_model: bool
    heads: tuple[Literal["state", "vocab"], ...]
    centred: bool = False  # RewardConfig's center_rewards_coefficient has a meaning


OBJECTIVES = {
    row.name: row
    for row in (
        ObjectiveSpec("prefix-bt", ("pairs",), False, ("state", "vocab"), centred=True),
        ObjectiveSpec("full-bt", ("pairs",), False, ("state",), centred=True),
        ObjectiveSpec("farma", ("pairs",), True, ("vocab",)),
        ObjectiveSpec("autoregressive", ("pairs",), True, ()),
        ObjectiveSpec("value", ("rollouts",), False, ("state", "vocab")),
        ObjectiveSpec("cumulative-mse", ("rollouts", "pairs"), False, ("state", "vocab")),
        ObjectiveSpec("tcrm", ("pairs",), False, ("state",), centred=True),
    )
}


@dataclass
class PairScores:
    """Scores of every prefix of a batch of pairs; column i − 1 is y_{1:i}.

    ``pair_weights`` is the weight of each judgement there (`rgtg.losses.agreement`). ``best_next`` is
    max_v V(y_{1:i}⊕v) of the chosen completions, for ``farma``.
    """

    chosen: Float[Tensor, "batch length"]
    rejected: Float[Tensor, "batch length"]
    chosen_mask: Bool[Tensor, "batch length"]
    rejected_mask: Bool[Tensor, "batch length"]
    differs: Bool[Tensor, "batch length"]
    pair_weights: Float[Tensor, "batch length"] | None = None
    best_next: Float[Tensor, "batch length"] | None = None

    @property
    def compared(self) -> Bool[Tensor, "batch length"]:
        """Positions at which the two prefixes differ, up to the end of the longer completion."""
        return self.differs & (self.chosen_mask | self.rejected_mask)


@dataclass
class RolloutScores:
    """Scores of every prefix of a batch of completions, and the completions' rewards (or labels).

    ``mean_length`` is the mean length of the training completions, in tokens. Losses that are sums over positions are
    divided by it, so that their size does not depend on the length of the data.
    """

    values: Float[Tensor, "batch length"]
    mask: Bool[Tensor, "batch length"]
    rewards: Float[Tensor, " batch"]
    mean_length: float = 1.0


def align_pairs(
    scores: Float[Tensor, "rows length"],
    ids: Int[Tensor, "rows length"],
    mask: Int[Tensor, "rows length"],
    prompt_lengths: Int[Tensor, " batch"],
) -> PairScores:
    """Cut the completions out of stacked rows [chosen …; rejected …], padded on either side."""
    columns, inside = completion_window(mask, prompt_lengths.repeat(2))
    return pair_scores(scores.gather(-1, columns), ids.gather(-1, columns), inside)


def pair_scores(
    scores: Float[Tensor, "rows length"], ids: Int[Tensor, "rows length"], inside: Bool[Tensor, "rows length"]
) -> PairScores:
    """Scores of completions [chosen …; rejected …] that start at column 0."""
    (chosen, rejected), (chosen_ids, rejected_ids) = scores.chunk(2), ids.chunk(2)
    chosen_mask, rejected_mask = inside.chunk(2)
    differs = prefixes_differ(chosen_ids, rejected_ids, chosen_mask, rejected_mask)
    return PairScores(chosen, rejected, chosen_mask, rejected_mask, differs)


def pair_losses(objective: str, scores: PairScores, options: Any, step: int | None) -> Losses:
    """Loss of each pair, and which pairs count in the mean.

    Args:
        objective: a name of the table.
        scores: of the batch.
        options: the objective's settings.
        step: of the optimizer. None in an evaluation: every prefix is used, every pair has the weight 1, and
            ``farma``'s two losses are added.
    """
    offset = getattr(options, "length_offset", None)
    if offset is None and getattr(options, "length_control", False):
        raise UsageError("length_control needs length_offset; rgtg.losses.fit_length_offset fits it to the pairs")
    if offset is not None and step is not None:  # an evaluation asks what the scorer says on its own
        scores = replace(
            scores,
            chosen=with_length(scores.chosen, scores.chosen_mask, offset),
            rejected=with_length(scores.rejected, scores.rejected_mask, offset),
        )
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
            return _farma_losses(scores, options, step), every
    won, lost = last_score(chosen, masks[0]), last_score(rejected, masks[1])
    if isinstance(options, AutoregressiveSettings):
        return autoregressive_pair_losses(won, lost, options.beta_r), every
    if objective == "cumulative-mse":
        ones, zeros = torch.ones_like(won), torch.zeros_like(lost)
        both = cumulative_mse_losses(chosen, ones, masks[0]) + cumulative_mse_losses(rejected, zeros, masks[1])
        return both / 2, every
    return softplus(lost - won), every  # full-bt


def _prefix_losses(scores: PairScores, options: PrefixBtSettings, *, training: bool) -> Losses:
    sampled = None
    if training and options.prefixes is not None:
        # torch's default generator: checkpoints hold its state, so a resumed run draws the same prefixes
        sampled = sample_positions(scores.compared, options.prefixes, torch.default_generator)
    return prefix_bradley_terry_pair_losses(
        scores.chosen, scores.rejected, scores.chosen_mask, scores.rejected_mask, scores.differs,
        weighting=options.position_weights, sampled=sampled, pair_weights=scores.pair_weights if training else None,
    )  # fmt: skip


def needs_best_next(objective: str, step: int | None) -> bool:
    """Whether this step needs max_v V(y_{1:i}⊕v): ``farma`` does in every second step, and in evaluations."""
    return objective == "farma" and (step is None or step % 2 == 1)


def _farma_losses(scores: PairScores, options: FarmaSettings, step: int | None) -> Float[Tensor, " batch"]:
    """full-bt in steps 0, 2, …; the constraint in steps 1, 3, …; their sum in evaluations."""
    margins = last_score(scores.chosen, scores.chosen_mask) - last_score(scores.rejected, scores.rejected_mask)
    preference = softplus(-margins)
    if not needs_best_next("farma", step):
        return preference
    assert scores.best_next is not None, "computed in these steps"
    constraint = options.constraint_weight * farma_consistency_losses(
        scores.chosen, scores.best_next, scores.chosen_mask
    )
    return constraint if step is not None else preference + constraint


def rollout_losses(scores: RolloutScores, options: Any) -> Losses:
    """Loss of each completion for ``value`` or ``cumulative-mse``; all of them count."""
    arguments = scores.values, scores.rewards, scores.mask
    every = torch.ones_like(scores.rewards, dtype=torch.bool)
    if not isinstance(options, ValueSettings):
        return cumulative_mse_losses(*arguments), every
    summed = bellman_losses(*arguments) if options.target == "q" else fudge_losses(*arguments)
    return summed / scores.mean_length, every


@torch.no_grad()
def pair_figures(scores: PairScores) -> Float[Tensor, "batch figures"]:
    """`PAIR_FIGURES` of each pair: whether chosen leads after 10 … 100 % of the longer completion; the last margin.

    A tie counts as one half. NaN if the two prefixes are still identical, which no scorer can rank.
    """
    margins = prefix_margins(scores.chosen, scores.rejected, scores.chosen_mask, scores.rejected_mask)
    columns = _columns_at_percents(scores.chosen_mask | scores.rejected_mask)
    leads = (margins.gather(-1, columns).sign() + 1) / 2
    leads = leads.masked_fill(~scores.differs.gather(-1, columns), torch.nan)
    return torch.cat([leads, margins[:, -1:]], dim=-1)


@torch.no_grad()
def rollout_figures(scores: RolloutScores) -> Float[Tensor, "batch figures"]:
    """`ROLLOUT_FIGURES` of each completion: (V(y_{1:i}) − r(y))² after 10 … 100 % of it; r and r²."""
    columns = _columns_at_percents(scores.mask)
    values, rewards = hold_last(scores.values, scores.mask).float(), scores.rewards.float()[:, None]
    return torch.cat([(values.gather(-1, columns) - rewards).square(), rewards, rewards.square()], dim=-1)


def with_explained_variance(figures: dict[str, float]) -> dict[str, float]:
    """Mean figures of rollouts, with the share of the rewards' variance that the scorer explains: 1 − mse / variance.

    The share is left out if all rewards are the same.

    >>> with_explained_variance({"mse_100": 0.5, "reward": 1.0, "reward_square": 3.0})
    {'mse_100': 0.5, 'reward': 1.0, 'explained_100': 0.75}
    """
    variance = figures.get("reward_square", 0.0) - figures.get("reward", 0.0) ** 2
    shares = {
        name.replace("mse", "explained"): 1 - value / variance
        for name, value in figures.items()
        if name.startswith("mse_") and variance > 1e-9
    }
    return {name: value for name, value in figures.items() if name != "reward_square"} | shares


def _columns_at_percents(inside: Bool[Tensor, "batch length"]) -> Int[Tensor, "batch percents"]:
    """Columns of the prefixes of ⌈p/100 · T⌉ tokens."""
    percents = torch.tensor(PERCENTS, device=inside.device)
    return (inside.sum(-1)[:, None] * percents + 99) // 100 - 1
