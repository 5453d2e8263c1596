"""Rewards of segments after a growing completion, and of ended completions: over a cache, or of whole texts."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rgtg.decoding.request import Request, StoppingCriteria, prompt_source
from rgtg.decoding.runners.model_runner import Runner, TreeRunner, append_tokens, outputs
from rgtg.decoding.runners.policy_runner import MAX_WIDTH
from rgtg.decoding.runners.token_tree import States, TokenTree
from rgtg.errors import NonFiniteError
from rgtg.models.scorers.base import Scorer
from rgtg.models.scorers.cross_tokenizer import CrossTokenizerScorer
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.models.scorers.token_scorer import require_within_context
from rgtg.tokenization.conversation import encode_completed
from rgtg.tokenization.encoding import decode_completion, encode_completion
from rgtg.tokenization.padding import pad_right

# Segments of each row, as token ids: rows × segments × tokens; every row has as many segments, none is empty.
Segments = Sequence[Sequence[Sequence[int]]]


class SegmentScorer(Protocol):
    """What segment-wise decoding needs of a scorer."""

    @property
    def runner(self) -> Runner | None:
        """Whose cache must be prefilled with the prompts; None where there is no cache."""
        ...

    def start(self, requests: Sequence[Request], states: States | None) -> Tensor:
        """Rewards (B,) of the prompts; ``states`` (B, H) of the prefilled runner."""
        ...

    def score(self, segments: Segments) -> Tensor:
        """Rewards (B, n) of the completion so far with each of n segments after it; nothing is appended."""
        ...

    def append(self, segments: Sequence[Sequence[int]]) -> None:
        """Append one segment per row; an empty one appends nothing."""
        ...

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows only."""
        ...


class CachedSegmentScorer:
    """A causal reward model with the policy's tokenizer: all segments of a row are branches of one token tree."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def start(self, requests: Sequence[Request], states: States | None) -> Tensor:
        """Rewards (B,) of the prompts, from states (B, H) at their last tokens."""
        assert states is not None, "the cache is prefilled"
        return self.runner.head(states.final).float().cpu()

    def score(self, segments: Segments) -> Tensor:
        """Rewards (B, n), in passes of at most ``MAX_WIDTH`` nodes (or one segment)."""
        width = max(len(tokens) for row in segments for tokens in row)
        at_once = max(1, MAX_WIDTH // width)
        n = len(segments[0])
        parts = [self._score([row[i : i + at_once] for row in segments], width) for i in range(0, n, at_once)]
        return torch.cat(parts, 1)

    def _score(self, segments: Segments, width: int) -> Tensor:
        n = len(segments[0])
        ids, _ = pad_right([tokens for row in segments for tokens in row], 0, "cpu")
        ids = torch.nn.functional.pad(ids, (0, width - ids.shape[1])).reshape(len(segments), -1)
        parents = tuple(-1 if step == 0 else branch * width + step - 1 for branch in range(n) for step in range(width))
        scores = outputs(self.runner, TokenTree(ids, parents)).float().cpu()  # (B, n·width)
        ends = [[branch * width + len(tokens) - 1 for branch, tokens in enumerate(row)] for row in segments]
        return scores.gather(1, torch.tensor(ends))

    def append(self, segments: Sequence[Sequence[int]]) -> None:
        """Append one segment per row; an empty one appends nothing."""
        append_ragged(self.runner, segments)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows only."""
        self.runner.select_rows(rows)


class _WholeTexts:
    """What scorers without a cache share: each row's request, and the tokens of its completion so far."""

    runner: Runner | None = None
    requests: list[Request]
    tokens: list[list[int]]

    def start(self, requests: Sequence[Request], states: States | None) -> Tensor:
        """Rewards (B,) of the prompts."""
        self.requests, self.tokens = list(requests), [[] for _ in requests]
        return self.score([[[]] for _ in requests])[:, 0]

    def score(self, segments: Segments) -> Tensor:
        """Rewards (B, n)."""
        raise NotImplementedError

    def append(self, segments: Sequence[Sequence[int]]) -> None:
        """Append one segment per row; an empty one appends nothing."""
        for held, tokens in zip(self.tokens, segments, strict=True):
            held.extend(tokens)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows only."""
        self.tokens, self.requests = [self.tokens[i] for i in rows], [self.requests[i] for i in rows]


class WholeTextSegmentScorer(_WholeTexts):
    """Any scorer of prefixes: every segment's whole text is read anew."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    def score(self, segments: Segments) -> Tensor:
        """Rewards (B, n)."""
        prompts: list[list[int]] = []
        completions: list[list[int]] = []
        for request, held, row in zip(self.requests, self.tokens, segments, strict=True):
            for tokens in row:
                text = [*held, *tokens]
                # an empty completion is worth what its prompt is: the prompt's last token stands for it
                prompts.append(request.prompt_ids if text else request.prompt_ids[:-1])
                completions.append(text or request.prompt_ids[-1:])
        scores = self.scorer.score_prefixes(prompts, completions)
        return torch.stack([mine[-1] for mine in scores]).float().reshape(len(self.requests), -1)


class CrossTokenizerSegmentScorer(_WholeTexts):
    """A reward model with a tokenizer of its own: every segment's whole text, in that tokenizer's tokens.

    A text that does not fit its context is worth −∞.
    """

    def __init__(self, scorer: CrossTokenizerScorer, tokenizer: Any) -> None:
        """``tokenizer``: the policy's."""
        self.scorer, self.tokenizer = scorer, tokenizer

    def score(self, segments: Segments) -> Tensor:
        """Rewards (B, n)."""
        sources, texts = [], []
        for request, held, mine in zip(self.requests, self.tokens, segments, strict=True):
            sources += [prompt_source(request, self.tokenizer)] * len(mine)
            texts += [decode_completion(self.tokenizer, request.prompt_ids, [*held, *tokens]) for tokens in mine]
        kwargs = self.requests[0].settings.chat_template_kwargs
        rewards = self.scorer.rewards(sources, texts, finished=False, chat_template_kwargs=kwargs)
        scored = [-math.inf if reward is None else reward for reward in rewards]
        return torch.tensor(scored).reshape(len(self.tokens), -1)


def append_ragged(runner: Runner, tokens: Sequence[Sequence[int]], before: Tensor | None = None) -> Tensor | None:
    """Read and commit some tokens of each row, possibly none; the head's output (B, …) at each row's last.

    Args:
        runner: has read what is before.
        tokens: of each row.
        before: output of rows that read nothing; needed if there are any.
    """
    counts = [len(row) for row in tokens]
    if not max(counts):
        return before
    ids, _ = pad_right(tokens, 0, "cpu")
    final = runner.read(TokenTree.chain(ids)).final
    runner.commit(torch.arange(ids.shape[1]).expand(len(ids), -1), counts)
    rows, last = torch.arange(len(ids)), torch.tensor(counts).clamp(min=1) - 1
    new = runner.head(final[rows, last])
    if before is None:
        return new
    read = (torch.tensor(counts) > 0).to(new.device)
    return torch.where(read.reshape(-1, *[1] * (new.dim() - 1)), new, before.to(new))


class ChunkedRewards:
    """Rewards of one row's ended completions, read in chunks between the steps of others.

    The runner holds the prompt and the completion so far; a text is read from where it differs, and rolled back.
    """

    def __init__(self, scorer: PrefixScorer, runner: TreeRunner, chunk: int) -> None:
        """Set up.

        Args:
            scorer: a causal reward model with the policy's tokenizer.
            runner: reads its model.
            chunk: tokens that are read at once.
        """
        self.scorer, self.runner, self.chunk = scorer, runner, chunk
        self.rewards: list[float] = []

    def read(self, request: Request, drawn: Sequence[Request], stopping: StoppingCriteria) -> Iterator[None]:
        """Read every ended completion; yields after each chunk, and leaves ``rewards``.

        Raises:
            NonFiniteError: NaN or infinite.
        """
        held = [*request.prompt_ids, *request.token_ids]
        self.rewards = []
        for row in drawn:
            prompt, completion = _as_scored(self.scorer, row, stopping)
            require_within_context([(prompt, completion)], self.scorer.max_length)
            yield from self._read_one(held, [*prompt, *completion])
        require_finite_rewards(self.rewards)

    def _read_one(self, held: list[int], text: list[int]) -> Iterator[None]:
        """Add a text's reward; the runner holds ``held``, which begins like the text, before and after."""
        # one token at least is read: its state is the reward's
        shared = next((i for i, (a, b) in enumerate(zip(held, text[:-1], strict=False)) if a != b), None)
        shared = min(len(held), len(text) - 1) if shared is None else shared
        self.runner.rollback([len(held) - shared])
        states = None
        for start in range(shared, len(text), self.chunk):
            with torch.inference_mode():
                states = append_tokens(self.runner, torch.tensor([text[start : start + self.chunk]]))
            yield
        with torch.inference_mode():
            self.runner.rollback([len(text) - shared])
            if held[shared:]:  # an empty completion, or a stop text that begins before its segment: a few tokens
                append_tokens(self.runner, torch.tensor([held[shared:]]))
            assert states is not None, "a text has at least one token"
            self.rewards.append(float(self.runner.head(states.final)[0]))


def rewards_of(
    scorer: Scorer | CrossTokenizerScorer, drawn: Sequence[Request], stopping: StoppingCriteria
) -> list[float]:
    """Reward of each ended completion: the one that ``rgtg score`` gives its text.

    A text over the context of a scorer with a tokenizer of its own is worth −∞, and its tokens count as unscored.

    Raises:
        NonFiniteError: NaN or infinite.
    """
    if isinstance(scorer, CrossTokenizerScorer):
        sources = [prompt_source(row, stopping.tokenizer) for row in drawn]
        ended = [row.finish_reason == "stop" for row in drawn]
        rewards = scorer.rewards(
            sources, [row.text for row in drawn], finished=ended,
            chat_template_kwargs=drawn[0].settings.chat_template_kwargs,
        )  # fmt: skip
        return count_unscored(rewards, drawn)
    read = [_as_scored(scorer, row, stopping) for row in drawn]
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


def _as_scored(scorer: Scorer, row: Request, stopping: StoppingCriteria) -> tuple[list[int], list[int]]:
    """Prompt and completion ids as the scorer reads them: an ended completion is closed as in training."""
    if row.source is not None and not isinstance(row.source, str) and row.finish_reason == "stop":
        return encode_completed(
            stopping.tokenizer, row.source, row.text, finished=True, append_eos=scorer.append_eos,
            whole=scorer.info is None, template_kwargs=row.settings.chat_template_kwargs,
        )  # fmt: skip
    closing = [stopping.tokenizer.eos_token_id] if scorer.append_eos else []
    ids = row.token_ids
    if stopping.stop and row.text != decode_completion(stopping.tokenizer, row.prompt_ids, ids):
        # the ids hold the stop text, which may begin inside a token
        text = encode_completion(stopping.tokenizer, row.prompt, row.text, append_eos=False, prompt_ids=row.prompt_ids)
        ids = [*text, *closing]
    elif stopping.ends_at(row, ids[-1]):
        ids = [*ids[:-1], *closing]
    # an empty text that no EOS closes is worth what its prompt is
    return (row.prompt_ids, ids) if ids else (row.prompt_ids[:-1], row.prompt_ids[-1:])
