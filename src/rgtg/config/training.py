"""Settings of ``rgtg train``."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rgtg.config.base import OnBad, Settings, TemplateKwargs


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class LoraSettings(_Group):
    """LoRA as peft names it; the reward head is always trained in full."""

    r: int = Field(16, ge=1)
    lora_alpha: int = Field(32, ge=1)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"


class LengthControl(_Group):
    """Options of objectives whose loss can leave to length what length explains."""

    length_control: bool = Field(False, description="train as if length had won what it wins on its own in the pairs")
    length_offset: float | None = Field(
        None, description="nats per token of length_control; default: fitted to the training pairs"
    )

    @model_validator(mode="after")
    def _controlled(self) -> Self:
        if self.length_offset is not None and not self.length_control:
            raise ValueError("length_offset belongs to length_control: add length_control=true")
        return self


class FullBtSettings(LengthControl):
    """Options of ``full-bt``."""


class PrefixBtSettings(LengthControl):
    """Options of ``prefix-bt``."""

    position_weights: Literal["uniform", "linear", "inverse"] = Field(
        "uniform", description="1, i or 1 / i at prefix i"
    )
    prefixes: int | None = Field(None, ge=1, description="random prefixes per pair and step; none: all of them")
    consistency: Literal["pair", "prefix"] | None = Field(
        None, description="reference_scorer judges whole completions (pair, the default) or each prefix"
    )


class FarmaSettings(_Group):
    """Options of ``farma``."""

    output_scale: float = Field(1.0, gt=0, description="initial, of the output layer; other than 1 unties it")
    constraint_weight: float = Field(1.0, gt=0, description="of the constraint that ties prefixes to continuations")


class AutoregressiveSettings(_Group):
    """Options of ``autoregressive``."""

    beta_r: float = Field(0.05, gt=0, description="scale of log-probabilities in the loss; smaller: larger margins")


class ValueSettings(_Group):
    """Options of ``value``."""

    target: Literal["fudge", "q"] = Field("fudge", description="the completion's reward, or the next prefix's value")


class CumulativeMseSettings(_Group):
    """Options of ``cumulative-mse``."""

    reward_range: tuple[float, float] | None = Field(None, description="rewards that are scaled to 0 and 1")

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
    "full-bt": FullBtSettings,
    "farma": FarmaSettings,
    "autoregressive": AutoregressiveSettings,
    "value": ValueSettings,
    "cumulative-mse": CumulativeMseSettings,
    "tcrm": TcrmSettings,
}


def options_of(objective: str, given: Any = None) -> Any:
    """The options of an objective: those given, or the defaults; None if it has no options."""
    kind = OPTIONS.get(objective)
    return given if given is not None or kind is None else kind()


class TrainSettings(Settings):
    """``rgtg train``. ``train`` holds trl's RewardConfig arguments under their own names.

    ``head``, ``layer``, ``width``, ``rank`` and ``states`` belong to a head on the policy's hidden states (``trunk``
    own). An objective's own options are under its name, with _ for -.
    """

    pairs: str | None = Field(None, description="preference pairs: a file or hub id")
    rollouts: str | None = Field(None, description="completions with rewards, for value and cumulative-mse")
    base: str = Field(description="model to start from, usually the policy itself")
    trunk: Literal["separate", "shared", "own"] = Field(
        "separate",
        description="a separate model, an adapter on the policy, or a head on the policy's own hidden states",
    )
    head: Literal["state", "vocab"] | None = Field(None, description="with own: per candidate, or once for all tokens")
    layer: int | Literal["auto", "final"] | None = Field(
        None,
        description="with own: hidden state that the head reads; final: the output layer's, which every engine gives; "
        "auto (default) tries three",
    )
    engine: Literal["torch", "llama-cpp"] = Field(
        "torch",
        description="with own: whose states train the head; llama-cpp: those of a GGUF file, quantised as it is",
    )
    width: int | Literal["auto"] | None = Field(None, description="size of the head's hidden layer; auto tries two")
    rank: int | None = Field(None, description="rank of a vocabulary head's token table")
    states: Path | None = Field(
        None, description="with own: folder that keeps the policy's states, for more heads on the same completions"
    )
    objective: Objective = Field("prefix-bt", description="prefix-bt suits token-wise guidance")
    prefix_bt: PrefixBtSettings | None = None
    full_bt: FullBtSettings | None = None
    farma: FarmaSettings | None = None
    autoregressive: AutoregressiveSettings | None = None
    value: ValueSettings | None = None
    cumulative_mse: CumulativeMseSettings | None = None
    tcrm: TcrmSettings | None = None
    reference_scorer: str | None = Field(None, description="full-sequence scorer that weights the pairs of prefix-bt")
    output: Path = Field(description="new folder for the scorer")
    eval_pairs: str | None = Field(None, description="held-out pairs; default: a part of pairs")
    eval_rollouts: str | None = Field(None, description="held-out rollouts; default: a part of rollouts")
    eval_fraction: float = Field(0.05, ge=0, lt=1, description="part of the prompts held out if there is no eval data")
    max_length: int | None = Field(None, ge=2, description="longest prompt + completion, in tokens")
    chat_template_kwargs: TemplateKwargs = None
    on_bad: OnBad = "error"
    lora: LoraSettings | None = None
    resume: bool = Field(False, description="save checkpoints, and resume from the newest")
    force: bool = Field(False, description="with --resume: although data or settings have changed")
    train: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _force_resumes(self) -> "TrainSettings":
        if self.force and not self.resume:
            raise ValueError("--force resumes from checkpoints of other data or settings: add --resume")
        return self

    @property
    def options(self) -> Any:
        """The objective's own options, or their defaults; None if it has no options."""
        return options_of(self.objective, getattr(self, self.objective.replace("-", "_"), None))
