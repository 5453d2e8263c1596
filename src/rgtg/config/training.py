"""Settings of ``rgtg train``."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rgtg.config.base import Settings


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
