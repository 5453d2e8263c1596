"""The optimum of each objective, for a few completions that are enumerated and a table of scores by prefix.

Tokens are 0 (the end), 1 and 2; a completion ends with 0 or at three tokens. The policy and the rewards are random.
"""

import itertools

import pytest
import torch

from rgtg.losses import (
    autoregressive_pair_losses,
    bellman_losses,
    cumulative_mse_losses,
    farma_consistency_losses,
    fudge_losses,
    last_score,
    mean_of_counted,
    prefix_bradley_terry_pair_losses,
    prefixes_differ,
    tcrm_pair_losses,
)

VOCABULARY, LENGTH = 3, 3


def completions(prefix=()):
    if len(prefix) == LENGTH or (prefix and prefix[-1] == 0):
        return [prefix]
    return [whole for token in range(VOCABULARY) for whole in completions((*prefix, token))]


TEXTS = completions()
PREFIXES = sorted({text[:i] for text in TEXTS for i in range(1, len(text) + 1)})
ROW = {prefix: i for i, prefix in enumerate(PREFIXES)}
IDS = torch.tensor([[*text, *[0] * (LENGTH - len(text))] for text in TEXTS])
MASK = torch.tensor([[i < len(text) for i in range(LENGTH)] for text in TEXTS])
ROWS = torch.tensor([[ROW[text[: min(i, len(text))]] for i in range(1, LENGTH + 1)] for text in TEXTS])  # (texts, T)

_draw = torch.Generator().manual_seed(5)
STEP = {prefix: torch.rand(VOCABULARY, generator=_draw).add(0.2) for prefix in [(), *PREFIXES]}
REWARD = torch.randn(len(TEXTS), generator=_draw)


def probability(text):
    steps = [STEP[text[:i]] / STEP[text[:i]].sum() for i in range(len(text))]
    return float(torch.stack([step[token] for step, token in zip(steps, text, strict=True)]).prod())


POLICY = torch.tensor([probability(text) for text in TEXTS])


def expected(values, weights, prefix):
    """Weighted mean of a value over the completions that begin with a prefix."""
    opens = torch.tensor([text[: len(prefix)] == prefix for text in TEXTS])
    return float((values * weights)[opens].sum() / weights[opens].sum())


def fit(table, loss, steps=500, rate=0.1):
    """Adam with a decaying learning rate on the exact expectation of a loss."""
    optimizer = torch.optim.Adam([table], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
        schedule.step()
    return table.detach()


def new_table(*shape):
    return torch.zeros(*(shape or (len(PREFIXES),)), requires_grad=True)


def test_the_probabilities_of_all_completions_add_up_to_one():
    assert len(TEXTS) == 1 + 2 + 12
    assert POLICY.sum().item() == pytest.approx(1.0)


def test_fudge_finds_the_value_function():
    table = new_table()
    found = fit(table, lambda _: POLICY @ fudge_losses(table[ROWS], REWARD, MASK))
    assert found.tolist() == pytest.approx([expected(REWARD, POLICY, p) for p in PREFIXES], abs=2e-3)


def children(prefix):
    return [] if len(prefix) == LENGTH or prefix[-1] == 0 else [(*prefix, token) for token in range(VOCABULARY)]


CHILDREN = torch.tensor([[ROW[c] for c in children(p)] or [0] * VOCABULARY for p in PREFIXES])
STEPS = torch.stack([STEP[p] / STEP[p].sum() for p in PREFIXES])


def backed_up(table, backup):
    """Exact next values (texts, T) of a table: the policy's mean, or the maximum."""
    kin = table[CHILDREN]  # (prefixes, V)
    return (kin.amax(-1) if backup == "max" else (kin * STEPS).sum(-1))[ROWS]


@pytest.mark.parametrize("backup", ["sampled", "policy", "max"])
def test_bellman_targets_find_the_value_of_their_backup(backup):
    table = new_table()

    def loss(_):
        ahead = None if backup == "sampled" else backed_up(table, backup)
        # with the exact sum, the completions need not come from the policy
        weights = POLICY if backup == "sampled" else torch.full_like(POLICY, 1 / len(POLICY))
        return weights @ bellman_losses(table[ROWS], REWARD, MASK, ahead)

    best = {p: max(float(r) for r, text in zip(REWARD, TEXTS, strict=True) if text[: len(p)] == p) for p in PREFIXES}
    target = [best[p] if backup == "max" else expected(REWARD, POLICY, p) for p in PREFIXES]
    assert fit(table, loss).tolist() == pytest.approx(target, abs=5e-3)


def test_cumulative_mse_finds_the_weighted_mean_label():
    table, labels = new_table(), REWARD.sigmoid()
    found = fit(table, lambda _: POLICY @ cumulative_mse_losses(table[ROWS], labels, MASK))
    lengths = MASK.sum(-1)
    weights = POLICY / (lengths * (lengths + 1) / 2)
    assert found.tolist() == pytest.approx([expected(labels, weights, p) for p in PREFIXES], abs=2e-3)


def every_pair(reward):
    """All ordered pairs of different completions, weighted by how often they are drawn and judged so."""
    pairs = [(a, b) for a, b in itertools.product(range(len(TEXTS)), repeat=2) if a != b]
    won, lost = (torch.tensor(side) for side in zip(*pairs, strict=True))
    return won, lost, POLICY[won] * POLICY[lost] * (reward[won] - reward[lost]).sigmoid()


def centred(values):
    return values - values.mean()


@pytest.mark.parametrize("weighting", ["uniform", "linear", "inverse"])
def test_position_weights_do_not_change_the_optimum_of_a_table(weighting):
    # the first token decides the preference, so that the preferences of every prefix follow Bradley–Terry
    said = torch.tensor([[0.0, 1.5, -1.0][text[0]] for text in TEXTS])
    won, lost, weight = every_pair(said)
    table = new_table()
    differs = prefixes_differ(IDS[won], IDS[lost], MASK[won], MASK[lost])

    def loss(_):
        losses, counted = prefix_bradley_terry_pair_losses(
            table[ROWS[won]], table[ROWS[lost]], MASK[won], MASK[lost], differs, weighting=weighting
        )
        assert counted.all()
        return weight @ losses

    found = fit(table, loss)
    for i in (
        1,
        2,
        3,
    ):  # only differences within one length are determined; a completion keeps its last score after its end
        held = sorted({text[: min(i, len(text))] for text in TEXTS})
        values = torch.stack([found[ROW[p]] for p in held])
        target = torch.tensor([[0.0, 1.5, -1.0][p[0]] for p in held])
        torch.testing.assert_close(centred(values), centred(target), atol=0.02, rtol=0.0)


def test_full_bt_and_coherence_find_the_expected_reward():
    won, lost, weight = every_pair(REWARD)
    times = torch.zeros(len(TEXTS)).index_add(0, won, weight).index_add(0, lost, weight)  # how often each occurs
    shares = times / (MASK.sum(-1) - 1).clamp(min=1)
    for weights in (
        {"lookahead_weight": 1.0, "smoothness_weight": 0.0},
        {"lookahead_weight": 0.0, "smoothness_weight": 1.0},
    ):
        table = new_table()

        def loss(_, table=table, weights=weights):
            sides = table[ROWS[won]], table[ROWS[lost]]
            return 10 * weight @ tcrm_pair_losses(*sides, MASK[won], MASK[lost], **weights)

        found = fit(table, loss, steps=1000)
        whole = torch.stack([found[ROW[text]] for text in TEXTS])
        torch.testing.assert_close(centred(whole), centred(REWARD), atol=0.02, rtol=0.0)
        target = [expected(whole, shares, p) for p in PREFIXES]
        assert found.tolist() == pytest.approx(target, abs=0.02)


def test_farma_values_a_prefix_by_its_best_continuation():
    won, lost, weight = every_pair(REWARD)
    contexts = [(), *[p for p in PREFIXES if children(p)]]
    place = {context: i for i, context in enumerate(contexts)}
    table = new_table(len(contexts), VOCABULARY)  # Q(h)[v]
    read = torch.tensor([place[p[:-1]] * VOCABULARY + p[-1] for p in PREFIXES])
    after = torch.tensor([place.get(p, 0) for p in PREFIXES])

    def loss(step):
        values, best = table.flatten()[read], table.amax(-1)[after]
        if step % 2:
            return 10 * weight @ farma_consistency_losses(values[ROWS[won]], best[ROWS[won]], MASK[won])
        ends = last_score(values[ROWS], MASK)
        return 10 * weight @ torch.nn.functional.softplus(ends[lost] - ends[won])

    values = fit(table, loss, steps=1500).flatten()[read]
    whole = torch.stack([values[ROW[text]] for text in TEXTS])
    torch.testing.assert_close(centred(whole), centred(REWARD), atol=0.03, rtol=0.0)
    best = [max(float(v) for v, text in zip(whole, TEXTS, strict=True) if text[: len(p)] == p) for p in PREFIXES]
    assert values.tolist() == pytest.approx(best, abs=0.03)


def test_autoregressive_log_probabilities_differ_by_the_reward():
    beta_r = 0.5
    won, lost, weight = every_pair(REWARD)
    contexts = [(), *[p for p in PREFIXES if children(p)]]
    place = {context: i for i, context in enumerate(contexts)}
    table = new_table(len(contexts), VOCABULARY)
    read = torch.tensor([place[p[:-1]] * VOCABULARY + p[-1] for p in PREFIXES])

    def texts():
        steps = table.log_softmax(-1).flatten()[read][ROWS]
        return torch.where(MASK, steps, 0.0).sum(-1)

    def loss(_):
        log_probs = texts()
        return 10 * weight @ autoregressive_pair_losses(log_probs[won], log_probs[lost], beta_r)

    fit(table, loss, steps=1000)
    log_probs = texts().detach()
    torch.testing.assert_close(centred(log_probs), centred(REWARD / beta_r), atol=0.03, rtol=0.0)
    assert log_probs.exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_the_mean_counts_only_pairs_that_differ():
    assert mean_of_counted(torch.tensor([2.0, 9.0]), torch.tensor([True, False])).item() == 2.0
