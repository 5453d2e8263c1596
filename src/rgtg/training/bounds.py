"""Values of ``train.`` settings that no training could use, found before anything is loaded.

trl's and transformers' own checks come when RewardConfig is made; these are what they leave to the optimiser, the
loader or the loop, which would end in a traceback or train nothing.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from trl import RewardConfig

from rgtg.errors import UsageError

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


def require_values(train: dict[str, Any]) -> None:
    """Refuse values out of bounds.

    Raises:
        UsageError: names the setting and what is expected.
    """
    values = {name: as_number(name, value) for name, value in train.items() if name in _RULES}
    steps = values.get("max_steps")
    for name, value in values.items():
        if value is None and name in _MAY_BE_NULL:
            continue
        if name == "num_train_epochs" and _fits(steps, _COUNT):  # then epochs have no say
            continue
        if not _fits(value, _RULES[name]):
            raise UsageError(f"train.{name} = {value}: expected {_RULES[name][1]}")


def _fits(value: Any, rule: _Rule) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return (isinstance(value, int) or math.isfinite(value)) and rule[0](value)


def as_number(name: str, value: Any) -> Any:
    """The value of a setting as RewardConfig wants it: YAML reads 5e-5 as text, and 1e2 steps are a whole number.

    Raises:
        UsageError: it is text, where a number is wanted.
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
