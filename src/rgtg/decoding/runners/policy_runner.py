"""How policy and scorer take one step of the loop: apart, at once, or in one pass over shared weights.

Every stepper answers the same calls in the same order, ``prefill``, then per token ``score`` and ``keep`` (or ``skip``,
where nothing was scored), (``select_rows``,) ``advance``; the loop knows no more of models than this.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from rgtg.decoding.runners.model_runner import Runner, read_next
from rgtg.decoding.runners.scorer_runner import MAX_WIDTH, Reader, head_at_prefix
from rgtg.decoding.runners.token_tree import TokenTree
from rgtg.models.loading.tensor_parallel import broadcast_from_rank0


class Stepper(Protocol):
    """What the loop needs of policy and scorer together; all rows advance by one token at a time."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts; return the policy's next-token logits (B, V)."""
        ...

    def score(self, candidate_ids: Tensor) -> Tensor | None:
        """Scores (B, K) of the candidates, fp32, on their device; None without a scorer."""
        ...

    def keep(self, candidate_ids: Tensor, choice: Tensor) -> None:
        """Commit candidate ``choice[b]`` of row b, after ``score``."""
        ...

    def skip(self, tokens: Tensor) -> None:
        """Commit tokens (B, 1) without having scored them or any other."""
        ...

    def select_rows(self, rows: Tensor) -> None:
        """Keep only (or repeat) these rows."""
        ...

    def advance(self) -> Tensor:
        """The policy's logits (B, V) after what was kept."""
        ...


class JoiningStepper(Stepper, Protocol):
    """A stepper whose rows join and leave between two steps; ``policy`` reads ``copies`` rows for each of its own."""

    policy: Runner
    copies: int

    def join(self, other: Any) -> None:
        """Append the rows of another stepper of the same kind and models."""
        ...


class Alone:
    """The policy without a scorer."""

    copies = 1

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

    def skip(self, tokens: Tensor) -> None:
        """Note the token that the policy reads next."""
        self.token = tokens

    def select_rows(self, rows: Tensor) -> None:
        """Keep only (or repeat) these rows."""
        self._select(rows)
        if len(self.token):  # none is kept before the first step
            self.token = self.token[rows.to(self.token.device)]

    def _select(self, rows: Tensor) -> None:
        """Rows of the policy's cache; ``token`` still has those of before."""
        self.policy.select_rows(rows)

    def join(self, other: "Alone") -> None:
        """Append another stepper's rows, between two steps."""
        self.policy.join(other.policy)
        self.token = torch.zeros(self.policy.batch // self.copies, 1, dtype=torch.long)  # none is kept between steps

    def advance(self) -> Tensor:
        """One row of one token through the policy."""
        return self.policy.readout(self.policy.model, read_next(self.policy, self.token))


class Apart(Alone):
    """A scorer of its own beside the policy: it scores the candidates, then the policy reads the chosen token."""

    def __init__(self, policy: Runner, reader: Reader) -> None:
        super().__init__(policy)
        self.reader = reader

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts with both models."""
        self.reader.prefill(prompts)
        return super().prefill(prompts)

    def score(self, candidate_ids: Tensor) -> Tensor | None:
        """What the scorer says of the candidates."""
        return self.reader.score(candidate_ids)

    def keep(self, candidate_ids: Tensor, choice: Tensor) -> None:
        """Keep the chosen candidate with the scorer too."""
        super().keep(candidate_ids, choice)
        self.reader.keep(candidate_ids, choice)

    def skip(self, tokens: Tensor) -> None:
        """Commit tokens that the scorer need not read yet."""
        super().skip(tokens)
        self.reader.skip(tokens)

    def select_rows(self, rows: Tensor) -> None:
        """Keep only (or repeat) these rows."""
        super().select_rows(rows)
        self.reader.select_rows(rows)


class Ahead(Alone):
    """The policy has read the candidates: its state at the chosen one is there before the next step begins."""

    _ahead: Tensor | None = None

    def skip(self, tokens: Tensor) -> None:
        """Note the token, which no pass has read."""
        super().skip(tokens)
        self._ahead = None

    def select_rows(self, rows: Tensor) -> None:
        """Keep only (or repeat) these rows."""
        super().select_rows(rows)
        if self._ahead is not None:
            self._ahead = self._ahead[rows.to(self._ahead.device)]

    def join(self, other: Alone) -> None:
        """Append another stepper's rows, between two steps."""
        super().join(other)
        self._ahead = None

    def advance(self) -> Tensor:
        """The product with the vocabulary for the chosen candidate alone; the pass has been made."""
        if self._ahead is None:
            return super().advance()
        return self.policy.readout(self.policy.model, self._ahead)


class AtOnce(Ahead, Apart):
    """Policy and scorer on two devices: the policy reads all candidates while the scorer scores them.

    A step then takes as long as the slower of the two, not their sum. Needs K ≤ ``MAX_WIDTH``.
    """

    def __init__(self, policy: Runner, reader: Reader) -> None:
        super().__init__(policy, reader)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="rgtg-scorer")

    def score(self, candidate_ids: Tensor) -> Tensor | None:
        """Both passes, in two threads."""
        scores = self._worker.submit(_without_grad, self.reader.score, candidate_ids)
        self._ahead = self.policy.states(TokenTree.leaves(candidate_ids))
        return scores.result()

    def keep(self, candidate_ids: Tensor, choice: Tensor) -> None:
        """Keep the chosen candidate in both caches, and the policy's state at it."""
        super().keep(candidate_ids, choice)
        self.policy.keep(choice[:, None])
        assert self._ahead is not None, "keep() follows score()"
        self._ahead = take_nodes(self._ahead, choice)


class OnCandidates(Ahead):
    """A head on the policy's own states at the candidates: the pass that scores them gives the next logits too."""

    def __init__(self, policy: Runner, head: Any) -> None:
        super().__init__(policy)
        self.head = head

    def score(self, candidate_ids: Tensor) -> Tensor | None:
        """One policy pass over the candidates (several where there are more than ``MAX_WIDTH``)."""
        parts = [self.look_ahead(ids) for ids in torch.split(candidate_ids, MAX_WIDTH, dim=1)]
        self._ahead = torch.cat([ahead for ahead, _ in parts], 1)
        return torch.cat([scores for _, scores in parts], 1).float()

    def look_ahead(self, candidate_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The policy's states (B, K, H) at candidates, and the head's scores (B, K) of the observed layer there."""
        ahead = self.policy.states(TokenTree.leaves(candidate_ids))
        return ahead, broadcast_from_rank0(self.policy.model, self.head(self.policy.seen))

    def keep(self, candidate_ids: Tensor, choice: Tensor) -> None:
        """Keep the chosen candidate, and the policy's state at it."""
        super().keep(candidate_ids, choice)
        self.keep_leaf(candidate_ids, choice)
        assert self._ahead is not None, "keep() follows score()"
        self._ahead = take_nodes(self._ahead, choice)

    def keep_leaf(self, candidate_ids: Tensor, choice: Tensor) -> None:
        """Keep the chosen candidate in the policy's cache."""
        keep_leaf(self.policy, candidate_ids, choice)


class OnPrefix(Alone):
    """A head that scores next tokens from the policy's state at the prefix: no pass over the candidates at all."""

    def __init__(self, policy: Runner, head: Any) -> None:
        super().__init__(policy)
        self.head = head

    def score(self, candidate_ids: Tensor) -> Tensor | None:
        """The candidates' rows of the head, at the newest state."""
        return head_at_prefix(self.head, self.policy, candidate_ids)


class TwoHalves(Alone):
    """Every row twice: the runner holds 2B rows, the policy's first, then the adapted ones."""

    copies = 2

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts, plain and adapted."""
        states = self.policy.prefill([*prompts, *prompts])
        return self.policy.readout(self.policy.model, states[: len(prompts)])

    def advance(self) -> Tensor:
        """One token of both halves; the product with the vocabulary for the policy's alone."""
        states = read_next(self.policy, self.token.repeat(2, 1))
        return self.policy.readout(self.policy.model, states[: len(self.token)])

    def _select(self, rows: Tensor) -> None:
        self.policy.select_rows(torch.cat([rows, rows + len(self.token)]))

    def join(self, other: Alone) -> None:
        """Append another stepper's rows to both halves."""
        mine, theirs = self.policy.batch // 2, other.policy.batch // 2
        super().join(other)
        before, more = torch.arange(2 * mine), torch.arange(2 * theirs) + 2 * mine
        self.policy.select_rows(torch.cat([before[:mine], more[:theirs], before[mine:], more[theirs:]]))


class InOnePass(OnCandidates, TwoHalves):
    """A scorer that is an adapter on the policy's own weights: one pass of two halves scores and looks ahead.

    ``head`` reads the adapted half.
    """

    def look_ahead(self, candidate_ids: Tensor) -> tuple[Tensor, Tensor]:
        """One pass of twice the candidates: the plain half looks ahead, the adapted half is scored."""
        plain, adapted = self.policy.states(TokenTree.leaves(candidate_ids.repeat(2, 1))).chunk(2)
        return plain, broadcast_from_rank0(self.policy.model, self.head(adapted))

    def keep_leaf(self, candidate_ids: Tensor, choice: Tensor) -> None:
        """Keep the chosen candidate in both halves."""
        keep_leaf(self.policy, candidate_ids.repeat(2, 1), choice.repeat(2))


class InOnePassOnPrefix(OnPrefix, TwoHalves):
    """A vocabulary head on an adapted state of the policy's own weights: one pass of two rows of one token.

    The runner observes the layer that ``head`` reads of the adapted half.
    """

    def score(self, candidate_ids: Tensor) -> Tensor | None:
        """The candidates' rows of the head, at the newest adapted state."""
        return head_at_prefix(self.head, self.policy, candidate_ids, len(candidate_ids))


def take_nodes(states: Tensor, choice: Tensor) -> Tensor:
    """State (B, H) at node ``choice[b]`` of each row of (B, K, H)."""
    return states[torch.arange(len(choice), device=states.device), choice.to(states.device)]


def keep_leaf(runner: Runner, candidate_ids: Tensor, choice: Tensor) -> None:
    """Keep the chosen candidate; where it took several passes to read them all, read the chosen one again."""
    if candidate_ids.shape[1] > MAX_WIDTH:
        runner.states(TokenTree.leaves(candidate_ids.gather(1, choice[:, None])))
        choice = torch.zeros_like(choice)
    runner.keep(choice[:, None])


def _without_grad(score: Callable[[Tensor], Tensor], candidate_ids: Tensor) -> Tensor:
    """A read in another thread, where the caller's inference mode does not hold."""
    with torch.inference_mode():
        return score(candidate_ids)
