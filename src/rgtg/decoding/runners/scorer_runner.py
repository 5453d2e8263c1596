"""Scorers that are models of their own: how one reads the candidates beside the policy.

A reader holds its own cache of every row. It reads chosen tokens late, with the next candidates, so that steps on which
nothing is scored (an entropy gate) cost it nothing but those tokens.
"""

from collections.abc import Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from rgtg.decoding.request import Request
from rgtg.decoding.runners.model_runner import Runner, read
from rgtg.decoding.runners.token_tree import TokenTree
from rgtg.models.loading.tensor_parallel import broadcast_from_rank0

# Widest tree read in one pass; more candidates are scored in several, and memory stays bounded.
MAX_WIDTH = 128


class Reader(Protocol):
    """What a stepper needs of a scorer beside the policy; ``calls`` counts its passes, the prompts' included."""

    @property
    def calls(self) -> int:
        """Passes so far."""
        ...

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Read the prompts (policy token ids)."""
        ...

    def score(self, candidate_ids: Tensor) -> Tensor:
        """Scores (B, K) of the candidates, fp32, on their device."""
        ...

    def keep(self, candidate_ids: Tensor, choice: Tensor) -> None:
        """Commit candidate ``choice[b]`` of row b, after ``score``."""
        ...

    def skip(self, tokens: Tensor) -> None:
        """Commit tokens (B, 1) without having scored any; they are read with the next candidates."""
        ...

    def select_rows(self, rows: Tensor) -> None:
        """Keep only (or repeat) these rows."""
        ...


class JoiningReader(Reader, Protocol):
    """A reader whose rows join and leave between two steps."""

    def begin(self, prompts: Sequence[Sequence[int]]) -> "tuple[Runner, list[list[int]]] | None":
        """Prepare rows without reading; what is to be read by whom before the first score, if anything is."""
        ...

    def again(self, request: Request) -> "JoiningReader":
        """The same read prompt for another completion of it, to join from."""
        ...

    def join(self, other: Any) -> None:
        """Append the rows of another reader of the same scorer and kind."""
        ...


class CachedReader:
    """What readers share: a cache of every row, and committed tokens (B, n) that it has not read yet."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._unread = torch.zeros(0, 0, dtype=torch.long)

    @property
    def calls(self) -> int:
        """Passes so far."""
        return self.runner.calls

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Read the prompts."""
        self.runner.prefill(prompts)

    def begin(self, prompts: Sequence[Sequence[int]]) -> tuple[Runner, list[list[int]]] | None:
        """The prompts themselves, to be read by the runner."""
        return self.runner, [list(prompt) for prompt in prompts]

    def again(self, request: Request) -> Self:
        """Itself: its rows hold nothing but what was read."""
        return self

    def join(self, other: "CachedReader") -> None:
        """Append another reader's rows; committed tokens that wait in either are read first."""
        for reader in (self, other):
            reader.catch_up()
        self.runner.join(other.runner)

    def catch_up(self) -> None:
        """Read the committed tokens that wait."""
        if (waiting := self._take()).numel():
            read_chain(self.runner, waiting)

    def skip(self, tokens: Tensor) -> None:
        """Note tokens (B, 1) to read later."""
        self._unread = torch.cat([self._unread, tokens], 1) if self._unread.numel() else tokens

    def select_rows(self, rows: Tensor) -> None:
        """Keep only (or repeat) these rows."""
        if self._unread.numel():
            self._unread = self._unread[rows.to(self._unread.device)]
        self.runner.select_rows(rows)

    def _take(self) -> Tensor:
        """All tokens that wait; none does afterwards."""
        tokens, self._unread = self._unread, self._unread[:, :0]
        return tokens


class CandidateReader(CachedReader):
    """A reward model: all candidates in one pass over a token tree, one score at each."""

    _behind = 0  # tokens read together with the last candidates, before them

    def score(self, candidate_ids: Tensor) -> Tensor:
        """One tree pass (several where there are more candidates than ``MAX_WIDTH``)."""
        waiting = self._take()
        self._behind = n = waiting.shape[1]
        if candidate_ids.shape[1] <= MAX_WIDTH:
            tree = chain_and_leaves(waiting, candidate_ids)
            return read(self.runner, tree)[:, n:].float().to(candidate_ids.device)
        if n:
            read_chain(self.runner, waiting)
        parts = [read(self.runner, TokenTree.leaves(ids)) for ids in torch.split(candidate_ids, MAX_WIDTH, dim=1)]
        return torch.cat(parts, 1).float().to(candidate_ids.device)

    def keep(self, candidate_ids: Tensor, choice: Tensor) -> None:
        """Keep the chosen candidate, behind what was read with it; of several passes, only the token is noted."""
        if candidate_ids.shape[1] > MAX_WIDTH:
            self.skip(candidate_ids.gather(1, choice[:, None]))
            return
        path = choice[:, None] + self._behind
        if self._behind:
            path = torch.cat([torch.arange(self._behind, device=path.device).expand(len(path), -1), path], 1)
        self.runner.keep(path)


class PrefixReader(CachedReader):
    """A vocabulary scorer: its state at the prefix scores every next token; only chosen tokens are ever read."""

    def __init__(self, runner: Runner, head: Any) -> None:
        super().__init__(runner)
        self.head = head

    def score(self, candidate_ids: Tensor) -> Tensor:
        """Read what is unread, one row of it, then the candidates' rows of the head at the newest state."""
        self.catch_up()
        return head_at_prefix(self.head, self.runner, candidate_ids)

    def score_rows(self, rows: Tensor, candidate_ids: Tensor) -> Tensor:
        """Scores (b, K) of candidates of some rows, once ``catch_up`` has read what was chosen."""
        assert self.runner.seen is not None, "a head reads an observed layer"
        return score_at(self.head, self.runner.seen[rows.to(self.runner.seen.device), -1], candidate_ids)

    def keep(self, candidate_ids: Tensor, choice: Tensor) -> None:
        """Note the chosen candidate, to read before the next score."""
        self.skip(candidate_ids.gather(1, choice[:, None]))


def chain_and_leaves(chain: Tensor, leaves: Tensor) -> TokenTree:
    """A chain (B, n) of tokens, and candidates (B, K) behind its end."""
    if not chain.numel():
        return TokenTree.leaves(leaves)
    n = chain.shape[1]
    parents = (*range(-1, n - 1), *[n - 1] * leaves.shape[1])
    return TokenTree(torch.cat([chain.to(leaves.device), leaves], 1), parents)


def head_at_prefix(head: Any, runner: Runner, candidate_ids: Tensor, first: int = 0) -> Tensor:
    """Scores (B, K) that a head gives next tokens at the newest observed states, of the rows from ``first``."""
    assert runner.seen is not None, "a head reads an observed layer"
    return broadcast_from_rank0(runner.model, score_at(head, runner.seen[first:, -1], candidate_ids))


def score_at(head: Any, states: Tensor, candidate_ids: Tensor) -> Tensor:
    """Scores (B, K), fp32, that a head gives next tokens at states (B, H)."""
    scores: Tensor = head(states, candidate_ids.to(states.device))
    return scores.float().to(candidate_ids.device)


def read_chain(runner: Runner, tokens: Tensor) -> Tensor:
    """Read tokens (B, n) one behind the other and keep them; the final states (B, n, H)."""
    states = runner.states(TokenTree.chain(tokens))
    runner.keep(torch.arange(tokens.shape[1]).expand(len(tokens), -1))
    return states
