"""Compares the results of runs: paired tests, over-optimisation, and the strength to use. Pure functions."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rgtg.evaluation.compare.controls import is_greedy
from rgtg.evaluation.compare.rewards import GOLD, proxy_key
from rgtg.evaluation.metrics import bootstrap_interval, holm, paired_difference, sign_flip_p_values
from rgtg.types.comparison import MethodResult, OverOptimisation, PairedDifference, Recommendation

SIGNIFICANT = 0.05
Family = Literal["baseline", "methods"]


@dataclass(frozen=True)
class Resampling:
    """Seed and counts of the bootstrap intervals and permutation tests."""

    seed: int = 0
    resamples: int = 1000
    permutations: int = 10_000


def differences(
    results: Sequence[MethodResult], baseline: str, how: Resampling | None = None, *, greedy_baseline: str | None = None
) -> list[PairedDifference]:
    """Every run minus the baseline, and the best run of each curve minus the best of every other curve.

    Greedy runs are compared with ``greedy_baseline``, where one is given: like with like.

    A prompt is one unit: its seeds are averaged first. The p-values are those of a sign-flip test, adjusted by Holm
    within each family and metric. The best run of a curve is the recommended one. It was chosen on these same prompts:
    for a claim about methods, choose their betas on other prompts.
    """
    how = how or Resampling()
    named = {result.label: result for result in results}
    base = named[baseline]
    greedy = base if greedy_baseline is None else named[greedy_baseline]
    controls = [(result, greedy if is_greedy(result) else base) for result in results]
    against_base = [(result, control) for result, control in controls if result is not control]
    found = []
    for metric in _metrics(results):
        found += _paired_tests(against_base, metric, "baseline", how)
    best = [representative(runs) for runs in curves(results).values()]
    return found + _paired_tests(list(itertools.combinations(best, 2)), GOLD, "methods", how)


def over_optimised(results: Sequence[MethodResult], how: Resampling | None = None) -> list[OverOptimisation]:
    """Runs of a curve with significantly less gold reward than a run with less strength, while a proxy is higher.

    All pairs of a curve are tested (sign flips, Holm over them, α = 0.05), and the proxy's paired interval must lie
    above 0. The proxies are those that steered or, if none of them was scored, all proxies.
    """
    how = how or Resampling()
    found = []
    for name, runs in curves(results).items():
        pairs = [(runs[j], runs[i]) for i, j in itertools.combinations(range(len(runs)), 2)]
        # 1. For every run, the best run with less strength that has significantly more gold reward.
        fallen: dict[str, tuple[MethodResult, MethodResult, PairedDifference]] = {}
        for (run, weaker), gold in zip(pairs, _paired_tests(pairs, GOLD, "methods", how), strict=True):
            before = fallen.get(run.label)
            higher = before is None or before[1].metrics[GOLD].mean < weaker.metrics[GOLD].mean
            if gold.difference.mean < 0 and gold.p_adjusted < SIGNIFICANT and higher:
                fallen[run.label] = (run, weaker, gold)
        # 2. Of those, the runs with a higher proxy.
        for run, weaker, gold in fallen.values():
            for proxy in run.guided_by or list(run.proxy_rewards):
                rise = paired_difference(
                    _per_prompt(run.proxy_rewards[proxy]), _per_prompt(weaker.proxy_rewards[proxy]),
                    seed=how.seed, resamples=how.resamples,
                )  # fmt: skip
                if rise.low > 0:
                    found.append(
                        OverOptimisation(
                            curve=name, at=run.label, best=weaker.label, proxy=proxy, gold_difference=gold.difference,
                            proxy_difference=rise, p_adjusted=gold.p_adjusted,
                        )
                    )  # fmt: skip
    return found


def recommend(results: Sequence[MethodResult]) -> list[Recommendation]:
    """The run of each curve to use: the least strength within one standard error of the highest gold reward.

    The standard error is that of the paired difference over prompts (the one-standard-error rule, Breiman et al. 1984).
    Less strength means less KL, at a reward that is not detectably lower.
    """
    return [
        Recommendation(curve=name, label=run.label, beta=run.beta, n=run.n, reason=reason)
        for name, runs in curves(results).items()
        if len(runs) > 1
        for run, reason in [_weakest_of_the_best(runs)]
    ]


def representative(runs: Sequence[MethodResult]) -> MethodResult:
    """The recommended run of one curve, or its only one."""
    return runs[0] if len(runs) == 1 else _weakest_of_the_best(runs)[0]


def curves(results: Sequence[MethodResult]) -> dict[str, list[MethodResult]]:
    """Runs by curve, in order of strength. Results without rewards per prompt (format version 1) are left out."""
    found: dict[str, list[MethodResult]] = {}
    for result in results:
        if result.rewards:
            found.setdefault(result.curve or result.label, []).append(result)
    return {name: sorted(runs, key=lambda run: run.strength or 0.0) for name, runs in found.items()}


def _weakest_of_the_best(runs: Sequence[MethodResult]) -> tuple[MethodResult, str]:
    best = max(runs, key=lambda run: run.metrics[GOLD].mean)
    for run in runs:
        if run is best:
            break
        less = _paired(run.rewards, best.rewards)
        mean, error = sum(less) / len(less), _standard_error(less)
        if mean >= -error:
            return run, (
                f"the least strength within one standard error ({error:.3g}) of the highest gold reward, {best.label}"
            )
    return best, "the highest gold reward, by more than one standard error over every lesser strength"


def _paired_tests(
    pairs: Sequence[tuple[MethodResult, MethodResult]], metric: str, family: Family, how: Resampling
) -> list[PairedDifference]:
    """First minus second of each pair, as one family of tests."""
    if not pairs:
        return []
    values = [_paired(_values(a, metric), _values(b, metric)) for a, b in pairs]
    p_values = sign_flip_p_values(values, seed=how.seed, permutations=how.permutations)
    return [
        PairedDifference(
            a=a.label, b=b.label, metric=metric, p_value=p, p_adjusted=adjusted, family=family,
            difference=bootstrap_interval(less, seed=how.seed, resamples=how.resamples),
        )
        for (a, b), less, p, adjusted in zip(pairs, values, p_values, holm(p_values), strict=True)
    ]  # fmt: skip


def _metrics(results: Sequence[MethodResult]) -> list[str]:
    """Gold, and the proxies that every run has."""
    shared = [name for name in results[0].proxy_rewards if all(name in result.proxy_rewards for result in results)]
    return [GOLD, *map(proxy_key, shared)]


def _values(run: MethodResult, metric: str) -> list[list[float]]:
    return run.rewards if metric == GOLD else run.proxy_rewards[metric.removeprefix(proxy_key(""))]


def _paired(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> list[float]:
    return [x - y for x, y in zip(_per_prompt(a), _per_prompt(b), strict=True)]


def _per_prompt(values: Sequence[Sequence[float]]) -> list[float]:
    """Mean over the seeds of each prompt."""
    return [math.fsum(column) / len(column) for column in zip(*values, strict=True)]


def _standard_error(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return 0.0
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
