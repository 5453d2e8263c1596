"""Settings of the serving engine."""

from typing import Literal

from pydantic import Field

from rgtg.config.base import Settings


class EngineSettings(Settings):
    """How many requests the engine holds, and how it schedules them."""

    max_queue: int = Field(64, ge=0, description="requests that can wait; more get status 429")
    max_batch: int = Field(16, ge=1, description="sequences decoded together")
    max_tokens: int = Field(4096, ge=1, description="largest max_tokens of a request")
    prefill_chunk: int = Field(128, ge=1, description="prompt tokens prefilled between two decoding steps")
    prefix_cache_mib: int = Field(256, ge=0, description="memory of the prefix cache; 0 turns it off")
    max_candidates: int = Field(128, ge=1, le=128, description="largest top_k of scorers that read each candidate")
    on_nan: Literal["fail", "unguided"] = Field(
        "fail", description="if a scorer returns NaN: fail the request, or draw the token from the policy"
    )
