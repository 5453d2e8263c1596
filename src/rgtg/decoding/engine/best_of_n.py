"""Best-of-n: draw n whole completions, which share the prompt's forward pass, and take the one of highest reward."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from rgtg.decoding.engine.batch import Batch, Prefilled
from rgtg.decoding.request import Request, StoppingCriteria, derive_seed
from rgtg.decoding.runners.model_runner import Runner
from rgtg.decoding.runners.policy_runner import TorchPolicyRunner
from rgtg.decoding.runners.segment_scorer import ChunkedRewards, rewards_of
from rgtg.decoding.runners.shared_prefix_runner import fork
from rgtg.decoding.runners.token_tree import States
from rgtg.decoding.sampling import best_of_n_kl
from rgtg.models.scorers.base import Scorer
from rgtg.models.scorers.cross_tokenizer import CrossTokenizerScorer


def best_of_n(
    requests: list[Request],
    policy: Runner,
    states: States,
    scorer: Scorer | CrossTokenizerScorer,
    n: int,
    stopping: StoppingCriteria,
    chunked: ChunkedRewards | None = None,
) -> Iterator[list[Request]]:
    """Sample n completions per request and give each request the one of highest reward.

    Every completion is sampled from the policy cut to the request's candidates, with a seed of its own. The winner's
    ``score`` is its reward, and the request's calls are those of all n. Source: Stiennon et al. 2020, arXiv 2009.01325.

    Args:
        requests: the prompts.
        policy: has read the prompts.
        states: (B, H) at the prompts' last tokens.
        scorer: of finished completions.
        n: completions of each prompt.
        stopping: when a completion ends.
        chunked: reads the completions of the only request in chunks; None reads all at once.

    Yields:
        The requests, after each token of the completions and each chunk of what has ended.
    """
    # 1. propose: n branches over the cache of each prompt
    drawn = [_branch(request, j) for request in requests for j in range(n)]
    with torch.inference_mode():
        runner = TorchPolicyRunner(fork(policy, n))
        rows = torch.arange(len(requests)).repeat_interleave(n)
        state = TorchPolicyRunner(policy).predict(states)
        batch = Batch()
        batch.add(drawn, Prefilled(runner, state._replace(logits=state.logits[rows.to(state.logits.device)])))
    yield from draw_all(batch, requests)
    # 2. score: every finished completion once
    if chunked is not None:
        rewards: list[float] = []
        for _ in chunked.read(requests[0], drawn, stopping):
            yield requests
        rewards = chunked.rewards
    else:
        rewards = rewards_of(scorer, drawn, stopping)
    for i, request in enumerate(requests):
        # 3. choose: the highest reward, the first of equals
        group = range(i * n, (i + 1) * n)
        best = max(group, key=rewards.__getitem__)
        # 4. commit
        adopt(request, drawn[best], rewards[best])
        request.unscored = sum(drawn[j].unscored for j in group)
        request.selection_nats = best_of_n_kl(n)
        request.policy_calls = sum(drawn[j].policy_calls for j in group)
        request.scorer_calls = n


def draw_all(batch: Batch, requests: list[Request]) -> Iterator[list[Request]]:
    """Step a batch of branches until none is left; yields the requests that they are drawn for, after each step.

    Raises:
        Exception: that of the first branch that failed; its request is completed alone by the caller.
    """
    while batch.requests:
        for branch in batch.step():
            if branch.error is not None:
                raise branch.error
        yield requests


def _branch(request: Request, j: int) -> Request:
    """The j-th completion of a request, with a generator and records of its own."""
    return replace(request, seed=derive_seed(request.seed, j), token_ids=[], trace=[], scorers=(), betas=())


def adopt(request: Request, winner: Request, reward: float) -> None:
    """Write a drawn text and its records into the request that it was drawn for; calls are the caller's to count."""
    request.token_ids, request.text = winner.token_ids, winner.text
    request.finish_reason, request.trace = winner.finish_reason, winner.trace
    request.policy_log_prob, request.guided_log_prob = winner.policy_log_prob, winner.guided_log_prob
    request.candidates_log_prob = winner.candidates_log_prob
    request.score = reward if reward > -math.inf else None
