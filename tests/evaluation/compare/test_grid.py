"""Expanding a settings file into runs."""

import pytest

from rgtg.config import CompareRun, CompareSettings, GuidingScorer, validate
from rgtg.decoding.methods import METHODS
from rgtg.errors import UsageError
from rgtg.evaluation.compare.grid import expand_runs, has_setting, is_random, with_betas, with_shared_settings


def shared(**values):
    return CompareSettings(prompts="-", output="-", methods=[CompareRun(method="policy")], **values)


def test_lists_give_one_run_per_combination():
    rows = expand_runs(
        [
            CompareRun(method="pargs", beta=[0.5, 2], top_k=[5, None], scorer="s"),
            CompareRun(method="best-of-n", n=[2, 4], scorer="s"),
            CompareRun(method="policy", temperature=0.7),
        ]
    )
    assert [(row.label, row.curve, row.strength) for row in rows] == [
        ("pargs β=0.5 k=5", "pargs k=5", 0.5),
        ("pargs β=2 k=5", "pargs k=5", 2),
        ("pargs β=0.5 k=None", "pargs k=None", 0.5),
        ("pargs β=2 k=None", "pargs k=None", 2),
        ("best-of-n n=2", "best-of-n", 2),
        ("best-of-n n=4", "best-of-n", 4),
        ("policy", "policy", None),
    ]
    assert [row.decoding() for row in rows[:3]] == [
        {"top_k": 5, "beta": 0.5}, {"top_k": 5, "beta": 2}, {"top_k": None, "beta": 0.5},
    ]  # fmt: skip
    assert rows[-1].decoding() == {"temperature": 0.7}


def test_a_kl_budget_is_a_strength():
    runs = expand_runs([CompareRun(method="pargs", scorer="s", kl_budget=[4, 8.5])])
    assert [(run.label, run.curve, run.strength, run.beta) for run in runs] == [
        ("pargs KL=4", "pargs", 4, None), ("pargs KL=8.5", "pargs", 8.5, None),
    ]  # fmt: skip


def test_several_scorers_have_one_beta_each():
    run = CompareRun.model_validate(
        {"method": "pargs", "scorers": [{"scorer": "a", "beta": [1, 2]}, {"scorer": "b", "beta": 0.5}]}
    )
    expanded = expand_runs([run])
    assert [(row.scorers, row.beta) for row in expanded] == [(("a", "b"), [1, 0.5]), (("a", "b"), [2, 0.5])]
    assert [(row.label, row.curve) for row in expanded] == [
        ("pargs β=1+0.5", "pargs β=*+0.5"), ("pargs β=2+0.5", "pargs β=*+0.5"),
    ]  # fmt: skip


def test_any_decoding_setting_can_be_given_and_stop_is_one_value():
    (row,) = expand_runs([CompareRun(method="policy", stop=["a", "b"], top_p=0.9)])
    assert row.given == {"stop": ["a", "b"], "top_p": 0.9}
    two = expand_runs([CompareRun(method="policy", max_new_tokens=[4, 8])])
    assert [(row.label, row.given["max_new_tokens"]) for row in two] == [
        ("policy max_new_tokens=4", 4), ("policy max_new_tokens=8", 8),
    ]  # fmt: skip


def test_shared_settings_apply_to_runs_whose_method_accepts_them():
    settings = shared(temperature=0.7, top_k=3, decoding={"top_p": 0.8}, scorer="s", max_new_tokens=9)
    runs = [CompareRun(method="policy", top_p=0.5), CompareRun(method="args", beta=2)]
    plain, greedy = expand_runs(runs, settings)
    assert plain.given == {"temperature": 0.7, "top_k": 3, "top_p": 0.5, "max_new_tokens": 9}
    assert greedy.given == {"top_k": 3, "top_p": 0.8, "max_new_tokens": 9}
    assert (plain.scorers, greedy.scorers) == ((), ("s",))
    assert with_shared_settings(plain, shared()).given["top_k"] == 3
    with pytest.raises(UsageError, match="top_p"):
        expand_runs(runs, shared(decoding={"top_p": 2}))
    with pytest.raises(ValueError, match="beta belongs to a scorer"):
        shared(decoding={"beta": 2})


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"method": "pargs", "beta": []}, "beta of pargs is an empty list"),
        ({"method": "pargs", "beta": 1, "kl_budget": 4}, "give either beta or kl_budget"),
        ({"method": "best-of-n", "n": []}, "n of best-of-n is an empty list"),
        ({"method": "policy", "beta": 0}, "policy has no beta"),
        ({"method": "best-of-n", "beta": 1}, "best-of-n has no beta"),
        ({"method": "pargs", "n": 3}, "n applies to .*best-of-n"),
        ({"method": "args", "temperature": 0.5}, "args takes the maximum and has no temperature"),
        ({"method": "prags"}, "unknown method 'prags'"),
        ({"method": "policy", "top_p": 2}, "top_p"),
        ({"method": "best-of-n", "temperature": 0}, "would draw 10 times the same"),
        ({"method": "best-of-n", "top_k": 1}, "would draw 10 times the same"),
        ({"method": "pargs", "policy": "tuned"}, "needs its own scorer"),
        ({"method": "policy", "scorer": "s"}, "policy takes no scorer"),
        ({"method": "cards"}, "cards needs reward_threshold"),
    ],
)
def test_settings_that_a_method_would_ignore_are_errors(run, message):
    with pytest.raises(UsageError, match=message):
        expand_runs([CompareRun.model_validate(run)])


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"method": "pargs", "bta": 1}, "unknown setting bta; did you mean beta"),
        ({"method": "pargs", "scorer": "s", "scorers": [{"scorer": "t"}]}, "leave scorer and beta out"),
    ],
)
def test_unusable_runs_are_errors_when_the_settings_are_read(run, message):
    with pytest.raises(UsageError, match=message):
        validate(CompareSettings, {"prompts": "-", "output": "-", "methods": [run]})


@pytest.mark.parametrize("seeds", [[1, 1], [-1], []])
def test_seeds_must_be_different_and_not_negative(seeds):
    with pytest.raises(UsageError, match="seeds"):
        validate(CompareSettings, {"prompts": "-", "output": "-", "methods": [{"method": "policy"}], "seeds": seeds})
    assert shared(seed=4).run_seeds == [4]
    assert shared(seeds=[1, 0]).run_seeds == [1, 0]


def test_two_runs_with_one_label_are_an_error():
    with pytest.raises(UsageError, match="two rows are called 'policy'"):
        expand_runs([CompareRun(method="policy"), CompareRun(method="policy", temperature=0.5)])


def test_runs_without_randomness_have_one_seed():
    rows = expand_runs(
        [
            CompareRun(method="policy"),
            CompareRun(method="policy", temperature=0, label="greedy"),
            CompareRun(method="args", scorer="s"),
            CompareRun(method="best-of-n", scorer="s"),
        ]
    )
    assert [is_random(row) for row in rows] == [True, False, False, True]


def test_every_method_of_the_table_expands_to_one_run():
    for method in METHODS.values():
        needed = {"accept": {"reward_threshold": 1.0}, "filter": {"value_threshold": 1.0}}.get(method.rule, {})
        run = CompareRun.model_validate({"method": method.name, **needed})
        (row,) = expand_runs([run], shared(scorer="s", temperature=0.9))
        assert row.scorers == (("s",) if method.scorer else ())
        assert (row.strength is None) == (not has_setting(method.name, "beta") and not has_setting(method.name, "n"))


def test_betas_are_multiplied():
    (row,) = expand_runs([CompareRun(method="pargs", scorer="s")])
    assert (with_betas(row, 2.0, []).beta, with_betas(row, 2.0, []).label) == (2.0, "pargs β=2")
    several = [GuidingScorer(scorer="a", beta=2), GuidingScorer(scorer="b", beta=0.5)]
    assert (with_betas(row, 3.0, several).beta, with_betas(row, 3.0, several).label) == ([6.0, 1.5], "pargs β=6+1.5")
    assert with_betas(row, 3.0, several[:1]).beta == 6.0
