"""Settings of ``rgtg plan``."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from rgtg.config.base import Settings


class PlanSettings(Settings):
    """``rgtg plan``: which models on which devices, and how much is asked of them."""

    policy: str = Field(description="a size (70B), or a folder or hub id with a config.json")
    scorer: str | None = Field(None, description="the same, of what steers; none: only what needs no second model")
    hardware: str = Field(
        "cpu", description="h200x8; cpu or cuda measures this machine; or a file of such measurements"
    )
    save_hardware: Path | None = Field(None, description="where measured rates are kept")
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    prompts: int = Field(1000, ge=1)
    prompt_tokens: int = Field(256, ge=1, description="of a prompt, on average")
    new_tokens: int = Field(256, ge=1, description="of a completion, on average")
    k: int = Field(10, ge=1, description="candidates per step; default: the method's own")
    n: int = Field(10, ge=1, description="of best-of-n and cd-blockwise")
    segment_tokens: int = Field(16, ge=1, description="of a segment of cd-blockwise")
    cards_drawn: float = Field(2.6, ge=1, description="tokens that cards draws for one that stays; measured on stories")
    cards_scored: float = Field(
        0.16, gt=0, le=1, description="segments that cards scores for a token; measured likewise"
    )
    batch_size: int | None = Field(
        None, ge=1, description="prompts decoded together; default: the largest up to 64 that fits"
    )
    tensor_parallel: int | None = Field(None, ge=1, description="devices that share one copy; default: as few as fit")

    @field_validator("prompts", "prompt_tokens", "new_tokens", mode="before")
    @classmethod
    def _scientific(cls, value: Any) -> Any:
        """1e6 is a million."""
        try:
            return int(float(value)) if isinstance(value, str) and float(value).is_integer() else value
        except ValueError:
            return value

    @model_validator(mode="after")
    def _measured(self) -> Self:
        if self.save_hardware is not None and not self.hardware.lower().startswith(("cpu", "cuda")):
            raise ValueError("save_hardware keeps what was measured; use it with --hardware cpu or cuda")
        return self
