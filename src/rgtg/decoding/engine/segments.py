"""CARDS and blockwise CD: the same four words with the segment as unit."""

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor

from rgtg.config import DecodingSettings
from rgtg.decoding.engine.best_of_n import adopt
from rgtg.decoding.engine.tokenwise import TokenRule, decode
from rgtg.decoding.request import Request, Stopping, derive_seed
from rgtg.decoding.runners.ended import InParts, read_ended, require_finite_rewards
from rgtg.decoding.runners.model_runner import Runner
from rgtg.decoding.runners.policy_runner import Alone
from rgtg.decoding.runners.segment_scorer import SegmentReader, read_ragged
from rgtg.decoding.runners.shared_prefix_runner import SharedPromptRunner, fork
from rgtg.decoding.runners.token_tree import TokenTree
from rgtg.decoding.sampling import accept_segment, best_of_n_kl, entropy, segment_threshold
from rgtg.models.scorers.base import Scorer
from rgtg.models.scorers.cross_tokenizer import CrossTokenizerScorer

PAUSED = "segment"


@dataclass(frozen=True)
class SegmentRule:
    """How a segment is chosen.

    Attributes:
        choice: ``best`` of n drawn at once, or one at a time until one is accepted.
        n: segments drawn at once.
        beta: multiplies the reward's lead over the threshold.
        target: reward that a finished completion should reach.
        start: first threshold, as a share of the way from the prompt's reward to the target.
        retries: segments rejected before the best of those seen is taken.
    """

    choice: Literal["best", "accept"]
    n: int = 1
    beta: float = 1.0
    target: float = 0.0
    start: float = 0.5
    retries: int = 20


@dataclass
class Segment(Request):
    """A row with one more segment, drawn with a seed of its own.

    ``begun`` tokens were there before it; ``ahead`` are the policy's logits behind it, where a pass has read its end.
    """

    begun: int = 0
    ahead: Tensor | None = None

    @property
    def new(self) -> list[int]:
        """The segment's tokens."""
        return self.token_ids[self.begun :]

    @property
    def open(self) -> bool:
        """Whether the completion goes on behind it."""
        return self.finish_reason == PAUSED


class SegmentStopping(Stopping):
    """Ends rows as ``Stopping`` does, and segments at their length, or before a token that the policy is unsure of."""

    def __init__(
        self,
        tokenizer: Any,
        eos_ids: set[int],
        settings: DecodingSettings,
        *,
        length: int,
        unsure: float | None = None,
    ) -> None:
        """As ``Stopping``.

        Args:
            tokenizer: the policy's.
            eos_ids: tokens that end a completion.
            settings: of decoding.
            length: tokens of a segment, at most.
            unsure: entropy in nats that ends a segment of at least ``settings.min_segment`` tokens.
        """
        super().__init__(tokenizer, eos_ids, settings)
        self.length, self.unsure, self.shortest = length, unsure, settings.min_segment

    def staying(self, rows: Sequence[Request], logits: Tensor, whole: Tensor) -> Sequence[int]:
        """Rows whose segment takes another token; others end here, and keep what the policy says behind them."""
        if self.unsure is None:
            return range(len(rows))
        doubt = (entropy(whole) >= self.unsure).tolist()
        for i, row in enumerate(rows):
            assert isinstance(row, Segment), "segments are drawn"
            if doubt[i] and len(row.new) >= self.shortest:
                row.finish_reason, row.ahead = PAUSED, logits[i].clone()
        return [i for i, row in enumerate(rows) if row.finish_reason is None]

    def update(self, request: Request) -> None:
        """End the row, or else its segment where it is full."""
        super().update(request)
        assert isinstance(request, Segment), "segments are drawn"
        if request.finish_reason is None and len(request.new) >= self.length:
            request.finish_reason = PAUSED


class Tracks(Alone):
    """Rows that stop one by one without leaving the cache: a track that has stopped reads a token nobody looks at."""

    def __init__(self, policy: Runner, tracks: int) -> None:
        super().__init__(policy)
        self.read = [0] * tracks
        self._living = torch.arange(tracks)

    def select_rows(self, rows: Tensor) -> None:
        """Only these tracks go on."""
        self._living = self._living[rows.cpu()]
        if len(self.token):
            self.token = self.token[rows.to(self.token.device)]

    def advance(self) -> Tensor:
        """One token through every track; the logits of those that go on."""
        living = self._living.tolist()
        tokens = torch.zeros(len(self.read), 1, dtype=torch.long, device=self.token.device)
        tokens[self._living] = self.token
        states = self.policy.states(TokenTree.chain(tokens))[:, 0]
        counts = [0] * len(self.read)
        for track in living:
            self.read[track] += 1
            counts[track] = 1
        self.policy.keep(torch.zeros(len(tokens), 1, dtype=torch.long), counts)
        return self.policy.readout(self.policy.model, states[living])


@dataclass
class _Row:
    """A request, and the segments rejected since it last grew."""

    request: Request
    prompt_reward: float
    tried: list[tuple[float, Segment]] = field(default_factory=list)


@torch.inference_mode()
def decode_segments(
    requests: Sequence[Request],
    policy: Runner,
    reader: SegmentReader,
    scorer: Scorer | CrossTokenizerScorer,
    rule: TokenRule,
    segments: SegmentRule,
    stopping: SegmentStopping,
    parts: InParts | None = None,
) -> Iterator[list[Request]]:
    """Complete all requests segment by segment; every row accepts, rejects and draws for itself.

    Args:
        requests: the rows.
        policy: the policy's runner.
        reader: rewards of what is not ended yet, over a cache where there is one.
        scorer: the same scorer, for the texts of ended completions.
        rule: of the policy's tokens.
        segments: how segments are chosen.
        stopping: when segments and rows end.
        parts: how ended completions of the only row are read, part by part, over the reader's cache; None reads all at
            once.

    Yields:
        The rows still active, after each token of the segments, each part of what has ended, and each round; only a
        round adds to them.
    """
    prompts = [request.prompt_ids for request in requests]
    logits = policy.readout(policy.model, policy.prefill(prompts))
    rows = [_Row(request, reward) for request, reward in zip(requests, reader.prefill(prompts).tolist(), strict=True)]
    while rows:
        # 1. propose: n segments behind each row, drawn as any text is
        drawn, read = yield from _draw(rows, policy, segments.n, rule, stopping, logits)
        # 2. score
        rewards = yield from _score(rows, drawn, reader, scorer, stopping, parts)
        # 3. rule: a segment for each row, or none yet
        choose = _best if segments.choice == "best" else _accepted
        chosen = choose(rows, drawn, rewards, segments, stopping.limit)
        # 4. commit
        for row, segment in zip(rows, chosen, strict=True):
            if segment is not None:
                row.request.accepted += len(segment.new)
        yield [row.request for row in rows]
        kept = [segment.new if segment is not None and segment.open else [] for segment in chosen]
        reader.keep(kept)
        logits = _settle(policy, drawn, read, chosen, logits, segments.n)
        going = [i for i, row in enumerate(rows) if row.request.finish_reason is None]
        if len(going) < len(rows):
            index = torch.tensor(going, dtype=torch.long)
            rows = [rows[i] for i in going]
            if rows:
                policy.select_rows(index)
                reader.select_rows(index)
                logits = logits[index.to(logits.device)]


def _draw(
    rows: Sequence[_Row], policy: Runner, n: int, rule: TokenRule, stopping: SegmentStopping, logits: Tensor
) -> Generator[list[Request], None, tuple[list[Segment], list[int]]]:
    """N segments of each row, side by side, and how many tokens of each lie in the policy's cache now."""
    drawn = [_branch(row.request, len(row.tried) + j) for row in rows for j in range(n)]
    branches = policy if n == 1 else fork(policy, n)
    tracks = Tracks(branches, len(drawn))
    starts = logits.repeat_interleave(n, 0)
    for _ in decode(drawn, tracks, rule, stopping, starts):
        yield [row.request for row in rows]
    if isinstance(branches, SharedPromptRunner):
        branches.drop_branches()
    for i, row in enumerate(rows):
        mine = drawn[i * n : i * n + n]
        row.request.policy_calls += sum(segment.policy_calls for segment in mine)
        row.request.scorer_calls += n
        row.request.drafted += sum(len(segment.new) for segment in mine)
    return drawn, tracks.read


def _branch(request: Request, j: int) -> Segment:
    """A row's j-th next segment, with a generator and records of its own."""
    copied = {f.name: getattr(request, f.name) for f in fields(Request) if f.init}
    begun = len(request.token_ids)
    copied |= {"token_ids": list(request.token_ids), "trace": list(request.trace), "policy_calls": 0}
    return Segment(**copied | {"seed": derive_seed(request.seed, begun, j)}, begun=begun)


def _score(
    rows: Sequence[_Row],
    drawn: Sequence[Segment],
    reader: SegmentReader,
    scorer: Scorer | CrossTokenizerScorer,
    stopping: Stopping,
    parts: InParts | None,
) -> Generator[list[Request], None, list[list[float]]]:
    """Reward of every segment: of the text so far, or of the completion that it ends."""
    n = len(drawn) // len(rows)
    lines = [[segment.new for segment in drawn[i : i + n]] for i in range(0, len(drawn), n)]
    rewards = torch.zeros(len(lines), n)
    if any(segment.open for segment in drawn):
        rewards = reader.score(lines)
    ended = [i for i, segment in enumerate(drawn) if not segment.open]
    if ended:
        active = [row.request for row in rows]
        values = yield from read_ended(scorer, [drawn[i] for i in ended], stopping, active, parts)
        rewards.view(-1)[ended] = torch.tensor(values, dtype=rewards.dtype)
    require_finite_rewards(rewards[~rewards.isneginf()].tolist())  # −∞: too long for the scorer's context
    return rewards.tolist()


def _best(
    rows: Sequence[_Row], drawn: Sequence[Segment], rewards: list[list[float]], rule: SegmentRule, limit: int
) -> list[Segment | None]:
    """Of each row's n segments the one of highest reward, the first of equals up to rounding."""
    chosen: list[Segment | None] = []
    for i, row in enumerate(rows):
        j = _highest(rewards[i])
        chosen.append(_commit(row, drawn[i * rule.n + j], rewards[i][j], best_of_n_kl(rule.n)))
    return chosen


def _accepted(
    rows: Sequence[_Row], drawn: Sequence[Segment], rewards: list[list[float]], rule: SegmentRule, limit: int
) -> list[Segment | None]:
    """Each row's segment if it is accepted, the best of all tried when the retries are used up, else None."""
    read = torch.tensor([mine[0] for mine in rewards], dtype=torch.float64)
    shares = torch.tensor([len(segment.token_ids) / limit for segment in drawn], dtype=torch.float64)
    prompts = torch.tensor([row.prompt_reward for row in rows], dtype=torch.float64)
    thresholds = segment_threshold(prompts, rule.target, rule.start, shares)
    uniforms = torch.tensor([row.request.uniform() for row in rows], dtype=torch.float64)
    taken = accept_segment(read, thresholds, rule.beta, uniforms).tolist()
    chosen: list[Segment | None] = []
    for i, row in enumerate(rows):
        row.tried.append((float(read[i]), drawn[i]))
        tries = len(row.tried)
        if rewards[i][0] == -math.inf:  # no segment behind this prefix will be read either: the policy's is taken
            chosen.append(_commit(row, drawn[i], -math.inf, 0.0))
        elif taken[i]:
            # unbiased for the KL of sampling until accepted: log a + H_{tries − 1} (E of the sum is −log of the rate)
            log_accept = min(0.0, rule.beta * float(read[i] - thresholds[i]))
            nats = log_accept + sum(1 / t for t in range(1, tries))
            chosen.append(_commit(row, drawn[i], float(read[i]), nats))
        elif tries > rule.retries:
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


def _commit(row: _Row, segment: Segment, reward: float, nats: float) -> Segment:
    """Write a segment into its row."""
    row.request.unscored += len(segment.new) if reward == -math.inf else 0
    adopt(row.request, segment, reward)
    row.request.selection_nats += nats
    row.tried.clear()
    if segment.open:
        row.request.finish_reason = None
    return segment


def _settle(
    policy: Runner,
    drawn: Sequence[Segment],
    read: Sequence[int],
    chosen: Sequence[Segment | None],
    logits: Tensor,
    n: int,
) -> Tensor:
    """Leave in the policy's cache what was chosen and nothing else; its logits (B, V) behind that."""
    behind = [segment is not None and segment.open for segment in chosen]
    if n > 1:  # branches are gone already: the chosen ones are read in one pass
        unread = [s.new if s is not None and b else [] for s, b in zip(chosen, behind, strict=True)]
        return _logits(read_ragged(policy, unread, logits))
    unread, forget, before = [], [], list(logits)
    for i, segment in enumerate(chosen):
        here = segment is drawn[i] and behind[i]
        forget.append(0 if here else read[i])
        unread.append(drawn[i].new[read[i] :] if here else segment.new if segment is not None and behind[i] else [])
        ahead = drawn[i].ahead
        if here and ahead is not None:
            before[i] = ahead
    policy.forget(forget)
    return _logits(read_ragged(policy, unread, torch.stack(before)))


def _logits(read: Tensor | None) -> Tensor:
    assert read is not None, "rows that read nothing have logits already"
    return read
