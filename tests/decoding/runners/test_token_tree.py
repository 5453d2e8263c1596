"""Trees as tensors: depths, ancestry, paths, and what is no tree."""

import pytest
import torch

from rgtg.decoding.runners.token_tree import TokenTree

TOKENS = torch.arange(10).reshape(2, 5)


def test_leaves_see_only_themselves():
    tree = TokenTree.leaves(TOKENS)
    assert tree.depths.tolist() == [0] * 5
    assert torch.equal(tree.ancestry, torch.eye(5, dtype=torch.bool))
    assert tree.path(3) == [3]


def test_a_chain_is_causal():
    tree = TokenTree.chain(TOKENS)
    assert tree.depths.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(tree.ancestry, torch.ones(5, 5).tril().bool())
    assert tree.path(2) == [0, 1, 2]


def test_branches_see_their_ancestors_only():
    tree = TokenTree(TOKENS, (-1, 0, 0, 2, -1))
    assert tree.depths.tolist() == [0, 1, 1, 2, 0]
    seen = [[j for j in range(5) if tree.ancestry[i, j]] for i in range(5)]
    assert seen == [[0], [0, 1], [0, 2], [0, 2, 3], [4]]
    assert tree.path(3) == [0, 2, 3]


@pytest.mark.parametrize("parents", [(-1, 0), (-1, 2, 1, 0, 0), (0, 0, 0, 0, 0), (-2, 0, 0, 0, 0)])
def test_what_is_no_tree_is_refused(parents):
    with pytest.raises(ValueError, match="parent"):
        TokenTree(TOKENS, parents)
