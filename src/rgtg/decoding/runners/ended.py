"""Rewards of ended completions: all at once, or, of one row, in parts over the cache of what they have in common."""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

from rgtg.decoding.request import Request, Stopping, source_of
from rgtg.decoding.runners.model_runner import TreeRunner
from rgtg.decoding.runners.scorer_runner import read_chain
from rgtg.errors import NonFiniteError
from rgtg.models.scorers.base import Scorer
from rgtg.models.scorers.cross_tokenizer import CrossTokenizerScorer
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.models.scorers.token_scorer import require_within_context
from rgtg.tokenization.encoding import decode_completion, encode_completion


@dataclass
class InParts:
    """How one row's ended completions are read between the steps of others.

    Attributes:
        scorer: a causal reward model with the policy's tokenizer.
        runner: of it; has read the prompt and what was kept of the completion.
        chunk: tokens that are read at once.
    """

    scorer: PrefixScorer
    runner: TreeRunner
    chunk: int


def read_ended(
    scorer: Scorer | CrossTokenizerScorer,
    drawn: Sequence[Request],
    stopping: Stopping,
    rows: list[Request],
    parts: InParts | None,
) -> Generator[list[Request], None, list[float]]:
    """Reward of each ended completion, as ``rewards_of``.

    Args:
        scorer: reads them.
        drawn: what has ended.
        stopping: when it did.
        rows: that they were drawn for; yielded after each part.
        parts: how the completions of the only row are read in parts; None reads all at once.

    Raises:
        NonFiniteError: NaN or infinite.
    """
    if parts is None:
        return rewards_of(scorer, drawn, stopping)
    held = [*rows[0].prompt_ids, *rows[0].token_ids]
    rewards = []
    for row in drawn:
        prompt, completion = _as_scored(parts.scorer, row, stopping)
        require_within_context([(prompt, completion)], parts.scorer.max_length)
        rewards.append((yield from _read_beside(parts, held, [*prompt, *completion], rows)))
    return require_finite_rewards(rewards)


@torch.inference_mode()
def _read_beside(
    parts: InParts, held: list[int], text: list[int], rows: list[Request]
) -> Generator[list[Request], None, float]:
    """A text's reward; the runner holds another text, which begins alike, before and after."""
    runner = parts.runner
    # one token at least is read: its state is the reward's
    shared = next((i for i, (a, b) in enumerate(zip(held, text[:-1], strict=False)) if a != b), None)
    shared = min(len(held), len(text) - 1) if shared is None else shared
    runner.forget([len(held) - shared])
    states = torch.zeros(0)
    for start in range(shared, len(text), parts.chunk):
        states = read_chain(runner, torch.tensor([text[start : start + parts.chunk]]))[:, -1]
        yield rows
    runner.forget([len(text) - shared])
    if held[shared:]:  # an empty completion, or a stop text that begins before its segment: a few tokens
        read_chain(runner, torch.tensor([held[shared:]]))
    return float(runner.readout(runner.model, states)[0])


def rewards_of(scorer: Scorer | CrossTokenizerScorer, drawn: Sequence[Request], stopping: Stopping) -> list[float]:
    """Reward of each ended completion: the one that ``rgtg score`` gives its text.

    A text over the context of a scorer with a tokenizer of its own is worth −∞, and its tokens are counted as unscored.

    Raises:
        NonFiniteError: NaN or infinite.
    """
    if isinstance(scorer, CrossTokenizerScorer):
        sources = [source_of(row, stopping.tokenizer) for row in drawn]
        ended = [row.finish_reason == "stop" for row in drawn]
        return count_unscored(scorer.rewards(sources, [row.text for row in drawn], finished=ended), drawn)
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


def _as_scored(scorer: Scorer, row: Request, stopping: Stopping) -> tuple[list[int], list[int]]:
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
