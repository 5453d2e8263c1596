"""Beam search: the n likeliest texts under log π(y) + β·r(y) go on, over one cache of each prompt."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rgtg.decoding.engine.batch import Batch, Prefilled
from rgtg.decoding.engine.best_of_n import adopt
from rgtg.decoding.request import Request
from rgtg.decoding.sampling import NO_FINITE_PROBABILITY, SCORES_NOT_FINITE, Candidates
from rgtg.errors import NonFiniteError


@dataclass(eq=False)
class Beam:
    """A text that goes on or has ended.

    Attributes:
        request: its tokens and records.
        log_prob: log π of them in nats, after the processors.
        score: r of the newest prefix that was scored.
    """

    request: Request
    log_prob: float = 0.0
    score: float = 0.0

    @property
    def value(self) -> float:
        """Log π(y) + β·r(y)."""
        return self.log_prob + self.request.params.beta * self.score


class BeamSearch:
    """Which rows of a batch go on with which candidates: of each prompt's texts the n of highest value.

    Ended texts keep their place among the n as long as their value does. There is no correction for length.
    """

    def __init__(self, requests: Sequence[Request], n: int, every: int, end_tokens: set[int]) -> None:
        """Start each request with one empty text.

        Args:
            requests: to be completed.
            n: texts that go on.
            every: tokens between two scores; where a candidate ends the text, it is scored too.
            end_tokens: tokens that end a text.
        """
        self.n, self.every, self.end_tokens = n, every, torch.tensor(sorted(end_tokens), dtype=torch.long)
        self.parents = list(requests)
        self.beams = [[Beam(replace(request, token_ids=[], trace=[]))] for request in requests]

    @property
    def rows(self) -> list[Request]:
        """Texts that go on, those of one prompt side by side."""
        return [beam.request for beams in self.beams for beam in beams if not beam.request.ended]

    def due(self, candidates: Candidates) -> Tensor:
        """(R,) whether the candidates (R, K) of each row are scored in this step."""
        ends = torch.isin(candidates.ids.cpu(), self.end_tokens) & (candidates.log_probs.cpu() > -torch.inf)
        rows, found, first = self.rows, [], 0
        for parent, beams in zip(self.parents, self.beams, strict=True):
            growing = sum(not beam.request.ended for beam in beams)
            if growing:
                length = len(rows[first].token_ids) + 1
                due = length % self.every == 0 or length == parent.settings.max_new_tokens
                found += [due or bool(ends[first : first + growing].any())] * growing
            first += growing
        return torch.tensor(found)

    def choose(self, candidates: Candidates, scores: Tensor | None) -> list[tuple[int, int, Request]]:
        """Of each prompt's texts and their candidates the n of highest value, as (row, candidate, request).

        Args:
            candidates: of R rows.
            scores: (R, K); those of rows that are not due do not matter. None if no row is.
        """
        require_finite(candidates, scores)
        log_probs = candidates.log_probs.double().cpu()
        due = [False] * len(log_probs) if candidates.steered is None else candidates.steered.tolist()
        read = None if scores is None else scores.double().cpu()
        chosen, first = [], 0
        for i, beams in enumerate(self.beams):
            # 1. what could be: ended texts as they are, and every candidate of every other
            options: list[tuple[float, int, int, Beam]] = []
            row = first
            for beam in beams:
                if beam.request.ended:
                    options.append((beam.value, -1, -1, beam))
                    continue
                r = read[row] if read is not None and due[row] else torch.full_like(log_probs[row], beam.score)
                values = beam.log_prob + log_probs[row] + beam.request.params.beta * r
                best = values.masked_fill(log_probs[row] == -torch.inf, -torch.inf)
                for j in best.argsort(descending=True, stable=True)[: self.n].tolist():
                    grown = Beam(beam.request, beam.log_prob + float(log_probs[row, j]), float(r[j]))
                    options.append((float(best[j]), row, j, grown))
                row += 1
            if row == first:
                continue
            self.parents[i].policy_calls += row - first
            self.parents[i].scorer_calls += sum(due[first:row])
            first = row
            # 2. the n of highest value; the first of equals
            kept = sorted((one for one in options if one[0] > -torch.inf), key=lambda one: -one[0])[: self.n]
            self.beams[i] = [beam for _, _, _, beam in kept]
            for _, at, j, beam in kept:
                if at >= 0:
                    beam.request = beam.request.copy()
                    chosen.append((at, j, beam.request))
        return chosen


def search_beams(beams: BeamSearch, batch: Batch, prefilled: Prefilled) -> Iterator[list[Request]]:
    """Grow the beams of all prompts to their ends, and give each request its text of highest value.

    Args:
        beams: of each request.
        batch: empty; its rows are chosen by ``beams``.
        prefilled: a row for each request.

    Yields:
        The requests, after each token.

    Raises:
        Exception: that of the first beam that failed; its request is completed alone by the caller.
    """
    batch.add(beams.rows, prefilled)
    while batch.requests:
        for row in batch.step():
            if row.error is not None:
                raise row.error
        yield beams.parents
    for parent, mine in zip(beams.parents, beams.beams, strict=True):
        best = max(mine, key=lambda beam: beam.value)
        adopt(parent, best.request, best.score)
    yield beams.parents


def require_finite(candidates: Candidates, scores: Tensor | None) -> None:
    """Refuse candidates that cannot be compared.

    Raises:
        NonFiniteError: the policy or the scorer gave NaN or infinite numbers.
    """
    if not bool(candidates.log_probs.max(-1).values.isfinite().all()):
        raise NonFiniteError(NO_FINITE_PROBABILITY)
    if scores is not None and candidates.steered is not None and not bool(scores[candidates.steered].isfinite().all()):
        raise NonFiniteError(SCORES_NOT_FINITE)
