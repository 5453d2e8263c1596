"""Several scorers on one policy, each with a beta of its own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rgtg.decoding.runners.policy_runner import Stepper
from rgtg.decoding.runners.scorer_runner import Reader


class Mixture:
    """One scorer joined with the policy in its own way, others beside it; the score is Σ_j β_j·r_j.

    What it returns is weighted already, so the rule's beta is 1. ``each`` holds the last scores of every scorer apart,
    (S, B, K), in the order in which the scorers were given.
    """

    def __init__(self, lead: Stepper, readers: Sequence[Reader], betas: Sequence[float], order: Sequence[int]) -> None:
        """Join them.

        Args:
            lead: the policy with its first scorer.
            readers: the other scorers.
            betas: of the lead's scorer, then one for each reader.
            order: place of each in the list that the user gave.
        """
        self.lead, self.readers = lead, list(readers)
        self.betas = torch.tensor(list(betas))
        self.order = torch.tensor(list(order)).argsort()
        self.each = torch.zeros(0)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts with every model; the policy's logits."""
        for reader in self.readers:
            reader.prefill(prompts)
        return self.lead.prefill(prompts)

    def score(self, candidate_ids: Tensor) -> Tensor | None:
        """Weighted sum (B, K) of what the scorers say of the candidates."""
        beside = [reader.score(candidate_ids) for reader in self.readers]
        first = self.lead.score(candidate_ids)
        assert first is not None, "the lead has a scorer"
        scores = torch.stack([first, *beside])  # (S, B, K)
        self.each = scores[self.order.to(scores.device)]
        return torch.einsum("s,sbk->bk", self.betas.to(scores), scores)

    def keep(self, candidate_ids: Tensor, choice: Tensor) -> None:
        """Commit candidate ``choice[b]`` of row b everywhere."""
        self.lead.keep(candidate_ids, choice)
        for reader in self.readers:
            reader.keep(candidate_ids, choice)

    def skip(self, tokens: Tensor) -> None:
        """Commit tokens (B, 1) that were not scored."""
        self.lead.skip(tokens)
        for reader in self.readers:
            reader.skip(tokens)

    def select_rows(self, rows: Tensor) -> None:
        """Keep only (or repeat) these rows."""
        self.lead.select_rows(rows)
        for reader in self.readers:
            reader.select_rows(rows)

    def advance(self) -> Tensor:
        """The policy's logits (B, V) after what was kept."""
        return self.lead.advance()


class OwnPass:
    """A scorer that is part of the policy, beside another one that is: it makes passes of its own."""

    def __init__(self, stepper: Stepper) -> None:
        self.stepper = stepper
        self.calls = 0
        self._waits = False

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Read the prompts."""
        self.calls += 1
        self.stepper.prefill(prompts)

    def score(self, candidate_ids: Tensor) -> Tensor:
        """Read what was chosen since, then score the candidates."""
        self._catch_up()
        self.calls += 1
        scores = self.stepper.score(candidate_ids)
        assert scores is not None, "it has a scorer"
        return scores

    def keep(self, candidate_ids: Tensor, choice: Tensor) -> None:
        """Commit candidate ``choice[b]`` of row b."""
        self.stepper.keep(candidate_ids, choice)
        self._waits = True

    def skip(self, tokens: Tensor) -> None:
        """Commit tokens (B, 1) that were not scored."""
        self._catch_up()
        self.stepper.skip(tokens)
        self._waits = True

    def select_rows(self, rows: Tensor) -> None:
        """Keep only (or repeat) these rows."""
        self.stepper.select_rows(rows)

    def _catch_up(self) -> None:
        if self._waits:
            self.stepper.advance()
            self._waits = False
