"""Bradley–Terry losses: hand-worked numbers, and one forward pass equals one pass per prefix."""

import math

import pytest
import torch

from helpers.tiny_models import CONFIGS, tiny_reward_model
from rgtg.losses import (
    bradley_terry_loss,
    completion_window,
    fit_length_offset,
    hold_last,
    prefix_bradley_terry_loss,
    prefix_bradley_terry_pair_losses,
    prefixes_differ,
    with_length,
)
from rgtg.tokenization.padding import pad_right
from rgtg.training.objectives import align_pairs
from rgtg.training.trainers.reward import score_every_position

PROMPTS = [[5, 6, 7], [8], [9, 10]]
CHOSEN = [[20, 21, 22, 2], [30, 31, 2], [40, 41, 42, 43, 44, 2]]
REJECTED = [[20, 23, 24, 25, 26, 2], [32, 2], [40, 41, 45, 2]]


def mask(*rows):
    return torch.tensor(rows, dtype=torch.bool)


def softplus(x):
    return math.log1p(math.exp(x))


def test_bradley_terry_by_hand():
    loss = bradley_terry_loss(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 3.0]))
    assert loss.item() == pytest.approx((softplus(-1.0) + softplus(3.0)) / 2)


def test_prefix_loss_by_hand():
    chosen = torch.tensor([[1.0, 2.0, 99.0], [0.5, 1.0, 1.5]])
    rejected = torch.tensor([[1.0, 0.0, -1.0], [0.0, 99.0, 99.0]])
    chosen_mask, rejected_mask = mask([1, 1, 0], [1, 1, 1]), mask([1, 1, 1], [1, 0, 0])
    differs = mask([0, 1, 1], [1, 1, 1])
    loss = prefix_bradley_terry_loss(chosen, rejected, chosen_mask, rejected_mask, differs)
    # pair 1: position 1 identical; margins 2 − 0 and (held) 2 − (−1). Pair 2: 0.5 − 0, 1 − 0 and 1.5 − 0, held.
    first = (softplus(-2) + softplus(-3)) / 2
    second = (softplus(-0.5) + softplus(-1) + softplus(-1.5)) / 3
    assert loss.item() == pytest.approx((first + second) / 2)


def test_identical_pair_contributes_nothing():
    scores = torch.randn(2, 3, requires_grad=True)
    same = mask([1, 1, 1], [1, 1, 1])
    differs = mask([0, 0, 0], [0, 0, 1])
    loss = prefix_bradley_terry_loss(scores, scores.detach() - 1, same, same, differs)
    assert loss.item() == pytest.approx(softplus(-1))
    alone = prefix_bradley_terry_loss(scores, scores.detach(), same, same, torch.zeros_like(same))
    alone.backward()
    assert alone.item() == 0
    assert torch.equal(scores.grad, torch.zeros_like(scores))


def test_half_precision_scores_are_compared_in_fp32():
    chosen, rejected = torch.tensor([1000.0]).bfloat16(), torch.tensor([999.0]).bfloat16()
    assert bradley_terry_loss(chosen, rejected).dtype == torch.float32


def test_large_margins_stay_finite():
    loss = bradley_terry_loss(torch.tensor([-1e4]), torch.tensor([1e4]))
    assert loss.item() == 2e4


def test_hold_last_never_reads_padding():
    scores = torch.tensor([[1.0, math.nan], [3.0, 4.0]])
    assert hold_last(scores, mask([1, 0], [1, 1])).tolist() == [[1.0, 1.0], [3.0, 4.0]]


def test_prefixes_differ_ignores_padding_and_sees_an_end():
    ids = torch.tensor([[1, 2, 0], [1, 2, 9]]), torch.tensor([[1, 2, 9], [1, 2, 0]])
    assert prefixes_differ(*ids, mask([1, 1, 0], [1, 1, 0]), mask([1, 1, 0], [1, 1, 1])).tolist() == [
        [False, False, False],
        [False, False, True],
    ]


@pytest.mark.parametrize("side", ["left", "right"])
def test_completion_window_on_either_side(side):
    rows = [[7, 7, 1, 2], [7, 3]]
    ids, attention = padded(rows, side)
    columns, inside = completion_window(attention, torch.tensor([2, 1]))
    assert ids.gather(-1, columns)[inside].tolist() == [1, 2, 3]
    assert inside.tolist() == [[True, True], [True, False]]


def padded(rows, side):
    if side == "right":
        return pad_right(rows, 0, "cpu")
    ids, attention = pad_right([row[::-1] for row in rows], 0, "cpu")
    return ids.flip(-1), attention.flip(-1)


def one_pass(model, side):
    rows = [prompt + end for ends in (CHOSEN, REJECTED) for prompt, end in zip(PROMPTS, ends, strict=True)]
    ids, attention = padded(rows, side)
    every, _ = score_every_position(model, model, ids, attention)
    scores = align_pairs(every, ids, attention, torch.tensor([len(p) for p in PROMPTS]))
    return prefix_bradley_terry_loss(
        scores.chosen, scores.rejected, scores.chosen_mask, scores.rejected_mask, scores.differs
    )


def row_per_prefix(model):
    """The published method: each prefix of each completion is a row of the stock model."""
    losses = []
    for prompt, chosen, rejected in zip(PROMPTS, CHOSEN, REJECTED, strict=True):
        terms = []
        for i in range(1, max(len(chosen), len(rejected)) + 1):
            if chosen[:i] != rejected[:i]:
                better, worse = (model(torch.tensor([prompt + side[:i]])).logits[0, 0] for side in (chosen, rejected))
                terms.append(-torch.nn.functional.logsigmoid(better - worse))
        losses.append(torch.stack(terms).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_one_pass_equals_row_per_prefix(family):
    torch.set_num_threads(1)
    model = tiny_reward_model(family).requires_grad_(True)
    with torch.no_grad():  # scores of order one, because all gradients agree at saturated margins
        model.score.weight.mul_(0.1)
    slow = row_per_prefix(model)
    slow.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for side in ("left", "right"):
        model.zero_grad(set_to_none=True)
        fast = one_pass(model, side)
        fast.backward()
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
        for name, parameter in model.named_parameters():
            if name in expected:
                torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4)


def test_the_length_offset_is_the_maximum_of_the_likelihood():
    longer = [4, -1, 7, 3, -2, 5, 0]
    offset = fit_length_offset(longer)
    typical = sum(map(abs, longer)) / len(longer)

    def likelihood(gamma):
        return sum(-math.log1p(math.exp(-gamma * one)) for one in [*longer, typical, -typical])

    assert all(likelihood(offset) >= likelihood(offset + step) for step in (-0.05, -1e-3, 1e-3, 0.05))
    assert fit_length_offset([3, 3, 3]) < 2, "finite, also where the longer side always wins"
    assert fit_length_offset([-one for one in longer]) == pytest.approx(-offset)
    assert fit_length_offset([0, 0]) == 0.0


def test_an_offset_of_length_ends_with_each_completion():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    shifted = with_length(torch.zeros(2, 3), mask, 0.5)
    assert shifted.tolist() == [[0.5, 1.0, 1.0], [0.5, 1.0, 1.5]]
    # scores that hold nothing but −γ·i explain nothing: every margin is 0 and every loss is ln 2
    losses, _ = prefix_bradley_terry_pair_losses(
        with_length(-0.5 * mask[:1].float().cumsum(-1), mask[:1], 0.5),
        with_length(-0.5 * mask[1:].float().cumsum(-1), mask[1:], 0.5),
        mask[:1], mask[1:], torch.tensor([[True, True, True]]),
    )  # fmt: skip
    assert losses.tolist() == pytest.approx([math.log(2)])
