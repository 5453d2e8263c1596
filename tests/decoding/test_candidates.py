"""Candidates: the policy's top-k, cut to their nucleus."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rgtg.decoding.candidates import propose

LOG_PROBS = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.7, 0.1, 0.15, 0.05]]).log()


def test_top_k_is_likeliest_first_with_whole_vocabulary_log_probs():
    ids, log_probs = propose(LOG_PROBS, top_k=2)
    assert ids.tolist() == [[1, 3], [0, 2]]
    torch.testing.assert_close(log_probs.exp(), torch.tensor([[0.4, 0.3], [0.7, 0.15]]))


@pytest.mark.parametrize("top_k", [None, 4, 99])
def test_all_tokens(top_k):
    assert propose(LOG_PROBS, top_k=top_k)[0].shape == (2, 4)


def test_the_nucleus_is_of_the_renormalised_top_k():
    # of the top 3 of row 0 (.4 .3 .2)/.9: the first two hold .777; row 1: the first holds .737
    _, log_probs = propose(LOG_PROBS, top_k=3, top_p=0.75)
    assert log_probs.isfinite().tolist() == [[True, True, False], [True, True, False]]
    _, log_probs = propose(LOG_PROBS, top_k=3, top_p=0.7)
    assert log_probs.isfinite().tolist() == [[True, True, False], [True, False, False]]


@given(st.lists(st.floats(-8, 8), min_size=2, max_size=12), st.floats(0.01, 1.0))
def test_the_nucleus_is_the_smallest_leading_set(logits, top_p):
    _, log_probs = propose(torch.tensor([logits]).log_softmax(-1), top_k=None, top_p=top_p)
    whole = torch.tensor(logits).softmax(-1).sort(descending=True).values
    size = int(log_probs.isfinite().sum())
    assert size >= 1
    assert float(whole[: size - 1].sum()) < top_p + 1e-5
    assert float(whole[:size].sum()) >= min(top_p, 1) - 1e-5
