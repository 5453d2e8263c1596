"""What every kind of training run shares: its report and small chores."""

from pathlib import Path
from typing import Any

from pydantic import Field
from transformers import PrinterCallback
from transformers.trainer_callback import ProgressCallback

from rgtg.config import TrainSettings
from rgtg.errors import UsageError
from rgtg.models.loading.policy import context_length
from rgtg.training.arguments import CHECKPOINTS
from rgtg.types.base import Record


class HeadChoice(Record):
    """One head of a search over layers and widths, with its held-out figures (empty where none were held out)."""

    layer: int
    width: int
    seconds: float
    evaluation: dict[str, float]


class TrainReport(Record):
    """What a training run did; ``rgtg train --json`` prints it."""

    output: str
    objective: str
    base: str
    pairs: int = Field(description="trained on; 0 where the objective reads rollouts")
    eval_pairs: int
    rollouts: int = Field(0, description="completions with rewards trained on; 0 where the objective reads pairs")
    eval_rollouts: int = 0
    steps: int
    seconds: float
    pairs_per_second: float = Field(description="or completions with rewards per second")
    loss: float = Field(description="mean training loss, nats")
    evaluation: dict[str, float] = Field(
        description="held-out loss; of pairs accuracy at 10 … 100 % and margin, of rollouts squared error and share of "
        "variance explained; empty without"
    )
    data_fingerprint: str
    device: str
    processes: int
    resumed_from: str | None = None
    layer: int | None = Field(None, description="of a head: the hidden state it reads")
    width: int | None = None
    rank: int | None = None
    states_seconds: float | None = Field(None, description="of ``seconds``, for the policy's pass over all pairs")
    choices: list[HeadChoice] = Field(default_factory=list, description="heads tried; the best one was kept")

    def counts(self) -> dict[str, int]:
        """Pairs and rollouts, trained on and held out."""
        return self.model_dump(include={"pairs", "eval_pairs", "rollouts", "eval_rollouts"})


def longest(settings: TrainSettings, model: Any) -> int | None:
    """Longest prompt + completion in tokens: what was asked for, or the model's context."""
    limit = context_length(model.config)
    if settings.max_length and limit and settings.max_length > limit:
        raise UsageError(f"--max-length {settings.max_length} exceeds the context of {settings.base}: {limit} tokens")
    return settings.max_length or limit


def keep_quiet(trainer: Any) -> None:
    """Take away the callbacks that write to stdout, which is for results."""
    for theirs in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(theirs)


def figures_of(metrics: dict[str, float]) -> dict[str, float]:
    """The figures of an evaluation that say how good the scorer is."""
    wanted = ("loss", "accuracy", "margin", "prefix_accuracy", "mse", "explained")
    short = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    return {name: float(value) for name, value in short.items() if name.startswith(wanted)}


def drop_empty_checkpoints(output: Path) -> None:
    """Remove the folders that the Trainer makes whether it saves or not."""
    checkpoints = output / CHECKPOINTS
    for folder in (*sorted(checkpoints.rglob("*"), reverse=True), checkpoints):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def shown(args: Any) -> dict[str, Any]:
    """The training arguments that decide a result, defaults included."""
    names = ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs",
             "max_steps", "warmup_steps", "lr_scheduler_type", "weight_decay", "max_grad_norm", "optim", "bf16", "fp16",
             "center_rewards_coefficient", "disable_dropout")  # fmt: skip
    return {name: getattr(args, name) for name in names} | {"processes": args.world_size}
