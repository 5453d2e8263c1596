"""``sweep``: finds the beta that meets a KL or reward target, by interpolated bisection on log beta."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Unpack

from rgtg.config import CompareRun, SweepSettings
from rgtg.decoding.request import Prompt
from rgtg.errors import UsageError
from rgtg.evaluation.compare.comparison import ComparisonRunner, Progress
from rgtg.evaluation.compare.grid import expand_runs, has_setting, with_betas
from rgtg.evaluation.compare.models import LoadedModels
from rgtg.evaluation.compare.rewards import GOLD, NamedReward
from rgtg.types.comparison import SweepResult, SweepTry

_STEP = 4.0  # the factor by which a bracket is widened
_MARGIN = 0.15  # interpolation keeps this share of the bracket away from its ends
_NO_REWARD = NamedReward("none", lambda done: [0.0] * len(done))  # a KL target needs no reward


def sweep(
    settings: SweepSettings,
    progress: Progress | None = None,
    *,
    prompts: Sequence[Prompt] | None = None,
    **loaded: Unpack[LoadedModels],
) -> SweepResult:
    """Find the factor of the betas that meets the target within the tolerance, and report every factor that was tried.

    Every try completes the same prompts with the same seeds, so that the curve is smooth in beta. Tries are kept as
    shards, as in ``rgtg.evaluation.compare.comparison.compare``: a sweep that was stopped continues.

    Args:
        settings: method, scorers, target and search range.
        progress: as in ``compare``.
        prompts: texts or lists of chat messages, in place of the file that the settings name.
        **loaded: models that are already loaded.

    Raises:
        UsageError: a method without beta, a reward target without a reward, and as ``compare``.
    """
    if not has_setting(settings.method, "beta"):
        raise UsageError(f"{settings.method} has no beta to find")
    steering = {"scorers": settings.scorers} if settings.scorers else {"scorer": settings.scorer}
    (run,) = expand_runs([CompareRun.model_validate({"method": settings.method} | steering)], settings)
    rewarded = settings.target_reward is not None or settings.reward is not None or loaded.get("reward") is not None
    if not rewarded:
        loaded["reward"] = _NO_REWARD
    runner = ComparisonRunner.load(settings, [run], progress, prompts=prompts, **loaded)
    metric, target = _target(settings)

    def measure(factor: float) -> SweepTry:
        tried = with_betas(run, factor, settings.scorers)
        metrics = runner.run(tried).metrics
        if not rewarded:
            metrics.pop(GOLD)
        assert tried.beta is not None, "with_betas gave it"
        return SweepTry(factor=factor, beta=tried.beta, value=metrics[metric], metrics=metrics)

    tolerance = settings.tolerance or max(0.05 * abs(target), 0.01)
    found = search(measure, target, tolerance, settings.min_beta, settings.max_beta, settings.tries)
    return SweepResult(
        method=settings.method, metric=metric, target=target, tolerance=tolerance, beta=found.best.beta,
        value=found.best.value, reached=found.reached, verdict=found.verdict, tries=found.tries,
        provenance=runner.provenance("rgtg sweep"),
    )  # fmt: skip


@dataclass
class SearchOutcome:
    """The end of a search: the try nearest to the target, whether it is within the tolerance, and if not, why."""

    best: SweepTry
    reached: bool
    verdict: str
    tries: list[SweepTry]


def search(
    measure: Callable[[float], SweepTry], target: float, tolerance: float, low: float, high: float, most: int
) -> SearchOutcome:
    """Find where a metric that grows with log beta meets a target.

    The bracket starts at 1 (or the nearer end of the range) and is widened fourfold until the target lies inside. Each
    further try is where a straight line between the ends meets the target, but not near either end. If the metric rises
    and falls again (a reward), the search finds a crossing on the rising side.

    Args:
        measure: factor → its try.
        target: in the metric's unit.
        tolerance: in the metric's unit.
        low: smallest factor.
        high: largest factor.
        most: number of tries.
    """
    tries: list[SweepTry] = []

    def outcome(verdict: str = "") -> SearchOutcome:
        best = min(tries, key=lambda one: abs(one.value.mean - target))
        reached = abs(best.value.mean - target) <= tolerance
        return SearchOutcome(best, reached, "within the tolerance" if reached else verdict, tries)

    # the ends of the bracket: (factor, metric minus target)
    below: tuple[float, float] | None = None
    above: tuple[float, float] | None = None
    factor = min(max(1.0, low), high)
    while True:
        # 1. Measure, and move the end of the bracket on that side.
        tries.append(measure(factor))
        gap = tries[-1].value.mean - target
        if gap < 0:
            below = (factor, gap)
        else:
            above = (factor, gap)
        # 2. Stop at the target, or out of tries.
        if abs(gap) <= tolerance or len(tries) >= most:
            break
        # 3. The next factor: outside a bracket with one end, else inside it.
        if below is None:
            assert above is not None, "one end is measured"
            if above[0] <= low:
                why = "already passed at the smallest beta allowed: the candidates alone (top_k) move this far"
                return outcome(why)
            factor = max(above[0] / _STEP, low)
        elif above is None:
            if below[0] >= high:
                top = max(one.value.mean for one in tries)
                return outcome(f"not reached at the largest beta allowed; the highest seen is {top:.4g}")
            factor = min(below[0] * _STEP, high)
        else:
            factor = _between(below, above)
    return outcome(f"not within the tolerance after {len(tries)} tries; raise tries, or tolerance, or use more prompts")


def _between(below: tuple[float, float], above: tuple[float, float]) -> float:
    """Where a straight line in log beta meets 0, kept away from both ends; rounded to four digits, easy to copy."""
    share = -below[1] / (above[1] - below[1])
    share = min(max(share, _MARGIN), 1 - _MARGIN)
    return float(f"{math.exp(math.log(below[0]) + share * (math.log(above[0]) - math.log(below[0]))):.4g}")


def _target(settings: SweepSettings) -> tuple[str, float]:
    if settings.target_reward is not None:
        return "reward", settings.target_reward
    assert settings.target_kl is not None, "the settings hold one target"
    return ("kl_nats" if settings.kl_to == "policy" else "kl_cut_nats"), settings.target_kl
