"""Settings of ``rgtg audit`` and ``rgtg compare``."""

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rgtg.config.base import Settings
from rgtg.config.decoding import ModelSettings

_OF_MAKING = ("prefixes", "candidates", "per_candidate", "max_new_tokens", "rollouts_batch_size")
_OF_ROLLOUTS = ("prompts", "reward", "rollouts_file", "beta", "kl_nats", *_OF_MAKING)


class AuditSettings(Settings):
    """``rgtg audit``: on preference pairs, or on the candidates of prefixes (``rollouts``), or both.

    The fields from ``rollouts`` to ``kl_nats`` are of the audit of candidates. Roll-outs are made, or continued, where
    ``prompts`` and ``reward`` are given; else ``rollouts_file`` is read as it is.
    """

    scorer: str
    policy: str | None = Field(None, description="whose roll-outs are made, and whose states a head reads")
    pairs: str | None = None
    output: Path | None = None
    rollouts: bool = False
    prompts: Path | None = None
    reward: str | None = Field(None, description="held-out reward model of finished texts: a folder or hub id")
    rollouts_file: Path | None = Field(None, description="keeps the roll-outs; default: rollouts.jsonl in output")
    prefixes: int = Field(400, ge=1, description="prefixes that candidates are compared at")
    candidates: int = Field(10, ge=2, description="of the policy, at each prefix")
    per_candidate: int = Field(4, ge=1, description="roll-outs of each candidate")
    max_new_tokens: int = Field(64, ge=1, description="of a whole completion")
    rollouts_batch_size: int = Field(128, ge=1, description="roll-outs sampled together")
    beta: float | None = Field(None, description="at which guidance is judged; default: what costs kl_nats")
    kl_nats: float | None = Field(None, gt=0, description="per token, at which guidance is judged; default 0.1")
    batch_size: int = Field(8, ge=1)
    bootstrap: int = Field(1000, ge=100)
    on_bad: Literal["error", "skip"] = "error"
    dtype: str | None = None
    device: str | None = None

    @property
    def makes_rollouts(self) -> bool:
        """Whether roll-outs are made or continued, not only read."""
        return self.prompts is not None

    @model_validator(mode="after")
    def _something_to_do(self) -> Self:
        given = [name for name in _OF_ROLLOUTS if name in self.model_fields_set and getattr(self, name) is not None]
        if not self.rollouts and self.pairs is None:
            raise ValueError("say what to audit on: --pairs FILE, or --rollouts with --policy, --prompts and --reward")
        if not self.rollouts and given:
            raise ValueError(f"{', '.join(given)}: only --rollouts uses it")
        if self.rollouts:
            self._check_rollouts()
        return self

    def _check_rollouts(self) -> None:
        if (self.prompts is None) != (self.reward is None):
            raise ValueError("--prompts and --reward go together: they make roll-outs (neither reads --rollouts-file)")
        if self.makes_rollouts and self.policy is None:
            raise ValueError("--policy is required: whose roll-outs are made")
        if self.makes_rollouts and self.rollouts_file is None and self.output is None:
            raise ValueError("say where the roll-outs are kept: --rollouts-file FILE, or --output DIR")
        if not self.makes_rollouts and self.rollouts_file is None:
            raise ValueError("give --prompts, --reward and --policy to make roll-outs, or --rollouts-file to read some")
        fixed = [name for name in _OF_MAKING if name in self.model_fields_set]
        if not self.makes_rollouts and fixed:
            raise ValueError(
                f"{', '.join(fixed)}: the roll-outs file has its own; give --prompts and --reward to make one"
            )
        if self.beta is not None and self.kl_nats is not None:
            raise ValueError("give --beta, or the KL per token that chooses it (--kl-nats), not both")


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
