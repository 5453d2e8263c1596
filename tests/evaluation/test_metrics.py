import math
import random

import pytest

from rgtg.evaluation.metrics import (
    best_of_n_kl,
    bootstrap_interval,
    distinct_n,
    expected_calibration_error,
    paired_difference,
)


def test_interval_holds_the_mean_and_narrows_with_more_values():
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


def test_interval_of_nothing_is_refused():
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


def test_paired_difference_ignores_what_units_share():
    noise = random.Random(2)
    base = [noise.gauss(0, 10) for _ in range(100)]
    difference = paired_difference([b + 0.5 for b in base], base)
    assert difference.low == pytest.approx(0.5)
    assert difference.high == pytest.approx(0.5)


def test_best_of_n_kl_by_hand():
    assert best_of_n_kl(10) == pytest.approx(math.log(10) - 0.9)
