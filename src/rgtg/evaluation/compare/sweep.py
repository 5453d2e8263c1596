"""Find the beta that meets a KL or reward target: interpolated bisection on log beta, the same seeds every time."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rgtg.config import CompareRun, SweepSettings
from rgtg.data.prompts import read_prompts
from rgtg.errors import UsageError
from rgtg.evaluation.compare.comparison import ComparisonRunner, Progress
from rgtg.evaluation.compare.generate import NamedReward, RewardFunction
from rgtg.evaluation.compare.grid import expand_runs, has_setting, with_betas
from rgtg.evaluation.compare.models import load_comparison_models
from rgtg.evaluation.compare.shards import fingerprint_texts
from rgtg.evaluation.provenance import provenance
from rgtg.models.loading.policy import Policy
from rgtg.models.scorers.base import AnyScorer
from rgtg.types.comparison import SweepResult, SweepTry

_STEP = 4.0  # how far a bracket is widened at once
_MARGIN = 0.15  # interpolation stays this far, in share of the bracket, from its ends
_NO_REWARD = NamedReward("none", lambda done: [0.0] * len(done))  # a KL target needs none


def sweep(
    settings: SweepSettings,
    progress: Progress | None = None,
    *,
    policy: Policy | None = None,
    scorers: Mapping[str, AnyScorer] | None = None,
    reward: RewardFunction | None = None,
    proxies: Mapping[str, RewardFunction] | None = None,
    prompts: Sequence[str] | None = None,
) -> SweepResult:
    """The factor of the betas at which the target is met within the tolerance, and every one tried.

    Every try completes the same prompts with the same seeds, so that the curve is smooth in beta. Tries are parts, as
    in ``rgtg.evaluation.compare.comparison.compare`` (whose arguments these are): a sweep that was stopped goes on.

    Raises:
        UsageError: a method without beta, a reward target without a reward, and as ``compare``.
    """
    if not has_setting(settings.method, "beta"):
        raise UsageError(f"{settings.method} has no beta to find")
    steering = {"scorers": settings.scorers} if settings.scorers else {"scorer": settings.scorer}
    (row,) = expand_runs([CompareRun.model_validate({"method": settings.method} | steering)], settings)
    texts = (read_prompts(settings.prompts) if prompts is None else list(prompts))[: settings.limit]
    rewarded = settings.target_reward is not None or settings.reward is not None or reward is not None
    models = load_comparison_models(
        settings, [row], policy=policy, scorers=scorers, proxies=proxies, reward=reward if rewarded else _NO_REWARD
    )
    bench = ComparisonRunner(models, texts, settings, progress)
    metric, target = _target(settings)

    def measure(factor: float) -> SweepTry:
        one = with_betas(row, factor, settings.scorers)
        metrics = bench.run(one).metrics
        if not rewarded:
            metrics.pop("reward")
        assert one.beta is not None, "with_betas gave it"
        return SweepTry(factor=factor, beta=one.beta, value=metrics[metric], metrics=metrics)

    tolerance = settings.tolerance or max(0.05 * abs(target), 0.01)
    found = search(measure, target, tolerance, settings.min_beta, settings.max_beta, settings.tries)
    return SweepResult(
        method=settings.method, metric=metric, target=target, tolerance=tolerance, beta=found.best.beta,
        value=found.best.value, reached=found.reached, verdict=found.verdict, tries=found.tries,
        provenance=provenance(
            command="rgtg sweep", settings=settings.model_dump(mode="json", exclude={"force"}), seed=settings.seed,
            models=models.modules(), data={"prompts": fingerprint_texts(texts)},
        ),
    )  # fmt: skip


@dataclass
class SearchOutcome:
    """The end of a search: the try nearest to the target, whether it is within the tolerance, and why not."""

    best: SweepTry
    reached: bool
    verdict: str
    tries: list[SweepTry]


def search(
    measure: Callable[[float], SweepTry], target: float, tolerance: float, low: float, high: float, most: int
) -> SearchOutcome:
    """Where a figure that grows with log beta meets a target.

    From 1 (or the nearer end of the range) the bracket is widened fourfold until the target lies between its ends; then
    each try is put where a straight line between the ends meets it, but not near either end. Of a figure that rises and
    falls again (a reward), the first crossing seen from below is found.

    Args:
        measure: factor → its try.
        target: in the figure's unit.
        tolerance: in the figure's unit.
        low: smallest factor.
        high: largest factor.
        most: tries.
    """
    tries: list[SweepTry] = []

    def ask(factor: float) -> float:
        tries.append(measure(factor))
        return tries[-1].value.mean - target

    def end(verdict: str = "") -> SearchOutcome:
        best = min(tries, key=lambda one: abs(one.value.mean - target))
        reached = abs(best.value.mean - target) <= tolerance
        return SearchOutcome(best, reached, "within the tolerance" if reached else verdict, tries)

    at = min(max(1.0, low), high)
    gap = ask(at)
    below, above = ((at, gap), None) if gap < 0 else (None, (at, gap))
    while len(tries) < most and abs(tries[-1].value.mean - target) > tolerance:
        if above is None and below is not None:
            if below[0] >= high:
                return end(f"not reached at the largest beta allowed; the highest seen is {_top(tries):.4g}")
            at = min(below[0] * _STEP, high)
        elif below is None and above is not None:
            if above[0] <= low:
                return end("already passed at the smallest beta allowed: the candidates alone (top_k) move this far")
            at = max(above[0] / _STEP, low)
        else:
            assert below is not None, "the target is bracketed"
            assert above is not None, "the target is bracketed"
            at = _between(below, above)
        gap = ask(at)
        if gap < 0:
            below = (at, gap)
        else:
            above = (at, gap)
    return end(f"not within the tolerance after {len(tries)} tries; raise tries, or tolerance, or use more prompts")


def _between(below: tuple[float, float], above: tuple[float, float]) -> float:
    """Where the straight line in log beta meets 0, kept off both ends of the bracket; four digits, to be copied."""
    share = -below[1] / (above[1] - below[1])
    share = min(max(share, _MARGIN), 1 - _MARGIN)
    return float(f"{math.exp(math.log(below[0]) + share * (math.log(above[0]) - math.log(below[0]))):.4g}")


def _top(tries: list[SweepTry]) -> float:
    return max(one.value.mean for one in tries)


def _target(settings: SweepSettings) -> tuple[str, float]:
    if settings.target_reward is not None:
        return "reward", settings.target_reward
    assert settings.target_kl is not None, "the settings hold one target"
    return ("kl_nats" if settings.kl_to == "policy" else "kl_cut_nats"), settings.target_kl
