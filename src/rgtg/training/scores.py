"""What a batch of completions was scored, prefix by prefix, and the figures that are logged of it."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rgtg.losses import completion_window, hold_last, prefix_margins, prefixes_differ

PERCENTS = (10, 25, 50, 75, 100)


@dataclass
class PairScores:
    """Scores of every prefix of a batch of pairs, aligned so that column i − 1 is y_{1:i}.

    ``trust`` says how far each judgement is trusted there (`rgtg.losses.agreement`); ``best_next`` is
    max_v V(y_{1:i}⊕v) of the chosen completions, for ``farma``.
    """

    chosen: Float[Tensor, "batch length"]
    rejected: Float[Tensor, "batch length"]
    chosen_mask: Bool[Tensor, "batch length"]
    rejected_mask: Bool[Tensor, "batch length"]
    differs: Bool[Tensor, "batch length"]
    trust: Float[Tensor, "batch length"] | None = None
    best_next: Float[Tensor, "batch length"] | None = None

    @property
    def compared(self) -> Bool[Tensor, "batch length"]:
        """Positions where the two prefixes differ, up to the end of the longer completion."""
        return self.differs & (self.chosen_mask | self.rejected_mask)


@dataclass
class RolloutScores:
    """Scores of every prefix of a batch of completions, and the completions' rewards (or labels).

    ``mean_length`` is that of the training completions: losses that are sums over positions are divided by it, so that
    their size does not depend on the data's.
    """

    values: Float[Tensor, "batch length"]
    mask: Bool[Tensor, "batch length"]
    rewards: Float[Tensor, " batch"]
    mean_length: float = 1.0


PAIR_FIGURES = (*(f"accuracy_{percent}" for percent in PERCENTS), "margin")
ROLLOUT_FIGURES = (*(f"mse_{percent}" for percent in PERCENTS), "reward", "reward_square")


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


def pair_figures(scores: PairScores) -> Float[Tensor, "batch figures"]:
    """Per pair: is the chosen one ahead after 10 … 100 % of the longer completion; and the margin at the end.

    A tie counts one half. NaN where the two prefixes are still identical, which no scorer can rank.
    """
    margins = prefix_margins(scores.chosen, scores.rejected, scores.chosen_mask, scores.rejected_mask)
    columns = _at_percents(scores.chosen_mask | scores.rejected_mask)
    ahead = (margins.gather(-1, columns).sign() + 1) / 2
    ahead = ahead.masked_fill(~scores.differs.gather(-1, columns), torch.nan)
    return torch.cat([ahead, margins[:, -1:]], dim=-1)


def rollout_figures(scores: RolloutScores) -> Float[Tensor, "batch figures"]:
    """Per completion: (V(y_{1:i}) − r(y))² after 10 … 100 % of it; r and r², which `explained` needs."""
    columns = _at_percents(scores.mask)
    values, rewards = hold_last(scores.values, scores.mask).float(), scores.rewards.float()[:, None]
    return torch.cat([(values.gather(-1, columns) - rewards).square(), rewards, rewards.square()], dim=-1)


def explained(figures: dict[str, float]) -> dict[str, float]:
    """Mean figures of rollouts, with the share of the rewards' variance that the scorer explains: 1 − mse / variance.

    It is left out where all rewards are the same.

    >>> explained({"mse_100": 0.5, "reward": 1.0, "reward_square": 3.0})
    {'mse_100': 0.5, 'reward': 1.0, 'explained_100': 0.75}
    """
    variance = figures.get("reward_square", 0.0) - figures.get("reward", 0.0) ** 2
    shares = {
        name.replace("mse", "explained"): 1 - value / variance
        for name, value in figures.items()
        if name.startswith("mse_") and variance > 1e-9
    }
    return {name: value for name, value in figures.items() if name != "reward_square"} | shares


def _at_percents(inside: Bool[Tensor, "batch length"]) -> Int[Tensor, "batch percents"]:
    """Columns of ⌈p/100 · T⌉ tokens."""
    percents = torch.tensor(PERCENTS, device=inside.device)
    return (inside.sum(-1)[:, None] * percents + 99) // 100 - 1
