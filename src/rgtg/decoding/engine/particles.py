"""Sequential Monte Carlo: n weighted completions of a prompt, of which unlikely ones are replaced as they grow.

Token-wise guidance samples a product of per-step distributions. Particles that are weighted by what each step leaves
out sample the sequence-level target π(y)·exp(β·r(y)), exactly as n grows.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from rgtg.decoding.engine.batch import Batch, Prefilled
from rgtg.decoding.engine.best_of_n import adopt
from rgtg.decoding.request import Request, derive_seed
from rgtg.decoding.runners.scorer_runner import repeat_state
from rgtg.decoding.sampling import effective_sample_size, sample, systematic_resample
from rgtg.errors import NonFiniteError

# What the rows of a request count for it.
_COUNTS = ("policy_calls", "scorer_calls", "candidates", "retokenised", "unscored", "scores_not_finite")


@dataclass(frozen=True)
class ParticleParams:
    """How particles are resampled.

    Attributes:
        every: tokens between two resamplings.
        finished: whether finished completions are resampled with unfinished ones, or keep their weight to the end.
        threshold: resample where the effective sample size is below this share of the particles.
    """

    every: int = 1
    finished: bool = True
    threshold: float = 0.5


@dataclass(eq=False)
class Particles:
    """The particles of one request.

    A particle weighs exp(``carried`` + ``potential``). Its potential log π(y)/q(y) + β·r(y) telescopes the weights
    [π(v)/q(v)]·exp(β·(r_t − r_{t−1})) of all steps; what earlier resamplings gave or took is carried.

    Attributes:
        request: that they are drawn for.
        rows: n completions, growing or ended.
        carried: of each, in nats.
    """

    request: Request
    rows: list[Request]
    carried: list[float] = field(default_factory=list)

    @property
    def growing(self) -> list[Request]:
        """Completions that have not ended, in order."""
        return [row for row in self.rows if not row.ended]

    def log_weights(self) -> torch.Tensor:
        """(n,) in nats, fp64. Their mean weight estimates Σ_y π(y)·exp(β·r(y)) without bias, at any time."""
        weights = [carried + potential(row) for carried, row in zip(self.carried, self.rows, strict=True)]
        return torch.tensor(weights, dtype=torch.float64)

    def log_normaliser(self) -> float:
        """Log of the mean weight, in nats."""
        return float(self.log_weights().logsumexp(0)) - math.log(len(self.rows))

    def resample(self, params: ParticleParams) -> list[int] | None:
        """Replace particles of low weight by copies of others; each one's ancestor, or None if all stay.

        Raises:
            NonFiniteError: every particle has weight zero.
        """
        chosen = [i for i, row in enumerate(self.rows) if params.finished or not row.ended]
        if not self.growing or len(chosen) < 2:
            return None
        weights = require_alive(self.log_weights()[chosen])
        if effective_sample_size(weights) >= params.threshold * len(chosen):
            return None
        drawn = systematic_resample(weights, self.request.uniform()).tolist()
        ancestors = list(range(len(self.rows)))
        for i, j in zip(chosen, drawn, strict=True):
            ancestors[i] = chosen[j]
        # all that took part weigh the same: the mean, so that the sum of the weights is what it was on average
        mean = float(weights.logsumexp(0)) - math.log(len(chosen))
        self.rows = [
            row if i == j else _copy(self.rows[j], row)
            for i, (j, row) in enumerate(zip(ancestors, self.rows, strict=True))
        ]
        for i in chosen:
            self.carried[i] = mean - potential(self.rows[i])
        return ancestors


def potential(row: Request) -> float:
    """Log π(y)/q(y) + β·r(y) of a completion so far, in nats; π is the policy cut to the candidates of each step."""
    scored = 0.0 if row.score is None else row.params.beta * row.score
    return row.candidates_log_prob - row.guided_log_prob + scored


def require_alive(log_weights: torch.Tensor) -> torch.Tensor:
    """The log-weights (n,).

    Raises:
        NonFiniteError: NaN, or every particle has weight zero.
    """
    if not bool(log_weights.max().isfinite()):
        raise NonFiniteError(
            f"all {len(log_weights)} particles have weight zero, or a weight that is no number: try another scorer, a "
            "smaller beta, or dtype=float32"
        )
    return log_weights


def start_particles(requests: Sequence[Request], n: int) -> list[Particles]:
    """N empty completions for each request."""
    return [Particles(request, [_branch(request, j) for j in range(n)], [0.0] * n) for request in requests]


def branch(rows: Sequence[Request], prefilled: Prefilled, n: int) -> Prefilled:
    """N rows for each prompt that has been read, over one cache of it; ``prefilled`` is taken over.

    Args:
        rows: the requests of all rows, the n of one prompt side by side.
        prefilled: the prompts.
        n: rows of each prompt.
    """
    scorers = {name: runner.branch(n, rows) for name, runner in prefilled.scorers.items()}
    return Prefilled(prefilled.policy.branch(n), repeat_state(prefilled.state, n), scorers)


def sample_particles(
    particles: list[Particles], batch: Batch, prefilled: Prefilled, params: ParticleParams
) -> Iterator[list[Request]]:
    """Grow all particles to their ends, and give each request a completion drawn by the weights.

    Source: twisted sequential Monte Carlo (Zhao et al. 2024, arXiv 2404.17546), with the prefix scorer as twist.

    Args:
        particles: of each request.
        batch: empty; draws from the proposal q and scores.
        prefilled: their rows.
        params: how particles are resampled.

    Yields:
        The requests, after each token.

    Raises:
        Exception: that of the first particle that failed; its request is completed alone by the caller.
    """
    requests = [one.request for one in particles]
    batch.add([row for one in particles for row in one.rows], prefilled)
    for step in range(1, requests[0].settings.max_new_tokens + 1):
        # 1. propose: one token for each
        growing = [(one.request, row) for one in particles for row in one.growing]
        before = [[getattr(row, name) for name in _COUNTS] for _, row in growing]
        for row in batch.step():
            if row.error is not None:
                raise row.error
        for (request, row), counts in zip(growing, before, strict=True):
            for name, count in zip(_COUNTS, counts, strict=True):
                setattr(request, name, getattr(request, name) + getattr(row, name) - count)
        # 2. weigh and resample; rows of the batch follow
        if batch.requests and step % params.every == 0:
            places = {row: place for place, row in enumerate(batch.requests)}
            rows, moved = [], False
            for one in particles:
                old = one.rows
                ancestors = one.resample(params) or range(len(old))
                moved = moved or old is not one.rows
                rows += [(places[old[j]], row) for j, row in zip(ancestors, one.rows, strict=True) if not row.ended]
            if moved:
                batch.replace_rows([place for place, _ in rows], [row for _, row in rows])
        yield requests
        if not batch.requests:
            break
    # 3. choose by the weights
    for one in particles:
        _choose(one)
    yield requests


def _choose(one: Particles) -> None:
    """Give the request one of its particles, drawn by their weights."""
    request, weights = one.request, require_alive(one.log_weights())
    uniform = torch.tensor([request.uniform()], dtype=torch.float64)
    winner = one.rows[int(sample(torch.log_softmax(weights, 0)[None], uniform))]
    adopt(request, winner, -math.inf if winner.score is None else winner.score)
    request.log_normaliser = one.log_normaliser()
    # what weighting adds to guided − policy: log π(y)·exp(β·r(y))/(Z·q(y))
    request.selection_nats = potential(winner) - request.log_normaliser
    for row, weight in zip(one.rows, torch.softmax(weights, 0).tolist(), strict=True):
        row.weight, row.log_normaliser = weight, request.log_normaliser
    request.particles = one.rows


def _branch(request: Request, j: int) -> Request:
    """The j-th particle of a request, with a generator and records of its own."""
    return replace(request, seed=derive_seed(request.seed, j), token_ids=[], trace=[])


def _copy(ancestor: Request, place: Request) -> Request:
    """A copy of a particle that draws with the generator of the place that it takes."""
    copied = ancestor.copy()
    copied.take_stream(place)
    return copied
