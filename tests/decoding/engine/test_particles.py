"""Sequential Monte Carlo: its target, its normaliser, its costs, and what happens when particles end or fail."""

import math

import pytest
import torch

from helpers.naive import completion_distribution, make_guided, particle_distribution, reward
from helpers.scorer_kinds import every_scorer
from rgtg.decoding.engine.batch import Batch
from rgtg.decoding.engine.particles import ParticleParams, Particles, require_alive
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.decoding.request import Request
from rgtg.decoding.runners.kv_cache import TreeCache
from rgtg.decoding.runners.scorer_runner import SeparateScorerRunner
from rgtg.decoding.sampling import effective_sample_size, systematic_resample
from rgtg.errors import NonFiniteError, UsageError

PROMPT = [0, 9, 14, 30]
PROMPTS = [[0, 9, 14, 30], [0, 44], [0, 7, 7, 30, 31, 3, 52]]
# EOS is likely here: completions end at different times.
EARLY = {"logit_bias": {2: 4.0}}


def target_of(guided, prompt, length, beta, **settings):
    """π(y)·exp(β·r(y))/Z of every completion, and log Z."""
    drawn = completion_distribution(guided, prompt, length, **settings)
    mass = {y: p * math.exp(beta * reward(guided.scorer.model, [*prompt, *y])) for y, p in drawn.items()}
    total = sum(mass.values())
    return {y: m / total for y, m in mass.items()}, math.log(total)


def distance(p, q):
    """Total variation."""
    return sum(abs(p.get(y, 0.0) - q.get(y, 0.0)) for y in p | q) / 2


def test_by_hand_the_effective_number_and_the_ancestors():
    assert effective_sample_size(torch.zeros(8)) == pytest.approx(8)
    assert effective_sample_size(torch.tensor([0.0, -math.inf])) == pytest.approx(1)
    halves = torch.tensor([0.5, 0.5, 1.0], dtype=torch.float64).log()
    assert effective_sample_size(halves + 700) == pytest.approx(4 / 1.5)  # no overflow
    half = torch.tensor([0.5, 0.25, 0.25, 0.0]).log()
    assert systematic_resample(half, 0.5).tolist() == [0, 1, 2, 0]  # survivors keep their places
    assert systematic_resample(torch.tensor([-math.inf, 0.0]), 0.0).tolist() == [1, 1]
    assert systematic_resample(torch.zeros(5), 0.999).tolist() == [0, 1, 2, 3, 4]


def test_a_particle_has_as_many_copies_as_its_weight_says_on_average():
    weights = torch.tensor([0.4, 0.05, 0.3, 0.25])
    counts = torch.zeros(4)
    for i in range(1000):
        drawn = torch.bincount(systematic_resample(weights.log(), (i + 0.5) / 1000), minlength=4)
        assert bool((drawn >= (4 * weights).floor()).all())
        assert bool((drawn <= (4 * weights).ceil()).all())
        counts += drawn
    torch.testing.assert_close(counts / 4000, weights, atol=2e-3, rtol=0)


@pytest.mark.thorough
def test_the_bias_shrinks_with_n_and_token_wise_guidance_is_where_it_starts():
    """Exactly, by enumeration: one particle is PARGS, which does not sample the target."""
    guided = make_guided("smc", beta=1.5)
    target, _ = target_of(guided, PROMPT, 2, 1.5, top_k=3)
    token_wise = completion_distribution(guided, PROMPT, 2, beta=1.5, top_k=3)
    exact = [particle_distribution(guided, PROMPT, 2, n, beta=1.5, top_k=3) for n in (1, 2, 3)]
    assert distance(exact[0], token_wise) < 1e-9
    one, two, three = (distance(each, target) for each in exact)
    assert one > 0.2
    assert two < 0.8 * one
    assert three < 0.8 * two


@pytest.mark.thorough
@pytest.mark.parametrize("given", [{}, EARLY, EARLY | {"resample_finished": False}, {"temperature": 1.5}])
@pytest.mark.parametrize("proposal", ["pargs", "policy"])
def test_many_particles_sample_the_target_and_token_wise_guidance_does_not(proposal, given):
    """The weighted particles of 40 runs against the target, outcome by outcome, within sampling error."""
    runs, n, beta = 40, 256, 1.5
    guided = make_guided("smc", beta=beta, n=n, top_k=3)
    bias = {"logit_bias": given["logit_bias"]} if "logit_bias" in given else {}
    target, log_normaliser = target_of(guided, PROMPT, 3, beta, top_k=3, **bias)
    token_wise = distance(completion_distribution(guided, PROMPT, 3, beta=beta, top_k=3, **bias), target)
    period = {} if proposal == "pargs" else {"segment_length": 2}
    requests = guided.make_requests(
        [PROMPT] * runs, [""] * runs, [None] * runs, list(range(runs)),
        {"max_new_tokens": 3, "proposal": proposal, **period, **given},
    )  # fmt: skip
    guided._complete_all(requests, 20)
    shares = {y: torch.zeros(runs, dtype=torch.float64) for y in target}
    for i, request in enumerate(requests):
        assert sum(row.weight for row in request.particles) == pytest.approx(1)
        for row in request.particles:
            shares[tuple(row.token_ids)][i] += row.weight
    estimates = torch.tensor([math.exp(request.log_normaliser - log_normaliser) for request in requests])
    assert abs(float(estimates.mean()) - 1) < 4 * float(estimates.std()) / math.sqrt(runs) + 1e-3
    found = {y: float(share.mean()) for y, share in shares.items()}
    errors = {y: float(share.std()) / math.sqrt(runs) for y, share in shares.items()}
    noise = sum(errors.values()) / 2
    assert distance(found, target) < 2 * noise < token_wise / 2
    for y in target:
        assert abs(found[y] - target[y]) < 4.5 * errors[y] + 2e-3, y


@pytest.mark.thorough
@pytest.mark.parametrize("given", [{}, EARLY, EARLY | {"resample_finished": False}])
@pytest.mark.parametrize("proposal", ["pargs", "policy"])
def test_the_normaliser_is_unbiased_for_few_particles(proposal, given):
    """The mean over runs of exp(log_normaliser), for n = 3, is Σ_y π(y)·exp(β·r(y))."""
    runs, beta = 3000, 1.0
    guided = make_guided("smc", beta=beta, n=3, top_k=3)
    bias = {"logit_bias": given["logit_bias"]} if given else {}
    _, log_normaliser = target_of(guided, PROMPT, 3, beta, top_k=3, **bias)
    done = guided.generate_ids(
        [PROMPT] * runs, seed=list(range(runs)), batch_size=500, max_new_tokens=3, proposal=proposal, segment_length=1,
        **given,
    )  # fmt: skip
    ratios = torch.tensor([math.exp(c.log_normaliser - log_normaliser) for c in done], dtype=torch.float64)
    assert abs(float(ratios.mean()) - 1) < 4 * float(ratios.std()) / math.sqrt(runs)


@pytest.mark.parametrize("tree", [True, False])
@pytest.mark.parametrize("proposal", ["pargs", "policy"])
def test_every_kind_of_scorer_weighs_what_was_drawn(proposal, tree):
    """Rows are copied and dropped in every cache: the score of each particle is still that of its own text."""
    policy, scorers = every_scorer()
    for names in [(name,) for name in scorers] + [("separate", "text"), ("state", "vocab")]:
        chosen = {name: scorers[name] for name in names}
        beta = [1.0, 0.7][: len(names)] if len(names) > 1 else 1.0
        guided = GuidedPolicy(policy, chosen, method="smc", beta=beta, n=4, top_k=4, token_tree=tree)
        settings = {"max_new_tokens": 7, "proposal": proposal, "segment_length": 2} | EARLY
        requests = guided.make_requests(PROMPTS, [""] * 3, [None] * 3, [1, 2, 3], settings)
        guided._complete_all(requests, 3)
        alone = guided.generate_ids(PROMPTS, seed=[1, 2, 3], batch_size=1, **settings)
        for request, single in zip(requests, alone, strict=True):
            assert request.to_completion().token_ids == single.token_ids, names
            assert request.scorer_calls == single.scorer_calls, names
            for row in request.particles:
                again = make_score(guided, names, row)
                assert row.score == pytest.approx(again, abs=2e-4), names


def make_score(guided, names, row):
    """The last score of a particle's text, by token-wise guidance that must take each of its tokens."""
    pargs = GuidedPolicy(
        guided.policy, dict(zip(names, guided.scorers, strict=True)), top_k=None, token_tree=guided.token_tree,
        beta=1.0 if len(names) == 1 else list(row.betas),
    )  # fmt: skip
    (done,) = pargs.generate_ids(
        [[*row.prompt_ids, *row.token_ids[:-1]]], max_new_tokens=1, logit_bias={row.token_ids[-1]: 100.0},
    )  # fmt: skip
    assert done.token_ids == row.token_ids[-1:]
    return done.score


@pytest.mark.parametrize("proposal", ["pargs", "policy"])
def test_calls_are_those_of_all_particles(proposal):
    guided = make_guided("smc", n=4)
    done = guided.generate_ids(
        PROMPTS, max_new_tokens=10, min_new_tokens=10, proposal=proposal, segment_length=4, seed=[1, 2, 3]
    )
    for completion in done:
        assert completion.policy_calls == 40
        assert completion.scorer_calls == (40 if proposal == "pargs" else 12)  # after 4, 8 and 10 tokens
        distance = guided.resolve({}).beta * completion.score - completion.log_normaliser
        cut = completion.candidates_log_prob - completion.policy_log_prob
        steered = completion.guided_log_prob + completion.selection_nats - completion.policy_log_prob
        assert steered == pytest.approx(distance + cut, abs=1e-4)


def test_the_prompt_is_stored_once_and_copies_take_no_memory(monkeypatch):
    caches, reset = [], TreeCache.reset

    def noted(self, rows):
        caches.append(self)
        reset(self, rows)

    monkeypatch.setattr(TreeCache, "reset", noted)
    guided = make_guided("smc", n=8, beta=6.0, token_tree=True)
    prompt = list(range(3, 53))
    guided.generate_ids([prompt], max_new_tokens=9)
    policy, scorer = sorted(caches, key=lambda cache: cache.capacity)
    assert policy.capacity == len(prompt) + 8 * 9 + 8
    assert scorer.capacity == len(prompt) + 8 * 9 + 8 * 10
    best = make_guided("best-of-n", n=8, token_tree=True)
    caches.clear()
    best.generate_ids([prompt], max_new_tokens=9)
    assert policy.capacity <= caches[0].capacity


def test_weighted_particles_are_completions():
    guided = make_guided("smc", n=5, beta=2.0)
    many = guided.particles(["Once", "Hi"], max_new_tokens=6, seed=3, **EARLY)
    chosen = guided.generate(["Once", "Hi"], max_new_tokens=6, seed=3, **EARLY)
    for particles, one in zip(many, chosen, strict=True):
        assert len(particles) == 5
        assert sum(particle.weight for particle in particles) == pytest.approx(1)
        assert {particle.log_normaliser for particle in particles} == {one.log_normaliser}
        assert one.token_ids in [particle.token_ids for particle in particles]
        assert len({particle.seed for particle in particles}) == 5
    with pytest.raises(UsageError, match="draws no weighted completions"):
        make_guided("pargs").particles("Once")


def test_finished_particles_keep_their_weight_where_they_are_not_resampled():
    params = ParticleParams(finished=False)
    rows = [Request("", [0], seed, token_ids=[5], score=score) for seed, score in enumerate([9.0, 0.0, 5.0, 0.1])]
    rows[0].finish_reason = "stop"
    one = Particles(Request("", [0], 7), list(rows), [0.0] * 4)
    before = one.log_normaliser()
    assert one.resample(params) is not None
    assert one.rows[0] is rows[0]
    assert [row.score for row in one.rows[1:]] == [5.0, 5.0, 5.0]
    assert one.log_weights()[0] == 9.0
    assert one.log_normaliser() == pytest.approx(before)
    assert len({row.seed for row in one.rows}) == 4
    assert len({id(row.token_ids) for row in one.rows}) == 4


def test_particles_without_weight_are_an_error():
    for weights in ([-math.inf, -math.inf], [math.nan, 0.0]):
        with pytest.raises(NonFiniteError, match="all 2 particles have weight zero"):
            require_alive(torch.tensor(weights))
    require_alive(torch.tensor([-math.inf, 0.0]))


@pytest.mark.parametrize("proposal", ["pargs", "policy"])
@pytest.mark.parametrize("kind", ["separate", "state", "vocab", "text"])
def test_nan_scores_fail_the_request_whose_text_they_are_of(kind, proposal, monkeypatch):
    """Scores of one prompt's texts are NaN: its neighbours go on, and draw what they draw alone."""
    policy, scorers = every_scorer()
    guided = GuidedPolicy(policy, {kind: scorers[kind]}, method="smc", n=3, top_k=4)
    settings = {"max_new_tokens": 5, "proposal": proposal, "segment_length": 2}
    alone = guided.generate_ids(PROMPTS, seed=[1, 2, 3], batch_size=1, **settings)
    score = Batch._score

    def broken(self, groups):
        failed = score(self, groups)
        for group in groups:
            for scores in group.scores.values():
                bad = [i for i, row in enumerate(group.rows) if self.requests[row].prompt_ids == PROMPTS[1]]
                scores[bad] = math.nan
        return failed

    monkeypatch.setattr(Batch, "_score", broken)
    requests = guided.make_requests(PROMPTS, [""] * 3, [None] * 3, [1, 2, 3], settings)
    guided.complete(requests)
    assert isinstance(requests[1].error, NonFiniteError)
    assert f"the scorer {kind} returned NaN" in str(requests[1].error)
    for i in (0, 2):
        assert requests[i].to_completion().token_ids == alone[i].token_ids


@pytest.mark.parametrize("at_end", [True, False])
def test_a_scorer_that_raises_fails_its_request_also_at_its_end(at_end, monkeypatch):
    guided = make_guided("smc", n=3)
    settings = {"max_new_tokens": 3, "proposal": "policy", "segment_length": 16 if at_end else 2}

    def fails(self, ids):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(SeparateScorerRunner, "score", fails)
    requests = guided.make_requests([PROMPT], [""], [None], [1], settings)
    guided.complete(requests)
    assert "out of memory" in str(requests[0].error)
    assert requests[0].finish_reason is None


def test_settings_that_particles_cannot_have_are_refused():
    with pytest.raises(UsageError, match="give a temperature above 0"):
        make_guided("smc").generate_ids([PROMPT], temperature=0.0)
    with pytest.raises(UsageError, match="does not speculate"):
        make_guided("smc", draft="policy")
    with pytest.raises(UsageError, match="proposal"):
        make_guided("smc").generate_ids([PROMPT], proposal="best")
