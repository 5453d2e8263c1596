"""Invented results for the report's tests: few rows, every section."""

import math

from rgtg.evaluation.compare.comparison import assemble
from rgtg.evaluation.compare.significance import Resampling
from rgtg.types.audit import AuditPoint, AuditResult
from rgtg.types.base import Interval, Provenance
from rgtg.types.comparison import MethodResult
from rgtg.types.judge import JudgeMatch, JudgeResult, JudgeUsage
from rgtg.types.rollouts import CandidateFigures, ChoiceFigures, RolloutAuditResult

EVIL = "<script>alert('x')</script> & $x_1$ \"q\" | *a* _b_ `c`"


def interval(mean, spread=0.5):
    return Interval(mean=mean, low=mean - spread, high=mean + spread, n=10)


def method(label, name, reward, kl, text="Fine.", **options):
    """A row of format version 1, unless options add more."""
    values = {
        "label": label, "method": name, "beta": 1.0,
        "metrics": {"reward": interval(reward), "kl_nats": interval(kl)},
        "seconds": 1.0, "tokens_per_second": 120.0, "policy_calls": 240, "scorer_calls": 60,
        "samples": [{"prompt": EVIL, "text": text, "reward": reward, "finish_reason": "length"}],
    }  # fmt: skip
    return MethodResult(**values | options)


def grown(label, gold, strength=None, curve=None, proxy=0.0, prompts=12, **options):
    """A row of version 2: two seeds whose rewards differ by prompt, and a proxy that steered."""
    rewards = [[gold + 0.1 * i + 0.01 * seed for i in range(prompts)] for seed in range(2)]
    proxies = {"full": [[proxy + 0.1 * i for i in range(prompts)]] * 2}
    metrics = {"reward": interval(gold + 0.5), "kl_nats": interval(3 + (strength or 0)), "kl_cut_nats": interval(1.0)}
    metrics["length_tokens"] = interval(8.0)
    more = {
        "curve": curve, "strength": strength, "seeds": [0, 1], "rewards": rewards, "proxy_rewards": proxies,
        "guided_by": ["full"] if curve else [], "tokens": 100, "metrics": metrics, "beta": strength,
    }  # fmt: skip
    return method(label, "pargs" if curve else "policy", gold, 3.0, **more | options)


def comparison(rows):
    made = Provenance(version="9.9", command="rgtg test", seed=5, settings={"a": EVIL}, models={"policy": "abc"})
    how = Resampling(resamples=100, permutations=2000)
    return assemble(rows, reward="gold", prompts=12, made=made, how=how)


def steered():
    """A method that is better than the policy, then over-optimised."""
    rows = [grown("policy", 0.0)]
    for beta, gold, proxy in ((1.0, 1.0, 1.0), (2.0, 2.0, 2.0), (4.0, 0.5, 4.0)):
        rows.append(grown(f"pargs β={beta:g}", gold, beta, "pargs", proxy))
    return comparison(rows)


def audit(verdict="Fit."):
    nothing = Interval(mean=math.nan, low=math.nan, high=math.nan, n=0)
    points = [
        AuditPoint(position=0.5, accuracy=nothing, margin=nothing, ties=0, pairs=0),
        AuditPoint(position=1.0, accuracy=interval(0.7), margin=interval(1), ties=0, pairs=30),
    ]
    return AuditResult(
        scorer="s", objective="prefix-bt", pairs=30, by_tokens=[], by_fraction=points, full_accuracy=interval(0.7),
        calibration_error=0.1, verdict=verdict, provenance=Provenance(version="9.9", command="rgtg audit"),
    )  # fmt: skip


def judged(*matches, kind="win-rate"):
    usage = JudgeUsage(
        calls=1, cached=0, retries=0, prompt_tokens=1, completion_tokens=1, cached_prompt_tokens=0,
        cached_completion_tokens=0, estimated=0, cost=None, total_cost=None,
    )  # fmt: skip
    return JudgeResult(
        kind=kind, model="judge-8b", base_url="http://localhost/v1", prompt_fingerprint="12ab",
        matches=[
            JudgeMatch(
                a=a, b=b, win_rate=interval(rate, 0.1), length_controlled=interval(rate - 0.05, 0.1), by_length={},
                wins=7, ties=2, losses=3, consistent=interval(0.8), first_preferred=interval(0.55), identical=0,
                failed=1,
            )
            for a, b, rate in matches
        ],
        failures=[], usage=usage, provenance=Provenance(version="9.9", command="rgtg judge"),
    )  # fmt: skip


def rollout_audit():
    choice = ChoiceFigures(
        gain=interval(0.2, 0.1), regret=interval(0.3, 0.1), regret_low=interval(0.2, 0.1),
        normalised_regret=interval(0.6, 0.1),
    )  # fmt: skip
    points = [
        CandidateFigures(
            position=position, tokens=4, prefixes=20, tied=0, spearman=interval(0.4, 0.1), kendall=interval(0.3, 0.1),
            reliability=0.8, ceiling=0.9, steering=interval(0.5, 0.1), best_gain=interval(0.9, 0.1),
            best_gain_low=interval(0.7, 0.1), scorer=choice, guided=choice, policy=choice, policy_greedy=choice,
        )
        for position in (0.5, 1.0, None)
    ]  # fmt: skip
    return RolloutAuditResult(
        scorer="s", objective="prefix-bt", reward="gold", prompts=10, prefixes=20, candidates=4, per_candidate=8,
        beta=2.0, kl_nats=0.1, standard_error=0.2, overall=points[2], by_position=points[:2], verdict="Orders well.",
        provenance=Provenance(version="9.9", command="rgtg audit"),
    )  # fmt: skip
