"""Figures with intervals: bootstrap, calibration, diversity, paired differences. Pure functions."""

import math
from collections.abc import Sequence

import torch

from rgtg.types import Interval


def bootstrap_interval(
    values: Sequence[float],
    *,
    seed: int = 0,
    resamples: int = 1000,
    clusters: Sequence[int] | None = None,
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
        numbers = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
        unit = torch.tensor([numbers[cluster] for cluster in clusters])
        sums = torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, unit, x)
        counts = torch.bincount(unit).double()
    generator = torch.Generator().manual_seed(seed)
    means = torch.empty(resamples, dtype=torch.float64)
    for start in range(0, resamples, 100):  # bounded memory for many units
        drawn = torch.randint(len(sums), (min(100, resamples - start), len(sums)), generator=generator)
        means[start : start + 100] = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(mean=float(x.mean()), low=low, high=high, n=len(sums))


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


def paired_difference(a: Sequence[float], b: Sequence[float], *, seed: int = 0, resamples: int = 1000) -> Interval:
    """Mean of a − b over the same units, with its 95 % bootstrap interval.

    Raises:
        ValueError: lengths that differ.
    """
    return bootstrap_interval([x - y for x, y in zip(a, b, strict=True)], seed=seed, resamples=resamples)


def best_of_n_kl(n: int) -> float:
    """Upper bound ln n − (n−1)/n on the KL, in nats, of best-of-n to what it samples from (Beirami et al. 2024).

    >>> best_of_n_kl(1)
    0.0
    """
    return math.log(n) - (n - 1) / n
