"""Objectives other than Bradley–Terry: hand-worked numbers, and masks that exclude padding."""

import math

import pytest
import torch

from rgtg.losses import (
    agreement,
    autoregressive_pair_losses,
    bellman_losses,
    coherence_losses,
    cumulative_mse_losses,
    farma_consistency_losses,
    fudge_losses,
    prefix_bradley_terry_pair_losses,
    sample_positions,
    tcrm_pair_losses,
    token_log_probs,
)

NAN = math.nan


def mask(*rows):
    return torch.tensor(rows, dtype=torch.bool)


def softplus(x):
    return math.log1p(math.exp(x))


CHOSEN, REJECTED = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[1.0, 0.0, -1.0]])
BOTH = mask([1, 1, 0]), mask([1, 1, 1])
DIFFERS = mask([0, 1, 1])  # margins there: 2 and (held) 3


@pytest.mark.parametrize(
    ("weighting", "weights"),
    [
        ("uniform", (1, 1)),
        ("linear", (2, 3)),
        ("inverse", (1 / 2, 1 / 3)),
    ],
)
def test_positions_are_weighted(weighting, weights):
    losses, counted = prefix_bradley_terry_pair_losses(CHOSEN, REJECTED, *BOTH, DIFFERS, weighting=weighting)
    expected = (weights[0] * softplus(-2) + weights[1] * softplus(-3)) / sum(weights)
    assert losses.tolist() == pytest.approx([expected])
    assert counted.tolist() == [True]


def test_pair_weights_scale_the_loss_of_each_position():
    weights = agreement(torch.tensor([[9.0, 0.0, -1.0]]))
    losses, _ = prefix_bradley_terry_pair_losses(
        CHOSEN, REJECTED, *BOTH, DIFFERS, weighting="linear", pair_weights=weights
    )
    doubted = 1 / (1 + math.e)
    assert losses.tolist() == pytest.approx([(2 * 0.5 * softplus(-2) + 3 * doubted * softplus(-3)) / 5])


@pytest.mark.parametrize("weighting", ["uniform", "linear", "inverse"])
def test_sampled_prefixes_give_the_same_loss_on_average(weighting):
    torch.manual_seed(0)
    chosen, rejected = torch.randn(2, 5), torch.randn(2, 5)
    masks = mask([1, 1, 1, 1, 1], [1, 1, 1, 0, 0]), mask([1, 1, 1, 0, 0], [1, 1, 1, 1, 0])
    differs = mask([0, 1, 1, 1, 1], [1, 1, 1, 1, 1])
    arguments = chosen, rejected, *masks, differs
    generator = torch.Generator().manual_seed(1)
    inside = differs & (masks[0] | masks[1])
    drawn = torch.stack(
        [
            prefix_bradley_terry_pair_losses(
                *arguments, weighting=weighting, sampled=sample_positions(inside, 2, generator)
            )[0]
            for _ in range(4000)
        ]
    )
    whole, _ = prefix_bradley_terry_pair_losses(*arguments, weighting=weighting)
    assert drawn.std(0).min() > 0.01
    torch.testing.assert_close(drawn.mean(0), whole, atol=0.03, rtol=0.0)


def test_sampling_is_without_replacement_and_never_outside():
    inside = mask([1, 0, 1, 1, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0])
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(3, 5)
    for _ in range(300):
        drawn = sample_positions(inside, 2, generator)
        assert drawn.sum(-1).tolist() == [2, 1, 0]
        counts += drawn
    assert not counts[~inside].any()
    assert counts[0, [0, 2, 3]].tolist() == pytest.approx([200] * 3, abs=40)


VALUES = torch.tensor([[1.0, 2.0, 50.0], [0.0, 1.0, 3.0]])
ROLLOUTS = mask([1, 1, 0], [1, 1, 1])
REWARDS = torch.tensor([4.0, -1.0])


def test_fudge_by_hand():
    assert fudge_losses(VALUES, REWARDS, ROLLOUTS).tolist() == [9.0 + 4.0, 1.0 + 4.0 + 16.0]


def test_bellman_by_hand_and_without_a_gradient_into_the_target():
    values = VALUES.clone().requires_grad_(True)
    losses = bellman_losses(values, REWARDS, ROLLOUTS)
    assert losses.tolist() == [1.0 + 4.0, 1.0 + 4.0 + 16.0]
    losses.sum().backward()
    # 2·(V_i − target_i), and nothing from where V_i is the target of i − 1
    assert values.grad.tolist() == [[-2.0, -4.0, 0.0], [-2.0, -4.0, 8.0]]
    exact = bellman_losses(VALUES, REWARDS, ROLLOUTS, torch.tensor([[3.0, NAN, NAN], [1.0, 5.0, NAN]]))
    assert exact.tolist() == [4.0 + 4.0, 1.0 + 16.0 + 16.0]


def test_cumulative_mse_by_hand():
    losses = cumulative_mse_losses(VALUES, torch.tensor([1.0, 0.0]), ROLLOUTS)
    assert losses.tolist() == pytest.approx([(1 * 0 + 2 * 1) / 3, (1 * 0 + 2 * 1 + 3 * 9) / 6])


def test_farma_constraint_by_hand_and_without_a_gradient_into_the_maximum():
    values = torch.tensor([[1.0, 4.0, 9.0], [2.0, 7.0, 7.0]], requires_grad=True)
    best = torch.tensor([[3.0, 2.0, NAN], [NAN, 0.0, 0.0]], requires_grad=True)
    losses = farma_consistency_losses(values, best, mask([1, 1, 1], [1, 0, 0]))
    assert losses.tolist() == [(0.5 * 4 + 0.5 * 4) / 2, 0.0]  # one token: nothing comes before the last
    losses.sum().backward()
    assert best.grad is None
    assert values.grad.nan_to_num().tolist() == [[-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]


def test_autoregressive_by_hand():
    losses = autoregressive_pair_losses(torch.tensor([-3.0, 0.0]), torch.tensor([-5.0, 0.0]), beta_r=0.5)
    assert losses.tolist() == pytest.approx([softplus(-1.0), math.log(2)])


def test_token_log_probs_are_a_log_softmax_in_fp32():
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 3, 7).bfloat16() * 9, torch.randint(7, (2, 3))
    expected = logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(token_log_probs(logits, ids), expected, atol=1e-6, rtol=1e-6)


def test_tcrm_by_hand_and_without_a_gradient_into_what_follows():
    chosen = torch.tensor([[0.0, 1.0, 3.0]], requires_grad=True)
    rejected = torch.tensor([[2.0, 5.0, 5.0]])
    masks = mask([1, 1, 1]), mask([1, 0, 0])
    weights = {"lookahead_weight": 0.5, "smoothness_weight": 2.0}
    loss = tcrm_pair_losses(chosen, rejected, *masks, **weights)
    # final scores 3 and 2; look-ahead 9 and 4, smoothness 1 and 4 on the chosen side; the rejected one has one token
    assert loss.item() == pytest.approx(softplus(-1.0) + 0.5 * (0.5 * (9 + 4) + 2.0 * (1 + 4)) / 2)
    coherence_losses(chosen, masks[0], **weights).sum().backward()
    assert chosen.grad.tolist() == [[(0.5 * 2 * -3 + 2.0 * 2 * -1) / 2, (0.5 * 2 * -2 + 2.0 * 2 * -2) / 2, 0.0]]


@pytest.mark.parametrize(
    "loss",
    [
        lambda s, m: fudge_losses(s, REWARDS, m),
        lambda s, m: bellman_losses(s, REWARDS, m),
        lambda s, m: cumulative_mse_losses(s, REWARDS, m),
        lambda s, m: farma_consistency_losses(s, s, m),
        lambda s, m: tcrm_pair_losses(s, s.flip(0), m, m.flip(0), lookahead_weight=1.0, smoothness_weight=1.0),
    ],
)
def test_columns_after_the_end_are_not_used(loss):
    scores = torch.tensor([[1.0, 2.0, 7.0, 8.0], [0.0, 1.0, 3.0, 5.0]])
    inside = mask([1, 1, 0, 0], [1, 1, 1, 0])
    other = torch.where(inside, scores, -99.0)
    short = scores[:, :3], inside[:, :3]
    assert torch.equal(loss(scores, inside), loss(other, inside))
    assert torch.equal(loss(scores, inside), loss(*short))
    assert loss(scores.bfloat16(), inside).dtype == torch.float32
