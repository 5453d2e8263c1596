"""Figures with intervals: bootstrap, calibration, diversity, paired differences. Pure functions."""

import functools
import itertools
import math
import re
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from rgtg.decoding.sampling import best_of_n_kl
from rgtg.errors import MissingExtraError
from rgtg.types.base import Interval


def bootstrap_interval(
    values: Sequence[float],
    *,
    seed: int = 0,
    resamples: int = 1000,
    clusters: Sequence[Hashable] | None = None,
) -> Interval:
    """Mean with its 95 % percentile bootstrap interval (Efron 1979).

    Args:
        values: one figure per unit, at least one.
        seed: of the resampling.
        resamples: bootstrap samples.
        clusters: the unit each value belongs to, where a unit has several; whole units are resampled then.

    Raises:
        ValueError: no values.

    >>> bootstrap_interval([1.0, 1.0, 1.0])
    Interval(mean=1.0, low=1.0, high=1.0, n=3)
    """
    if not len(values):
        raise ValueError("an interval needs at least one value")
    x = torch.as_tensor(values, dtype=torch.float64)
    if clusters is None:
        sums, counts = x, torch.ones_like(x)
    else:
        unit = unit_numbers(clusters)
        counts = torch.bincount(unit).double()
        sums = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, unit, x)
    drawn = resampled(len(sums), seed=seed, resamples=resamples)
    means = torch.cat([sums[units].sum(1) / counts[units].sum(1) for units in drawn])
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(mean=float(x.mean()), low=low, high=high, n=len(sums))


def unit_numbers(clusters: Sequence[Hashable]) -> Int[Tensor, " values"]:
    """Number of the unit that each value belongs to, in the order in which they come.

    >>> unit_numbers(["b", "a", "b"])
    tensor([0, 1, 0])
    """
    numbers = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    return torch.tensor([numbers[cluster] for cluster in clusters])


def resampled(units: int, *, seed: int, resamples: int) -> Iterator[Int[Tensor, "some units"]]:
    """Bootstrap samples of so many units, with replacement, a hundred at a time: bounded memory for many units."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, resamples, 100):
        yield torch.randint(units, (min(100, resamples - start), units), generator=generator)


def expected_calibration_error(probabilities: Sequence[float], outcomes: Sequence[float], bins: int = 10) -> float:
    """ECE: Σ_b (n_b/n)·|mean outcome − mean probability| over equal-width bins (Guo et al. 2017).

    Args:
        probabilities: predicted, in [0, 1].
        outcomes: 1 where the predicted event happened, else 0.
        bins: of equal width.

    >>> expected_calibration_error([0.75, 0.75, 0.75, 0.75], [1, 1, 1, 0])
    0.0
    """
    p = torch.as_tensor(probabilities, dtype=torch.float64)
    y = torch.as_tensor(outcomes, dtype=torch.float64)
    place = (p * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, y - p)
    return float(gap.abs().sum() / len(p))


def distinct_n(texts: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams over all n-grams of the texts (Li et al. 2016); 1.0 where there are none.

    >>> distinct_n([[1, 2, 1, 2]], 2)
    0.6666666666666666
    """
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def self_rouge_l(texts: Sequence[str]) -> float:
    """Mean ROUGE-L F1 over all pairs of texts: 1 where they are the same, 0 where they share no word in order.

    Words are runs of letters and digits of any script, in lower case. Source: Lin 2004, through ``rouge-score``.

    Raises:
        ValueError: fewer than two texts.
        MissingExtraError: rouge-score is not installed.
    """
    if len(texts) < 2:
        raise ValueError("self-ROUGE-L compares texts with each other: give at least two")
    scorer = _rouge_l()
    pairs = list(itertools.combinations(texts, 2))
    return sum(float(scorer.score(a, b)["rougeL"].fmeasure) for a, b in pairs) / len(pairs)


@functools.cache
def _rouge_l() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingExtraError("self-ROUGE-L needs rouge-score: pip install 'rgtg[report]'") from error
    return RougeScorer(["rougeL"], tokenizer=_Words())


class _Words:
    """rouge-score's own tokenizer would drop every letter but a to z."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())


def paired_difference(a: Sequence[float], b: Sequence[float], *, seed: int = 0, resamples: int = 1000) -> Interval:
    """Mean of a − b over the same units, with its 95 % bootstrap interval.

    Raises:
        ValueError: lengths that differ.
    """
    return bootstrap_interval([x - y for x, y in zip(a, b, strict=True)], seed=seed, resamples=resamples)


def sign_flip_p_values(
    differences: Sequence[Sequence[float]], *, seed: int = 0, permutations: int = 10_000
) -> list[float]:
    """Two-sided p-values of "a and b are exchangeable", one per list of paired differences (Fisher 1935).

    Under the hypothesis every difference is as likely with the other sign: p is the share of sign patterns whose mean
    is at least as far from 0. All 2^n patterns where these are fewer than ``permutations``; else that many random ones,
    the observed one counted with them, so that p is never below 1 / (permutations + 1). Lists share the patterns.

    Args:
        differences: lists of one length, one figure per unit.
        seed: of the random patterns.
        permutations: at most.

    >>> sign_flip_p_values([[1.0, 1.0, 1.0]])
    [0.25]
    """
    d = torch.as_tensor(differences, dtype=torch.float64).T  # (n, lists)
    n = len(d)
    observed = d.sum(0).abs()
    edge = observed - 1e-9 * d.abs().sum(0)  # sums in another order differ in their last digits
    exact = n < 63 and 2**n <= permutations
    if exact:
        bits = torch.arange(2**n)[:, None] >> torch.arange(n)
        return (((1 - 2 * (bits & 1)).double() @ d).abs() >= edge).double().mean(0).tolist()
    generator = torch.Generator().manual_seed(seed)
    reached = torch.ones(d.shape[1], dtype=torch.float64)
    for start in range(0, permutations, 1000):  # bounded memory for many units
        count = min(1000, permutations - start)
        signs = 1 - 2 * torch.randint(2, (count, n), generator=generator)
        reached += ((signs.double() @ d).abs() >= edge).sum(0)
    return (reached / (permutations + 1)).tolist()


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for being one of several (Holm 1979): the family-wise error rate is held.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def best_of_n_kl_estimate(n: int, log_prob: float) -> float:
    """Estimate, in nats, of the KL of best-of-n to what it samples from, by one winner's log-probability there.

    (1−p)ⁿ·[ln n + (n−1)·ln(1−p) − (n−1)/n] + (1−(1−p)ⁿ)·ln((1−(1−p)ⁿ)/p) with p the winner's probability; averaged
    over winners. It is close to the bound where every completion is unlikely, and below it where some are not. Source:
    Beirami et al. 2024, arXiv 2401.01879, section 4.

    Args:
        n: completions drawn.
        log_prob: nats, of the winner under the distribution that the n were drawn from.

    >>> best_of_n_kl_estimate(4, 0.0), round(best_of_n_kl_estimate(4, -50.0) - best_of_n_kl(4), 9)
    (0.0, 0.0)
    """
    if log_prob >= 0:  # the only completion there is
        return 0.0
    p = math.exp(log_prob)
    if p < 1e-12:
        return best_of_n_kl(n)
    log_miss = n * math.log1p(-p)
    hit = -math.expm1(log_miss)
    bulk = math.exp(log_miss) * (math.log(n) + (n - 1) * math.log1p(-p) - (n - 1) / n)
    return bulk + hit * math.log(hit / p)
