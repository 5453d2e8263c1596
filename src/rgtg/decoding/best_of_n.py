"""Best-of-n: the same four words with the completion as unit; the n share the prompt's one forward."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from rgtg.decoding.requests import Request, Stopping, derive_seed, source_of
from rgtg.decoding.runner import Runner
from rgtg.decoding.shared_prompt import fork
from rgtg.decoding.steps import Alone
from rgtg.decoding.tokenwise import TokenRule, decode
from rgtg.errors import NonFiniteError
from rgtg.evaluation.metrics import best_of_n_kl
from rgtg.models.encoding import decode_completion, encode_completion
from rgtg.models.scorer import Scorer
from rgtg.models.text_scorer import TextScorer


def best_of_n(
    requests: list[Request],
    policy: Runner,
    scorer: Scorer | TextScorer,
    n: int,
    rule: TokenRule,
    stopping: Stopping,
) -> Iterator[list[Request]]:
    """Sample n completions per request and give each request the one of highest reward.

    Every completion is sampled from the policy cut to the rule's candidates, with a seed of its own. The winner's
    ``score`` is its reward, and the request's calls are those of all n. Source: Stiennon et al. 2020, arXiv 2009.01325.

    Yields:
        The rows still active after each token.
    """
    # 1. propose: one forward per prompt, then n branches over its cache
    rows = torch.arange(len(requests)).repeat_interleave(n)
    with torch.inference_mode():
        logits = policy.readout(policy.model, policy.prefill([request.prompt_ids for request in requests]))
    drawn = [_branch(request, j) for request in requests for j in range(n)]
    stepper = Alone(fork(policy, n))
    yield from decode(drawn, stepper, rule, stopping, logits[rows.to(logits.device)])
    # 2. score: every finished completion once
    rewards = rewards_of(scorer, drawn, stopping)
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


def rewards_of(scorer: Scorer | TextScorer, drawn: Sequence[Request], stopping: Stopping) -> list[float]:
    """Reward of each ended completion: the one that ``rgtg score`` gives its text.

    A text over the context of a scorer with a tokenizer of its own is worth −∞, and its tokens are counted as unscored.

    Raises:
        NonFiniteError: NaN or infinite.
    """
    if isinstance(scorer, TextScorer):
        sources = [source_of(row, stopping.tokenizer) for row in drawn]
        ended = [row.finish_reason == "stop" for row in drawn]
        return count_unscored(scorer.rewards(sources, [row.text for row in drawn], finished=ended), drawn)
    read = [_read(scorer, row, stopping) for row in drawn]
    scores = scorer.score_prefixes([prompt for prompt, _ in read], [completion for _, completion in read])
    return require_finite_rewards([float(mine[-1]) for mine in scores])


def require_finite_rewards(rewards: list[float]) -> list[float]:
    """The rewards.

    Raises:
        NonFiniteError: NaN or infinite.
    """
    if not all(map(math.isfinite, rewards)):
        raise NonFiniteError("the scorer returned NaN or infinite rewards; try dtype=float32, or check its training")
    return rewards


def count_unscored(rewards: Sequence[float | None], drawn: Sequence[Request]) -> list[float]:
    """Rewards of drawn texts, −∞ where there is none; the tokens of such a text are counted in its row."""
    require_finite_rewards([reward for reward in rewards if reward is not None])
    for row, reward in zip(drawn, rewards, strict=True):
        row.unscored = len(row.token_ids) if reward is None else 0
    return [-math.inf if reward is None else reward for reward in rewards]


def _read(scorer: Scorer, row: Request, stopping: Stopping) -> tuple[list[int], list[int]]:
    """Prompt and completion ids as the scorer reads them: the text, closed by EOS if it ended and training did so."""
    closing = [stopping.tokenizer.eos_token_id] if scorer.info is not None and scorer.info.append_eos else []
    ids = row.token_ids
    if stopping.stop and row.text != decode_completion(stopping.tokenizer, row.prompt_ids, ids):
        # the ids hold the stop text, which may begin inside a token
        text = encode_completion(stopping.tokenizer, row.prompt, row.text, append_eos=False, prompt_ids=row.prompt_ids)
        ids = [*text, *closing]
    elif ids[-1] in stopping.eos_ids:
        ids = [*ids[:-1], *closing]
    # an empty text that no EOS closes is worth what its prompt is
    return (row.prompt_ids, ids) if ids else (row.prompt_ids[:-1], row.prompt_ids[-1:])


def adopt(request: Request, winner: Request, reward: float) -> None:
    """Write a drawn text and its records into the row that it was drawn for; calls are the caller's to count."""
    request.token_ids, request.text = winner.token_ids, winner.text
    request.finish_reason, request.trace = winner.finish_reason, winner.trace
    request.policy_log_prob, request.guided_log_prob = winner.policy_log_prob, winner.guided_log_prob
    request.candidates_log_prob = winner.candidates_log_prob
    request.score = reward if reward > -math.inf else None
