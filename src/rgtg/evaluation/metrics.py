"""Statistics with intervals: bootstrap, calibration, diversity, paired differences. Pure functions."""

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

# The interval of a statistic without any data.
EMPTY_INTERVAL = Interval(mean=math.nan, low=math.nan, high=math.nan, n=0)


def bootstrap_interval(
    values: Sequence[float],
    *,
    seed: int = 0,
    resamples: int = 1000,
    clusters: Sequence[Hashable] | None = None,
) -> Interval:
    """Mean with its 95 % percentile bootstrap interval (Efron 1979).

    Args:
        values: at least one.
        seed: of the resampling.
        resamples: number of bootstrap samples.
        clusters: the unit that each value belongs to, if units have several values. Whole units are resampled.

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
    drawn = resampled(len(sums), seed=seed, resamples=resamples)  # blocks of (resamples, units) indices
    means = torch.cat([sums[units].sum(1) / counts[units].sum(1) for units in drawn])  # (resamples,)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(mean=float(x.mean()), low=low, high=high, n=len(sums))


def interval_or_empty(values: Sequence[float], **options: Any) -> Interval:
    """``bootstrap_interval``, or NaN with ``n`` = 0 if there are no values."""
    return bootstrap_interval(values, **options) if len(values) else EMPTY_INTERVAL


def pair_correlation(
    x: Sequence[float], y: Sequence[float], *, seed: int = 0, resamples: int = 1000
) -> Interval | None:
    """Correlation of two differences within pairs, whichever side comes first: Σ x·y / √(Σ x² · Σ y²).

    It is Pearson's correlation over both orders of every pair. The interval is a 95 % percentile bootstrap over pairs.

    Args:
        x: first minus second of each pair, of one quantity.
        y: of another.
        seed: of the resampling.
        resamples: number of bootstrap samples.

    Returns:
        None if one of them never differs.

    >>> pair_correlation([1.0, -2.0], [2.0, -4.0]).mean
    1.0
    """
    pairs = torch.tensor([list(x), list(y)], dtype=torch.float64)
    products = torch.stack([pairs[0] * pairs[1], pairs[0].square(), pairs[1].square()])  # (3, pairs)

    def correlation(sums: Tensor) -> Tensor:
        return sums[0] / (sums[1] * sums[2]).sqrt()

    mean = correlation(products.sum(1))
    if not bool(mean.isfinite()):
        return None
    blocks = resampled(len(pairs[0]), seed=seed, resamples=resamples)
    drawn = torch.cat([correlation(products[:, sample].sum(-1)) for sample in blocks])
    low, high = drawn[drawn.isfinite()].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(mean=float(mean), low=low, high=high, n=len(pairs[0]))


def unit_numbers(clusters: Sequence[Hashable]) -> Int[Tensor, " values"]:
    """The number of each value's unit; units are numbered in order of appearance.

    >>> unit_numbers(["b", "a", "b"])
    tensor([0, 1, 0])
    """
    numbers = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    return torch.tensor([numbers[cluster] for cluster in clusters])


def resampled(units: int, *, seed: int, resamples: int) -> Iterator[Int[Tensor, "some units"]]:
    """Bootstrap samples of unit indices, with replacement. They come in blocks of 100, which bounds the memory."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, resamples, 100):
        yield torch.randint(units, (min(100, resamples - start), units), generator=generator)


def expected_calibration_error(probabilities: Sequence[float], outcomes: Sequence[float], bins: int = 10) -> float:
    """ECE: Σ_b (n_b/n)·|mean outcome − mean probability| over equal-width bins (Guo et al. 2017).

    Args:
        probabilities: predictions in [0, 1].
        outcomes: 1 if the predicted event happened, else 0.
        bins: number of bins of equal width.

    >>> expected_calibration_error([0.75, 0.75, 0.75, 0.75], [1, 1, 1, 0])
    0.0
    """
    p = torch.as_tensor(probabilities, dtype=torch.float64)
    y = torch.as_tensor(outcomes, dtype=torch.float64)
    index = (p * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, y - p)  # (bins,)
    return float(gap.abs().sum() / len(p))


def distinct_n(texts: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams over all n-grams of the texts (Li et al. 2016); 1.0 if there are no n-grams.

    >>> distinct_n([[1, 2, 1, 2]], 2)
    0.6666666666666666
    """
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def self_rouge_l(texts: Sequence[str]) -> float:
    """Mean ROUGE-L F1 over all pairs of texts: 1 if all are the same, 0 if no two share a word.

    Words are runs of letters and digits of any script, in lower case. Source: Lin 2004, with ``rouge-score``.

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
    """Tokenizer for rouge-score, whose own drops every letter except a to z."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())


def paired_difference(a: Sequence[float], b: Sequence[float], *, seed: int = 0, resamples: int = 1000) -> Interval:
    """Mean of a − b over the same units, with its 95 % bootstrap interval.

    Raises:
        ValueError: different lengths.
    """
    return bootstrap_interval([x - y for x, y in zip(a, b, strict=True)], seed=seed, resamples=resamples)


def sign_flip_p_values(
    differences: Sequence[Sequence[float]], *, seed: int = 0, permutations: int = 10_000
) -> list[float]:
    """Two-sided p-values of "a and b are exchangeable", one for each list of paired differences (Fisher 1935).

    Under the hypothesis, each difference is equally likely with the opposite sign: p is the share of sign patterns
    whose mean is at least as far from 0. The test uses all 2^n patterns if there are at most ``permutations``.
    Otherwise it uses that many random ones and the observed one, so that p is never below 1 / (permutations + 1). All
    lists use the same patterns.

    Args:
        differences: lists of the same length, one number per unit.
        seed: of the random patterns.
        permutations: largest number of patterns.

    >>> sign_flip_p_values([[1.0, 1.0, 1.0]])
    [0.25]
    """
    d = torch.as_tensor(differences, dtype=torch.float64).T  # (n, lists)
    n = len(d)
    observed = d.sum(0).abs()
    edge = observed - 1e-9 * d.abs().sum(0)  # a sum in another order may differ in its last digits
    exact = n < 63 and 2**n <= permutations
    if exact:
        bits = torch.arange(2**n)[:, None] >> torch.arange(n)
        return (((1 - 2 * (bits & 1)).double() @ d).abs() >= edge).double().mean(0).tolist()
    generator = torch.Generator().manual_seed(seed)
    reached = torch.ones(d.shape[1], dtype=torch.float64)
    for start in range(0, permutations, 1000):  # in blocks, which bounds the memory
        count = min(1000, permutations - start)
        signs = 1 - 2 * torch.randint(2, (count, n), generator=generator)  # (count, n)
        reached += ((signs.double() @ d).abs() >= edge).sum(0)
    return (reached / (permutations + 1)).tolist()


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for multiple tests (Holm 1979), which controls the family-wise error rate.

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
    """Estimate the KL of best-of-n to the distribution it samples from, in nats, from one winner's log-probability.

    (1−p)ⁿ·[ln n + (n−1)·ln(1−p) − (n−1)/n] + (1−(1−p)ⁿ)·ln((1−(1−p)ⁿ)/p), where p is the winner's probability; average
    it over winners. It is close to the bound if every completion is unlikely, and below it otherwise. Source: Beirami
    et al. 2024, arXiv 2401.01879, section 4.

    Args:
        n: number of completions drawn.
        log_prob: of the winner in nats, under the distribution that the n completions were drawn from.

    >>> best_of_n_kl_estimate(4, 0.0), round(best_of_n_kl_estimate(4, -50.0) - best_of_n_kl(4), 9)
    (0.0, 0.0)
    """
    if log_prob >= 0:  # there is only one possible completion
        return 0.0
    p = math.exp(log_prob)
    if p < 1e-12:
        return best_of_n_kl(n)
    log_miss = n * math.log1p(-p)
    hit = -math.expm1(log_miss)
    bulk = math.exp(log_miss) * (math.log(n) + (n - 1) * math.log1p(-p) - (n - 1) / n)
    return bulk + hit * math.log(hit / p)
