"""What the trainers of pairs share: one forward that reads every prefix of both completions."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rgtg.errors import UsageError
from rgtg.losses import last_score
from rgtg.models.ops.lm_head import scalar_head
from rgtg.training.data.dataset import COLUMNS, PrefixCollator, prepare
from rgtg.training.objectives import pair_losses
from rgtg.training.scores import PAIR_FIGURES, PairScores, align_pairs, pair_figures
from rgtg.training.trainers.base import PrefixTrainer


class PairwiseRewardTrainer(PrefixTrainer):
    """A ``trl.RewardTrainer`` whose loss sees the score of every prefix of both completions.

    Subclasses name the objective, or say what to minimise in `pair_losses`. The model is called as a whole, through
    whatever wraps it (DDP, FSDP, peft), and a hook on its scalar head keeps what it says at *every* position.
    """

    columns = (*COLUMNS, "trust")
    figure_names = PAIR_FIGURES

    def make_collator(self, pad_token_id: int, pad_to_multiple_of: int | None) -> Any:
        """Rows [chosen …; rejected …]."""
        return PrefixCollator(pad_token_id, pad_to_multiple_of)

    def pair_losses(self, scores: PairScores) -> tuple[Float[Tensor, " batch"], Bool[Tensor, " batch"]]:
        """Loss of each pair, and which pairs count in the mean."""
        return pair_losses(self.objective, scores, self.options, self.step)

    def read(self, model: Any, inputs: dict[str, Any]) -> tuple[PairScores, Any]:
        """Scores of the batch, and the model's own output."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        every, outputs = read_positions(model, self.accelerator.unwrap_model(model), ids, mask)
        return align_pairs(every, ids, mask, inputs["prompt_lengths"]), outputs

    def losses(
        self, model: Any, inputs: dict[str, Any]
    ) -> tuple[Float[Tensor, " batch"], Bool[Tensor, " batch"], Float[Tensor, ""] | float, Tensor, Any]:
        """Loss of each pair, which ones count, what is added to their mean, their figures, and the model's output."""
        scores, outputs = self.read(model, inputs)
        scores.trust = inputs.get("trust")
        losses, counted = self.pair_losses(scores)
        extra = 0.0
        if self.args.center_rewards_coefficient is not None:
            extra = self.args.center_rewards_coefficient * self.centre_penalty(scores)
        with torch.no_grad():
            figures = pair_figures(scores)
        return losses, counted, extra, figures, outputs

    def centre_penalty(self, scores: PairScores) -> Float[Tensor, ""]:
        """Mean of (r_w + r_l)² at the ends of the completions (RewardConfig's center_rewards_coefficient)."""
        ends = last_score(scores.chosen, scores.chosen_mask) + last_score(scores.rejected, scores.rejected_mask)
        return ends.square().mean()

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        return prepare(dataset, processing_class, args.max_length, dataset_name)


@contextmanager
def recording(head: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Collect what a module returns while the block runs."""
    seen: list[Tensor] = []
    handle = head.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


def read_positions(
    model: Any, unwrapped: Any, ids: Int[Tensor, "rows length"], mask: Int[Tensor, "rows length"]
) -> tuple[Float[Tensor, "rows length"], Any]:
    """Score at every position, and the model's own output, from one call of the *wrapped* model.

    Calling the wrapper is what lets DDP and FSDP see the forward pass and synchronise gradients.
    """
    with recording(scalar_head(unwrapped)) as seen:
        outputs = model(input_ids=ids, attention_mask=mask, use_cache=False, **counted_positions(mask))
    if not seen:
        raise UsageError("the model's scalar head cannot be observed (torch_compile?); train without it")
    return seen[-1][..., 0], outputs


def counted_positions(mask: Int[Tensor, "rows length"]) -> dict[str, Tensor]:
    """``position_ids`` that count from the first real token, where rows are padded on the left; else nothing."""
    return {} if bool(mask[:, 0].all()) else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
