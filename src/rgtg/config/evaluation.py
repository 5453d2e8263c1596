"""Settings of ``rgtg audit``, ``rgtg compare`` and ``rgtg sweep``."""

import difflib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rgtg.config.base import OnBad, TemplateKwargs, all_tokens
from rgtg.config.decoding import DecodingSettings, DeviceSettings, ModelSettings

_OF_MAKING = ("prefixes", "candidates", "per_candidate", "max_new_tokens", "rollouts_batch_size")
_OF_ROLLOUTS = ("prompts", "reward", "rollouts_file", "beta", "kl_nats", *_OF_MAKING)


class AuditSettings(DeviceSettings):
    """``rgtg audit``: on preference pairs, on the candidates of prefixes (``rollouts``), or both.

    The fields from ``rollouts`` to ``kl_nats`` belong to the audit of candidates. With ``prompts`` and ``reward``,
    roll-outs are made or continued; without them, ``rollouts_file`` is read.
    """

    scorer: str = Field(description="scorer to audit: folder or hub id")
    policy: str | None = Field(None, description="policy of the roll-outs, and of a head on its hidden states")
    pairs: str | None = Field(None, description="held-out preference pairs")
    output: Path | None = Field(None, description="folder for results, figures, settings and rejects")
    rollouts: bool = Field(False, description="audit the ranking of candidates by roll-outs")
    prompts: Path | None = Field(None, description='JSONL of {"prompt": text or messages}, from which roll-outs start')
    chat_template_kwargs: TemplateKwargs = None
    reward: str | None = Field(None, description="held-out reward model of finished texts: folder or hub id")
    rollouts_file: Path | None = Field(
        None, description="file of roll-outs, made, continued or read; default: rollouts.jsonl in output"
    )
    prefixes: int = Field(400, ge=1, description="prefixes whose candidates are compared")
    candidates: int = Field(10, ge=2, description="most likely next tokens at each prefix")
    per_candidate: int = Field(4, ge=1, description="roll-outs of each candidate")
    max_new_tokens: int = Field(64, ge=1, description="most tokens of a whole completion")
    rollouts_batch_size: int = Field(128, ge=1, description="roll-outs sampled together")
    beta: float | None = Field(None, description="guidance strength; default: the one that costs kl_nats")
    kl_nats: float | None = Field(None, gt=0, description="KL per token of the guided policy, in nats; default: 0.1")
    batch_size: int = Field(8, ge=1, description="completions per forward pass")
    bootstrap: int = Field(1000, ge=100, description="resamples for the intervals")
    on_bad: OnBad = "error"

    @property
    def makes_rollouts(self) -> bool:
        """Whether roll-outs are made or continued rather than read."""
        return self.prompts is not None

    @model_validator(mode="after")
    def _something_to_do(self) -> Self:
        given = [name for name in _OF_ROLLOUTS if name in self.model_fields_set and getattr(self, name) is not None]
        if not self.rollouts and self.pairs is None:
            raise ValueError(
                "nothing to audit on: give --pairs FILE, or --rollouts with --policy, --prompts and --reward"
            )
        if not self.rollouts and given:
            raise ValueError(f"{', '.join(given)}: needs --rollouts")
        if self.rollouts:
            self._check_rollouts()
        return self

    def _check_rollouts(self) -> None:
        if (self.prompts is None) != (self.reward is None):
            raise ValueError(
                "--prompts and --reward go together: give both to make roll-outs, or neither to read --rollouts-file"
            )
        if self.makes_rollouts and self.policy is None:
            raise ValueError("--policy is required to make roll-outs")
        if self.makes_rollouts and self.rollouts_file is None and self.output is None:
            raise ValueError("the roll-outs need a file: give --rollouts-file FILE, or --output DIR")
        if not self.makes_rollouts and self.rollouts_file is None:
            raise ValueError("give --prompts, --reward and --policy to make roll-outs, or --rollouts-file to read them")
        fixed = [name for name in _OF_MAKING if name in self.model_fields_set]
        if not self.makes_rollouts and fixed:
            raise ValueError(
                f"{', '.join(fixed)}: fixed by the roll-outs file; give --prompts and --reward to make another"
            )
        if not self.makes_rollouts and self.pairs is None and self.chat_template_kwargs:
            raise ValueError("chat_template_kwargs: fixed by the roll-outs file")
        if self.beta is not None and self.kl_nats is not None:
            raise ValueError("give --beta or --kl-nats, not both")


class GuidingScorer(BaseModel):
    """One of several scorers of a run. A list of betas makes one run for each."""

    model_config = ConfigDict(extra="forbid")

    scorer: str
    beta: float | list[float] = 1.0


class CompareRun(BaseModel):
    """Runs of a comparison: a method with its settings. Settings given as lists make a run for each combination.

    Besides these fields, every decoding setting (max_new_tokens, top_p, entropy_gate, …) is accepted.
    """

    model_config = ConfigDict(extra="allow")

    method: str
    label: str | None = None
    policy: str | None = Field(None, description="another policy for this run: a fine-tuned baseline")
    trained_with: list[str] = Field(default_factory=list, description="reward models that were used to train it")
    scorer: str | None = None
    scorers: list[GuidingScorer] | None = Field(None, min_length=1, description="several, each with its beta")
    beta: float | list[float] | None = None
    n: int | list[int] | None = None
    top_k: int | list[int | None] | None = None
    temperature: float | list[float] | None = None

    @field_validator("top_k", mode="before")
    @classmethod
    def _all_tokens(cls, top_k: Any) -> Any:
        return [all_tokens(one) for one in top_k] if isinstance(top_k, list) else all_tokens(top_k)

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.scorers and (self.scorer is not None or self.beta is not None):
            raise ValueError("scorers names every scorer with its own beta; leave scorer and beta out")
        require_decoding(self.model_extra or {})
        return self


def require_decoding(values: dict[str, Any]) -> dict[str, Any]:
    """Check that every name is a decoding setting.

    Raises:
        ValueError: one is not; suggests the nearest. Pydantic reports it.
    """
    known = set(DecodingSettings.model_fields) - {"seed", "method"}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *CompareRun.model_fields], n=1)
            raise ValueError(
                f"unknown setting {name}; " + (f"did you mean {near[0]}?" if near else "see docs/methods.md")
            )
    return values


class EvaluationSettings(ModelSettings):
    """What ``rgtg compare`` and ``rgtg sweep`` share: prompts, rewards, seeds, decoding settings, output."""

    prompts: Path = Field(description='JSONL of {"prompt": text or messages}')
    output: Path = Field(description="folder for results and settings")
    reward: str | None = Field(None, description="held-out reward model: folder or hub id")
    proxies: dict[str, str] = Field(default_factory=dict, description="name → reward model that runs may optimise")
    seeds: list[int] | None = Field(None, min_length=1, description="one completion of each prompt per seed")
    limit: int | None = Field(None, ge=1, description="use only the first prompts")
    top_k: int | None = Field(10, ge=1, description="candidates per step, or all")
    max_new_tokens: int = Field(64, ge=1, description="most tokens of a completion")
    temperature: float = Field(1.0, ge=0)
    chat_template_kwargs: TemplateKwargs = None
    decoding: dict[str, Any] = Field(default_factory=dict, description="more decoding settings of every run")
    batch_size: int = Field(8, ge=1)
    bootstrap: int = Field(1000, ge=100)
    permutations: int = Field(10_000, ge=100, description="sign flips of a paired test; all of them if there are fewer")
    force: bool = Field(False, description="replace parts that were made with other settings or models")

    @field_validator("top_k", mode="before")
    @classmethod
    def _all_tokens(cls, top_k: Any) -> Any:
        return all_tokens(top_k)

    @field_validator("decoding")
    @classmethod
    def _decoding(cls, values: dict[str, Any]) -> dict[str, Any]:
        if "beta" in values:
            raise ValueError("beta belongs to a scorer: give it there, not under decoding")
        return require_decoding(values)

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int] | None) -> list[int] | None:
        if seeds and (len(set(seeds)) < len(seeds) or min(seeds) < 0):
            raise ValueError("seeds must be different numbers, none below 0")
        return seeds

    @property
    def run_seeds(self) -> list[int]:
        """The seeds of every run that samples."""
        return self.seeds if self.seeds is not None else [self.seed]


class CompareSettings(EvaluationSettings):
    """``rgtg compare``: methods on the same prompts, measured by a reward that none of them used."""

    methods: list[CompareRun] = Field(min_length=1)
    baseline: str | None = Field(
        None, description="label of the run to compare with; default: the policy, for greedy runs the greedy policy"
    )
    traces: int = Field(2, ge=0, le=5, description="prompts whose completions the report shows token by token")


class SweepSettings(EvaluationSettings):
    """``rgtg sweep``: find the beta that meets a KL or reward target."""

    method: str = Field("pargs", description="a method with a beta")
    scorers: list[GuidingScorer] = Field(default_factory=list, description="several; the sweep multiplies their betas")
    target_kl: float | None = Field(None, gt=0, description="KL to reach, in nats")
    target_reward: float | None = Field(None, description="mean held-out reward to reach, on these prompts")
    kl_to: Literal["policy", "candidates"] = Field("policy", description="KL to the whole policy, or to its candidates")
    tolerance: float | None = Field(
        None, gt=0, description="in the unit of the target; default: 5 % of it, at least 0.01"
    )
    min_beta: float = Field(0.01, gt=0)
    max_beta: float = Field(100.0, gt=0)
    tries: int = Field(12, ge=2, description="most betas tried")

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if (self.target_kl is None) == (self.target_reward is None):
            raise ValueError("give one target: target_kl (nats) or target_reward")
        if self.min_beta >= self.max_beta:
            raise ValueError(f"min_beta {self.min_beta:g} must be below max_beta {self.max_beta:g}")
        if self.scorer is None and not self.scorers:
            raise ValueError("a sweep needs a scorer: give scorer, or scorers with one beta each")
        if self.scorer is not None and self.scorers:
            raise ValueError("give scorer, or scorers, not both")
        if any(isinstance(one.beta, list) for one in self.scorers):
            raise ValueError("in a sweep each scorer has one beta; the sweep multiplies them all")
        return self
