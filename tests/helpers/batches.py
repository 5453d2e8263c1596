"""Running batches, put together by hand: requests of several scorers and parameters that come and go."""

import torch

from rgtg.config import DecodingSettings
from rgtg.decoding.engine.batch import Batch, Prefilled
from rgtg.decoding.engine.chunked_prefill import BatchPrefill
from rgtg.decoding.request import Request, StoppingCriteria, end_tokens, make_processors
from rgtg.decoding.runners.factory import RunnerFactory
from rgtg.decoding.sampling import SamplingParams


def make_request(policy, prompt_ids, scorers=(), betas=(), *, seed=0, source=None, trace=False, stopping=None,
                 repetition_penalty=1.0, **settings):  # fmt: skip
    """A request of tokens; ``settings`` are those of ``SamplingParams`` and ``StoppingCriteria``."""
    limits = {name: settings.pop(name) for name in ("max_new_tokens", "stop") if name in settings}
    asked = DecodingSettings(**{"max_new_tokens": 12} | limits, repetition_penalty=repetition_penalty)
    eos_ids = end_tokens(policy)
    beta = betas[0] if len(betas) == 1 else 1.0
    return Request(
        policy.tokenizer.decode(prompt_ids), list(prompt_ids), seed, make_processors(asked, len(prompt_ids), eos_ids,
        "cpu"), SamplingParams(**{"beta": beta, "top_k": 6} | settings),
        stopping or StoppingCriteria(policy.tokenizer, eos_ids, asked), scorers=tuple(scorers), betas=tuple(betas),
        source=source, keep_trace=trace,
    )  # fmt: skip


@torch.inference_mode()
def prefill_whole(runners, requests, room=24, width=8):
    """All prompts, read in one pass of each model."""
    prompts = [request.prompt_ids for request in requests]
    longest = max(map(len, prompts)) + room
    policy = runners.policy.fresh(longest, width)
    scorers = {name: runner.fresh(longest, width) for name, runner in runners.scorers.items()}
    for runner in scorers.values():
        runner.prefill(requests, prompts)
    return Prefilled(policy, policy.prefill(prompts), scorers)


def prefill_chunked(runners, request, chunk=3, cache=None):
    """One prompt, read in chunks."""
    prefill = BatchPrefill(runners, request)
    while prefill.left:
        prefill.advance(chunk, cache)
    return prefill.result()


def start(policy, scorers, requests, *, tree=None, **options):
    """A batch of requests that name the same scorers, with their prompts read."""
    runners = RunnerFactory(policy, scorers, tree).token_runners(requests[0].scorers)
    batch = Batch(**runners.options, **options)
    batch.add(requests, prefill_whole(runners, requests))
    return batch


def run(batch):
    """Step until no request is left; the number of steps."""
    steps = 0
    while batch.requests:
        batch.step()
        steps += 1
    return steps
