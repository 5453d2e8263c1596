"""Where drafted tokens come from (the policy unguided, a small model, the text so far), and how many are worth it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from rgtg.decoding.request import Request, process
from rgtg.decoding.runners.model_runner import Runner, append_tokens
from rgtg.decoding.sampling import Vocabulary, guided_log_probs, propose, sample

# Drafts that need no model of their own.
DRAFTS = ("policy", "prompt-lookup")
MAX_DRAFT = 8
_LOOKUP_NGRAM = 3
# Rounds without a draft after which one token is drafted to see whether it has become worth it.
_PROBE_EVERY = 16


@dataclass
class Draft:
    """Drafted tokens of a batch, and the distribution that each was drawn from.

    Attributes:
        tokens: (B, n).
        counts: drafted tokens of each row; the rest is padding.
        ids: (B, n, Q) support of the draft distributions q.
        log_probs: (B, n, Q) of q, in nats, normalised.
        logits: (B, n + 1, V) the policy's, where drafting read it all along; else None.
    """

    tokens: Tensor
    counts: list[int]
    ids: Tensor
    log_probs: Tensor
    logits: Tensor | None = None

    def policy_passes(self, row: int) -> int:
        """Policy passes that a row's round took: one for all places, or one for each."""
        return 1 if self.logits is None else self.counts[row] + 1


class Drafter(Protocol):
    """Proposes the next few tokens of every row."""

    def prefill(self, rows: Sequence[Request]) -> None:
        """Start with these prompts."""
        ...

    def draft(self, rows: Sequence[Request], newest: Tensor, counts: list[int], sampler: "DraftSampler") -> Draft:
        """Draft ``counts[b]`` tokens after each row's ``newest`` token (B, 1), which no model has read yet."""
        ...

    def commit(self, counts: Sequence[int]) -> None:
        """``counts[b]`` of row b's drafted tokens were accepted."""
        ...

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        ...

    def cost(self, n: int) -> float:
        """Of drafting n tokens and reading them with the policy, in the units of ``Roofline``."""
        ...


@dataclass(frozen=True)
class DraftSampler:
    """How drafts are drawn: from the same candidates and at the same temperature as the guided distribution."""

    top_k: int | None
    top_p: float
    temperature: float
    vocabulary: Vocabulary | None = None

    def distribution(self, logits: Tensor, rows: Sequence[Request], drafted: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Candidates and their unguided log-probabilities (B, K), each row's processors applied."""
        log_probs = process(rows, logits, torch.log_softmax(logits.float(), -1), drafted)
        ids, candidate_log_probs = propose(log_probs, top_k=self.top_k, top_p=self.top_p, vocabulary=self.vocabulary)
        return ids, guided_log_probs(candidate_log_probs, torch.zeros_like(candidate_log_probs), 0.0, self.temperature)


@dataclass(frozen=True)
class Roofline:
    """Cost of one forward pass. The draft length comes from this model, not from timings, so outputs are reproducible.

    A pass over R rows costs ``weight bytes · max(1, 0.6 + R / compute_bound_rows)``: it is bound by reading the
    weights, or by arithmetic.

    Attributes:
        policy: bytes of the policy's weights.
        scorer: bytes of the scorer's weights; 0 without one.
        compute_bound_rows: rows from which on a pass is bound by arithmetic.
        candidates: per step.
    """

    policy: float
    scorer: float
    compute_bound_rows: float
    candidates: int

    def pass_cost(self, size: float, rows: int) -> float:
        """Of one pass over so many rows."""
        return size * max(1.0, 0.6 + rows / self.compute_bound_rows)

    def verify(self, n: int) -> float:
        """Of the scorer's pass over n drafted tokens and the candidates at each place."""
        return self.pass_cost(self.scorer, n + (n + 1) * self.candidates) if self.scorer else 0.0


@dataclass
class Acceptance:
    """How often a request's recent drafts were accepted; chooses how many tokens to draft next."""

    accepted: float = 4.0
    tried: float = 5.0
    idle: int = 0

    def update(self, accepted: int, drafted: int) -> None:
        """Note one round; old rounds fade."""
        if drafted:
            self.accepted = 0.9 * self.accepted + accepted
            self.tried = 0.9 * self.tried + min(accepted + 1, drafted)
        self.idle = 0 if drafted else self.idle + 1

    def best_length(self, cost: Sequence[float]) -> int:
        """The n of greatest expected tokens per cost, (1 − αⁿ⁺¹)/(1 − α) tokens for ``cost[n]``."""
        if self.idle >= _PROBE_EVERY:
            return min(1, len(cost) - 1)
        rate = min(self.accepted / self.tried, 0.999)
        gain = [(1 - rate ** (n + 1)) / (1 - rate) / c for n, c in enumerate(cost)]
        return max(range(len(cost)), key=gain.__getitem__)


class PolicyDrafter:
    """Drafts with the policy itself, unguided: worth it where the scorer is the dearer model.

    The passes that draft are those the policy has to make anyway, so only the scorer's are saved.
    """

    def __init__(self, policy: Runner, roofline: Roofline) -> None:
        self.policy, self.roofline = policy, roofline

    def prefill(self, rows: Sequence[Request]) -> None:
        """Does nothing: the policy has read the prompts."""

    def draft(self, rows: Sequence[Request], newest: Tensor, counts: list[int], sampler: DraftSampler) -> Draft:
        """One policy pass for the newest token and one for each drafted token."""
        return draft_with(self.policy, rows, newest, counts, sampler)

    def commit(self, counts: Sequence[int]) -> None:
        """Does nothing: the loop rolls the policy's cache back."""

    def select_rows(self, rows: Sequence[int]) -> None:
        """Does nothing: the loop selects the policy's rows."""

    def cost(self, n: int) -> float:
        """N + 1 passes of one row."""
        return (n + 1) * self.roofline.policy


class ModelDrafter:
    """Drafts with a small causal model that has the policy's tokenizer."""

    def __init__(self, runner: Runner, size: float, roofline: Roofline) -> None:
        self.runner, self.size, self.roofline = runner, size, roofline
        self._read: list[int] = []

    def prefill(self, rows: Sequence[Request]) -> None:
        """Read the prompts."""
        self.runner.prefill([row.prompt_ids for row in rows])
        self._read = [0] * len(rows)

    def draft(self, rows: Sequence[Request], newest: Tensor, counts: list[int], sampler: DraftSampler) -> Draft:
        """One pass of the small model for the newest token and one for each drafted token."""
        draft = draft_with(self.runner, rows, newest, counts, sampler)
        self._read = [draft.tokens.shape[1]] * len(rows)
        draft.logits = None  # they are not the policy's
        return draft

    def commit(self, counts: Sequence[int]) -> None:
        """Roll back what was rejected."""
        self.runner.rollback([read - kept for read, kept in zip(self._read, counts, strict=True)])

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        self.runner.select_rows(rows)

    def cost(self, n: int) -> float:
        """N + 1 passes of the small model, one of the policy over n + 1 rows."""
        return (n + 1) * self.size + self.roofline.pass_cost(self.roofline.policy, n + 1)


class PromptLookupDrafter:
    """Prompt look-up: what followed the last occurrence of the newest few tokens in the text so far.

    Source: Saxena 2023 (prompt lookup decoding). Costs nothing; good where completions quote their prompt.
    """

    def __init__(self, roofline: Roofline) -> None:
        self.roofline = roofline

    def prefill(self, rows: Sequence[Request]) -> None:
        """Does nothing: there is no cache."""

    def draft(self, rows: Sequence[Request], newest: Tensor, counts: list[int], sampler: DraftSampler) -> Draft:
        """Rows whose newest tokens have not occurred before draft none."""
        found = [look_up([*row.prompt_ids, *row.token_ids], n) for row, n in zip(rows, counts, strict=True)]
        width = max(map(len, found))
        tokens = torch.tensor([[*tokens, *[0] * (width - len(tokens))] for tokens in found], dtype=torch.long)
        tokens = tokens.reshape(len(rows), width).to(newest.device)
        certain = torch.zeros(tokens.shape, device=newest.device)[..., None]
        return Draft(tokens, [len(tokens) for tokens in found], tokens[..., None], certain)

    def commit(self, counts: Sequence[int]) -> None:
        """Does nothing: there is no cache."""

    def select_rows(self, rows: Sequence[int]) -> None:
        """Does nothing: there is no cache."""

    def cost(self, n: int) -> float:
        """One pass of the policy over n + 1 rows."""
        return self.roofline.pass_cost(self.roofline.policy, n + 1)


def draft_with(
    runner: Runner, rows: Sequence[Request], newest: Tensor, counts: list[int], sampler: DraftSampler
) -> Draft:
    """Draw tokens one by one from a model, unguided; it reads the newest token and every drafted one."""
    width = max(counts)
    token = newest
    drafted: list[list[int]] = [[] for _ in rows]
    every, tokens, ids, log_probs = [], [], [], []
    for step in range(width + 1):
        logits = runner.head(append_tokens(runner, token).final)
        every.append(logits)
        if step == width:
            break
        q_ids, q = sampler.distribution(logits, rows, drafted)
        uniforms = [row.uniform() if step < n else 0.0 for row, n in zip(rows, counts, strict=True)]
        drawn = sample(q, torch.tensor(uniforms, dtype=torch.float64, device=q.device))
        token = q_ids.gather(1, drawn[:, None])
        for mine, t in zip(drafted, token[:, 0].tolist(), strict=True):
            mine.append(t)
        tokens.append(token)
        ids.append(q_ids)
        log_probs.append(q)
    if not tokens:
        return replace(no_draft(len(rows), newest.device), logits=torch.stack(every, 1))
    stacked = torch.cat(tokens, 1), counts, torch.stack(ids, 1), torch.stack(log_probs, 1)
    return Draft(*stacked, logits=torch.stack(every, 1))


def no_draft(rows: int, device: Any) -> Draft:
    """A draft of no tokens."""
    tokens = torch.zeros(rows, 0, dtype=torch.long, device=device)
    return Draft(tokens, [0] * rows, tokens[..., None], tokens[..., None].float())


def look_up(text: list[int], n: int) -> list[int]:
    """Up to n tokens that followed the last earlier occurrence of the text's end (3 tokens, else 2, else 1).

    >>> look_up([1, 2, 3, 4, 1, 2, 3], 2)
    [4, 1]
    """
    for size in range(min(_LOOKUP_NGRAM, len(text) - 1), 0, -1):
        end = text[-size:]
        for start in range(len(text) - size - 1, -1, -1):
            if text[start : start + size] == end:
                return text[start + size : start + size + n]
    return []
