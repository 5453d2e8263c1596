"""How each kind of scorer scores candidates: heads on the policy's states, and models of their own over a cache."""

import copy
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from rgtg.decoding.request import Request
from rgtg.decoding.runners.base import PolicyState
from rgtg.decoding.runners.model_runner import Runner, append_tokens, outputs
from rgtg.decoding.runners.policy_runner import MAX_WIDTH, TorchPolicyRunner
from rgtg.decoding.runners.shared_prefix_runner import fork
from rgtg.decoding.runners.token_tree import States, TokenTree
from rgtg.models.loading.tensor_parallel import broadcast_from_rank0

_NOTHING = torch.zeros(0, 0, dtype=torch.long)


class StateHeadRunner:
    """A head on states at the candidates: the policy's pass over them is also the scorer's.

    Serves state heads (the policy's own states) and LoRA adapters with a scalar head (the adapted half's states).
    """

    def __init__(self, model: Any, head: Any) -> None:
        """``head``: states (…, H) → scores (…)."""
        self.model, self.head = model, head

    def score(self, tree: States) -> Tensor:
        """Scores (B, K), fp32, from the states of a tree of candidates."""
        scores = [self.head(states) for states in torch.split(_required(tree.hooked), MAX_WIDTH, dim=1)]
        return broadcast_from_rank0(self.model, scores[0] if len(scores) == 1 else torch.cat(scores, 1)).float()


class VocabHeadRunner:
    """A head that scores every next token from the state at the prefix: no pass over the candidates at all."""

    def __init__(self, model: Any, head: Any) -> None:
        """``head``: states (B, H) and candidates (B, K) → scores (B, K)."""
        self.model, self.head = model, head

    def score(self, hidden: Tensor | None, candidate_ids: Tensor) -> Tensor:
        """Scores (b, K), fp32, of candidates (b, K) at states (b, H)."""
        states = _required(hidden)
        scores = self.head(states, candidate_ids.to(states.device)).float().to(candidate_ids.device)
        return broadcast_from_rank0(self.model, scores)


class _CachedScorer:
    """What scorers with the policy's tokenizer and a cache share: rows, and appended tokens (B, n) not read yet."""

    scores_any_rows = False
    record = None

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._pending = _NOTHING

    @property
    def calls(self) -> int:
        """Forward passes so far."""
        return self.runner.calls

    def fresh(self, longest: int, width: int) -> Self:
        """A runner of the same scorer without rows, with room for ``longest`` tokens and a tree of ``width`` nodes."""
        other = copy.copy(self)
        other.runner, other._pending = self.runner.fresh(longest + width), _NOTHING
        return other

    def begin(self, requests: Sequence[Request]) -> list[list[int]] | None:
        """The prompts themselves, for the cache to be prefilled with."""
        return [request.prompt_ids for request in requests]

    def prefill(self, requests: Sequence[Request], prompts: Sequence[Sequence[int]]) -> None:
        """Start with these requests' prompts as rows, and read them."""
        self.runner.prefill(prompts)

    def prefilled(self, states: States) -> None:
        """The cache has been prefilled; nothing of the states (B, H) at the ends of the prompts is needed."""

    def append(self, tokens: Tensor) -> None:
        """Append tokens (B, 1), to be read later."""
        self._pending = torch.cat([self._pending, tokens], 1) if self._pending.numel() else tokens

    def read_pending(self) -> None:
        """Read the appended tokens that have not been read."""
        if self._pending.numel():
            append_tokens(self.runner, self._pending)
            self._pending = self._pending[:, :0]

    def cached_text(self, row: int, text: list[int]) -> list[int]:
        """The tokens that a row's cache was filled with: those of the text itself."""
        return text

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows only, in this order; a row named twice is copied."""
        if self._pending.numel():
            self._pending = self._pending[list(rows)]
        self.runner.select_rows(rows)

    def _copy(self, rows: Sequence[int]) -> Self:
        copied = copy.copy(self)
        copied.runner = self.runner.copy_rows(rows)
        copied._pending = self._pending[list(rows)] if self._pending.numel() else self._pending
        return copied

    def fork(self, request: Request) -> Self:
        """Itself: its rows hold nothing but what was read."""
        return self

    def branch(self, n: int, requests: Sequence[Request]) -> Self:
        """A runner of n rows for each row; they share what the rows have read, and take this runner's place."""
        self.read_pending()
        other = copy.copy(self)
        other.runner = fork(self.runner, n)  # type: ignore[assignment]
        return other

    def set_requests(self, requests: Sequence[Request]) -> None:
        """Nothing to do: its rows hold nothing of their requests."""

    def add(self, other: Self) -> None:
        """Append copies of another runner's rows; tokens that wait in either are read first."""
        for one in (self, other):
            one.read_pending()
        self.runner.add(other.runner)  # type: ignore[arg-type]


class SeparateScorerRunner(_CachedScorer):
    """A reward model of its own: all candidates in one pass over a token tree, one score at each.

    Tokens that wait are read in the same pass, as a chain before the candidates.
    """

    def score(self, candidate_ids: Tensor) -> Tensor:
        """Scores (B, K) in one tree pass (several where there are more candidates than ``MAX_WIDTH``)."""
        if candidate_ids.shape[1] <= MAX_WIDTH:
            n = self._pending.shape[1]
            tree = chain_and_leaves(self._pending, candidate_ids) if n else TokenTree.leaves(candidate_ids)
            scores = self.runner.head(self.runner.read(tree).final)
            return scores[:, n:].float().to(candidate_ids.device)
        self.read_pending()
        parts = [outputs(self.runner, TokenTree.leaves(ids)) for ids in torch.split(candidate_ids, MAX_WIDTH, dim=1)]
        return torch.cat(parts, 1).float().to(candidate_ids.device)

    def commit(self, candidate_ids: Tensor, choice: Tensor) -> None:
        """Append candidate ``choice[b]`` (B,) after the tokens that were read with it; after several passes, later."""
        if candidate_ids.shape[1] > MAX_WIDTH:
            self.append(candidate_ids.gather(1, choice[:, None]))
            return
        n = self._pending.shape[1]
        path = choice[:, None] + n
        if n:
            path = torch.cat([torch.arange(n, device=path.device).expand(len(path), -1), path], 1)
        self.runner.commit(path)
        if n:
            self._pending = self._pending[:, :0]

    def copy_rows(self, rows: Sequence[int]) -> "SeparateScorerRunner":
        """A runner of its own with copies of some rows."""
        return self._copy(rows)


class TokenRewardRunner(_CachedScorer):
    """A model of its own whose state at the prefix scores every next token; only chosen tokens are ever read."""

    scores_any_rows = True

    def __init__(self, runner: Runner, head: Any) -> None:
        """``runner`` reads the layer that ``head`` scores from."""
        super().__init__(runner)
        self.head = VocabHeadRunner(runner.model, head)
        self.hidden: Tensor | None = None  # (B, H) at the newest token read

    def fresh(self, longest: int, width: int) -> Self:
        """A runner of the same scorer without rows, with room for ``longest`` tokens; no tree is ever read."""
        return super().fresh(longest, 1)

    def prefill(self, requests: Sequence[Request], prompts: Sequence[Sequence[int]]) -> None:
        """Start with these requests' prompts as rows, and read them."""
        self.hidden = self.runner.prefill(prompts).hooked

    def prefilled(self, states: States) -> None:
        """Take over the states (B, H) at the ends of the prompts."""
        self.hidden = states.hooked

    def read_pending(self) -> None:
        """Read the appended tokens that have not been read."""
        if self._pending.numel():
            self.hidden = append_tokens(self.runner, self._pending).hooked
            self._pending = self._pending[:, :0]

    def score(self, candidate_ids: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Scores (b, K) of some rows (None: all): read the tokens that wait, then apply the head to the state."""
        self.read_pending()
        hidden = _required(self.hidden)
        return self.head.score(hidden if rows is None else hidden[list(rows)], candidate_ids)

    def commit(self, candidate_ids: Tensor, choice: Tensor) -> None:
        """Append candidate ``choice[b]``, to be read before the next score."""
        self.append(candidate_ids.gather(1, choice[:, None]))

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows only, in this order; a row named twice is copied."""
        super().select_rows(rows)
        self.hidden = None if self.hidden is None else self.hidden[list(rows)]

    def copy_rows(self, rows: Sequence[int]) -> "TokenRewardRunner":
        """A runner of its own with copies of some rows."""
        copied = self._copy(rows)
        copied.hidden = None if self.hidden is None else self.hidden[list(rows)]
        return copied

    def branch(self, n: int, requests: Sequence[Request]) -> "TokenRewardRunner":
        """A runner of n rows for each row; they share what the rows have read, and take this runner's place."""
        other = super().branch(n, requests)
        other.hidden = _required(self.hidden).repeat_interleave(n, 0)
        return other

    def add(self, other: Self) -> None:
        """Append copies of another runner's rows; tokens that wait in either are read first."""
        super().add(other)
        theirs = _required(other.hidden)
        self.hidden = theirs if self.hidden is None else torch.cat([self.hidden, theirs])


class SecondPassRunner:
    """A scorer on the policy's states whose pass the policy's own cannot serve (a second LoRA, another layer).

    It reads the policy again, in a pass of its own.
    """

    scores_any_rows = False
    record = None

    def __init__(self, policy: TorchPolicyRunner, head: StateHeadRunner | VocabHeadRunner) -> None:
        self.policy, self.head = policy, head
        self.state: PolicyState | None = None
        self._tree: States | None = None
        self._pending: Tensor | None = None  # (B, 1) the newest token, not read yet

    @property
    def runner(self) -> Any:
        """The model runner that reads for it."""
        return self.policy.runner

    @property
    def calls(self) -> int:
        """Forward passes so far."""
        return int(self.runner.calls)

    def fresh(self, longest: int, width: int) -> "SecondPassRunner":
        """A runner of the same scorer without rows, with room for ``longest`` tokens and a tree of ``width`` nodes."""
        reads = width if isinstance(self.head, StateHeadRunner) else 1  # a vocabulary head reads no candidates
        return SecondPassRunner(self.policy.fresh(longest, reads), self.head)

    def begin(self, requests: Sequence[Request]) -> list[list[int]] | None:
        """The prompts, once for each half of a doubled batch."""
        return [request.prompt_ids for request in requests] * self.policy.copies

    def prefill(self, requests: Sequence[Request], prompts: Sequence[Sequence[int]]) -> None:
        """Start with these requests' prompts as rows, and read them."""
        self.state = self.policy.prefill(prompts)

    def prefilled(self, states: States) -> None:
        """Take over the states (B, H) at the ends of the prompts."""
        self.state = self.policy.predict(self.policy.split(states))

    def score(self, candidate_ids: Tensor) -> Tensor:
        """Scores (B, K): read the newest token if it waits, then score the candidates."""
        self.read_pending()
        if isinstance(self.head, VocabHeadRunner):
            return self.head.score(_required(self.state).hidden, candidate_ids)
        self._tree = self.policy.tree(candidate_ids)
        return self.head.score(self._tree)

    def commit(self, candidate_ids: Tensor, choice: Tensor) -> None:
        """Append candidate ``choice[b]`` of row b."""
        if self._tree is None:
            self._pending = candidate_ids.gather(1, choice[:, None])
            return
        state = self.policy.predict(self._tree.at((torch.arange(len(choice), device=candidate_ids.device), choice)))
        self.policy.commit(candidate_ids, choice)
        self.state, self._tree = state, None

    def append(self, tokens: Tensor) -> None:
        """Append tokens (B, 1) that were not scored."""
        self.read_pending()
        self._pending, self._tree = tokens, None

    def cached_text(self, row: int, text: list[int]) -> list[int]:
        """The tokens that a row's cache was filled with: those of the text itself."""
        return text

    def read_pending(self) -> None:
        """Read the newest token, if it waits."""
        if self._pending is not None:
            self.state, self._pending = self.policy.step(self._pending), None

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows only, in this order; a row named twice is copied."""
        self.policy.select_rows(rows)
        self.state = None if self.state is None else select_state(self.state, rows)
        self._pending = None if self._pending is None else self._pending[list(rows)]
        self._tree = None if self._tree is None else self._tree.at(list(rows))

    def copy_rows(self, rows: Sequence[int]) -> "SecondPassRunner":
        """A runner of its own with copies of some rows."""
        copied = SecondPassRunner(self.policy.copy_rows(rows), self.head)
        copied.state = None if self.state is None else select_state(self.state, rows)
        copied._pending = None if self._pending is None else self._pending[list(rows)]
        return copied

    def fork(self, request: Request) -> Self:
        """Itself: its rows hold nothing but what was read."""
        return self

    def branch(self, n: int, requests: Sequence[Request]) -> "SecondPassRunner":
        """A runner of n rows for each row; they share what the rows have read, and take this runner's place."""
        self.read_pending()
        branched = SecondPassRunner(self.policy.branch(n), self.head)
        branched.state = repeat_state(_required(self.state), n)
        return branched

    def set_requests(self, requests: Sequence[Request]) -> None:
        """Nothing to do: its rows hold nothing of their requests."""

    def add(self, other: Self) -> None:
        """Append copies of another runner's rows; tokens that wait in either are read first."""
        for one in (self, other):
            one.read_pending()
        self.policy.add(other.policy)
        self.state = concat_states(self.state, _required(other.state))


def select_state(state: PolicyState, rows: Sequence[int] | None) -> PolicyState:
    """States (B, …) of some rows, in this order; None keeps all."""
    if rows is None:
        return state
    index = list(rows)
    return PolicyState(state.logits[index], None if state.hidden is None else state.hidden[index])


def repeat_state(state: PolicyState, n: int) -> PolicyState:
    """States (B·n, …): each row's n times, side by side."""
    hidden = None if state.hidden is None else state.hidden.repeat_interleave(n, 0)
    return PolicyState(state.logits.repeat_interleave(n, 0), hidden)


def concat_states(mine: PolicyState | None, theirs: PolicyState) -> PolicyState:
    """States of more rows after those that are there (B, …); None is no rows."""
    if mine is None:
        return theirs
    hidden = None if mine.hidden is None or theirs.hidden is None else torch.cat([mine.hidden, theirs.hidden])
    return PolicyState(torch.cat([mine.logits, theirs.logits]), hidden)


def chain_and_leaves(chain: Tensor, leaves: Tensor) -> TokenTree:
    """A chain (B, n) of tokens, and candidates (B, K) after its end."""
    n = chain.shape[1]
    parents = (*range(-1, n - 1), *[n - 1] * leaves.shape[1])
    return TokenTree(torch.cat([chain.to(leaves.device), leaves], 1), parents)


def _required(value: Any) -> Any:
    assert value is not None, "the runner reads the layer that the head scores from"
    return value
