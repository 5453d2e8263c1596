"""The loop: distributions by enumeration, requests alone and in company, with and without token trees."""

import itertools
import math
from collections import defaultdict

import pytest
import torch

from helpers.batches import prefill_chunked
from helpers.naive import (
    accepted_among,
    beam_search,
    best_among,
    completion_distribution,
    make_guided,
    particle_distribution,
    reward,
    segmented_distribution,
    step_distribution,
    winner_distribution,
)
from helpers.scorer_kinds import every_scorer
from rgtg.decoding.engine.batch import Batch
from rgtg.decoding.engine.prefix_cache import PrefixCache
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.decoding.methods import METHODS
from rgtg.decoding.runners import policy_runner, scorer_runner
from rgtg.decoding.runners.factory import RunnerFactory

PROMPT = [0, 9, 14, 30]
PROMPTS = [[0, 5, 9, 12, 33, 40, 8, 21, 17, 60], [0, 44], [0, 7, 7, 30, 31, 3, 52], [0, 11, 25]]
SETTINGS = {
    "plain": {"temperature": 1.0, "top_k": 3, "top_p": 1.0},
    "cool": {"temperature": 0.7, "top_k": 3, "top_p": 1.0},
    "greedy": {"temperature": 0.0, "top_k": 3, "top_p": 1.0},
    "nucleus": {"temperature": 1.0, "top_k": 6, "top_p": 0.8},
    # a token that becomes a candidate, one that is favoured among them, and the likeliest one after the prompt, banned
    "biased": {"temperature": 1.0, "top_k": 3, "top_p": 1.0, "logit_bias": {21: 6.0, 40: 2.5, 52: -100.0}},
}


# What a method is given beyond that, where it has settings of its own.
OWN = {
    "best-of-n": {"n": 2},
    "cd-blockwise": {"n": 2, "segment_length": 1},
    "cards": {"beta": 1.5, "reward_threshold": 0.5, "segment_length": 2, "min_segment": 1, "entropy_threshold": 2.0,
              "retries": 1},
    "smc": {"n": 3},
    "beam": {"n": 3},
    "vfd": {"value_threshold": 0.2},
}  # fmt: skip


def exact_settings(method, named):
    """What the definition is given: greedy methods are T = 0, and beta is 1.5 where a scorer steers each token."""
    row = METHODS[method]
    beta = 1.5 if row.scorer and "beta" in row.takes and row.scores_tokens else 0.0
    exact = SETTINGS[named] | {"beta": beta} | ({} if row.random else {"temperature": 0.0})
    if row.rule == "filter":
        exact["threshold"] = OWN[method]["value_threshold"]
    return exact | {"top_k": None, "sums": exact["top_k"]} if row.candidates == "sum" else exact


def build(method):
    row = METHODS[method]
    return make_guided(method, **{"beta": 1.5} if row.scorer and "beta" in row.takes and row.scores_tokens else {})


def call_settings(method, named):
    settings = SETTINGS[named] | OWN.get(method, {})
    if not METHODS[method].random:
        del settings["temperature"]
    return settings


def exact_distribution(method, guided, prompt, length, exact):
    """Every completion's probability, by enumeration."""
    own = OWN.get(method, {})
    if method == "best-of-n":
        return winner_distribution(guided, prompt, length, own["n"], **exact)
    if method == "beam":
        return {beam_search(guided, prompt, length, own["n"], **exact)[0]: 1.0}
    if method == "smc":
        return particle_distribution(guided, prompt, length, own["n"], **exact)
    if method == "cd-blockwise":
        return segmented_distribution(
            guided, prompt, length, lambda masses, rewards, _: best_among(masses, rewards, own["n"]),
            length=own["segment_length"], **exact,
        )  # fmt: skip
    if method == "cards":
        first = (reward(guided.scorer.model, prompt) + own["reward_threshold"]) / 2

        def choose(masses, rewards, begun):
            shares = {t: (begun + len(t)) / length for t in masses}
            rising = {t: first + share * (own["reward_threshold"] - first) for t, share in shares.items()}
            thresholds = {t: min(r, own["reward_threshold"]) for t, r in rising.items()}
            return accepted_among(masses, rewards, thresholds, own["beta"], own["retries"])

        return segmented_distribution(
            guided, prompt, length, choose, length=own["segment_length"], unsure=own["entropy_threshold"], **exact
        )
    return completion_distribution(guided, prompt, length, **exact)


CASES = [
    (method, named)
    for method in METHODS
    for named in SETTINGS
    if METHODS[method].random or named in ("plain", "nucleus", "biased")
    if METHODS[method].rule != "resample" or named != "greedy"
]


@pytest.mark.thorough
@pytest.mark.parametrize(("method", "named"), CASES)
def test_the_distribution_of_completions_is_the_enumerated_one(method, named):
    guided = build(method)
    length = 3 if METHODS[method].unit == "segment" and named == "plain" else 2
    expected = exact_distribution(method, guided, PROMPT, length, exact_settings(method, named))
    assert sum(expected.values()) == pytest.approx(1)
    expected = {tokens: p for tokens, p in expected.items() if p > 0}
    draws = 20 if len(expected) == 1 else 1000 if METHODS[method].unit == "completion" else 3000
    done = guided.generate_ids(
        [PROMPT] * draws, seed=list(range(draws)), batch_size=draws, max_new_tokens=length,
        **call_settings(method, named),
    )  # fmt: skip
    counts = dict.fromkeys(expected, 0)
    for completion in done:
        counts[tuple(completion.token_ids)] += 1  # a completion that cannot occur is a KeyError
    require_frequencies(counts, expected, draws)


def require_frequencies(counts, expected, draws):
    """Pearson's chi-square with the rare outcomes pooled, at a bound of about five standard deviations."""
    common = [c for c in expected if expected[c] * draws >= 5]
    pooled = [(counts[c], expected[c]) for c in common]
    seen, mass = sum(n for n, _ in pooled), sum(p for _, p in pooled)
    if (1 - mass) * draws >= 1:
        pooled.append((draws - seen, 1 - mass))
    chi_square = sum((n - draws * p) ** 2 / (draws * p) for n, p in pooled)
    freedom = max(len(pooled) - 1, 1)
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom) + 5


@pytest.mark.parametrize("named", [*SETTINGS, "all"])
@pytest.mark.parametrize("method", METHODS)
def test_every_traced_log_probability_is_the_enumerated_one(method, named):
    row = METHODS[method]
    if not row.random and named in ("cool", "greedy"):
        pytest.skip("a greedy method has no temperature")
    if row.rule == "resample" and named == "greedy":
        pytest.skip("particles are drawn at random")
    guided = build(method)
    if named == "all":
        given = OWN.get(method, {}) | {"top_k": None}
        exact = exact_settings(method, "plain") | {"top_k": None} | ({"sums": None} if row.candidates == "sum" else {})
    else:
        given, exact = call_settings(method, named), exact_settings(method, named)
    prompts = PROMPTS[:1] if named == "all" else PROMPTS
    for completion, prompt in zip(
        guided.generate_ids(prompts, max_new_tokens=3, trace=True, **given), prompts, strict=True
    ):
        ids, total = list(prompt), 0.0
        for step in completion.trace:
            # a token of the best text is certain, whatever the step's own best is
            distribution = {step.token_id: 0.0} if row.rule == "beam" else step_distribution(guided, ids, **exact)
            traced = dict(zip(step.candidate_ids, step.guided_log_probs, strict=True))
            assert {t for t, p in traced.items() if p > -math.inf} == set(distribution)
            for token, log_prob in distribution.items():
                assert traced[token] == pytest.approx(log_prob, abs=1e-5, rel=1e-5)
            assert (step.scores is None) == (exact["beta"] == 0 and "threshold" not in exact)
            total += distribution[step.token_id]
            ids.append(step.token_id)
        assert completion.guided_log_prob == pytest.approx(total, abs=1e-4)
        assert completion.token_ids == ids[len(prompt) :]


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["llama", "mistral", "opt"])
@pytest.mark.parametrize("method", METHODS)
def test_a_request_depends_on_neither_neighbours_nor_order(method, family):
    guided = make_guided(method, family, top_k=8)
    seeds = [3, 1, 4, 1]

    def run(order, size):
        done = guided.generate_ids(
            [PROMPTS[i] for i in order], seed=[seeds[i] for i in order], batch_size=size, max_new_tokens=12,
            **OWN.get(method, {}),
        )  # fmt: skip
        return {i: completion.token_ids for i, completion in zip(order, done, strict=True)}

    alone = run([0, 1, 2, 3], 1)
    assert run([0, 1, 2, 3], 4) == alone
    assert run([3, 1, 0, 2], 4) == alone
    assert run([2, 0, 1, 3], 2) == alone
    assert {1: run([1], 8)[1]} == {1: alone[1]}


# Requests of every kind of scorer: method, scorers, settings.
COMPANY = [
    ("policy", (), {}),
    ("policy", (), {"temperature": 0.0, "stop": ["e"]}),
    ("policy", (), {"top_k": None, "repetition_penalty": 1.3}),
    ("pargs", ("separate",), {"beta": 2.0, "temperature": 0.8}),
    ("pargs", ("separate",), {"beta": 0.5, "top_k": 4, "max_new_tokens": 5}),
    ("args", ("other",), {"beta": 1.5, "top_k": 7}),
    ("pargs", ("other",), {"beta": 1.5, "entropy_gate": 3.3}),
    ("pargs", ("separate", "other"), {"beta": [1.0, -2.0], "top_p": 0.8}),
    ("pargs", ("separate", "other"), {"beta": [2.0, 1.0], "entropy_gate": 3.35}),
    ("pargs", ("vocab",), {"beta": 1.0}),
    ("pargs", ("vocab", "separate"), {"beta": [1.0, 0.7], "no_repeat_ngram_size": 2}),
    ("farma", ("vocabulary scorer",), {"beta": 0.7}),
    ("genarm", ("vocabulary scorer",), {"beta": 0.7}),
    ("pargs", ("text",), {"beta": 2.0, "top_k": 4}),
    ("pargs-greedy", ("text",), {"beta": 2.0, "top_k": 5}),
    ("pargs", ("text", "separate"), {"beta": [1.0, 1.0], "entropy_gate": 3.3}),
    ("pargs", ("encoder",), {"beta": 2.0, "top_k": 5}),
    ("pargs", ("state",), {"beta": 1.0}),
    ("pargs", ("state",), {"beta": 2.0, "top_k": 3, "entropy_gate": 3.3}),
    ("pargs", ("state", "vocab", "other"), {"beta": [0.5, 0.5, 1.0]}),
    ("pargs", ("state", "text"), {"beta": [0.5, 1.0]}),
    ("pargs", ("adapter",), {"beta": 1.0, "top_k": 8}),
    ("args-sample", ("adapter", "other"), {"beta": [0.3, 0.3], "top_k": 5}),
    ("pargs", ("adapter", "state"), {"beta": [0.3, 0.3], "entropy_gate": 3.3}),
]


def require_same(request, alone):
    """A request has ended like the completion that it gets alone."""
    assert request.error is None
    done = request.to_completion()
    assert done.token_ids == alone.token_ids
    assert (done.text, done.finish_reason) == (alone.text, alone.finish_reason)
    for name in ("policy_log_prob", "guided_log_prob", "candidates_log_prob", "score"):
        assert getattr(done, name) == pytest.approx(getattr(alone, name), abs=1e-4), name
    for name in ("seed", "scorer_calls", "policy_calls", "candidates", "retokenised", "unscored", "method"):
        assert getattr(done, name) == getattr(alone, name), name
    for mine, theirs in zip(done.trace, alone.trace, strict=True):
        assert mine.candidate_ids == theirs.candidate_ids
        for name in ("policy_log_probs", "scores", "guided_log_probs"):
            assert getattr(mine, name) == pytest.approx(getattr(theirs, name), abs=1e-3), name
        assert (mine.scores_of_each is None) == (theirs.scores_of_each is None)


@pytest.mark.parametrize(("keep_order", "budget"), [(True, 0), (False, 2**24)])
def test_requests_that_join_and_leave_at_any_step_draw_what_they_draw_alone(keep_order, budget):
    """Every kind of scorer and several sampling parameters; some share a prompt, and two of each batch are removed."""
    policy, scorers = every_scorer()
    factory = RunnerFactory(policy, scorers)
    waiting, alone = defaultdict(list), {}
    for i, (method, names, settings) in enumerate(COMPANY):
        chosen = {name: scorers[name] for name in names}
        guided = GuidedPolicy(policy, chosen or None, method=method, beta=settings.get("beta"))
        settings = {"max_new_tokens": 9} | settings
        prompt = PROMPTS[i % len(PROMPTS)]
        same = [guided.make_requests([prompt], [""], [None], [seed], settings, trace=True)[0] for seed in (i, i + 99)]
        runners = factory.token_runners(names)
        waiting[runners.key].append((runners, same if i % 3 == 0 else same[:1]))
        for request in waiting[runners.key][-1][1]:
            (alone[request],) = guided.generate_ids([prompt], seed=[request.seed], trace=True, **settings)
    assert {key.fused for key in waiting} == {None, "state", "adapter"}
    cache, removed = PrefixCache(budget), []
    for arriving in waiting.values():
        batch = Batch(**arriving[0][0].options, keep_order=keep_order, prefix_cache=cache if budget else None)
        for step in itertools.count():
            # every other step, somebody joins
            if arriving and (step % 2 == 0 or not batch.requests):
                runners, requests = arriving.pop(0)
                batch.add(requests, prefill_chunked(runners, requests[0], chunk=4, cache=cache if budget else None))
            if step in (2, 3):  # right after another one has joined, and between two steps
                removed.append(batch.requests[step - 2])
                batch.remove(removed[-1:])
            if not batch.requests and not arriving:
                break
            before = list(batch.requests)
            left = batch.step()
            assert set(before) - set(batch.requests) == set(left)
        assert batch.nbytes == 0
    assert (cache.hits > 0) == (budget > 0)
    assert any(0 < one.scorer_calls < one.policy_calls for one in alone.values()), "a gate opens and closes"
    for request in alone:
        if request not in removed:
            require_same(request, alone[request])
    for request in removed:
        assert request.finish_reason is None
        assert request.token_ids == alone[request].token_ids[: len(request.token_ids)]


@pytest.mark.parametrize("method", METHODS)
def test_one_seed_for_all_gives_each_prompt_its_own(method):
    guided, own = make_guided(method), OWN.get(method, {})
    there = guided.generate_ids(PROMPTS, seed=7, max_new_tokens=6, **own)
    back = guided.generate_ids(PROMPTS[::-1], seed=7, max_new_tokens=6, **own)
    assert [c.token_ids for c in there] == [c.token_ids for c in back][::-1]
    twice = guided.generate_ids([PROMPT, PROMPT], seed=7, max_new_tokens=16, **own)
    assert twice[0].seed != twice[1].seed
    if METHODS[method].random:
        assert twice[0].token_ids != twice[1].token_ids


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_token_trees_and_whole_texts_give_the_same(method, family):
    fast, slow = (
        make_guided(method, family, top_k=6, token_tree=tree).generate_ids(
            PROMPTS, max_new_tokens=8, seed=2, **OWN.get(method, {})
        )
        for tree in (True, False)
    )
    for a, b in zip(fast, slow, strict=True):
        assert (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason)
        assert a.policy_log_prob == pytest.approx(b.policy_log_prob, abs=1e-4)
        assert (a.score is None) == (b.score is None)
        assert a.score is None or a.score == pytest.approx(b.score, abs=1e-4)


def test_more_candidates_than_one_pass_takes_are_read_in_several(monkeypatch):
    guided = make_guided("pargs", beta=1.5, top_k=None)
    whole = guided.generate_ids(PROMPTS, max_new_tokens=5, seed=1)
    for module in (policy_runner, scorer_runner):
        monkeypatch.setattr(module, "MAX_WIDTH", 7)
    parts = guided.generate_ids(PROMPTS, max_new_tokens=5, seed=1)
    assert [c.token_ids for c in whole] == [c.token_ids for c in parts]


def test_beta_zero_is_the_policy():
    policy = make_guided("policy", top_k=5).generate_ids(PROMPTS, max_new_tokens=8, seed=3)
    guided = make_guided("pargs", top_k=5, beta=0.0).generate_ids(PROMPTS, max_new_tokens=8, seed=3)
    assert [c.token_ids for c in policy] == [c.token_ids for c in guided]


def test_models_that_require_gradients_are_run_without():
    for method in ("pargs", "best-of-n"):
        guided = make_guided(method)
        guided.policy.model.requires_grad_(True)
        guided.scorer.model.requires_grad_(True)
        done = guided.generate_ids(PROMPTS, max_new_tokens=4)
        assert torch.isfinite(torch.tensor([c.policy_log_prob for c in done])).all()
