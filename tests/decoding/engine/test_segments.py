"""Segments: which of several is chosen. Their distributions are enumerated in ``test_batch.py``."""

import math

import pytest

from rgtg.decoding.engine.segments import _highest


@pytest.mark.parametrize(
    ("rewards", "place"),
    [([0.1, 0.5, 0.4], 1), ([0.5, 0.5 + 1e-8], 0), ([0.5, 0.501], 1), ([-math.inf, -math.inf], 0),
     ([-math.inf, 3.0], 1), ([1e6, 1e6 + 0.1, 2e6], 2)],
)  # fmt: skip
def test_the_first_of_rewards_that_are_equal_up_to_rounding_is_the_highest(rewards, place):
    assert _highest(rewards) == place
