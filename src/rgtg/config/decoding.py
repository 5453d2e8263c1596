"""Settings of ``rgtg generate`` and ``rgtg score``: models, sampling, files of prompts."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from rgtg.config.base import OnBad, Settings, TemplateKwargs, all_tokens
from rgtg.config.engines import EngineName, JobEngineName


class DecodingSettings(Settings):
    """How completions are sampled. Names are those of Hugging Face and OpenAI where they exist."""

    method: str = Field("pargs", description="decoding method; rgtg methods lists them")
    beta: float | list[float] = Field(
        1.0, description="guidance strength, multiplies the score; 0 is the unguided policy; repeatable, one per scorer"
    )
    top_k: int | None = Field(10, description="candidates per step, or all; default: the method's (10 for most)")
    entropy_gate: float | None = Field(None, ge=0, description="guide only if the policy's entropy (nats) exceeds this")
    kl_budget: float | None = Field(
        None, gt=0, description="in place of beta: nats per completion; beta adapts at every token to keep to it"
    )
    value_threshold: float | None = Field(
        None, description="vfd: the score that a token must reach; rgtg calibrate finds it"
    )
    abstain_below: float | None = Field(
        None, description="end a completion as abstained where its score falls below this; rgtg calibrate finds it"
    )
    top_p: float = Field(1.0, gt=0, le=1, description="keep the most likely candidates up to this total probability")
    temperature: float = Field(1.0, ge=0, description="temperature of the guided distribution; 0 is greedy")
    max_new_tokens: int = Field(64, ge=1, description="most tokens of a completion")
    min_new_tokens: int = Field(0, ge=0, description="fewest tokens of a completion")
    stop: list[str] = Field(
        default_factory=list, description="text that ends a completion, without being part of it; repeatable"
    )
    repetition_penalty: float = Field(1.0, gt=0)
    no_repeat_ngram_size: int = Field(0, ge=0)
    logit_bias: dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100)]] = Field(
        default_factory=dict, description="added to the policy's logits, by token id; -100 to 100"
    )
    n: int = Field(
        10,
        ge=1,
        description="completions that best-of-n and smc sample, segments that cd-blockwise samples, width of beam",
    )
    segment_length: int | None = Field(
        None,
        ge=1,
        description="tokens of a segment: exact for cd-blockwise (16), the most for cards (64), between two "
        "resamplings of smc (1; 16 with proposal policy) and two scores of beam (1)",
    )
    proposal: Literal["pargs", "policy"] = Field(
        "pargs", description="smc draws tokens by pargs, or from the policy, which needs fewer scores"
    )
    resample_finished: bool = Field(
        True, description="smc: resample finished completions with unfinished ones; false: keep their weight"
    )
    min_segment: int = Field(4, ge=1, description="fewest tokens of a segment of cards")
    entropy_threshold: float = Field(3.0, ge=0, description="cards ends a segment at this entropy, in nats")
    reward_threshold: float | None = Field(None, description="cards: target reward of a finished completion")
    threshold_start: float = Field(
        0.5, ge=0, le=1, description="cards: first threshold, from the prompt's reward (0) to reward_threshold (1)"
    )
    retries: int = Field(20, ge=0, description="segments that cards rejects before it takes the best of them")
    chat_template_kwargs: TemplateKwargs = None
    draft_length: int | None = Field(None, ge=0, le=8, description="tokens drafted at once; default: adapts")

    @field_validator("beta")
    @classmethod
    def _finite(cls, beta: float | list[float]) -> float | list[float]:
        many = beta if isinstance(beta, list) else [beta]
        if not many or not all(math.isfinite(b) for b in many):
            raise ValueError("beta must be a finite number (or one for each scorer)")
        return beta

    @field_validator("top_k", mode="before")
    @classmethod
    def _all_tokens(cls, top_k: Any) -> Any:
        return all_tokens(top_k)

    @field_validator("top_k")
    @classmethod
    def _some_candidates(cls, top_k: int | None) -> int | None:
        if top_k is not None and top_k < 1:
            raise ValueError("top_k must be at least 1 (all is the whole vocabulary)")
        return top_k

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, stop: list[str]) -> list[str]:
        if any(not text for text in stop):
            raise ValueError("a stop text must not be empty")
        return stop


class DeviceSettings(Settings):
    """Precision and device of the models."""

    dtype: str | None = Field(None, description="float32, bfloat16, float16; default: that of the checkpoint")
    device: str | None = Field(None, description="cpu, cuda, cuda:1 …; default: the first GPU, else the CPU")


class ModelSettings(DeviceSettings):
    """Which models, in which precision and on which device."""

    policy: str | None = Field(None, description="frozen language model: folder, GGUF file or hub id")
    scorer: str | None = Field(None, description="scorer that guides it: folder or hub id")
    engine: EngineName = Field("auto", description="auto: llama.cpp for a GGUF file where it is installed, else torch")
    threads: int | None = Field(
        None, ge=1, description="threads that compute; default: OMP_NUM_THREADS, else the cores"
    )


class GenerateSettings(DecodingSettings, ModelSettings):
    """``rgtg generate``. Several scorers guide together, each with its own beta.

    The fields from ``batch_size`` to ``force`` apply to a file of prompts, those from ``ray`` to ``cpus_per_actor`` to
    a file of prompts that is completed on Ray.
    """

    scorer: str | list[str] | None = Field(  # type: ignore[assignment]
        None, description="scorer that guides it: folder or hub id; repeatable, with a --beta each"
    )
    engine: JobEngineName = Field(  # type: ignore[assignment]
        "auto",
        description="auto: llama.cpp for a GGUF file where it is installed, else torch; vllm: with --ray, in vLLM's "
        "environment",
    )
    prompt: str | None = Field(None, description="one prompt; its completion is streamed to the terminal")
    chat: bool = Field(False, description="plain-text prompts are a user's messages, for the policy's chat template")
    system: str | None = Field(None, description="system message before each of them; needs --chat")
    prompts: Path | None = Field(None, description="JSONL, an OpenAI batch or Parquet; needs --output")
    output: Path | None = Field(None, description="JSONL of completions; the same command resumes a stopped job")
    batch_size: int | None = Field(None, ge=1, description="most prompts decoded together")
    batch_tokens: int = Field(8192, ge=1, description="most tokens decoded together, prompts and completions")
    on_bad: OnBad = "error"
    output_format: Literal["auto", "records", "openai"] = Field(
        "auto", description="lines of the output: rgtg records or OpenAI batch results; auto: as the prompts"
    )
    force: bool = Field(False, description="replace an output of other settings, models or prompts")
    ray: bool = Field(False, description="complete a file of prompts on a Ray cluster")
    address: str | None = Field(
        None,
        description="HOST:PORT of the cluster's head node, or auto; default: RAY_ADDRESS, else one on this machine",
    )
    actors: int | None = Field(
        None,
        ge=1,
        description="workers, each with its own models; default: as many as the GPUs allow, else one per node",
    )
    gpus_per_actor: float | None = Field(
        None, ge=0, description="GPUs of each worker; default: 1 if the cluster has GPUs, else 0"
    )
    cpus_per_actor: int | None = Field(
        None, ge=1, description="CPUs and threads of each worker; default: 1 with a GPU, else an equal share"
    )
    trace: bool = Field(False, description="keep scores and probabilities of every candidate at every step")
    device_map: str | dict[str, int | str] | None = Field(
        None,
        description="instead of device: auto spreads the policy over GPUs, memory and disk; or one for each module",
    )
    tp_plan: Literal["auto"] | dict[str, str] | None = Field(
        None, description="instead of device: auto splits the policy's layers among torchrun's processes"
    )
    scorer_device: str | None = Field(None, description="device of a separate scorer; default: the policy's")
    scorer_device_map: str | dict[str, int | str] | None = Field(
        None, description="of a separate scorer, as device_map"
    )
    scorer_tp_plan: Literal["auto"] | dict[str, str] | None = Field(
        None, description="of a separate scorer, as tp_plan"
    )
    cache_gguf: bool = Field(
        False, description="policy is a GGUF file: keep its conversion to bf16 beside it, which loads faster"
    )
    draft: str | None = Field(
        None, description="speculate, exactly: policy, prompt-lookup, or a small model with the policy's tokenizer"
    )

    @field_validator("gpus_per_actor")
    @classmethod
    def _part_or_whole(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1 and gpus % 1:
            raise ValueError("must be a part of one GPU (0.5), or a whole number of GPUs")
        return gpus


class ScoreSettings(DeviceSettings):
    """``rgtg score``."""

    scorer: str = Field(description="reward model: folder or hub id")
    policy: str | None = Field(None, description="policy of a head on its hidden states, if it has moved")
    input: Path = Field(description="JSONL of prompt (or messages) and text or completion")
    output: Path = Field(description="the same lines, with a reward each")
    chat_template_kwargs: TemplateKwargs = None
    batch_size: int = Field(8, ge=1, description="completions per forward pass")
