"""What all trainers of scorers share: a trl.RewardTrainer with guards and exact figures."""

import copy
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor
from trl import RewardConfig, RewardTrainer

from rgtg.config.training import options_of
from rgtg.errors import NonFiniteError, UsageError
from rgtg.losses import mean_of_counted
from rgtg.models.loading.policy import load_tokenizer
from rgtg.tokenization.encoding import ensure_pad_token
from rgtg.training.base_model import load_base, require_causal
from rgtg.training.objectives import OBJECTIVES
from rgtg.training.trainers.resumable import ResumableTrainer


class PrefixTrainer(ResumableTrainer, RewardTrainer):  # type: ignore[misc]
    """A ``trl.RewardTrainer`` whose loss sees the score of every prefix; subclasses say of what data.

    ``objective`` names the loss, ``columns`` are those of its dataset, ``figure_names`` what is logged beside the loss.
    """

    objective: ClassVar[str] = ""
    columns: ClassVar[tuple[str, ...]] = ()
    figure_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: Any, args: RewardConfig | None = None, *, options: Any = None, **kwargs: Any) -> None:
        """As ``trl.RewardTrainer``; datasets may hold texts or token ids.

        Args:
            model: a folder or hub id (a language model gets a fresh head, seeded by ``args.seed``), or a loaded model.
            args: trl's settings.
            options: the objective's own settings (`rgtg.config.training`); its defaults without.
            kwargs: trl's other arguments; ``processing_class`` is the tokenizer.

        Raises:
            UsageError: a model that pools before its head, or that looks ahead; a setting without a meaning here.
        """
        args = copy.copy(args) or RewardConfig(f"{name_of(model)}-Reward")
        row = OBJECTIVES.get(self.objective)
        if row and not row.centred and args.center_rewards_coefficient is not None:
            raise UsageError(f"center_rewards_coefficient has no meaning for {self.objective}: leave it out")
        self.options: Any = options_of(self.objective, options)
        tokenizer = kwargs.get("processing_class")
        if isinstance(model, str):
            model, loaded = self.load(model, args.seed, **(args.model_init_kwargs or {}))
            args.model_init_kwargs = None  # used up
            tokenizer = tokenizer or loaded
        tokenizer = tokenizer or load_tokenizer(name_of(model), "base model")
        self.check_model(model, tokenizer)
        collator = kwargs.pop("data_collator", None) or self.make_collator(
            tokenizer.pad_token_id, args.pad_to_multiple_of
        )
        kwargs |= {"processing_class": tokenizer, "data_collator": collator}
        with self.accepted(model), warnings.catch_warnings():
            # peft reads an attribute that transformers has renamed; nothing a user could act on
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            super().__init__(model, args, **kwargs)

    def load(self, source: str, seed: int, **kwargs: Any) -> tuple[Any, Any]:
        """The model to train, and its tokenizer."""
        return load_base(source, seed, **kwargs)

    def check_model(self, model: Any, tokenizer: Any) -> None:
        """Refuse a model that cannot be read at every position; give the tokenizer a padding token."""
        # Left alone, trl would pad with EOS, and a stock reward model then skips a real EOS.
        ensure_pad_token(tokenizer, model)
        require_causal(model)

    def accepted(self, model: Any) -> AbstractContextManager[None]:
        """While trl looks at the model: nothing to do for one that it knows."""
        return nullcontext()

    def make_collator(self, pad_token_id: int, pad_to_multiple_of: int | None) -> Any:
        """What makes batches of rows."""
        raise NotImplementedError

    def losses(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Any, Tensor, Any]:
        """Loss of each unit, which ones count, what is added to their mean, their figures, and the model's output."""
        raise NotImplementedError

    @property
    def step(self) -> int | None:
        """Optimiser steps done, while training; None in an evaluation."""
        return int(self.state.global_step) if self.model.training else None

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean of `losses` over the units of one batch.

        Raises:
            NonFiniteError: the loss is NaN or infinite on any process; names the step.
        """
        losses, counted, extra, figures, outputs = self.losses(model, inputs)
        loss = mean_of_counted(losses, counted) + extra
        self._record(losses.detach().masked_fill(~counted, torch.nan), loss.detach(), figures.detach())
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _record(self, losses: Tensor, loss: Tensor, figures: Tensor) -> None:
        """Keep figures per unit, so that the averages trl logs are exact whatever the size of the last batch."""
        total = self.accelerator.gather(loss.reshape(1))
        if not torch.isfinite(total).all():
            raise NonFiniteError(
                f"the loss is {total[~torch.isfinite(total)][0].item()} at step {self.state.global_step + 1}; lower "
                "train.learning_rate, set train.max_grad_norm, or use a dtype with more range"
            )
        mode = "train" if self.model.training else "eval"
        rows = self.accelerator.gather_for_metrics(torch.cat([losses[:, None], figures.to(losses)], dim=-1)).tolist()
        for name, column in zip(("loss", *self.figure_names), zip(*rows, strict=True), strict=True):
            if (mode, name) != ("train", "loss"):  # the Trainer already averages the training loss
                self._metrics[mode][name].extend(value for value in column if value == value)

    def figures_so_far(self) -> dict[str, list[float]]:
        """Figures per unit since the last logged line, by name."""
        return dict(self._metrics["train"])

    def take_up(self, figures: dict[str, list[float]]) -> None:
        """Go on with the figures of a checkpoint."""
        self._metrics["train"].update(figures)

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """What is logged of the means of the figures."""
        return means

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the averages since the last call; a figure that no unit has (all prefixes identical) is left out."""
        mode = "train" if self.model.training else "eval"
        means = {name: sum(seen) / len(seen) for name, seen in self._metrics[mode].items() if seen}
        self._metrics[mode].clear()
        self._metrics[mode].update({name: [value] for name, value in self.summary(means).items()})
        super().log(logs, start_time)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(self.columns)

    def _send_telemetry(self) -> None:
        """Nothing is sent anywhere: trl's usage pings are switched off."""


def name_of(model: Any) -> str:
    """A model's folder or hub id, or ``model``."""
    return model if isinstance(model, str) else str(getattr(model.config, "_name_or_path", "") or "model")
