"""Settings of decoding: which models, how completions are drawn, what is done with them."""

import math
from pathlib import Path

from pydantic import Field, field_validator

from rgtg.config.base import Settings


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
