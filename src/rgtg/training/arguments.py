"""Settings of a training run: validated before anything is loaded, and turned into trl's RewardConfig.

Our defaults apply under what the user sets; every setting has an effect, and unknown ones raise an error.
"""

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from transformers.integrations import get_reporting_integration_callbacks
from trl import RewardConfig

from rgtg.config import TrainSettings
from rgtg.config.training import OPTIONS
from rgtg.errors import MissingExtraError, UsageError
from rgtg.models.loading.pretrained import is_adapter, max_sequence_length
from rgtg.models.loading.scorer_info import ScorerInfo
from rgtg.training.checkpoint.manager import CHECKPOINTS
from rgtg.training.objectives import OBJECTIVES

DEFAULTS: dict[str, Any] = {
    "learning_rate": 5e-5,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "num_train_epochs": 1,
    "warmup_steps": 0.05,  # below 1: a fraction of all steps
    "logging_steps": 10,
    "eval_strategy": "no",  # one evaluation at the end is always made
    "report_to": "none",
    "ddp_find_unused_parameters": False,  # every weight of a scorer is used; with True, torch warns
    "activation_checkpointing": False,  # trl's default trades time for memory that small scorers do not need
}

HEAD_ARGUMENTS = {
    "learning_rate", "per_device_train_batch_size", "per_device_eval_batch_size", "num_train_epochs", "max_steps",
    "warmup_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "optim", "optim_args", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "gradient_accumulation_steps", "max_grad_norm", "bf16", "fp16", "tf32",
    "logging_strategy", "logging_steps", "logging_first_step", "log_level", "report_to", "run_name", "project",
    "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "full_determinism", "data_seed", "use_cpu",
    "dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "model_init_kwargs", "save_strategy", "save_steps", "save_total_limit",
}  # fmt: skip

HEAD_DEFAULTS: dict[str, Any] = {name: value for name, value in DEFAULTS.items() if name in HEAD_ARGUMENTS} | {
    "learning_rate": 2e-3,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 64,
    "num_train_epochs": 6,
    "weight_decay": 0.1,
    "logging_steps": 50,
    "bf16": False,  # the head is tiny; fp32 costs nothing
}

_DECIDED_ELSEWHERE = {
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

# Values that trl and transformers accept, but that would fail in the optimizer or the data loader, or train nothing.
_Rule = tuple[Callable[[float], bool], str]
_COUNT: _Rule = (lambda value: value >= 1 and value == int(value), "a whole number of at least 1")
_STEPS: _Rule = (
    lambda value: 0 < value < 1 or (value >= 1 and value == int(value)),
    "a whole number of at least 1, or a share of all steps between 0 and 1",
)
_NOT_NEGATIVE: _Rule = (lambda value: value >= 0, "a number of at least 0")
_POSITIVE: _Rule = (lambda value: value > 0, "a number above 0")
_DECAY: _Rule = (lambda value: 0 <= value < 1, "a number of at least 0 and below 1")
_RULES: dict[str, _Rule] = {
    "learning_rate": _POSITIVE,
    "weight_decay": _NOT_NEGATIVE,
    "adam_beta1": _DECAY,
    "adam_beta2": _DECAY,
    "adam_epsilon": _NOT_NEGATIVE,
    "max_grad_norm": _NOT_NEGATIVE,
    "num_train_epochs": _POSITIVE,
    "max_steps": (
        lambda value: value == -1 or (value >= 1 and value == int(value)),
        "a whole number of at least 1, or -1: train.num_train_epochs decides",
    ),
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "save_steps": _STEPS,
    "save_total_limit": _COUNT,
    "logging_steps": _STEPS,
    "eval_steps": _STEPS,
    "eval_delay": _NOT_NEGATIVE,
    "eval_accumulation_steps": _COUNT,
    "warmup_steps": _NOT_NEGATIVE,
    "dataloader_num_workers": (lambda value: value >= 0 and value == int(value), "a whole number of at least 0"),
}  # fmt: skip
_MAY_BE_NULL = {"save_total_limit", "eval_steps", "eval_accumulation_steps", "max_grad_norm"}

# Arguments of trl about logs, files, machines and data loading: a run may change them and still have the same result.
_WITHOUT_EFFECT = {
    "output_dir", "disable_tqdm", "resume_from_checkpoint", "use_cpu", "seed", "max_length", "debug", "run_name",
    "project", "trackio_space_id", "report_to", "include_num_input_tokens_seen", "include_tokens_per_second",
    "skip_memory_metrics", "prediction_loss_only", "ddp_timeout", "ddp_bucket_cap_mb", "ddp_backend",
}  # fmt: skip
_PREFIXES_WITHOUT_EFFECT = (
    "logging_", "log_", "save_", "dataloader_", "hub_", "push_to_hub", "local_", "batch_eval",
)  # fmt: skip


def validate_settings(settings: TrainSettings) -> None:
    """Check the settings of a run for everything that can be found before a model or data is loaded.

    Raises:
        UsageError: an unknown setting, an impossible value, or settings that do not go together; says what to do.
    """
    require_known(settings.train)
    require_values(settings.train)
    for wrong, why in (*_trunk_problems(settings), *_data_problems(settings), *_objective_problems(settings)):
        if wrong:
            raise UsageError(why)
    adapts = settings.trunk == "shared" or settings.lora is not None
    if adapts and is_adapter(settings.base):  # last, because it may ask the hub
        raise UsageError(
            f"{settings.base} is an adapter itself, and an adapter of an adapter could not be loaded: train it further "
            "without lora, or start from its base"
        )


def require_known(train: dict[str, Any]) -> None:
    """Check the names of ``train.`` settings.

    Raises:
        UsageError: trl has no such argument, or another setting decides it; names the nearest, or that setting.
    """
    known = {field.name for field in dataclasses.fields(RewardConfig) if field.init}
    for name in train:
        if name in _DECIDED_ELSEWHERE or name.startswith("hub_"):
            advice = _DECIDED_ELSEWHERE.get(name, "upload the folder yourself")
            raise UsageError(f"train.{name} cannot be set here: {advice}")
        if name not in known:
            near = difflib.get_close_matches(name, known - set(_DECIDED_ELSEWHERE), n=1)
            hint = f"did you mean train.{near[0]}?" if near else "expected an argument of trl's RewardConfig"
            raise UsageError(f"unknown setting train.{name}; {hint}")


def require_values(train: dict[str, Any]) -> None:
    """Check the values of ``train.`` settings.

    Raises:
        UsageError: names the setting and what is expected.
    """
    values = {name: as_number(name, value) for name, value in train.items() if name in _RULES}
    for name, value in values.items():
        if value is None and name in _MAY_BE_NULL:
            continue
        if name == "num_train_epochs" and _follows(values.get("max_steps"), _COUNT):  # then epochs are not used
            continue
        if not _follows(value, _RULES[name]):
            raise UsageError(f"train.{name} = {value}: expected {_RULES[name][1]}")


def _follows(value: Any, rule: _Rule) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return (isinstance(value, int) or math.isfinite(value)) and rule[0](value)


def as_number(name: str, value: Any) -> Any:
    """The value of a setting in the type of RewardConfig: YAML reads 5e-5 as text, and 1e2 steps are an integer.

    Raises:
        UsageError: it is text, but a number is expected.
    """
    kind = str({field.name: field.type for field in dataclasses.fields(RewardConfig)}.get(name, ""))
    if "str" in kind or not ("float" in kind or "int" in kind):
        return value
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError as error:
            raise UsageError(f"train.{name} = {value!r}: expected a number") from error
    whole = isinstance(value, float) and value.is_integer() and "float" not in kind
    return int(value) if whole else value


_Problems = list[tuple[bool, str]]  # whether it is one, and its message


def _trunk_problems(settings: TrainSettings) -> _Problems:
    row, own, shared = OBJECTIVES[settings.objective], settings.trunk == "own", settings.trunk == "shared"
    of_heads = ("head", "layer", "width", "rank", "states")
    head_settings = [name for name in of_heads if getattr(settings, name) is not None]
    head_settings += ["engine"] if settings.engine != "torch" else []
    return [
        (
            shared and settings.head == "vocab",
            "--trunk shared --head vocab is not supported: an adapter is read in one pass with its policy by a scalar "
            "head. Train a vocabulary head on the policy's own states (--trunk own --head vocab), or a language "
            "model that scores next tokens as a LoRA of its own (--objective farma or autoregressive --set lora.r=16)",
        ),
        (
            not own and bool(head_settings),
            f"{', '.join(head_settings[:1])} belongs to a head on the policy's own states: add --trunk own, or leave "
            "it out",
        ),
        *(_head_problems(settings) if own else []),
        (
            own and row.name == "autoregressive",
            "autoregressive trains a language model, whose log-probabilities are the scores: leave --trunk out "
            "(--set lora.r=16 keeps it small)",
        ),
        (
            own and row.name == "farma" and settings.head == "state",
            "farma compares a prefix with its best next token, which needs a vocabulary head: use --head vocab",
        ),
        (
            own and settings.head is not None and settings.head not in row.heads,
            f"{row.name} would train a vocabulary head on closing tokens only; use prefix-bt, or --head state",
        ),
        (
            shared and row.language_model,
            f"{row.name} trains a language model that scores next tokens, but an adapter is read in one pass with its "
            "policy by a scalar head: leave --trunk out and add --set lora.r=16"
            + (", or use --trunk own --head vocab" if row.name == "farma" else ""),
        ),
    ]


def _head_problems(settings: TrainSettings) -> _Problems:
    vocab = settings.head == "vocab"
    sizes = [value for value in (settings.width, settings.rank) if isinstance(value, int)]
    loading = set(settings.train.get("model_init_kwargs") or {}) - {"dtype"}
    unused = [name for name in settings.train if name not in HEAD_ARGUMENTS]
    return [
        (settings.head is None, "--trunk own needs --head state (read at each candidate) or --head vocab (read once)"),
        (settings.lora is not None, "lora adapts a model; a head on the policy's own states does not change the model"),
        (settings.rank is not None and not vocab, "rank is of the token table of a vocabulary head (--head vocab)"),
        (any(value < 1 for value in sizes), "width and rank must be at least 1"),
        (
            settings.states is not None and settings.states.is_file(),
            f"states: {settings.states} is a file; name a folder",
        ),
        (bool(loading), f"train.model_init_kwargs: a policy takes dtype only, not {', '.join(sorted(loading))}"),
        (
            int(os.environ.get("WORLD_SIZE", "1")) > 1,
            "a head is trained by one process: run rgtg train without torchrun",
        ),
        (
            bool(unused),
            f"train.{', '.join(unused[:1])} does not apply to a head on the policy's states, which is small and is "
            "trained by one process on states that are computed once",
        ),
    ]


def _data_problems(settings: TrainSettings) -> _Problems:
    row = OBJECTIVES[settings.objective]
    flags = " or ".join(f"--{kind} FILE" for kind in row.data)
    return [
        (
            "rollouts" not in row.data and bool(settings.rollouts or settings.eval_rollouts),
            f"{row.name} learns from pairs: give {flags}, not rollouts",
        ),
        (
            "pairs" not in row.data and bool(settings.pairs or settings.eval_pairs),
            f"{row.name} learns from completions with rewards, which pairs do not have: give {flags} (what rgtg "
            "generate and then rgtg score write)",
        ),
        (not settings.pairs and not settings.rollouts, f"{row.name} needs {flags}"),
        (bool(settings.pairs and settings.rollouts), "give --pairs or --rollouts, not both"),
        (
            bool((settings.pairs and settings.eval_rollouts) or (settings.rollouts and settings.eval_pairs)),
            "held-out data must be of the same kind as the training data: --eval-pairs with --pairs, --eval-rollouts "
            "with --rollouts",
        ),
    ]


def _objective_problems(settings: TrainSettings) -> _Problems:
    others = [name.replace("-", "_") for name in OPTIONS if name != settings.objective]
    given = [name for name in others if getattr(settings, name) is not None]
    prefix, cumulative, farma = settings.prefix_bt, settings.cumulative_mse, settings.farma
    centred = settings.train.get("center_rewards_coefficient") is not None
    return [
        (bool(given), f"{', '.join(given)} belongs to another objective than {settings.objective}: leave it out"),
        (
            settings.reference_scorer is not None and settings.objective != "prefix-bt",
            f"--reference-scorer weights the pairs of prefix-bt, not of {settings.objective}: leave it out",
        ),
        (
            prefix is not None and prefix.consistency is not None and settings.reference_scorer is None,
            "prefix_bt.consistency says what a reference scorer is asked: give --reference-scorer FOLDER",
        ),
        (
            cumulative is not None and cumulative.reward_range is not None and settings.rollouts is None,
            "cumulative_mse.reward_range scales the rewards of --rollouts; pairs have the labels 1 and 0",
        ),
        (
            centred and not OBJECTIVES[settings.objective].centred,
            f"train.center_rewards_coefficient has no meaning for {settings.objective}: leave it out",
        ),
        (
            farma is not None and "output_scale" in farma.model_fields_set and settings.trunk == "own",
            "farma.output_scale is of a language model's output layer; a head on the policy's states has a table "
            "of its own",
        ),
    ]


def defaults_of(settings: TrainSettings) -> dict[str, Any]:
    """Our ``train.`` defaults for the kind of scorer that is trained."""
    return HEAD_DEFAULTS if settings.trunk == "own" else DEFAULTS


def reward_config(settings: TrainSettings, max_length: int | None) -> RewardConfig:
    """RewardConfig of a run: our defaults under what the user set.

    Args:
        settings: of the run, validated.
        max_length: longest prompt + completion, in tokens.

    Raises:
        UsageError: a value that trl refuses, or an unknown ``report_to``.
        MissingExtraError: the package of a ``report_to`` is not installed.
    """
    given = {name: as_number(name, value) for name, value in settings.train.items()}
    given.pop("model_init_kwargs", None)  # used when the base is loaded
    for name in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        if name in given:  # the usual name; transformers has renamed it
            given[name.replace("gradient", "activation")] = given.pop(name)
    cuda = torch.cuda.is_available()
    values = (
        {
            "gradient_checkpointing": None,
            "activation_checkpointing": False,
            "bf16": cuda and torch.cuda.is_bf16_supported(),
            "use_cpu": not torch.accelerator.is_available(),
            "dataloader_pin_memory": cuda,
        }
        | defaults_of(settings)
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
    """Create the callbacks that ``report_to`` names once, before the work begins.

    Raises:
        UsageError: transformers has no such integration.
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


def longest_sequence(settings: TrainSettings, model: Any) -> int | None:
    """Longest prompt + completion in tokens: ``--max-length``, or else the context of the model.

    Raises:
        UsageError: ``--max-length`` exceeds the context.
    """
    limit = max_sequence_length(model)
    if settings.max_length and limit and settings.max_length > limit:
        raise UsageError(f"--max-length {settings.max_length} exceeds the context of {settings.base}: {limit} tokens")
    return settings.max_length or limit


def run_facts(
    settings: TrainSettings, config: RewardConfig, info: ScorerInfo, held_out_fingerprint: str | None
) -> dict[str, Any]:
    """What decides a run's result, as JSON holds it. Files count by their contents, not by their names.

    Args:
        settings: of the run.
        config: trl's arguments.
        info: of the scorer.
        held_out_fingerprint: of held-out data that is a file of its own.
    """
    names = {"objective", "trunk", "head", "layer", "width", "rank", "seed", "lora", "eval_fraction"}
    facts = settings.model_dump(mode="json", include=names) | {
        "base": info.base_fingerprint, "tokenizer": info.tokenizer_hash, "data": info.data_fingerprint,
        "held_out": held_out_fingerprint, "max_length": info.max_length,
        "reference_scorer": info.reference_fingerprint, "processes": config.world_size,
        "options": settings.options and settings.options.model_dump(mode="json"),
        "train": {
            name: value
            for name, value in config.to_dict().items()
            if (value is None or isinstance(value, str | int | float | list | dict))
            and name not in _WITHOUT_EFFECT
            and not name.startswith(_PREFIXES_WITHOUT_EFFECT)
        },
    }  # fmt: skip
    plain: dict[str, Any] = json.loads(json.dumps(facts))
    return plain


def summarize_arguments(args: RewardConfig) -> dict[str, Any]:
    """The training arguments of the model card, defaults included."""
    names = ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs",
             "max_steps", "warmup_steps", "lr_scheduler_type", "weight_decay", "max_grad_norm", "optim", "bf16", "fp16",
             "center_rewards_coefficient", "disable_dropout")  # fmt: skip
    return {name: getattr(args, name) for name in names} | {"processes": args.world_size}
