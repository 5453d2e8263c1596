"""Marks the tests of decoding that ``make test-fast`` leaves out: each takes many seconds over all its cases."""

import pytest

THOROUGH = {
    "test_the_distribution_of_completions_is_the_enumerated_one",  # by sampling; the traced figures stay
    "test_the_distribution_is_the_enumerated_one",
    "test_the_distribution_is_the_one_enumerated",
    "test_greedy_tokens_are_the_plain_loops",
    "test_a_request_depends_on_neither_neighbours_nor_order",
    "test_a_request_depends_on_no_neighbour",
    "test_scores_are_those_of_the_text_from_scratch",
}


def pytest_collection_modifyitems(items):
    for item in items:
        if getattr(item, "originalname", None) in THOROUGH:
            item.add_marker(pytest.mark.thorough)
