"""Decoding speed of a policy and its scorer on this machine, and the limit set by the memory bandwidth."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from pydantic import Field

from rgtg.config import DecodingSettings
from rgtg.decoding.engine.batch import Batch, Prefilled
from rgtg.decoding.request import Request, StoppingCriteria
from rgtg.decoding.runners.factory import RunnerFactory, tree_columns
from rgtg.decoding.sampling import SamplingParams
from rgtg.models.loading.device_map import synchronize
from rgtg.models.loading.policy import Policy
from rgtg.models.ops.packed_linear import decode_bytes
from rgtg.models.scorers.base import AnyScorer
from rgtg.models.scorers.hidden_state_head import OwnStateScorer
from rgtg.models.scorers.lora_adapter import SharedTrunkScorer
from rgtg.types.base import Record

_PROBE_BYTES = 2**28


class DecodingSpeed(Record):
    """The measured speed of unguided or guided decoding, and the limit set by its weights and the memory bandwidth."""

    name: str
    ms_per_token: float = Field(description="median over repeats, for one prompt")
    of_unguided: float = Field(description="tokens per second as a share of the unguided policy's; paired median")
    megabytes_per_token: float = Field(description="weights read for one token")
    limit_ms: float = Field(description="time to read those weights at the measured bandwidth")
    limit_of_unguided: float


def start_batch(
    policy: Policy,
    scorer: AnyScorer | None,
    prompts: Sequence[Sequence[int]],
    *,
    top_k: int | None,
    tokens: int,
    beta: float = 1.0,
    tree: bool | None = None,
    overlap: bool = False,
) -> Batch:
    """A batch that has read these prompts, and has room for ``tokens`` new ones; no token ends a request.

    Args:
        policy: the frozen policy.
        scorer: steers every request; None for the policy alone.
        prompts: token ids.
        top_k: candidates per step; None for the whole vocabulary.
        tokens: steps that will be taken.
        beta: guidance strength.
        tree: force token trees (True) or the whole-text fallback (False); None finds out what the models can do.
        overlap: let the policy read the candidates while a separate scorer scores them.
    """
    scorers = {} if scorer is None else {"scorer": scorer}
    names, factory = tuple(scorers), RunnerFactory(policy, scorers, tree)
    stopping = StoppingCriteria(None, set(), DecodingSettings(max_new_tokens=tokens + 2))
    params = SamplingParams(beta=beta, top_k=top_k, vocabulary=policy.vocabulary)
    requests = [
        Request("", list(prompt), seed, params=params, stopping=stopping, scorers=names, betas=(beta,) * len(names))
        for seed, prompt in enumerate(prompts)
    ]
    runners, longest, width = factory.token_runners(names), max(map(len, prompts)) + tokens + 2, tree_columns(top_k)
    with torch.inference_mode():
        policy_runner = runners.policy.fresh(longest, width)
        separate = {name: runner.fresh(longest, width) for name, runner in runners.scorers.items()}
        for runner in separate.values():
            runner.prefill(requests, prompts)
        batch = Batch(**runners.options, overlap=overlap)
        batch.add(requests, Prefilled(policy_runner, policy_runner.prefill(prompts), separate))
    return batch


def seconds_per_token(batch: Batch, tokens: int) -> float:
    """Seconds of one step of all requests; the first step, which warms up, is left out.

    Divide by the number of requests for the time per token.
    """
    batch.step()
    synchronize()
    start = time.perf_counter()
    for _ in range(tokens):
        batch.step()
    synchronize()
    return (time.perf_counter() - start) / tokens


def memory_bandwidth(device: torch.device, repeats: int = 5) -> float:
    """Bytes per second, from a reduction over more memory than any cache holds (the best of several)."""
    block = torch.ones(_PROBE_BYTES // 4, device=device)
    best = float("inf")
    for _ in range(repeats + 1):
        synchronize()
        start = time.perf_counter()
        block.sum()
        synchronize()
        best = min(best, time.perf_counter() - start)
    return _PROBE_BYTES / best


def bytes_per_token(policy: Policy, scorer: AnyScorer | None) -> int:
    """Bytes of weights that one guided token reads: those of the policy and of the scorer, each once."""
    match scorer:
        case None:
            return decode_bytes(policy.model)
        case OwnStateScorer():
            # only the candidates' rows of a vocabulary head's table are read
            table = getattr(scorer.head, "table", None)
            head = sum(p.nbytes for p in scorer.head.mlp.parameters())
            return decode_bytes(policy.model) + head + (0 if table is None else 32 * table.weight[0].nbytes)
        case SharedTrunkScorer():
            return decode_bytes(scorer.model)
    return decode_bytes(policy.model) + decode_bytes(scorer.model)


def measure_speed(
    policy: Policy,
    scorer: AnyScorer | None,
    *,
    prompt_length: int = 128,
    top_k: int = 10,
    tokens: int = 32,
    repeats: int = 3,
    progress: Callable[[str], None] | None = None,
) -> list[DecodingSpeed]:
    """Measure unguided and guided decoding alternately, so that a change in the machine's speed affects both.

    Args:
        policy: the frozen policy.
        scorer: None measures the policy alone.
        prompt_length: tokens of the (random) prompt.
        top_k: candidates per step.
        tokens: number of timed steps.
        repeats: paired repeats, after one for warming up.
        progress: called with what is running.
    """
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(policy.vocabulary.size, (prompt_length,), generator=generator).tolist()
    setups: dict[str, AnyScorer | None] = {"unguided": None} | ({"guided": scorer} if scorer is not None else {})
    seconds: dict[str, list[float]] = {name: [] for name in setups}
    for repeat in range(repeats + 1):
        for name, steering in setups.items():
            if progress:
                progress(f"{name}, {'warming up' if repeat == 0 else f'repeat {repeat} of {repeats}'}")
            took = seconds_per_token(start_batch(policy, steering, [prompt], top_k=top_k, tokens=tokens), tokens)
            if repeat:
                seconds[name].append(took)
    bandwidth = memory_bandwidth(policy.model.device)
    read = {name: bytes_per_token(policy, steering) for name, steering in setups.items()}
    return [
        DecodingSpeed(
            name=name,
            ms_per_token=1e3 * statistics.median(took),
            of_unguided=statistics.median(u / t for u, t in zip(seconds["unguided"], took, strict=True)),
            megabytes_per_token=read[name] / 1e6,
            limit_ms=1e3 * read[name] / bandwidth,
            limit_of_unguided=read["unguided"] / read[name],
        )
        for name, took in seconds.items()
    ]
