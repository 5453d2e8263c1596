"""Candidates, guided log-probabilities, and the draw from them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rgtg.decoding import sampling
from rgtg.decoding.sampling import (
    SamplingParams,
    draw,
    greedy,
    guided_log_probs,
    propose,
    propose_candidates,
    sample,
)

LOG_PROBS = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.7, 0.1, 0.15, 0.05]]).log()
POLICY = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.4, 0.0]]).log()
SCORES = torch.tensor([[0.0, 1.0, 2.0], [1.0, -1.0, math.nan]])


def test_top_k_is_likeliest_first_with_whole_vocabulary_log_probs():
    ids, log_probs = propose(LOG_PROBS, top_k=2)
    assert ids.tolist() == [[1, 3], [0, 2]]
    torch.testing.assert_close(log_probs.exp(), torch.tensor([[0.4, 0.3], [0.7, 0.15]]))


@pytest.mark.parametrize("top_k", [None, 4, 99])
def test_without_top_k_all_tokens_are_candidates(top_k):
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


@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (1.0, 1.0), (2.0, 0.7), (-1.0, 1.3)])
def test_guided_log_probs_equal_the_formula(beta, temperature):
    weights = (POLICY.double().exp() * (beta * SCORES.double().nan_to_num()).exp()) ** (1 / temperature)
    exact = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(
        guided_log_probs(POLICY, SCORES, beta, temperature).double().exp(), exact, atol=1e-6, rtol=1e-5
    )


def test_an_excluded_candidate_stays_excluded_whatever_its_score():
    scores = torch.tensor([[0.0, 0.0, 1e30]]).expand(2, -1)
    assert guided_log_probs(POLICY, scores, 1.0)[1, 2] == -torch.inf


def test_temperature_zero_is_the_first_maximum():
    guided = guided_log_probs(POLICY, SCORES, 2.0, 0.0)
    assert guided.tolist() == [[-math.inf, -math.inf, 0.0], [0.0, -math.inf, -math.inf]]
    assert greedy(guided).tolist() == [2, 0]


@pytest.mark.parametrize(("beta", "temperature"), [(1.0, 1e-45), (1e39, 1.0), (1e300, 1e-3)])
def test_extreme_settings_tend_to_the_maximum(beta, temperature):
    guided = guided_log_probs(POLICY, SCORES, beta, temperature)
    assert guided.argmax(-1).tolist() == [2, 0]
    assert guided.exp().sum(-1).tolist() == [1.0, 1.0]


def test_a_constant_added_to_the_scores_changes_nothing():
    moved = guided_log_probs(POLICY, SCORES + 5.0, 2.0)
    torch.testing.assert_close(moved, guided_log_probs(POLICY, SCORES, 2.0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("uniform", "drawn"), [(0.0, 0), (0.49, 0), (0.51, 1), (0.79, 1), (0.81, 3), (1 - 2**-53, 3)])
def test_sampling_inverts_the_distribution(uniform, drawn):
    log_probs = torch.tensor([[0.5, 0.3, 0.0, 0.2, 0.0]]).log()
    assert sample(log_probs, torch.tensor([uniform], dtype=torch.float64)).tolist() == [drawn]


def test_a_leading_impossible_candidate_is_never_drawn():
    assert sample(torch.tensor([[0.0, 1.0]]).log(), torch.zeros(1, dtype=torch.float64)).tolist() == [1]


@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(beta=1.5, top_k=10),
        SamplingParams(beta=-2.0, top_k=10, top_p=0.8, temperature=0.6),
        SamplingParams(beta=3.0, top_k=10, greedy=True),
        SamplingParams(beta=3.0, top_k=10, clip=True, temperature=0.0),
        SamplingParams(beta=2.0, top_k=10, entropy_gate=3.6),
        SamplingParams(beta=1e30, temperature=1e-30),
    ],
    ids=["sampled", "nucleus", "greedy", "clipped", "gated", "extreme"],
)
def test_few_candidates_are_drawn_on_the_host_as_tensors_are(params, scored, monkeypatch):
    torch.manual_seed(0)
    log_probs = torch.log_softmax(torch.randn(200, 50), -1)
    allowed = log_probs.masked_fill(torch.rand(200, 50) < 0.3, -torch.inf)  # as processors leave them
    candidates = propose_candidates(log_probs, allowed, params)
    scores = torch.randn(candidates.ids.shape) if scored else None
    uniforms = torch.rand(200, dtype=torch.float64).tolist()
    few = draw(candidates, scores, uniforms, params)
    monkeypatch.setattr(sampling, "_FEW", 0)
    many = draw(candidates, scores, uniforms, params)
    assert few.finite
    assert few.tokens.tolist() == many.tokens.tolist()
    assert few.choice.tolist() == many.choice.tolist()
    torch.testing.assert_close(torch.tensor(few.figures), torch.tensor(many.figures), atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(few.guided, many.guided, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("where", ["scores", "policy"])
def test_few_candidates_that_are_not_finite_are_left_to_the_tensors(where):
    candidates = propose_candidates(POLICY, POLICY if where == "scores" else POLICY * math.nan, SamplingParams(top_k=2))
    scores = SCORES[:, [2, 0]] if where == "scores" else torch.zeros(2, 2)
    draws = draw(candidates, scores, [0.5, 0.5], SamplingParams(top_k=2))
    assert not draws.finite
    assert [bool(row[6 if where == "scores" else 4]) for row in draws.figures] == [where == "scores", False]
