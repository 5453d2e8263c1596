import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rgtg.evaluation.audit import ranking_metrics
from rgtg.evaluation.metrics import bootstrap_interval

POLICY = torch.tensor([[0.5, 0.3, 0.2]]).log()
ROWS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=6)


def columns(pairs):
    a, b = zip(*pairs, strict=True)
    return torch.tensor([a]).double(), torch.tensor([b]).double()


def test_spearman_with_a_tie_by_hand():
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: Σ dx·dy = 4.5, Σ dx² = 4.5, Σ dy² = 5
    found = ranking_metrics.spearman(torch.tensor([[0.0, 1, 1, 2]]), torch.tensor([[10.0, 20, 30, 40]]))
    assert found.item() == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_kendall_with_a_tie_by_hand():
    # six pairs: five concordant, one tied in the first list: 5 / √(5 · 6)
    found = ranking_metrics.kendall(torch.tensor([[0.0, 1, 1, 2]]), torch.tensor([[10.0, 20, 30, 40]]))
    assert found.item() == pytest.approx(5 / math.sqrt(30))


@given(ROWS)
def test_kendall_counts_pairs(pairs):
    a, b = columns(pairs)
    both = list(itertools.combinations(pairs, 2))
    score = sum(((x[0] > y[0]) - (x[0] < y[0])) * ((x[1] > y[1]) - (x[1] < y[1])) for x, y in both)
    untied = [sum(x[i] != y[i] for x, y in both) for i in (0, 1)]
    found = ranking_metrics.kendall(a, b).item()
    assert found == pytest.approx(score / math.sqrt(math.prod(untied))) if math.prod(untied) else math.isnan(found)


@given(ROWS)
def test_ranks_are_those_of_sorting(pairs):
    a, _ = columns(pairs)
    values = sorted(a[0].tolist())
    expected = [sum(i + 1 for i, v in enumerate(values) if v == x) / values.count(x) for x in a[0].tolist()]
    assert ranking_metrics.mid_ranks(a)[0].tolist() == pytest.approx(expected)


def test_rows_of_ties_have_no_correlation():
    flat, steep = torch.zeros(1, 3), torch.tensor([[1.0, 2, 3]])
    for measure in (ranking_metrics.spearman, ranking_metrics.kendall):
        assert measure(flat, steep).isnan().all()
        assert measure(steep, flat).isnan().all()


def test_the_argmax_is_the_limit_of_guidance():
    scores = torch.tensor([[0.0, 1.0, 1.0]])
    limit = ranking_metrics.guided_weights(POLICY, scores, 1e6)
    assert torch.allclose(ranking_metrics.argmax_weights(POLICY, scores), limit, atol=1e-6)


def test_kl_by_hand():
    half = torch.tensor([[0.5, 0.5]]).log()
    assert ranking_metrics.mean_kl(half, torch.tensor([[0.75, 0.25]])) == pytest.approx(
        0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    )


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_beta_meets_its_kl_at_any_scale_of_the_scores(scale):
    scores = scale * torch.tensor([[0.3, -1.0, 2.0]])
    beta = ranking_metrics.beta_for_kl(POLICY, scores, 0.1)
    assert ranking_metrics.mean_kl(POLICY, ranking_metrics.guided_weights(POLICY, scores, beta)) == pytest.approx(
        0.1, abs=1e-6
    )


def test_beta_if_no_beta_reaches_the_kl():
    assert ranking_metrics.beta_for_kl(POLICY, torch.ones(1, 3), 0.1) == 0.0
    scores = torch.tensor([[1.0, 0.0, 0.0]])  # even the argmax is only ln 2 away
    beta = ranking_metrics.beta_for_kl(POLICY, scores, 5.0)
    assert ranking_metrics.mean_kl(POLICY, ranking_metrics.guided_weights(POLICY, scores, beta)) == pytest.approx(
        math.log(2)
    )


def test_the_best_candidate_is_chosen_on_one_half_and_read_on_the_other():
    # halves (3, 0) and (1, 2): the first picks candidate 0, worth 1 there; the second picks 1, worth 0 here
    rewards = torch.tensor([[[3.0, 1.0], [0.0, 2.0]]])
    assert ranking_metrics.split_best(rewards).item() == 0.5
    assert ranking_metrics.split_best(rewards[..., :1]).isnan().all()


def test_tied_candidates_give_their_mean():
    rewards = torch.tensor([[[1.0, 5.0], [1.0, 7.0]]])
    # the first half ties: (5 + 7) / 2; the second picks candidate 1, worth 1
    assert ranking_metrics.split_best(rewards).item() == 3.5


def test_the_true_best_is_between_the_two_estimates():
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([0.0, 0.2, 0.4]).double()
    rewards = values[None, :, None] + torch.randn(4000, 3, 4, generator=generator, dtype=torch.float64)
    assert ranking_metrics.split_best(rewards).mean() + 0.05 < 0.4 < rewards.mean(-1).amax(-1).mean() - 0.05


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e9])
def test_equal_rewards_in_another_order_tie(scale):
    rewards = scale * torch.tensor([[[0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.3, 0.2, 0.1001]]]).double()
    means = rewards.mean(-1)
    found = ranking_metrics.with_ties(means)
    assert found[0, 0] == found[0, 1] != found[0, 2]
    assert torch.allclose(found, means, rtol=1e-9, atol=0)
    assert torch.equal(ranking_metrics.with_ties(0 * means), torch.zeros(1, 3).double())


def test_moments_by_hand():
    # π = ½, ½; s = 0, 2; Q̂ = 1, 3: covariance 1, variances 1 and 1, less ¼ of the summed squared errors 1² and 1²
    half = torch.tensor([[0.5, 0.5]]).log()
    rewards = torch.tensor([[[0.0, 2.0], [2.0, 4.0]]])
    found = ranking_metrics.moments(half, torch.tensor([[0.0, 2.0]]), rewards)
    assert found[0].tolist() == pytest.approx([1.0, 1.0, 0.5])
    assert ranking_metrics.moments(half, torch.tensor([[0.0, 2.0]]), rewards[..., :1])[0, 2].isnan()


def test_moments_are_unbiased_unlike_plain_variances():
    generator = torch.Generator().manual_seed(1)
    values = torch.tensor([0.0, 0.3, 0.6]).double()
    noise = torch.randn(20000, 3, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 2.0, 0.5])[:, None]
    log_probs = POLICY.expand(20000, 3)
    found = ranking_metrics.moments(log_probs, values.expand(20000, 3), values[None, :, None] + noise).mean(0)
    policy = POLICY[0].double().exp()
    true = float((policy * values**2).sum() - (policy * values).sum() ** 2)
    assert found.tolist() == pytest.approx([true, true, true], abs=0.015)
    plain = (policy * noise.mean(-1) ** 2).sum(-1).mean()
    assert plain > 5 * true  # what the correction took off was far larger than what it left


def test_correlation_is_one_with_itself_and_zero_without_spread():
    assert ranking_metrics.correlation(torch.tensor([2.0, 4.0, 1.0])).item() == 1.0
    assert ranking_metrics.correlation(torch.tensor([0.0, 0.0, 1.0])).item() == 0.0
    assert ranking_metrics.correlation(torch.tensor([1.0, 1.0, -0.1])).isnan()


def test_the_interval_of_a_mean_equals_the_plain_bootstrap():
    values, clusters = [1.0, 2.0, 3.0, 5.0, 8.0], [0, 0, 1, 2, 2]
    mine = ranking_metrics.clustered_interval(torch.tensor(values)[:, None], lambda m: m[..., 0], clusters, seed=3)
    plain = bootstrap_interval(values, clusters=clusters, seed=3)
    assert mine.model_dump() == pytest.approx(plain.model_dump())


def test_a_ratio_of_means_resamples_whole_clusters():
    rows = torch.tensor([[1.0, 2.0], [3.0, 2.0], [8.0, 4.0], [math.nan, 1.0]])
    found = ranking_metrics.clustered_interval(rows, ranking_metrics.ratio, ["a", "a", "b", "c"])
    assert (found.mean, found.n) == (12 / 8, 2)
    assert (found.low, found.high) == (1.0, 2.0)  # all of a, all of b


def test_no_rows_give_an_empty_interval():
    found = ranking_metrics.clustered_interval(torch.tensor([[math.nan]]), lambda m: m[..., 0], [0])
    assert found.n == 0
    assert math.isnan(found.mean)
