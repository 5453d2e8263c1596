"""Win rates from judged pairs: intervals over prompts, position bias, and the win rate at equal length."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rgtg.evaluation.metrics import EMPTY_INTERVAL, interval_or_empty, resampled, unit_numbers
from rgtg.types.base import Interval
from rgtg.types.judge import JudgedPair, JudgeMatch

_SIMILAR = 0.1  # largest difference in length, as a share of the longer text
_L2_PENALTY = 0.01  # keeps the fit finite if one side always wins; it is negligible from ten pairs on
_POINTS = {"a": 1.0, "tie": 0.5, "b": 0.0}


def pair_score(verdicts: Sequence[str | None]) -> float | None:
    """Score of a: the mean over both orders of win 1, tie ½, loss 0; None if an order has no verdict.

    >>> pair_score(["a", "b"])
    0.5
    """
    points = [_POINTS[verdict] for verdict in verdicts if verdict is not None]
    return sum(points) / len(points) if len(points) == len(verdicts) else None


def summarise(pairs: Sequence[JudgedPair], *, seed: int = 0, resamples: int = 1000) -> JudgeMatch:
    """All figures of one match, from at least one pair of the same two labels."""
    scored = [(pair, pair.score) for pair in pairs if pair.score is not None]
    asked = [pair for pair, _ in scored if pair.answers]
    scores = [score for _, score in scored]
    decided = [(pair, first) for pair in asked for first in _first_preferred(pair)]

    def interval(values: Sequence[float], of: Sequence[JudgedPair]) -> Interval:
        return interval_or_empty(values, seed=seed, resamples=resamples, clusters=[pair.prompt for pair in of])

    lengths = {name: [(p, s) for p, s in scored if _length(p) == name] for name in ("shorter", "similar", "longer")}
    return JudgeMatch(
        a=pairs[0].a, b=pairs[0].b, win_rate=interval(scores, [pair for pair, _ in scored]),
        length_controlled=_length_controlled([pair for pair, _ in scored], scores, seed, resamples),
        by_length={name: interval([s for _, s in of], [p for p, _ in of]) for name, of in lengths.items() if of},
        wins=sum(score > 0.5 for score in scores), ties=sum(score == 0.5 for score in scores),
        losses=sum(score < 0.5 for score in scores),
        consistent=interval([float(len(set(pair.verdicts)) == 1) for pair in asked], asked),
        first_preferred=interval([first for _, first in decided], [pair for pair, _ in decided]),
        identical=len(scored) - len(asked), failed=len(pairs) - len(scored),
    )  # fmt: skip


def length_controlled_win_rate(
    scores: Float[Tensor, " pairs"],
    length_differences: Float[Tensor, " pairs"],
    draws: Float[Tensor, "resamples pairs"] | None = None,
) -> Float[Tensor, " resamples"]:
    """Win rate at equal length: σ(a) of the fit P(a wins) = σ(a + b·tanh(Δ/s)), s the standard deviation of Δ.

    This is the length term of AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475), fitted by maximum likelihood with a
    small L2 penalty.

    Args:
        scores: of a, in [0, 1].
        length_differences: Δ, the length of a's text minus that of b's, in any unit.
        draws: how often each resample contains each pair; None means once each, as one resample.
    """
    spread = length_differences.std(correction=0)
    z = torch.tanh(length_differences / spread) if spread > 0 else torch.zeros_like(length_differences)
    x = torch.stack([torch.ones_like(z), z], dim=-1)  # (pairs, 2)
    weights = torch.ones(1, len(scores), dtype=x.dtype) if draws is None else draws
    theta = torch.zeros(len(weights), 2, dtype=x.dtype)  # a and b of every resample
    penalty = _L2_PENALTY * torch.eye(2, dtype=x.dtype)
    for _ in range(50):  # Newton steps, clipped to length 2
        p = torch.sigmoid(theta @ x.T)  # (resamples, pairs)
        gradient = (weights * (scores - p)) @ x - _L2_PENALTY * theta  # (resamples, 2)
        curvature = torch.einsum("rp,pi,pj->rij", weights * p * (1 - p), x, x) + penalty  # (resamples, 2, 2)
        step = torch.linalg.solve(curvature, gradient)
        theta = theta + step * (2 / step.norm(dim=-1, keepdim=True).clamp(min=2))
        if step.abs().max() < 1e-9:
            break
    return torch.sigmoid(theta[:, 0])


def _length_controlled(pairs: Sequence[JudgedPair], scores: Sequence[float], seed: int, resamples: int) -> Interval:
    if not scores:
        return EMPTY_INTERVAL
    y = torch.tensor(scores, dtype=torch.float64)
    lengths = torch.tensor([len(pair.text_a) - len(pair.text_b) for pair in pairs], dtype=torch.float64)
    unit = unit_numbers([pair.prompt for pair in pairs])
    count = int(unit.max()) + 1
    rates = []
    for drawn in resampled(count, seed=seed, resamples=resamples):
        # how often each resample draws each prompt: (resamples, prompts)
        draws = torch.zeros(len(drawn), count, dtype=torch.float64).scatter_add_(
            1, drawn, torch.ones_like(drawn, dtype=torch.float64)
        )
        rates.append(length_controlled_win_rate(y, lengths, draws[:, unit]))
    low, high = torch.quantile(torch.cat(rates), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(mean=length_controlled_win_rate(y, lengths).item(), low=low, high=high, n=count)


def _first_preferred(pair: JudgedPair) -> list[float]:
    """For each order that was not a tie: 1 if the side shown first won, else 0."""
    return [float(verdict == shown) for verdict, shown in zip(pair.verdicts, "ab", strict=True) if verdict != "tie"]


def _length(pair: JudgedPair) -> str:
    """Whether a is shorter, similar or longer than b."""
    a, b = len(pair.text_a), len(pair.text_b)
    if abs(a - b) <= _SIMILAR * max(a, b):
        return "similar"
    return "longer" if a > b else "shorter"
