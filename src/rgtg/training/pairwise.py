"""What the two reward trainers share: one forward that reads every prefix, guards and logged figures."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from trl import RewardConfig, RewardTrainer

from rgtg.errors import NonFiniteError, UsageError
from rgtg.losses import completion_window, mean_of_counted, prefix_margins, prefixes_differ
from rgtg.models.encoding import ensure_pad_token
from rgtg.models.policy import load_tokenizer
from rgtg.models.prefix_scorer import scalar_head
from rgtg.training.base_model import load_base, require_causal
from rgtg.training.dataset import PrefixCollator, prepare

PERCENTS = (10, 25, 50, 75, 100)


@dataclass
class PairScores:
    """Scores of every prefix of a batch of pairs, aligned so that column i − 1 is y_{1:i}."""

    chosen: Float[Tensor, "batch length"]
    rejected: Float[Tensor, "batch length"]
    chosen_mask: Bool[Tensor, "batch length"]
    rejected_mask: Bool[Tensor, "batch length"]
    differs: Bool[Tensor, "batch length"]


class PairwiseRewardTrainer(RewardTrainer):  # type: ignore[misc]
    """A ``trl.RewardTrainer`` whose loss sees the score of every prefix of both completions.

    Subclasses say what to minimise in `pair_losses`. The model is called as a whole, through whatever wraps it (DDP,
    FSDP, peft), and a hook on its scalar head keeps what it says at *every* position.
    """

    def __init__(self, model: Any, args: RewardConfig | None = None, **kwargs: Any) -> None:
        """As ``trl.RewardTrainer``; datasets may hold texts (prompt, chosen, rejected) or token ids.

        Args:
            model: a folder or hub id (a language model gets a fresh head, seeded by ``args.seed``), or a loaded model.
            args: trl's settings.
            kwargs: trl's other arguments; ``processing_class`` is the tokenizer.

        Raises:
            UsageError: a model that pools before its head, or that looks ahead.
        """
        args = copy.copy(args) or RewardConfig(f"{_name_of(model)}-Reward")
        tokenizer = kwargs.get("processing_class")
        if isinstance(model, str):
            model, loaded = load_base(model, args.seed, **(args.model_init_kwargs or {}))
            args.model_init_kwargs = None  # used up
            tokenizer = tokenizer or loaded
        tokenizer = tokenizer or load_tokenizer(_name_of(model), "base model")
        # Left alone, trl would pad with EOS, and a stock reward model then skips a real EOS.
        ensure_pad_token(tokenizer, model)
        require_causal(model)
        collator = kwargs.pop("data_collator", None) or PrefixCollator(tokenizer.pad_token_id, args.pad_to_multiple_of)
        kwargs |= {"processing_class": tokenizer, "data_collator": collator}
        with warnings.catch_warnings():
            # peft reads an attribute that transformers has renamed; nothing a user could act on
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            super().__init__(model, args, **kwargs)

    def pair_losses(self, scores: PairScores) -> tuple[Float[Tensor, " batch"], Bool[Tensor, " batch"]]:
        """Loss of each pair, and which pairs count in the mean."""
        raise NotImplementedError

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean of `pair_losses` over the pairs of one batch.

        Raises:
            NonFiniteError: the loss is NaN or infinite on any process; names the step.
        """
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        every, outputs = read_positions(model, self.accelerator.unwrap_model(model), ids, mask)
        scores = align_pairs(every, ids, mask, inputs["prompt_lengths"])
        losses, counted = self.pair_losses(scores)
        loss = mean_of_counted(losses, counted)
        if self.args.center_rewards_coefficient is not None:
            loss = loss + self.args.center_rewards_coefficient * self.centre_penalty(scores)
        self._record(losses.detach().masked_fill(~counted, torch.nan), loss.detach(), scores)
        return (loss, outputs) if return_outputs else loss

    def centre_penalty(self, scores: PairScores) -> Float[Tensor, ""]:
        """Mean of (r_w + r_l)² at the ends of the completions (RewardConfig's center_rewards_coefficient)."""
        chosen_end, rejected_end = (
            _last(scores.chosen, scores.chosen_mask),
            _last(scores.rejected, scores.rejected_mask),
        )
        return (chosen_end.float() + rejected_end.float()).square().mean()

    @torch.no_grad()
    def _record(self, losses: Tensor, loss: Tensor, scores: PairScores) -> None:
        """Keep figures per pair, so that the averages trl logs are exact whatever the size of the last batch."""
        figures = torch.cat([losses[:, None], pair_figures(scores).to(losses)], dim=-1)
        total = self.accelerator.gather(loss.reshape(1))
        if not torch.isfinite(total).all():
            raise NonFiniteError(
                f"the loss is {total[~torch.isfinite(total)][0].item()} at step {self.state.global_step + 1}; lower "
                "train.learning_rate, set train.max_grad_norm, or use a dtype with more range"
            )
        mode = "train" if self.model.training else "eval"
        rows = self.accelerator.gather_for_metrics(figures).tolist()
        names = ["loss", *(f"accuracy_{percent}" for percent in PERCENTS), "margin"]
        for name, column in zip(names, zip(*rows, strict=True), strict=True):
            if (mode, name) != ("train", "loss"):  # the Trainer already averages the training loss
                self._metrics[mode][name].extend(value for value in column if value == value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the averages since the last call; one that has no pair (all prefixes identical) is left out."""
        for metrics in self._metrics.values():
            for name in [name for name, values in metrics.items() if not values]:
                del metrics[name]
        super().log(logs, start_time)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: RewardConfig, dataset_name: str) -> Any:
        return prepare(dataset, processing_class, args.max_length, dataset_name)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["chosen_ids", "rejected_ids", "prompt_length"]

    def _send_telemetry(self) -> None:
        """Nothing is sent anywhere: trl's usage pings are switched off."""


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
    extra = {}
    if not bool(mask[:, 0].all()):  # left padding: count positions from the first real token
        extra["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with recording(scalar_head(unwrapped)) as seen:
        outputs = model(input_ids=ids, attention_mask=mask, use_cache=False, **extra)
    if not seen:
        raise UsageError("the model's scalar head cannot be observed (torch_compile?); train without it")
    return seen[-1][..., 0], outputs


def align_pairs(
    scores: Float[Tensor, "rows length"],
    ids: Int[Tensor, "rows length"],
    mask: Int[Tensor, "rows length"],
    prompt_lengths: Int[Tensor, " batch"],
) -> PairScores:
    """Cut the completions out of stacked rows [chosen …; rejected …], padded on either side."""
    columns, inside = completion_window(mask, prompt_lengths.repeat(2))
    chosen, rejected = scores.gather(-1, columns).chunk(2)
    chosen_ids, rejected_ids = ids.gather(-1, columns).chunk(2)
    chosen_mask, rejected_mask = inside.chunk(2)
    differs = prefixes_differ(chosen_ids, rejected_ids, chosen_mask, rejected_mask)
    return PairScores(chosen, rejected, chosen_mask, rejected_mask, differs)


def pair_figures(scores: PairScores) -> Float[Tensor, "batch figures"]:
    """Per pair: is the chosen one ahead after 10 … 100 % of the longer completion; and the margin at the end.

    A tie counts one half. NaN where the two prefixes are still identical, which no scorer can rank.
    """
    margins = prefix_margins(scores.chosen, scores.rejected, scores.chosen_mask, scores.rejected_mask)
    longest = (scores.chosen_mask | scores.rejected_mask).sum(-1)
    percents = torch.tensor(PERCENTS, device=margins.device)
    columns = (longest[:, None] * percents + 99) // 100 - 1  # ⌈f·T⌉ tokens
    ahead = (margins.gather(-1, columns).sign() + 1) / 2
    ahead = ahead.masked_fill(~scores.differs.gather(-1, columns), torch.nan)
    return torch.cat([ahead, margins[:, -1:]], dim=-1)


def _last(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.gather(-1, mask.sum(-1, keepdim=True) - 1)[:, 0]


def _name_of(model: Any) -> str:
    return model if isinstance(model, str) else str(getattr(model.config, "_name_or_path", "") or "model")
