"""How policy and scorer take one step of the loop: apart, at once, or in one pass over shared weights.

Every stepper answers the same five calls in the same order, ``prefill``, then per token ``score``, ``keep``,
(``select_rows``,) ``advance``; the loop knows no more of models than this.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from rgtg.decoding.runner import Runner, read, read_next
from rgtg.decoding.token_tree import TokenTree

# Widest tree read in one pass; more candidates are scored in several, and memory stays bounded.
MAX_WIDTH = 128


class Stepper(Protocol):
    """What the loop needs of policy and scorer together; all rows advance by one token at a time."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts; return the policy's next-token logits (B, V)."""
        ...

    def score(self, candidate_ids: Tensor) -> Tensor | None:
        """Scores (B, K) of the candidates, fp32, on their device; None without a scorer."""
        ...

    def keep(self, candidate_ids: Tensor, choice: Tensor) -> None:
        """Commit candidate ``choice[b]`` of row b."""
        ...

    def select_rows(self, rows: Tensor) -> None:
        """Keep only (or repeat) these rows."""
        ...

    def advance(self) -> Tensor:
        """The policy's logits (B, V) after what was kept."""
        ...


class Alone:
    """The policy without a scorer."""

    def __init__(self, policy: Runner) -> None:
        self.policy = policy
        self.token = torch.zeros(0, 1, dtype=torch.long)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts."""
        return self.policy.readout(self.policy.model, self.policy.prefill(prompts))

    def score(self, candidate_ids: Tensor) -> Tensor | None:
        """None: nothing steers."""
        return None

    def keep(self, candidate_ids: Tensor, choice: Tensor) -> None:
        """Note the token that the policy reads next."""
        self.token = candidate_ids.gather(1, choice[:, None])

    def select_rows(self, rows: Tensor) -> None:
        """Keep only (or repeat) these rows."""
        if len(self.token):
            self.token = self.token[rows.to(self.token.device)]
        self.policy.select_rows(rows)

    def advance(self) -> Tensor:
        """One row of one token through the policy."""
        return self.policy.readout(self.policy.model, read_next(self.policy, self.token))


class Apart(Alone):
    """A scorer of its own: all candidates in one pass of the scorer, then the chosen token through the policy."""

    def __init__(self, policy: Runner, scorer: Runner) -> None:
        super().__init__(policy)
        self.scorer = scorer

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts with both models."""
        self.scorer.prefill(prompts)
        return super().prefill(prompts)

    def score(self, candidate_ids: Tensor) -> Tensor | None:
        """One tree pass (several where there are more candidates than ``MAX_WIDTH``)."""
        parts = [read(self.scorer, TokenTree.leaves(ids)) for ids in torch.split(candidate_ids, MAX_WIDTH, dim=1)]
        return torch.cat(parts, 1).float().to(candidate_ids.device)

    def keep(self, candidate_ids: Tensor, choice: Tensor) -> None:
        """Keep the chosen candidate in the scorer's cache."""
        super().keep(candidate_ids, choice)
        keep_leaf(self.scorer, candidate_ids, choice)

    def select_rows(self, rows: Tensor) -> None:
        """Keep only (or repeat) these rows."""
        super().select_rows(rows)
        self.scorer.select_rows(rows)


class AtOnce(Apart):
    """Policy and scorer on two devices: the policy reads all candidates while the scorer scores them.

    A step then takes as long as the slower of the two, not their sum. Needs K ≤ ``MAX_WIDTH``.
    """

    def __init__(self, policy: Runner, scorer: Runner) -> None:
        super().__init__(policy, scorer)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="rgtg-scorer")
        self._ahead = torch.zeros(0)

    def score(self, candidate_ids: Tensor) -> Tensor | None:
        """Both passes, in two threads."""
        tree = TokenTree.leaves(candidate_ids)
        scores = self._worker.submit(_without_grad, self.scorer, tree)
        self._ahead = self.policy.states(tree)
        return scores.result().float().to(candidate_ids.device)

    def keep(self, candidate_ids: Tensor, choice: Tensor) -> None:
        """Keep the chosen candidate in both caches, and the policy's state at it."""
        self.scorer.keep(choice[:, None])
        self.policy.keep(choice[:, None])
        self._ahead = take_nodes(self._ahead, choice)

    def select_rows(self, rows: Tensor) -> None:
        """Keep only (or repeat) these rows."""
        super().select_rows(rows)
        self._ahead = self._ahead[rows.to(self._ahead.device)]

    def advance(self) -> Tensor:
        """The logits are there already, but for the product with the vocabulary."""
        return self.policy.readout(self.policy.model, self._ahead)


class OnCandidates(Alone):
    """A head on the policy's own states at the candidates: the pass that scores them gives the next logits too."""

    def __init__(self, policy: Runner, head: Any) -> None:
        super().__init__(policy)
        self.head = head
        self._ahead = torch.zeros(0)

    def score(self, candidate_ids: Tensor) -> Tensor | None:
        """One policy pass over the candidates (several where there are more than ``MAX_WIDTH``)."""
        parts = [self.look_ahead(ids) for ids in torch.split(candidate_ids, MAX_WIDTH, dim=1)]
        self._ahead = torch.cat([ahead for ahead, _ in parts], 1)
        return torch.cat([scores for _, scores in parts], 1).float()

    def look_ahead(self, candidate_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The policy's states (B, K, H) at candidates, and the head's scores (B, K) of the observed layer there."""
        ahead = self.policy.states(TokenTree.leaves(candidate_ids))
        return ahead, self.head(self.policy.seen)

    def keep(self, candidate_ids: Tensor, choice: Tensor) -> None:
        """Keep the chosen candidate, and the policy's state at it."""
        keep_leaf(self.policy, candidate_ids, choice)
        self._ahead = take_nodes(self._ahead, choice)

    def select_rows(self, rows: Tensor) -> None:
        """Keep only (or repeat) these rows."""
        self.policy.select_rows(rows)
        self._ahead = self._ahead[rows.to(self._ahead.device)]

    def advance(self) -> Tensor:
        """The product with the vocabulary, for the chosen candidate alone."""
        return self.policy.readout(self.policy.model, self._ahead)


class OnPrefix(Alone):
    """A head that scores next tokens from a state at the prefix: no pass over the candidates at all.

    ``reader`` is whose observed layer the head reads: the policy itself, or a vocabulary scorer of its own.
    """

    def __init__(self, policy: Runner, head: Any, reader: Runner | None = None) -> None:
        super().__init__(policy)
        self.head, self.reader = head, reader or policy

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts, with the scorer's own model too where it has one."""
        if self.reader is not self.policy:
            self.reader.prefill(prompts)
        return super().prefill(prompts)

    def score(self, candidate_ids: Tensor) -> Tensor | None:
        """The candidates' rows of the head, at the newest state."""
        seen = self.reader.seen
        assert seen is not None, "a head reads an observed layer"
        scores: Tensor = self.head(seen[:, -1], candidate_ids.to(seen.device))
        return scores.float().to(candidate_ids.device)

    def select_rows(self, rows: Tensor) -> None:
        """Keep only (or repeat) these rows."""
        super().select_rows(rows)
        if self.reader is not self.policy:
            self.reader.select_rows(rows)

    def advance(self) -> Tensor:
        """One row of one token through the policy (and through the scorer's own model)."""
        if self.reader is not self.policy:
            read_next(self.reader, self.token)
        return super().advance()


class InOnePass(OnCandidates):
    """A scorer that is an adapter on the policy's own weights: one pass of two halves scores and looks ahead.

    The runner holds 2B rows, the policy's first; ``head`` reads the adapted half.
    """

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts, plain and adapted."""
        return prefill_twice(self.policy, prompts)

    def look_ahead(self, candidate_ids: Tensor) -> tuple[Tensor, Tensor]:
        """One pass of twice the candidates: the plain half looks ahead, the adapted half is scored."""
        plain, adapted = self.policy.states(TokenTree.leaves(candidate_ids.repeat(2, 1))).chunk(2)
        return plain, self.head(adapted)

    def keep(self, candidate_ids: Tensor, choice: Tensor) -> None:
        """Keep the chosen candidate in both halves, and the policy's state at it."""
        keep_leaf(self.policy, candidate_ids.repeat(2, 1), choice.repeat(2))
        self._ahead = take_nodes(self._ahead, choice)

    def select_rows(self, rows: Tensor) -> None:
        """Keep only (or repeat) these rows of both halves."""
        half = len(self._ahead)
        self.policy.select_rows(torch.cat([rows, rows + half]))
        self._ahead = self._ahead[rows.to(self._ahead.device)]


class InOnePassOnPrefix(OnPrefix):
    """A vocabulary head on an adapted state of the policy's own weights: one pass of two rows of one token.

    The runner holds 2B rows, the policy's first, and observes the layer that ``head`` reads of the adapted half.
    """

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts, plain and adapted."""
        return prefill_twice(self.policy, prompts)

    def score(self, candidate_ids: Tensor) -> Tensor | None:
        """The candidates' rows of the head, at the newest adapted state."""
        seen = self.policy.seen
        assert seen is not None, "a head reads an observed layer"
        scores: Tensor = self.head(seen[len(candidate_ids) :, -1], candidate_ids)
        return scores.float()

    def select_rows(self, rows: Tensor) -> None:
        """Keep only (or repeat) these rows of both halves."""
        half = len(self.token)
        self.token = self.token[rows.to(self.token.device)]
        self.policy.select_rows(torch.cat([rows, rows + half]))

    def advance(self) -> Tensor:
        """One token of both halves; the product with the vocabulary for the policy's alone."""
        states = read_next(self.policy, self.token.repeat(2, 1))
        return self.policy.readout(self.policy.model, states[: len(self.token)])


def prefill_twice(runner: Runner, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Read every prompt in both halves of the batch; the readout (B, …) at the last token of the first half."""
    return runner.readout(runner.model, runner.prefill([*prompts, *prompts])[: len(prompts)])


def take_nodes(states: Tensor, choice: Tensor) -> Tensor:
    """State (B, H) at node ``choice[b]`` of each row of (B, K, H)."""
    return states[torch.arange(len(choice), device=states.device), choice.to(states.device)]


def keep_leaf(runner: Runner, candidate_ids: Tensor, choice: Tensor) -> None:
    """Keep the chosen candidate; where it took several passes to read them all, read the chosen one again."""
    if candidate_ids.shape[1] > MAX_WIDTH:
        runner.states(TokenTree.leaves(candidate_ids.gather(1, choice[:, None])))
        choice = torch.zeros_like(choice)
    runner.keep(choice[:, None])


def _without_grad(runner: Runner, tree: TokenTree) -> Tensor:
    """A read in another thread, where the caller's inference mode does not hold."""
    with torch.inference_mode():
        return read(runner, tree)
