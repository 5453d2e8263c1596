"""Win rates from a judge and from rewards, by hand."""

import math

import pytest

from helpers.made_report import comparison, grown, judged, steered
from rgtg.report.win_rates import gold_win_rates, judge_win_rates, win_rates
from rgtg.types.comparison import WinRate, WinRates


def row(label, *seeds):
    return grown(label, 0.0, rewards=[list(seed) for seed in seeds])


def test_runs_with_equal_seeds_are_compared_seed_by_seed():
    found = gold_win_rates([row("a", [1, 2, 3, 0], [1, 1, 1, 0]), row("b", [0, 2, 4, 1], [0, 2, 1, 1])], "gold")
    # by prompt: 1, (½ + 0)/2, (0 + ½)/2, 0
    rate = found.rates["a"]["b"]
    assert rate.rate.mean == pytest.approx((1 + 0.25 + 0.25 + 0) / 4)
    assert (rate.wins, rate.ties, rate.losses) == (1, 0, 3)
    other = found.rates["b"]["a"]
    assert other.rate.mean == pytest.approx(1 - rate.rate.mean)
    assert (other.rate.low, other.rate.high) == pytest.approx((1 - rate.rate.high, 1 - rate.rate.low))
    assert (other.wins, other.losses) == (3, 1)


def test_one_seed_is_compared_with_every_seed_of_the_other():
    found = gold_win_rates([row("greedy", [1, 1]), row("sampled", [0, 2], [2, 2])], "gold")
    assert found.rates["greedy"]["sampled"].rate.mean == pytest.approx((0.5 + 0) / 2)


def test_a_judges_matches_fill_both_directions():
    found = judge_win_rates(judged(("a", "b", 0.7)))
    assert found.judged_by == "judge-8b"
    assert found.rates["a"]["b"].rate.mean == 0.7
    turned = found.rates["b"]["a"]
    assert (turned.rate.mean, turned.rate.low, turned.rate.high) == pytest.approx((0.3, 0.2, 0.4))
    assert (turned.wins, turned.losses, turned.ties) == (3, 7, 2)


def test_a_judge_takes_precedence_over_the_result_and_gold():
    result = steered()
    assert win_rates(result).title == "Win rates, by gold"
    rate = WinRate(rate=result.methods[0].metrics["reward"], wins=1, losses=0, ties=0)
    result.win_rates = WinRates(judged_by="earlier", rates={"policy": {"pargs β=1": rate}})
    assert win_rates(result).title == "Win rates, by earlier"
    section = win_rates(result, judged(("policy", "pargs β=2", 0.2)))
    assert section.title == "Win rates, by judge-8b"
    matrix, matches, note = section.blocks
    # in the order of the rewards
    assert [cells[0].text for cells in matrix.rows] == ["pargs β=2", "policy"]
    assert [cell.text for cell in matrix.rows[0]] == ["pargs β=2", "", "80\u00a0%"]
    assert matrix.rows[0][2].shade == pytest.approx(0.8)
    assert [cell.text for cell in matches.rows[0]][:4] == [
        "policy against pargs β=2",
        "20\u00a0%",
        "15\u00a0%",
        "7 / 2 / 3",
    ]
    assert "Pairs without a verdict, left out: 1." in note.text


def test_rows_that_were_not_judged_and_pairs_without_a_verdict_are_empty():
    missing = judged(("a", "b", 0.5), ("b", "c", 0.5))
    missing.matches[1].win_rate = missing.matches[1].win_rate.model_copy(update={"n": 0, "mean": math.nan})
    matrix = win_rates(steered(), missing).blocks[0]
    cells = {(row[0].text, matrix.headings[i]): row[i].text for row in matrix.rows for i in range(1, 4)}
    assert cells["a", "c"] == ""
    assert cells["b", "c"] == "–"


def test_a_comparison_of_one_row_has_no_matrix():
    assert win_rates(comparison([grown("policy", 0.0)])).blocks == []
