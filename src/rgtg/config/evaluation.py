"""Settings of ``rgtg audit`` and ``rgtg compare``."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from rgtg.config.base import Settings
from rgtg.config.decoding import ModelSettings


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
