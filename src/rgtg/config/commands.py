"""Settings of the verbs around the flow: data, demo, doctor, theory."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from rgtg.config.base import Settings
from rgtg.config.decoding import ModelSettings


class DataCheckSettings(Settings):
    """``rgtg data check``."""

    file: str
    tokenizer: str | None = Field(None, description="folder or hub id; needed for chat messages and lengths in tokens")
    max_length: int | None = Field(None, ge=2, description="longest prompt + completion, in tokens")
    on_bad: Literal["error", "skip"] = "error"
    rejects: Path | None = Field(None, description="where skipped rows go; default: rejects.jsonl beside the file")


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
