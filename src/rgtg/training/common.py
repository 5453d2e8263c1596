"""What every kind of training run shares: its pairs, its report and small chores."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field
from transformers import PrinterCallback
from transformers.trainer_callback import ProgressCallback

from rgtg.config import TrainSettings
from rgtg.data import TokenizedPair, read_pairs, split_pairs, tokenize_pairs
from rgtg.errors import DataError, UsageError
from rgtg.models.policy import context_length
from rgtg.training.arguments import CHECKPOINTS
from rgtg.types import Record


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
    pairs: int
    eval_pairs: int
    steps: int
    seconds: float
    pairs_per_second: float
    loss: float = Field(description="mean training loss, nats")
    evaluation: dict[str, float] = Field(description="held-out loss, accuracy at 10 … 100 %, margin; empty without")
    data_fingerprint: str
    device: str
    processes: int
    resumed_from: str | None = None
    layer: int | None = Field(None, description="of a head: the hidden state it reads")
    width: int | None = None
    rank: int | None = None
    states_seconds: float | None = Field(None, description="of ``seconds``, for the policy's pass over all pairs")
    choices: list[HeadChoice] = Field(default_factory=list, description="heads tried; the best one was kept")


@dataclass
class PairData:
    """Tokenised pairs of a run; ``held_out`` may be empty."""

    train: list[TokenizedPair]
    held_out: list[TokenizedPair]
    fingerprint: str


def longest(settings: TrainSettings, model: Any) -> int | None:
    """Longest prompt + completion in tokens: what was asked for, or the model's context."""
    limit = context_length(model.config)
    if settings.max_length and limit and settings.max_length > limit:
        raise UsageError(f"--max-length {settings.max_length} exceeds the context of {settings.base}: {limit} tokens")
    return settings.max_length or limit


def read_data(
    settings: TrainSettings, config: Any, tokenizer: Any, max_length: int | None, *, is_main: bool = True
) -> PairData:
    """Training and held-out pairs.

    Raises:
        DataError: unusable rows, or none to train on.
        UsageError: evaluation is asked for during training, and nothing is held out.
    """

    def read(source: str, rejects: str) -> Any:
        where = settings.output / rejects if is_main and settings.on_bad == "skip" else None
        with warnings.catch_warnings():
            if not is_main:  # one process of a torchrun says it for all
                warnings.simplefilter("ignore")
            return read_pairs(source, tokenizer=tokenizer, max_length=max_length, on_bad=settings.on_bad, rejects=where)

    pairs = read(settings.pairs, "rejects.jsonl")
    if settings.eval_pairs:
        train, held_out = list(pairs.pairs), list(read(settings.eval_pairs, "eval-rejects.jsonl").pairs)
        shared = {pair.prompt for pair in train} & {pair.prompt for pair in held_out}
        if shared and is_main:
            warnings.warn(
                f"{len(shared)} prompts are in --pairs and --eval-pairs: evaluation is optimistic", stacklevel=2
            )
    else:
        train, held_out = split_pairs(pairs.pairs, settings.eval_fraction, settings.seed)
    if not train:
        raise DataError(f"{settings.pairs} leaves no pair to train on; add pairs or lower eval_fraction")
    if config.eval_strategy != "no" and not held_out:
        raise UsageError(f"train.eval_strategy={config.eval_strategy} needs held-out pairs; give --eval-pairs")
    return PairData(tokenize_pairs(train, tokenizer), tokenize_pairs(held_out, tokenizer), pairs.fingerprint)


def keep_quiet(trainer: Any) -> None:
    """Take away the callbacks that write to stdout, which is for results."""
    for theirs in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(theirs)


def figures_of(metrics: dict[str, float]) -> dict[str, float]:
    """The figures of an evaluation that say how good the scorer is."""
    wanted = ("loss", "accuracy", "margin", "prefix_accuracy")
    short = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    return {name: float(value) for name, value in short.items() if name.startswith(wanted)}


def drop_empty_checkpoints(output: Path) -> None:
    """Remove the folder that the Trainer makes whether it saves or not."""
    checkpoints = output / CHECKPOINTS
    if checkpoints.is_dir() and not any(checkpoints.iterdir()):
        checkpoints.rmdir()


def shown(args: Any) -> dict[str, Any]:
    """The training arguments that decide a result, defaults included."""
    names = ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs",
             "max_steps", "warmup_steps", "lr_scheduler_type", "weight_decay", "max_grad_norm", "optim", "bf16", "fp16",
             "center_rewards_coefficient", "disable_dropout")  # fmt: skip
    return {name: getattr(args, name) for name in names} | {"processes": args.world_size}
