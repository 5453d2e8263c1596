"""Best-of-n: the same four words with the completion as unit; the n share the prompt's one forward."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from rgtg.decoding.engine.tokenwise import TokenRule, decode
from rgtg.decoding.request import Request, Stopping, derive_seed
from rgtg.decoding.runners.ended import InParts, read_ended
from rgtg.decoding.runners.model_runner import Runner
from rgtg.decoding.runners.policy_runner import Alone
from rgtg.decoding.runners.shared_prefix_runner import fork
from rgtg.decoding.sampling import best_of_n_kl
from rgtg.models.scorers.base import Scorer
from rgtg.models.scorers.cross_tokenizer import CrossTokenizerScorer


def best_of_n(
    requests: list[Request],
    policy: Runner,
    scorer: Scorer | CrossTokenizerScorer,
    n: int,
    rule: TokenRule,
    stopping: Stopping,
    parts: InParts | None = None,
) -> Iterator[list[Request]]:
    """Sample n completions per request and give each request the one of highest reward.

    Every completion is sampled from the policy cut to the rule's candidates, with a seed of its own. The winner's
    ``score`` is its reward, and the request's calls are those of all n. Source: Stiennon et al. 2020, arXiv 2009.01325.

    Args:
        requests: the prompts.
        policy: the policy's runner.
        scorer: of finished completions.
        n: completions of each prompt.
        rule: of the policy's tokens.
        stopping: when a completion ends.
        parts: how the completions of the only request are read by the scorer, part by part; None reads all at once.

    Yields:
        The rows still active after each token, or each part of what has ended.
    """
    # 1. propose: one forward per prompt, then n branches over its cache
    rows = torch.arange(len(requests)).repeat_interleave(n)
    with torch.inference_mode():
        logits = policy.readout(policy.model, policy.prefill([request.prompt_ids for request in requests]))
    drawn = [_branch(request, j) for request in requests for j in range(n)]
    stepper = Alone(fork(policy, n))
    yield from decode(drawn, stepper, rule, stopping, logits[rows.to(logits.device)])
    # 2. score: every finished completion once
    if parts is not None:
        with torch.inference_mode():
            parts.runner.prefill([request.prompt_ids for request in requests])
    rewards = yield from read_ended(scorer, drawn, stopping, requests, parts)
    for i, request in enumerate(requests):
        # 3. rule: the highest reward, the first of equals
        group = range(i * n, (i + 1) * n)
        best = max(group, key=rewards.__getitem__)
        # 4. commit
        adopt(request, drawn[best], rewards[best])
        request.unscored = sum(drawn[j].unscored for j in group)
        request.selection_nats = best_of_n_kl(n)
        request.policy_calls = sum(drawn[j].policy_calls for j in group)
        request.scorer_calls = n


def _branch(request: Request, j: int) -> Request:
    """The j-th completion of a request, with a generator and records of its own."""
    return replace(request, seed=derive_seed(request.seed, j), token_ids=[], trace=[])


def adopt(request: Request, winner: Request, reward: float) -> None:
    """Write a drawn text and its records into the row that it was drawn for; calls are the caller's to count."""
    request.token_ids, request.text = winner.token_ids, winner.text
    request.finish_reason, request.trace = winner.finish_reason, winner.trace
    request.policy_log_prob, request.guided_log_prob = winner.policy_log_prob, winner.guided_log_prob
    request.candidates_log_prob = winner.candidates_log_prob
    request.score = reward if reward > -math.inf else None
