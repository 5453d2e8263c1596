"""Settings of every command as pydantic models; imports no torch."""

import difflib
import math
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from rgtg.errors import UsageError


class Settings(BaseModel):
    """Base of every command's settings: unknown keys are refused with a suggestion."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True)

    seed: int = Field(0, ge=0, lt=2**63, description="seed of everything random in this run")

    @classmethod
    def resolve(
        cls, config: Path | None = None, overrides: list[str] | None = None, flags: dict[str, Any] | None = None
    ) -> Self:
        """Merge a YAML file, command-line flags that were given, and ``a.b=c`` overrides, later ones winning.

        Raises:
            UsageError: an unreadable file, an unknown key, a value that is not allowed.
        """
        merged = read_yaml(config) if config else {}
        merged |= {key: value for key, value in (flags or {}).items() if value is not None}
        for item in overrides or []:
            _set_dotted(merged, item)
        return validate(cls, merged)


class DecodingSettings(Settings):
    """How completions are drawn; the names are those of Hugging Face and OpenAI where they have one."""

    method: str = Field("pargs", description="row of the methods table; see docs/methods.md")
    beta: float = Field(1.0, description="guidance strength: it multiplies the score; 0 is the unguided policy")
    top_k: int | None = Field(10, description="candidates per step; none for the whole vocabulary")
    top_p: float = Field(1.0, gt=0, le=1, description="keep the likeliest candidates holding this probability")
    temperature: float = Field(1.0, ge=0, description="of the guided distribution; 0 takes its maximum")
    max_new_tokens: int = Field(64, ge=1)
    min_new_tokens: int = Field(0, ge=0)
    stop: list[str] = Field(default_factory=list, description="texts that end a completion; not part of it")
    repetition_penalty: float = Field(1.0, gt=0)
    no_repeat_ngram_size: int = Field(0, ge=0)
    n: int = Field(10, ge=1, description="completions that best-of-n draws")
    draft_length: int | None = Field(None, ge=0, le=8, description="tokens drafted at once; none adapts to acceptance")

    @field_validator("beta")
    @classmethod
    def _finite(cls, beta: float) -> float:
        if not math.isfinite(beta):
            raise ValueError("beta must be a finite number")
        return beta

    @field_validator("top_k")
    @classmethod
    def _some_candidates(cls, top_k: int | None) -> int | None:
        if top_k is not None and top_k < 1:
            raise ValueError("top_k must be at least 1 (leave it out for the whole vocabulary)")
        return top_k

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, stop: list[str]) -> list[str]:
        if any(not text for text in stop):
            raise ValueError("a stop text must not be empty")
        return stop


class ModelSettings(Settings):
    """Which models, and how they are held."""

    policy: str | None = None
    scorer: str | None = None
    dtype: str | None = Field(None, description="float32, bfloat16, float16; default: the checkpoint's own")
    device: str | None = Field(None, description="cpu, cuda, cuda:1 …; default: the first GPU, else the CPU")


class GenerateSettings(DecodingSettings, ModelSettings):
    """``rgtg generate``."""

    prompt: str | None = None
    prompts: Path | None = None
    output: Path | None = None
    batch_size: int = Field(8, ge=1)
    trace: bool = False
    scorer_device: str | None = Field(None, description="of a scorer that is a model of its own; default: the policy's")
    draft: str | None = Field(None, description="policy, prompt-lookup, or a small model with the policy's tokenizer")


class ScoreSettings(Settings):
    """``rgtg score``."""

    scorer: str
    policy: str | None = Field(None, description="whose states a head reads, where it has moved since training")
    input: Path
    output: Path
    batch_size: int = Field(8, ge=1)
    dtype: str | None = None
    device: str | None = None


class DataCheckSettings(Settings):
    """``rgtg data check``."""

    file: str
    tokenizer: str | None = Field(None, description="folder or hub id; needed for chat messages and lengths in tokens")
    max_length: int | None = Field(None, ge=2, description="longest prompt + completion, in tokens")
    on_bad: Literal["error", "skip"] = "error"
    rejects: Path | None = Field(None, description="where skipped rows go; default: rejects.jsonl beside the file")


class LoraSettings(BaseModel):
    """LoRA as peft names it; the reward head is always trained in full."""

    model_config = ConfigDict(extra="forbid")

    r: int = Field(16, ge=1)
    lora_alpha: int = Field(32, ge=1)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"


class TrainSettings(Settings):
    """``rgtg train``; ``train`` holds trl's RewardConfig arguments under their own names.

    ``head``, ``layer``, ``width`` and ``rank`` are of a head on the policy's own states (``trunk`` own).
    """

    pairs: str
    base: str
    trunk: Literal["separate", "shared", "own"] = Field(
        "separate", description="a model of its own, an adapter on the policy, or a head on the frozen policy's states"
    )
    head: Literal["state", "vocab"] | None = Field(None, description="read at each candidate, or once for all of them")
    layer: int | Literal["auto"] | None = Field(None, description="hidden state that the head reads; auto tries three")
    width: int | Literal["auto"] | None = Field(None, description="of the head's hidden layer; auto tries two")
    rank: int | None = Field(None, description="of a vocabulary head's token table")
    objective: Literal["prefix-bt", "full-bt"] = "prefix-bt"
    output: Path
    eval_pairs: str | None = None
    eval_fraction: float = Field(0.05, ge=0, lt=1, description="of the prompts, when no eval_pairs are given")
    max_length: int | None = Field(None, ge=2)
    on_bad: Literal["error", "skip"] = "error"
    lora: LoraSettings | None = None
    resume: bool = False
    train: dict[str, Any] = Field(default_factory=dict)


class AuditSettings(Settings):
    """``rgtg audit``."""

    scorer: str
    policy: str | None = Field(None, description="whose states a head reads, where it has moved since training")
    pairs: str
    output: Path | None = None
    batch_size: int = Field(8, ge=1)
    bootstrap: int = Field(1000, ge=100)
    on_bad: Literal["error", "skip"] = "error"
    dtype: str | None = None
    device: str | None = None


class CompareRun(BaseModel):
    """One row of a comparison: a method with its settings, or one row per beta."""

    model_config = ConfigDict(extra="forbid")

    method: str
    label: str | None = None
    scorer: str | None = None
    beta: float | list[float] | None = None
    n: int | None = Field(None, ge=1)
    top_k: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0)


class CompareSettings(ModelSettings):
    """``rgtg compare``: methods on the same prompts, scored by a reward that none of them used."""

    prompts: Path
    reward: str = Field(description="held-out reward model: a folder or hub id")
    methods: list[CompareRun] = Field(min_length=1)
    output: Path
    limit: int | None = Field(None, ge=1, description="use only the first prompts")
    top_k: int | None = Field(10, ge=1)
    max_new_tokens: int = Field(64, ge=1)
    temperature: float = Field(1.0, ge=0)
    batch_size: int = Field(8, ge=1)
    bootstrap: int = Field(1000, ge=100)


class DemoSettings(Settings):
    """``rgtg demo``."""

    output: Path = Path("demo-output")
    prompts: int = Field(100, ge=4, description="unseen prompts every method answers")
    corpus: int = Field(10_000, ge=16, description="past replies that the policy is trained on")
    pairs: int = Field(2_000, ge=16, description="labelled pairs that both scorers are trained on")
    audit_pairs: int = Field(400, ge=16, description="labelled pairs that both scorers are audited on")
    policy_steps: int = Field(600, ge=1, description="optimiser steps of the policy")
    betas: list[float] = Field(default=[1.0, 2.0, 4.0], min_length=1, description="guidance strengths compared")


class DoctorSettings(ModelSettings):
    """``rgtg doctor``; all but the seed is of ``--speed``."""

    speed: bool = False
    top_k: int = Field(10, ge=1, description="candidates per step")
    prompt_length: int = Field(128, ge=1, description="tokens of the random prompt")
    tokens: int = Field(32, ge=2, description="steps timed")
    repeats: int = Field(3, ge=1, description="paired repeats, after one that warms up")


class TheorySettings(Settings):
    """``rgtg theory``; the world has vocabulary^length completions."""

    vocabulary: int = Field(3, ge=2)
    length: int = Field(3, ge=2)
    beta: float = Field(2.0, gt=0)


SettingsT = TypeVar("SettingsT", bound=BaseModel)


def validate(cls: type[SettingsT], values: dict[str, Any]) -> SettingsT:
    """Build settings; a refusal names the flag, what is allowed, and the nearest known key.

    Raises:
        UsageError: with one line per problem.
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise UsageError("; ".join(_explain(cls, detail) for detail in error.errors())) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds one mapping.

    Raises:
        UsageError: unreadable, not YAML, or not a mapping.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the config {path}: {error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"the config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict):
        raise UsageError(f"the config {path} must hold settings as 'name: value', not a {type(loaded).__name__}")
    return loaded


def _set_dotted(target: dict[str, Any], item: str) -> None:
    dotted, equals, text = item.partition("=")
    if not equals or not dotted:
        raise UsageError(f"--set {item!r} is not of the form name=value (for example train.num_train_epochs=3)")
    *parents, last = dotted.split(".")
    for parent in parents:
        child = target.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UsageError(f"--set {item!r}: {parent} is a single value and has no {last}")
        target = child
    try:
        target[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {item!r}: {text!r} is not a YAML value") from error


def _explain(cls: type[BaseModel], detail: Any) -> str:
    name = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(detail["loc"][-1]), list(cls.model_fields), n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(sorted(cls.model_fields))}"
        return f"unknown setting {name}{hint}"
    if detail["type"] == "missing":
        return f"{name} is required (--{name.replace('_', '-')})"
    return f"{name} = {detail['input']!r}: {detail['msg'].removeprefix('Value error, ')}"
