"""Padded batches of rows of different lengths."""

import torch

from rgtg.tokenization.padding import batches_by_length, pad_right, position_ids


def test_rows_are_padded_on_the_right():
    ids, mask = pad_right([[5, 6, 7], [8]], 1, "cpu")
    assert ids.tolist() == [[5, 6, 7], [8, 1, 1]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_rows_of_similar_length_share_a_batch():
    rows = [([1, 2], [3, 4, 5]), ([6], [7]), ([8, 9], [10])]
    batches = [(indices, ids.tolist()) for indices, ids, _ in batches_by_length(rows, 2, "cpu")]
    assert batches == [([1, 2], [[6, 7, 0], [8, 9, 10]]), ([0], [[1, 2, 3, 4, 5]])]


def test_positions_start_at_the_first_token():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]
