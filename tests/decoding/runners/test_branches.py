"""Branches of each row of its own shape: shared beginnings, who sees whom."""

import torch
from rgtg.decoding.runners.branches import BranchBatch, Branches


def test_branches_share_what_they_begin_with():
    branches = Branches()
    assert branches.add(3, [5, 6]) == 1
    assert branches.add(3, [5, 7]) == 2
    assert branches.add(2, [5]) == 3, "it leaves the prefix elsewhere"
    assert branches.add(3, [5, 6]) == 1
    assert branches.tokens == [5, 6, 7, 5]
    assert branches.positions == [3, 4, 4, 2]
    assert branches.path(2) == [0, 2]


def test_nodes_see_their_part_of_the_prefix_and_their_ancestors():
    first, second = Branches(), Branches()
    first.add(3, [5, 6])
    first.add(1, [7])
    second.add(2, [8])
    batch = BranchBatch([first, second], [3, 2])
    assert batch.ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.positions.tolist() == [[3, 4, 1], [2, 0, 0]]
    shown = ["".join(".x"[int(seen)] for seen in node) for row in batch.sees(None) for node in row]
    assert shown == ["xxxx..", "xxxxx.", "x....x", "xxx...", "...x..", "....x."]


def test_a_sliding_window():
    branches = Branches()
    branches.add(3, [5, 6])
    visible = BranchBatch([branches], [3]).sees(2)
    assert visible.tolist() == [[[False, False, True, True, False], [False, False, False, True, True]]]
    assert visible.dtype is torch.bool
