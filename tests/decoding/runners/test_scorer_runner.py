"""Several scorers with one beta each, and steering only where the policy is uncertain, equal the definition."""

import itertools

import pytest
import torch

from helpers.batches import make_request, run, start
from helpers.naive import entropy_of, make_guided, next_log_probs, step_distribution, tiny_scorer
from helpers.scorer_kinds import kinds
from helpers.tiny_models import tiny_policy, tiny_tokenizer
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.errors import UsageError
from rgtg.models.loading.policy import Policy

PROMPTS = [[0, 5, 9, 12, 33, 40, 8, 21, 17, 60], [0, 44], [0, 7, 7, 30, 31, 3, 52]]


def two_scorers(**settings):
    return GuidedPolicy(Policy(tiny_policy(), tiny_tokenizer()), [tiny_scorer(), tiny_scorer(seed=5)], **settings)


PAIRS = [*itertools.combinations(["separate", "state", "vocab", "adapter", "vocabulary scorer"], 2)]


@torch.no_grad()
@pytest.mark.parametrize("gate", [None, 3.35])
@pytest.mark.parametrize("names", [*PAIRS, ("separate", "state", "vocabulary scorer")])
def test_the_score_is_the_weighted_sum_of_all_scorers(names, gate):
    policy, every = kinds()
    betas = [1.5, -0.5, 0.25][: len(names)]
    guided = GuidedPolicy(policy, [every[name][0] for name in names], beta=betas, top_k=4)
    steps = set()
    for prompt, done in zip(
        PROMPTS, guided.generate_ids(PROMPTS, max_new_tokens=5, trace=True, entropy_gate=gate), strict=True
    ):
        ids = list(prompt)
        for step in done.trace:
            steered = gate is None or entropy_of(next_log_probs(policy.model, ids)) > gate
            steps.add(steered)
            if not steered:
                assert step.scores is None
                assert step.scores_of_each is None
            else:
                naive = [[float(every[name][1]([*ids, t])) for t in step.candidate_ids] for name in names]
                for mine, theirs in zip(step.scores_of_each, naive, strict=True):
                    assert mine == pytest.approx(theirs, abs=3e-5, rel=3e-5)
                total = [sum(b * r for b, r in zip(betas, column, strict=True)) for column in zip(*naive, strict=True)]
                assert step.scores == pytest.approx(total, abs=1e-4, rel=1e-4)
            ids.append(step.token_id)
    assert gate is None or steps == {True, False}


@pytest.mark.parametrize("gate", [3.2, 3.45])
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_gated_steps_are_unguided_and_the_others_guided(gate, temperature):
    guided = GuidedPolicy(
        Policy(tiny_policy(), tiny_tokenizer()), [tiny_scorer(), tiny_scorer(seed=5)], beta=[1.5, -1.0]
    )
    done = guided.generate_ids(PROMPTS, max_new_tokens=6, trace=True, entropy_gate=gate, temperature=temperature)
    for prompt, completion in zip(PROMPTS, done, strict=True):
        ids = list(prompt)
        for step in completion.trace:
            exact = step_distribution(guided, ids, beta=[1.5, -1.0], top_k=10, gate=gate, temperature=temperature)
            traced = dict(zip(step.candidate_ids, step.guided_log_probs, strict=True))
            for token, log_prob in exact.items():
                assert traced[token] == pytest.approx(log_prob, abs=1e-4, rel=1e-4)
            ids.append(step.token_id)
        assert completion.scorer_calls == sum(step.scores is not None for step in completion.trace)


@pytest.mark.parametrize("method", ["pargs", "rad", "farma", "genarm"])
def test_a_closed_gate_leaves_the_policy_and_an_open_one_changes_nothing(method):
    closed = make_guided(method, beta=2.0, top_k=6).generate_ids(PROMPTS, max_new_tokens=8, seed=3, entropy_gate=99.0)
    policy = make_guided("policy", top_k=6).generate_ids(PROMPTS, max_new_tokens=8, seed=3)
    assert [c.token_ids for c in closed] == [c.token_ids for c in policy]
    assert all(c.scorer_calls == 0 and c.score is None for c in closed)
    plain, open_ = (
        make_guided(method, beta=2.0, top_k=6).generate_ids(PROMPTS, max_new_tokens=8, seed=3, **gate)
        for gate in ({}, {"entropy_gate": 0.0})
    )
    assert [c.token_ids for c in plain] == [c.token_ids for c in open_]


def test_a_gate_saves_scorer_passes():
    policy = Policy(tiny_policy(), tiny_tokenizer())
    request = make_request(policy, PROMPTS[0], ["scorer"], [1.0], top_k=5, max_new_tokens=20, entropy_gate=3.35)
    request.stopping.eos_ids = set()
    batch = start(policy, {"scorer": tiny_scorer()}, [request])
    runner = batch.separate["scorer"].runner
    run(batch)
    assert 0 < request.scorer_calls < 20
    assert runner.calls == 1 + request.scorer_calls  # the prompt, and each step that was steered


def test_one_scorer_in_two_halves_is_the_scorer():
    policy, scorer = Policy(tiny_policy(), tiny_tokenizer()), tiny_scorer()
    halves = GuidedPolicy(policy, [scorer, tiny_scorer()], beta=[0.5, 1.5]).generate_ids(PROMPTS, max_new_tokens=8)
    whole = GuidedPolicy(policy, scorer, beta=2.0).generate_ids(PROMPTS, max_new_tokens=8)
    assert [c.token_ids for c in halves] == [c.token_ids for c in whole]


REFUSED = [
    ({"beta": [1.0]}, "1 betas for 2 scorers"),
    ({"beta": 2.0}, "1 betas for 2 scorers"),
    ({}, "1 betas for 2 scorers"),
    ({"beta": [1.0, 2.0], "draft": "policy"}, "speculative decoding takes one scorer"),
    ({"beta": [1.0, 2.0], "overlap": True}, "overlap takes one scorer"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_settings_that_several_scorers_do_not_take_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        two_scorers(**settings)


def test_an_entropy_gate_with_drafts_is_refused():
    guided = make_guided("pargs", draft="policy")
    with pytest.raises(UsageError, match="leave entropy_gate out"):
        guided.generate_ids(PROMPTS, entropy_gate=1.0)
