"""The ``train.`` settings as trl's RewardConfig: our defaults, nothing ignored, nothing unknown."""

import dataclasses
import difflib
from pathlib import Path
from typing import Any

import torch
from transformers.integrations import get_reporting_integration_callbacks
from trl import RewardConfig

from rgtg.config import TrainSettings
from rgtg.errors import MissingExtraError, UsageError
from rgtg.training.bounds import as_number
from rgtg.training.checkpoint.manager import require_room
from rgtg.training.checkpoint.save import finish_saving

CHECKPOINTS = "checkpoints"

DEFAULTS: dict[str, Any] = {
    "learning_rate": 5e-5,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "num_train_epochs": 1,
    "warmup_steps": 0.05,  # below 1: a fraction of all steps
    "logging_steps": 10,
    "eval_strategy": "no",  # one evaluation at the end is always made
    "report_to": "none",
    "ddp_find_unused_parameters": False,  # every weight of a scorer is used; torch warns about looking
    "activation_checkpointing": False,  # trl's default trades time for memory that small scorers do not need
}

FIT_FOR_HEADS = {
    "learning_rate", "per_device_train_batch_size", "per_device_eval_batch_size", "num_train_epochs", "max_steps",
    "warmup_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "optim", "optim_args", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "gradient_accumulation_steps", "max_grad_norm", "bf16", "fp16", "tf32",
    "logging_strategy", "logging_steps", "logging_first_step", "log_level", "report_to", "run_name", "project",
    "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "full_determinism", "data_seed", "use_cpu",
    "dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "model_init_kwargs", "save_strategy", "save_steps", "save_total_limit",
}  # fmt: skip

HEAD_DEFAULTS: dict[str, Any] = {name: value for name, value in DEFAULTS.items() if name in FIT_FOR_HEADS} | {
    "learning_rate": 2e-3,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 64,
    "num_train_epochs": 6,
    "weight_decay": 0.1,
    "logging_steps": 50,
    "bf16": False,  # the head is tiny; fp32 costs nothing
}

_OWNED = {
    "output_dir": "use --output",
    "seed": "use --seed",
    "max_length": "use --max-length",
    "resume_from_checkpoint": "use --resume",
    "restore_callback_states_from_checkpoint": "what a resumed run needs is always restored",
    "disable_tqdm": "use --quiet",
    "trust_remote_code": "code from model repositories is never run",
    "eos_token": "set it in the base model's tokenizer, which the policy reads too",
    "pad_token": "set it in the base model's tokenizer",
    "chat_template_path": "set the chat template in the base model's tokenizer",
    "logging_nan_inf_filter": "a non-finite loss always stops the run",
    "dataset_num_proc": "the data is tokenised in this process",
    "remove_unused_columns": "rgtg makes the columns itself",
    "label_names": "labels come from the data",
    "do_train": "rgtg train always trains",
    "do_eval": "give --eval-pairs or --set eval_fraction",
    "do_predict": "use rgtg score",
    "push_to_hub": "upload the finished folder yourself",
    "fsdp": "start rgtg train with accelerate launch --use_fsdp (docs/scaling.md)",
    "fsdp_config": "start rgtg train with accelerate launch --use_fsdp (docs/scaling.md)",
    "deepspeed": "start rgtg train with accelerate launch --use_deepspeed (docs/scaling.md)",
}


def reward_config(settings: TrainSettings, max_length: int | None, defaults: dict[str, Any] = DEFAULTS) -> RewardConfig:
    """RewardConfig of a run: our defaults under what the user set.

    Raises:
        UsageError: an unknown name, one that another setting decides, or a value that trl refuses.
    """
    given = {name: as_number(name, value) for name, value in settings.train.items()}
    given.pop("model_init_kwargs", None)  # spent when the base is loaded
    for name in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        if name in given:  # the name most people know; transformers has renamed it
            given[name.replace("gradient", "activation")] = given.pop(name)
    values = (
        {"gradient_checkpointing": None, "activation_checkpointing": False}
        | _of_this_machine()
        | defaults
        | {"save_strategy": "steps" if settings.resume else "no"}
        | given
    )
    try:
        config = RewardConfig(
            output_dir=str(settings.output / CHECKPOINTS), seed=settings.seed, max_length=max_length,
            disable_tqdm=True, logging_nan_inf_filter=False, **values,
        )  # fmt: skip
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(f"the train settings are refused: {' '.join(str(error).split())}") from error
    _require_reporters(config.report_to)
    return config


def _require_reporters(names: list[str]) -> None:
    """Try what ``report_to`` names, before the work begins.

    Raises:
        UsageError: transformers knows no such place.
        MissingExtraError: its package is not installed.
    """
    for name in names:
        try:
            (callback,) = get_reporting_integration_callbacks([name])
            callback()
        except ValueError as error:
            raise UsageError(f"train.report_to={name}: {error}") from error
        except (RuntimeError, ImportError) as error:
            why = " ".join(str(error).split())
            raise MissingExtraError(
                f"train.report_to={name}: {why} Or leave it out: train-log.jsonl is written"
            ) from error


def require_known(train: dict[str, Any]) -> None:
    """Refuse names that RewardConfig has not, or that are decided elsewhere.

    Raises:
        UsageError: with the nearest name, or the setting to use.
    """
    known = {field.name for field in dataclasses.fields(RewardConfig) if field.init}
    for name in train:
        if name in _OWNED or name.startswith("hub_"):
            raise UsageError(f"train.{name} cannot be set here: {_OWNED.get(name, 'upload the folder yourself')}")
        if name not in known:
            near = difflib.get_close_matches(name, known - set(_OWNED), n=1)
            hint = f"did you mean train.{near[0]}?" if near else "expected an argument of trl's RewardConfig"
            raise UsageError(f"unknown setting train.{name}; {hint}")


def require_folder(output: Path) -> None:
    """Refuse a file as an output folder.

    Raises:
        UsageError: it is one.
    """
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file; give a folder that is new or empty")


def require_output(output: Path, resume: bool) -> None:
    """Refuse an output folder that cannot be used, now rather than after training.

    With ``resume``, the same run may have finished there before, or have been killed while it saved.

    Raises:
        UsageError: a folder that already holds a model or another run's checkpoints; or a file where
            checkpoints have to be.
    """
    if resume:
        finish_saving(output)
    taken = [name for name in ("config.json", "adapter_config.json", "rgtg.json") if (output / name).exists()]
    if taken and any(output.glob(".unfinished-*/rgtg.json")):
        raise UsageError(f"saving the scorer to {output} was interrupted: --resume finishes it")
    if taken and not (resume and (output / "train-report.json").is_file()):
        raise UsageError(f"--output {output} already holds a model ({taken[0]}); choose another folder or delete it")
    require_room(output / CHECKPOINTS)
    if not resume and any((output / CHECKPOINTS).rglob("checkpoint-*")):
        raise UsageError(f"--output {output} holds checkpoints of an unfinished run; add --resume or choose another")


def _of_this_machine() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "bf16": cuda and torch.cuda.is_bf16_supported(),
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": cuda,
    }
