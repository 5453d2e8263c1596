"""Trainers of value functions: one forward pass compares every prefix of a completion with its reward."""

from typing import Any

from datasets import IterableDataset
from torch import Tensor

from rgtg.losses import completion_window
from rgtg.training.data.dataset import ROLLOUT_COLUMNS, RolloutCollator, prepare_rollouts
from rgtg.training.objectives import (
    ROLLOUT_FIGURES,
    RolloutScores,
    rollout_figures,
    rollout_losses,
    with_explained_variance,
)
from rgtg.training.trainers.reward import PairwiseRewardTrainer, ScorerTrainer, score_every_position


class RolloutTrainer(ScorerTrainer):
    """A trainer on completions with rewards; subclasses name the objective."""

    columns = ROLLOUT_COLUMNS
    figure_names = ROLLOUT_FIGURES
    mean_length = 1.0  # tokens of a training completion; stays 1 for a dataset that is streamed

    def make_collator(self, pad_token_id: int, pad_to_multiple_of: int | None) -> Any:
        """A collator with one row per completion."""
        return RolloutCollator(pad_token_id, pad_to_multiple_of)

    def losses(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Any, Tensor, Any]:
        """Losses (B,), all of which count (B,), no further term, figures (B, F), and the model's output."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]  # (B, L)
        unwrapped, passes = self.accelerator.unwrap_model(model), self.passes(model, inputs)
        every, outputs = score_every_position(model, unwrapped, ids, mask, passes)
        columns, inside = completion_window(mask, inputs["prompt_lengths"])
        scores = RolloutScores(every.gather(-1, columns), inside, inputs["rewards"], self.mean_length)
        losses, counted = rollout_losses(scores, self.options)
        return losses, counted, 0.0, rollout_figures(scores), outputs

    def summarize(self, means: dict[str, float]) -> dict[str, float]:
        """Add errors as shares of the rewards' variance."""
        return with_explained_variance(means)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        if not isinstance(dataset, IterableDataset):  # its rows are read only during training
            mean_length = prepare_rollouts(dataset, args.max_length, dataset_name)
            if dataset_name == "train":
                self.mean_length = mean_length
        return dataset


class ValueTrainer(RolloutTrainer):
    """Minimises `rgtg.losses.fudge_losses`, or with ``options.target`` "q" `rgtg.losses.bellman_losses`."""

    objective = "value"
    _tag_names = ("rgtg", "value")


class CumulativeTrainer(RolloutTrainer):
    """Minimises `rgtg.losses.cumulative_mse_losses` on completions with labels in [0, 1]."""

    objective = "cumulative-mse"
    _tag_names = ("rgtg", "cumulative-mse")


class CumulativePairTrainer(PairwiseRewardTrainer):
    """Minimises `rgtg.losses.cumulative_mse_losses` on pairs: chosen has the label 1, rejected 0."""

    objective = "cumulative-mse"
    _tag_names = ("rgtg", "cumulative-mse")
