import math
import random
import sys

import pytest

from rgtg.decoding.sampling import best_of_n_kl
from rgtg.errors import MissingExtraError
from rgtg.evaluation import metrics
from rgtg.evaluation.metrics import (
    best_of_n_kl_estimate,
    bootstrap_interval,
    distinct_n,
    expected_calibration_error,
    holm,
    paired_difference,
    self_rouge_l,
    sign_flip_p_values,
)


def test_the_interval_contains_the_mean_and_narrows_with_more_values():
    noise = random.Random(0)
    few = [noise.gauss(1, 1) for _ in range(20)]
    many = few + [noise.gauss(1, 1) for _ in range(980)]
    small, large = bootstrap_interval(few), bootstrap_interval(many)
    assert small.low < small.mean < small.high
    assert large.high - large.low < (small.high - small.low) / 3


def test_interval_agrees_with_the_normal_approximation():
    noise = random.Random(1)
    values = [noise.gauss(0, 2) for _ in range(400)]
    interval = bootstrap_interval(values, resamples=4000)
    mean = sum(values) / 400
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / 399 / 400)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.08)


def test_clusters_are_resampled_whole():
    # Ten units whose values agree within a unit: many copies add no evidence.
    values = [float(unit % 2) for unit in range(10) for _ in range(50)]
    units = [unit for unit in range(10) for _ in range(50)]
    clustered, flat = bootstrap_interval(values, clusters=units), bootstrap_interval(values)
    assert clustered.n == 10
    assert clustered.high - clustered.low > 4 * (flat.high - flat.low)


def test_an_interval_of_no_values_is_an_error():
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_interval([])


def test_same_seed_gives_the_same_interval():
    values = [0.1, 0.5, 0.9, 0.4]
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)


@pytest.mark.parametrize(
    ("probabilities", "outcomes", "expected"),
    [([0.95] * 4, [1, 1, 1, 1], 0.05), ([0.95] * 4, [0, 0, 0, 0], 0.95), ([0.25, 0.75], [1, 0], 0.75)],
)
def test_calibration_error_by_hand(probabilities, outcomes, expected):
    assert expected_calibration_error(probabilities, outcomes) == pytest.approx(expected)


def test_distinct_n_by_hand():
    assert distinct_n([[1, 2, 3], [1, 2]], 2) == pytest.approx(2 / 3)
    assert distinct_n([[1]], 2) == 1.0


def test_paired_difference_cancels_what_units_share():
    noise = random.Random(2)
    base = [noise.gauss(0, 10) for _ in range(100)]
    difference = paired_difference([b + 0.5 for b in base], base)
    assert difference.low == pytest.approx(0.5)
    assert difference.high == pytest.approx(0.5)


def test_best_of_n_kl_by_hand():
    assert best_of_n_kl(10) == pytest.approx(math.log(10) - 0.9)


@pytest.mark.parametrize("size", [3, 8, 50])
@pytest.mark.parametrize("n", [2, 4, 10])
def test_best_of_n_kl_estimate_lies_between_the_enumerated_kl_and_the_bound(size, n):
    noise = random.Random(size)
    weights = [noise.random() ** 3 for _ in range(size)]
    drawn = [w / sum(weights) for w in weights]  # in order of reward
    exact = estimate = below = 0.0
    for p in drawn:
        won = (below + p) ** n - below**n
        below += p
        exact += won * math.log(won / p)
        estimate += won * best_of_n_kl_estimate(n, math.log(p))
    assert exact - 1e-9 <= estimate <= best_of_n_kl(n) + 1e-9
    assert estimate - exact <= 0.3 * exact + 0.06
    if size == 3:
        assert estimate < best_of_n_kl(n) - 0.02


def test_best_of_n_kl_estimate_of_a_long_completion_is_the_bound():
    assert best_of_n_kl_estimate(10, -60.0) == pytest.approx(best_of_n_kl(10), abs=1e-9)
    assert best_of_n_kl_estimate(10, math.log(2e-12)) == pytest.approx(best_of_n_kl(10), abs=1e-6)


def test_sign_flips_by_hand():
    # 2 of the 8 patterns of (1, 2, 3) reach |6|; 4 of those of (1, 2, -3) reach |0|: all do
    assert sign_flip_p_values([[1.0, 2.0, 3.0], [1.0, 2.0, -3.0]]) == [0.25, 1.0]
    assert sign_flip_p_values([[0.1] * 3, [0.3, 0.3, 0.3]]) == [0.25, 0.25]  # rounding must not lose the ties


def test_random_sign_flips_agree_with_all_of_them():
    noise = random.Random(3)
    values = [[noise.gauss(0.4, 1) for _ in range(13)] for _ in range(4)]
    exact = sign_flip_p_values(values, permutations=2**13)
    drawn = sign_flip_p_values(values, permutations=8000)
    assert drawn != exact
    assert drawn == pytest.approx(exact, abs=0.02)


def test_sign_flip_tests_keep_their_level():
    noise = random.Random(4)
    p_values = sign_flip_p_values([[noise.gauss(0, 1) for _ in range(40)] for _ in range(1000)], permutations=999)
    assert sum(p <= 0.05 for p in p_values) / 1000 == pytest.approx(0.05, abs=0.025)
    assert min(p_values) >= 1 / 1000


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_self_rouge_l_by_hand():
    assert self_rouge_l(["The cat sat", "the cat sat."]) == 1.0
    assert self_rouge_l(["one two", "three four"]) == 0.0
    # longest common subsequence of 2 words; precision 2/3, recall 2/2
    assert self_rouge_l(["a c", "a b c"]) == pytest.approx(0.8)
    assert self_rouge_l(["кот спит", "кот ест"]) == pytest.approx(0.5)
    assert self_rouge_l(["a", "a", "b"]) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="at least two"):
        self_rouge_l(["alone"])


def test_a_missing_extra_is_an_error_with_its_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    metrics._rouge_l.cache_clear()
    with pytest.raises(MissingExtraError, match=r"rgtg\[report\]"):
        self_rouge_l(["a", "b"])
