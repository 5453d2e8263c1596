"""Settings of the serving engine."""

from typing import Literal

from pydantic import Field

from rgtg.config.base import Settings


class EngineSettings(Settings):
    """How many requests the engine holds, and how it shares the models among them."""

    max_queue: int = Field(64, ge=0, description="requests that may wait; more are refused with 429")
    max_batch: int = Field(16, ge=1, description="completions decoded at once")
    max_tokens: int = Field(4096, ge=1, description="most new tokens that one completion may ask for")
    prefill_chunk: int = Field(128, ge=1, description="prompt tokens that one model reads between two steps")
    prefix_cache_mib: int = Field(256, ge=0, description="memory for prompts and texts read before; 0 keeps none")
    max_candidates: int = Field(128, ge=1, le=128, description="largest top_k for scorers that read each candidate")
    on_nan: Literal["fail", "unguided"] = Field(
        "fail", description="a scorer that returns NaN fails the request, or leaves the token to the policy"
    )
