"""Settings of ``rgtg train``."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rgtg.config.base import Settings


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class LoraSettings(_Group):
    """LoRA as peft names it; the reward head is always trained in full."""

    r: int = Field(16, ge=1)
    lora_alpha: int = Field(32, ge=1)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"


class PrefixBtSettings(_Group):
    """Options of ``prefix-bt``."""

    position_weights: Literal["uniform", "linear", "inverse"] = Field(
        "uniform", description="1, i or 1 / i at prefix i"
    )
    prefixes: int | None = Field(None, ge=1, description="drawn anew for each pair and step; none reads them all")
    consistency: Literal["pair", "prefix"] | None = Field(
        None, description="what reference_scorer is asked about: whole completions (default) or each prefix"
    )


class FarmaSettings(_Group):
    """Options of ``farma``."""

    output_scale: float = Field(
        1.0, gt=0, description="of the language model's output layer at the start; other than 1 unties it"
    )
    constraint_weight: float = Field(
        1.0, gt=0, description="of the steps that hold prefixes to their best continuation"
    )


class AutoregressiveSettings(_Group):
    """Options of ``autoregressive``."""

    beta_r: float = Field(0.05, gt=0, description="scale of log-probabilities in the loss; smaller: larger margins")


class ValueSettings(_Group):
    """Options of ``value``."""

    target: Literal["fudge", "q"] = Field("fudge", description="the completion's reward, or the value one token on")


class CumulativeMseSettings(_Group):
    """Options of ``cumulative-mse``."""

    reward_range: tuple[float, float] | None = Field(None, description="rewards that become the labels 0 and 1")

    @model_validator(mode="after")
    def _ordered(self) -> "CumulativeMseSettings":
        if self.reward_range is not None and not self.reward_range[0] < self.reward_range[1]:
            raise ValueError("reward_range is [lowest, highest], and must not be empty")
        return self


class TcrmSettings(_Group):
    """Options of ``tcrm``."""

    lookahead_weight: float = Field(0.1, ge=0, description="of (r(prefix) - r(whole))²")
    smoothness_weight: float = Field(0.1, ge=0, description="of (r(prefix) - r(next prefix))²")


Objective = Literal["prefix-bt", "full-bt", "farma", "autoregressive", "value", "cumulative-mse", "tcrm"]
OPTIONS: dict[str, type[_Group]] = {
    "prefix-bt": PrefixBtSettings,
    "farma": FarmaSettings,
    "autoregressive": AutoregressiveSettings,
    "value": ValueSettings,
    "cumulative-mse": CumulativeMseSettings,
    "tcrm": TcrmSettings,
}


def options_of(objective: str, given: Any = None) -> Any:
    """The options of an objective: those given, or its defaults; None where it has none."""
    kind = OPTIONS.get(objective)
    return given if given is not None or kind is None else kind()


class TrainSettings(Settings):
    """``rgtg train``; ``train`` holds trl's RewardConfig arguments under their own names.

    ``head``, ``layer``, ``width`` and ``rank`` are of a head on the policy's own states (``trunk`` own). An objective's
    own options are under its name, with _ for -.
    """

    pairs: str | None = None
    rollouts: str | None = Field(None, description="completions with rewards, for value and cumulative-mse")
    base: str
    trunk: Literal["separate", "shared", "own"] = Field(
        "separate", description="a model of its own, an adapter on the policy, or a head on the frozen policy's states"
    )
    head: Literal["state", "vocab"] | None = Field(None, description="read at each candidate, or once for all of them")
    layer: int | Literal["auto"] | None = Field(None, description="hidden state that the head reads; auto tries three")
    width: int | Literal["auto"] | None = Field(None, description="of the head's hidden layer; auto tries two")
    rank: int | None = Field(None, description="of a vocabulary head's token table")
    objective: Objective = "prefix-bt"
    prefix_bt: PrefixBtSettings | None = None
    farma: FarmaSettings | None = None
    autoregressive: AutoregressiveSettings | None = None
    value: ValueSettings | None = None
    cumulative_mse: CumulativeMseSettings | None = None
    tcrm: TcrmSettings | None = None
    reference_scorer: str | None = Field(None, description="full-sequence scorer that prefix-bt trusts judgements by")
    output: Path
    eval_pairs: str | None = None
    eval_rollouts: str | None = None
    eval_fraction: float = Field(0.05, ge=0, lt=1, description="of the prompts, when nothing else is held out")
    max_length: int | None = Field(None, ge=2)
    on_bad: Literal["error", "skip"] = "error"
    lora: LoraSettings | None = None
    resume: bool = False
    force: bool = Field(False, description="resume although data or settings have changed")
    train: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _force_resumes(self) -> "TrainSettings":
        if self.force and not self.resume:
            raise ValueError("--force goes on from checkpoints of other data or settings: add --resume")
        return self

    @property
    def options(self) -> Any:
        """The objective's own options, defaults where none are given; None where it has none."""
        return options_of(self.objective, getattr(self, self.objective.replace("-", "_"), None))
