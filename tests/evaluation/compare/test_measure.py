"""Metrics of completions, by hand."""

import math

import pytest

from rgtg.decoding.sampling import best_of_n_kl
from rgtg.evaluation.compare.measure import budgets_of, measure
from rgtg.evaluation.metrics import best_of_n_kl_estimate
from rgtg.types.base import Interval
from rgtg.types.comparison import MethodResult
from rgtg.types.generation import Completion


def done(text="a b", ids=(4, 5), policy=-3.0, guided=-1.0, cut=-2.0):
    return Completion(prompt="p", text=text, token_ids=list(ids), finish_reason="stop", method="pargs", seed=0,
                      policy_log_prob=policy, guided_log_prob=guided, candidates_log_prob=cut)  # fmt: skip


def means(*arguments, **settings):
    return {name: figure.mean for name, figure in measure(*arguments, resamples=100, **settings).items()}


def test_figures_by_hand():
    runs = [[done(), done(ids=(4, 4, 4), policy=-4.5, guided=-2.5, cut=-3.5)]]
    found = means(runs, [[1.0, 3.0]], proxies={"s": [[5.0, 6.0]]})
    assert found == pytest.approx(
        {
            "reward": 2.0, "proxy:s": 5.5, "kl_nats": 2.0, "kl_cut_nats": 1.0, "perplexity": math.exp(1.5),
            "distinct_1": (1 + 1 / 3) / 2, "distinct_2": (1 + 1 / 2) / 2, "distinct_3": 1.0, "length_tokens": 2.5,
        }
    )  # fmt: skip


def test_best_of_n_states_an_estimate_and_the_bound():
    found = means([[done(guided=-0.4)]], [[1.0]], n=4, bounded=True)
    assert found["kl_nats"] == pytest.approx(-0.4 + 3 + best_of_n_kl_estimate(4, -0.4))
    assert found["kl_cut_nats"] == pytest.approx(-0.4 + 2 + best_of_n_kl_estimate(4, -0.4))
    assert found["kl_bound_nats"] == pytest.approx(-0.4 + 3 + best_of_n_kl(4))
    assert found["kl_nats"] < found["kl_bound_nats"]


def test_selection_nats_are_added_to_the_kl():
    drawn = done().model_copy(update={"selection_nats": 0.75})
    assert means([[drawn]], [[1.0]])["kl_nats"] == 2.75
    assert means([[drawn]], [[1.0]])["kl_cut_nats"] == 1.75
    assert "kl_bound_nats" not in means([[drawn]], [[1.0]])
    blockwise = means([[drawn]], [[1.0]], bounded=True)
    assert blockwise["kl_bound_nats"] == blockwise["kl_nats"] == 2.75


def test_another_policy_is_measured_against_the_reference():
    found = means([[done()]], [[1.0]], reference=[[-7.0]])
    assert found["kl_nats"] == 6.0
    assert found["perplexity"] == pytest.approx(math.exp(3.5))
    assert "kl_cut_nats" not in found  # its candidates were another policy's


def test_old_completions_without_candidate_log_probs_have_no_cut_kl():
    assert "kl_cut_nats" not in means([[done(cut=None)]], [[1.0]])


def test_seeds_of_a_prompt_are_resampled_together_and_compared_with_each_other():
    levels = [float(i) for i in range(20)]
    runs = [[done(text=f"a {i}") for i in range(20)], [done(text=f"b {i}") for i in range(20)]]
    found = measure(runs, [levels, levels], resamples=400)
    assert found["reward"] == measure(runs[:1], [levels], resamples=400)["reward"]  # the same evidence twice
    assert found["reward"].n == 20
    assert found["self_rouge_l"].mean == pytest.approx(0.5)
    assert "self_rouge_l" not in measure(runs[:1], [levels], resamples=100)


def result(label, policy_calls, scorer_calls, tokens=100):
    length = Interval(mean=10, low=9, high=11, n=10)
    return MethodResult(label=label, method="m", beta=None, metrics={"length_tokens": length}, tokens=tokens, seconds=1,
                        tokens_per_second=1, policy_calls=policy_calls, scorer_calls=scorer_calls)  # fmt: skip


def test_budgets_are_stated():
    budgets, statement = budgets_of([result("policy", 100, 0), result("best-of-n", 1000, 10)])
    assert [(b.policy_calls_per_token, b.scorer_calls_per_token) for b in budgets] == [(1, 0), (10, 0.1)]
    assert statement.startswith(
        "Budgets are not equal: policy calls per token 1.00 to 10.00, scorer calls per token 0.00 to 0.10"
    )
    _, same = budgets_of([result("a", 100, 100), result("b", 200, 200, tokens=200)])
    assert same.startswith("Budgets are equal: policy calls per token 1.00, scorer calls per token 1.00")
    assert budgets_of([result("old", 1, 1, tokens=None)]) == ([], "")
