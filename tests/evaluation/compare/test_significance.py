"""Paired tests, over-optimisation and recommendations, on given rewards."""

import random

import pytest

from rgtg.evaluation.compare.significance import (
    Resampling,
    curves,
    differences,
    over_optimised,
    recommend,
    representative,
)
from rgtg.evaluation.metrics import bootstrap_interval
from rgtg.types.comparison import MethodResult

PROMPTS = 40


def row(label, gold, proxy=None, *, curve=None, strength=None, seeds=1, method="pargs", noise=1.0):
    """A run whose rewards are a level, plus an effect of the prompt (shared by all runs), plus its own noise."""
    shared, own = random.Random(0), random.Random(label)
    base = [shared.gauss(0, 5) for _ in range(PROMPTS)]

    def values(level):
        return [[level + b + own.gauss(0, noise) for b in base] for _ in range(seeds)]

    rewards = values(gold)
    return MethodResult(
        label=label, method=method, beta=strength, curve=curve, strength=strength, seeds=list(range(seeds)),
        rewards=rewards, proxy_rewards={} if proxy is None else {"s": values(proxy)}, guided_by=["s"] if proxy else [],
        metrics={"reward": bootstrap_interval([v for run in rewards for v in run])}, seconds=1, tokens_per_second=1,
        policy_calls=1, scorer_calls=1,
    )  # fmt: skip


def curve(levels, proxies):
    return [
        row(f"m β={i}", gold, proxy, curve="m", strength=float(i))
        for i, (gold, proxy) in enumerate(zip(levels, proxies, strict=True))
    ]


def test_paired_tests_find_what_separate_intervals_do_not():
    base, better = row("policy", 0.0, method="policy"), row("better", 1.0)
    assert base.metrics["reward"].high > better.metrics["reward"].low  # unpaired, they overlap
    family, methods = differences([base, better], "policy")
    assert (family.a, family.b, family.family, family.metric) == ("better", "policy", "baseline", "reward")
    assert family.difference.low > 0
    assert family.difference.n == PROMPTS
    assert family.p_adjusted == family.p_value < 0.01
    assert (methods.a, methods.b, methods.family) == ("policy", "better", "methods")
    assert methods.difference.mean == pytest.approx(-family.difference.mean)


def test_more_rows_make_the_correction_stricter():
    rows = [row("policy", 0.0, method="policy"), row("a", 1.6), row("b", 0.0), row("c", 0.0), row("d", 0.0)]
    alone = differences(rows[:2], "policy")[0]
    family = [d for d in differences(rows, "policy") if d.family == "baseline"]
    among = next(d for d in family if d.a == "a")
    assert among.p_value == alone.p_value == min(d.p_value for d in family)
    assert among.p_adjusted == pytest.approx(4 * alone.p_adjusted)


def test_seeds_of_a_prompt_are_one_unit():
    one, many = row("policy", 0.0, method="policy", seeds=2), row("a", 0.3, seeds=3)
    found = differences([one, many], "policy")[0]
    assert found.difference.n == PROMPTS
    means = [sum(x) / 3 - sum(y) / 2 for x, y in zip(zip(*many.rewards), zip(*one.rewards), strict=True)]  # noqa: B905
    assert found.difference.mean == pytest.approx(sum(means) / PROMPTS)


def test_proxies_that_every_row_has_are_compared_too():
    rows = [row("policy", 0.0, 0.1, method="policy"), row("a", 1.0, 2.0)]
    assert {d.metric for d in differences(rows, "policy") if d.family == "baseline"} == {"reward", "proxy:s"}
    rows.append(row("b", 0.0))
    assert {d.metric for d in differences(rows, "policy")} == {"reward"}


def test_lower_gold_with_a_higher_proxy_is_marked():
    marks = over_optimised(curve([0.0, 2.0, 1.9, -1.0], [0.1, 1, 3, 6]))
    assert [(m.at, m.best, m.proxy) for m in marks] == [("m β=3", "m β=1", "s")]
    assert marks[0].gold_difference.high < 0 < marks[0].proxy_difference.low
    assert marks[0].p_adjusted < 0.05


@pytest.mark.parametrize(
    ("levels", "proxies"),
    [
        ([0.0, 1.0, 2.0], [0.1, 1, 2]),  # both rise
        ([2.0, 1.0, -1.0], [3, 2, 0.1]),  # both fall: a bad scorer, not an over-optimised one
        ([0.0, 0.0, 0.0], [0.1, 2, 4]),  # nothing is gained, nothing lost
    ],
)
def test_nothing_else_is_marked(levels, proxies):
    assert over_optimised(curve(levels, proxies)) == []


def test_other_curves_do_not_mark_each_other():
    rows = [*curve([0.0], [0.1]), row("other β=5", -3.0, 9.0, curve="other", strength=5.0)]
    assert over_optimised(rows) == []


def test_the_least_strength_that_is_as_good_as_the_best_is_recommended():
    rows = curve([0.0, 2.0, 2.02, 1.0], [0.1, 1, 3, 6])
    (choice,) = recommend(rows)
    assert (choice.curve, choice.label, choice.beta) == ("m", "m β=1", 1.0)
    assert "one standard error" in choice.reason
    (clear,) = recommend(curve([0.0, 1.0, 4.0], [0.1, 1, 3]))
    assert (clear.label, clear.reason.startswith("the highest gold reward")) == ("m β=2", True)
    assert recommend([row("policy", 0.0)]) == []
    assert representative([row("policy", 0.0)]).label == "policy"


def test_curves_are_ordered_by_strength_without_rows_of_version_one():
    rows = curve([0.0, 1.0, 2.0], [0.1, 1, 2])
    old = rows[0].model_copy(update={"rewards": [], "label": "old"})
    assert [r.label for r in curves([rows[2], old, rows[0], rows[1]])["m"]] == ["m β=0", "m β=1", "m β=2"]


def test_resampling_is_seeded():
    rows = [row("policy", 0.0, method="policy"), row("a", 0.2)]
    first, second = (differences(rows, "policy", Resampling(seed=3)) for _ in range(2))
    assert first == second
    assert first != differences(rows, "policy", Resampling(seed=4))
