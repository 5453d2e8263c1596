"""CARDS and blockwise CD: draw whole segments, and accept or choose them by their reward."""

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

import torch
from torch import Tensor

from rgtg.config import DecodingSettings
from rgtg.decoding.engine.batch import Batch, Prefilled
from rgtg.decoding.engine.best_of_n import adopt, draw_all
from rgtg.decoding.request import Request, StoppingCriteria, derive_seed
from rgtg.decoding.runners.base import PolicyState
from rgtg.decoding.runners.model_runner import Runner
from rgtg.decoding.runners.policy_runner import TorchPolicyRunner
from rgtg.decoding.runners.segment_scorer import (
    ChunkedRewards,
    SegmentScorer,
    append_ragged,
    require_finite_rewards,
    rewards_of,
)
from rgtg.decoding.runners.shared_prefix_runner import SharedPrefixRunner, fork
from rgtg.decoding.runners.token_tree import States, TokenTree
from rgtg.decoding.sampling import accept_segment, best_of_n_kl, entropy, segment_threshold
from rgtg.models.scorers.base import Scorer
from rgtg.models.scorers.cross_tokenizer import CrossTokenizerScorer

PAUSED = "segment"


@dataclass(frozen=True)
class SegmentParams:
    """How a segment is chosen.

    Attributes:
        choice: ``best`` of n drawn at once, or one at a time until one is accepted.
        n: segments drawn at once.
        beta: multiplies the difference of reward and threshold.
        target: reward that a finished completion should reach.
        start: first threshold, as a fraction of the way from the prompt's reward to the target.
        retries: segments rejected before the best of those seen is taken.
    """

    choice: Literal["best", "accept"]
    n: int = 1
    beta: float = 1.0
    target: float = 0.0
    start: float = 0.5
    retries: int = 20


@dataclass(eq=False)
class Segment(Request):
    """A request with one more segment, drawn with a seed of its own.

    Attributes:
        start: tokens that were there before it.
        next_logits: (V,) the policy's after it, where a pass has read its end.
    """

    start: int = 0
    next_logits: Tensor | None = None

    @property
    def new(self) -> list[int]:
        """The segment's tokens."""
        return self.token_ids[self.start :]

    @property
    def open(self) -> bool:
        """Whether the completion goes on after it."""
        return self.finish_reason == PAUSED


class SegmentStopping(StoppingCriteria):
    """Ends requests as ``StoppingCriteria`` does, and segments at their length, or where the policy is uncertain."""

    def __init__(
        self,
        tokenizer: Any,
        eos_ids: set[int],
        settings: DecodingSettings,
        *,
        length: int,
        max_entropy: float | None = None,
    ) -> None:
        """As ``StoppingCriteria``.

        Args:
            tokenizer: the policy's.
            eos_ids: tokens that end a completion.
            settings: of decoding.
            length: tokens of a segment, at most.
            max_entropy: entropy in nats that ends a segment of at least ``settings.min_segment`` tokens.
        """
        super().__init__(tokenizer, eos_ids, settings)
        self.length, self.max_entropy, self.shortest = length, max_entropy, settings.min_segment

    def end_uncertain(self, requests: list[Request], logits: Tensor, log_probs: Tensor) -> list[Request]:
        """End segments before a token that the policy is uncertain of; they keep its logits, a row of (B, V)."""
        if self.max_entropy is None:
            return []
        uncertain = (entropy(log_probs) >= self.max_entropy).tolist()
        for i, request in enumerate(requests):
            assert isinstance(request, Segment), "segments are drawn"
            if uncertain[i] and len(request.new) >= self.shortest:
                request.finish_reason, request.next_logits = PAUSED, logits[i].clone()
        return [request for request in requests if request.finish_reason is not None]

    def update(self, request: Request) -> None:
        """End the request, or else its segment where it is full."""
        super().update(request)
        assert isinstance(request, Segment), "segments are drawn"
        if request.finish_reason is None and len(request.new) >= self.length:
            request.finish_reason = PAUSED


class MaskedRowsRunner(TorchPolicyRunner):
    """A policy whose rows stop one by one without leaving the cache: stopped rows read a token that is not committed.

    Attributes:
        read: tokens that each row has committed.
    """

    def __init__(self, runner: Any, rows: int) -> None:
        super().__init__(runner)
        self.read = [0] * rows
        self._active = list(range(rows))

    def select_rows(self, rows: Sequence[int]) -> None:
        """Only these rows go on."""
        self._active = [self._active[row] for row in rows]

    def copy_rows(self, rows: Sequence[int]) -> Self:
        """Not possible: stopped rows stay in the cache."""
        raise NotImplementedError("rows that stop one by one are not copied")

    def step(self, tokens: Tensor) -> PolicyState:
        """One token (A, 1) of each of the A rows that go on."""
        every = torch.zeros(len(self.read), 1, dtype=torch.long, device=tokens.device)
        every[self._active] = tokens
        final = self.runner.read(TokenTree.chain(every)).final[:, 0]
        state = PolicyState(self.runner.head(final[self._active]), None)
        # committed last: nothing has changed where the output head raises
        counts = [0] * len(self.read)
        for row in self._active:
            counts[row] = 1
        self.runner.commit(torch.zeros(len(every), 1, dtype=torch.long), counts)
        self.read = [read + count for read, count in zip(self.read, counts, strict=True)]
        return state


@dataclass
class _Growing:
    """A request, and the segments rejected since it last grew."""

    request: Request
    prompt_reward: float
    tried: list[tuple[float, Segment]] = field(default_factory=list)


@torch.inference_mode()
def decode_segments(
    requests: Sequence[Request],
    policy: Runner,
    states: States,
    scores: SegmentScorer,
    scorer_states: States | None,
    scorer: Scorer | CrossTokenizerScorer,
    params: SegmentParams,
    stopping: SegmentStopping,
    chunked: ChunkedRewards | None = None,
) -> Iterator[list[Request]]:
    """Complete all requests segment by segment; every request accepts, rejects and draws for itself.

    Args:
        requests: the prompts.
        policy: has read the prompts.
        states: (B, H) the policy's at the prompts' last tokens.
        scores: rewards of what has not ended yet, over a cache where there is one.
        scorer_states: (B, H) of that cache at the prompts' last tokens.
        scorer: the same scorer, for the texts of ended completions.
        params: how segments are chosen.
        stopping: when segments and completions end.
        chunked: reads ended completions of the only request in chunks, over the cache of ``scores``; None reads all at
            once.

    Yields:
        The active requests, after each token of the segments, each chunk of what has ended, and each round; only a
        round adds to them.
    """
    logits = policy.head(states.final)
    rewards = scores.start(requests, scorer_states).tolist()
    rows = [_Growing(request, reward) for request, reward in zip(requests, rewards, strict=True)]
    while rows:
        # 1. propose: n segments after each completion, drawn as any text is
        drawn, read = yield from _draw(rows, policy, params.n, stopping, logits)
        # 2. score
        values = yield from _score(rows, drawn, scores, scorer, stopping, chunked)
        # 3. choose: a segment for each request, or none yet
        choose = _best if params.choice == "best" else _accepted
        chosen = choose(rows, drawn, values, params, stopping.limit)
        # 4. commit
        for row, segment in zip(rows, chosen, strict=True):
            if segment is not None:
                row.request.accepted += len(segment.new)
        yield [row.request for row in rows]
        scores.append([segment.new if segment is not None and segment.open else [] for segment in chosen])
        logits = _commit_to_policy(policy, drawn, read, chosen, logits, params.n)
        going = [i for i, row in enumerate(rows) if row.request.finish_reason is None]
        if len(going) < len(rows):
            rows = [rows[i] for i in going]
            if rows:
                policy.select_rows(going)
                scores.select_rows(going)
                logits = logits[going]


def _draw(
    rows: Sequence[_Growing], policy: Runner, n: int, stopping: SegmentStopping, logits: Tensor
) -> Generator[list[Request], None, tuple[list[Segment], list[int]]]:
    """N segments of each request, side by side, and how many tokens of each lie in the policy's cache now."""
    drawn = [_branch(row.request, len(row.tried) + j, stopping) for row in rows for j in range(n)]
    branches = policy if n == 1 else fork(policy, n)
    runner = MaskedRowsRunner(branches, len(drawn))
    batch = Batch(ends_early=stopping.end_uncertain if stopping.max_entropy is not None else None)
    batch.add(drawn, Prefilled(runner, PolicyState(logits.repeat_interleave(n, 0), None)))
    yield from draw_all(batch, [row.request for row in rows])
    if isinstance(branches, SharedPrefixRunner):
        branches.drop_branches()
    for i, row in enumerate(rows):
        mine = drawn[i * n : i * n + n]
        row.request.policy_calls += sum(segment.policy_calls for segment in mine)
        row.request.scorer_calls += n
        row.request.drafted += sum(len(segment.new) for segment in mine)
    return drawn, runner.read


def _branch(request: Request, j: int, stopping: SegmentStopping) -> Segment:
    """A request's j-th next segment, with a generator and records of its own."""
    copied = {f.name: getattr(request, f.name) for f in fields(Request) if f.init}
    start = len(request.token_ids)
    copied |= {"token_ids": list(request.token_ids), "trace": list(request.trace), "policy_calls": 0}
    copied |= {"stopping": stopping, "scorers": (), "betas": (), "seed": derive_seed(request.seed, start, j)}
    return Segment(**copied, start=start)


def _score(
    rows: Sequence[_Growing],
    drawn: Sequence[Segment],
    scores: SegmentScorer,
    scorer: Scorer | CrossTokenizerScorer,
    stopping: StoppingCriteria,
    chunked: ChunkedRewards | None,
) -> Generator[list[Request], None, list[list[float]]]:
    """Reward of every segment: of the text so far, or of the completion that it ends."""
    n = len(drawn) // len(rows)
    lines = [[segment.new for segment in drawn[i : i + n]] for i in range(0, len(drawn), n)]
    rewards = torch.zeros(len(lines), n)
    if any(segment.open for segment in drawn):
        rewards = scores.score(lines)
    ended = [i for i, segment in enumerate(drawn) if not segment.open]
    if ended:
        texts = [drawn[i] for i in ended]
        if chunked is not None:
            for _ in chunked.read(rows[0].request, texts, stopping):
                yield [row.request for row in rows]
            values = chunked.rewards
        else:
            values = rewards_of(scorer, texts, stopping)
        rewards.view(-1)[ended] = torch.tensor(values, dtype=rewards.dtype)
    require_finite_rewards(rewards[~rewards.isneginf()].tolist())  # −∞: too long for the scorer's context
    return rewards.tolist()


def _best(
    rows: Sequence[_Growing], drawn: Sequence[Segment], rewards: list[list[float]], params: SegmentParams, limit: int
) -> list[Segment | None]:
    """Of each request's n segments the one of highest reward, the first of equals up to rounding."""
    chosen: list[Segment | None] = []
    for i, row in enumerate(rows):
        j = _highest(rewards[i])
        chosen.append(_commit(row, drawn[i * params.n + j], rewards[i][j], best_of_n_kl(params.n)))
    return chosen


def _accepted(
    rows: Sequence[_Growing], drawn: Sequence[Segment], rewards: list[list[float]], params: SegmentParams, limit: int
) -> list[Segment | None]:
    """Each request's segment if it is accepted, the best of all tried when the retries are used up, else None."""
    read = torch.tensor([mine[0] for mine in rewards], dtype=torch.float64)
    shares = torch.tensor([len(segment.token_ids) / limit for segment in drawn], dtype=torch.float64)
    prompts = torch.tensor([row.prompt_reward for row in rows], dtype=torch.float64)
    thresholds = segment_threshold(prompts, params.target, params.start, shares)
    uniforms = torch.tensor([row.request.uniform() for row in rows], dtype=torch.float64)
    taken = accept_segment(read, thresholds, params.beta, uniforms).tolist()
    chosen: list[Segment | None] = []
    for i, row in enumerate(rows):
        row.tried.append((float(read[i]), drawn[i]))
        tries = len(row.tried)
        if rewards[i][0] == -math.inf:  # no longer text will be read either: the policy's own segment is taken
            chosen.append(_commit(row, drawn[i], -math.inf, 0.0))
        elif taken[i]:
            # unbiased for the KL of sampling until accepted: log a + H_{tries − 1} (E of the sum is −log of the rate)
            log_accept = min(0.0, params.beta * float(read[i] - thresholds[i]))
            nats = log_accept + sum(1 / t for t in range(1, tries))
            chosen.append(_commit(row, drawn[i], float(read[i]), nats))
        elif tries > params.retries:
            reward, best = row.tried[_highest([reward for reward, _ in row.tried])]
            chosen.append(_commit(row, best, reward, best_of_n_kl(tries)))
        else:
            chosen.append(None)
    return chosen


def _highest(rewards: Sequence[float]) -> int:
    """Place of the highest reward, the first of equals: segments that a scorer reads alike differ by rounding only."""
    most = max(rewards)
    alike = (reward == most or math.isclose(reward, most, rel_tol=1e-5, abs_tol=1e-5) for reward in rewards)
    return next(j for j, found in enumerate(alike) if found)


def _commit(row: _Growing, segment: Segment, reward: float, nats: float) -> Segment:
    """Write a segment into its request."""
    row.request.unscored += len(segment.new) if reward == -math.inf else 0
    adopt(row.request, segment, reward)
    row.request.selection_nats += nats
    row.tried.clear()
    if segment.open:
        row.request.finish_reason = None
    return segment


def _commit_to_policy(
    policy: Runner,
    drawn: Sequence[Segment],
    read: Sequence[int],
    chosen: Sequence[Segment | None],
    logits: Tensor,
    n: int,
) -> Tensor:
    """Leave in the policy's cache what was chosen and nothing else; its logits (B, V) after that."""
    open_ = [segment is not None and segment.open for segment in chosen]
    if n > 1:  # branches are gone already: the chosen ones are read in one pass
        unread = [s.new if s is not None and b else [] for s, b in zip(chosen, open_, strict=True)]
        return _logits(append_ragged(policy, unread, logits))
    unread, dropped, before = [], [], list(logits)
    for i, segment in enumerate(chosen):
        here = segment is drawn[i] and open_[i]
        dropped.append(0 if here else read[i])
        unread.append(drawn[i].new[read[i] :] if here else segment.new if segment is not None and open_[i] else [])
        ahead = drawn[i].next_logits
        if here and ahead is not None:
            before[i] = ahead
    policy.rollback(dropped)
    return _logits(append_ragged(policy, unread, torch.stack(before)))


def _logits(read: Tensor | None) -> Tensor:
    assert read is not None, "rows that read nothing have logits already"
    return read
