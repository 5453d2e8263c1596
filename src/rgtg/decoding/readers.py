"""Scorers that are models of their own: how one reads the candidates beside the policy.

A reader holds its own cache of every row. It reads chosen tokens late, with the next candidates, so that steps on which
nothing is scored (an entropy gate) cost it nothing but those tokens.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rgtg.decoding.runner import Runner, read
from rgtg.decoding.token_tree import TokenTree

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


class Unread:
    """Tokens that are committed and not yet read: (B, n)."""

    def __init__(self) -> None:
        self.tokens = torch.zeros(0, 0, dtype=torch.long)

    def add(self, tokens: Tensor) -> None:
        """Behind those that wait already."""
        self.tokens = torch.cat([self.tokens, tokens], 1) if self.tokens.numel() else tokens

    def take(self) -> Tensor:
        """All of them; none waits afterwards."""
        tokens, self.tokens = self.tokens, self.tokens[:, :0]
        return tokens

    def select_rows(self, rows: Tensor) -> None:
        """Keep only (or repeat) these rows."""
        if self.tokens.numel():
            self.tokens = self.tokens[rows.to(self.tokens.device)]


class CandidateReader:
    """A reward model: all candidates in one pass over a token tree, one score at each."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._unread = Unread()
        self._behind = 0  # tokens read together with the last candidates, before them

    @property
    def calls(self) -> int:
        """Passes so far."""
        return self.runner.calls

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Read the prompts."""
        self.runner.prefill(prompts)

    def score(self, candidate_ids: Tensor) -> Tensor:
        """One tree pass (several where there are more candidates than ``MAX_WIDTH``)."""
        waiting = self._unread.take()
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
            self._unread.add(candidate_ids.gather(1, choice[:, None]))
            return
        path = choice[:, None] + self._behind
        if self._behind:
            path = torch.cat([torch.arange(self._behind, device=path.device).expand(len(path), -1), path], 1)
        self.runner.keep(path)

    def skip(self, tokens: Tensor) -> None:
        """Note tokens to read later."""
        self._unread.add(tokens)

    def select_rows(self, rows: Tensor) -> None:
        """Keep only (or repeat) these rows."""
        self._unread.select_rows(rows)
        self.runner.select_rows(rows)


class PrefixReader:
    """A vocabulary scorer: its state at the prefix scores every next token; only chosen tokens are ever read."""

    def __init__(self, runner: Runner, head: Any) -> None:
        self.runner, self.head = runner, head
        self._unread = Unread()

    @property
    def calls(self) -> int:
        """Passes so far."""
        return self.runner.calls

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Read the prompts."""
        self.runner.prefill(prompts)

    def score(self, candidate_ids: Tensor) -> Tensor:
        """Read what is unread, one row of it, then the candidates' rows of the head at the newest state."""
        if (waiting := self._unread.take()).numel():
            read_chain(self.runner, waiting)
        return head_at_prefix(self.head, self.runner, candidate_ids)

    def keep(self, candidate_ids: Tensor, choice: Tensor) -> None:
        """Note the chosen candidate, to read before the next score."""
        self._unread.add(candidate_ids.gather(1, choice[:, None]))

    def skip(self, tokens: Tensor) -> None:
        """Note tokens to read later."""
        self._unread.add(tokens)

    def select_rows(self, rows: Tensor) -> None:
        """Keep only (or repeat) these rows."""
        self._unread.select_rows(rows)
        self.runner.select_rows(rows)


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
    scores: Tensor = head(runner.seen[first:, -1], candidate_ids.to(runner.seen.device))
    return scores.float().to(candidate_ids.device)


def read_chain(runner: Runner, tokens: Tensor) -> Tensor:
    """Read tokens (B, n) one behind the other and keep them; the final states (B, n, H)."""
    states = runner.states(TokenTree.chain(tokens))
    runner.keep(torch.arange(tokens.shape[1]).expand(len(tokens), -1))
    return states
