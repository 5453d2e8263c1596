"""Speculation against the plain loop: the same tokens at T = 0, the enumerated distribution everywhere else."""

import math

import pytest
import torch

from decoding.engine.test_batch import PROMPT, PROMPTS, SETTINGS, require_frequencies
from helpers.naive import completion_distribution, info, make_guided, tiny_scorer
from helpers.tiny_models import VOCAB, tiny_policy, tiny_tokenizer
from rgtg.decoding.engine.drafters import (
    MAX_DRAFT,
    Acceptance,
    ModelDrafter,
    PolicyDrafter,
    PromptLookupDrafter,
    Roofline,
    look_up,
)
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.decoding.sampling import accept_draft
from rgtg.models.loading.policy import Policy
from rgtg.models.scorers.heads import StateHead
from rgtg.models.scorers.hidden_state_head import OwnStateScorer

# A prompt that holds every token, so that look-up finds whatever comes.
ECHO = [0, *range(3, VOCAB), 9, 14, 30, 9, 14]


def small():
    return Policy(tiny_policy(seed=5), tiny_tokenizer())


def near():
    """A drafter close to the policy: most of its tokens are accepted."""
    model = tiny_policy()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return Policy(model, tiny_tokenizer())


DRAFTS = {"policy": lambda: "policy", "lookup": lambda: "prompt-lookup", "small": small, "near": near}


def speculating(draft, **more):
    return make_guided("pargs", beta=1.5, draft=DRAFTS[draft](), **more)


@pytest.mark.thorough
@pytest.mark.parametrize("length", [1, 3, None])
@pytest.mark.parametrize("named", SETTINGS)
@pytest.mark.parametrize("draft", DRAFTS)
def test_the_distribution_is_the_enumerated_one(draft, named, length):
    guided = speculating(draft)
    prompt = ECHO if draft == "lookup" else PROMPT
    expected = completion_distribution(guided, prompt, 3, beta=1.5, **SETTINGS[named])
    draws = 20 if len(expected) == 1 else 1500
    done = guided.generate_ids(
        [prompt] * draws,
        seed=list(range(draws)),
        batch_size=draws,
        max_new_tokens=3,
        draft_length=length,
        **SETTINGS[named],
    )
    counts = dict.fromkeys(expected, 0)
    for completion in done:
        counts[tuple(completion.token_ids)] += 1  # a completion that cannot occur is a KeyError
    require_frequencies(counts, expected, draws)
    if length:
        assert sum(c.drafted for c in done) > 0


@pytest.mark.parametrize("draft", ["lookup", "small"])
def test_the_policy_alone_is_drafted_for_too(draft):
    guided = GuidedPolicy.from_pretrained(
        (tiny_policy(), tiny_tokenizer()), method="policy", draft=DRAFTS[draft](), top_k=3
    )
    expected = completion_distribution(guided, ECHO, 3, top_k=3)
    done = guided.generate_ids([ECHO] * 1500, seed=list(range(1500)), batch_size=1500, max_new_tokens=3, draft_length=2)
    counts = dict.fromkeys(expected, 0)
    for completion in done:
        counts[tuple(completion.token_ids)] += 1
    require_frequencies(counts, expected, 1500)
    assert all(c.score is None and c.scorer_calls == 0 for c in done)


@pytest.mark.thorough
@pytest.mark.parametrize("length", [None, 0, 4, MAX_DRAFT])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "opt"])
@pytest.mark.parametrize("draft", DRAFTS)
def test_greedy_tokens_equal_those_without_drafts(draft, family, length):
    drafter = DRAFTS[draft]()
    if isinstance(drafter, Policy):
        drafter = Policy(tiny_policy(family, seed=5 if draft == "small" else 0), tiny_tokenizer())
    prompts = [*PROMPTS, ECHO]
    plain = make_guided("pargs-greedy", family, beta=1.5).generate_ids(prompts, max_new_tokens=14, trace=True)
    fast = make_guided("pargs-greedy", family, beta=1.5, draft=drafter).generate_ids(
        prompts, max_new_tokens=14, trace=True, draft_length=length
    )
    for a, b in zip(plain, fast, strict=True):
        assert (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason)
        assert a.policy_log_prob == pytest.approx(b.policy_log_prob, abs=1e-3)
        assert a.score == pytest.approx(b.score, abs=1e-4)
        for mine, theirs in zip(a.trace, b.trace, strict=True):
            assert mine.candidate_ids == theirs.candidate_ids
            assert mine.scores == pytest.approx(theirs.scores, abs=1e-4)
            assert mine.policy_log_probs == pytest.approx(theirs.policy_log_probs, abs=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("tree", [True, False])
@pytest.mark.parametrize("draft", DRAFTS)
def test_a_request_depends_on_no_neighbour(draft, tree):
    guided = speculating(draft, top_k=6, token_tree=tree)
    prompts, seeds = [*PROMPTS, ECHO], [3, 1, 4, 1, 5]

    def run(order, size):
        done = guided.generate_ids(
            [prompts[i] for i in order], seed=[seeds[i] for i in order], batch_size=size, max_new_tokens=12
        )
        return {i: (c.token_ids, c.drafted, c.accepted, c.policy_calls) for i, c in zip(order, done, strict=True)}

    alone = run([0, 1, 2, 3, 4], 1)
    assert run([0, 1, 2, 3, 4], 5) == alone
    assert run([4, 2, 0, 3, 1], 3) == alone


def test_processors_see_the_drafted_tokens():
    settings = {"max_new_tokens": 12, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3, "min_new_tokens": 6}
    settings["logit_bias"] = {9: 4.0, 40: -100.0}
    plain = make_guided("pargs-greedy", beta=1.5).generate_ids([*PROMPTS, ECHO], **settings)
    for draft in DRAFTS:
        guided = make_guided("pargs-greedy", beta=1.5, draft=DRAFTS[draft]())
        fast = guided.generate_ids([*PROMPTS, ECHO], draft_length=4, **settings)
        assert [c.token_ids for c in plain] == [c.token_ids for c in fast]


def test_a_stop_text_inside_an_accepted_draft_ends_the_completion():
    plain = make_guided("pargs-greedy", beta=1.5).generate_ids(PROMPTS, max_new_tokens=12)
    stop = [plain[0].text[3:5]]
    expected = make_guided("pargs-greedy", beta=1.5).generate_ids(PROMPTS, max_new_tokens=12, stop=stop)
    fast = make_guided("pargs-greedy", beta=1.5, draft=near()).generate_ids(
        PROMPTS, max_new_tokens=12, stop=stop, draft_length=5
    )
    assert [(c.text, c.finish_reason) for c in expected] == [(c.text, c.finish_reason) for c in fast]
    assert expected[0].finish_reason == "stop"


def test_a_good_drafter_saves_passes_and_counts_them():
    guided = make_guided("pargs", beta=0.0, draft="policy", top_k=5)
    (done,) = guided.generate_ids([PROMPT], max_new_tokens=25, min_new_tokens=25, draft_length=4)
    assert done.accepted == done.drafted  # beta 0: the guided distribution is the draft's own
    assert done.scorer_calls == 1 + math.ceil(24 / 5)
    assert done.policy_calls == 25


def test_streaming_gives_the_whole_text():
    guided = speculating("policy")
    whole = guided.generate("Once upon", seed=2, max_new_tokens=20)[0].text
    assert "".join(guided.stream("Once upon", seed=2, max_new_tokens=20)) == whole


# The rule and the choice of lengths


def test_accepted_or_recovered_a_token_has_the_target_distribution():
    p = torch.tensor([[0.5, 0.3, 0.2, 0.0]], dtype=torch.float64)
    for q in ([0.1, 0.2, 0.3, 0.4], [0.5, 0.3, 0.2, 0.0], [0.0, 1.0, 0.0, 0.0]):
        q = torch.tensor([q], dtype=torch.float64)
        out = torch.zeros(4, dtype=torch.float64)
        for d in range(4):
            steps = 10_000
            uniforms = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
            drafted = torch.full((steps,), d)
            accepted, rest = accept_draft(p.log().expand(steps, -1), q.log().expand(steps, -1), drafted, uniforms)
            rate = accepted.double().mean()
            assert rate == pytest.approx(
                min(1.0, float(p[0, d] / q[0, d])) if q[0, d] > 0 else float(p[0, d] > 0), abs=1e-3
            )
            out[d] += q[0, d] * rate
            out += q[0, d] * (1 - rate) * rest[0].exp().double()
        torch.testing.assert_close(out, p[0], atol=1e-3, rtol=0)


def test_a_draft_that_is_no_candidate_is_rejected():
    p = torch.tensor([[0.25, 0.75]]).log()
    accepted, rest = accept_draft(p, torch.full((1, 2), -torch.inf), torch.tensor([-1]), torch.tensor([0.0]))
    assert not accepted[0]
    torch.testing.assert_close(rest, p)


def test_look_up_takes_the_last_longest_match():
    assert look_up([1, 2, 3, 4, 5, 1, 2, 3], 2) == [4, 5]
    assert look_up([7, 3, 8, 1, 3, 9, 2, 3], 1) == [9]
    assert look_up([1, 2, 3], 4) == []
    assert look_up([4, 4], 3) == [4]


def roofline(policy=1.0, scorer=4.0, compute_bound_rows=256.0):
    return Roofline(policy, scorer, compute_bound_rows, 10)


def prices(drafter, c):
    return [drafter.cost(n) + c.verify(n) for n in range(MAX_DRAFT + 1)]


def test_lengths_follow_acceptance_and_costs():
    dear = prices(PolicyDrafter(None, roofline()), roofline())
    assert Acceptance(9.5, 10).best_length(dear) > Acceptance(5, 10).best_length(dear) >= 1
    cheap_scorer = prices(PolicyDrafter(None, roofline(scorer=0.05)), roofline(scorer=0.05))
    assert Acceptance(3, 10).best_length(cheap_scorer) == 0
    tight = prices(PolicyDrafter(None, roofline(compute_bound_rows=5.0)), roofline(compute_bound_rows=5.0))
    assert Acceptance(5, 10).best_length(tight) == 0
    assert Acceptance(9, 10).best_length(prices(PromptLookupDrafter(roofline()), roofline())) == MAX_DRAFT
    assert Acceptance(9, 10).best_length(prices(ModelDrafter(None, 50.0, roofline()), roofline())) == 0


def test_a_request_that_stopped_drafting_tries_again():
    record = Acceptance()
    price = prices(PolicyDrafter(None, roofline()), roofline())
    for _ in range(30):
        record.update(0, 1)
    assert record.best_length(price) == 0
    for _ in range(16):
        record.update(0, 0)
    assert record.best_length(price) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "policy", "draft": "policy"}, "cannot draft for itself"),
        ({"draft": "policy", "top_k": None}, "set top_k"),
        ({"draft": "policy", "top_k": 500}, "at most 128 candidates"),
        ({"method": "best-of-n", "draft": "policy"}, "does not speculate"),
        ({"draft": "no-such-folder/x/y"}, "no-such-folder"),
    ],
)
def test_drafts_that_cannot_be_verified_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_guided(**settings)


def test_a_scorer_on_the_policys_states_is_not_speculated_on():
    policy = Policy(tiny_policy(), tiny_tokenizer())
    about = info().model_copy(update={"trunk": "own", "head": "state", "layer": 2})
    with pytest.raises(ValueError, match="costs too little to speculate on"):
        GuidedPolicy(policy, OwnStateScorer(policy, StateHead(32, 4), about), draft="policy")


def test_a_draft_length_without_a_draft_is_refused():
    with pytest.raises(ValueError, match="draft_length applies to speculative decoding"):
        make_guided().generate_ids([PROMPT], draft_length=2)


def test_a_draft_with_another_tokenizer_is_refused():
    other = tiny_tokenizer()
    other.add_tokens(["zzz"])
    model = tiny_policy()
    model.resize_token_embeddings(VOCAB + 1)
    with pytest.raises(ValueError, match="different tokenizers"):
        GuidedPolicy(Policy(tiny_policy(), tiny_tokenizer()), tiny_scorer(), draft=Policy(model, other))
