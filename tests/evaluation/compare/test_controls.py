"""Sampled runs have the sampled policy as control, greedy runs the greedy one."""

import pytest

from evaluation.compare.test_significance import row
from rgtg.evaluation.compare.controls import find_baseline, greedy_control, is_greedy
from rgtg.evaluation.compare.significance import differences

GREEDY = {"temperature": 0.0}


def test_the_baseline_is_the_unguided_policy():
    tuned = row("dpo", 1.0, method="policy").model_copy(update={"settings": {"policy": "dpo"}})
    rows = [row("a", 0.0), tuned, row("plain", 0.0, method="policy")]
    assert find_baseline(rows) == "plain"
    assert find_baseline(rows, "a") == "a"
    assert find_baseline(rows[:1]) == "a"
    assert find_baseline([]) is None


@pytest.mark.parametrize(
    ("method", "settings", "greedy"),
    [
        ("policy", {}, False),
        ("policy", GREEDY, True),
        ("policy", {"temperature": 0.7}, False),
        ("args", {}, True),
        ("pargs-greedy", {}, True),
        ("beam", {}, True),
        ("best-of-n", GREEDY, False),  # of n different ones
        ("a method of another time", GREEDY, False),
    ],
)
def test_which_runs_are_greedy(method, settings, greedy):
    assert is_greedy(run("a", method, settings)) is greedy


def test_greedy_rows_are_compared_with_the_greedy_policy():
    rows = [run("policy", "policy"), run("greedy", "policy", GREEDY), run("p", "pargs"), run("g", "pargs", GREEDY)]
    assert greedy_control(rows) == "greedy"
    assert greedy_control(rows[:1]) is None
    assert greedy_control([run("tuned", "policy", GREEDY | {"policy": "dpo"})]) is None
    found = differences(rows, "policy", greedy_baseline="greedy")
    assert {(d.a, d.b) for d in found if d.family == "baseline"} == {("p", "policy"), ("g", "greedy")}
    found = differences(rows, "policy")
    assert {d.b for d in found if d.family == "baseline"} == {"policy"}


def run(label, method, settings=None):
    return row(label, 0.0, method=method).model_copy(update={"settings": settings or {}})
