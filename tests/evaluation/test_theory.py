"""The four exhibits: a world by hand, an independently computed optimum, and the claims in random worlds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rgtg.errors import UsageError
from rgtg.evaluation.theory import (
    World,
    distance_to_rlhf,
    equal_loss_opposite_prefixes,
    exhibits,
    functions_of_the_prefix,
    guided_steps,
    mean_scores,
    prefix_bt_scores,
    random_scores,
    random_world,
    ratio_of_rlhf_policies,
    rlhf_log_probs,
    sequence_log_probs,
    soft_value_scores,
)

# Two tokens, two steps: π(a) = 1/4; after a the policy is fair, after b it writes a with probability 1/5.
HAND = World(
    [torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5], [0.2, 0.8]]).log()],
    torch.tensor([math.log(4), 0.0, math.log(2), 0.0]),
)

worlds = st.builds(random_world, st.integers(2, 4), st.integers(2, 3), st.integers(0, 2**31))
betas = st.floats(0.1, 4.0)
few = settings(max_examples=25, deadline=None)


def test_figures_of_a_small_world_by_hand():
    policy = sequence_log_probs(HAND.log_policy).exp()
    torch.testing.assert_close(policy, torch.tensor([0.125, 0.125, 0.15, 0.6]))
    # β = 1: weights ½, ⅛, 0.3, 0.6, whose sum is 1.525
    torch.testing.assert_close(rlhf_log_probs(HAND, 1.0).exp(), torch.tensor([0.5, 0.125, 0.3, 0.6]) / 1.525)
    first, whole = mean_scores(HAND)
    torch.testing.assert_close(first, torch.tensor([math.log(4) / 2, math.log(2) / 5]))
    assert torch.equal(whole, HAND.reward)
    torch.testing.assert_close(soft_value_scores(HAND, 1.0)[0], torch.tensor([2.5, 1.2]).log())


def test_soft_value_guidance_is_rlhf_by_hand():
    steps = guided_steps(HAND, soft_value_scores(HAND, 1.0), 1.0)
    # first token a: ¼·2.5 against ¾·1.2
    torch.testing.assert_close(steps[0].exp(), torch.tensor([[0.625, 0.9]]) / 1.525)
    torch.testing.assert_close(steps[1].exp(), torch.tensor([[0.8, 0.2], [1 / 3, 2 / 3]]))


def test_equal_full_loss_and_opposite_prefixes_by_hand():
    found = equal_loss_opposite_prefixes(HAND, beta=1.0)
    # strict preferences: aa over ab, ba, bb; ba over ab, bb (margins ln 4, ln 2, ln 4; ln 2, ln 2)
    full = (2 * math.log1p(1 / 4) + 3 * math.log1p(1 / 2)) / 5
    assert found.full_loss == pytest.approx((full, full))
    assert (found.opposite, found.prefix_comparisons) == (1, 1)
    assert found.prefix_loss[0] < found.prefix_loss[1]
    # greedy: A weighs a ¼·2 against b ¾·2^{1/5}; B ¼/2 against ¾/2^{1/5}: both b, then 0.8 against 0.4
    assert found.greedy_tokens == ([1, 1], [1, 1])
    assert found.best_reward == pytest.approx(math.log(4))


def test_decoding_with_the_two_scorers_differs():
    found = equal_loss_opposite_prefixes(random_world(3, 3, 0), beta=2.0)
    a, b = found.sampled_reward
    assert a > 2.4 > 1.5 > b
    assert found.greedy_reward[0] == found.best_reward > found.greedy_reward[1]


@few
@given(worlds, betas)
def test_the_full_sequence_loss_ignores_prefix_scores(world, beta):
    found = equal_loss_opposite_prefixes(world, beta)
    assert found.full_loss[0] == found.full_loss[1]
    assert found.opposite == found.prefix_comparisons > 0


@few
@given(worlds, betas, st.integers(0, 2**31))
def test_the_guided_policy_is_a_ratio_of_rlhf_policies(world, beta, seed):
    assert ratio_of_rlhf_policies(world, random_scores(world, seed), beta).largest < 1e-5


@few
@given(worlds, betas, st.integers(0, 2**31))
def test_a_function_of_the_prefix_changes_nothing(world, beta, seed):
    assert functions_of_the_prefix(world, random_scores(world, seed), beta, seed + 1).largest < 1e-4


@few
@given(worlds, betas)
def test_soft_value_guidance_is_rlhf(world, beta):
    guided = sequence_log_probs(guided_steps(world, soft_value_scores(world, beta), beta))
    torch.testing.assert_close(guided.exp(), rlhf_log_probs(world, beta).exp(), atol=1e-5, rtol=0)


def newton_prefix_scores(world, length):
    """The minimum at one prefix length in float64, by Newton's method on the win probabilities given the prefixes."""
    policy, reward = sequence_log_probs(world.log_policy).double().exp(), world.reward.double()
    vocabulary, total, count = world.vocabulary, world.length, len(reward)
    prefixes = vocabulary**length
    weight, won = torch.zeros(2, prefixes, prefixes, dtype=torch.float64)
    for y in range(count):
        for z in range(count):
            a, b = y // vocabulary ** (total - length), z // vocabulary ** (total - length)
            if a != b:
                alike = sum(y // vocabulary ** (total - k) == z // vocabulary ** (total - k) for k in range(1, total))
                w = policy[y] * policy[z] / (total - alike)  # the loss is a mean over the prefixes that differ
                weight[a, b] += w
                won[a, b] += w * torch.sigmoid(reward[y] - reward[z])
    scores = torch.zeros(prefixes, dtype=torch.float64)
    for _ in range(30):
        p = torch.sigmoid(scores[:, None] - scores)
        off = -weight * p * (1 - p)
        hessian = off - off.sum(1).diag() + off.abs().mean()  # the last term fixes the free constant
        scores = scores - torch.linalg.solve(hessian, (weight * p - won).sum(1))
    return scores - scores.mean()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_minimum_of_the_prefix_loss_agrees_with_newton(seed):
    world = random_world(3, 3, seed)
    found = prefix_bt_scores(world)
    for length in (1, 2):
        expected = newton_prefix_scores(world, length).float()
        torch.testing.assert_close(found[length - 1], expected, atol=0.01, rtol=0)


def test_prefix_training_comes_much_nearer_to_rlhf_than_arbitrary_prefix_scores():
    for seed in range(5):
        policy, arbitrary, prefix_bt, value, soft = distance_to_rlhf(random_world(3, 3, seed), beta=2.0, seed=seed)
        assert abs(soft.kl_nats) < 1e-5
        assert 0 < prefix_bt.kl_nats < 0.5 * min(policy.kl_nats, arbitrary.kl_nats)
        assert 0 < value.kl_nats < 0.5 * min(policy.kl_nats, arbitrary.kl_nats)


@pytest.mark.parametrize(
    "unfit", [{"vocabulary": 1}, {"length": 1}, {"vocabulary": 7}, {"beta": 0.0}, {"beta": math.inf}]
)
def test_worlds_that_cannot_be_enumerated_are_errors(unfit):
    with pytest.raises(UsageError, match="expected"):
        exhibits(**unfit)
