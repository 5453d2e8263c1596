"""Rows against each other: paired differences with tests, over-optimisation, the strength to use. Pure functions."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rgtg.evaluation.metrics import bootstrap_interval, holm, paired_difference, sign_flip_p_values
from rgtg.types.comparison import MethodResult, OverOptimisation, PairedDifference, Recommendation

SIGNIFICANT = 0.05
Family = Literal["baseline", "methods"]


@dataclass(frozen=True)
class Resampling:
    """How intervals and tests draw."""

    seed: int = 0
    resamples: int = 1000
    permutations: int = 10_000


def find_baseline(results: Sequence[MethodResult], label: str | None = None) -> str | None:
    """Label of the row to compare with: the given one, else the first unguided one, else the first."""
    if label is not None or not results:
        return label
    plain = [row for row in results if row.method == "policy" and "policy" not in row.settings]
    return (plain or list(results))[0].label


def differences(
    results: Sequence[MethodResult], baseline: str, how: Resampling | None = None
) -> list[PairedDifference]:
    """Every row less the baseline, and the best of each curve less the best of every other.

    A prompt is one unit: its seeds are averaged first. p-values are of a sign-flip test, adjusted by Holm within each
    family and metric. The best of a curve is the recommended row, chosen on these same prompts: for a claim about
    methods, choose their betas on other prompts.
    """
    how = how or Resampling()
    base = next(row for row in results if row.label == baseline)
    mine = [(row, base) for row in results if row is not base]
    found = []
    for metric in _metrics(results):
        found += _paired_tests(mine, metric, "baseline", how)
    best = [representative(rows) for rows in curves(results).values()]
    return found + _paired_tests(list(itertools.combinations(best, 2)), "reward", "methods", how)


def over_optimised(results: Sequence[MethodResult], how: Resampling | None = None) -> list[OverOptimisation]:
    """Rows of a curve where gold is significantly lower than at some lesser strength while a proxy is higher.

    All pairs of a curve are tested (sign flips, Holm over them, α = 0.05), and the proxy's paired interval must lie
    above 0. Proxies are those that steered; where none of them was scored, all that were.
    """
    how = how or Resampling()
    found = []
    for name, rows in curves(results).items():
        pairs = [(rows[j], rows[i]) for i, j in itertools.combinations(range(len(rows)), 2)]
        fallen: dict[str, tuple[MethodResult, MethodResult, PairedDifference]] = {}
        for (at, lesser), gold in zip(pairs, _paired_tests(pairs, "reward", "methods", how), strict=True):
            before = fallen.get(at.label)
            higher = before is None or before[1].metrics["reward"].mean < lesser.metrics["reward"].mean
            if gold.difference.mean < 0 and gold.p_adjusted < SIGNIFICANT and higher:
                fallen[at.label] = (at, lesser, gold)
        for at, lesser, gold in fallen.values():
            for proxy in at.guided_by or list(at.proxy_rewards):
                rise = paired_difference(
                    _per_prompt(at.proxy_rewards[proxy]), _per_prompt(lesser.proxy_rewards[proxy]),
                    seed=how.seed, resamples=how.resamples,
                )  # fmt: skip
                if rise.low > 0:
                    found.append(
                        OverOptimisation(
                            curve=name, at=at.label, best=lesser.label, proxy=proxy, gold_difference=gold.difference,
                            proxy_difference=rise, p_adjusted=gold.p_adjusted,
                        )
                    )  # fmt: skip
    return found


def recommend(results: Sequence[MethodResult]) -> list[Recommendation]:
    """The row of each curve to use: the least strength within one standard error of the best gold reward.

    The standard error is that of the paired difference over prompts (the one-standard-error rule, Breiman et al. 1984):
    less strength means less KL, and a reward that cannot be told from the best.
    """
    return [
        Recommendation(curve=name, label=row.label, beta=row.beta, n=row.n, reason=reason)
        for name, rows in curves(results).items()
        if len(rows) > 1
        for row, reason in [_least_of_the_best(rows)]
    ]


def representative(rows: Sequence[MethodResult]) -> MethodResult:
    """The recommended row of one curve, or its only one."""
    return rows[0] if len(rows) == 1 else _least_of_the_best(rows)[0]


def curves(results: Sequence[MethodResult]) -> dict[str, list[MethodResult]]:
    """Rows by curve, each in order of strength; only rows that hold single rewards."""
    found: dict[str, list[MethodResult]] = {}
    for row in results:
        if row.rewards:
            found.setdefault(row.curve or row.label, []).append(row)
    return {name: sorted(rows, key=lambda row: row.strength or 0.0) for name, rows in found.items()}


def _least_of_the_best(rows: Sequence[MethodResult]) -> tuple[MethodResult, str]:
    best = max(rows, key=lambda row: row.metrics["reward"].mean)
    for row in rows:
        if row is best:
            break
        less = _paired(row.rewards, best.rewards)
        mean = sum(less) / len(less)
        error = _standard_error(less)
        if mean >= -error:
            return row, (
                f"the least strength within one standard error ({error:.3g}) of the highest gold reward, {best.label}"
            )
    return best, "the highest gold reward, by more than one standard error over every lesser strength"


def _paired_tests(
    pairs: Sequence[tuple[MethodResult, MethodResult]], metric: str, family: Family, how: Resampling
) -> list[PairedDifference]:
    """First less second of each pair, tested together."""
    if not pairs:
        return []
    values = [_paired(_values(a, metric), _values(b, metric)) for a, b in pairs]
    p_values = sign_flip_p_values(values, seed=how.seed, permutations=how.permutations)
    return [
        PairedDifference(
            a=a.label, b=b.label, metric=metric, p_value=p, p_adjusted=adjusted,
            family=family,
            difference=bootstrap_interval(mine, seed=how.seed, resamples=how.resamples),
        )
        for (a, b), mine, p, adjusted in zip(pairs, values, p_values, holm(p_values), strict=True)
    ]  # fmt: skip


def _metrics(results: Sequence[MethodResult]) -> list[str]:
    """Gold, and the proxies that every row has."""
    shared = [name for name in results[0].proxy_rewards if all(name in row.proxy_rewards for row in results)]
    return ["reward", *(f"proxy:{name}" for name in shared)]


def _values(row: MethodResult, metric: str) -> list[list[float]]:
    return row.rewards if metric == "reward" else row.proxy_rewards[metric.removeprefix("proxy:")]


def _paired(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> list[float]:
    return [x - y for x, y in zip(_per_prompt(a), _per_prompt(b), strict=True)]


def _per_prompt(values: Sequence[Sequence[float]]) -> list[float]:
    """Mean over seeds of each prompt."""
    return [math.fsum(column) / len(column) for column in zip(*values, strict=True)]


def _standard_error(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return 0.0
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
