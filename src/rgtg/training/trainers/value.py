"""The trainers of value functions: every prefix of a completion is held to a reward, in one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers.data.data_collator import DataCollatorMixin

from rgtg.data.rollouts import TokenizedRollout
from rgtg.errors import DataError, UsageError
from rgtg.losses import completion_window
from rgtg.training.data.dataset import pad_rows
from rgtg.training.objectives import rollout_losses
from rgtg.training.scores import ROLLOUT_FIGURES, RolloutScores, explained, rollout_figures
from rgtg.training.trainers.base import PrefixTrainer
from rgtg.training.trainers.reward import PairwiseRewardTrainer, read_positions

COLUMNS = ("completion_ids", "prompt_length", "reward")


@dataclass
class RolloutCollator(DataCollatorMixin):  # type: ignore[misc]
    """Stacks prompts with their completions, padded on the right.

    Example:
        >>> rows = [{"completion_ids": [1, 2, 3], "prompt_length": 1, "reward": 0.5}]
        >>> RolloutCollator(pad_token_id=0)(rows)["rewards"]
        tensor([0.5000])
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """One batch: input_ids and attention_mask (B, L), prompt_lengths (B,), rewards (B,)."""
        ids, mask = pad_rows([row["completion_ids"] for row in examples], self.pad_token_id, self.pad_to_multiple_of)
        lengths = torch.tensor([row["prompt_length"] for row in examples])
        rewards = torch.tensor([row["reward"] for row in examples], dtype=torch.float32)
        return {"input_ids": ids, "attention_mask": mask, "prompt_lengths": lengths, "rewards": rewards}


def rollouts_dataset(rollouts: Sequence[TokenizedRollout]) -> Dataset:
    """A dataset of tokenised rollouts: prompt and completion together, the prompt's length and the reward."""
    return Dataset.from_dict({
        "completion_ids": [[*rollout.prompt_ids, *rollout.completion_ids] for rollout in rollouts],
        "prompt_length": [len(rollout.prompt_ids) for rollout in rollouts],
        "reward": [rollout.reward for rollout in rollouts],
    })  # fmt: skip


class RolloutTrainer(PrefixTrainer):
    """A ``trl.RewardTrainer`` over completions with rewards; subclasses name the objective."""

    columns = COLUMNS
    figure_names = ROLLOUT_FIGURES
    mean_length = 1.0  # tokens of a training completion; unknown of a dataset that is streamed

    def make_collator(self, pad_token_id: int, pad_to_multiple_of: int | None) -> Any:
        """One row per completion."""
        return RolloutCollator(pad_token_id, pad_to_multiple_of)

    def losses(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Any, Tensor, Any]:
        """Loss of each completion; all count."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        every, outputs = read_positions(model, self.accelerator.unwrap_model(model), ids, mask)
        columns, inside = completion_window(mask, inputs["prompt_lengths"])
        scores = RolloutScores(every.gather(-1, columns), inside, inputs["rewards"], self.mean_length)
        losses, counted = rollout_losses(scores, self.options)
        with torch.no_grad():
            return losses, counted, 0.0, rollout_figures(scores), outputs

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Errors also as shares of the rewards' variance."""
        return explained(means)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        if isinstance(dataset, IterableDataset):
            return dataset  # its rows are seen only while training
        if not set(dataset.column_names) >= set(COLUMNS):
            raise UsageError(
                f"the {dataset_name} dataset has columns {sorted(dataset.column_names)}; expected {', '.join(COLUMNS)} "
                "(rgtg.training.trainers.value.rollouts_dataset makes it)"
            )
        tokens = 0
        for i, row in enumerate(dataset):
            length = len(row["completion_ids"])
            if not 0 < row["prompt_length"] < length:
                raise DataError(f"row {i} of the {dataset_name} dataset has an empty prompt or an empty completion")
            if args.max_length is not None and length > args.max_length:
                raise DataError(f"row {i} of the {dataset_name} dataset exceeds max_length {args.max_length}: {length}")
            tokens += length - row["prompt_length"]
        if dataset_name == "train":
            self.mean_length = tokens / len(dataset)
        return dataset


class ValueTrainer(RolloutTrainer):
    """Minimises `rgtg.losses.fudge_losses`, or with ``options.target`` "q" `rgtg.losses.bellman_losses`."""

    objective = "value"
    _tag_names = ("rgtg", "value")


class CumulativeTrainer(RolloutTrainer):
    """Minimises `rgtg.losses.cumulative_mse_losses` over completions with labels in [0, 1]."""

    objective = "cumulative-mse"
    _tag_names = ("rgtg", "cumulative-mse")


class CumulativePairTrainer(PairwiseRewardTrainer):
    """The same over pairs: the chosen completion has the label 1, the rejected one 0."""

    objective = "cumulative-mse"
    _tag_names = ("rgtg", "cumulative-mse")
