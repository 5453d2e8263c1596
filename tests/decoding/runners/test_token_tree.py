"""Token trees: depths, ancestry, paths, what is no tree; branches of each row of its own shape."""

import pytest
import torch

from rgtg.decoding.runners.token_tree import RaggedTree, TokenTree, TokenTrie

TOKENS = torch.arange(10).reshape(2, 5)


def test_leaves_attend_to_themselves_only():
    tree = TokenTree.leaves(TOKENS)
    assert tree.depths.tolist() == [0] * 5
    assert torch.equal(tree.ancestry, torch.eye(5, dtype=torch.bool))
    assert tree.path(3) == [3]


def test_a_chain_is_causal():
    tree = TokenTree.chain(TOKENS)
    assert tree.depths.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(tree.ancestry, torch.ones(5, 5).tril().bool())
    assert tree.path(2) == [0, 1, 2]


def test_nodes_attend_to_their_ancestors_only():
    tree = TokenTree(TOKENS, (-1, 0, 0, 2, -1))
    assert tree.depths.tolist() == [0, 1, 1, 2, 0]
    attended = [[j for j in range(5) if tree.ancestry[i, j]] for i in range(5)]
    assert attended == [[0], [0, 1], [0, 2], [0, 2, 3], [4]]
    assert tree.path(3) == [0, 2, 3]


@pytest.mark.parametrize("parents", [(-1, 0), (-1, 2, 1, 0, 0), (0, 0, 0, 0, 0), (-2, 0, 0, 0, 0)])
def test_invalid_parents_are_refused(parents):
    with pytest.raises(ValueError, match="parent"):
        _ = TokenTree(TOKENS, parents).depths


def test_branches_of_a_trie_share_their_first_tokens():
    trie = TokenTrie()
    assert trie.add(3, [5, 6]) == 1
    assert trie.add(3, [5, 7]) == 2
    assert trie.add(2, [5]) == 3, "it leaves the prefix elsewhere"
    assert trie.add(3, [5, 6]) == 1
    assert trie.tokens == [5, 6, 7, 5]
    assert trie.positions == [3, 4, 4, 2]
    assert trie.path(2) == [0, 2]


def test_nodes_attend_to_their_part_of_the_prefix_and_to_their_ancestors():
    first, second = TokenTrie(), TokenTrie()
    first.add(3, [5, 6])
    first.add(1, [7])
    second.add(2, [8])
    tree = RaggedTree([first, second], [3, 2])
    assert tree.ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert tree.positions.tolist() == [[3, 4, 1], [2, 0, 0]]
    shown = ["".join(".x"[int(seen)] for seen in node) for row in tree.visible(None) for node in row]
    assert shown == ["xxxx..", "xxxxx.", "x....x", "xxx...", "...x..", "....x."]


def test_a_sliding_window_hides_columns_that_are_too_far_back():
    trie = TokenTrie()
    trie.add(3, [5, 6])
    visible = RaggedTree([trie], [3]).visible(2)
    assert visible.tolist() == [[[False, False, True, True, False], [False, False, False, True, True]]]
    assert visible.dtype is torch.bool
