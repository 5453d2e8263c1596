"""Settings of decoding: which models, how completions are drawn, what is done with them."""

import math
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from rgtg.config.base import Settings


class DecodingSettings(Settings):
    """How completions are drawn; the names are those of Hugging Face and OpenAI where they have one."""

    method: str = Field("pargs", description="row of the methods table; see docs/methods.md")
    beta: float | list[float] = Field(
        1.0, description="guidance strength: it multiplies the score; 0 is the unguided policy. One per scorer"
    )
    top_k: int | None = Field(10, description="candidates per step; none for the whole vocabulary")
    entropy_gate: float | None = Field(
        None, ge=0, description="steer only where the policy's entropy, in nats, exceeds this"
    )
    top_p: float = Field(1.0, gt=0, le=1, description="keep the likeliest candidates holding this probability")
    temperature: float = Field(1.0, ge=0, description="of the guided distribution; 0 takes its maximum")
    max_new_tokens: int = Field(64, ge=1)
    min_new_tokens: int = Field(0, ge=0)
    stop: list[str] = Field(default_factory=list, description="texts that end a completion; not part of it")
    repetition_penalty: float = Field(1.0, gt=0)
    no_repeat_ngram_size: int = Field(0, ge=0)
    n: int = Field(10, ge=1, description="completions that best-of-n draws, segments that cd-blockwise draws")
    segment_length: int | None = Field(
        None, ge=1, description="tokens of a segment: all of cd-blockwise's (16), at most of cards' (64)"
    )
    min_segment: int = Field(4, ge=1, description="tokens that a segment of cards has at least")
    entropy_threshold: float = Field(3.0, ge=0, description="cards ends a segment at this entropy, in nats")
    reward_threshold: float | None = Field(None, description="cards: reward that a finished completion should reach")
    threshold_start: float = Field(
        0.5, ge=0, le=1, description="cards: first threshold, from the prompt's reward (0) to reward_threshold (1)"
    )
    retries: int = Field(20, ge=0, description="segments that cards rejects before it takes the best it has seen")
    draft_length: int | None = Field(None, ge=0, le=8, description="tokens drafted at once; none adapts to acceptance")

    @field_validator("beta")
    @classmethod
    def _finite(cls, beta: float | list[float]) -> float | list[float]:
        many = beta if isinstance(beta, list) else [beta]
        if not many or not all(math.isfinite(b) for b in many):
            raise ValueError("beta must be a finite number (or one for each scorer)")
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
    """``rgtg generate``; several scorers, with a beta each, steer together.

    The fields from ``batch_size`` to ``force`` are of a file of prompts, those from ``ray`` to ``cpus_per_actor`` of
    one that is completed on Ray.
    """

    scorer: str | list[str] | None = None  # type: ignore[assignment]
    prompt: str | None = None
    prompts: Path | None = None
    output: Path | None = None
    batch_size: int | None = Field(None, ge=1, description="prompts decoded together at most")
    batch_tokens: int = Field(
        8192, ge=1, description="tokens decoded together at most, of prompts and of all they may become"
    )
    on_bad: Literal["error", "skip"] = Field("error", description="refuse a file for its bad rows, or leave them out")
    output_format: Literal["auto", "records", "openai"] = Field(
        "auto", description="lines of the output: records of rgtg, or of an OpenAI batch; auto follows the prompts"
    )
    force: bool = Field(False, description="make anew an output of other settings, models or prompts")
    ray: bool = Field(False, description="complete a file of prompts by workers of a Ray cluster")
    address: str | None = Field(
        None,
        description="HOST:PORT of the cluster's head node, or auto; default: RAY_ADDRESS, else one on this machine",
    )
    actors: int | None = Field(
        None, ge=1, description="workers, each with models of its own; default: what the GPUs allow, else one per node"
    )
    gpus_per_actor: float | None = Field(None, ge=0, description="default: 1 where the cluster has GPUs, else 0")
    cpus_per_actor: int | None = Field(
        None, ge=1, description="also its threads; default: 1 beside a GPU, else an equal share of the cluster"
    )
    trace: bool = False
    device_map: str | dict[str, int | str] | None = Field(
        None, description="of the policy, in place of device: auto, or a device for each module"
    )
    tp_plan: Literal["auto"] | dict[str, str] | None = Field(
        None, description="of the policy, in place of both: auto splits its layers among the processes of a torchrun"
    )
    scorer_device: str | None = Field(None, description="of a scorer that is a model of its own; default: the policy's")
    scorer_device_map: str | dict[str, int | str] | None = Field(None, description="as device_map")
    scorer_tp_plan: Literal["auto"] | dict[str, str] | None = Field(None, description="as tp_plan")
    draft: str | None = Field(None, description="policy, prompt-lookup, or a small model with the policy's tokenizer")

    @field_validator("gpus_per_actor")
    @classmethod
    def _part_or_whole(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1 and gpus % 1:
            raise ValueError("a part of one GPU (0.5), or a whole number of them")
        return gpus


class ScoreSettings(Settings):
    """``rgtg score``."""

    scorer: str
    policy: str | None = Field(None, description="whose states a head reads, where it has moved since training")
    input: Path
    output: Path
    batch_size: int = Field(8, ge=1)
    dtype: str | None = None
    device: str | None = None
