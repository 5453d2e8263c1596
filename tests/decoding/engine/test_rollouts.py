import functools
import math

import pytest
import torch

from helpers.naive import EOS, completion_distribution, make_guided, next_log_probs
from helpers.tiny_models import VOCAB, tiny_policy, tiny_tokenizer
from rgtg.decoding.engine import rollouts
from rgtg.decoding.engine.rollouts import next_candidates, roll_out
from rgtg.errors import NonFiniteError
from rgtg.models.loading.policy import Policy

PROMPT = [5, 9, 14]


def policy(family="llama"):
    return Policy(tiny_policy(family), tiny_tokenizer())


def run(of, candidates, n, *, written=(), limit=3, **options):
    return roll_out(of, "abc", PROMPT, list(written), candidates, n=n, max_new_tokens=limit, seed=4, **options)


def test_candidates_are_the_likeliest_next_tokens():
    found, log_probs = next_candidates(policy(), PROMPT, 5)
    whole = next_log_probs(tiny_policy(), PROMPT)
    assert found == whole.argsort(descending=True)[:5].tolist()
    assert log_probs == pytest.approx(whole[found].tolist(), abs=1e-4)


def test_top_k_over_the_vocabulary_gives_all_tokens():
    assert sorted(next_candidates(policy(), PROMPT, 1000)[0]) == list(range(VOCAB))


def test_nan_of_the_policy_is_an_error():
    model = tiny_policy()
    model.lm_head.weight.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="policy"):
        next_candidates(Policy(model, tiny_tokenizer()), PROMPT, 3)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_roll_outs_have_the_policys_distribution(family):
    (first,), _ = next_candidates(policy(family), [*PROMPT, 7], 1)
    drawn = run(policy(family), [first], 4000, written=[7])[0]
    exact = completion_distribution(make_guided("policy", family), [*PROMPT, 7, first], 1)
    seen = torch.tensor([row.token_ids[2] for row in drawn])
    for (token,), probability in exact.items():
        share = float((seen == token).double().mean())
        assert share == pytest.approx(probability, abs=4.5 * math.sqrt(probability / 4000) + 1e-3)


def test_a_roll_out_depends_on_no_neighbour():
    one = run(policy(), [6, 20], 3, limit=8, batch_size=1)
    many = run(policy(), [6, 20], 3, limit=8)
    assert [[row.token_ids for row in group] for group in one] == [[row.token_ids for row in group] for group in many]
    alone = run(policy(), [20], 2, limit=8)
    assert [row.token_ids for row in alone[0]] == [row.token_ids for row in many[1][:2]]
    assert len({tuple(row.token_ids) for group in many for row in group}) == 6


def test_a_model_without_a_token_tree_draws_the_same(monkeypatch):
    fast = run(policy(), [6, 20], 2, written=[8], limit=6)
    monkeypatch.setattr(rollouts, "make_runner", functools.partial(rollouts.make_runner, tree=False))
    slow = run(policy(), [6, 20], 2, written=[8], limit=6)
    assert [[row.token_ids for row in group] for group in fast] == [[row.token_ids for row in group] for group in slow]


def test_roll_outs_begin_with_what_was_written_and_keep_the_limit():
    for group, token in zip(run(policy(), [6, 20], 5, written=[8, 9], limit=6), (6, 20), strict=True):
        for row in group:
            assert row.token_ids[:3] == [8, 9, token]
            assert len(row.token_ids) == 6 or row.token_ids[-1] == EOS
            assert row.finish_reason == ("stop" if row.token_ids[-1] == EOS else "length")
            assert row.text == tiny_tokenizer().decode(row.token_ids, skip_special_tokens=True)


def test_a_candidate_that_ends_the_completion_is_not_sampled_from():
    ((end, again),) = run(policy(), [EOS], 2, written=[8])
    assert end.token_ids == again.token_ids == [8, EOS]
    assert (end.finish_reason, end.policy_calls) == ("stop", 0)
    ((full,),) = run(policy(), [6], 1, written=[8, 9], limit=3)
    assert full.token_ids == [8, 9, 6]
    assert (full.finish_reason, full.policy_calls) == ("length", 0)
