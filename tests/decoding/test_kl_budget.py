"""A KL budget: beta by the step, the distribution by enumeration, and what is reported."""

import contextlib
import math

import pytest
import torch

from helpers.naive import make_guided, next_log_probs, reward, score, tiny_scorer
from helpers.scorer_kinds import every_scorer
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.decoding.sampling import beta_within_kl, guided_log_probs, step_kl
from rgtg.errors import UsageError

PROMPT = [0, 9, 14, 30]
PROMPTS = [PROMPT, [0, 44], [0, 7, 7, 30, 31, 3, 52]]


def kl_at(beta, log_probs, reference, scores):
    """Σ π̃·log(π̃/π) of one row, from the definition."""
    energy = [p + beta * r for p, r in zip(log_probs, scores, strict=True)]
    top = max(energy)
    total = top + math.log(sum(math.exp(e - top) for e in energy))
    return sum(math.exp(e - total) * (e - total - q) for e, q in zip(energy, reference, strict=True))


def bisected(log_probs, reference, scores, allowed):
    """The same β, by halving an interval."""
    most = 60 / (max(scores) - min(scores))
    if kl_at(most, log_probs, reference, scores) <= allowed:
        return most
    low, high = 0.0, most
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if kl_at(middle, log_probs, reference, scores) <= allowed else (low, middle)
    return low


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("k", [2, 10, 300])
def test_beta_takes_the_kl_that_is_allowed(k, scale):
    generator = torch.Generator().manual_seed(k)
    whole = torch.log_softmax(3 * torch.randn(6, k + 5, generator=generator), -1)
    log_probs, scores = whole[:, :k], scale * torch.randn(6, k, generator=generator)
    cut = step_kl(torch.log_softmax(log_probs.double(), -1), log_probs)
    torch.testing.assert_close(cut, -log_probs.double().logsumexp(-1))  # what the cut takes at β = 0
    allowed = cut + torch.tensor([1e-4, 0.01, 0.2, 1.0, 5.0, 100.0], dtype=torch.float64)
    betas = beta_within_kl(log_probs, log_probs, scores, allowed)
    found = step_kl(guided_log_probs(log_probs, scores, betas), log_probs)
    for i in range(6):
        row = [log_probs[i].double().tolist(), log_probs[i].double().tolist(), scores[i].double().tolist()]
        exact = bisected(*row, float(allowed[i]))
        assert float(betas[i, 0]) == pytest.approx(exact, rel=3e-3)
        assert float(found[i]) == pytest.approx(kl_at(exact, *row), rel=2e-3, abs=1e-6)


def test_no_beta_where_nothing_is_allowed_or_nothing_can_be_steered():
    log_probs = torch.tensor([[0.5, 0.25, 0.25]]).log().repeat(4, 1)
    scores = torch.tensor([[1.0, 2.0, 3.0], [2.0, 2.0, 2.0], [1.0, 2.0, 3.0], [1.0, 2.0, 9e9]])
    log_probs[3, 2] = -math.inf  # excluded, whatever its score
    allowed = torch.tensor([-0.5, 1.0, 0.0, 50.0])
    betas = beta_within_kl(log_probs, log_probs, scores, allowed)[:, 0].tolist()
    assert betas[:3] == [0.0, 0.0, 0.0]
    assert betas[3] == pytest.approx(60.0)


def budgeted(guided, prompt, tokens, *, budget, length, top_k, betas=None):
    """Guided log-probabilities of each step along a text, and the sum of their KL, by definition."""
    spent, steps = 0.0, []
    for i in range(len(tokens)):
        text = [*prompt, *tokens[:i]]
        whole = next_log_probs(guided.policy.model, text)
        kept = whole.argsort(descending=True)[:top_k].tolist()
        log_probs = [float(whole[t]) for t in kept]
        weights = betas or [1.0]
        scores = [
            sum(b * score(guided, s, [*text, t]) for b, s in zip(weights, guided.scorers, strict=True)) for t in kept
        ]
        allowed = budget * (i + 1) / length - spent
        none = kl_at(0.0, log_probs, log_probs, scores)
        beta = bisected(log_probs, log_probs, scores, allowed) if none < allowed else 0.0
        spent += kl_at(beta, log_probs, log_probs, scores)
        energy = torch.tensor([p + beta * r for p, r in zip(log_probs, scores, strict=True)], dtype=torch.float64)
        steps.append(dict(zip(kept, torch.log_softmax(energy, 0).tolist(), strict=True)))
    return steps, spent


@pytest.mark.parametrize(("budget", "top_k"), [(2.0, 4), (6.0, 12), (9.0, None)])
def test_every_step_is_what_the_definition_gives(budget, top_k):
    guided = make_guided("pargs", top_k=top_k)
    settings = {"max_new_tokens": 6, "kl_budget": budget}
    cut = pytest.warns(UserWarning, match="beyond their share") if top_k == 4 else contextlib.nullcontext()
    with cut:
        done = guided.generate_ids(PROMPTS, trace=True, seed=[1, 2, 3], **settings)
    for prompt, completion in zip(PROMPTS, done, strict=True):
        steps, spent = budgeted(guided, prompt, completion.token_ids, budget=budget, length=6, top_k=top_k)
        for step, exact in zip(completion.trace, steps, strict=True):
            for token, mine in zip(step.candidate_ids, step.guided_log_probs, strict=True):
                assert math.exp(mine) == pytest.approx(math.exp(exact[token]), abs=3e-3)
        assert completion.expected_kl_nats == pytest.approx(spent, rel=2e-3)


@pytest.mark.parametrize("kind", ["separate", "state", "vocab", "adapter", "text"])
def test_the_budget_is_kept_with_every_kind_of_scorer(kind):
    """All tokens are candidates, so that nothing is cut; the budget is spent evenly, and each row for itself."""
    policy, scorers = every_scorer()
    guided = GuidedPolicy(policy, {kind: scorers[kind]}, top_k=None)
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "kl_budget": 5.0}
    done = guided.generate_ids(PROMPTS, seed=[1, 2, 3], **settings)
    alone = guided.generate_ids(PROMPTS[1:2], seed=[2], **settings)
    for completion in done:
        # without EOS among the candidates, the policy is cut a little: the budget includes it
        assert completion.expected_kl_nats == pytest.approx(5.0, rel=0.02)
    assert done[1].token_ids == alone[0].token_ids
    assert done[1].expected_kl_nats == pytest.approx(alone[0].expected_kl_nats, abs=1e-3)


def test_the_expected_kl_is_the_mean_of_what_is_sampled():
    guided = make_guided("pargs", top_k=None)
    done = guided.generate_ids([PROMPT] * 600, seed=list(range(600)), batch_size=300, max_new_tokens=5, kl_budget=3.0)
    sampled = torch.tensor([c.guided_log_prob - c.policy_log_prob for c in done])
    expected = torch.tensor([c.expected_kl_nats for c in done])
    error = float((sampled - expected).std()) / math.sqrt(600)
    assert abs(float((sampled - expected).mean())) < 4 * error
    assert float(expected.std()) < 0.3 * float(sampled.std())  # less noise: that is why it is reported
    share = torch.tensor([len(c.token_ids) / 5 for c in done])
    assert float((expected - 3.0 * share).abs().max()) < 0.3  # texts that end early have spent their share


def test_closed_gates_are_caught_up_with():
    guided = make_guided("pargs", top_k=None)
    done = guided.generate_ids(
        PROMPTS, seed=[1, 2, 3], max_new_tokens=12, min_new_tokens=12, kl_budget=4.0, entropy_gate=3.2, trace=True
    )
    assert any(step.scores is None for c in done for step in c.trace), "a gate is closed"
    for completion in done:
        if completion.trace[-1].scores is not None:
            assert completion.expected_kl_nats == pytest.approx(4.0, rel=0.05)


def test_betas_of_several_scorers_are_their_proportions():
    scorers = [tiny_scorer(), tiny_scorer(seed=5)]
    one = GuidedPolicy(make_guided("pargs").policy, scorers, beta=[1.0, -2.0])
    ten = GuidedPolicy(one.policy, scorers, beta=[10.0, -20.0])
    settings = {"max_new_tokens": 6, "kl_budget": 9.0, "seed": [1, 2, 3], "trace": True}
    for a, b, prompt in zip(
        one.generate_ids(PROMPTS, **settings), ten.generate_ids(PROMPTS, **settings), PROMPTS, strict=True
    ):
        assert a.token_ids == b.token_ids
        steps, _ = budgeted(one, prompt, a.token_ids, budget=9.0, length=6, top_k=10, betas=[1.0, -2.0])
        for step, exact in zip(a.trace, steps, strict=True):
            for token, mine in zip(step.candidate_ids, step.guided_log_probs, strict=True):
                assert math.exp(mine) == pytest.approx(math.exp(exact[token]), abs=3e-3)


def test_without_a_budget_nothing_is_reported():
    (done,) = make_guided("pargs").generate_ids([PROMPT], max_new_tokens=2)
    assert done.expected_kl_nats is None
    assert done.score == pytest.approx(reward(make_guided("pargs").scorer.model, [*PROMPT, *done.token_ids]), abs=1e-4)


REFUSED = [
    ("pargs", {"beta": 2.0, "kl_budget": 5.0}, "give either beta or kl_budget"),
    ("pargs", {"temperature": 0.7, "kl_budget": 5.0}, "kl_budget needs temperature 1, not 0.7"),
    ("pargs", {"kl_budget": 0.0}, "kl_budget"),
    ("pargs-greedy", {"kl_budget": 5.0}, "kl_budget applies to pargs, args-sample"),
    ("farma", {"kl_budget": 5.0}, "kl_budget applies to pargs, args-sample"),
    ("smc", {"kl_budget": 5.0}, "kl_budget applies to pargs, args-sample"),
    ("policy", {"kl_budget": 5.0}, "kl_budget applies to pargs, args-sample"),
]


@pytest.mark.parametrize(("method", "settings", "message"), REFUSED)
def test_settings_that_a_budget_would_overrule_are_refused(method, settings, message):
    with pytest.raises(UsageError, match=message):
        make_guided(method).generate_ids([PROMPT], **settings)


def test_drafts_are_refused():
    with pytest.raises(UsageError, match="does not speculate"):
        make_guided("pargs", draft="policy").generate_ids([PROMPT], kl_budget=3.0)
