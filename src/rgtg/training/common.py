"""What every kind of training run shares: its pairs, its report and small chores."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field
from transformers import PrinterCallback
from transformers.trainer_callback import ProgressCallback

from rgtg.config import TrainSettings
from rgtg.data import read_pairs, split_pairs, tokenize_pairs
from rgtg.data_rollouts import read_rollouts, tokenize_rollouts
from rgtg.errors import DataError, UsageError
from rgtg.models.policy import context_length
from rgtg.training.arguments import CHECKPOINTS
from rgtg.training.objectives import Data
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


@dataclass
class TrainData:
    """Tokenised pairs or rollouts of a run; ``held_out`` may be empty."""

    kind: Data
    train: list[Any]
    held_out: list[Any]
    fingerprint: str
    held_out_fingerprint: str | None = None  # of a file of their own

    def counts(self) -> dict[str, int]:
        """Numbers of the report."""
        sizes, none = (len(self.train), len(self.held_out)), (0, 0)
        pairs, rollouts = (sizes, none) if self.kind == "pairs" else (none, sizes)
        return {"pairs": pairs[0], "eval_pairs": pairs[1], "rollouts": rollouts[0], "eval_rollouts": rollouts[1]}


def longest(settings: TrainSettings, model: Any) -> int | None:
    """Longest prompt + completion in tokens: what was asked for, or the model's context."""
    limit = context_length(model.config)
    if settings.max_length and limit and settings.max_length > limit:
        raise UsageError(f"--max-length {settings.max_length} exceeds the context of {settings.base}: {limit} tokens")
    return settings.max_length or limit


def read_data(
    settings: TrainSettings, config: Any, tokenizer: Any, max_length: int | None, *, is_main: bool = True
) -> TrainData:
    """Training and held-out pairs, or rollouts.

    Raises:
        DataError: unusable rows, or none to train on.
        UsageError: evaluation is asked for during training, and nothing is held out.
    """

    def read(source: str, rejects: str) -> tuple[list[Any], str]:
        where = settings.output / rejects if is_main and settings.on_bad == "skip" else None
        with warnings.catch_warnings():
            if not is_main:  # one process of a torchrun says it for all
                warnings.simplefilter("ignore")
            return _read(settings, source, tokenizer, max_length, where)

    kind: Data = "pairs" if settings.rollouts is None else "rollouts"
    source = settings.pairs or settings.rollouts
    assert source is not None, "checked with the settings"
    everything, fingerprint = read(source, "rejects.jsonl")
    apart_fingerprint = None
    if apart := settings.eval_pairs or settings.eval_rollouts:
        train, (held_out, apart_fingerprint) = everything, read(apart, "eval-rejects.jsonl")
        shared = {unit.prompt for unit in train} & {unit.prompt for unit in held_out}
        if shared and is_main:
            warnings.warn(
                f"{len(shared)} prompts are in --{kind} and --eval-{kind}: evaluation is optimistic", stacklevel=2
            )
    else:
        train, held_out = split_pairs(everything, settings.eval_fraction, settings.seed)
    if not train:
        raise DataError(f"{source} leaves nothing to train on; add {kind} or lower eval_fraction")
    if config.eval_strategy != "no" and not held_out:
        raise UsageError(f"train.eval_strategy={config.eval_strategy} needs held-out {kind}; give --eval-{kind}")
    tokenize: Any = tokenize_pairs if kind == "pairs" else tokenize_rollouts
    return TrainData(kind, tokenize(train, tokenizer), tokenize(held_out, tokenizer), fingerprint, apart_fingerprint)


def _read(
    settings: TrainSettings, source: str, tokenizer: Any, max_length: int | None, rejects: Path | None
) -> tuple[list[Any], str]:
    """Pairs or rollouts of one file, and their fingerprint."""
    common: dict[str, Any] = {
        "tokenizer": tokenizer, "max_length": max_length, "on_bad": settings.on_bad, "rejects": rejects,
    }  # fmt: skip
    if settings.rollouts is None:
        pairs = read_pairs(source, **common)
        return pairs.pairs, pairs.fingerprint
    labels = settings.objective == "cumulative-mse"
    scale = settings.options.reward_range if labels else None
    rollouts = read_rollouts(source, labels=labels, reward_range=scale, **common)
    return rollouts.rows, rollouts.fingerprint


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
