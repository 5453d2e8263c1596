"""Win rates by hand: both orders, ties, position bias, equal length."""

import math

import pytest
import torch

from rgtg.evaluation.judge.win_rate import length_controlled_win_rate, pair_score, summarise
from rgtg.types.judge import JudgedPair


def pair(*verdicts, prompt="p", lengths=(5, 5), answers=("x", "y")):
    return JudgedPair(
        a="A", b="B", prompt=prompt, text_a="a" * lengths[0], text_b="b" * lengths[1], verdicts=list(verdicts),
        answers=list(answers), score=pair_score(verdicts),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("verdicts", "score"),
    [
        (("a", "a"), 1.0), (("a", "tie"), 0.75), (("a", "b"), 0.5), (("tie", "tie"), 0.5), (("b", "tie"), 0.25),
        (("b", "b"), 0.0), (("a", None), None),
    ],
)  # fmt: skip
def test_a_pair_counts_both_orders(verdicts, score):
    assert pair_score(verdicts) == score


def test_a_match_by_hand():
    pairs = [
        pair("a", "a", prompt="1"), pair("a", "b", prompt="2"), pair("b", "b", prompt="3"),
        pair("a", "tie", prompt="4"), pair("tie", "tie", prompt="5", answers=()), pair("a", None, prompt="6"),
    ]  # fmt: skip
    match = summarise(pairs, resamples=200)
    assert match.win_rate.mean == pytest.approx((1 + 0.5 + 0 + 0.75 + 0.5) / 5)
    assert (match.wins, match.ties, match.losses) == (2, 2, 1)
    assert (match.identical, match.failed, match.win_rate.n) == (1, 1, 5)
    assert match.consistent.mean == pytest.approx(2 / 4)
    # Decided calls: 1: a first won, b first lost; 2: both first; 3: a first lost, b first won; 4: a first won.
    assert match.first_preferred.mean == pytest.approx(5 / 7)
    assert match.win_rate.low <= match.win_rate.mean <= match.win_rate.high


def test_a_judge_that_always_prefers_the_first_is_detected():
    match = summarise([pair("a", "b", prompt=str(i)) for i in range(20)])
    assert match.win_rate.mean == match.win_rate.low == match.win_rate.high == 0.5
    assert match.first_preferred.mean == 1.0
    assert match.consistent.mean == 0.0


def test_all_completions_of_a_prompt_are_one_unit():
    match = summarise([pair("a", "a", prompt="same") for _ in range(50)] + [pair("b", "b", prompt="other")] * 50)
    assert match.win_rate.n == 2
    assert (match.win_rate.low, match.win_rate.high) == (0.0, 1.0)


def test_only_failures_give_empty_figures():
    match = summarise([pair("a", None)])
    assert math.isnan(match.win_rate.mean)
    assert math.isnan(match.length_controlled.mean)
    assert (match.win_rate.n, match.failed) == (0, 1)


def test_win_rate_by_length():
    match = summarise(
        [pair("a", "a", prompt="1", lengths=(100, 50)), pair("b", "b", prompt="2", lengths=(50, 100)),
         pair("a", "b", prompt="3", lengths=(100, 95))]
    )  # fmt: skip
    assert {name: value.mean for name, value in match.by_length.items()} == {"longer": 1, "shorter": 0, "similar": 0.5}


def test_a_judge_of_length_alone_prefers_nobody_at_equal_length():
    # a is longer in 80 of 100 prompts, and the longer one wins 9 times in 10: 0.74 in all, one half at equal length.
    differences = torch.tensor([10.0] * 80 + [-10.0] * 20, dtype=torch.float64)
    scores = torch.tensor([1.0] * 72 + [0.0] * 8 + [1.0] * 2 + [0.0] * 18, dtype=torch.float64)
    assert scores.mean() == 0.74
    assert length_controlled_win_rate(scores, differences).item() == pytest.approx(0.5, abs=1e-3)


def test_without_an_effect_of_length_the_figure_is_the_win_rate():
    scores = torch.tensor([1.0, 1, 1, 0] * 50, dtype=torch.float64)
    differences = torch.tensor([5.0] * 4 + [-5.0] * 4, dtype=torch.float64).repeat(25)
    assert length_controlled_win_rate(scores, differences).item() == pytest.approx(0.75, abs=1e-3)
    assert length_controlled_win_rate(scores, torch.zeros(200, dtype=torch.float64)).item() == pytest.approx(
        0.75, abs=1e-3
    )


def test_the_fit_satisfies_its_equation():
    differences = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 30 + 20
    z = torch.tanh(differences / differences.std(correction=0))
    expected = torch.sigmoid(0.8 + 1.5 * z)  # scores that are the model's own probabilities: the fit is exact
    assert expected.mean() > 0.75
    rate = length_controlled_win_rate(expected, differences).item()
    assert rate == pytest.approx(torch.sigmoid(torch.tensor(0.8)).item(), abs=1e-3)


def test_one_sided_matches_stay_finite_in_every_resample():
    scores, differences = torch.ones(30, dtype=torch.float64), torch.arange(30, dtype=torch.float64) - 10
    draws = torch.randint(0, 3, (50, 30)).double()
    rates = length_controlled_win_rate(scores, differences, draws)
    assert rates.isfinite().all()
    assert (rates > 0.9).all()
