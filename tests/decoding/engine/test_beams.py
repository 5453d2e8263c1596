"""Beam search: against a slow one, against the greedy method, and against all texts there are."""

import math

import pytest

from helpers.naive import beam_search, completion_distribution, make_guided, processed_log_probs, reward
from helpers.scorer_kinds import every_scorer
from rgtg.decoding.engine.batch import Batch
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.decoding.runners.kv_cache import TreeCache
from rgtg.decoding.runners.scorer_runner import SeparateScorerRunner
from rgtg.errors import NonFiniteError, UsageError

PROMPT = [0, 9, 14, 30]
PROMPTS = [PROMPT, [0, 44], [0, 7, 7, 30, 31, 3, 52]]
EARLY = {"logit_bias": {2: 4.0}}  # EOS is likely: texts end at different times


@pytest.mark.parametrize("tree", [True, False])
def test_one_beam_is_the_greedy_method_with_every_kind_of_scorer(tree):
    policy, scorers = every_scorer()
    for names in [(name,) for name in scorers] + [("separate", "text"), ("adapter", "state")]:
        chosen = {name: scorers[name] for name in names}
        beta = 1.5 if len(names) == 1 else [1.0, -0.5]
        for given in ({}, EARLY, {"stop": ["e"], "top_p": 0.9}):
            settings = {"max_new_tokens": 7, "top_k": 5, **given}
            one, greedy = (
                GuidedPolicy(policy, chosen, method=method, beta=beta, token_tree=tree).generate_ids(
                    PROMPTS, **settings, **({"n": 1} if method == "beam" else {})
                )
                for method in ("beam", "pargs-greedy")
            )
            for a, b in zip(one, greedy, strict=True):
                assert (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason), names
                for name in ("policy_log_prob", "guided_log_prob", "candidates_log_prob", "score"):
                    assert getattr(a, name) == pytest.approx(getattr(b, name), abs=1e-3), names
                assert (a.policy_calls, a.scorer_calls) == (b.policy_calls, b.scorer_calls)


@pytest.mark.parametrize("given", [{}, EARLY])
@pytest.mark.parametrize(("n", "every"), [(2, 1), (4, 1), (3, 2), (3, 3)])
def test_beams_are_those_of_a_slow_search(n, every, given):
    for method_tree in (True, False):
        guided = make_guided("beam", beta=1.5, n=n, top_k=4, token_tree=method_tree)
        done = guided.generate_ids(PROMPTS, max_new_tokens=5, segment_length=every, **given)
        alone = guided.generate_ids(PROMPTS, max_new_tokens=5, segment_length=every, batch_size=1, **given)
        for prompt, completion, single in zip(PROMPTS, done, alone, strict=True):
            tokens, _ = beam_search(guided, prompt, 5, n, beta=1.5, every=every, top_k=4, **given)
            assert tuple(completion.token_ids) == tokens
            assert (completion.policy_calls, completion.scorer_calls) == (single.policy_calls, single.scorer_calls)
            read = reward(guided.scorer.model, [*prompt, *tokens])
            assert completion.score == pytest.approx(read, abs=1e-4)


@pytest.mark.parametrize("kind", ["separate", "state", "vocab", "adapter", "vocabulary scorer", "text", "encoder"])
def test_rows_that_are_copied_between_scoring_and_committing_keep_their_scores(kind):
    """The score of the best text is that of its own tokens, whatever rows its beginnings were in."""
    policy, scorers = every_scorer()
    for tree in (True, False):
        guided = GuidedPolicy(policy, {kind: scorers[kind]}, method="beam", beta=2.0, n=4, top_k=4, token_tree=tree)
        for completion, prompt in zip(guided.generate_ids(PROMPTS, max_new_tokens=6), PROMPTS, strict=True):
            again = GuidedPolicy(policy, {kind: scorers[kind]}, top_k=None, token_tree=tree).generate_ids(
                [[*prompt, *completion.token_ids[:-1]]], max_new_tokens=1, logit_bias={completion.token_ids[-1]: 100.0}
            )
            assert again[0].token_ids == completion.token_ids[-1:]
            assert completion.score == pytest.approx(again[0].score, abs=2e-4)


def test_wide_beams_find_the_best_text_of_all():
    guided = make_guided("beam", beta=1.5, n=30, top_k=3)
    (done,) = guided.generate_ids([PROMPT], max_new_tokens=3, **EARLY)
    texts = completion_distribution(guided, PROMPT, 3, top_k=3, **EARLY)
    values = {}
    for tokens in texts:
        read = reward(guided.scorer.model, [*PROMPT, *tokens])
        values[tokens] = sum(log_probs_of(guided, PROMPT, tokens)) + 1.5 * read
    assert tuple(done.token_ids) == max(values, key=values.__getitem__)
    greedy = make_guided("pargs-greedy", beta=1.5, top_k=3).generate_ids([PROMPT], max_new_tokens=3, **EARLY)
    assert values[tuple(done.token_ids)] >= values[tuple(greedy[0].token_ids)]


def log_probs_of(guided, prompt, tokens):
    for i, token in enumerate(tokens):
        yield float(processed_log_probs(guided, [*prompt, *tokens[:i]], EARLY["logit_bias"])[token])


def test_beams_do_not_depend_on_seeds_and_count_their_calls():
    guided = make_guided("beam", n=4)
    one, two = (
        guided.generate_ids(PROMPTS, seed=seed, max_new_tokens=6, min_new_tokens=6, segment_length=3) for seed in (1, 2)
    )
    assert [c.token_ids for c in one] == [c.token_ids for c in two]
    for completion in one:
        assert completion.policy_calls == 1 + 5 * 4  # one text at first
        assert completion.scorer_calls == 4 + 4  # after three tokens and after six


def test_beams_take_no_more_memory_than_n_completions(monkeypatch):
    caches, reset = [], TreeCache.reset

    def noted(self, rows):
        caches.append(self)
        reset(self, rows)

    monkeypatch.setattr(TreeCache, "reset", noted)
    guided = make_guided("beam", n=5, token_tree=True)
    prompt = list(range(3, 43))
    guided.generate_ids([prompt], max_new_tokens=9)
    assert min(cache.capacity for cache in caches) == len(prompt) + 5 * 9 + 5


def test_nan_scores_fail_the_request_whose_text_they_are_of(monkeypatch):
    guided = make_guided("beam", n=3)
    alone = guided.generate_ids(PROMPTS, batch_size=1, max_new_tokens=5)
    score = Batch._score

    def broken(self, groups):
        failed = score(self, groups)
        for group in groups:
            for scores in group.scores.values():
                scores[[i for i, row in enumerate(group.rows) if self.requests[row].prompt_ids == PROMPTS[1]]] = (
                    math.nan
                )
        return failed

    monkeypatch.setattr(Batch, "_score", broken)
    requests = guided.make_requests(PROMPTS, [""] * 3, [None] * 3, [1, 2, 3], {"max_new_tokens": 5})
    guided.complete(requests)
    assert isinstance(requests[1].error, NonFiniteError)
    for i in (0, 2):
        assert requests[i].to_completion().token_ids == alone[i].token_ids
    guided.policy.model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="no finite probability"):
        guided.generate_ids([PROMPT], max_new_tokens=2)


def test_a_scorer_that_raises_is_an_error_of_the_request(monkeypatch):
    guided = make_guided("beam", n=3)

    def fails(self, ids):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(SeparateScorerRunner, "score", fails)
    requests = guided.make_requests([PROMPT], [""], [None], [1], {"max_new_tokens": 5})
    guided.complete(requests)
    assert "out of memory" in str(requests[0].error)


def test_what_beams_cannot_do_is_refused():
    with pytest.raises(UsageError, match="has no temperature"):
        make_guided("beam").generate_ids([PROMPT], temperature=0.5)
    with pytest.raises(UsageError, match="does not speculate"):
        make_guided("beam", draft="policy")
    with pytest.raises(UsageError, match="draws no weighted completions"):
        make_guided("beam").particles("Once")
