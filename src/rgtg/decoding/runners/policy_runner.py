"""The policy in torch: what the loop needs of it, for a plain model and for one with a LoRA scorer in the same pass."""

import copy
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from rgtg.decoding.runners.base import PolicyState
from rgtg.decoding.runners.model_runner import append_tokens
from rgtg.decoding.runners.shared_prefix_runner import fork
from rgtg.decoding.runners.token_tree import States, TokenTree

# Widest tree read in one pass; more candidates are read in several, so that memory stays bounded.
MAX_WIDTH = 128


class TorchPolicyRunner:
    """The policy over the cache of a model runner.

    Attributes:
        runner: reads the policy; its ``layer`` is the one that heads read.
        copies: rows of the runner for each row of the policy.
    """

    copies = 1

    def __init__(self, runner: Any) -> None:
        self.runner = runner

    def fresh(self, longest: int, width: int) -> Self:
        """A runner of the same policy without rows, with room for ``longest`` tokens and a tree of ``width`` nodes."""
        other = copy.copy(self)
        other.runner = self.runner.fresh(longest + width)
        return other

    def prefill(self, prompts: Sequence[Sequence[int]]) -> PolicyState:
        """Start with these prompts as rows; what the policy says after them."""
        states = self.runner.prefill([*prompts] * self.copies)
        return self.predict(states if self.copies == 1 else self.split(states))

    def predict(self, states: States) -> PolicyState:
        """What the policy says at states (B, H): only the output head runs."""
        return PolicyState(self.runner.head(states.final), states.hooked)

    def split(self, states: States) -> States:
        """States of the model runner's rows as those of the policy's rows."""
        return states

    def step(self, tokens: Tensor) -> PolicyState:
        """Append one token (B, 1) to each row: one forward pass."""
        each = tokens if self.copies == 1 else tokens.repeat(self.copies, 1)
        state = self.predict(self.split(self.runner.read(TokenTree.chain(each)).at((slice(None), -1))))
        # committed last: nothing has changed where the output head raises
        self.runner.commit(torch.zeros(len(each), 1, dtype=torch.long))
        return state

    def tree(self, candidate_ids: Tensor) -> States:
        """States (B, K, H) at candidates (B, K), in passes of at most ``MAX_WIDTH`` of them; nothing is appended."""
        parts = []
        for ids in torch.split(candidate_ids, MAX_WIDTH, dim=1):
            each = ids if self.copies == 1 else ids.repeat(self.copies, 1)
            parts.append(self.split(self.runner.read(TokenTree.leaves(each))))
        if len(parts) == 1:
            return parts[0]
        hooked = [part.hooked for part in parts if part.hooked is not None]
        return States(torch.cat([part.final for part in parts], 1), torch.cat(hooked, 1) if hooked else None)

    def commit(self, candidate_ids: Tensor, choice: Tensor) -> None:
        """Append candidate ``choice[b]`` (B,) of row b, which ``tree`` has read.

        Where it took several passes to read all candidates, the chosen one is read again.
        """
        if candidate_ids.shape[1] > MAX_WIDTH:
            tokens = candidate_ids.gather(1, choice[:, None])
            append_tokens(self.runner, tokens.repeat(self.copies, 1))
        else:
            self.runner.commit((choice if self.copies == 1 else choice.repeat(self.copies))[:, None])

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows only, in this order; a row named twice is copied."""
        self.runner.select_rows(rows)

    def copy_rows(self, rows: Sequence[int]) -> Self:
        """A runner of its own with copies of some rows."""
        return type(self)(self.runner.copy_rows(rows))

    def branch(self, n: int) -> Self:
        """A runner of n rows for each row; they share what the rows have read, and take this runner's place."""
        other = copy.copy(self)
        other.runner = fork(self.runner, n)
        return other

    def add(self, other: Self) -> None:
        """Append copies of the rows of another runner of the same policy."""
        self.runner.add(other.runner)


class EnginePolicyRunner(TorchPolicyRunner):
    """A policy that another engine runs: reading a token and committing it is one call, whose states are logits."""

    def step(self, tokens: Tensor) -> PolicyState:
        """Append one token (B, 1) to each row: one forward pass."""
        return self.predict(self.runner.append(tokens))


class LoraPolicyRunner(TorchPolicyRunner):
    """The policy and a LoRA adapter on its weights in one pass: a doubled batch.

    The model runner holds 2B rows: the first B read the plain weights, the last B the adapted ones. The base weights
    are read once for both. Hooked states are those of the adapted half: of the runner's ``layer``, else the final ones.
    """

    copies = 2

    def split(self, states: States) -> States:
        """Final states of the plain half, and states of the adapted half that its head reads."""
        plain, adapted = states.final.chunk(2)
        return States(plain, adapted if states.hooked is None else states.hooked.chunk(2)[1])

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows only, in this order, in both halves."""
        half = self.runner.rows // 2
        self.runner.select_rows([*rows, *(row + half for row in rows)])

    def copy_rows(self, rows: Sequence[int]) -> Self:
        """A runner of its own with copies of some rows."""
        half = self.runner.rows // 2
        return type(self)(self.runner.copy_rows([*rows, *(row + half for row in rows)]))

    def add(self, other: Self) -> None:
        """Append copies of the rows of another runner to both halves."""
        mine, theirs = self.runner.rows // 2, other.runner.rows // 2
        super().add(other)
        before, more = list(range(2 * mine)), list(range(2 * mine, 2 * mine + 2 * theirs))
        try:
            self.runner.select_rows([*before[:mine], *more[:theirs], *before[mine:], *more[theirs:]])
        except Exception:
            self.runner.select_rows(before)  # the halves are where they were
            raise
